"""How grad_mu E_q[loss] is approximated: where the loss is looked at, and which curvature."""

from __future__ import annotations

import importlib
from typing import Any

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
    "KroneckerFactors",
    "PerExample",
    "Term",
    "absolute_gradient",
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

# Imported when first asked for: most programs have no need of the layer taps.
_HOME = {
    "KroneckerFactors": "_taps._moments",
    "PerExample": "_per_example",
    "explain": "_explain",
    "per_example": "_per_example",
    "per_example_dot": "_explain",
}


def __getattr__(name: str) -> Any:
    """A name of the layer taps that is not imported yet."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found
