"""SAM and bSAM: the gradient at the worst point nearby, whose reach is the posterior's.

    theta  =  m + eps / sqrt(ess p)                       bSAM; SAM evaluates at theta = m
    g      =  grad l(theta)
    m_a    =  m + r g / p,   in SAM  m + r g / |g|        the adversary, around the mean
    u      <-  b1 u + (1 - b1) ( grad l(m_a) + d m )
    m      <-  m - lr u / p                               with the old p
    p      <-  b2 p + (1 - b2) ( sqrt(p) |g| + d + gamma )
    q      =  N( m, 1 / (ess p) ),                        d = prior_precision / ess

Foret et al. (2021); Moellenhoff and Khan (2023), Algorithm 1: the maximum over a neighbourhood is
the tightest convex lower bound of the expectation E_q[l], which the rule would have there.
m-sharpness is `estimate(..., samples=M, split=True)`: every sample sees its own part of the batch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._decay import check_decay, mask_leaves
from blr_optax._rounding import cast_on_average
from blr_optax._transformation import transformation
from blr_optax._validate import check_positive, check_unit_interval
from blr_optax.estimators import absolute_gradient
from blr_optax.optimizers._first_weights import GivenRun, RelativeNoise, RelativePrior
from blr_optax.optimizers.sgd import StepSizeReader, growth
from blr_optax.optimizers.vogn import from_totals
from blr_optax.rule import with_posterior
from blr_optax.rule._spikes import CLIP_SPIKES
from blr_optax.state._reader import refuse_one_gradient

if TYPE_CHECKING:
    from collections.abc import Callable

    from blr_optax._distribution import Distribution
    from blr_optax._typing import (
        Hyperparameter,
        KeyLike,
        OptState,
        Params,
        PyTree,
        Scalar,
        ScalarOrSchedule,
        Updates,
    )
    from blr_optax.rule import WithPosteriorState


DAMPING = 0.1


@dataclasses.dataclass(frozen=True)
class SamReader(StepSizeReader):
    """SGD's posterior, and an adversary at distance r.

    Attributes:
        radius: r.
    """

    radius: float
    who = "sam"
    takes_numbers = False
    adversarial = True

    def adversary(self, state: WithPosteriorState, params: Params, grads: Updates) -> PyTree:
        """m + r g / |g|; m where g = 0."""
        wide = jax.tree.map(lambda g: g.astype(_tree.statistics_dtype(g.dtype)), grads)
        size = optax.tree.norm(wide, ord=jnp.inf)  # first, so that no square leaves float range
        wide = jax.tree.map(lambda g: g / jnp.where(size > 0, size, 1.0).astype(g.dtype), wide)
        norm = optax.tree.norm(wide)
        scale = self.radius / jnp.where(norm > 0, norm, 1.0)
        moved = jax.tree.map(
            lambda m, g: m.astype(g.dtype) + scale.astype(g.dtype) * g, params, wide
        )
        return cast_on_average(moved, params, 0, state.count)  # the state has no key

    def curvature(
        self, state: WithPosteriorState, params: Params, weights: PyTree, grads: Updates
    ) -> PyTree:
        """|g| of the first gradient: what bSAM would learn from, and the sign that it was taken."""
        return jax.tree.map(lambda g: jnp.abs(g.astype(_tree.statistics_dtype(g.dtype))), grads)


def _check_rho(rho: Any) -> None:
    """Raise ValueError unless rho is a plain number, at least zero."""
    if not isinstance(rho, (int, float)) or not 0 <= rho < float("inf"):
        raise ValueError(
            f"rho={rho!r} must be a plain finite number, at least zero; with inject_hyperparams "
            'name it in static_args=("rho",).'
        )


def sam(
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule = 1.0,
    rho: float = 0.05,
    momentum: float | None = 0.9,
    nesterov: bool = False,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[Params], PyTree] = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM, sharpness-aware minimisation: SGD with the gradient at the worst point within a ball.

    m_a = m + r g / |g|;  u <- beta u + grad l(m_a) + weight_decay m;  m <- m - lr u;
    q = N(m, lr / ess), the point m where a schedule reaches 0.

    Both gradients come from `est = estimate(loss, opt_state, params, *batch)`, and go into
    `update(est.grad, opt_state, params, statistic=est.statistic)`. m-sharpness with M sub-batches:
    `estimate(..., samples=M, split=True)`.

    Args:
        learning_rate: lr, a number or schedule.
        ess: effective sample size; scales the posterior, not the steps.
        rho: r, the radius of the ball: a plain number. In bfloat16 a move of r / sqrt(P) per weight
            is below the spacing of weights larger than 256 times that: it is rounded
            stochastically, right on average, with noise that float32 does not have.
        momentum: beta of `optax.sgd`: heavy ball, without 1 - beta. None for none.
        nesterov: as in `optax.sgd`.
        weight_decay: added to the second gradient times the parameters, as `optax` does; one
            number or schedule.
        mask: which leaves decay, as in `ivon`.

    Raises:
        ValueError: for arguments out of range, integer parameters, or an update without
            `statistic=`, whose gradient would be plain SGD's.

    Source: Foret et al. (2021). Special case of `blr_update` with family "gaussian_fixed" of
    precision ess / lr and `estimator=delta()`, whose E_q[l] is replaced by the maximum of l over a
    ball (Moellenhoff and Khan 2023, Theorem 1); with rho = 0 it is `sgd`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> params, tx = jnp.array([3.0, 4.0]), blr.sam(0.1, rho=0.5, momentum=None)
      >>> state = tx.init(params)
      >>> est = blr.estimate(lambda w: 0.5 * w @ w, state, params)
      >>> print(est.grad)  # at 1.1 m: the gradient has length 5
      [3.3 4.4]
    """
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_positive("ess", ess, scalar=True)
    _check_rho(rho)
    if momentum is not None:
        check_unit_interval("momentum", momentum)
    check_positive("weight_decay", weight_decay, zero=True, scalar=True)
    inner = with_posterior(
        optax.chain(
            optax.add_decayed_weights(
                weight_decay, None if mask is None else lambda params: mask_leaves(mask, params)
            ),
            optax.sgd(learning_rate, momentum, nesterov),
        ),
        SamReader(float(rho)),
        growth=growth(learning_rate, momentum),
        ess=ess,
        step_size=learning_rate,
    )

    def update_fn(
        updates: Updates,
        state: OptState,
        params: Params = None,
        *,
        statistic: Any = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        if jax.tree.leaves(updates):  # else a group of optax.partition that matches no leaf
            refuse_one_gradient(state.reader, statistic)
        return inner.update(updates, state, params, **extra)

    def init_fn(params: Params) -> OptState:
        check_decay(weight_decay, params)
        return inner.init(params)

    return transformation(init_fn, update_fn)


def bsam(
    learning_rate: ScalarOrSchedule | None = None,
    *,
    ess: ScalarOrSchedule,
    num_steps: int | None = None,
    rho: float = 0.05,
    prior_precision: Hyperparameter = None,
    init_precision: Hyperparameter | RelativeNoise = None,
    b1: Scalar = 0.9,
    b2: Scalar | None = None,
    damping: Hyperparameter = None,
    prior: Distribution | RelativePrior | None = None,
    init: Distribution | None = None,
    clip_step: Scalar | None = None,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str | None = "hash",
) -> optax.GradientTransformationExtraArgs:
    """bSAM: SAM whose neighbourhood is a diagonal Gaussian posterior that it learns.

    m_a = m + r g / p;  u <- b1 u + (1 - b1)(grad l(m_a) + d m);  m <- m - lr u / p (old p);
    p <- b2 p + (1 - b2)( sqrt(p) |g| + d + gamma );  q = N(m, 1 / (ess p)),
    d = prior_precision / ess.

    Both gradients come from `est = estimate(loss, opt_state, params, *batch)`, and go into
    `update(est.grad, opt_state, params, statistic=est.statistic)`. m-sharpness with M sub-batches:
    `estimate(..., samples=M, split=True)`.

    Args:
        learning_rate: lr, a number or schedule.
        ess: effective sample size, N or N times an augmentation factor; may be a schedule.
        num_steps: of the whole run, from which what is not given follows, as in `ivon`.
        rho: r, the size of the adversary's step in units of the natural gradient: a plain number.
        prior_precision: total precision of a zero-mean prior; a number or prefix tree. 1 by
            default, 0 when a prior is given.
        init_precision: total precision of the first posterior, at least prior_precision +
            ess * damping; by default the curvature starts at one per example. Or
            `relative_noise(0.2)`.
        b1: decay of the average of gradients, the prior's included; not debiased.
        b2: decay of the precision; 0.999 by default.
        damping: gamma, added to the precision per example; too small a value makes steps and noise
            large where gradients vanish. 0.1 by default; 0 with `num_steps`, as nothing vanishes in
            a run of which the precision forgets a factor of e.
        prior: any mean-field Gaussian posterior; a prior_precision given besides adds to it. Or
            `relative_prior(3.2)`, in place of a prior_precision.
        init: the first posterior, whose mean must be the parameters.
        clip_step: bound on the step of every weight, as in `ivon`.
        clip_spikes: the longest gradient in units of those before it, against bad batches; see
            `scale_by_precision`. None for no bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "jax", of the weights' noise; None evaluates at the mean.

    Raises:
        ValueError: for arguments out of range, trees of another structure, integer parameters, or
            an update without `statistic=`.

    Source: Moellenhoff and Khan (2023), SAM as an optimal relaxation of Bayes, Algorithm 1. Special
    case of `blr_update` with family "gaussian_diagonal", `step="plain"` and
    `monte_carlo(1, curvature=absolute_gradient())`, with rho = 0, b1 = 0 and damping = 0, where the
    old precision divides the step and the gradient is that at the mean.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> params, loss = jnp.ones(1), lambda w: 2.0 * w @ w
      >>> options = {"b1": 0.0, "b2": 0.5, "damping": 0.0, "prior_precision": 0.0}
      >>> tx = blr.bsam(0.5, ess=10.0, rho=0.1, generator=None, **options)
      >>> state = tx.init(params)
      >>> est = blr.estimate(loss, state, params)
      >>> updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
      >>> print(est.grad, updates, blr.posterior(state, params).variance)  # 1 / (10 * 2.5)
      [5.6] [-2.8] [0.04]
    """
    _check_rho(rho)
    check_unit_interval("b1", b1)
    if damping is None:
        damping = DAMPING if num_steps is None else 0.0
    return from_totals(
        "bsam",
        GivenRun(learning_rate, b2, init_precision, prior, clip_step),
        num_steps,
        prior_precision,
        ess=ess,
        init=init,
        damping=damping,
        momentum=optax.ema(b1, debias=False),
        curvature=absolute_gradient(),
        step="plain_old",
        adversary=float(rho),
        clip_spikes=clip_spikes,
        generator=generator,
        key=key,
    )
