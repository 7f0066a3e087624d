"""Families over trees of weights of which a part is known, or which act as one flat vector.

`Pinned(family)`: some leaves have a posterior, the others are points. It is what
`posterior(opt_state, params)` returns when an optimizer carries a posterior for a part of a
network. `Raveled(family, ...)`: a vector family, such as `gaussian`, over a tree's flat vector.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax.families._base.exponential import Family
from blr_optax.families._base.parameters import parameters

if TYPE_CHECKING:
    from jaxtyping import Array


@parameters
class PinnedNatural(NamedTuple):
    """lambda of the free leaves, and the known ones (`MaskedNode` where the other has a leaf)."""

    free: Any
    point: Any


@dataclasses.dataclass(frozen=True)
class Pinned(Family):
    """A tree family on some leaves of a tree, a known point on the others.

    q(theta) = q_free(theta_free) delta(theta_known - point). The point is a field of lambda that
    never moves; densities, entropy and KL are those of the free part.

    Attributes:
        family: the tree family of the free leaves, such as `gaussian_diagonal`.

    Example:
      >>> import jax.numpy as jnp, optax, blr_optax as blr
      >>> free = blr.families.get("gaussian_diagonal")
      >>> hole = optax.MaskedNode()
      >>> lam = blr.families.Pinned(free).natural(
      ...     free=free.natural(mean={"w": jnp.ones(2), "b": hole}, precision=4.0),
      ...     point={"w": hole, "b": jnp.zeros(1)},
      ... )
      >>> q = blr.Posterior(blr.families.Pinned(free), lam)
      >>> print(q.mean, q.variance["b"])
      {'b': Array([0.], dtype=float32), 'w': Array([1., 1.], dtype=float32)} [0.]
    """

    family: Family
    Natural: ClassVar[type] = PinnedNatural
    known: ClassVar[tuple[str, ...]] = ("point",)

    def natural(self, *, free: Any, point: Any) -> PinnedNatural:
        """lambda from the free part's lambda and the known leaves."""
        return PinnedNatural(free, point)

    def standard(self, lam: PinnedNatural) -> dict[str, Any]:
        return {"free": lam.free, "point": lam.point}

    def combine(self, *terms: tuple[Any, PinnedNatural]) -> PinnedNatural:
        return PinnedNatural(
            self.family.combine(*((a, lam.free) for a, lam in terms)), terms[0][1].point
        )

    def check_sizes(self, *lams: PinnedNatural) -> None:
        if isinstance(self.family, Family):  # conditional families have no arithmetic
            self.family.check_sizes(*(lam.free for lam in lams))

    def in_domain(self, lam: PinnedNatural) -> Array:
        return self.family.in_domain(lam.free)

    def log_prob(self, lam: PinnedNatural, theta: Any) -> Array:
        hole = _tree.is_hole
        free = jax.tree.map(
            lambda p, x: x if hole(p) else optax.MaskedNode(), lam.point, theta, is_leaf=hole
        )
        return self.family.log_prob(lam.free, free)

    def entropy(self, lam: PinnedNatural) -> Array:
        return self.family.entropy(lam.free)

    def kl(self, lam_p: PinnedNatural, lam_q: PinnedNatural) -> Array:
        return self.family.kl(lam_p.free, lam_q.free)

    def expectation(self, lam: PinnedNatural) -> Any:
        """mu of the free part."""
        return self.family.expectation(lam.free)

    def mean(self, lam: PinnedNatural) -> Any:
        return _tree.fill(self.family.mean(lam.free), lam.point)

    def variance(self, lam: PinnedNatural) -> Any:
        return _tree.fill(self.family.variance(lam.free), jax.tree.map(jnp.zeros_like, lam.point))

    def sample(self, key: Array, lam: PinnedNatural, shape: tuple[int, ...] = ()) -> Any:
        point = jax.tree.map(lambda x: jnp.broadcast_to(x, shape + jnp.shape(x)), lam.point)
        return _tree.fill(self.family.sample(key, lam.free, shape), point)


@dataclasses.dataclass(frozen=True)
class Raveled(Family):
    """A vector family over the flat vector of a pytree: theta, mean and samples are trees.

    Attributes:
        family: a family whose event is one vector, such as `gaussian`.
        treedef: the structure of theta.
        shapes: the shapes of its leaves, in order.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> raveled = blr.families.Raveled.like(
      ...     blr.families.get("gaussian"), {"w": jnp.ones(2), "b": 0.0}
      ... )
      >>> lam = raveled.natural_at({"w": jnp.ones(2), "b": 0.0})
      >>> print(lam.linear, raveled.mean(lam)["w"])
      [0. 1. 1.] [1. 1.]
    """

    family: Family
    treedef: Any
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def like(cls, family: Family, theta: Any) -> Raveled:
        """The family over trees shaped like theta."""
        leaves, treedef = jax.tree.flatten(theta)
        return cls(family, treedef, tuple(jnp.shape(leaf) for leaf in leaves))

    Natural = property(lambda self: self.family.Natural)
    Expectation = property(lambda self: self.family.Expectation)
    domains = property(lambda self: self.family.domains)
    known = property(lambda self: self.family.known)
    location = property(lambda self: self.family.location)
    constant_base_measure = property(lambda self: self.family.constant_base_measure)
    reparameterized = property(lambda self: self.family.reparameterized)
    curvature = property(lambda self: getattr(self.family, "curvature", None))

    def ravel(self, theta: Any) -> Array:
        """The flat vector of theta; leading sample axes stay."""
        leaves = self.treedef.flatten_up_to(theta)
        flat = []
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            leaf = jnp.asarray(leaf)
            flat.append(leaf.reshape(*leaf.shape[: leaf.ndim - len(shape)], -1))
        return jnp.concatenate(flat, axis=-1)

    def unravel(self, flat: Array) -> Any:
        """The tree of a flat vector; leading sample axes stay."""
        leaves, start = [], 0
        for shape in self.shapes:
            size = 1
            for n in shape:
                size *= n
            leaves.append(flat[..., start : start + size].reshape(*flat.shape[:-1], *shape))
            start += size
        return self.treedef.unflatten(leaves)

    def natural(self, *, mean: Any, **standard: Array) -> Any:
        """lambda from a mean that is a tree or a flat vector, and the family's other parameters."""
        is_leaf = jax.tree_util.all_leaves([mean])
        is_flat = is_leaf and jax.tree.structure(mean) != self.treedef
        return self.family.natural(mean=mean if is_flat else self.ravel(mean), **standard)

    def standard(self, lam: Any) -> dict[str, Any]:
        return self.family.standard(lam)

    def mean(self, lam: Any) -> Any:
        return self.unravel(self.family.mean(lam))

    def variance(self, lam: Any) -> Any:
        return self.unravel(self.family.variance(lam))

    def sample(self, key: Array, lam: Any, shape: tuple[int, ...] = ()) -> Any:
        return self.unravel(self.family.sample(key, lam, shape))

    def natural_at(self, location: Any, like: Any = None) -> Any:
        return self.family.natural_at(self.ravel(location), like)

    def sufficient_statistics(self, theta: Any, lam: Any = None) -> Any:
        return self.family.sufficient_statistics(self.ravel(theta), lam)

    def log_base_measure(self, lam: Any, theta: Any) -> Array:
        return self.family.log_base_measure(lam, self.ravel(theta))

    def log_prob(self, lam: Any, theta: Any) -> Array:
        return self.family.log_prob(lam, self.ravel(theta))

    def displace(self, lam: Any, z: Any) -> Any:
        return self.unravel(self.family.displace(lam, self.ravel(z)))

    def gradient(self, lam: Any, g: Any, h: Any) -> Any:
        return self.family.gradient(lam, self.ravel(g), h)


def _delegate(name: str) -> Any:
    """A method of `Raveled` that concerns lambda and mu alone and is the wrapped family's."""
    return lambda self, *args, **kwargs: getattr(self.family, name)(*args, **kwargs)


for _name in (
    "log_partition",
    "expectation",
    "natural_from_expectation",
    "entropy",
    "kl",
    "inner",
    "combine",
    "fisher",
    "fisher_product",
    "inverse_fisher_product",
    "gradient_in_mu",
    "gradient_in_lambda",
    "coordinates",
    "in_domain",
    "retract",
    "safe_step",
    "precision",
    "base_measure_gradient",
    "expected_log_base_measure",
    "from_mean",
    "covariance",
):
    setattr(Raveled, _name, _delegate(_name))
