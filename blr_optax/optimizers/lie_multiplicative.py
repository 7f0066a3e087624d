"""The multiplicative Lie-group rule on signed weights: two positive gains and two draws per weight.

    theta  =  g+ n+ - g- n-,   g = grad l(theta)               m = (g+ - g-) E[n], the parameters
    M+     <-  b M+ + (1 - b)( E[ g+ n+ g] - T ),              T = 1 / ess
    M-     <-  b M- + (1 - b)( E[-g- n- g] - T )
    g+     <-  g+ exp(-a M+),   g-  <-  g- exp(-a M-)

Kiral, Moellenhoff and Khan (2023), Algorithm 2. The objective is E[l] - T H of the pair
(g+ n+, g- n-), and E[+-g n grad] is its first term's exact slope in log g.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._distribution import Posterior
from blr_optax._random import standard_normal
from blr_optax._validate import at, check_positive
from blr_optax.families._noise_law import Law, SignedScale, as_law
from blr_optax.optimizers._lie_rules import (
    average_of,
    check,
    check_pair,
    evidence,
    moved,
    number,
    spread_decay,
    start,
    wide,
    zeros,
)
from blr_optax.optimizers.ivon import WEIGHT_DECAY
from blr_optax.rule._precision import filled
from blr_optax.state import Rule

if TYPE_CHECKING:
    from jaxtyping import Array


class LieMultiplicativeState(NamedTuple):
    """State of `lie_multiplicative`.

    Attributes:
        count, key, rule, skipped: as in `LieAdditiveState`.
        ess: effective sample size of the coming step.
        plus: g+, a tree like the parameters, float32 or wider.
        minus: g-, likewise.
        momentum: state of the average of (M+, M-).
    """

    count: Array
    key: Array
    rule: MultiplicativeRule
    ess: Array
    plus: Any
    minus: Any
    momentum: Any
    skipped: Array


@dataclasses.dataclass(frozen=True)
class MultiplicativeRule(Rule):
    """theta = g+ n+ - g- n-: how a `LieMultiplicativeState` is read.

    Attributes:
        law: of the noise.
        generator: of the standard normals that the noise is made of.
    """

    law: Law
    generator: str
    noise_axes = 1  # the first axis is (plus, minus)

    def part(self, state: LieMultiplicativeState, params: Any) -> Any:  # noqa: D102
        return _tree.matching_leaves(params, state.plus, "params")

    def noise(self, state: LieMultiplicativeState, key: Array) -> Any:
        """Two standard normals per weight, on a first axis."""
        pairs = jax.tree.map(lambda g: jax.ShapeDtypeStruct((2, *g.shape), g.dtype), state.plus)
        return standard_normal(key, pairs, self.generator)

    def weights(self, state: LieMultiplicativeState, params: Any, noise: Any) -> Any:
        """Of the state alone: the parameters are its rounded mean."""

        def draw(plus: Array, minus: Array, z: Array, m: Array) -> Array:
            check_pair("noise", z)
            n = self.law.of_normal(z)
            return (plus * n[0] - minus * n[1]).astype(m.dtype)

        return jax.tree.map(draw, state.plus, state.minus, noise, params)

    def statistic(
        self, state: LieMultiplicativeState, params: Any, weights: Any, grads: Any, noise: Any
    ) -> Any:
        """(g+ n+ g, -g- n- g) on a first axis: the weight alone does not tell n+ from n-."""

        def pair(plus: Array, minus: Array, g: Array, z: Array) -> Array:
            n = self.law.of_normal(z)
            return jnp.stack([plus * n[0] * g, -minus * n[1] * g])

        return jax.tree.map(pair, state.plus, state.minus, wide(state.plus, grads), noise)

    def posterior(self, state: LieMultiplicativeState, params: Any) -> Posterior:
        """The law of g+ n+ - g- n-."""
        family = SignedScale(self.law)
        copies = jax.tree.map(jnp.copy, (state.plus, state.minus))
        return Posterior(family, family.natural(plus=copies[0], minus=copies[1]))


def lie_multiplicative(
    learning_rate: float | Array | Callable,
    ess: float | Array | Callable,
    *,
    noise: str | Callable = "rayleigh",
    init_offset: Any = 0.01,
    momentum: Any = 0.9,
    weight_decay: Any = WEIGHT_DECAY,
    key: Any = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """The multiplicative Lie-group rule: two positive gains per weight, which may change its sign.

    theta = g+ n+ - g- n-;  M <- b M + (1 - b)( E[(g+ n+ g, -g- n- g)] - 1 / ess );
    g <- g exp(-a M);  params = (g+ - g-) E[n];  q is the law of g+ n+ - g- n-.

    The gains are in the state, and the parameters follow them: it stands last in a chain. Take the
    gradient at `sample(opt_state, params)`, or both from `estimate`, whose `curvature` has a first
    axis of two (its `noise` a second one). `posterior` draws and has moments, but no density.

    Args:
        learning_rate: a, a number or schedule; relative, of the order of 1 / |theta grad|.
        ess: effective sample size, the number of examples the mean loss stands for (the entropy's
            temperature is 1 / ess); may be a schedule.
        noise: "rayleigh", "log_normal" (exp(z / 2)), or a function that makes positive draws of
            standard normals, elementwise.
        init_offset: positive; the gains start at max(+-params, 0) / E[n] + init_offset. A number or
            prefix tree.
        momentum: b, decay of the average M, not debiased.
        weight_decay: d, per example, of a prior N(0, 1 / (ess d)); enters exactly, not by samples.
            A number, prefix tree or schedule; with 0 the noise of a weight that the loss does not
            depend on grows without bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "threefry", of the standard normals.

    Raises:
        ValueError: as `lie_additive`.

    Source: Kiral, Moellenhoff and Khan (2023), Algorithm 2. For a positive weight with Rayleigh
    noise the special case of `blr_update` with family "weibull" of shape 2 to first order in
    rho, when b = 0 and learning_rate = rho ess / 4.

    Example:
      >>> import jax, jax.numpy as jnp, optax, blr_optax as blr
      >>> params, tx = jnp.array([0.5]), blr.lie_multiplicative(0.1, 100.0, init_offset=0.1)
      >>> state = tx.init(params)
      >>> for _ in range(300):
      ...     grads = jax.grad(lambda w: jnp.sum((w + 1.0) ** 2))(blr.sample(state, params))
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(bool(params[0] < -0.3))  # the sign has changed
      True
    """
    check(learning_rate, weight_decay, generator, key, momentum=momentum)
    check_positive("ess", ess, scalar=True)
    check_positive("init_offset", init_offset)
    law = as_law(noise, positive=True)
    rule = MultiplicativeRule(law, generator)

    def init_fn(params: Any) -> LieMultiplicativeState:
        count, first_key = start("lie_multiplicative", params, key)
        offset = _tree.prefix_leaves(init_offset, params, "init_offset")

        def gain(sign: float) -> Any:
            def leaf(m: Any, x: Any) -> Array:
                # Shapes alone, into which a checkpoint is restored, stand for zeros.
                m = filled(m, 0.0 if isinstance(m, jax.ShapeDtypeStruct) else m)
                return filled(m, jnp.maximum(sign * m, 0.0) / law.mean + x)

            return jax.tree.map(leaf, params, offset)

        return LieMultiplicativeState(
            count,
            first_key,
            rule,
            number(ess, count),
            gain(1.0),
            gain(-1.0),
            optax.ema(momentum, debias=False).init((zeros(params), zeros(params))),
            jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: Any,
        state: LieMultiplicativeState,
        params: Any = None,
        *,
        curvature: Any = None,
        **extra: Any,
    ) -> tuple[Any, LieMultiplicativeState]:
        finite, _, products = evidence(
            "lie_multiplicative", state.plus, updates, state, params, curvature
        )
        decay = spread_decay(weight_decay, state.plus, state.count)

        def turn(side: int) -> Callable:
            def leaf(own: Array, other: Array, c: Array, d: Array) -> Array:
                pull = own * (law.square * own - law.mean**2 * other)  # E[+-g n theta]
                return c[side] + d * pull - 1.0 / state.ess.astype(own.dtype)

            return leaf

        turns = (
            jax.tree.map(turn(0), state.plus, state.minus, products, decay),
            jax.tree.map(turn(1), state.minus, state.plus, products, decay),
        )
        turns, average = average_of(momentum, turns, state.momentum, finite)
        rate = at(learning_rate, state.count)

        def widen(g: Array, x: Array) -> Array:
            return moved(g, -finite.astype(g.dtype) * jnp.asarray(rate, g.dtype) * x)

        plus = jax.tree.map(widen, state.plus, turns[0])
        minus = jax.tree.map(widen, state.minus, turns[1])

        def follow(new: Array, less: Array, m: Array) -> Array:
            # To the new mean from the parameters as they are, so that rounding does not add up.
            gap = law.mean * (new - less) - m.astype(new.dtype)
            return jnp.where(finite, gap, 0.0).astype(m.dtype)

        count = optax.safe_increment(state.count)
        return jax.tree.map(follow, plus, minus, params), state._replace(
            count=count,
            ess=number(ess, count),
            plus=plus,
            minus=minus,
            momentum=average,
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
