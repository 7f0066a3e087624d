"""How grad_mu E_q[loss] is approximated: where the loss is looked at, and which curvature."""

from blr_optax.estimators._curvature import (
    Curvature,
    exact,
    hutchinson,
    reparameterized,
    squared_gradient,
)
from blr_optax.estimators._expectation import Estimator, delta, gauss_hermite, monte_carlo
from blr_optax.estimators._natural_gradient import natural_gradient
from blr_optax.estimators._terms import Term, conjugate, glm

__all__ = [
    "Curvature",
    "Estimator",
    "Term",
    "conjugate",
    "delta",
    "exact",
    "gauss_hermite",
    "glm",
    "hutchinson",
    "monte_carlo",
    "natural_gradient",
    "reparameterized",
    "squared_gradient",
]
