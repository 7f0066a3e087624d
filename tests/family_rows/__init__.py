"""The table of families that drives their test battery: a new family is one more row."""

from family_rows import gaussian
from family_rows._row import Row, spd

__all__ = ["CONDITIONAL", "ROWS", "Row", "spd"]

ROWS: dict[str, Row] = {**gaussian.ROWS}

# Families on the smaller base, with tests of their own.
CONDITIONAL: tuple[str, ...] = ()
