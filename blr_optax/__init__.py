"""blr_optax: the Bayesian learning rule as optax transformations that carry a posterior.

lambda <- lambda - rho * grad_mu { E_q[loss] - H(q) }
"""

import importlib
from typing import TYPE_CHECKING, Any

from blr_optax import metrics
from blr_optax.predict import Predictive, binary_link, predict, predict_regression

if TYPE_CHECKING:
    from blr_optax import estimators, families, plots, rule
    from blr_optax._posterior import Posterior
    from blr_optax._table import TableRow, table
    from blr_optax.estimators import PerExample, explain, per_example, per_example_dot

    # The deep-learning rows.
    from blr_optax.optimizers import (
        TorchIvon,
        adam,
        bayesbinn,
        bsam,
        dropout,
        evon,
        from_torch_ivon,
        gradient_descent,
        ivon,
        ivon_lora,
        kronecker_newton,
        lie_additive,
        lie_affine,
        lie_multiplicative,
        low_rank_newton,
        mixture_ivon,
        mixture_newton,
        multimodal,
        newton,
        ogn,
        online_newton,
        random_signs,
        rmsprop,
        sam,
        sgd,
        signal_to_noise,
        soba,
        ste,
        to_torch_ivon,
        vadam,
        variational_online_newton,
        vogn,
        vprop,
        whiten,
    )

    # The rule, and reading any optimizer state.
    from blr_optax.rule import (
        Diagnostics,
        Estimate,
        blr_update,
        diagnostics,
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
    "Diagnostics",
    "Estimate",
    "PerExample",
    "Posterior",
    "Predictive",
    "TableRow",
    "TorchIvon",
    "adam",
    "bayesbinn",
    "binary_link",
    "blr_update",
    "bsam",
    "diagnostics",
    "dropout",
    "estimate",
    "estimators",
    "evon",
    "explain",
    "families",
    "from_torch_ivon",
    "gradient_descent",
    "ivon",
    "ivon_lora",
    "kronecker_newton",
    "lie_additive",
    "lie_affine",
    "lie_multiplicative",
    "low_rank_newton",
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
    "random_signs",
    "reseed",
    "rmsprop",
    "rule",
    "sam",
    "sample",
    "scale_by_precision",
    "sgd",
    "signal_to_noise",
    "soba",
    "ste",
    "table",
    "to_torch_ivon",
    "vadam",
    "variational_online_newton",
    "vogn",
    "vprop",
    "whiten",
    "with_posterior",
]

# Everything else is imported when first asked for: a module, a name of one, or an optimizer.
_MODULES = ("estimators", "families", "optimizers", "plots", "rule")
_FROM = {
    "_posterior": ("Posterior",),
    "_table": ("TableRow", "table"),
    "estimators": ("PerExample", "explain", "per_example", "per_example_dot"),
    "rule": (
        "Diagnostics",
        "Estimate",
        "blr_update",
        "diagnostics",
        "estimate",
        "natural_step",
        "posterior",
        "reseed",
        "sample",
        "scale_by_precision",
        "with_posterior",
    ),
}
_HOME = {name: home for home, names in _FROM.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOME.get(name, 'optimizers')}")
    globals()[name] = getattr(home, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
