"""IVON for low-rank adapters: one prior per matrix, learnt on the way, and a colder posterior.

    ess    =  gamma sqrt(N)                                           N training examples
    d_i    =  P_i / ( ess sum_j (m_j^2 + sigma_j^2) )                 one per matrix i
    p     <-  p (1 + u + u^2 / 2),  u = (1 - b2)(c + d_i - p) / p     sigma^2 = 1 / (ess p)
    v     <-  b1 v + (1 - b1) g
    m     <-  m - lr h_0 clip( v_hat / p, -xi, xi )                   the prior's pull left out

S_0 = ess d_i is the precision at which KL(q || N(0, 1 / S_0)) is smallest over the P_i entries of a
matrix (empirical Bayes). It enters the precision as every prior of the rule does, at the rate
1 - b2: taken in at once, p = h + d_i, it would feed on itself where m = 0, as LoRA's second factor
is at first, and grow by h at every step. For prediction the posterior may be made colder or warmer
without moving its mean, `posterior(opt_state, params) ** tau`: ess becomes tau ess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from blr_optax._validate import at, check_positive, check_unit_interval
from blr_optax.rule import EmpiricalPrior, scale_by_precision
from blr_optax.rule._spikes import CLIP_SPIKES
from blr_optax.state import posterior

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import (
        Hyperparameter,
        KeyLike,
        OptState,
        Params,
        PyTree,
        Scalar,
        ScalarOrSchedule,
    )


def ivon_lora(
    learning_rate: ScalarOrSchedule,
    *,
    examples: float | Array,
    gamma: ScalarOrSchedule = 5e3,
    hess_init: float | Array = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99999,
    clip_radius: Hyperparameter = None,
    prior_in_mean: bool = False,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """IVON for LoRA: the prior precision of every matrix re-estimated at every step.

    d_i = P_i / (ess sum_j (m_j^2 + sigma_j^2));  p <- p (1 + u + u^2 / 2), u = (1 - b2)(c + d_i -
    p) / p;  m <- m - lr h_0 clip( v_hat / p, -xi, xi );  ess = gamma sqrt(N).

    It is for the adapters alone: keep the frozen weights out with `optax.partition({"adapter":
    blr.ivon_lora(...), "frozen": optax.set_to_zero()}, labels)`. A matrix is a leaf.

    Args:
        learning_rate: lr, a number or schedule, rescaled by hess_init.
        examples: N, the number of training examples.
        gamma: ess / sqrt(N); a number or schedule. sqrt(N) makes it N.
        hess_init: h_0, the first precision per example. The noise, 1 / sqrt(ess h_0), should not be
            larger than the adapters' first entries.
        b1: decay of the gradient's average, debiased; 0 for none.
        b2: decay of the precision.
        clip_radius: xi, elementwise bound on the preconditioned step; None for none.
        prior_in_mean: let the prior pull the mean as well, + d_i m in the numerator, as in `ivon`.
        clip_spikes: the longest gradient in units of those before it, against bad batches; see
            `scale_by_precision`. None for no bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "jax", of the weights' noise.

    Raises:
        ValueError: for arguments out of range, integer parameters.

    Source: the variational LoRA of arXiv 2506.14280, as its reviews describe it; the prior's
    precision re-derived as the minimiser of the KL divergence. Special case of `blr_update` as
    `ivon`, each step with the prior of that step.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> w, x = jnp.eye(4, 3), jax.random.normal(jax.random.key(0), (64, 4))
      >>> params = {"a": 0.1 * jnp.ones((4, 1)), "b": jnp.zeros((1, 3))}
      >>> y = x @ (w + 1.0)  # a change of rank one
      >>> loss = lambda p: jnp.mean((x @ (w + p["a"] @ p["b"]) - y) ** 2)
      >>> tx = blr.ivon_lora(0.1, examples=64, hess_init=0.1, b2=0.999)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(loss)(blr.sample(state, params))
      ...     updates, state = tx.update(grads, state, params)
      ...     return jax.tree.map(jnp.add, params, updates), state
      >>> for _ in range(300):
      ...     params, state = step(params, state)
      >>> print(bool(loss(params) < 0.01))
      True
    """
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_positive("examples", examples, scalar=True, schedule=False)
    check_positive("gamma", gamma, scalar=True)
    check_positive("hess_init", hess_init, scalar=True, schedule=False)
    check_unit_interval("b1", b1)
    if clip_radius is not None:
        check_positive("clip_radius", clip_radius, schedule=False)

    def ess(count: Any) -> Any:
        return at(gamma, count) * jnp.sqrt(jnp.asarray(examples, jnp.result_type(float)))

    return optax.chain(
        scale_by_precision(
            ess=ess,
            b2=b2,
            hess_init=hess_init,
            weight_decay=EmpiricalPrior(),
            prior_in_mean=prior_in_mean,
            momentum=optax.ema(b1, debias=True),
            clip_spikes=clip_spikes,
            generator=generator,
            key=key,
        ),
        optax.identity() if clip_radius is None else optax.clip(clip_radius),
        optax.scale(hess_init),
        optax.scale_by_learning_rate(learning_rate),
    )


def signal_to_noise(opt_state: OptState, params: Params) -> PyTree:
    """|m| / sigma of every parameter: those of a small one can be pruned.

    Set to zero what hardly differs from it: `jax.tree.map(lambda m, s: jnp.where(s > 1, m, 0),
    params, blr.signal_to_noise(opt_state, params))`.

    Args:
        opt_state: any optimizer state with a posterior inside.
        params: the parameters, the posterior's mean.

    Returns:
        A tree like params, float32 or wider; infinite where there is no posterior, so that points
        are kept.

    Raises:
        ValueError: when the state carries no posterior, or two over one leaf.

    Source: Graves (2011), Practical Variational Inference for Neural Networks. For every row of
    `blr_update` with a mean and a variance.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> params = jnp.array([1.0, -0.1])
      >>> state = blr.ivon(0.1, ess=100.0, hess_init=1.0, weight_decay=0.0).init(params)
      >>> print(blr.signal_to_noise(state, params))
      [10.  1.]
    """
    q = posterior(opt_state, params)

    def ratio(m: Array, v: Array) -> Array:
        return jnp.where(v > 0, jnp.abs(m) / jnp.sqrt(jnp.where(v > 0, v, 1.0)), jnp.inf)

    return jax.tree.map(ratio, q.mean, q.variance)
