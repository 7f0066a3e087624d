"""Several posteriors over one network's weights, or several networks, as one posterior."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from blr_optax._random import canonical_key

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import KeyLike, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Members of equal weight, stacked: every leaf of `members` has a leading axis of members.

    A member is a posterior, or the weights of one network, which are their own only draw. `predict`
    lets the members take turns, so that each has its share of the samples.

    Attributes:
        members: what `jax.vmap` over `posterior` or over `init` returns; see `ensemble` for a list.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> networks = blr.Ensemble(jnp.array([1.0, 3.0]))  # two networks of one weight
      >>> f = blr.predict_regression(0, networks, jnp.multiply, 2.0)
      >>> print(f.mean, f.epistemic)  # of the outputs 2 and 6
      4.0 8.0
    """

    members: PyTree

    @property
    def size(self) -> int:
        """How many members there are."""
        sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(self.members)}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError(
                "Ensemble: every leaf of the members needs the same leading axis; found "
                f"{sorted(sizes)}. For a list of members use blr_optax.ensemble(list)."
            )
        return sizes.pop()[0]

    def draws(self, samples: int) -> int:
        """Return how many draws give every member its share: networks have one each."""
        turns = -(-samples // self.size) if hasattr(self.members, "sample") else 1
        return turns * self.size

    def member(self, index: Array | int) -> PyTree:
        """Return one member."""
        return jax.tree.map(lambda x: jnp.asarray(x)[index], self.members)

    def sample_member(self, key: Array, turn: Array | int) -> PyTree:
        """Draw from the member whose turn it is."""
        one = self.member(turn % self.size)
        return one.sample(key, ()) if hasattr(one, "sample") else one

    def sample(self, key: KeyLike, shape: int | tuple[int, ...] = ()) -> PyTree:
        """Draw from members chosen at random."""
        shape = (shape,) if isinstance(shape, int) else shape
        which, draw = jax.random.split(canonical_key(key))
        turns = jax.random.randint(which, shape, 0, self.size)
        one = self.sample_member
        for _ in shape:
            one = jax.vmap(one)
        return one(jax.random.split(draw, shape), turns)


def ensemble(members: Sequence[PyTree]) -> Ensemble:
    """Return the ensemble of a list of posteriors of one family, or of networks' weights.

    Raises:
        ValueError: for an empty list, and members of different families, structures or shapes.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> both = [blr.distribution("normal", mean=m, variance=1.0) for m in (-2.0, 2.0)]
      >>> print(blr.ensemble(both).sample(0, 4000).var().round(0))  # 1 within, 4 between
      5.0
    """
    if not members:
        raise ValueError("ensemble: no members; give a list of posteriors or of weights.")
    structures = {jax.tree.structure(member) for member in members}
    shapes = {tuple(jnp.shape(x) for x in jax.tree.leaves(member)) for member in members}
    if len(structures) > 1 or len(shapes) > 1:
        raise ValueError(
            f"ensemble: members of one family, structure and shapes are stacked; found "
            f"{len(structures)} structures and {len(shapes)} sets of shapes. Average the "
            "predictions of others: predict with each."
        )
    return Ensemble(jax.tree.map(lambda *x: jnp.stack(x), *members))
