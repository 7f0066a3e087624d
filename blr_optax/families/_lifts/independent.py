"""Independent members, each with its own part of theta: what all such lifts have in common.

    q(theta) = prod_k q_k(theta_k)

lambda, mu and theta are split into the members' own, every member is asked, and the answers are
joined: densities, entropies and divergences are sums, moments and draws are put together as theta
is, parameters as lambda is. A lift says how its lambda, mu and theta are split and joined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from blr_optax._validate import unwritten

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float

    from blr_optax._typing import ExpectationParameters, NaturalParameters, PyTree
    from blr_optax.families._base.family import Family


class Independent:
    """Base of the lifts: a lift is a family too, of the base that suits its members.

    `x` below is any of lambda, mu and theta (and `like` whichever is at hand), told apart by their
    types.
    """

    Natural: ClassVar[type]
    Expectation: ClassVar[type]

    # How a lift splits and joins.

    def members(self, like: PyTree) -> Sequence[Family]:
        """Return the family of every member."""
        raise unwritten(self, "members(self, like)")

    def split(self, x: PyTree, like: PyTree) -> Sequence[PyTree]:
        """Return every member's own part of x."""
        raise unwritten(self, "split(self, x, like)")

    def joined(self, kind: type | None, parts: Sequence[PyTree], like: PyTree) -> PyTree:
        """Return what the parts make: of type `kind` (lambda or mu), or like theta for None."""
        raise unwritten(self, "joined(self, kind, parts, like)")

    def keys(self, key: Array, like: PyTree) -> Array | Sequence[Array]:
        """Return a key for every member."""
        return jax.random.split(key, len(self.members(like)))

    def batch_ndim(self, member: Family, lam: NaturalParameters) -> int:
        """Return how many trailing axes of a member's log-density are a batch, to be summed."""
        return 0

    # What follows.

    def _like(self, *trees: Any) -> Any:
        """Return the tree that tells the structure: a lambda where there is one."""
        return next((x for x in trees if isinstance(x, self.Natural)), trees[0])

    def _each(self, method: str, *trees: Any, **fixed: Any) -> list[Any]:
        """Ask every member, with its own part of every tree."""
        like = self._like(*trees)
        rows = zip(self.members(like), *(self.split(x, like) for x in trees), strict=True)
        return [getattr(member, method)(*row, **fixed) for member, *row in rows]

    def _natural(self, method: str, *trees: Any, **fixed: Any) -> Any:
        return self.joined(self.Natural, self._each(method, *trees, **fixed), self._like(*trees))

    def _expectation(self, method: str, *trees: Any) -> Any:
        return self.joined(self.Expectation, self._each(method, *trees), self._like(*trees))

    def _theta(self, method: str, *trees: Any, **fixed: Any) -> Any:
        return self.joined(None, self._each(method, *trees, **fixed), self._like(*trees))

    def _sum(self, method: str, lam: NaturalParameters, *trees: Any) -> Float[Array, ...]:
        """Sum over members and their batches; leading sample axes stay."""
        values = self._each(method, lam, *trees)
        pairs = zip(self.members(lam), self.split(lam, lam), strict=True)
        batches = [tuple(range(-self.batch_ndim(*pair), 0)) for pair in pairs]
        rows = zip(values, batches, strict=True)
        return sum((jnp.sum(x, axis=axes) for x, axes in rows), start=jnp.zeros(()))

    def mean(self, lam: NaturalParameters) -> PyTree:
        return self._theta("mean", lam)

    def variance(self, lam: NaturalParameters) -> PyTree:
        return self._theta("variance", lam)

    def sample(self, key: Array, lam: NaturalParameters, shape: tuple[int, ...] = ()) -> PyTree:
        """Draw every member's part, each with its own key."""
        rows = zip(self.members(lam), self.keys(key, lam), self.split(lam, lam), strict=True)
        return self.joined(None, [member.sample(k, own, shape) for member, k, own in rows], lam)

    def log_prob(self, lam: NaturalParameters, theta: PyTree) -> Float[Array, ...]:
        return self._sum("log_prob", lam, theta)

    def cdf(self, lam: NaturalParameters, theta: PyTree) -> PyTree:
        return self._theta("cdf", lam, theta)

    def icdf(self, lam: NaturalParameters, p: ArrayLike) -> PyTree:
        return self._theta("icdf", lam, p=p)

    def entropy(self, lam: NaturalParameters) -> Float[Array, ...]:
        return self._sum("entropy", lam)

    def kl(self, lam_p: NaturalParameters, lam_q: NaturalParameters) -> Float[Array, ...]:
        return self._sum("kl", lam_p, lam_q)

    def in_domain(self, lam: NaturalParameters) -> Bool[Array, ""]:
        return jnp.all(jnp.array([jnp.all(inside) for inside in self._each("in_domain", lam)]))

    def has_mean(self, lam: NaturalParameters) -> Bool[Array, ""]:
        return jnp.all(jnp.array([jnp.all(has) for has in self._each("has_mean", lam)]))

    def usable(self, lam: NaturalParameters) -> Bool[Array, ""]:
        return jnp.all(jnp.array([jnp.all(good) for good in self._each("usable", lam)]))

    def rounding(self, lam: NaturalParameters) -> Float[Array, ""]:
        return functools.reduce(jnp.maximum, self._each("rounding", lam), jnp.zeros(()))

    def keep(
        self, lam: NaturalParameters, new: NaturalParameters, step: PyTree
    ) -> tuple[NaturalParameters, PyTree, Array]:
        """Return what every member keeps: one that stays does not hold the others."""
        kept = self._each("keep", lam, new, step)
        natural = self.joined(self.Natural, [own for own, _, _ in kept], lam)
        mean = self.joined(None, [own for _, own, _ in kept], lam)
        return natural, mean, sum((count for *_, count in kept), start=jnp.zeros((), jnp.int32))

    def natural_at(self, location: PyTree, like: PyTree = None) -> NaturalParameters:
        return self._natural("natural_at", *((location,) if like is None else (location, like)))

    # Of exponential members.

    def combine(self, *terms: tuple[PyTree, PyTree]) -> NaturalParameters:
        like = terms[0][1]
        columns = [[(a, part) for part in self.split(lam, like)] for a, lam in terms]
        rows = zip(self.members(like), *columns, strict=True)
        return self.joined(self.Natural, [member.combine(*row) for member, *row in rows], like)

    def check_sizes(self, *lams: NaturalParameters) -> None:
        self._each("check_sizes", *lams)

    def inner(self, a: Any, b: PyTree) -> Float[Array, ...]:
        return self._sum("inner", a, b)

    def log_partition(self, lam: NaturalParameters) -> Float[Array, ...]:
        """Return A = sum_k A_k."""
        return self._sum("log_partition", lam)

    def log_base_measure(self, lam: NaturalParameters, theta: PyTree) -> Float[Array, ...]:
        return self._sum("log_base_measure", lam, theta)

    def expected_log_base_measure(self, lam: NaturalParameters) -> Float[Array, ...]:
        return self._sum("expected_log_base_measure", lam)

    def base_measure_gradient(self, lam: NaturalParameters) -> NaturalParameters:
        return self._natural("base_measure_gradient", lam)

    def sufficient_statistics(
        self, theta: PyTree, lam: NaturalParameters = None
    ) -> ExpectationParameters:
        given = (theta,) if lam is None else (theta, lam)
        return self._expectation("sufficient_statistics", *given)

    def expectation(self, lam: NaturalParameters) -> ExpectationParameters:
        return self._expectation("expectation", lam)

    def natural_from_expectation(
        self, mu: ExpectationParameters, with_status: bool = False
    ) -> PyTree:
        lam = self._natural("natural_from_expectation", mu)
        return (lam, self.in_domain(lam)) if with_status else lam

    def gradient_in_mu(self, gradient: PyTree) -> NaturalParameters:
        return self._natural("gradient_in_mu", gradient)

    def gradient_in_lambda(self, lam: NaturalParameters, gradient: PyTree) -> NaturalParameters:
        return self._natural("gradient_in_lambda", lam, gradient)

    def centred(self, lam: NaturalParameters) -> tuple[NaturalParameters, Callable, Callable]:
        natural, away, back = zip(*self._each("centred", lam), strict=True)

        def moved(theta: PyTree) -> PyTree:
            pairs = zip(away, self.split(theta, lam), strict=True)
            return self.joined(None, [move(own) for move, own in pairs], lam)

        def returned(n: PyTree) -> NaturalParameters:
            pairs = zip(back, self.split(n, lam), strict=True)
            return self.joined(self.Natural, [move(own) for move, own in pairs], lam)

        return self.joined(self.Natural, natural, lam), moved, returned

    def fisher_product(self, lam: NaturalParameters, v: PyTree) -> ExpectationParameters:
        return self._expectation("fisher_product", lam, v)

    def inverse_fisher_product(self, lam: NaturalParameters, v: PyTree) -> NaturalParameters:
        return self._natural("inverse_fisher_product", lam, v)

    def fisher(self, lam: NaturalParameters) -> Float[Array, "p p"]:
        """Blocks on the diagonal, member by member."""
        blocks = self._each("fisher", lam)
        if any(block.ndim > 2 for block in blocks):
            raise ValueError(
                f"{type(self).__name__}.fisher: members must not be batched; use fisher_product."
            )
        return jax.scipy.linalg.block_diag(*blocks)

    def coordinates(self, like: PyTree) -> tuple[PyTree, PyTree]:
        """Minimal coordinates, member after member: (fields -> flat vector, and back)."""
        parts = self.split(like, like)
        maps = [m.coordinates(own) for m, own in zip(self.members(like), parts, strict=True)]
        sizes = [to_flat(own).size for (to_flat, _), own in zip(maps, parts, strict=True)]
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]

        def to_flat(x: Any) -> Array:
            own = zip(maps, self.split(x, like), strict=True)
            return jnp.concatenate([to_flat(part) for (to_flat, _), part in own])

        def to_fields(flat: Array) -> Any:
            pieces = zip(maps, ends, sizes, strict=True)
            parts = [back(flat[end - size : end]) for (_, back), end, size in pieces]
            return self.joined(self.Natural, parts, like)

        return to_flat, to_fields

    def retract(self, lam: NaturalParameters, step: PyTree, **form: str) -> NaturalParameters:
        return self._natural("retract", lam, step, **form)

    def safe_step(self, lam: NaturalParameters, step: PyTree) -> tuple[PyTree, Array]:
        steps = self._each("safe_step", lam, step)
        new = self.joined(self.Natural, [new for new, _ in steps], lam)
        return new, sum((count for _, count in steps), start=jnp.zeros((), jnp.int32))

    def support(self, lam: NaturalParameters, total: int | None = None) -> PyTree:
        return self._theta("support", lam, total=total)

    def probabilities(self, mu: ExpectationParameters, total: int | None = None) -> PyTree:
        return self._theta("probabilities", mu, total=total)

    def relaxed_sample(
        self, key: Array, lam: NaturalParameters, temperature: float, shape: tuple[int, ...] = ()
    ) -> PyTree:
        rows = zip(self.members(lam), self.keys(key, lam), self.split(lam, lam), strict=True)
        drawn = [member.relaxed_sample(k, own, temperature, shape) for member, k, own in rows]
        return self.joined(None, drawn, lam)
