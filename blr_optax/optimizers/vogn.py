"""OGN and VOGN: online Gauss-Newton with per-example gradients, and its variational form.

    theta  =  m + eps / sqrt( ess (s + d + gamma) )           VOGN; OGN evaluates at theta = m
    h      =  mean_i g_i^2,   g_i = grad l_i(theta)
    s      <-  b2 s + (1 - b2) h
    u      <-  b1 u + (1 - b1) ( mean_i g_i + d m )
    m      <-  m - lr u / ( s + d + gamma )                   with the new s
    q      =  N( m, 1 / ( ess (s + d + gamma) ) ),            d = prior_precision / ess

Khan et al. (2018), Eqs. 7-9; Osawa et al. (2019). A posterior at temperature tau is
`ess = N / tau`. Squares are never negative, so the plain step keeps the precision positive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import optax

from blr_optax._validate import at, check_positive, check_unit_interval, holds
from blr_optax.estimators import per_example_squares
from blr_optax.optimizers._zero_mean_prior import decay_of, total_precision
from blr_optax.rule import scale_by_precision
from blr_optax.rule._spikes import CLIP_SPIKES

if TYPE_CHECKING:
    from blr_optax._distribution import Distribution
    from blr_optax._typing import Hyperparameter, KeyLike, PyTree, Scalar, ScalarOrSchedule


def curvature_at_start(
    init_precision: Hyperparameter,
    prior_precision: Hyperparameter,
    ess: ScalarOrSchedule,
    damping: Hyperparameter = 0.0,
) -> PyTree:
    """s_0, from the total precision of the first posterior; 1 per example without one."""
    if init_precision is None:
        return 1.0
    check_positive("init_precision", init_precision, schedule=False)

    def leaf(first: Any, prior: Any) -> Any:
        return (first - prior) / at(ess, 0) - damping

    if jax.tree_util.all_leaves([init_precision]):
        start = jax.tree.map(lambda prior: leaf(init_precision, prior), prior_precision)
    elif jax.tree_util.all_leaves([prior_precision]):
        start = jax.tree.map(lambda first: leaf(first, prior_precision), init_precision)
    else:
        start = jax.tree.map(leaf, init_precision, prior_precision)
    if not all(holds(lambda x: x >= 0, x) for x in jax.tree.leaves(start)):
        raise ValueError(
            f"init_precision={init_precision} must be at least prior_precision + ess * damping: "
            "the posterior never knows less than the prior."
        )
    return start


def check_one_start(who: str, init: PyTree, init_precision: Hyperparameter, prior: PyTree) -> None:
    """Raise ValueError when the first precision would be given twice, or with a prior's inside."""
    if init is not None and init_precision is not None:
        raise ValueError(f"{who}: give init= or init_precision=, not both: init has a precision.")
    if prior is not None and init_precision is not None:
        raise ValueError(
            f"{who}: init_precision= goes with prior_precision=; beside prior= give the first "
            "posterior, init=."
        )


def vogn(
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule,
    prior_precision: Hyperparameter = None,
    init_precision: Hyperparameter = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    damping: Hyperparameter = 0.0,
    prior: Distribution | None = None,
    init: Distribution | None = None,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str | None = "hash",
) -> optax.GradientTransformationExtraArgs:
    """VOGN: a diagonal Gaussian over the weights, its precision from per-example gradients.

    s <- b2 s + (1 - b2) mean_i g_i^2;  u <- b1 u + (1 - b1)(g + d m);  p = s + d + gamma;
    m <- m - lr u / p;  q = N(m, 1 / (ess p)),  d = prior_precision / ess.

    Gradient and curvature come from the usual mean loss, by `est = estimate(loss, opt_state,
    params, *batch)` and `update(est.grad, opt_state, params, statistic=est.statistic)`; the
    curvature costs one more matrix product per layer (see `per_example`, `explain`). Put the prior
    here, not as an L2 term into the loss, where it is exact but costs a gradient per example.

    Args:
        learning_rate: lr, a number or schedule.
        ess: effective sample size, N or N / temperature; may be a schedule.
        prior_precision: total precision of a zero-mean prior, in the units of the posterior; a
            number or prefix tree. 1 by default, 0 when a prior is given.
        init_precision: total precision of the first posterior, a number or prefix tree, at least
            prior_precision + ess * damping; by default the curvature starts at one per example. A
            step is lr over this per example: the curvature follows at rate 1 - b2, and small
            models of well-scaled data often need less.
        b1: decay of the average of gradients, the prior's included; 0 for none. Not debiased.
        b2: decay of the curvature.
        damping: gamma, added to the precision per example.
        prior: any mean-field Gaussian posterior; a prior_precision given besides adds to it.
        init: the first posterior, whose mean must be the parameters.
        clip_spikes: the longest gradient in units of those before it, against bad batches; see
            `scale_by_precision`. None for no bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "jax", of the weights' noise.

    Raises:
        ValueError: for arguments out of range, trees of another structure, integer parameters; in
            `update` without `statistic=`, which one gradient cannot give.

    Source: Khan et al. (2018), VOGN; Osawa et al. (2019), Practical Deep Learning with Bayesian
    Principles. Special case of `blr_update` with family "gaussian_diagonal", `step="plain"` and
    `monte_carlo(1, curvature=per_example_squares())`, when b1 = 0, damping = 0 and
    learning_rate = 1 - b2.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
      >>> batch = jnp.array([[1.0], [2.0]]), jnp.array([3.5, 5.5])
      >>> params, tx = jnp.zeros(1), blr.vogn(0.5, ess=1e4, b1=0.0, b2=0.9)
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     est = blr.estimate(loss, state, params, *batch)
      ...     updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
      ...     params = params + updates
      >>> print(bool(abs(params[0] - 2.9) < 0.1))
      True
    """
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_unit_interval("b1", b1)
    prior_precision = total_precision(prior_precision, prior, ess)
    check_one_start("vogn", init, init_precision, prior)
    return optax.chain(
        scale_by_precision(
            ess=ess,
            b2=b2,
            hess_init=curvature_at_start(init_precision, prior_precision, ess, damping),
            weight_decay=decay_of(prior_precision, ess),
            prior=prior,
            init=init,
            momentum=optax.ema(b1, debias=False),
            curvature=per_example_squares(),
            step="plain",
            damping=damping,
            prior_in_momentum=True,
            clip_spikes=clip_spikes,
            generator=generator,
            key=key,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def ogn(
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule,
    prior_precision: Hyperparameter = None,
    init_precision: Hyperparameter = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    damping: Hyperparameter = 0.0,
    prior: Distribution | None = None,
    init: Distribution | None = None,
    clip_spikes: Scalar | None = CLIP_SPIKES,
) -> optax.GradientTransformationExtraArgs:
    """OGN, online Gauss-Newton: VOGN without noise, by the delta method.

    s <- b2 s + (1 - b2) mean_i g_i^2;  m <- m - lr u / (s + d + gamma),  g_i = grad l_i(m).

    Its posterior is a diagonal Laplace approximation that is kept while training.

    Args:
        learning_rate, ess, prior_precision, init_precision, b1, b2: as in `vogn`.
        damping, prior, init, clip_spikes: as in `vogn`.

    Raises:
        ValueError: as `vogn`.

    Source: Khan et al. (2018); Osawa et al. (2019). Special case of `blr_update` with family
    "gaussian_diagonal", `step="plain"` and `delta(per_example_squares())`, when b1 = 0,
    damping = 0 and learning_rate = 1 - b2.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> loss = lambda w, x: jnp.mean(x @ w)
      >>> params, tx = jnp.zeros(1), blr.ogn(1.0, ess=10.0, prior_precision=0.0, b1=0.0, b2=0.0)
      >>> state = tx.init(params)
      >>> est = blr.estimate(loss, state, params, jnp.array([[1.0], [3.0]]))
      >>> updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
      >>> print(updates)  # -2 / ((1 + 9) / 2)
      [-0.4]
    """
    return vogn(
        learning_rate,
        ess=ess,
        prior_precision=prior_precision,
        init_precision=init_precision,
        b1=b1,
        b2=b2,
        damping=damping,
        prior=prior,
        init=init,
        clip_spikes=clip_spikes,
        generator=None,
    )
