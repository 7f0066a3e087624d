"""The strength of a zero-mean Gaussian prior, in either unit: total, or per example.

prior_precision   S_0, total: the prior is N(0, 1 / S_0)
weight_decay      delta = S_0 / ess, per example
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from blr_optax._distribution import Distribution, distribution
from blr_optax._validate import check_number, check_positive, is_schedule, size_at

if TYPE_CHECKING:
    from blr_optax._typing import Hyperparameter, PyTree, ScalarOrSchedule

PRIOR_PRECISION = 1.0
WEIGHT_DECAY = 1e-4


def decay_of(prior_precision: Hyperparameter, ess: ScalarOrSchedule) -> PyTree:
    """Return delta = prior_precision / ess, a schedule where ess is one."""

    def decay(count: Any) -> Any:
        return jax.tree.map(lambda p: p / size_at(ess, count), prior_precision)

    return decay if is_schedule(ess) else decay(0)


def total_precision(
    prior_precision: Hyperparameter, prior: PyTree, ess: ScalarOrSchedule
) -> PyTree:
    """Return S_0: 1 unless given, 0 beside another prior."""
    if prior_precision is None:
        prior_precision = PRIOR_PRECISION if prior is None else 0.0
    check_positive("prior_precision", prior_precision, zero=True, schedule=False)
    check_positive("ess", ess, scalar=True)
    return prior_precision


def per_example(
    weight_decay: Hyperparameter,
    prior_precision: Hyperparameter,
    prior: PyTree,
    ess: ScalarOrSchedule,
    default: float = WEIGHT_DECAY,
) -> PyTree:
    """Return delta, from whichever is given: `default` if neither is, 0 beside another prior.

    Raises:
        ValueError: when both are given.
    """
    if prior_precision is None:
        if weight_decay is not None:
            return weight_decay
        return default if prior is None else 0.0
    if weight_decay is not None:
        raise ValueError(
            f"weight_decay={weight_decay} and prior_precision={prior_precision} are one prior in "
            "two units, per example and total; give one of them."
        )
    check_positive("prior_precision", prior_precision, zero=True, schedule=False)
    check_positive("ess", ess, scalar=True)
    return decay_of(prior_precision, ess)


def as_prior(prior: Distribution | None, prior_precision: Hyperparameter) -> Distribution | None:
    """Return the prior, from a distribution or from one number: the precision of every parameter.

    Raises:
        ValueError: when both are given.
    """
    if prior_precision is None:
        return prior
    if prior is not None:
        raise ValueError(
            f"prior= and prior_precision={prior_precision} are both a prior; give one of them."
        )
    if not jax.tree_util.all_leaves([prior_precision]) or np.ndim(prior_precision):
        raise ValueError(
            "prior_precision must be one number here, the precision of every parameter; got shape "
            f"{jax.tree.map(np.shape, prior_precision)}. A matrix of precisions is the prior "
            "prior=distribution('gaussian', mean=..., precision=matrix)."
        )
    check_number("prior_precision", prior_precision)
    return distribution("normal", mean=0.0, precision=prior_precision)
