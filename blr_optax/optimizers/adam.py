"""RMSprop and Adam: diagonal Gaussian, delta method, squared gradients, square root.

    v  <-  b2 v + (1 - b2) g^2            online Newton with hess l replaced by g^2,
    m  <-  m - alpha g / (sqrt(v) + eps)  the precision by its root, rates decoupled

The precision that the rule then assigns is ess (sqrt(v) + eps) plus the prior's. These are stated
approximations: the squared mini-batch gradient is not the Hessian, and the root has no derivation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._validate import check_positive, check_unit_interval
from blr_optax.rule import PointReader, with_posterior

if TYPE_CHECKING:
    from blr_optax._typing import (
        DTypeLike,
        Hyperparameter,
        Params,
        PyTree,
        Scalar,
        ScalarOrSchedule,
    )
    from blr_optax.rule import WithPosteriorState


class AdamReader(PointReader):
    """Precision ess (sqrt(v_hat + eps_root) + eps) + prior."""

    who = "adam"
    takes_numbers = True

    def part(self, state: WithPosteriorState, params: Params) -> PyTree:  # noqa: D102
        return _tree.matching_leaves(params, optax.tree.get(state.inner, "nu"), "params")

    def precision(self, state: WithPosteriorState, mean: PyTree) -> PyTree:  # noqa: D102
        hyper = state.hyper
        # Before the first step v is zero and its bias correction 0 / 0: the estimate is zero.
        correction = jnp.where(
            state.count > 0, 1.0 - hyper["b2"] ** jnp.maximum(state.count, 1), 1.0
        )

        def leaf(v: Any, m: Any) -> Any:
            root = jnp.sqrt(
                v.astype(m.dtype) / correction.astype(m.dtype) + hyper["eps_root"].astype(m.dtype)
            )
            return (hyper["ess"] * (root + hyper["eps"]) + hyper["prior_precision"]).astype(m.dtype)

        return jax.tree.map(leaf, optax.tree.get(state.inner, "nu"), mean)


class RmspropReader(PointReader):
    """Precision ess times optax's own denominator, + prior."""

    who = "rmsprop"
    takes_numbers = True

    def __init__(self, eps_in_sqrt: bool, centered: bool, bias_correction: bool) -> None:
        """Remembers which denominator optax.rmsprop was asked for."""
        self.choices = (eps_in_sqrt, centered, bias_correction)

    def __eq__(self, other: object) -> bool:
        """Rules with the same choices are one static node."""
        return isinstance(other, RmspropReader) and self.choices == other.choices

    def __hash__(self) -> int:
        """Of the choices."""
        return hash(self.choices)

    def part(self, state: WithPosteriorState, params: Params) -> PyTree:  # noqa: D102
        return _tree.matching_leaves(params, optax.tree.get(state.inner, "nu"), "params")

    def precision(self, state: WithPosteriorState, mean: PyTree) -> PyTree:  # noqa: D102
        eps_in_sqrt, centered, bias_correction = self.choices
        hyper, inner = state.hyper, state.inner
        correction = jnp.where(
            (state.count > 0) & bias_correction,
            1.0 - hyper["decay"] ** jnp.maximum(state.count, 1),
            1.0,
        )
        square = optax.tree.get(inner, "nu")
        first = optax.tree.get(inner, "mu") if centered else jax.tree.map(jnp.zeros_like, square)

        def leaf(v: Any, u: Any, m: Any) -> Any:
            c, eps = correction.astype(m.dtype), hyper["eps"].astype(m.dtype)
            spread = v.astype(m.dtype) / c - jnp.square(u.astype(m.dtype) / c)
            root = jnp.sqrt(spread + eps) if eps_in_sqrt else jnp.sqrt(spread) + eps
            return (hyper["ess"] * root + hyper["prior_precision"]).astype(m.dtype)

        return jax.tree.map(leaf, square, first, mean)


def rmsprop(
    learning_rate: ScalarOrSchedule,
    *,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: float | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    ess: ScalarOrSchedule = 1.0,
    prior_precision: Hyperparameter = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """`optax.rmsprop`, step for step, with the posterior that the rule assigns to it.

    v <- decay v + (1 - decay) g^2;  m <- m - alpha g / sqrt(v + eps);
    q = N(m, 1 / (ess sqrt(v + eps) + prior_precision)).

    Approximations: delta method, squared mini-batch gradient for the Hessian, square root,
    decoupled rates; momentum and bias correction are outside the rule.

    Args:
        learning_rate: alpha, a number or schedule.
        decay, eps, initial_scale, eps_in_sqrt, centered, momentum, nesterov, bias_correction: as in
            `optax.rmsprop`.
        ess: effective sample size; scales the posterior, not the steps. May be a schedule.
        prior_precision: total precision of a zero-mean prior, added to the posterior's.

    Raises:
        ValueError: for numbers out of range, or integer parameters.

    Source: Khan and Rue (2023), Sec. 4.2. Special case of `blr_update` with family
    "gaussian_diagonal", `delta(squared_gradient(...))`, up to the square root.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, params = blr.rmsprop(0.1, decay=0.0, eps=0.0, ess=10.0), jnp.zeros(1)
      >>> updates, state = tx.update(jnp.array([2.0]), tx.init(params), params)
      >>> print(blr.posterior(state, params).variance)  # 1 / (10 * 2)
      [0.05]
    """
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_unit_interval("decay", decay)
    check_positive("eps", eps, zero=True, scalar=True)
    check_positive("ess", ess, scalar=True)
    check_positive("prior_precision", prior_precision, zero=True)
    check_positive("initial_scale", initial_scale, zero=True)
    if momentum is not None:
        check_unit_interval("momentum", momentum)
    inner = optax.rmsprop(
        learning_rate,
        decay,
        eps,
        initial_scale,
        eps_in_sqrt,
        centered,
        momentum,
        nesterov,
        bias_correction,
    )
    reader = RmspropReader(eps_in_sqrt, centered, bias_correction)
    return with_posterior(
        inner, reader, ess=ess, decay=decay, eps=eps, prior_precision=prior_precision
    )


def adam(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    nesterov: bool = False,
    ess: ScalarOrSchedule = 1.0,
    prior_precision: Hyperparameter = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adam`, step for step, with the posterior that the rule assigns to it.

    v <- b2 v + (1 - b2) g^2;  q = N(m, 1 / (ess (sqrt(v_hat) + eps) + prior_precision)).

    Approximations: delta method, squared mini-batch gradient for the Hessian (too small by the
    batch size near an optimum), square root, decoupled rates, bias correction; momentum is outside
    the rule. For a calibrated posterior use `ivon`.

    Args:
        learning_rate: alpha, a number or schedule.
        b1, b2, eps, eps_root, mu_dtype, nesterov: as in `optax.adam`.
        ess: effective sample size; scales the posterior, not the steps. May be a schedule.
        prior_precision: total precision of a zero-mean prior, added to the posterior's.

    Raises:
        ValueError: for numbers out of range, or integer parameters.

    Source: Khan and Rue (2023), Sec. 4.2; Nickl et al. (2023). Special case of
    `blr_update` with family "gaussian_diagonal", `delta(squared_gradient(...))`, up to the root and
    the bias correction.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, params = blr.adam(0.1, ess=10.0), jnp.zeros(1)
      >>> updates, state = tx.update(jnp.array([2.0]), tx.init(params), params)
      >>> print(updates.round(3), blr.posterior(state, params).variance.round(4))
      [-0.1] [0.05]
    """
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_unit_interval("b1", b1)
    check_unit_interval("b2", b2)
    check_positive("eps", eps, zero=True, scalar=True)
    check_positive("eps_root", eps_root, zero=True, scalar=True)
    check_positive("ess", ess, scalar=True)
    check_positive("prior_precision", prior_precision, zero=True)
    inner = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return with_posterior(
        inner,
        AdamReader(),
        ess=ess,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        prior_precision=prior_precision,
    )
