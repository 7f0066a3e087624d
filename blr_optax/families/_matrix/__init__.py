"""Families over positive definite matrices, alone or with a mean."""
