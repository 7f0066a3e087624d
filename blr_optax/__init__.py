"""blr_optax: the Bayesian learning rule as optax transformations that carry a posterior.

lambda <- lambda - rho * grad_mu { E_q[loss] - H(q) }
"""

from blr_optax import estimators, families, metrics, plots, rule, state
from blr_optax._distribution import Distribution, distribution
from blr_optax._ensemble import Ensemble, ensemble
from blr_optax._predict import (
    Predictive,
    RegressionPredictive,
    binary_link,
    predict,
    predict_regression,
)
from blr_optax._predict_distribution import PredictiveMixture, predict_distribution
from blr_optax._table import TableRow, table
from blr_optax.interop import TorchIvon, from_torch_ivon, to_torch_ivon

# The deep-learning rows.
from blr_optax.optimizers import (
    adam,
    bayesbinn,
    bsam,
    dropout,
    evon,
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
    mixture_vi,
    newton,
    ogn,
    online_newton,
    orthogonalize,
    random_signs,
    rmsprop,
    sam,
    sgd,
    signal_to_noise,
    soba,
    ste,
    vadam,
    variational_online_newton,
    vogn,
    vprop,
)
from blr_optax.per_example import PerExample, explain, per_example, per_example_dot

# The rule, and reading any optimizer state.
from blr_optax.rule import blr_update, natural_step, scale_by_precision, with_posterior
from blr_optax.state import (
    Diagnostics,
    Estimate,
    StepInfo,
    diagnostics,
    estimate,
    make_step,
    posterior,
    reseed,
    sample,
)

__version__ = "0.2.0"

__all__ = [
    "Diagnostics",
    "Estimate",
    "PerExample",
    "Distribution",
    "Ensemble",
    "Predictive",
    "PredictiveMixture",
    "RegressionPredictive",
    "StepInfo",
    "TableRow",
    "TorchIvon",
    "adam",
    "bayesbinn",
    "binary_link",
    "blr_update",
    "bsam",
    "diagnostics",
    "distribution",
    "dropout",
    "ensemble",
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
    "make_step",
    "metrics",
    "mixture_ivon",
    "mixture_newton",
    "mixture_vi",
    "natural_step",
    "newton",
    "ogn",
    "online_newton",
    "per_example",
    "per_example_dot",
    "plots",
    "posterior",
    "predict",
    "predict_distribution",
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
    "state",
    "ste",
    "table",
    "to_torch_ivon",
    "vadam",
    "variational_online_newton",
    "vogn",
    "vprop",
    "orthogonalize",
    "with_posterior",
]
