"""A vector family over the flat vector of a tree of weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax.families._base.family import Family, derived

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import ExpectationParameters, NaturalParameters, PyTree, TreeDef


@dataclasses.dataclass(frozen=True)
class Raveled(Family):
    """A vector family over the flat vector of a pytree: theta, mean and samples are trees.

    lambda and mu are those of the wrapped family, leaves in the order of the tree; what concerns
    them alone is asked of that family. It may be exponential or conditional.

    Attributes:
        family: a family whose event is one vector, such as `gaussian` or `mixture`.
        treedef: the structure of theta.
        shapes: the shapes of its leaves, in order.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> theta = {"w": jnp.ones(2), "b": 0.0}
      >>> raveled = blr.families.Raveled.like(blr.families.get("gaussian"), theta)
      >>> lam = raveled.natural_at(theta)
      >>> print(lam.linear, raveled.mean(lam)["w"])
      [0. 1. 1.] [1. 1.]
    """

    family: Family
    treedef: TreeDef
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def like(cls, family: Family, theta: PyTree) -> Raveled:
        """Return the family over trees shaped like theta.

        Raises:
            ValueError: for a family whose event is no vector.
        """
        if family.event_ndim != 1:
            raise ValueError(
                f"Raveled: an event of {type(family).__name__} has {family.event_ndim} axes, so it "
                "is not the flat vector of a tree; Leafwise gives every leaf a matrix of its own, "
                "MeanField every number."
            )
        leaves, treedef = jax.tree.flatten(theta)
        return cls(family, treedef, tuple(jnp.shape(leaf) for leaf in leaves))

    def __getattr__(self, name: str) -> Any:
        """Ask the wrapped family, for what concerns lambda and mu alone."""
        if name.startswith("_") or name == "family":
            raise AttributeError(name)
        return getattr(self.family, name)

    Natural = derived(lambda self: self.family.Natural)
    location = derived(lambda self: self.family.location)
    exponential = derived(lambda self: self.family.exponential)
    conditional = derived(lambda self: self.family.conditional)
    event_ndim = 0  # an event is a tree

    def ravel(self, theta: PyTree) -> Array:
        """Return the flat vector of theta; leading sample axes stay."""
        flat = []
        for leaf, shape in zip(self.treedef.flatten_up_to(theta), self.shapes, strict=True):
            leaf = jnp.asarray(leaf)
            flat.append(leaf.reshape(*leaf.shape[: leaf.ndim - len(shape)], -1))
        return jnp.concatenate(flat, axis=-1)

    def unravel(self, flat: Array) -> PyTree:
        """Return the tree of a flat vector; leading sample axes stay."""
        leaves, start = [], 0
        for shape in self.shapes:
            end = start + math.prod(shape)
            leaves.append(flat[..., start:end].reshape(*flat.shape[:-1], *shape))
            start = end
        return self.treedef.unflatten(leaves)

    def natural(self, **standard: PyTree) -> NaturalParameters:
        """Return lambda, from the family's standard parameters; a mean may be a tree."""
        mean = standard.get("mean")
        is_tree = mean is not None and jax.tree.structure(mean) == self.treedef
        if is_tree and self.exponential:  # a mixture has a mean for every component
            standard = {**standard, "mean": self.ravel(mean)}
        return self.family.natural(**standard)

    def standard(self, lam: NaturalParameters) -> dict[str, PyTree]:
        return self.family.standard(lam)

    def natural_at(self, location: PyTree, like: PyTree = None) -> NaturalParameters:
        return self.family.natural_at(self.ravel(location), like)

    def sample(self, key: Array, lam: NaturalParameters, shape: tuple[int, ...] = ()) -> PyTree:
        return self.unravel(self.family.sample(key, lam, shape))

    def log_prob(self, lam: NaturalParameters, theta: PyTree) -> Array:
        return self.family.log_prob(lam, self.ravel(theta))

    def mean(self, lam: NaturalParameters) -> PyTree:
        return self.unravel(self.family.mean(lam))

    def variance(self, lam: NaturalParameters) -> PyTree:
        return self.unravel(self.family.variance(lam))

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
        return natural, self.unravel(mean), count

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
        return self.family.sufficient_statistics(self.ravel(theta), lam)

    def log_base_measure(self, lam: NaturalParameters, theta: PyTree) -> Array:
        return self.family.log_base_measure(lam, self.ravel(theta))

    def centred(self, lam: NaturalParameters) -> tuple[NaturalParameters, Callable, Callable]:
        family: Any = self.family  # an exponential one
        natural, away, back = family.centred(lam)
        return natural, lambda theta: self.unravel(away(self.ravel(theta))), back

    def displace(self, lam: NaturalParameters, z: PyTree) -> PyTree:
        return self.unravel(self.family.displace(lam, self.ravel(z)))

    def gradient(self, lam: NaturalParameters, g: PyTree, h: PyTree) -> NaturalParameters:
        return self.family.gradient(lam, self.ravel(g), h)

    # Of conditional families.

    def _flat(self, loss: Callable) -> Callable:
        return lambda theta: loss(self.unravel(theta))

    def natural_gradient_at(
        self,
        lam: NaturalParameters,
        loss: Callable,
        noise: PyTree,
        weights: Array,
        curvature: str = "exact",
    ) -> tuple[Array, PyTree]:
        return self.family.natural_gradient_at(lam, self._flat(loss), noise, weights, curvature)

    def natural_gradient_from(
        self, lam: NaturalParameters, loss: Callable, theta: PyTree, curvature: str = "exact"
    ) -> tuple[Array, PyTree]:
        """As a mixture's, from draws that are trees."""
        return self.family.natural_gradient_from(
            lam, self._flat(loss), self.ravel(theta), curvature
        )
