"""Independent posteriors of different families over disjoint leaves of one tree of weights.

    q(theta) = prod_k q_k(theta_k),   theta_k the leaves of the k-th part

It is what `posterior(opt_state, params)` returns when `optax.partition` gives some weights signs
and others Gaussians.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax.families._base.conditional import Conditional
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


@parameters
class SideBySideNatural(NamedTuple):
    """lambda of every part, in order."""

    parts: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class SideBySide(Family):
    """One tree family for every part of a tree; a part has `MaskedNode` where others have leaves.

    log q(theta) = sum_k log q_k(theta_k); mean, variance and samples are whole trees.

    Attributes:
        families: the tree families, one for every part.

    Example:
      >>> import jax.numpy as jnp, optax, blr_optax as blr
      >>> normals = blr.families.get("gaussian_diagonal")
      >>> signs = blr.families.MeanField("rademacher")
      >>> hole, q = optax.MaskedNode(), blr.families.SideBySide((normals, signs))
      >>> lam = q.natural(
      ...     normals.natural(mean={"w": hole, "b": jnp.ones(1)}, precision=4.0),
      ...     signs.Natural({"w": jnp.zeros(2), "b": hole}),
      ... )
      >>> print(q.mean(lam)["b"], q.variance(lam)["w"], q.entropy(lam).round(4))
      [1.] [1. 1.] 2.1121
    """

    families: tuple[Family | Conditional, ...]
    Natural: ClassVar[type] = SideBySideNatural
    known: ClassVar[tuple[str, ...]] = ()
    elementwise = False

    def _each(self, method: str, *lams: SideBySideNatural) -> list[Any]:
        """A method of every family, on its own part."""
        parts = zip(*(lam.parts for lam in lams), strict=True)
        return [
            getattr(family, method)(*own) for family, own in zip(self.families, parts, strict=True)
        ]

    def natural(self, *parts: Any) -> SideBySideNatural:
        """lambda from every part's lambda, in order."""
        return SideBySideNatural(parts)

    def standard(self, lam: SideBySideNatural) -> dict[str, Any]:
        return {"parts": tuple(self._each("standard", lam))}

    def combine(self, *terms: tuple[Any, SideBySideNatural]) -> SideBySideNatural:
        own = [[(a, lam.parts[k]) for a, lam in terms] for k in range(len(self.families))]
        return SideBySideNatural(
            tuple(f.combine(*pairs) for f, pairs in zip(self.families, own, strict=True))
        )

    def check_sizes(self, *lams: SideBySideNatural) -> None:
        for k, family in enumerate(self.families):
            if isinstance(family, Family):  # conditional families have no arithmetic
                family.check_sizes(*(lam.parts[k] for lam in lams))

    def in_domain(self, lam: SideBySideNatural) -> Array:
        return jnp.array([jnp.all(x) for x in self._each("in_domain", lam)]).all()

    def expectation(self, lam: SideBySideNatural) -> tuple[Any, ...]:
        """mu of every part, in order."""
        return tuple(self._each("expectation", lam))

    def mean(self, lam: SideBySideNatural) -> Any:
        return _tree.fill(*self._each("mean", lam))

    def variance(self, lam: SideBySideNatural) -> Any:
        return _tree.fill(*self._each("variance", lam))

    def sample(self, key: Array, lam: SideBySideNatural, shape: tuple[int, ...] = ()) -> Any:
        """A draw of every part, each with its own key."""
        keys = jax.random.split(key, len(self.families))
        draws = zip(self.families, keys, lam.parts, strict=True)
        return _tree.fill(*(family.sample(own, part, shape) for family, own, part in draws))

    def log_prob(self, lam: SideBySideNatural, theta: Any) -> Array:
        """Sum over the parts; leading sample axes of theta stay."""
        total = 0.0
        for family, part in zip(self.families, lam.parts, strict=True):
            leaves = _tree.paths(jax.eval_shape(family.mean, part))
            total = total + family.log_prob(part, _tree.mask_to(theta, leaves))
        return total

    def entropy(self, lam: SideBySideNatural) -> Array:
        return sum(self._each("entropy", lam))

    def kl(self, lam_p: SideBySideNatural, lam_q: SideBySideNatural) -> Array:
        return sum(self._each("kl", lam_p, lam_q))
