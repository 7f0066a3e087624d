"""Independent members of an elementwise family over any pytree of arrays.

The fields of a mean-field lambda are trees like the parameters, so optax's tree utilities, masks
and shardings see them as parameters.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax._random import standard_normals
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.family import Family, derived
from blr_optax.families._base.registry import get
from blr_optax.families._base.standard_parameters import check_keywords, name_of
from blr_optax.families._lifts.independent import Independent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Array, Float

    from blr_optax._typing import NaturalParameters, PyTree


@dataclasses.dataclass(frozen=True)
class MeanField(Independent, ExponentialFamily):
    """Independent members of an elementwise family, one per number of a pytree.

    q(theta) = prod_j q_j(theta_j). `log_prob`, `entropy` and `kl` are sums over the whole tree;
    theta may have leading sample axes.

    lambda and mu: those of the family, every field a tree like the parameters.

    Attributes:
        family: the elementwise family of every leaf, such as `families.get("normal")`, or its
            registered name.

    Raises:
        ValueError: when `family` is not elementwise.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> q = blr.families.MeanField("normal")
      >>> lam = q.natural(mean={"w": jnp.zeros(3), "b": jnp.ones(2)}, precision=4.0)
      >>> print(q.entropy(lam).round(4), q.variance(lam)["b"])
      3.629 [0.25 0.25]
    """

    family: ExponentialFamily

    def __init__(self, family: Family | str) -> None:
        """Look a name up."""
        object.__setattr__(self, "family", get(family))
        if not getattr(self.family, "elementwise", False):
            raise ValueError(
                f"MeanField: {type(self.family).__name__} is not elementwise: its samples or its "
                "parameters have axes of their own. Batches of it need no MeanField, different "
                "ones join in a Product, and Raveled takes a vector family over a tree."
            )

    # What the lifted family says of itself; fields of lambda are trees, their names stay.
    Natural = derived(lambda self: self.family.Natural)
    Expectation = derived(lambda self: self.family.Expectation)
    domains = derived(lambda self: self.family.domains)
    known = derived(lambda self: self.family.known)
    location = derived(lambda self: self.family.location)
    constant_base_measure = derived(lambda self: self.family.constant_base_measure)
    reparameterized = derived(lambda self: self.family.reparameterized)
    enumerable = derived(lambda self: self.family.enumerable)
    relaxable = derived(lambda self: self.family.relaxable)
    curvature = derived(lambda self: getattr(self.family, "curvature", None))
    elementwise = False  # it is the lift

    def _structure(self, x: Any) -> Any:
        """Return the tree of the parameters: of every field of lambda and mu, and of theta."""
        return jax.tree.structure(x[0] if self._has_fields(x) else x)

    def _has_fields(self, x: Any) -> bool:
        return isinstance(x, (self.Natural, self.Expectation))

    def members(self, like: PyTree) -> list[ExponentialFamily]:
        return [self.family] * self._structure(like).num_leaves

    def split(self, x: PyTree, like: PyTree) -> list[PyTree]:
        treedef = self._structure(like)
        if not self._has_fields(x):
            return treedef.flatten_up_to(x)
        return [type(x)(*part) for part in zip(*map(treedef.flatten_up_to, x), strict=True)]

    def joined(self, kind: type | None, parts: Sequence[PyTree], like: PyTree) -> PyTree:
        """Return a tree; of lambda or mu every field is one."""
        treedef = self._structure(like)
        if kind is None:
            return treedef.unflatten(parts)
        columns = range(len(kind._fields))
        return kind(*(treedef.unflatten([part[i] for part in parts]) for i in columns))

    def keys(self, key: Array, like: PyTree) -> list[Array]:
        """By the leaf's path, so that other leaves do not matter."""
        leaves = jax.tree_util.tree_leaves_with_path(like[0])
        return [jax.random.fold_in(key, _tree.path_hash(path)) for path, _ in leaves]

    def sample(self, key: Array, lam: NaturalParameters, shape: tuple[int, ...] = ()) -> PyTree:
        """Draw every leaf under a key of its own; of Gaussians, by noise that compiles fast."""
        if not hasattr(self.family, "displace"):
            return super().sample(key, lam, shape)
        mean = self.mean(lam)
        return jax.tree.map(jnp.add, mean, self.displace(lam, standard_normals(key, mean, shape)))

    def log_prob(self, lam: NaturalParameters, theta: PyTree) -> Float[Array, ...]:
        """Sum over the tree, for every draw that leads.

        Raises:
            ValueError: for a leaf that is no draw of its members, but would broadcast to one.
        """
        for own, x in zip(self.split(lam, lam), self.split(theta, lam), strict=True):
            size = jnp.broadcast_shapes(*map(jnp.shape, own))
            if size and jnp.ndim(x) and jnp.shape(x)[-len(size) :] != size:
                raise ValueError(
                    f"MeanField: theta has a leaf of shape {jnp.shape(x)}, where the parameters "
                    f"have {size}; axes of draws lead."
                )
        return super().log_prob(lam, theta)

    def batch_ndim(self, member: Family, lam: NaturalParameters) -> int:
        """All axes of a leaf."""
        return jnp.ndim(lam[0])

    def join(
        self, lam: NaturalParameters, other: Family, other_lam: NaturalParameters
    ) -> tuple[Family, PyTree] | None:
        """With another mean field of one family: over the leaves of both."""
        if other != self:
            return None
        return self, self.Natural(*map(_tree.fill, lam, other_lam))

    def part(
        self, lam: NaturalParameters, path: tuple[str | int, ...]
    ) -> tuple[Family, NaturalParameters]:
        """Return the leaves below the path, which are independent of the others."""
        return self, self.Natural(*(_tree.subtree(field, path, "part") for field in lam))

    def natural(self, **standard: PyTree) -> NaturalParameters:
        """lambda from standard parameters: each a tree like the parameters, or a number."""
        who = f"mean field of {name_of(self.family)}.natural"
        check_keywords(who, self.family.natural, standard)
        standard = {name: x for name, x in standard.items() if x is not None}
        trees = (x for x in standard.values() if not jax.tree_util.all_leaves([x]))
        like = next(trees, next(iter(standard.values())))
        spread = [
            jax.tree.leaves(_tree.prefix_leaves(x, like, name)) for name, x in standard.items()
        ]
        paths = [_tree.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(like)]

        def leaf(path: str, *values: Any) -> Any:
            try:
                return self.family.natural(**dict(zip(standard, values, strict=True)))
            except ValueError as error:
                raise ValueError(f"leaf {path or 'the root'}: {error}") from error

        leaves = [leaf(*row) for row in zip(paths, *spread, strict=True)]
        return self.joined(self.Natural, leaves, like)

    def standard(self, lam: NaturalParameters) -> dict[str, PyTree]:
        leaves = self._each("standard", lam)
        return {name: self.joined(None, [x[name] for x in leaves], lam) for name in leaves[0]}

    # A lambda has no batches here: its Fisher matrix is over all numbers, field by field.
    fisher = ExponentialFamily.fisher

    # Of Gaussian members.

    def from_mean(self, mean: PyTree, precision: PyTree) -> NaturalParameters:
        return self._natural("from_mean", mean, precision)

    def precision(self, lam: NaturalParameters) -> PyTree:
        return self._theta("precision", lam)

    def displace(self, lam: NaturalParameters, z: PyTree) -> PyTree:
        return self._theta("displace", lam, z)

    def gradient(self, lam: NaturalParameters, g: PyTree, h: PyTree) -> NaturalParameters:
        return self._natural("gradient", lam, g, h)
