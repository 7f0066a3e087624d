"""The table of families that drives their test battery: a new family is one more row."""

from collections.abc import Container

import pytest

from family_rows import discrete, gaussian, matrix, positive
from family_rows._row import Row, spd

__all__ = ["CONDITIONAL", "CORE", "ROWS", "Row", "mark_slow", "rows", "spd"]

ROWS: dict[str, Row] = {**gaussian.ROWS, **positive.ROWS, **discrete.ROWS, **matrix.ROWS}

# Families on the smaller base, with tests of their own.
CONDITIONAL = (
    "mixture",
    "skew_gaussian",
    "student_t",
    "gaussian_low_rank",
    "matrix_gaussian",
)

# What compiles much runs on these in every run, and on all in the slow one.
CORE = ("normal", "gaussian", "bernoulli", "gamma", "dirichlet")
# One family of each kind for the rest of the battery; their next of kin in the slow run.
FAST = (
    *CORE,
    "gaussian_fixed",
    "inverse_gaussian",
    "categorical",
    "binomial",
    "poisson",
    "von_mises_fisher",
    "wishart",
    "normal_gamma",
)


def mark_slow(name: str, fast: Container[str] = FAST) -> tuple:
    """The mark of a family that is not among the fast ones."""
    return () if name in fast else (pytest.mark.slow,)


def rows(fast: Container[str] = FAST, flag: str | None = None) -> list:
    """pytest parameters: all rows, or those whose family has a flag."""
    return [
        pytest.param(row, id=name, marks=mark_slow(name, fast))
        for name, row in ROWS.items()
        if flag is None or getattr(row.family, flag)
    ]
