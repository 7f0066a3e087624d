"""Independent members of a matrix family, one per leaf of a tree of weights.

A leaf is a matrix whose columns are its last axis and whose rows are all its others; a vector is a
column, a number is 1 x 1. So `matrix_gaussian` over a vector is a full Gaussian.

    q(theta) = prod_l q_l(theta_l)          gradient_l = that of theta_l -> loss, at a draw of all
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax.families._base.conditional import ConditionalFamily
from blr_optax.families._base.family import derived
from blr_optax.families._base.parameters import parameters
from blr_optax.families._lifts.independent import Independent

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import PyTree, Scalar, TreeDef


@parameters
class LeafwiseNatural(NamedTuple):
    """Natural parameters of every leaf's member, in the order of the tree."""

    members: tuple


@dataclasses.dataclass(frozen=True)
class Leafwise(Independent, ConditionalFamily):
    """A matrix family over every leaf of a tree: theta, mean and samples are trees.

    lambda: that of the wrapped family, once per leaf.

    Attributes:
        family: a conditional family whose event is one matrix, such as `matrix_gaussian`.
        treedef: the structure of theta.
        shapes: the shapes of its leaves, in order.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> theta = {"b": jnp.ones(2), "w": jnp.zeros((3, 2))}
      >>> family = blr.families.Leafwise.like(blr.families.get("matrix_gaussian"), theta)
      >>> lam = family.natural_at(theta)
      >>> print([member.row_precision.shape for member in lam.members], family.variance(lam)["b"])
      [(2, 2), (3, 3)] [1. 1.]
    """

    family: ConditionalFamily
    treedef: TreeDef
    shapes: tuple[tuple[int, ...], ...]

    Natural: ClassVar[type] = LeafwiseNatural

    @classmethod
    def like(cls, family: ConditionalFamily, theta: PyTree) -> Leafwise:
        """Return the family over trees shaped like theta.

        Raises:
            ValueError: for a family whose event is no matrix.
        """
        if family.event_ndim != 2:
            raise ValueError(
                f"Leafwise: an event of {type(family).__name__} is no matrix; Raveled "
                "takes vector families over a tree."
            )
        leaves, treedef = jax.tree.flatten(theta)
        return cls(family, treedef, tuple(jnp.shape(leaf) for leaf in leaves))

    location = derived(lambda self: self.family.location)
    curvatures = derived(lambda self: self.family.curvatures)
    at_means = derived(lambda self: self.family.at_means)

    def matrices(self, theta: PyTree) -> list[Array]:
        """Return the leaves as matrices; leading sample axes stay."""
        found = []
        for leaf, shape in zip(self.treedef.flatten_up_to(theta), self.shapes, strict=True):
            leaf = jnp.asarray(leaf)
            columns = shape[-1] if len(shape) > 1 else 1
            batch = leaf.shape[: leaf.ndim - len(shape)]
            found.append(leaf.reshape(*batch, math.prod(shape) // max(columns, 1), columns))
        return found

    def tree(self, matrices: list[Array]) -> PyTree:
        """Return the tree of its leaves as matrices; leading sample axes stay."""
        pairs = zip(matrices, self.shapes, strict=True)
        return self.treedef.unflatten([x.reshape(*x.shape[:-2], *shape) for x, shape in pairs])

    def part(
        self, lam: LeafwiseNatural, path: tuple[str | int, ...]
    ) -> tuple[Leafwise, LeafwiseNatural]:
        """Return the leaves below the path, which are independent of the others."""
        index = self.treedef.unflatten(range(len(self.shapes)))
        kept, tree = jax.tree.flatten(_tree.subtree(index, path, "part"))
        family = Leafwise(self.family, tree, tuple(self.shapes[i] for i in kept))
        return family, LeafwiseNatural(tuple(lam.members[i] for i in kept))

    def members(self, like: PyTree) -> list[ConditionalFamily]:
        return [self.family] * len(self.shapes)

    def split(self, x: PyTree, like: PyTree) -> Sequence[PyTree]:
        return x.members if isinstance(x, LeafwiseNatural) else self.matrices(x)

    def joined(self, kind: type | None, parts: Sequence[PyTree], like: PyTree) -> PyTree:
        return self.tree(list(parts)) if kind is None else kind(tuple(parts))

    def natural(self, *, members: tuple) -> LeafwiseNatural:
        """lambda from the members' own, in the order of the tree."""
        return LeafwiseNatural(tuple(members))

    def standard(self, lam: LeafwiseNatural) -> dict[str, PyTree]:
        return {"members": lam.members}

    def noise(
        self, key: Array, lam: LeafwiseNatural, samples: int, antithetic: bool = False
    ) -> tuple:
        pairs = zip(self.keys(key, lam), lam.members, strict=True)
        return tuple(self.family.noise(k, member, samples, antithetic) for k, member in pairs)

    def natural_gradient_at(
        self,
        lam: LeafwiseNatural,
        loss: Callable,
        noise: tuple,
        weights: Array,
        curvature: str = "exact",
    ) -> tuple[Array, LeafwiseNatural]:
        """Draw by draw, and leaf by leaf with the others held at the draw."""
        one = jnp.ones((1,), weights.dtype)

        def look(z: tuple) -> tuple:
            drawn = [
                member.mean + self.family.displace(member, x)
                for member, x in zip(lam.members, z, strict=True)
            ]

            def alone(i: int) -> tuple:
                def with_others(x: Array) -> Array:
                    return loss(self.tree([*drawn[:i], x, *drawn[i + 1 :]]))

                return self.family.natural_gradient_at(
                    lam.members[i], with_others, z[i][None], one, curvature
                )

            found = [alone(i) for i in range(len(drawn))]
            return found[0][0], LeafwiseNatural(tuple(gradient for _, gradient in found))

        looked = jax.lax.map(look, noise)
        return jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), looked)

    def move(
        self,
        lam: LeafwiseNatural,
        gradient: LeafwiseNatural,
        learning_rate: Scalar,
        step: str = "auto",
    ) -> LeafwiseNatural:
        pairs = zip(lam.members, gradient.members, strict=True)
        moved = [self.family.move(member, d, learning_rate, step) for member, d in pairs]
        return LeafwiseNatural(tuple(moved))
