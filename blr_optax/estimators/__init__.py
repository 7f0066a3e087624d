"""How grad_mu E_q[loss] is approximated: where the loss is evaluated, and which curvature."""

from blr_optax.estimators._curvature import (
    Curvature,
    absolute_gradient,
    exact,
    hutchinson,
    per_example_squares,
    reparameterized,
    squared_gradient,
)
from blr_optax.estimators._discrete import concrete, enumeration
from blr_optax.estimators._estimator import Estimator
from blr_optax.estimators._expectation import delta, monte_carlo, shared_draws
from blr_optax.estimators._general import closed_form, least_squares, pathwise, score_function
from blr_optax.estimators._natural_gradient import natural_gradient
from blr_optax.estimators._quadrature import cubature, gauss_hermite
from blr_optax.estimators._terms import Term, conjugate, glm

__all__ = [
    "Curvature",
    "Estimator",
    "Term",
    "absolute_gradient",
    "closed_form",
    "concrete",
    "conjugate",
    "cubature",
    "delta",
    "enumeration",
    "exact",
    "gauss_hermite",
    "glm",
    "hutchinson",
    "least_squares",
    "monte_carlo",
    "natural_gradient",
    "pathwise",
    "per_example_squares",
    "reparameterized",
    "score_function",
    "shared_draws",
    "squared_gradient",
]
