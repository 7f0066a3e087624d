"""Gradient descent and SGD: a Gaussian with known covariance and the delta method.

    m  <-  m - rho S^{-1} ess grad l(m)                        Khan and Rue (2023), Secs. 1.3, 4.1

With step size alpha = rho ess / S and rho = 1, the covariance that makes this the rule is
alpha / ess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from blr_optax._validate import at, check_positive, check_unit_interval
from blr_optax.rule import PointReader, with_posterior

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array

    from blr_optax._typing import DTypeLike, PyTree, Scalar, ScalarOrSchedule
    from blr_optax.rule import WithPosteriorState


# Of a known number: no float32 weight above 1e-8 is moved by its noise, and m, p m and m again are
# exact for a power of two.
POINT = 2.0**100


def growth(learning_rate: ScalarOrSchedule, momentum: Scalar | None) -> Callable[[Array], Scalar]:
    """By how much heavy-ball sums, and steps of a rate above 1, may exceed a gradient."""
    sums = 1.0 / (1.0 - (0.0 if momentum is None else momentum))
    return lambda count: sums * jnp.maximum(at(learning_rate, count), 1.0)


class StepSizeReader(PointReader):
    """Precision ess / step size, the same for every parameter; at a step size of 0, a point's."""

    who = "sgd"
    takes_numbers = True

    def precision(self, state: WithPosteriorState, mean: PyTree) -> PyTree:  # noqa: D102
        s = jnp.minimum(state.hyper["ess"] / state.hyper["step_size"], POINT)
        return jax.tree.map(lambda m: jnp.full_like(m, s.astype(m.dtype)), mean)


def sgd(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: float | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    ess: ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """`optax.sgd`, step for step, with the posterior that the rule assigns to it.

    m <- m - alpha g;  q = N(m, alpha / ess), for every parameter.

    Approximations: delta method, stochastic gradient, covariance known rather than learnt; momentum
    and a schedule are outside the rule (the posterior takes the coming step's alpha and ignores
    momentum; where a schedule reaches 0 it is the point m, in numbers a variance of 2^-100).

    Args:
        learning_rate: alpha, a number or schedule.
        momentum: as in `optax.sgd`.
        nesterov: as in `optax.sgd`.
        accumulator_dtype: as in `optax.sgd`.
        ess: effective sample size, the number of examples the mean loss stands for; scales the
            posterior, not the steps. May be a schedule.

    Raises:
        ValueError: for a learning_rate or ess out of range, or integer parameters.

    Source: Khan and Rue (2023), Sec. 4.1. Special case of `blr_update` with family "gaussian_fixed"
    of precision ess / alpha, `estimator=delta()`, learning rate 1 and mini-batch losses.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, params = blr.sgd(0.1, ess=100.0), jnp.ones(2)
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> print(updates, blr.posterior(state, params).variance)
      [-0.1 -0.1] [0.001 0.001]
    """
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_positive("ess", ess, scalar=True)
    if momentum is not None:
        check_unit_interval("momentum", momentum)
    inner = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    return with_posterior(
        inner,
        StepSizeReader(),
        growth=growth(learning_rate, momentum),
        ess=ess,
        step_size=learning_rate,
    )


def gradient_descent(
    learning_rate: ScalarOrSchedule, *, ess: ScalarOrSchedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent: the simplest row of the table.

    m <- m - alpha grad l(m);  q = N(m, alpha / ess).

    Args:
        learning_rate: alpha, a number or schedule.
        ess: effective sample size; scales the posterior, not the steps.

    Raises:
        ValueError: for an ess that is not positive, or integer parameters.

    Source: Khan and Rue (2023), Sec. 1.3. Special case of `blr_update` with family "gaussian_fixed"
    of precision ess / alpha, `estimator=delta()` and learning rate 1; at ess = 1 the steps are also
    those of unit precision with learning rate alpha.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, params = blr.gradient_descent(0.5), jnp.array([4.0])
      >>> updates, _ = tx.update(params, tx.init(params), params)  # grad of |m|^2 / 2
      >>> print(params + updates)
      [2.]
    """
    return sgd(learning_rate, ess=ess)
