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

from blr_optax import _tree
from blr_optax.families._base.conditional import Conditional
from blr_optax.families._base.exponential import Family
from blr_optax.families._base.parameters import parameters

if TYPE_CHECKING:
    from jaxtyping import Array


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
