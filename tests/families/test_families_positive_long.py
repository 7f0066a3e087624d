"""Families on the half-line, the line and the simplex: golden values."""

import numpy as np
import pytest
from family_rows.positive import ROWS
from test_families_positive import (
    GROUPS,
    bar,
    cases_of,
    check,
    density_points,
    golden,
    golden_numbers,
    wide_density,
    wide_numbers,
)


@pytest.mark.parametrize(("name", "parts"), GROUPS)
def test_golden_values(name, parts, dtype):
    family, cases, found = ROWS[name].family, cases_of(name, parts), golden(name, parts, dtype)
    flat = np.abs(found["flat"])
    fisher = np.array([c["fisher"] for c in cases])
    np.testing.assert_allclose(
        found["flat"], np.array([c["natural"] for c in cases]), rtol=10 * bar(dtype)
    )
    value, conditioning = wide_numbers(name, parts)
    if dtype is np.float32:
        value = found["numbers"]
    check(value, [golden_numbers(family, case) for case in cases], dtype, conditioning)

    moved = np.einsum("nij,nj->ni", np.abs(fisher), flat)
    check(found["mu"], [c["expectation"] for c in cases], dtype, moved)
    # lambda is a concentration less one: what it rounds is far more of a small one.
    small = [np.min(c["params"].get("alpha", c["params"].get("a", 1.0))) for c in cases]
    small = [min(x, c["params"].get("b", 1.0)) for x, c in zip(small, cases, strict=True)]
    size = 1 / np.minimum(small, 1.0)[:, None, None]
    check(found["fisher"], fisher, dtype, size * np.abs(fisher))


@pytest.mark.parametrize(("name", "parts"), GROUPS)
def test_golden_log_prob(name, parts, dtype):
    value, conditioning = wide_density(name, parts)
    if dtype is np.float32:
        value = golden(name, parts, dtype)["log_prob"]
    check(value, density_points(name, parts)[-1], dtype, conditioning)
