"""Families over signs, categories and counts."""
