"""How grad_mu E_q[loss] is approximated: where the loss is looked at, and which curvature."""

from blr_optax.estimators._curvature import (
    Curvature,
    exact,
    hutchinson,
    per_example_squares,
    reparameterized,
    squared_gradient,
)
from blr_optax.estimators._discrete import concrete, enumerate
from blr_optax.estimators._estimator import Estimator
from blr_optax.estimators._expectation import cubature, delta, gauss_hermite, monte_carlo
from blr_optax.estimators._explain import explain, per_example_dot
from blr_optax.estimators._general import least_squares, score_function
from blr_optax.estimators._natural_gradient import natural_gradient
from blr_optax.estimators._per_example import PerExample, per_example
from blr_optax.estimators._terms import Term, conjugate, glm

__all__ = [
    "Curvature",
    "Estimator",
    "PerExample",
    "Term",
    "concrete",
    "conjugate",
    "cubature",
    "delta",
    "enumerate",
    "exact",
    "explain",
    "gauss_hermite",
    "glm",
    "hutchinson",
    "least_squares",
    "monte_carlo",
    "natural_gradient",
    "per_example",
    "per_example_dot",
    "per_example_squares",
    "reparameterized",
    "score_function",
    "squared_gradient",
]
