"""A vector family over the flat vector of a tree of weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax.families._lifts.viewed import Viewed

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike

    from blr_optax._typing import NaturalParameters, PyTree, TreeDef
    from blr_optax.families._base.family import Family

# Standard parameters, by how a part of the coordinates has its own.
PER_COORDINATE, MATRICES, WHOLE = (
    ("mean", "variance"),
    ("covariance", "scale"),
    ("weights", "degrees"),
)


@dataclasses.dataclass(frozen=True)
class Raveled(Viewed):
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

    def inward(self, theta: PyTree) -> PyTree:
        return self.ravel(theta)

    def outward(self, x: PyTree) -> PyTree:
        return self.unravel(x)

    def variance(self, lam: NaturalParameters) -> PyTree:
        return self.unravel(self.family.variance(lam))

    def cdf(self, lam: NaturalParameters, theta: PyTree) -> PyTree:
        return self.unravel(self.family.cdf(lam, self.ravel(theta)))

    def icdf(self, lam: NaturalParameters, p: ArrayLike) -> PyTree:
        return self.unravel(self.family.icdf(lam, p))

    def part(
        self, lam: NaturalParameters, path: tuple[str | int, ...]
    ) -> tuple[Family, NaturalParameters]:
        """Return the marginal over the leaves below the path, of Gaussians and what is of them."""
        standard = self.standard(lam)
        if not set(standard) <= {*PER_COORDINATE, *MATRICES, *WHOLE}:
            return super().part(lam, path)
        size = sum(map(math.prod, self.shapes))
        kept = _tree.subtree(self.unravel(jnp.arange(size)), path, "part")
        i = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(kept)])

        def own(name: str, x: Array) -> Array:
            if name in WHOLE:
                return x
            return x[..., i] if name in PER_COORDINATE else x[..., i[:, None], i]

        family = Raveled.like(self.family, kept)
        return family, self.family.natural(**{name: own(name, x) for name, x in standard.items()})

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
