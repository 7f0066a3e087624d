"""A family of which theta is seen in another form: as a tree, or from another origin.

The map x = inward(theta) has unit volume, so that lambda, mu, densities and entropies are those of
the wrapped family; only what takes or returns a theta passes through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blr_optax._validate import unwritten
from blr_optax.families._base.family import Family, derived

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array

    from blr_optax._typing import ExpectationParameters, NaturalParameters, PyTree


class Viewed(Family):
    """Base of such lifts; a subclass has a field `family`, and says `inward` and `outward`."""

    family: Family

    def __getattr__(self, name: str) -> Any:
        """Ask the wrapped family, for what concerns lambda and mu alone."""
        if name.startswith("_") or name == "family":
            raise AttributeError(name)
        return getattr(self.family, name)

    Natural = derived(lambda self: self.family.Natural)
    location = derived(lambda self: self.family.location)
    exponential = derived(lambda self: self.family.exponential)
    conditional = derived(lambda self: self.family.conditional)

    def inward(self, theta: PyTree) -> PyTree:
        """Return the wrapped family's theta."""
        raise unwritten(self, "inward(self, theta)")

    def outward(self, x: PyTree) -> PyTree:
        """Return theta, from the wrapped family's."""
        raise unwritten(self, "outward(self, x)")

    def standard(self, lam: NaturalParameters) -> dict[str, PyTree]:
        return self.family.standard(lam)

    def natural_at(self, location: PyTree, like: PyTree = None) -> NaturalParameters:
        return self.family.natural_at(self.inward(location), like)

    def sample(self, key: Array, lam: NaturalParameters, shape: tuple[int, ...] = ()) -> PyTree:
        return self.outward(self.family.sample(key, lam, shape))

    def log_prob(self, lam: NaturalParameters, theta: PyTree) -> Array:
        return self.family.log_prob(lam, self.inward(theta))

    def mean(self, lam: NaturalParameters) -> PyTree:
        return self.outward(self.family.mean(lam))

    def in_domain(self, lam: NaturalParameters) -> Array:
        return self.family.in_domain(lam)

    def has_mean(self, lam: NaturalParameters) -> Array:
        return self.family.has_mean(lam)

    def usable(self, lam: NaturalParameters) -> Array:
        return self.family.usable(lam)

    def keep(
        self, lam: NaturalParameters, new: NaturalParameters, step: PyTree
    ) -> tuple[NaturalParameters, PyTree, Array]:
        natural, mean, count = self.family.keep(lam, new, step)
        return natural, self.outward(mean), count

    def rounding(self, lam: NaturalParameters) -> Array:
        return self.family.rounding(lam)

    def entropy(self, lam: NaturalParameters) -> Array:
        return self.family.entropy(lam)

    def kl(self, lam_p: NaturalParameters, lam_q: NaturalParameters) -> Array:
        return self.family.kl(lam_p, lam_q)

    def combine(self, *terms: tuple[PyTree, PyTree]) -> NaturalParameters:
        return self.family.combine(*terms)

    def check_sizes(self, *lams: NaturalParameters) -> None:
        self.family.check_sizes(*lams)

    def expectation(self, lam: NaturalParameters) -> ExpectationParameters:
        return self.family.expectation(lam)

    # Of exponential families.

    def sufficient_statistics(
        self, theta: PyTree, lam: NaturalParameters = None
    ) -> ExpectationParameters:
        inner: Any = self.family
        return inner.sufficient_statistics(self.inward(theta), lam)

    def log_base_measure(self, lam: NaturalParameters, theta: PyTree) -> Array:
        inner: Any = self.family
        return inner.log_base_measure(lam, self.inward(theta))

    def centred(self, lam: NaturalParameters) -> tuple[NaturalParameters, Callable, Callable]:
        inner: Any = self.family
        natural, away, back = inner.centred(lam)
        return natural, lambda theta: self.outward(away(self.inward(theta))), back
