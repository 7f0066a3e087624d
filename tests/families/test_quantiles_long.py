"""Distribution functions and quantiles of all families that have them."""

import pytest
from test_quantiles import ROWS, check_quantiles


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("gamma", "gaussian")])
def test_quantiles_and_distribution_functions_are_scipys(name, dtype):
    check_quantiles(name, dtype)
