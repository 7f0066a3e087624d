"""How grad_mu E_q[loss] is approximated: where the loss is looked at, and which curvature."""

from blr_optax.estimators._curvature import (
    Curvature,
    absolute_gradient,
    exact,
    hutchinson,
    per_example_squares,
    reparameterized,
    squared_gradient,
)
from blr_optax.estimators._discrete import concrete, enumerate
from blr_optax.estimators._estimator import Estimator
from blr_optax.estimators._expectation import cubature, delta, gauss_hermite, monte_carlo
from blr_optax.estimators._general import least_squares, score_function
from blr_optax.estimators._natural_gradient import natural_gradient
from blr_optax.estimators._terms import Term, conjugate, glm

__all__ = [
    "Curvature",
    "Estimator",
    "Term",
    "absolute_gradient",
    "concrete",
    "conjugate",
    "cubature",
    "delta",
    "enumerate",
    "exact",
    "gauss_hermite",
    "glm",
    "hutchinson",
    "least_squares",
    "monte_carlo",
    "natural_gradient",
    "per_example_squares",
    "reparameterized",
    "score_function",
    "squared_gradient",
]
