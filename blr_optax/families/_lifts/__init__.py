"""Families over pytrees and several variables, made of families over one."""
