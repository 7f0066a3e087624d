"""blr_optax: the Bayesian learning rule as optax transformations that carry a posterior.

lambda <- lambda - rho * grad_mu { E_q[loss] - H(q) }
"""

from typing import Any

from blr_optax import estimators, families, metrics, plots, rule
from blr_optax._posterior import Posterior

# The deep-learning rows.
from blr_optax.optimizers import (
    adam,
    dropout,
    gradient_descent,
    ivon,
    mixture_ivon,
    mixture_newton,
    multimodal,
    newton,
    ogn,
    online_newton,
    rmsprop,
    sgd,
    soba,
    vadam,
    variational_online_newton,
    vogn,
    vprop,
)

# What a posterior is for.
from blr_optax.predict import Predictive, binary_link, predict, predict_regression

# The rule, and reading any optimizer state.
from blr_optax.rule import (
    Estimate,
    blr_update,
    estimate,
    natural_step,
    posterior,
    reseed,
    sample,
    scale_by_precision,
    with_posterior,
)

__version__ = "0.1.0"

__all__ = [
    "Estimate",
    "PerExample",
    "Posterior",
    "Predictive",
    "adam",
    "binary_link",
    "blr_update",
    "dropout",
    "estimate",
    "estimators",
    "explain",
    "families",
    "gradient_descent",
    "ivon",
    "metrics",
    "mixture_ivon",
    "mixture_newton",
    "multimodal",
    "natural_step",
    "newton",
    "ogn",
    "online_newton",
    "per_example",
    "per_example_dot",
    "plots",
    "posterior",
    "predict",
    "predict_regression",
    "reseed",
    "rmsprop",
    "rule",
    "sample",
    "scale_by_precision",
    "sgd",
    "soba",
    "vadam",
    "variational_online_newton",
    "vogn",
    "vprop",
    "with_posterior",
]

# Statistics of per-example gradients, imported when first asked for.
_BY_EXAMPLE = ("PerExample", "explain", "per_example", "per_example_dot")


def __getattr__(name: str) -> Any:
    """A name of `estimators` that is not imported yet."""
    if name not in _BY_EXAMPLE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(estimators, name)
    return globals()[name]
