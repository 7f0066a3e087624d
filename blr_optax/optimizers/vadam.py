"""Vprop and Vadam: RMSprop and Adam whose weights are perturbed, variational by that alone.

    theta  =  m + eps / sqrt( ess (s + d) )            the sample, q = N(m, 1 / (ess (s + d)))
    g      =  grad l(theta),                           of the mini-batch
    s      <-  b2 s + (1 - b2) g^2
    u      <-  b1 u + (1 - b1) (g + d m)               d = prior_precision / ess
    m      <-  m - lr u_hat / ( sqrt(s_hat) + d )      hats: divided by 1 - b^t; Vprop has none

Khan et al. (2018), Eqs. 11-15. The root and the hats are Adam's, not the rule's; and the square of
a mini-batch gradient is B times too small near an optimum, which `batch_size` undoes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import optax

from blr_optax._validate import check_positive, check_unit_interval
from blr_optax.estimators import squared_gradient
from blr_optax.optimizers._zero_mean_prior import decay_of, total_precision
from blr_optax.optimizers.vogn import check_one_start, curvature_at_start
from blr_optax.rule import scale_by_precision
from blr_optax.rule._spikes import CLIP_SPIKES

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._distribution import Distribution
    from blr_optax._typing import Hyperparameter, KeyLike, Scalar, ScalarOrSchedule


def _root(b2: float | None) -> Callable[[Array, Any, Array], Array]:
    """sqrt(s_hat) + d; no hat without b2."""

    def denominator(s: Array, d: Any, t: Array) -> Array:
        correction = 1.0 if b2 is None else 1.0 - jnp.asarray(b2, s.dtype) ** t
        return jnp.sqrt(jnp.maximum(s, 0.0) / correction) + jnp.asarray(d, s.dtype)

    return denominator


def _perturbed(
    learning_rate: ScalarOrSchedule,
    ess: ScalarOrSchedule,
    prior_precision: Hyperparameter,
    prior: Distribution | None,
    init_precision: Hyperparameter,
    b2: Scalar,
    batch_size: int,
    momentum: optax.GradientTransformation,
    denominator: Callable,
    clip_spikes: Scalar | None,
    key: KeyLike,
    generator: str,
) -> optax.GradientTransformationExtraArgs:
    """Return the rule's precision from squared gradients, and another denominator."""
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    prior_precision = total_precision(prior_precision, prior, ess)
    if prior is None:
        check_positive("prior_precision", prior_precision, schedule=False)
    check_one_start("vadam, vprop", None, init_precision, prior)
    start = 0.0
    if init_precision is not None:
        start = curvature_at_start(init_precision, prior_precision, ess)
    return optax.chain(
        scale_by_precision(
            ess=ess,
            b2=b2,
            hess_init=start,
            weight_decay=decay_of(prior_precision, ess),
            prior=prior,
            momentum=momentum,
            curvature=squared_gradient(batch_size),
            step="plain",
            prior_in_momentum=True,
            denominator=denominator,
            clip_spikes=clip_spikes,
            generator=generator,
            key=key,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def vadam(
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule,
    prior_precision: Hyperparameter = None,
    init_precision: Hyperparameter = None,
    prior: Distribution | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    batch_size: int = 1,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """Vadam: Adam at weights drawn from the posterior that its second moment describes.

    s <- b2 s + (1 - b2) B g^2;  u <- b1 u + (1 - b1)(g + d m);
    m <- m - lr u_hat / (sqrt(s_hat) + d);  q = N(m, 1 / (ess (s + d))),  d = prior_precision / ess.

    Take the gradient at `sample(opt_state, params)`, or both from `estimate`.

    Args:
        learning_rate: lr, a number or schedule.
        ess: effective sample size, N or N / temperature; may be a schedule.
        prior_precision: total precision of a zero-mean prior, positive; a number or prefix tree. 1
            by default, 0 when a prior is given.
        init_precision: total precision of the first posterior, at least the prior's, which it is
            by default.
        prior: a mean-field Gaussian posterior, or one of one number for all parameters.
        b1: decay of the average of gradients, the prior's included; debiased.
        b2: decay of the curvature; debiased in the step, not in the posterior.
        batch_size: B, which multiplies the squares; 1 is the authors' code, whose posterior is
            sqrt(B) times too wide near an optimum.
        clip_spikes: the longest gradient in units of those before it, against bad batches; see
            `scale_by_precision`. None for no bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "jax", of the weights' noise.

    Raises:
        ValueError: for arguments out of range, trees of another structure, integer parameters.

    Source: Khan et al. (2018), Vadam. Special case of `blr_update` with family
    "gaussian_diagonal", `monte_carlo(1, curvature=squared_gradient(1))` and `step="plain"`, as far
    as the posterior's precision goes; the root and the averages are Adam's.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> params, tx = jnp.zeros(1), blr.vadam(0.1, ess=100.0)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(lambda w: jnp.sum((w - 3.0) ** 2))(blr.sample(state, params))
      ...     updates, state = tx.update(grads, state, params)
      ...     return params + updates, state
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> print(bool(abs(params[0] - 3.0) < 0.5))
      True
    """
    check_unit_interval("b1", b1)
    check_unit_interval("b2", b2)
    momentum = optax.ema(b1, debias=True)
    return _perturbed(
        learning_rate, ess, prior_precision, prior, init_precision, b2, batch_size, momentum,
        _root(b2), clip_spikes, key, generator,
    )  # fmt: skip


def vprop(
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule,
    prior_precision: Hyperparameter = None,
    init_precision: Hyperparameter = None,
    prior: Distribution | None = None,
    b2: float = 0.999,
    batch_size: int = 1,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """Vprop: RMSprop at weights drawn from the posterior; Vadam without averages and hats.

    s <- b2 s + (1 - b2) B g^2;  m <- m - lr (g + d m) / (sqrt(s) + d);
    q = N(m, 1 / (ess (s + d))),  d = prior_precision / ess.

    Args:
        learning_rate, ess, prior_precision, init_precision, prior: as in `vadam`.
        b2, batch_size, clip_spikes, key, generator: as in `vadam`.

    Raises:
        ValueError: as `vadam`.

    Source: Khan et al. (2017), Vprop: Variational Inference using RMSprop. Special case of
    `blr_update` as for `vadam`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> params, tx = jnp.zeros(1), blr.vprop(1.0, ess=1.0, b2=0.0)
      >>> updates, state = tx.update(jnp.array([3.0]), tx.init(params), params)
      >>> print(updates, blr.posterior(state, params).variance)  # -3 / (3 + 1), 1 / (9 + 1)
      [-0.75] [0.1]
    """
    return _perturbed(
        learning_rate, ess, prior_precision, prior, init_precision, b2, batch_size,
        optax.identity(), _root(None), clip_spikes, key, generator,
    )  # fmt: skip
