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

Kiral, Moellenhoff and Khan (2023), Algorithms 1 to 3; the last for signed weights, with two
positive gains and two draws per weight. T stands
there because the entropy of a moved noise grows by d log A (d log g). Exponentials stay positive
for whatever a sample says, with no second-order correction. The noise is a function of key, step
and path: a new draw at each step.

The statistic that `update` takes is the product of a displacement and the gradient
there, A s n g, averaged as such. The objective of the last is E[l] - T H of the pair (g+ n+,
g- n-), and E[+-g n grad] is its first term's exact slope in log g. Above 500 lines since the three
groups share their checks, their noise and their averages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._decay import check_decay, decay_leaves, masked
from blr_optax._distribution import Distribution
from blr_optax._random import canonical_key, check_generator, standard_normal
from blr_optax._rounding import widening
from blr_optax._transformation import transformation
from blr_optax._validate import (
    at,
    check_positive,
    check_unit_interval,
    finite_and_square,
    zero_unless,
)
from blr_optax.families import MeanField, Normal
from blr_optax.optimizers._posteriors.moved_noise import (
    SYMMETRIC,
    Law,
    LocationScale,
    SignedScale,
    as_law,
)
from blr_optax.optimizers._zero_mean_prior import per_example
from blr_optax.rule._precision import filled
from blr_optax.rule._spikes import (
    CLIP_SPIKES,
    SpikesState,
    check_bound,
    first_spikes,
    shorten,
    times,
)
from blr_optax.state import Reader
from blr_optax.state._reading import noise_of

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike

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


# Bounds of the group element and of the logarithm of one step: products with float32 stay finite.
SMALLEST, LARGEST = 1e-7, 1e7
LARGEST_EXPONENT = 20.0


class LieAdditiveState(NamedTuple):
    """State of `lie_additive`: that of SGD with momentum.

    Attributes:
        count: steps made, skipped ones too (int32).
        key: typed key, constant; the draw of step t is a function of (key, t, path).
        reader: static, how samples and the posterior are read.
        noise_scale: s of the coming step.
        momentum: state of the gradients' average, float32 or wider.
        skipped: steps skipped because something was not finite (int32).
        spikes: the gradients' length so far; () without a bound.
    """

    count: Array
    key: Array
    reader: AdditiveReader
    noise_scale: Array
    momentum: PyTree
    skipped: Array
    spikes: SpikesState | tuple[()]


class LieAffineState(NamedTuple):
    """State of `lie_affine`.

    Attributes:
        count, key, reader, skipped, spikes: as in `LieAdditiveState`.
        noise_scale: s, constant.
        ess: effective sample size of the coming step.
        spread: A, a tree like the parameters, float32 or wider.
        scale_momentum: state of the average U.
        mean_momentum: state of the average V.
    """

    count: Array
    key: Array
    reader: AffineReader
    noise_scale: Array
    ess: Array
    spread: Any
    scale_momentum: PyTree
    mean_momentum: PyTree
    skipped: Array
    spikes: SpikesState | tuple[()]


@dataclasses.dataclass(frozen=True)
class AdditiveReader(Reader):
    """theta = m + s n: how a `LieAdditiveState` is read.

    Attributes:
        law: of the noise.
        generator: of the standard normals that the noise is made of.
    """

    law: Law
    generator: str

    def like(self, state: OptState) -> PyTree:
        """Return a tree over the leaves that the state knows, in the dtypes of its statistics."""
        return state.momentum.ema

    def scale(self, state: OptState) -> PyTree:
        """Return the factor of the noise n: its standard deviation."""
        return jax.tree.map(
            lambda x: jnp.zeros_like(x) + state.noise_scale.astype(x.dtype), self.like(state)
        )

    def part(self, state: OptState, params: Params) -> PyTree:
        """Return the leaves of params that the state knows."""
        return _tree.matching_leaves(params, self.like(state), "params")

    def noise(self, state: OptState, key: Array) -> PyTree:
        """One standard normal number per weight, which the law makes its noise of."""
        return standard_normal(key, self.like(state), self.generator)

    def weights(self, state: OptState, params: Params, noise: PyTree) -> PyTree:
        """Formed in float32 or wider, in the weights' dtype; wider noise below it, `_rounding`."""

        def draw(s: Array, z: Array, m: Array) -> Array:
            k = widening(self.law.deviation * s, m)
            return (m.astype(s.dtype) + k * s * self.law.of_normal(z)).astype(m.dtype)

        return jax.tree.map(draw, self.scale(state), noise, params)

    def posterior(self, state: OptState, params: Params) -> Distribution:
        """Return the law of theta: a normal where the noise is, else a location-scale family."""
        mean, scale = optax.tree.cast_like(params, self.like(state)), self.scale(state)
        if self.law == SYMMETRIC["gaussian"]:
            family = MeanField(Normal())
            precision = jax.tree.map(lambda s: 1.0 / (s * s), scale)
            return Distribution(family, family.from_mean(mean, precision))
        family = LocationScale(self.law)
        mean = jax.tree.map(jnp.copy, mean)  # a posterior outlives donated parameters
        return Distribution(family, family.natural(location=mean, scale=scale))


class AffineReader(AdditiveReader):
    """theta = m + A s n: how a `LieAffineState` is read."""

    def like(self, state: LieAffineState) -> PyTree:
        """Return a tree like the leaves that the state knows."""
        return state.spread

    def scale(self, state: LieAffineState) -> PyTree:
        """Return A s, the scale of the noise."""
        return jax.tree.map(lambda a: a * state.noise_scale.astype(a.dtype), state.spread)

    def curvature(
        self, state: LieAffineState, params: Params, weights: PyTree, grads: Updates
    ) -> PyTree:
        """Return A s n g from the displacement made; for normal noise of mean (A s)^2 E[hess]."""
        params, weights, grads = (
            optax.tree.cast_like(x, state.spread) for x in (params, weights, grads)
        )
        return jax.tree.map(lambda m, w, g: (w - m) * g, params, weights, grads)

    def statistic(
        self,
        state: LieAffineState,
        params: Params,
        weights: PyTree,
        grads: Updates,
        noise: PyTree,
    ) -> PyTree:
        """Return A s n g, below float32 from the noise: what was made of it there is wider."""

        def leaf(s: Array, z: Array, m: Array, g: Array, made: Array) -> Array:
            if not _tree.narrow(m.dtype):
                return made
            k = widening(self.law.deviation * s, m)
            return s * self.law.of_normal(z) / k * g.astype(s.dtype)

        made = self.curvature(state, params, weights, grads)
        return jax.tree.map(leaf, self.scale(state), noise, params, grads, made)


# What the updates share.


def gradients(who: str, like: PyTree, updates: Updates, params: Params) -> PyTree:
    """Return the gradients of the leaves in `like`, in its dtypes.

    Raises:
        ValueError: without params, or for another structure.
    """
    if params is None:
        raise ValueError(f"{who}: update needs params, update(grads, state, params).")
    return optax.tree.cast_like(_tree.matching_leaves(updates, like, "grads"), like)


def gated_evidence(
    grads: Updates,
    like: PyTree,
    state: OptState,
    params: Params,
    statistic: PyTree,
    spikes: SpikesState | tuple[()],
    clip_spikes: Scalar | None,
) -> tuple[Array, PyTree, PyTree, SpikesState | tuple[()]]:
    """(finite, gradients, statistic, spikes), the trees zero unless all their entries are finite.

    Those of a gradient that is far too long are shortened. A statistic that is not given is derived
    from the gradients and this step's noise.
    """
    if statistic is None:
        finite, square = finite_and_square(grads)
        factor, spikes = shorten(spikes, clip_spikes, square, finite)
        grads, noise = times(factor, zero_unless(finite, grads)), noise_of(state)
        weights = state.reader.weights(state, params, noise)
        statistic = state.reader.statistic(state, params, weights, grads, noise)
        return finite, grads, statistic, spikes
    axes = state.reader.noise_axes
    statistic = _tree.matching_leaves(statistic, like, "statistic", leading=axes)
    statistic = optax.tree.cast_like(statistic, like)
    if axes:
        jax.tree.map(lambda c: check_pair("statistic", c), statistic)
    finite, square = finite_and_square(grads, statistic)
    factor, spikes = shorten(spikes, clip_spikes, square, finite)
    return finite, *times(factor, zero_unless(finite, (grads, statistic))), spikes


def check_pair(name: str, leaf: Array) -> None:
    """Raise ValueError unless the first axis has one entry for g+ and one for g-."""
    if leaf.shape[0] != 2:
        raise ValueError(
            f"lie_multiplicative: {name} needs a first axis of two, for g+ and g-, after any of "
            f"samples; a leaf has shape {leaf.shape}."
        )


def start(who: str, params: Params, key: KeyLike) -> tuple[Array, Array]:
    """Step zero and a typed key."""
    _tree.check_float_leaves(params, who)
    return jnp.zeros((), jnp.int32), canonical_key(key)


def number(hyper: Hyperparameter, count: ArrayLike) -> Array:
    """Return a hyper-parameter at a step, as a new array."""
    return jnp.array(at(hyper, count), jnp.result_type(float))


def _zeros(params: Params) -> Any:
    """Zeros like the parameters, in float32 or wider."""
    return jax.tree.map(lambda m: filled(m, 0.0), params)


def _spread_decay(weight_decay: Hyperparameter, like: Any, count: ArrayLike) -> Any:
    """Return the weight decay of this step, one number per leaf."""
    decay = decay_leaves(weight_decay, like, count)
    return jax.tree.map(lambda x, d: jnp.asarray(d, x.dtype), like, decay)


def average_of(
    decay: Scalar, inputs: PyTree, state: OptState, finite: Array
) -> tuple[PyTree, PyTree]:
    """optax's average without debiasing; in a skipped step its inputs are zero and it decays."""
    gated = jax.tree.map(lambda x: x * finite.astype(x.dtype), inputs)
    return optax.ema(decay, debias=False).update(gated, state)


def moved(a: Array, exponent: Array) -> Array:
    """Return a exp(exponent), positive and finite for any exponent."""
    bounded = jnp.clip(exponent, -LARGEST_EXPONENT, LARGEST_EXPONENT)
    return jnp.clip(a * jnp.exp(bounded), SMALLEST, LARGEST)


def _check(
    learning_rate: ScalarOrSchedule,
    weight_decay: Hyperparameter,
    generator: str,
    key: KeyLike,
    **decays: Any,
) -> None:
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_positive("weight_decay", weight_decay, zero=True)
    check_generator(generator)
    canonical_key(key)
    for name, decay in decays.items():
        check_unit_interval(name, decay)


def lie_additive(
    learning_rate: ScalarOrSchedule,
    *,
    noise_scale: ScalarOrSchedule = 0.01,
    noise: str | Callable = "gaussian",
    momentum: PyTree = 0.9,
    weight_decay: Hyperparameter = 0.0,
    mask: PyTree | Callable[[Params], PyTree] = None,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """Return the additive Lie-group rule: SGD at weights perturbed by noise of any law.

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
        mask: which leaves decay, as in `ivon`.
        clip_spikes: the longest gradient in units of those before it, against bad batches; see
            `scale_by_precision`. None for no bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "jax", of the standard normals.

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
    _check(learning_rate, weight_decay, generator, key, momentum=momentum)
    weight_decay = masked(weight_decay, mask)
    check_positive("noise_scale", noise_scale, scalar=True)
    check_bound(clip_spikes)
    reader = AdditiveReader(as_law(noise), generator)

    def init_fn(params: Params) -> LieAdditiveState:
        check_decay(weight_decay, params)
        count, first_key = start("lie_additive", params, key)
        average = optax.ema(momentum, debias=False).init(_zeros(params))
        skipped = jnp.zeros((), jnp.int32)
        return LieAdditiveState(
            count,
            first_key,
            reader,
            number(noise_scale, count),
            average,
            skipped,
            first_spikes(clip_spikes),
        )

    def update_fn(
        updates: Updates, state: LieAdditiveState, params: Params = None, **extra: Any
    ) -> tuple[Any, LieAdditiveState]:
        like = state.momentum.ema
        grads = gradients("lie_additive", like, updates, params)
        finite, square = finite_and_square(grads)
        factor, spikes = shorten(state.spikes, clip_spikes, square, finite)
        grads = times(factor, zero_unless(finite, grads))
        decay = _spread_decay(weight_decay, like, state.count)
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
            spikes=spikes,
        )

    perturbed = transformation(init_fn, update_fn)
    return optax.chain(perturbed, optax.scale_by_learning_rate(learning_rate))


def lie_affine(
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule,
    scale_rate: ScalarOrSchedule = 1e-4,
    noise_scale: float | Array = 0.01,
    noise: str | Callable = "gaussian",
    b1: Scalar = 0.8,
    b2: Scalar = 0.999,
    weight_decay: Hyperparameter = None,
    prior_precision: Hyperparameter = None,
    mask: PyTree | Callable[[Params], PyTree] = None,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """Return the affine Lie-group rule: location and scale of every weight, steps by exponentials.

    U <- b2 U + (1 - b2)(E[A s n g] - 1 / ess);  V <- b1 V + (1 - b1) E[A g];
    m <- m + A V (exp(-a U) - 1) / U;  A <- A exp(-r ess U / 2);  q = N(m, (A s)^2), normal noise.

    A starts at 1, so that the first steps are SGD's with rate a. It rests where E[A s n g] is
    1 / ess: for a quadratic loss of curvature h at the variance 1 / (ess h).

    Take the gradient at `sample(opt_state, params)`, or both from `estimate`, whose `statistic` is
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
            1e-4 by default.
        prior_precision: the same prior by its total precision, ess * d, in place of
            weight_decay; a number or prefix tree.
            A number, prefix tree or schedule; with 0 the noise of a weight that the loss does not
            depend on grows without bound.
        mask: which leaves decay, as in `ivon`.
        clip_spikes: the longest gradient in units of those before it, against bad batches; see
            `scale_by_precision`. None for no bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "jax", of the standard normals.

    Raises:
        ValueError: as `lie_additive`.

    Source: Kiral, Moellenhoff and Khan (2023), Algorithm 3. Special case of `blr_update` with
    family "gaussian_diagonal" to first order in rho, for normal noise, when b1 = b2 = 0,
    scale_rate = rho, learning_rate = rho ess s^2.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, params = (
      ...     blr.lie_affine(0.1, ess=50.0, scale_rate=0.5, noise_scale=0.1, b2=0.0),
      ...     jnp.zeros(1),
      ... )
      >>> state = tx.init(params)
      >>> loss = lambda w: 2.0 * jnp.sum((w - 1.0) ** 2)  # curvature 4
      >>> for _ in range(60):
      ...     est = blr.estimate(loss, state, params, noise=jnp.ones((1, 1)), antithetic=True)
      ...     updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
      ...     params = params + updates
      >>> print(blr.posterior(state, params).variance.round(4))  # 1 / (50 * 4)
      [0.005]
    """
    weight_decay = per_example(weight_decay, prior_precision, None, ess)
    _check(learning_rate, weight_decay, generator, key, b1=b1, b2=b2)
    weight_decay = masked(weight_decay, mask)
    check_positive("ess", ess, scalar=True)
    check_positive("scale_rate", scale_rate, zero=True, scalar=True)
    if callable(noise_scale):
        raise ValueError(
            "noise_scale is the first one and no schedule: the rule moves it from there."
        )
    check_positive("noise_scale", noise_scale, scalar=True)
    check_bound(clip_spikes)
    reader = AffineReader(as_law(noise), generator)

    def init_fn(params: Params) -> LieAffineState:
        check_decay(weight_decay, params)
        count, first_key = start("lie_affine", params, key)
        return LieAffineState(
            count,
            first_key,
            reader,
            number(noise_scale, count),
            number(ess, count),
            jax.tree.map(lambda m: filled(m, 1.0), params),
            optax.ema(b2, debias=False).init(_zeros(params)),
            optax.ema(b1, debias=False).init(_zeros(params)),
            jnp.zeros((), jnp.int32),
            first_spikes(clip_spikes),
        )

    def update_fn(
        updates: Updates,
        state: LieAffineState,
        params: Params = None,
        *,
        statistic: Any = None,
        **extra: Any,
    ) -> tuple[Any, LieAffineState]:
        grads = gradients("lie_affine", state.spread, updates, params)
        finite, grads, products, spikes = gated_evidence(
            grads, state.spread, state, params, statistic, state.spikes, clip_spikes
        )
        decay = _spread_decay(weight_decay, state.spread, state.count)

        def turn(a: Array, c: Array, d: Array) -> Array:
            scale = a * state.noise_scale.astype(a.dtype)
            return c + d * scale * scale * reader.law.variance - 1.0 / state.ess.astype(a.dtype)

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
            spikes=spikes,
        )

    return transformation(init_fn, update_fn)


class LieMultiplicativeState(NamedTuple):
    """State of `lie_multiplicative`.

    Attributes:
        count, key, reader, skipped, spikes: as in `LieAdditiveState`.
        ess: effective sample size of the coming step.
        plus: g+, a tree like the parameters, float32 or wider.
        minus: g-, likewise.
        momentum: state of the average of (M+, M-).
    """

    count: Array
    key: Array
    reader: MultiplicativeReader
    ess: Array
    plus: PyTree
    minus: PyTree
    momentum: PyTree
    skipped: Array
    spikes: SpikesState | tuple[()]


@dataclasses.dataclass(frozen=True)
class MultiplicativeReader(Reader):
    """theta = g+ n+ - g- n-: how a `LieMultiplicativeState` is read.

    Attributes:
        law: of the noise.
        generator: of the standard normals that the noise is made of.
    """

    law: Law
    generator: str
    noise_axes = 1  # the first axis is (plus, minus)

    def part(self, state: LieMultiplicativeState, params: Params) -> PyTree:  # noqa: D102
        return _tree.matching_leaves(params, state.plus, "params")

    def noise(self, state: LieMultiplicativeState, key: Array) -> PyTree:
        """Two standard normals per weight, on a first axis."""
        pairs = jax.tree.map(lambda g: jax.ShapeDtypeStruct((2, *g.shape), g.dtype), state.plus)
        return standard_normal(key, pairs, self.generator)

    def weights(self, state: LieMultiplicativeState, params: Params, noise: PyTree) -> PyTree:
        """Of the state alone: the parameters are its rounded mean."""

        def draw(plus: Array, minus: Array, z: Array, m: Array) -> Array:
            check_pair("noise", z)
            n = self.spread_by(self.widened(plus, minus, m), z)
            return (plus * n[0] - minus * n[1]).astype(m.dtype)

        return jax.tree.map(draw, state.plus, state.minus, noise, params)

    def statistic(
        self,
        state: LieMultiplicativeState,
        params: Params,
        weights: PyTree,
        grads: Updates,
        noise: PyTree,
    ) -> PyTree:
        """(g+ n+ g, -g- n- g) on a first axis: the weight alone does not tell n+ from n-."""

        def pair(plus: Array, minus: Array, g: Array, z: Array, m: Array) -> Array:
            n = self.spread_by(1.0 / self.widened(plus, minus, m), z)
            return jnp.stack([plus * n[0] * g, -minus * n[1] * g])

        grads = optax.tree.cast_like(grads, state.plus)
        return jax.tree.map(pair, state.plus, state.minus, grads, noise, params)

    def widened(self, plus: Array, minus: Array, m: Array) -> Array | float:
        """Return k >= 1, by which weights of a dtype below float32 stray further from their mean.

        It is 1 for the laws with a name, which are wide; see `_rounding`.
        """
        return widening(self.law.deviation * jnp.hypot(plus, minus), m)

    def spread_by(self, k: Array | float, z: Array) -> Array:
        """E[n] + k (n - E[n])."""
        n = self.law.of_normal(z)
        return n if isinstance(k, float) else self.law.mean + k * (n - self.law.mean)

    def posterior(self, state: LieMultiplicativeState, params: Params) -> Distribution:
        """Return the law of g+ n+ - g- n-."""
        family = SignedScale(self.law)
        copies = jax.tree.map(jnp.copy, (state.plus, state.minus))
        return Distribution(family, family.natural(plus=copies[0], minus=copies[1]))


def lie_multiplicative(
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule,
    noise: str | Callable = "rayleigh",
    init_offset: Hyperparameter = 0.01,
    momentum: PyTree = 0.9,
    weight_decay: Hyperparameter = None,
    prior_precision: Hyperparameter = None,
    mask: PyTree | Callable[[Params], PyTree] = None,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """Return the multiplicative Lie-group rule: two positive gains per weight, of either sign.

    theta = g+ n+ - g- n-;  M <- b M + (1 - b)( E[(g+ n+ g, -g- n- g)] - 1 / ess );
    g <- g exp(-a M);  params = (g+ - g-) E[n];  q is the law of g+ n+ - g- n-.

    The gains are in the state, and the parameters follow them: it stands last in a chain. Take the
    gradient at `sample(opt_state, params)`, or both from `estimate`, whose `statistic` has a first
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
            1e-4 by default.
        prior_precision: the same prior by its total precision, ess * d, in place of
            weight_decay; a number or prefix tree.
            A number, prefix tree or schedule; with 0 the noise of a weight that the loss does not
            depend on grows without bound.
        mask: which leaves decay, as in `ivon`.
        clip_spikes: the longest gradient in units of those before it, against bad batches; see
            `scale_by_precision`. None for no bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "jax", of the standard normals.

    Raises:
        ValueError: as `lie_additive`.

    Source: Kiral, Moellenhoff and Khan (2023), Algorithm 2. For a positive weight with Rayleigh
    noise the special case of `blr_update` with family "weibull" of shape 2 to first order in
    rho, when b = 0 and learning_rate = rho ess / 4.

    Example:
      >>> import jax, jax.numpy as jnp, optax, blr_optax as blr
      >>> params, tx = jnp.array([0.5]), blr.lie_multiplicative(0.1, ess=100.0, init_offset=0.1)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(lambda w: jnp.sum((w + 1.0) ** 2))(blr.sample(state, params))
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(300):
      ...     params, state = step(params, state)
      >>> print(bool(params[0] < -0.3))  # the sign has changed
      True
    """
    weight_decay = per_example(weight_decay, prior_precision, None, ess)
    _check(learning_rate, weight_decay, generator, key, momentum=momentum)
    weight_decay = masked(weight_decay, mask)
    check_positive("ess", ess, scalar=True)
    check_positive("init_offset", init_offset, schedule=False)
    check_bound(clip_spikes)
    law = as_law(noise, positive=True)
    reader = MultiplicativeReader(law, generator)

    def init_fn(params: Params) -> LieMultiplicativeState:
        check_decay(weight_decay, params)
        count, first_key = start("lie_multiplicative", params, key)
        offset = _tree.fitting_leaves(init_offset, params, "init_offset")

        def gain(sign: float) -> Any:
            def leaf(m: Any, x: Any) -> Array:
                # Shapes alone, into which a checkpoint is restored, stand for zeros.
                m = filled(m, 0.0 if isinstance(m, jax.ShapeDtypeStruct) else m)
                return filled(m, jnp.maximum(sign * m, 0.0) / law.mean + x)

            return jax.tree.map(leaf, params, offset)

        return LieMultiplicativeState(
            count,
            first_key,
            reader,
            number(ess, count),
            gain(1.0),
            gain(-1.0),
            optax.ema(momentum, debias=False).init((_zeros(params), _zeros(params))),
            jnp.zeros((), jnp.int32),
            first_spikes(clip_spikes),
        )

    def update_fn(
        updates: Updates,
        state: LieMultiplicativeState,
        params: Params = None,
        *,
        statistic: Any = None,
        **extra: Any,
    ) -> tuple[Any, LieMultiplicativeState]:
        grads = gradients("lie_multiplicative", state.plus, updates, params)
        finite, _, products, spikes = gated_evidence(
            grads, state.plus, state, params, statistic, state.spikes, clip_spikes
        )
        decay = _spread_decay(weight_decay, state.plus, state.count)

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
            spikes=spikes,
        )

    return transformation(init_fn, update_fn)
