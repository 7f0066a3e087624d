"""Reading the posterior in any optimizer state: sample, estimate, posterior, diagnostics."""

from blr_optax.state._check import CheckReport, Finding, check
from blr_optax.state._diagnostics import Diagnostics, diagnostics
from blr_optax.state._estimate import Estimate, estimate
from blr_optax.state._make_step import StepInfo, make_step
from blr_optax.state._reader import Reader
from blr_optax.state._reading import posterior, reseed, sample

__all__ = [
    "CheckReport",
    "Diagnostics",
    "Estimate",
    "Finding",
    "Reader",
    "StepInfo",
    "check",
    "diagnostics",
    "estimate",
    "make_step",
    "posterior",
    "reseed",
    "sample",
]
