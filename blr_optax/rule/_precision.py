"""`scale_by_precision`: the rule for a diagonal Gaussian whose mean is the network's parameters.

    m    posterior mean, the parameters            g    grad of the mean loss at theta ~ q
    p    precision per example (IVON's h + delta)  c    curvature per example, from g
    S    total precision, ess p                    d0   prior precision per example, lambda_0's

    theta  <-  m + eps / sqrt(ess p)                                  sampling, in `sample`
    u      <-  rho (c + d0 - p) / p,   rho = 1 - b2                   relative step of the precision
    p      <-  p (1 + u + u^2 / 2)                                    improved retraction: >= p / 2
    v      <-  momentum(g)                                            any optax transformation
    out    <-  ( v + d0 (m - m0) ) / p                                new precision, old mean

This is `natural_step` of the mean-field normal with the mean's rate left to the chain
(Lin, Schmidt and Khan 2020; Shen et al. 2024, Algorithm 1).

The prior d0 is a tree like the parameters, per example: weight_decay + S_0 / ess, S_0 the total
precision of a `prior=` posterior; or, re-estimated from the posterior at every step (empirical
Bayes), one number per leaf of P entries, sigma^2 = 1 / (ess p):

    d0  =  P / ( ess sum_j (m_j^2 + sigma_j^2) )

bSAM's adversary, m_a = m + r g / p, is read off the same state.

Above 500 lines, since the state, how it is read and how it moves are one idea, and a third of the
file is the contract of `scale_by_precision`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._decay import MaskedDecay, check_decay, decay_leaves, masked, moves
from blr_optax._distribution import Distribution, check_distribution
from blr_optax._random import canonical_key, check_generator, standard_normal
from blr_optax._rounding import cast_on_average, least_deviation, rounding_variance
from blr_optax._transformation import transformation
from blr_optax._validate import (
    at,
    check_positive,
    check_unit_interval,
    finite_and_square,
    holds,
    is_schedule,
    is_zero,
    near,
    positive,
    zero_unless,
)
from blr_optax.estimators._curvature import (
    AbsoluteGradient,
    Curvature,
    PerExampleSquares,
    Reparameterized,
    Sample,
    SquaredGradient,
    from_gradient,
)
from blr_optax.families import GaussianNatural, MeanField, Normal
from blr_optax.families._base.domain import LARGEST_RELATIVE_STEP
from blr_optax.rule._natural_step import own_part, spread
from blr_optax.rule._spikes import (
    CLIP_SPIKES,
    SpikesState,
    check_bound,
    first_spikes,
    shorten,
    times,
)
from blr_optax.state._reader import Reader, refuse_one_gradient
from blr_optax.state._reading import noise_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array

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


@dataclasses.dataclass(frozen=True)
class EmpiricalPrior:
    """A `weight_decay=` of `scale_by_precision` that follows the posterior, one number per leaf.

    Among all zero-mean priors of one precision S_0 per leaf, KL(q || prior) is smallest at
    S_0 = P / sum_j (m_j^2 + sigma_j^2). The rule's step then goes towards c + S_0 / ess, at its own
    rate: a precision that took the new prior in at once would grow without bound where m = 0.

    Attributes:
        first: the weight decay from which the first precision is made.
    """

    first: float = 0.0

    def __call__(self, count: Any) -> float:
        """Before there is a posterior: a constant schedule."""
        return self.first

    def of(self, params: Params, precision: PyTree, ess: ScalarOrSchedule) -> PyTree:
        """d0 for every leaf, a tree of numbers."""

        def leaf(m: Array, p: Array) -> Array:
            size = jnp.asarray(ess, p.dtype)
            second_moment = jnp.sum(size * jnp.square(m.astype(p.dtype)) + 1.0 / p)
            return p.size / second_moment

        return jax.tree.map(leaf, params, precision)


def filled(m: PyTree, x: PyTree) -> Array:
    """x in the shape and sharding of a parameter, in its statistics dtype."""
    dtype = _tree.statistics_dtype(m.dtype)
    if isinstance(x, (int, float)):
        return jnp.full_like(m, x, dtype=dtype)
    return jnp.zeros_like(m, dtype=dtype) + x


def prior_trees(prior: Distribution | None, params: Params, name: str = "prior") -> PyTree:
    """Return the natural parameters of a mean-field Gaussian as trees like params; () for None.

    One of one number holds for every parameter.

    Raises:
        ValueError: for another family or another tree structure.
    """
    if prior is None:
        return ()
    given = spread(check_distribution(name, prior), MeanField(Normal()), params)
    prior = check_distribution(name, own_part(given, MeanField(Normal())))
    if prior.family not in (Normal(), MeanField(Normal())):
        raise ValueError(
            f"{name} must be a mean-field Gaussian Distribution (gaussian_diagonal); got "
            f"{prior.family}."
        )
    fields = [_tree.matching_leaves(field, params, name) for field in prior.natural]
    return GaussianNatural(*(jax.tree.map(filled, params, field) for field in fields))


def prior_precision(
    weight_decay: Hyperparameter, prior: PyTree, ess: ScalarOrSchedule, like: PyTree, count: Any
) -> PyTree:
    """d0 = weight_decay + S_0 / ess for every leaf: the prior's precision per example."""
    decay = decay_leaves(weight_decay, like, count)
    if prior == ():
        return decay
    return jax.tree.map(
        lambda w, q: jnp.asarray(w, q.dtype) - 2.0 * q / jnp.asarray(ess, q.dtype),
        decay,
        prior.quadratic,
    )


def _relative_step(before: Array, after: Array) -> Array:
    """Solve after = before (1 + u + u^2 / 2) for u >= -1, without cancellation for small u."""
    x = jnp.maximum((after - before) / before, -0.5)
    return 2.0 * x / (jnp.sqrt(1.0 + 2.0 * x) + 1.0)


@dataclasses.dataclass(frozen=True)
class PrecisionReader(Reader):
    """How a `ScaleByPrecisionState` is read.

    Attributes:
        kind: the curvature that a gradient gives.
        generator: of the noise; None for the delta method, whose weights are the mean.
        step: how the precision moves, see `scale_by_precision`.
        radius: r, of the adversary; None for no second gradient.
    """

    kind: Curvature
    generator: str | None
    step: str = "improved"
    radius: float | None = None

    @property
    def by_example(self) -> bool:
        return isinstance(self.kind, PerExampleSquares)

    @property
    def adversarial(self) -> bool:
        return self.radius is not None

    @property
    def by_displacement(self) -> bool:
        """Whether the curvature is measured by the noise, and not by the gradient's size alone."""
        return isinstance(self.kind, Reparameterized)

    def part(self, state: ScaleByPrecisionState, params: Params) -> PyTree:
        return _tree.matching_leaves(params, state.precision, "params")

    def noise(self, state: ScaleByPrecisionState, key: Array) -> PyTree:
        if self.generator is None:
            return None
        return standard_normal(key, state.precision, self.generator)

    def weights(self, state: ScaleByPrecisionState, params: Params, noise: PyTree) -> PyTree:
        """theta = m + eps / sqrt(ess p), formed in float32 or wider, in the weights' own dtype.

        In a dtype below float32 noise that measures the curvature is wider, see `_rounding`.
        """
        if self.generator is None:
            return params

        def draw(p: Array, eps: Array, m: Array) -> Array:
            sigma = jax.lax.rsqrt(state.ess.astype(p.dtype) * p)
            if self.by_displacement:
                sigma = least_deviation(sigma, m)
            return (m.astype(p.dtype) + eps * sigma).astype(m.dtype)

        return jax.tree.map(draw, state.precision, noise, params)

    def drawn_precision(self, state: ScaleByPrecisionState, params: Params) -> PyTree:
        """Return 1 / E[(theta - m)^2] of the weights that `weights` makes: S, or less if rounded.

        Of noise that measures no curvature it is S, and what it measures does not depend on it.
        """
        if not self.by_displacement:
            return self.total_precision(state)

        def leaf(p: Array, m: Array) -> Array:
            total = state.ess.astype(p.dtype) * p
            if not _tree.narrow(m.dtype):
                return total
            sigma = least_deviation(jax.lax.rsqrt(total), m)
            return 1.0 / (jnp.square(sigma) + rounding_variance(m))

        return jax.tree.map(leaf, state.precision, params)

    def total_precision(self, state: ScaleByPrecisionState) -> PyTree:
        """S = ess p."""
        return jax.tree.map(lambda p: state.ess.astype(p.dtype) * p, state.precision)

    def curvature(
        self, state: ScaleByPrecisionState, params: Params, weights: PyTree, grads: Updates
    ) -> PyTree:
        """Per-example curvature from the displacement actually made, which matters in bfloat16."""
        m, theta, g = (optax.tree.cast_like(x, state.precision) for x in (params, weights, grads))
        displacement = optax.tree.sub(theta, m)
        s = self.drawn_precision(state, params)
        return self.kind.diagonal(Sample(None, theta, g, displacement, s, state.ess, None))

    def posterior(self, state: ScaleByPrecisionState, params: Params) -> Distribution:
        """N(params, 1 / (ess p))."""
        family = MeanField(Normal())
        mean = optax.tree.cast_like(params, state.precision)
        return Distribution(family, family.from_mean(mean, self.total_precision(state)))

    def corrections(
        self,
        before: OptState,
        after: OptState,
        b2: Scalar,
        statistic: PyTree,
        weight_decay: Hyperparameter,
    ) -> tuple[Array | None, Array | None]:
        """Shares of the second-order term in the move and in the precision."""
        if self.step in ("plain", "plain_old"):
            return jnp.zeros(()), None if b2 is None else jnp.zeros(())
        u = jax.tree.map(_relative_step, before.precision, after.precision)
        if statistic is not None and b2 is not None:
            given = _tree.matching_leaves(statistic, before.precision, "statistic")
            d0 = prior_precision(
                weight_decay, before.prior, before.ess, before.precision, before.count
            )
            u = jax.tree.map(
                lambda u, p, c, d: jnp.where((1.0 - b2) * (c + d - p) < -p, -2.0 - u, u),
                u, before.precision, given, d0,
            )  # fmt: skip
        first = _tree.total(lambda p, u: jnp.sum(p * jnp.abs(u)), before.precision, u)
        second = _tree.total(lambda p, u: jnp.sum(0.5 * p * u * u), before.precision, u)
        of_move = _tree.ratio(second, first + second)
        if b2 is None:
            return of_move, None
        return of_move, second / ((1.0 - b2) * _tree.total(jnp.sum, before.precision))

    def relative_statistic(
        self,
        before: OptState,
        after: OptState,
        b2: Hyperparameter,
        weight_decay: Hyperparameter,
    ) -> PyTree:
        """c / p = 1 + u / rho - d0 / p, and 0 where it drowns in the rounding of u."""
        if not self.by_displacement:
            return None

        def relative(p: Array, u: Array, d: Any) -> Array:
            found = 1.0 + u / (1.0 - b2) - d / p
            return jnp.where(jnp.abs(found) * (1.0 - b2) > 8 * jnp.finfo(p.dtype).eps, found, 0.0)

        d0 = prior_precision(weight_decay, before.prior, before.ess, before.precision, before.count)
        u = jax.tree.map(_relative_step, before.precision, after.precision)
        return jax.tree.map(relative, before.precision, u, d0)

    def statistic_over_precision(
        self, state: OptState, statistic: PyTree, weight_decay: Hyperparameter
    ) -> Array:
        """Where the precision has settled, E[c] + d0 = p: about 1."""
        p = state.precision
        c = _tree.matching_leaves(statistic, p, "statistic")
        d0 = prior_precision(weight_decay, state.prior, state.ess, p, state.count)
        held = jax.tree.map(lambda c, d, p: jnp.sum(c.astype(p.dtype) + d), c, d0, p)
        return _tree.ratio(_tree.total(jnp.asarray, held), _tree.total(jnp.sum, p))

    def learnt(
        self, before: OptState, after: OptState, b2: Hyperparameter, weight_decay: Hyperparameter
    ) -> Array:
        """Share of coordinates with |log( p / ((p_0 - d0) b2^t + d0) )| > 0.1, after t steps."""
        d0 = prior_precision(weight_decay, after.prior, after.ess, after.precision, after.count)
        left = jnp.asarray(b2, jnp.float32) ** (after.count - before.count)

        def moved(p0: Array, p: Array, d: Any) -> Array:
            expected = left.astype(p.dtype) * (p0 - d) + d
            return jnp.sum(jnp.abs(jnp.log(p / expected)) > 0.1)

        size = sum(p.size for p in jax.tree.leaves(after.precision))
        return _tree.total(moved, before.precision, after.precision, d0) / size

    def decay_of_step(
        self, state: ScaleByPrecisionState, params: Params, weight_decay: Hyperparameter
    ) -> Hyperparameter:
        if not isinstance(weight_decay, EmpiricalPrior):
            return weight_decay
        return weight_decay.of(params, state.precision, state.ess)

    def adversary(self, state: ScaleByPrecisionState, params: Params, grads: Updates) -> PyTree:
        """m + r g / p: where the loss is worst within the posterior's reach, to first order."""
        radius = 0.0 if self.radius is None else self.radius

        def worst(p: Array, m: Array, g: Array) -> Array:
            return m.astype(p.dtype) + radius * g.astype(p.dtype) / p

        moved = jax.tree.map(worst, state.precision, params, grads)
        return cast_on_average(moved, params, state.key, state.count)


STEPS = ("improved", "improved_old", "plain", "plain_old")
NEVER_NEGATIVE = (PerExampleSquares, SquaredGradient, AbsoluteGradient)
SMALLEST_PRECISION, LARGEST_PRECISION = 1e-15, 1e15


class ScaleByPrecisionState(NamedTuple):
    """State of `scale_by_precision`: Adam's memory.

    Attributes:
        count: steps made, skipped ones too (int32).
        key: typed key, constant; the draw of step t is a function of (key, t, path).
        reader: static, how samples, curvature and the posterior are read.
        precision: per-example precision p, a tree like the parameters, float32 or wider.
        ess: effective sample size of the coming step.
        prior: natural parameters of the prior, trees like the parameters; () without one.
        momentum: state of the momentum transformation.
        skipped: steps skipped because something was not finite (int32).
        spikes: the gradients' length so far, see `_spikes`; () without a bound.
    """

    count: Array
    key: Array
    reader: PrecisionReader
    precision: PyTree
    ess: Array
    prior: PyTree
    momentum: PyTree
    skipped: Array
    spikes: SpikesState | tuple[()]


# The step, an equation each. `state` is the state before it; leaf functions take arrays.


def gated_evidence(
    state: ScaleByPrecisionState,
    params: Params,
    updates: Updates,
    statistic: PyTree,
    clip_spikes: Scalar | None,
) -> tuple[Array, PyTree, PyTree, SpikesState | tuple[()]]:
    """(finite, g, c, spikes): gradient and curvature, zero unless all their entries are finite.

    Those of a gradient that is far too long are shortened. A curvature that is not given is derived
    from the gradient and this step's noise.
    """
    if statistic is None and not jax.tree.leaves(state.precision):
        statistic = state.precision  # a group of optax.partition that matches no leaf
    refuse_one_gradient(state.reader, statistic)
    g = _tree.matching_leaves(updates, state.precision, "grads")
    g = optax.tree.cast_like(g, state.precision)
    if statistic is None:
        weights = state.reader.weights(state, params, noise_of(state))
        finite, square = finite_and_square(g)
        factor, spikes = shorten(state.spikes, clip_spikes, square, finite)
        g = times(factor, zero_unless(finite, g))
        return finite, g, state.reader.curvature(state, params, weights, g), spikes
    c = _tree.matching_leaves(statistic, state.precision, "statistic")
    c = optax.tree.cast_like(c, state.precision)
    finite, square = finite_and_square(g, c)
    if isinstance(state.reader.kind, NEVER_NEGATIVE):
        finite &= jnp.all(jnp.array([jnp.all(x >= 0) for x in jax.tree.leaves(c)]))
    factor, spikes = shorten(state.spikes, clip_spikes, square, finite)
    g, c = zero_unless(finite, (g, c))
    return finite, times(factor, g), times(factor**state.reader.kind.order, c), spikes


def prior_of_step(
    state: ScaleByPrecisionState, params: Params, weight_decay: Hyperparameter
) -> PyTree:
    """d0 of the coming step; an `EmpiricalPrior` takes it from the posterior."""
    weight_decay = state.reader.decay_of_step(state, params, weight_decay)
    return prior_precision(weight_decay, state.prior, state.ess, state.precision, state.count)


def prior_pull(state: ScaleByPrecisionState, params: Params, d0: PyTree) -> PyTree:
    """d0 (m - m0), as d0 m - S_0 m_0 / ess: an improper prior has no m_0."""

    def pull(p: Array, d: Any, m: Array, b: Array | float) -> Array:
        return jnp.asarray(d, p.dtype) * m.astype(p.dtype) - b

    if state.prior:
        b0 = jax.tree.map(lambda b: b / state.ess.astype(b.dtype), state.prior.linear)
    else:
        b0 = jax.tree.map(lambda _: 0.0, state.precision)
    return jax.tree.map(pull, state.precision, d0, params, b0)


def precision_step(p: Array, c: Array, d: Array, rho: Array, plain: bool) -> Array:
    """p (1 + u + u^2 / 2), or p (1 + u) when plain, with u = rho (c + d - p) / p."""
    u = rho * (c + d - p) / p
    return p + p * u if plain else _retracted(p, u)


def divisor(old: Array, new: Array, step: str) -> Array:
    """Return the p that divides the direction: the new precision, or the old one for "..._old"."""
    if step in ("improved_old", "plain_old"):
        return old
    if step == "plain":
        return new
    # It never binds: a maximum keeps XLA from joining this division with that in `_retracted`.
    return jnp.maximum(new, SMALLEST_PRECISION)


def direction(v: Array, pull: Array, p: Array, gate: Array) -> Array:
    """(v + d0 (m - m0)) / p; zero in a step that is skipped."""
    return gate * (v + pull) / p


def _with_moved_prior(after: ScaleByPrecisionState, weight_decay: Hyperparameter, d0: Any) -> Any:
    """Return the state after a plain step, its prior that of the coming step in place of d0.

    A plain precision is an average of curvatures, plus the prior as it is now.
    """
    d1 = prior_precision(weight_decay, after.prior, after.ess, after.precision, after.count)
    return after._replace(
        precision=jax.tree.map(lambda p, old, new: p + (new - old), after.precision, d0, d1)
    )


def _retracted(p: Array, u: Array) -> Array:
    """p (1 + u + u^2 / 2) for a relative step u, kept where products with float32 are finite.

    Written as a quotient, which XLA stores once and reads: a product it would form again in every
    kernel that needs it, from a copy of the old p (and a quotient of quotients it would rewrite).
    """
    u = jnp.clip(u, -LARGEST_RELATIVE_STEP, LARGEST_RELATIVE_STEP)
    shrink = 1.0 / (1.0 + u + 0.5 * u * u)
    return p / jnp.clip(shrink, p / LARGEST_PRECISION, p / SMALLEST_PRECISION)


# The first precision.


def _first_precision(
    params: Params, hess_init: Hyperparameter, d0: Any, damping: Hyperparameter
) -> Any:
    """h_0 + d0 + damping.

    Raises:
        ValueError: when it is not positive, under an improper prior.
    """
    h = _tree.fitting_leaves(hess_init, params, "hess_init")
    total = jax.tree.map(lambda _, h, d: h + d + damping, params, h, d0)
    precision = jax.tree.map(filled, params, total)
    # To look at the arrays, when all of one are one number, would compile a program for each.
    numbers = all(isinstance(x, (int, float)) for x in jax.tree.leaves(total))
    held = jax.tree.map(lambda p, x: p.dtype.type(x), precision, total) if numbers else precision
    if not holds(positive, held):
        raise ValueError(
            "hess_init + the prior's precision per example must be positive everywhere; "
            "with an improper prior raise hess_init, or pass init=."
        )
    return precision


def _precision_of(init: Distribution, params: Params, ess: Array) -> Any:
    """Return the precision per example of a first posterior.

    Raises:
        ValueError: when its mean is not the parameters, or its precision not positive.
    """
    q = prior_trees(init, params, "init")
    precision = jax.tree.map(lambda m, x: filled(m, -2.0 * x / ess), params, q.quadratic)
    if not holds(positive, precision):
        raise ValueError("init: its precision must be positive everywhere.")
    means = jax.tree.map(lambda lin, quad: -0.5 * lin / quad, *q)

    def agree(pair: Any) -> Array:
        return jnp.array(jax.tree.leaves(jax.tree.map(near, *pair)))

    if not holds(agree, (means, params)):
        raise ValueError("init: its mean must be the parameters; start from params = init.mean.")
    return precision


def scale_by_precision(
    *,
    ess: ScalarOrSchedule,
    b2: Scalar = 0.99999,
    hess_init: Hyperparameter = 1.0,
    weight_decay: Hyperparameter = 0.0,
    mask: PyTree | Callable[[Params], PyTree] = None,
    prior: Distribution | Callable[[PyTree], Distribution] | None = None,
    init: Distribution | None = None,
    momentum: optax.GradientTransformation | None = None,
    curvature: str | Curvature = "reparameterized",
    step: str = "improved",
    damping: Hyperparameter = 0.0,
    prior_in_momentum: bool = False,
    prior_in_mean: bool = True,
    denominator: Callable[[Array, PyTree, Array], Array] | None = None,
    adversary: float | None = None,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    generator: str | None = "hash",
    key: KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Precondition by the posterior precision that the rule learns: the heart of IVON.

    p <- p (1 + u + u^2 / 2),  u = (1 - b2) (c + d0 - p) / p;
    out = ( momentum(g) + d0 (m - m0) ) / p.

    It must get the raw gradient E_q[grad] at the sampled weights: nothing that changes gradients
    may stand in front of it (an average there makes the curvature too small by 1 - b1). Momentum is
    therefore an argument. A step whose gradient or curvature is not finite (or a gradient whose
    square is not) leaves mean and precision as they are, is counted in `skipped`, and the next draw
    differs.

    Args:
        ess: effective sample size, the number of examples the mean loss stands for; may be a
            schedule.
        b2: decay of the precision; rho = 1 - b2.
        hess_init: first curvature per example; p starts at hess_init + d0. A number or a prefix
            tree.
        weight_decay: precision per example of a zero-mean prior, d0 without `prior` (the prior's
            total precision is ess * weight_decay). A number, a prefix tree, a schedule, or an
            `EmpiricalPrior`, which follows the posterior.
        mask: which leaves decay, as in `optax.adamw`: a prefix tree of booleans or a function from
            params to one; None for all. A `prior` is not masked.
        prior: a mean-field Gaussian posterior, also an improper one, or a function of params that
            returns one; its precision and linear term join d0.
        init: the first posterior; its mean must be the parameters, its precision replaces
            hess_init.
        momentum: an optax transformation run on the gradient, such as `optax.ema(0.9,
            debias=True)`.
        curvature: "reparameterized" or `squared_gradient(...)`, used when `update` gets no
            `statistic=`.
        step: "improved" or "plain" (may leave the domain when the curvature is negative);
            "improved_old" and "plain_old" precondition the mean by the old precision.
        damping: added to the precision per example, in posterior and steps alike, without pulling
            the mean.
        prior_in_momentum: run the momentum on g + d0 (m - m0), as VOGN does, not on g alone.
        prior_in_mean: whether the prior pulls the mean; without, it acts on the precision alone.
        denominator: what divides the direction in place of the precision, a function of the new
            curvature, d0 and the step's number 1, 2, ...; Vadam has the root of the first.
        adversary: r, for bSAM: `estimate` takes the gradient at m + r g / p, with g at the sample.
        clip_spikes: the longest gradient that is taken as it is, in units of the root mean square
            length of the last hundred: one that is longer, of a bad batch, is shortened to that,
            its curvature accordingly, and counted in `spikes.shortened`. Ordinary training does
            not meet 30; the first 20 gradients are never shortened. None for no bound.
        generator: "hash" (fast) or "jax"; None for no noise, the delta method.
        key: typed key or integer seed.

    Returns:
        A transformation. `update(grads, state, params, statistic=None)`; `statistic` is a tree like
        the parameters, per example (`estimate` returns it). Without it, it is derived from the
        gradient and this step's noise, the gradient being taken at `sample(opt_state, params)`.

    Raises:
        ValueError: for arguments out of range, unknown names, trees of another structure, integer
            parameters, missing params.

    Source: Shen et al. (2024), Algorithm 1; Lin, Schmidt and Khan (2020). Special case of
    `blr_update` with family "gaussian_diagonal", `monte_carlo(1, curvature=reparameterized())` and
    `step="improved"`.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> tx = blr.scale_by_precision(ess=100.0, b2=0.5, hess_init=1.0)
      >>> params = jnp.zeros(1)
      >>> out, state = tx.update(jnp.ones(1), tx.init(params), params, statistic=jnp.array([3.0]))
      >>> print(state.precision, out)  # u = 1: p = 1 + 1 + 1/2
      [2.5] [0.4]
    """
    check_positive("ess", ess, scalar=True)
    check_positive("hess_init", hess_init, zero=True, schedule=False)
    weight_decay = masked(weight_decay, mask)
    check_unit_interval("b2", b2)
    check_positive("damping", damping, zero=True, schedule=False)
    check_bound(clip_spikes)
    for name, given in (("prior", prior), ("init", init)):
        if given is not None and not callable(given):
            check_distribution(name, given)
    if generator is not None:
        check_generator(generator)
    if step not in STEPS:
        raise ValueError(f"step={step!r} is unknown; known: {', '.join(STEPS)}.")
    if prior is None and init is None and is_zero(hess_init) and is_zero(weight_decay):
        raise ValueError(
            "hess_init=0 and weight_decay=0 leave no first precision; make one positive."
        )
    plain = step in ("plain", "plain_old")
    if isinstance(weight_decay, MaskedDecay) and isinstance(weight_decay.decay, EmpiricalPrior):
        raise ValueError("mask= goes with a weight_decay in numbers, not with EmpiricalPrior(...).")
    if isinstance(weight_decay, EmpiricalPrior) and plain:
        raise ValueError(f"weight_decay=EmpiricalPrior(...) needs an improved step, not {step!r}.")
    reader = PrecisionReader(from_gradient(curvature), generator, step, adversary)
    inner = optax.with_extra_args_support(optax.identity() if momentum is None else momentum)

    def init_fn(params: Params) -> ScaleByPrecisionState:
        _tree.check_float_leaves(params, "ivon, soba, scale_by_precision")
        check_decay(weight_decay, params)
        count = jnp.zeros((), jnp.int32)
        size = jnp.array(at(ess, count), jnp.result_type(float))
        prior_ = prior_trees(prior(params) if callable(prior) else prior, params)
        if init is None:
            d0 = prior_precision(weight_decay, prior_, size, params, count)
            precision = _first_precision(params, hess_init, d0, damping)
        else:
            precision = _precision_of(init, params, size)
        return ScaleByPrecisionState(
            count=count,
            key=canonical_key(key),
            reader=reader,
            precision=precision,
            ess=size,
            prior=prior_,
            momentum=inner.init(jax.tree.map(lambda m: filled(m, 0.0), params)),
            skipped=jnp.zeros((), jnp.int32),
            spikes=first_spikes(clip_spikes),
        )

    def update_fn(
        updates: Updates,
        state: ScaleByPrecisionState,
        params: Params = None,
        *,
        statistic: Any = None,
        **extra: Any,
    ) -> tuple[Any, ScaleByPrecisionState]:
        if params is None:
            raise ValueError(
                "scale_by_precision (in ivon, soba, vogn, ogn): update needs params, "
                "update(grads, state, params)."
            )
        finite, g, c, spikes = gated_evidence(state, params, updates, statistic, clip_spikes)
        d0 = prior_of_step(state, params, weight_decay)
        pull = prior_pull(state, params, d0) if prior_in_mean else optax.tree.zeros_like(g)
        if prior_in_momentum:
            g, pull = optax.tree.add(g, pull), optax.tree.zeros_like(g)
        v, average = inner.update(g, state.momentum, params, **extra)

        def move(p: Array, c: Array, d: Any, v: Array, pull: Array, m: Array) -> tuple:
            gate = finite.astype(p.dtype)
            rho = gate * jnp.asarray(1.0 - b2, p.dtype)
            damped = jnp.asarray(d + damping, p.dtype)
            new = precision_step(p, c, damped, rho, plain)
            by = divisor(p, new, step)
            if denominator is not None:
                by = denominator(new - damped, d, state.count + 1)
            return new, direction(v, pull, by, gate).astype(m.dtype)

        moved = jax.tree.map(move, state.precision, c, d0, v, pull, params)
        precision, out = (jax.tree.map(lambda _, x, i=i: x[i], g, moved) for i in range(2))
        count = optax.safe_increment(state.count)
        after = state._replace(
            count=count,
            precision=precision,
            momentum=average,
            ess=jnp.array(at(ess, count), state.ess.dtype),
            skipped=state.skipped + (~finite).astype(jnp.int32),
            spikes=spikes,
        )
        if plain and (is_schedule(ess) or moves(weight_decay)):
            after = _with_moved_prior(after, weight_decay, d0)
        return out, after

    return transformation(init_fn, update_fn)
