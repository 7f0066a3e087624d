"""IVON, the improved variational online Newton method, and SOBA, its plain form.

    sigma  =  1 / sqrt( ess (h + delta) )
    theta  =  m + sigma eps,   g = grad of the mean loss at theta
    v     <-  b1 v + (1 - b1) g
    c      =  g (theta - m) / sigma^2
    h     <-  b2 h + (1 - b2) c + (1 - b2)^2 (h - c)^2 / (2 (h + delta))
    m     <-  m - lr (h_0 + delta) clip( ( v / (1 - b1^t) + delta m ) / (h + delta), -xi, xi )

Shen et al. (2024), Algorithm 1. The precision h + delta and everything that needs the raw gradient
are `scale_by_precision`; clipping and the learning rate are optax's own parts. With a `prior` delta
is its precision per example, except in the rescaled rate, which takes the weight decay alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._decay import decay_leaves, masked
from blr_optax._validate import check_positive, check_unit_interval, is_zero
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
from blr_optax.rule import scale_by_precision
from blr_optax.rule._spikes import CLIP_SPIKES

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array

    from blr_optax._distribution import Distribution
    from blr_optax._typing import (
        Hyperparameter,
        KeyLike,
        Params,
        PyTree,
        Scalar,
        ScalarOrSchedule,
        Updates,
    )
    from blr_optax.estimators import Curvature


class RescaleState(NamedTuple):
    """State of IVON's learning-rate rescaling: the step, for schedules (int32)."""

    count: Array


def _rescale(
    hess_init: Hyperparameter, weight_decay: Hyperparameter
) -> optax.GradientTransformation:
    """Multiplies every leaf by hess_init + weight_decay, at the current weight decay.

    A `prior`'s precision is left out: it may be large, and a rate above 2 / (h_0 + delta) diverges.
    """

    def init_fn(params: Params) -> RescaleState:
        return RescaleState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: Updates, state: RescaleState, params: Params = None
    ) -> tuple[Any, RescaleState]:
        h = _tree.fitting_leaves(hess_init, updates, "hess_init")
        d = decay_leaves(weight_decay, updates, state.count)
        updates = jax.tree.map(lambda u, h, d: u * jnp.asarray(h + d, u.dtype), updates, h, d)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)


def steps_after(
    precision: optax.GradientTransformationExtraArgs,
    learning_rate: ScalarOrSchedule,
    hess_init: Hyperparameter,
    weight_decay: Hyperparameter,
    *,
    ess: ScalarOrSchedule,
    clip_radius: Hyperparameter = None,
    clip_step: Scalar | None = None,
    rescale_lr: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """IVON's chain: a preconditioned direction, clipped, rescaled by h_0 + delta, times -lr."""
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    if rescale_lr and is_zero(hess_init) and is_zero(weight_decay):
        raise ValueError(
            "rescale_lr multiplies the learning rate by hess_init + weight_decay, which is 0; make "
            "one positive, or pass rescale_lr=False."
        )
    parts: list[optax.GradientTransformation] = [precision]
    if clip_radius is not None:
        check_positive("clip_radius", clip_radius, schedule=False)
        parts.append(optax.clip(clip_radius))
    if rescale_lr:
        parts.append(_rescale(hess_init, weight_decay))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    if clip_step is not None:
        parts.append(clipped_step(clip_step, first_precision(hess_init, weight_decay, ess)))
    return optax.chain(*parts)


def ivon(
    learning_rate: ScalarOrSchedule | None = None,
    *,
    ess: ScalarOrSchedule,
    num_steps: int | None = None,
    hess_init: Hyperparameter | RelativeNoise = None,
    b1: Scalar = 0.9,
    b2: Scalar | None = None,
    weight_decay: Hyperparameter = None,
    prior_precision: Hyperparameter = None,
    mask: PyTree | Callable[[Params], PyTree] = None,
    clip_radius: Hyperparameter = None,
    clip_step: Scalar | None = None,
    rescale_lr: bool = True,
    debias: bool = True,
    curvature: str | Curvature = "reparameterized",
    prior: Distribution | RelativePrior | None = None,
    init: Distribution | None = None,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """IVON: a diagonal Gaussian over the weights at Adam's cost, by the improved learning rule.

    p <- p (1 + u + u^2 / 2), u = (1 - b2)(c + delta - p) / p, for p = h + delta;
    m <- m - lr (h_0 + delta) clip( (v_hat + delta m) / p, -xi, xi );  q = N(m, 1 / (ess p)).

    A training loop changes in one line: the gradient is taken at `sample(opt_state, params)`; or
    use `estimate` for several samples and pass `statistic=est.statistic` to `update`.

    `ivon(ess=num_examples, num_steps=num_steps)` needs nothing else: noise and prior are then
    relative to the first weights, and rate, schedule and b2 follow from the number of steps. See
    `recipes.ivon`, which says what was chosen.

    Args:
        learning_rate: lr, a number or schedule, rescaled by hess_init + weight_decay. Lower it, or
            set clip_step, when a run diverges. With `num_steps` by default 5 after a warm-up of
            5 %, falling to 0 as a cosine.
        ess: effective sample size: the number of training examples, larger for a colder posterior.
            May be a schedule.
        num_steps: of the whole run. It sets what is not given among learning_rate, b2, hess_init,
            clip_step and the prior; all of it is in `recipes.ivon`.
        hess_init: h_0, the first curvature per example: 0.01 to 1; too small makes the noise too
            large. A number, a prefix tree, or `relative_noise(0.2)`; 1 by default, that noise with
            `num_steps`.
        b1: decay of the gradient's average; 0 for none.
        b2: decay of the precision, very close to 1 (1 - b2 must fall as ess grows); 0.99999 by
            default, 1 - 1 / num_steps with `num_steps`.
        weight_decay: delta, per example: the prior is N(0, 1 / (ess delta)). A number, prefix tree
            or schedule; 1e-4 by default, 0 when a prior is given.
        prior_precision: the same prior by its total precision, ess * delta, in place of
            weight_decay; a number or prefix tree.
        mask: which leaves decay, as in `optax.adamw`: a prefix tree of booleans or a function from
            params to one; None for all. A distribution as `prior` is not masked.
        clip_radius: xi, elementwise bound on the preconditioned step; None for none.
        clip_step: bound on the step that every weight makes, in deviations of its first posterior
            (a distribution as `prior` left out); None for none, 0.1 with `num_steps`.
        rescale_lr: multiply the learning rate by hess_init + weight_decay (not by a `prior`'s).
        debias: divide the gradient's average by 1 - b1^t.
        curvature: "reparameterized" (Price) or `squared_gradient(...)`.
        prior: any mean-field Gaussian posterior, also an improper one (a prior times a site), or
            one of one number for all parameters; a weight_decay given besides adds to it. Or
            `relative_prior(3.2)`, in place of a weight_decay; with `num_steps` the default.
        init: the first posterior, whose mean must be the parameters.
        clip_spikes: the longest gradient in units of those before it, against bad batches; see
            `scale_by_precision`. None for no bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "jax", of the weights' noise.

    Raises:
        ValueError: for arguments out of range, unknown names, trees of another structure, integer
            parameters.

    Source: Shen et al. (2024), "Variational Learning is Effective for Large Deep Networks",
    Algorithm 1. Special case of `blr_update` with family "gaussian_diagonal", `step="improved"` and
    `monte_carlo(1, curvature=reparameterized())`, when b1 = 0, learning_rate = 1 - b2,
    rescale_lr=False.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> loss = lambda w: jnp.mean((w - 3.0) ** 2)
      >>> params, tx = jnp.zeros(4), blr.ivon(0.3, ess=100.0, b2=0.99)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(loss)(blr.sample(state, params))  # the one line that changes
      ...     updates, state = tx.update(grads, state, params)
      ...     return params + updates, state
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> print(bool(jnp.all(jnp.abs(params - 3.0) < 0.3)))
      True
    """
    check_unit_interval("b1", b1)
    run = of_run(
        "ivon",
        num_steps,
        GivenRun(learning_rate, b2, hess_init, prior, clip_step),
        GivenRun(None, 0.99999, 1.0, None, None),
        has_prior=weight_decay is not None or prior_precision is not None,
        has_start=init is not None,
    )
    chosen = prior_of("ivon", run.prior, weight_decay, prior_precision, ess)

    def make(hess_init: PyTree, decay: PyTree) -> optax.GradientTransformationExtraArgs:
        return steps_after(
            scale_by_precision(
                ess=ess,
                b2=run.b2,
                hess_init=hess_init,
                weight_decay=decay,
                mask=mask,
                prior=chosen.density,
                init=init,
                momentum=optax.ema(b1, debias=debias),
                curvature=curvature,
                clip_spikes=clip_spikes,
                generator=generator,
                key=key,
            ),
            run.learning_rate,
            hess_init,
            masked(decay, mask),
            ess=ess,
            clip_radius=clip_radius,
            clip_step=run.clip_step,
            rescale_lr=rescale_lr,
        )

    return from_first_weights(make, run.noise, chosen.strength, ess, (1.0, 1.0), mask=mask)


def soba(
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule,
    hess_init: Hyperparameter = 1.0,
    b2: Scalar = 0.99999,
    weight_decay: Hyperparameter = None,
    prior_precision: Hyperparameter = None,
    mask: PyTree | Callable[[Params], PyTree] = None,
    curvature: str | Curvature = "reparameterized",
    prior: Distribution | None = None,
    init: Distribution | None = None,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """SOBA, second-order Bayes: IVON without momentum, learning-rate rescaling and clipping.

    p <- p (1 + u + u^2 / 2), u = (1 - b2)(c + delta - p) / p;  m <- m - lr (g + delta m) / p.

    Args:
        learning_rate: lr, a number or schedule; 1 - b2 makes it the natural step of the rule.
        ess, hess_init, b2, weight_decay, prior_precision, mask, curvature: as in `ivon`.
        prior, init, clip_spikes, key, generator: as in `ivon`.

    Raises:
        ValueError: as `ivon`.

    Source: Lin, Schmidt and Khan (2020), the authors' slides. Special case of
    `blr_update` with family "gaussian_diagonal", `step="improved"`, `monte_carlo(1,
    curvature=reparameterized())`, when learning_rate = 1 - b2.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, params = blr.soba(0.5, ess=10.0, b2=0.5, weight_decay=0.0), jnp.ones(1)
      >>> updates, state = tx.update(
      ...     jnp.ones(1), tx.init(params), params, statistic=jnp.array([3.0])
      ... )
      >>> print(updates)  # -0.5 * 1 / 2.5
      [-0.2]
    """
    return ivon(
        learning_rate,
        ess=ess,
        hess_init=hess_init,
        b1=0.0,
        b2=b2,
        weight_decay=weight_decay,
        prior_precision=prior_precision,
        mask=mask,
        rescale_lr=False,
        debias=False,
        curvature=curvature,
        prior=prior,
        init=init,
        clip_spikes=clip_spikes,
        key=key,
        generator=generator,
    )
