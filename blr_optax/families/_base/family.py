"""The root of all families: a set of densities q_lambda(theta), with its parameters lambda.

A family is a frozen dataclass without arrays, a static node of any pytree. What a posterior is
asked for is here: draws, densities, moments. How it is learnt is in the two bases on top of this
one, `exponential` and `conditional`; a family of this base alone is only read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp

from blr_optax._validate import unwritten
from blr_optax.families._numerics.quantiles import quantile

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float

    from blr_optax._typing import ExpectationParameters, NaturalParameters, PyTree


REACH = 0.45  # of the largest number's exponent: sums of squares stay finite


def derived(value: Callable[[Any], Any]) -> Any:
    """Make a function of a family one of its class attributes, which differs between members."""
    return property(value)


def each_finite(tree: PyTree, like: Array) -> Bool[Array, ...]:
    """Whether all of a tree is finite, per batch element; the leading axes are those of `like`."""
    held = jnp.ones_like(like, bool)
    for x in jax.tree.leaves(tree):
        held &= jnp.all(jnp.isfinite(x), axis=tuple(range(like.ndim, jnp.ndim(x))))
    return held


def ordinary(tree: PyTree, like: Array) -> Bool[Array, ...]:
    """Whether the squares of all of a tree are finite with room to spare, per batch element."""

    def largest(x: Array) -> Array:
        return jnp.max(jnp.abs(x), axis=tuple(range(like.ndim, jnp.ndim(x))), initial=0.0)

    size = functools.reduce(jnp.maximum, map(largest, jax.tree.leaves(tree)))
    return size < float(jnp.finfo(size.dtype).max) ** REACH


@dataclasses.dataclass(frozen=True)
class Family:
    """Base of all families.

    A subclass defines the class attribute `Natural` and the methods that raise
    `NotImplementedError` here; `entropy` and `kl` where they are known, and `join` where members
    over disjoint leaves of one tree can be one. All take and return arrays with any leading batch
    dimensions, or trees.

    Attributes:
        Natural: NamedTuple type of the parameters.
        event_ndim: number of trailing axes of theta that are one event.
        elementwise: whether lambda, mu and theta are arrays of one shape, as `MeanField` needs.
        location: whether `natural_at` can centre a member at a point.
        exponential: whether lambda has arithmetic and a map to mu, see `exponential`.
        conditional: whether it is learnt block by block, see `conditional`.
        when_lost: how to go on where lambda cannot hold standard parameters, in words for errors.
        support_of_marginals: "real", "positive" or "unit" (0 to 1), of families with a `cdf`.
    """

    Natural: ClassVar[type]
    event_ndim: ClassVar[int] = 0
    elementwise: ClassVar[bool] = False
    location: ClassVar[bool] = False
    exponential: ClassVar[bool] = False
    conditional: ClassVar[bool] = False
    when_lost: ClassVar[str] = ""
    support_of_marginals: ClassVar[str] = "real"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make the family a static node of any pytree."""
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_static(cls)

    def __new__(cls, *given: Any, **named: Any) -> Self:
        """Refuse the parameters of a member, where the family has no choices of its own."""
        made = getattr(cls, "__dataclass_params__", None)
        if (given or named) and made and made.init and not dataclasses.fields(cls):
            raise ValueError(
                f"{cls.__name__}() is the family, and takes no parameters; a member is "
                "blr.distribution(name, ...), or blr.Distribution(family, family.natural(...)), "
                "with standard parameters by keyword, such as mean= and precision=."
            )
        return super().__new__(cls)

    def check_learnable(self, who: str) -> None:
        """Raise ValueError for a family that the rule does not learn."""
        if not (self.exponential or self.conditional):
            raise ValueError(
                f"{who}: {type(self).__name__} is a posterior to read; what learns it is its own "
                "optimizer. Learn a family of `families.names()` in its place, started at "
                "q.mean and q.variance."
            )

    def natural(self, *parts: PyTree, **standard: PyTree) -> NaturalParameters:
        """Return lambda, from standard parameters (keywords)."""
        raise unwritten(self, "natural(self, *parts, **standard)")

    def standard(self, lam: NaturalParameters) -> dict[str, PyTree]:
        """Return the standard parameters of lambda; `natural(**standard(lam))` is lambda."""
        raise unwritten(self, "standard(self, lam)")

    def sample(self, key: Array, lam: NaturalParameters, shape: tuple[int, ...] = ()) -> PyTree:
        """Draw theta, with leading `shape`."""
        raise unwritten(self, "sample(self, key, lam, shape=())")

    def log_prob(self, lam: NaturalParameters, theta: PyTree) -> Float[Array, ...]:
        """Evaluate log q(theta)."""
        raise unwritten(self, "log_prob(self, lam, theta)")

    def mean(self, lam: NaturalParameters) -> PyTree:
        """Return E_q[theta]."""
        raise unwritten(self, "mean(self, lam)")

    def variance(self, lam: NaturalParameters) -> PyTree:
        """Return the marginal variance of every coordinate of theta."""
        raise unwritten(self, "variance(self, lam)")

    def in_domain(self, lam: NaturalParameters) -> Bool[Array, ...]:
        """Tell whether lambda is a proper member, per batch element."""
        raise unwritten(self, "in_domain(self, lam)")

    def has_mean(self, lam: NaturalParameters) -> Bool[Array, ...]:
        """Tell whether E_q[theta] is finite on paper, per batch element: nearly always."""
        return jnp.ones_like(self.in_domain(lam))

    def usable(self, lam: NaturalParameters) -> Bool[Array, ...]:
        """Tell whether a step may end at lambda, per batch element.

        It is a proper member, and its mean, where it has one, is a finite number.
        """
        inside = self.in_domain(lam)
        return inside & (each_finite(self.mean(lam), inside) | ~self.has_mean(lam))

    def keep(
        self, lam: NaturalParameters, new: NaturalParameters, step: PyTree
    ) -> tuple[NaturalParameters, PyTree, Array]:
        """Return the new lambda where a step could be made, else the old one: member by member.

        Args:
            lam: the old parameters.
            new: where the step led.
            step: the step or its natural gradient; a member in which it is not finite stays.

        Returns:
            lambda, its mean, and how many members stayed where they were (int32).
        """
        means = self.mean(new), self.mean(lam)
        good = self.usable(new)
        good &= each_finite(step, good)
        # No step is believed that leads from ordinary numbers to such as have no finite square.
        finite = [jax.tree.map(lambda m: jnp.where(jnp.isinf(m), 0.0, m), mean) for mean in means]
        good &= ordinary((new, finite[0]), good) | ~ordinary((lam, finite[1]), good)

        def choose(x: Array, old: Array) -> Array:
            return jnp.where(jnp.expand_dims(good, tuple(range(good.ndim, x.ndim))), x, old)

        mean = jax.tree.map(choose, *means)
        return jax.tree.map(choose, new, lam), mean, jnp.sum(~good, dtype=jnp.int32)

    def rounding(self, lam: NaturalParameters) -> Float[Array, ""]:
        """Tell how far the rounding of lambda moves q, at most: the digits that it has lost.

        |m' - m| / s  and  |v' - v| / v,  of mean, deviation and variance v = s^2 of theta, where
        lambda' is half a spacing of its numbers away. Infinite where there is no member.
        """
        ends = [
            jax.tree.map(lambda x, end=end: jnp.nextafter(x, jnp.full_like(x, end)), lam)
            for end in (jnp.inf, -jnp.inf)
        ]
        variance = self.variance(lam)

        def moved(up: Array, down: Array, unit: Array) -> Array:
            off = 0.25 * jnp.abs(up - down)
            return jnp.max(jnp.where((off > 0) & (unit > 0), off / unit, 0.0), initial=0.0)

        deviation = jax.tree.map(jnp.sqrt, variance)
        found = jax.tree.leaves((
            jax.tree.map(moved, *map(self.mean, ends), deviation),
            jax.tree.map(moved, *map(self.variance, ends), variance),
        ))  # fmt: skip
        inside = jnp.array([jnp.all(self.in_domain(end)) for end in ends])
        return jnp.where(jnp.all(inside), functools.reduce(jnp.maximum, found), jnp.inf)

    def cdf(self, lam: NaturalParameters, theta: PyTree) -> PyTree:
        """Return P(theta_i <= theta) for every coordinate i alone, where that is known."""
        raise ValueError(
            f"{type(self).__name__} has no distribution function of its marginals in closed form: "
            "count samples, jnp.mean(q.sample(key, (4096,)) <= theta, axis=0)."
        )

    def icdf(self, lam: NaturalParameters, p: ArrayLike) -> PyTree:
        """Return every coordinate's quantile at p, whose axes lead, where `cdf` is known."""
        like = jax.eval_shape(self.mean, lam)
        p = jnp.asarray(p, like.dtype)
        p = p.reshape(*p.shape, *[1] * like.ndim)
        return self.quantile(
            lam, jnp.broadcast_to(p, (*p.shape[: p.ndim - like.ndim], *like.shape))
        )

    def quantile(self, lam: NaturalParameters, p: Array) -> Array:
        """Return the quantiles at p, one for every coordinate; p has their shape.

        This is a search; families with a formula override it.
        """
        if type(self).cdf is Family.cdf:
            raise ValueError(
                f"{type(self).__name__} has no quantiles of its marginals in closed form: take "
                "those of samples, jnp.quantile(q.sample(key, (4096,)), p, axis=0)."
            )
        return quantile(lambda x: self.cdf(lam, x), p, self.support_of_marginals)

    def part(
        self, lam: NaturalParameters, path: tuple[str | int, ...]
    ) -> tuple[Family, NaturalParameters]:
        """Return the marginal over the subtree at a path of theta, where a family holds it."""
        raise ValueError(
            f"{type(self).__name__} has no parts by path: theta is no tree, or the marginal of a "
            "part is not of a known family. Take that part of q.sample(key, shape)."
        )

    def natural_at(self, location: PyTree, like: PyTree = None) -> NaturalParameters:
        """Return a lambda centred at `location`, with the scale of `like` (else one)."""
        raise ValueError(f"{type(self).__name__} has no location: pass init=.")

    def entropy(self, lam: NaturalParameters) -> Float[Array, ...]:
        """Return H(q) in nats, where it is known."""
        raise ValueError(
            f"{type(self).__name__} has no entropy in closed form: average -log_prob over samples."
        )

    def kl(self, lam_p: NaturalParameters, lam_q: NaturalParameters) -> Float[Array, ...]:
        """Return KL(p || q) in nats, where it is known."""
        raise ValueError(
            f"{type(self).__name__} has no KL divergence in closed form: average the difference of "
            "log_prob over samples of p."
        )

    def join(
        self, lam: NaturalParameters, other: Family, other_lam: NaturalParameters
    ) -> tuple[Family, PyTree] | None:
        """Return one member over the leaves of two, or None where no family holds both.

        Args:
            lam: parameters over some leaves of a tree, `MaskedNode` elsewhere.
            other: the family of the second member.
            other_lam: its parameters, over other leaves of the same tree.
        """
        return None

    def combine(self, *terms: tuple[PyTree, PyTree]) -> NaturalParameters:
        """Refuse: only exponential families have arithmetic."""
        raise ValueError(
            f"{type(self).__name__} is no exponential family: a product of two of its densities "
            "is not one of them, so natural parameters have no arithmetic."
        )

    def check_sizes(self, *lams: NaturalParameters) -> None:
        """Raise ValueError where members have different sizes, as a sum of lambdas does."""

    def expectation(self, lam: NaturalParameters) -> ExpectationParameters:
        """Refuse: only exponential families have expectation parameters."""
        raise ValueError(
            f"{type(self).__name__} is no exponential family: it has no expectation parameters. "
            "Moments are mean(lam) and variance(lam)."
        )
