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

from blr_optax._validate import check_positive, check_unit_interval, holds, size_at
from blr_optax.estimators import per_example_squares
from blr_optax.optimizers._first_weights import (
    GivenRun,
    RelativeNoise,
    RelativePrior,
    clipped_step,
    first_precision,
    from_first_weights,
    of_run,
    prior_of,
)
from blr_optax.optimizers._zero_mean_prior import decay_of
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
        return (first - prior) / size_at(ess, 0) - damping

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


def from_totals(
    who: str,
    given: GivenRun,
    num_steps: int | None,
    prior_precision: Hyperparameter,
    *,
    ess: ScalarOrSchedule,
    init: Distribution | None,
    damping: Hyperparameter,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return the chain of `vogn` and `bsam`: precision, prior in the momentum, rate, bound.

    Args:
        who: the row.
        given: its arguments, noise and prior by their total precisions.
        num_steps, prior_precision, ess, init, damping: as in `vogn`.
        options: others of `scale_by_precision`.
    """
    dense = given.prior is not None and not isinstance(given.prior, RelativePrior)
    if num_steps is not None and dense and init is None and given.noise is None:
        raise ValueError(
            f"{who}: num_steps= beside a distribution as prior= needs the first posterior, init=, "
            "and the learning rate; or give prior=relative_prior(...)."
        )
    run = of_run(
        who,
        num_steps,
        given,
        GivenRun(None, 0.999, None, None, None),
        has_prior=prior_precision is not None,
        has_start=init is not None,
    )
    check_positive("learning_rate", run.learning_rate, zero=True, scalar=True)
    chosen = prior_of(who, run.prior, None, prior_precision, ess, total=True)
    check_one_start(who, init, run.noise, chosen.density)

    def make(first: PyTree, prior: PyTree) -> optax.GradientTransformationExtraArgs:
        start, decay = curvature_at_start(first, prior, ess, damping), decay_of(prior, ess)
        parts: list[optax.GradientTransformation] = [
            scale_by_precision(
                ess=ess,
                b2=run.b2,
                hess_init=start,
                weight_decay=decay,
                prior=chosen.density,
                init=init,
                damping=damping,
                prior_in_momentum=True,
                **options,
            ),
            optax.scale_by_learning_rate(run.learning_rate),
        ]
        if run.clip_step is not None:
            parts.append(clipped_step(run.clip_step, first_precision(start, decay, ess, damping)))
        return optax.chain(*parts)

    return from_first_weights(make, run.noise, chosen.strength, None, trial=(None, 1.0))


def vogn(
    learning_rate: ScalarOrSchedule | None = None,
    *,
    ess: ScalarOrSchedule,
    num_steps: int | None = None,
    prior_precision: Hyperparameter = None,
    init_precision: Hyperparameter | RelativeNoise = None,
    b1: Scalar = 0.9,
    b2: Scalar | None = None,
    damping: Hyperparameter = 0.0,
    prior: Distribution | RelativePrior | None = None,
    init: Distribution | None = None,
    clip_step: Scalar | None = None,
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
        num_steps: of the whole run, from which what is not given follows, as in `ivon`.
        prior_precision: total precision of a zero-mean prior, in the units of the posterior; a
            number or prefix tree. 1 by default, 0 when a prior is given.
        init_precision: total precision of the first posterior, a number or prefix tree, at least
            prior_precision + ess * damping; by default the curvature starts at one per example. A
            step is lr over this per example: the curvature follows at rate 1 - b2, and small
            models of well-scaled data often need less. Or `relative_noise(0.2)`.
        b1: decay of the average of gradients, the prior's included; 0 for none. Not debiased.
        b2: decay of the curvature; 0.999 by default.
        damping: gamma, added to the precision per example.
        prior: any mean-field Gaussian posterior; a prior_precision given besides adds to it. Or
            `relative_prior(3.2)`, in place of a prior_precision.
        init: the first posterior, whose mean must be the parameters.
        clip_step: bound on the step of every weight, as in `ivon`.
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
    check_unit_interval("b1", b1)
    return from_totals(
        "vogn",
        GivenRun(learning_rate, b2, init_precision, prior, clip_step),
        num_steps,
        prior_precision,
        ess=ess,
        init=init,
        damping=damping,
        momentum=optax.ema(b1, debias=False),
        curvature=per_example_squares(),
        step="plain",
        clip_spikes=clip_spikes,
        generator=generator,
        key=key,
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
