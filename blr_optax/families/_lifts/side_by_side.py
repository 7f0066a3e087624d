"""Independent posteriors of different families over disjoint leaves of one tree of weights.

    q(theta) = prod_k q_k(theta_k),   theta_k the leaves of the k-th part

It is what `posterior(opt_state, params)` returns when `optax.partition` gives some weights signs
and others Gaussians, and others no posterior at all: those are points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax

from blr_optax import _tree
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.family import Family, derived
from blr_optax.families._base.parameters import parameters
from blr_optax.families._lifts.independent import Independent

if TYPE_CHECKING:
    from blr_optax._typing import NaturalParameters, PyTree

    pass


@parameters
class SideBySideNatural(NamedTuple):
    """lambda of every part, in order."""

    parts: tuple[PyTree, ...]


@parameters
class SideBySideExpectation(NamedTuple):
    """mu of every part, in order."""

    parts: tuple[PyTree, ...]


@dataclasses.dataclass(frozen=True)
class SideBySide(Independent, ExponentialFamily):
    """One tree family for every part of a tree; a part has `MaskedNode` where others have leaves.

    log q(theta) = sum_k log q_k(theta_k); mean, variance and samples are whole trees. It is an
    exponential family when all parts are.

    lambda: parts = tuple of every part's lambda. mu: parts = tuple of every part's mu.

    Attributes:
        families: the tree families, one for every part.

    Example:
      >>> import jax.numpy as jnp, optax, blr_optax as blr
      >>> normals = blr.families.get("gaussian_diagonal")
      >>> points = blr.families.MeanField(blr.families.Point())
      >>> hole, q = optax.MaskedNode(), blr.families.SideBySide((normals, points))
      >>> lam = q.natural(
      ...     normals.natural(mean={"w": hole, "b": jnp.ones(1)}, precision=4.0),
      ...     points.natural(value={"w": jnp.zeros(2), "b": hole}),
      ... )
      >>> print(q.mean(lam)["w"], q.variance(lam), q.entropy(lam).round(4))
      [0. 0.] {'b': Array([0.25], dtype=float32), 'w': Array([0., 0.], dtype=float32)} 0.7258
    """

    families: tuple[Family, ...]
    Natural: ClassVar[type] = SideBySideNatural
    Expectation: ClassVar[type] = SideBySideExpectation

    exponential = derived(lambda self: all(f.exponential for f in self.families))
    domains = derived(lambda self: dict(enumerate(f.domains for f in self.families)))
    # A property, so that A gets no derivative rule: the parts' own know their known fields.
    known = derived(lambda self: ())
    reparameterized = derived(lambda self: all(f.reparameterized for f in self.families))
    enumerable = derived(lambda self: all(f.enumerable for f in self.families))
    relaxable = derived(lambda self: all(f.relaxable for f in self.families))
    constant_base_measure = derived(
        lambda self: all(f.constant_base_measure for f in self.families)
    )
    elementwise = False

    def members(self, like: PyTree) -> tuple[Family, ...]:
        return self.families

    def split(self, x: PyTree, like: PyTree) -> Sequence[PyTree]:
        """Of theta, the leaves that the part has in `like`."""
        if isinstance(x, (SideBySideNatural, SideBySideExpectation)):
            return x.parts
        if not isinstance(like, SideBySideNatural):
            raise ValueError(
                "SideBySide: which leaves a part has is known from lambda; pass lam as well."
            )
        means = [
            jax.eval_shape(family.mean, lam)
            for family, lam in zip(self.families, like.parts, strict=True)
        ]
        return [_tree.mask_to(x, _tree.paths(mean)) for mean in means]

    def joined(self, kind: type | None, parts: Sequence[PyTree], like: PyTree) -> PyTree:
        """One tree: at every leaf that of the part that has it."""
        return _tree.fill(*parts) if kind is None else kind(tuple(parts))

    def part(
        self, lam: NaturalParameters, path: tuple[str | int, ...]
    ) -> tuple[Family, NaturalParameters]:
        """Those that have leaves below the path; one alone is no longer beside another."""
        found = self._each("part", lam, path=path)
        found = [(family, own) for family, own in found if jax.tree.leaves(own)]
        if not found:
            raise ValueError(f"part: nothing at {'/'.join(map(str, path))}.")
        if len(found) == 1:
            return found[0]
        families, parts = zip(*found, strict=True)
        return SideBySide(families), SideBySideNatural(parts)

    def natural(self, *parts: PyTree) -> SideBySideNatural:
        """Return lambda, from every part's lambda, in order."""
        return SideBySideNatural(parts)

    def standard(self, lam: SideBySideNatural) -> dict[str, PyTree]:
        return {"parts": tuple(self._each("standard", lam))}
