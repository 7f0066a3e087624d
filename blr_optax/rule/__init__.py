"""The rule: one step on natural parameters, and the transformations made of it."""

from blr_optax.rule._blr_update import BlrUpdateState, blr_update
from blr_optax.rule._natural_step import natural_step
from blr_optax.rule._precision import EmpiricalPrior, ScaleByPrecisionState, scale_by_precision
from blr_optax.rule._with_posterior import PointReader, WithPosteriorState, with_posterior

__all__ = [
    "BlrUpdateState",
    "EmpiricalPrior",
    "PointReader",
    "ScaleByPrecisionState",
    "WithPosteriorState",
    "blr_update",
    "natural_step",
    "scale_by_precision",
    "with_posterior",
]
