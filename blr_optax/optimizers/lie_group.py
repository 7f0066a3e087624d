"""The Lie-group rules: a fixed noise n moved by a group, whose element is what learns.

    l      mean loss, g = grad l(theta) at a sample        T      1 / ess, from T dH(q) = T
    ema    average with decay b, started at 0              a      learning rate

    additive         theta  =  m + s n                                   s fixed
                     m      <-  m - a ema( E[g] )
    affine           theta  =  m + A s n                                 A = 1 at first
                     U      <-  ema( E[A s n g] - T ),   V  <-  ema( E[A g] )
                     m      <-  m + A V ( exp(-a U) - 1 ) / U
                     A      <-  A exp(-r ess U / 2)                      r scale_rate
    multiplicative   theta  =  g+ n+ - g- n-                             m = (g+ - g-) E[n]
                     M+     <-  ema( E[ g+ n+ g] - T )
                     M-     <-  ema( E[-g- n- g] - T )
                     g      <-  g exp(-a M)

Kiral, Moellenhoff and Khan (2023), Algorithms 1 to 3; the last is `lie_multiplicative`. T stands
there because the entropy of a moved noise grows by d log A (d log g). Exponentials stay positive
for whatever a sample says, with no second-order correction. The noise is a function of key, step
and path: a new draw at each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from blr_optax._validate import at, check_positive
from blr_optax.families._noise_law import as_law
from blr_optax.optimizers._lie_rules import (
    LARGEST_EXPONENT,
    AdditiveRule,
    AffineRule,
    LieAdditiveState,
    LieAffineState,
    average_of,
    check,
    evidence,
    moved,
    number,
    spread_decay,
    start,
    zeros,
)
from blr_optax.optimizers.ivon import WEIGHT_DECAY
from blr_optax.rule._precision import filled

if TYPE_CHECKING:
    from jaxtyping import Array


def lie_additive(
    learning_rate: float | Array | Callable,
    *,
    noise_scale: float | Array | Callable = 0.01,
    noise: str | Callable = "gaussian",
    momentum: Any = 0.9,
    weight_decay: Any = 0.0,
    key: Any = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """The additive Lie-group rule: SGD at weights perturbed by noise of any law.

    theta = m + s n;  v <- b v + (1 - b)(g + d m);  m <- m - a v;  q is the law of m + s n.

    Take the gradient at `sample(opt_state, params)`, or from `estimate` for several samples; there
    is no curvature. Without noise it is SGD with an average of gradients.

    Args:
        learning_rate: a, a number or schedule.
        noise_scale: s, positive; a number or schedule (groups of parameters with their own:
            `optax.partition`). The posterior's standard deviation for normal noise.
        noise: "gaussian", "laplace" (of density exp(-|n|) / 2), "uniform" (on [-1, 1]), or a
            function that makes draws of mean zero of standard normals, elementwise.
        momentum: b, decay of the gradients' average, not debiased; 0 for none.
        weight_decay: d, per example; a number, prefix tree or schedule.
        key: typed key or integer seed.
        generator: "hash" (fast) or "threefry", of the standard normals.

    Raises:
        ValueError: for arguments out of range, unknown names, trees of another structure, integer
            parameters, missing params.

    Source: Kiral, Moellenhoff and Khan (2023), Algorithm 1. Special case of `blr_update` with
    family "gaussian_fixed" of precision 1 / s^2, for normal noise, when b = 0 and
    a = rho ess s^2; for other laws it is the same rule on another group orbit.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, params = blr.lie_additive(0.5, noise_scale=0.1, momentum=0.0), jnp.ones(2)
      >>> state = tx.init(params)
      >>> updates, _ = tx.update(jnp.ones(2), state, params)
      >>> print(updates, blr.posterior(state, params).variance)
      [-0.5 -0.5] [0.01 0.01]
    """
    check(learning_rate, weight_decay, generator, key, momentum=momentum)
    check_positive("noise_scale", noise_scale, scalar=True)
    rule = AdditiveRule(as_law(noise), generator)

    def init_fn(params: Any) -> LieAdditiveState:
        count, first_key = start("lie_additive", params, key)
        average = optax.ema(momentum, debias=False).init(zeros(params))
        skipped = jnp.zeros((), jnp.int32)
        return LieAdditiveState(
            count, first_key, rule, number(noise_scale, count), average, skipped
        )

    def update_fn(
        updates: Any, state: LieAdditiveState, params: Any = None, **extra: Any
    ) -> tuple[Any, LieAdditiveState]:
        like = state.momentum.ema
        finite, grads, _ = evidence("lie_additive", like, updates, state, params, None, False)
        decay = spread_decay(weight_decay, like, state.count)
        grads = jax.tree.map(lambda g, d, m: g + d * m.astype(g.dtype), grads, decay, params)
        averaged, average = average_of(momentum, grads, state.momentum, finite)
        out = jax.tree.map(
            lambda v, m: (finite.astype(v.dtype) * v).astype(m.dtype), averaged, params
        )
        count = optax.safe_increment(state.count)
        return out, state._replace(
            count=count,
            noise_scale=number(noise_scale, count),
            momentum=average,
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )

    perturbed = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return optax.chain(perturbed, optax.scale_by_learning_rate(learning_rate))


def lie_affine(
    learning_rate: float | Array | Callable,
    ess: float | Array | Callable,
    *,
    scale_rate: float | Array | Callable = 1e-4,
    noise_scale: float | Array = 0.01,
    noise: str | Callable = "gaussian",
    b1: Any = 0.8,
    b2: Any = 0.999,
    weight_decay: Any = WEIGHT_DECAY,
    key: Any = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """The affine Lie-group rule: location and scale of every weight, steps by exponentials.

    U <- b2 U + (1 - b2)(E[A s n g] - 1 / ess);  V <- b1 V + (1 - b1) E[A g];
    m <- m + A V (exp(-a U) - 1) / U;  A <- A exp(-r ess U / 2);  q = N(m, (A s)^2), normal noise.

    A starts at 1, so that the first steps are SGD's with rate a. It rests where E[A s n g] is
    1 / ess: for a quadratic loss of curvature h at the variance 1 / (ess h).

    Take the gradient at `sample(opt_state, params)`, or both from `estimate`, whose `curvature` is
    E[A s n g].

    Args:
        learning_rate: a (the paper's alpha_1), a number or schedule. Well below s^2 ess, in units
            of which it is the natural step's; above, it diverges where the noise settles.
        ess: effective sample size, the number of examples the mean loss stands for (the entropy's
            temperature is 1 / ess); may be a schedule.
        scale_rate: r, how much of the way the precision goes in a step, as 1 - b2 of `ivon` (the
            paper's alpha_2 is r ess / 2); a number or schedule. Above (1 - b2) / 4 it oscillates.
        noise_scale: s, the first standard deviation for normal noise.
        noise: "gaussian", "laplace", "uniform" or a function, as in `lie_additive`.
        b1: decay of the average V, not debiased.
        b2: decay of the average U, not debiased.
        weight_decay: d, per example, of a prior N(0, 1 / (ess d)); enters exactly, not by samples.
            A number, prefix tree or schedule; with 0 the noise of a weight that the loss does not
            depend on grows without bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "threefry", of the standard normals.

    Raises:
        ValueError: as `lie_additive`.

    Source: Kiral, Moellenhoff and Khan (2023), Algorithm 3. Special case of `blr_update` with
    family "gaussian_diagonal" to first order in rho, for normal noise, when b1 = b2 = 0,
    scale_rate = rho, learning_rate = rho ess s^2.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, params = (
      ...     blr.lie_affine(0.1, 50.0, scale_rate=0.5, noise_scale=0.1, b2=0.0),
      ...     jnp.zeros(1),
      ... )
      >>> state = tx.init(params)
      >>> loss = lambda w: 2.0 * jnp.sum((w - 1.0) ** 2)  # curvature 4
      >>> for _ in range(60):
      ...     est = blr.estimate(loss, state, params, noise=jnp.ones((1, 1)), antithetic=True)
      ...     updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
      ...     params = params + updates
      >>> print(blr.posterior(state, params).variance.round(4))  # 1 / (50 * 4)
      [0.005]
    """
    check(learning_rate, weight_decay, generator, key, b1=b1, b2=b2)
    check_positive("ess", ess, scalar=True)
    check_positive("scale_rate", scale_rate, zero=True, scalar=True)
    if callable(noise_scale):
        raise ValueError(
            "noise_scale is the first one and no schedule: the rule moves it from there."
        )
    check_positive("noise_scale", noise_scale, scalar=True)
    rule = AffineRule(as_law(noise), generator)

    def init_fn(params: Any) -> LieAffineState:
        count, first_key = start("lie_affine", params, key)
        return LieAffineState(
            count,
            first_key,
            rule,
            number(noise_scale, count),
            number(ess, count),
            jax.tree.map(lambda m: filled(m, 1.0), params),
            optax.ema(b2, debias=False).init(zeros(params)),
            optax.ema(b1, debias=False).init(zeros(params)),
            jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: Any,
        state: LieAffineState,
        params: Any = None,
        *,
        curvature: Any = None,
        **extra: Any,
    ) -> tuple[Any, LieAffineState]:
        finite, grads, products = evidence(
            "lie_affine", state.spread, updates, state, params, curvature
        )
        decay = spread_decay(weight_decay, state.spread, state.count)

        def turn(a: Array, c: Array, d: Array) -> Array:
            scale = a * state.noise_scale.astype(a.dtype)
            return c + d * scale * scale * rule.law.variance - 1.0 / state.ess.astype(a.dtype)

        def shift(a: Array, g: Array, d: Array, m: Array) -> Array:
            return a * (g + d * m.astype(a.dtype))

        turns = jax.tree.map(turn, state.spread, products, decay)
        shifts = jax.tree.map(shift, state.spread, grads, decay, params)
        turns, scale_momentum = average_of(b2, turns, state.scale_momentum, finite)
        shifts, mean_momentum = average_of(b1, shifts, state.mean_momentum, finite)
        rate, scale_rate_now = at(learning_rate, state.count), at(scale_rate, state.count)

        def move(a: Array, u: Array, v: Array, m: Array) -> Array:
            alpha = jnp.asarray(rate, a.dtype)
            x = jnp.minimum(-alpha * u, LARGEST_EXPONENT)
            small = jnp.abs(x) < 1e-6
            slope = jnp.where(small, 1.0 + 0.5 * x, jnp.expm1(x) / jnp.where(small, 1.0, x))
            return (-finite.astype(a.dtype) * alpha * slope * a * v).astype(m.dtype)

        def widen(a: Array, u: Array) -> Array:
            half = 0.5 * jnp.asarray(scale_rate_now, a.dtype) * state.ess.astype(a.dtype)
            return moved(a, -finite.astype(a.dtype) * half * u)

        count = optax.safe_increment(state.count)
        out = jax.tree.map(move, state.spread, turns, shifts, params)
        return out, state._replace(
            count=count,
            ess=number(ess, count),
            spread=jax.tree.map(widen, state.spread, turns),
            scale_momentum=scale_momentum,
            mean_momentum=mean_momentum,
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
