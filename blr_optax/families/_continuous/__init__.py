"""Families over numbers, vectors, and points of a simplex or a sphere."""
