"""How the states of the additive and affine rules are read, and what the three updates share.

Symbols as in `lie_group`. The statistic that `update` takes as curvature is the product of a
displacement and the gradient there, A s n g, averaged as such.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._distribution import Posterior
from blr_optax._random import canonical_key, check_generator, standard_normal, step_key
from blr_optax._validate import (
    at,
    check_positive,
    check_unit_interval,
    squares_finite,
    zero_unless,
)
from blr_optax.families import MeanField, Normal
from blr_optax.families._noise_law import SYMMETRIC, Law, LocationScale
from blr_optax.rule._precision import filled
from blr_optax.state import Rule

if TYPE_CHECKING:
    from jaxtyping import Array


# Bounds of the group element and of the logarithm of one step: products with float32 stay finite.
SMALLEST, LARGEST = 1e-7, 1e7
LARGEST_EXPONENT = 20.0


class LieAdditiveState(NamedTuple):
    """State of `lie_additive`: that of SGD with momentum.

    Attributes:
        count: steps made, skipped ones too (int32).
        key: typed key, constant; the draw of step t is a function of (key, t, path).
        rule: static, how samples and the posterior are read.
        noise_scale: s of the coming step.
        momentum: state of the gradients' average, float32 or wider.
        skipped: steps skipped because something was not finite (int32).
    """

    count: Array
    key: Array
    rule: AdditiveRule
    noise_scale: Array
    momentum: Any
    skipped: Array


class LieAffineState(NamedTuple):
    """State of `lie_affine`.

    Attributes:
        count, key, rule, skipped: as in `LieAdditiveState`.
        noise_scale: s, constant.
        ess: effective sample size of the coming step.
        spread: A, a tree like the parameters, float32 or wider.
        scale_momentum: state of the average U.
        mean_momentum: state of the average V.
    """

    count: Array
    key: Array
    rule: AffineRule
    noise_scale: Array
    ess: Array
    spread: Any
    scale_momentum: Any
    mean_momentum: Any
    skipped: Array


def wide(like: Any, tree: Any) -> Any:
    """A tree in the dtypes of another: those of the statistics."""
    return jax.tree.map(lambda p, x: x.astype(p.dtype), like, tree)


@dataclasses.dataclass(frozen=True)
class AdditiveRule(Rule):
    """theta = m + s n: how a `LieAdditiveState` is read.

    Attributes:
        law: of the noise.
        generator: of the standard normals that the noise is made of.
    """

    law: Law
    generator: str

    def like(self, state: Any) -> Any:
        """A tree over the leaves that the state knows, in the dtypes of its statistics."""
        return state.momentum.ema

    def scale(self, state: Any) -> Any:
        """What stands in front of n."""
        return jax.tree.map(
            lambda x: jnp.zeros_like(x) + state.noise_scale.astype(x.dtype), self.like(state)
        )

    def part(self, state: Any, params: Any) -> Any:
        return _tree.matching_leaves(params, self.like(state), "params")

    def noise(self, state: Any, key: Array) -> Any:
        return standard_normal(key, self.like(state), self.generator)

    def weights(self, state: Any, params: Any, noise: Any) -> Any:
        """Formed in float32 or wider, in the weights' own dtype."""

        def draw(s: Array, z: Array, m: Array) -> Array:
            return (m.astype(s.dtype) + s * self.law.of_normal(z)).astype(m.dtype)

        return jax.tree.map(draw, self.scale(state), noise, params)

    def posterior(self, state: Any, params: Any) -> Posterior:
        mean, scale = wide(self.like(state), params), self.scale(state)
        if self.law == SYMMETRIC["gaussian"]:
            family = MeanField(Normal())
            precision = jax.tree.map(lambda s: 1.0 / (s * s), scale)
            return Posterior(family, family.from_mean(mean, precision))
        family = LocationScale(self.law)
        mean = jax.tree.map(jnp.copy, mean)  # a posterior outlives donated parameters
        return Posterior(family, family.natural(location=mean, scale=scale))


class AffineRule(AdditiveRule):
    """theta = m + A s n: how a `LieAffineState` is read."""

    def like(self, state: LieAffineState) -> Any:
        return state.spread

    def scale(self, state: LieAffineState) -> Any:
        return jax.tree.map(lambda a: a * state.noise_scale.astype(a.dtype), state.spread)

    def curvature(self, state: LieAffineState, params: Any, weights: Any, grads: Any) -> Any:
        """A s n g from the displacement actually made; for normal noise of mean (A s)^2 E[hess]."""
        params, weights, grads = (wide(state.spread, x) for x in (params, weights, grads))
        return jax.tree.map(lambda m, w, g: (w - m) * g, params, weights, grads)


# What the updates share.


def evidence(
    who: str, like: Any, updates: Any, state: Any, params: Any, curvature: Any, needed: bool = True
) -> tuple[Array, Any, Any]:
    """(whether all is finite, gradients, statistic), the last two zero where it is not."""
    if params is None:
        raise ValueError(f"{who}: update needs params, update(grads, state, params).")
    grads = wide(like, _tree.matching_leaves(updates, like, "grads"))
    axes = state.rule.noise_axes
    if needed and curvature is not None:
        curvature = wide(like, _tree.matching_leaves(curvature, like, "curvature", leading=axes))
        if axes:
            jax.tree.map(lambda c: check_pair("curvature", c), curvature)
    else:
        curvature = None
    finite = squares_finite(grads, curvature)
    grads, curvature = zero_unless(finite, (grads, curvature))
    if needed and curvature is None:
        noise = state.rule.noise(state, step_key(state.key, state.count))
        weights = state.rule.weights(state, params, noise)
        curvature = state.rule.statistic(state, params, weights, grads, noise)
    return finite, grads, curvature


def check_pair(name: str, leaf: Array) -> None:
    """Raises ValueError unless the first axis has one entry for g+ and one for g-."""
    if leaf.shape[0] != 2:
        raise ValueError(
            f"lie_multiplicative: {name} needs a first axis of two, for g+ and g-, after any of "
            f"samples; a leaf has shape {leaf.shape}."
        )


def start(who: str, params: Any, key: Any) -> tuple[Array, Array]:
    """Step zero and a typed key."""
    _tree.check_float_leaves(params, who)
    return jnp.zeros((), jnp.int32), canonical_key(key)


def number(hyper: Any, count: Array) -> Array:
    """A hyper-parameter at a step, as a new array."""
    return jnp.array(at(hyper, count), jnp.result_type(float))


def zeros(params: Any) -> Any:
    return jax.tree.map(lambda m: filled(m, 0.0), params)


def spread_decay(weight_decay: Any, like: Any, count: Array) -> Any:
    decay = _tree.prefix_leaves(at(weight_decay, count), like, "weight_decay")
    return jax.tree.map(lambda x, d: jnp.asarray(d, x.dtype), like, decay)


def average_of(decay: Any, inputs: Any, state: Any, finite: Array) -> tuple[Any, Any]:
    """optax's average without debiasing; in a skipped step its inputs are zero and it decays."""
    gated = jax.tree.map(lambda x: x * finite.astype(x.dtype), inputs)
    return optax.ema(decay, debias=False).update(gated, state)


def moved(a: Array, exponent: Array) -> Array:
    """a exp(exponent), positive and finite for any exponent."""
    bounded = jnp.clip(exponent, -LARGEST_EXPONENT, LARGEST_EXPONENT)
    return jnp.clip(a * jnp.exp(bounded), SMALLEST, LARGEST)


def check(learning_rate: Any, weight_decay: Any, generator: str, key: Any, **decays: Any) -> None:
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_positive("weight_decay", weight_decay, zero=True)
    check_generator(generator)
    canonical_key(key)
    for name, decay in decays.items():
        check_unit_interval(name, decay)
