"""The rule: one step on natural parameters, the transformation made of it, reading its state."""

from blr_optax.rule._diagnostics import Diagnostics, diagnostics
from blr_optax.rule._estimate import Estimate, estimate
from blr_optax.rule._point import PointRule, WithPosteriorState, with_posterior
from blr_optax.rule._precision import ScaleByPrecisionState, scale_by_precision
from blr_optax.rule._prior import EmpiricalPrior
from blr_optax.rule._protocol import Rule
from blr_optax.rule._read import posterior, reseed, sample
from blr_optax.rule._step import natural_step
from blr_optax.rule._update import BlrUpdateState, blr_update

__all__ = [
    "BlrUpdateState",
    "Diagnostics",
    "EmpiricalPrior",
    "Estimate",
    "PointRule",
    "Rule",
    "ScaleByPrecisionState",
    "WithPosteriorState",
    "blr_update",
    "diagnostics",
    "estimate",
    "natural_step",
    "posterior",
    "reseed",
    "sample",
    "scale_by_precision",
    "with_posterior",
]
