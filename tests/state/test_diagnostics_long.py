"""What the correction sustains at a small rate, which takes many steps of many weights."""

import pytest
from test_diagnostics import sustained


@pytest.mark.parametrize(("rho", "ess"), [(3e-3, 1e5)])
def test_without_curvature_the_correction_sustains_the_precision(rho, ess):
    sustained(rho, ess)
