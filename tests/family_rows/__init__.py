"""The table of families that drives their test battery: a new family is one more row."""

from collections.abc import Callable

import pytest

from family_rows import discrete, gaussian, matrix, positive
from family_rows._row import Row, spd

__all__ = ["CONDITIONAL", "ROWS", "Row", "rows", "spd"]

ROWS: dict[str, Row] = {**gaussian.ROWS, **positive.ROWS, **discrete.ROWS, **matrix.ROWS}

# Families on the smaller base, with tests of their own.
CONDITIONAL = (
    "mixture",
    "skew_gaussian",
    "student_t",
    "gaussian_low_rank",
    "matrix_gaussian",
)

# The first row of every kind; the other ones are for the slow run.
FAST = {row.kind: name for name, row in reversed(ROWS.items())}


def rows(flag: str | None = None, variants: Callable[[str, Row], tuple] | None = None) -> list:
    """pytest parameters: a row, or a row and a variant of it.

    Args:
        flag: only families that have this attribute.
        variants: (name, row) -> the variants of a row, which end its id; None adds nothing.
    """
    found = []
    for name, row in ROWS.items():
        if flag and not getattr(row.family, flag):
            continue
        marks = () if FAST[row.kind] == name else (pytest.mark.slow,)
        if variants is None:
            found.append(pytest.param(row, id=name, marks=marks))
            continue
        for variant in variants(name, row):
            label = f"{name}-{variant}" if variant else name
            found.append(pytest.param(row, variant, id=label, marks=marks))
    return found
