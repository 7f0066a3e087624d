"""A known number as a density: what a weight is that has no posterior, beside others."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax.numpy as jnp

from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.parameters import parameters

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool

    from blr_optax._typing import NaturalParameters, PyTree
    from blr_optax.families._base.domain import Domain


@parameters
class PointNatural(NamedTuple):
    """The number itself, known."""

    value: Array


@parameters
class PointExpectation(NamedTuple):
    """The number itself, known."""

    value: Array


@dataclasses.dataclass(frozen=True)
class Point(ExponentialFamily):
    """A known number: q(theta) = delta(theta - value), relative to itself.

    Nothing is learnt: the value is a field of lambda that never moves. Its log-density is taken as
    zero everywhere, so that a tree of weights of which some are points has the density, entropy
    and divergence of the others.

    lambda: value, known. mu: value, known.

    Example:
      >>> import blr_optax as blr
      >>> point = blr.families.Point()
      >>> lam = point.natural(value=3.0)
      >>> print(point.mean(lam), point.variance(lam), point.entropy(lam))
      3.0 0.0 0.0
    """

    Natural: ClassVar[type] = PointNatural
    Expectation: ClassVar[type] = PointExpectation
    domains: ClassVar[dict[str, Domain]] = {}
    known: ClassVar[tuple[str, ...]] = ("value",)
    location: ClassVar[bool] = True

    def natural(self, *, value: ArrayLike) -> PointNatural:
        """Return lambda, from the value."""
        return PointNatural(jnp.asarray(value))

    def natural_at(self, location: ArrayLike, like: PointNatural | None = None) -> PointNatural:
        return PointNatural(jnp.asarray(location))

    def standard(self, lam: PointNatural) -> dict[str, Array]:
        return {"value": lam.value}

    def sample(self, key: Array, lam: PointNatural, shape: tuple[int, ...] = ()) -> Array:
        return jnp.broadcast_to(lam.value, shape + jnp.shape(lam.value))

    def cdf(self, lam: PointNatural, theta: Array) -> Array:
        return (theta >= lam.value).astype(jnp.result_type(lam.value))

    def quantile(self, lam: PointNatural, p: Array) -> Array:
        return jnp.broadcast_to(lam.value, p.shape)

    def mean(self, lam: PointNatural) -> Array:
        return lam.value

    def variance(self, lam: PointNatural) -> Array:
        return jnp.zeros_like(lam.value)

    def in_domain(self, lam: PointNatural) -> Bool[Array, ...]:
        return jnp.isfinite(lam.value)

    def log_prob(self, lam: PointNatural, theta: Array) -> Array:
        return self._zero(theta)

    def log_base_measure(self, lam: PointNatural, theta: Array) -> Array:
        return self._zero(theta)

    def log_partition(self, lam: PointNatural) -> Array:
        return self._zero(lam.value)

    def entropy(self, lam: PointNatural) -> Array:
        return self._zero(lam.value)

    def kl(self, lam_p: PointNatural, lam_q: PointNatural) -> Array:
        return self._zero(lam_p.value)

    def inner(self, a: PyTree, b: PyTree) -> Array:
        return self._zero(a.value)

    def _zero(self, like: Array) -> Array:
        return jnp.zeros(jnp.shape(like))

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> PointExpectation:
        return PointExpectation(theta if lam is None else lam.value)

    def expectation(self, lam: PointNatural) -> PointExpectation:
        return PointExpectation(lam.value)

    def natural_from_expectation(self, mu: PointExpectation, with_status: bool = False) -> PyTree:
        lam = PointNatural(mu.value)
        return (lam, self.in_domain(lam)) if with_status else lam

    def fisher_product(self, lam: PointNatural, v: PyTree) -> PointExpectation:
        return PointExpectation(jnp.zeros_like(lam.value))

    def inverse_fisher_product(self, lam: PointNatural, v: PyTree) -> PointNatural:
        return PointNatural(jnp.zeros_like(lam.value))

    def coordinates(self, like: PyTree) -> tuple[PyTree, PyTree]:
        """No coordinates: nothing is learnt."""
        return lambda x: jnp.zeros(0), lambda flat: PointNatural(like.value)
