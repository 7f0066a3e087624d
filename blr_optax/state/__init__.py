"""Reading the posterior in any optimizer state: sample, estimate, posterior, diagnostics."""

from blr_optax.state._diagnostics import Diagnostics, diagnostics
from blr_optax.state._estimate import Estimate, estimate
from blr_optax.state._make_step import StepInfo, make_step
from blr_optax.state._reader import Reader
from blr_optax.state._reading import posterior, reseed, sample

__all__ = [
    "Diagnostics",
    "Estimate",
    "Reader",
    "StepInfo",
    "diagnostics",
    "estimate",
    "make_step",
    "posterior",
    "reseed",
    "sample",
]
