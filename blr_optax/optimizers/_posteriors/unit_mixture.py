"""Dropout's posterior: every unit of a network is kept, or dropped to zero, as a whole.

    q(theta_j) = pi N(m_j, v_j) + (1 - pi) N(0, v_0)    for the weights theta_j of unit j
    E[theta_j] = pi m_j,   Var[theta_j] = pi (v_j + (1 - pi) m_j^2) + (1 - pi) v_0

Units are independent of each other; weights that belong to none are N(m, v). Variances may be zero,
which is the delta method: weights drawn are then the network with units dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax.families._base.family import Family
from blr_optax.families._base.parameters import parameters

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from blr_optax._typing import NaturalParameters, PyTree


@parameters
class UnitMixtureNatural(NamedTuple):
    """Trees of means and variances of the kept weights; of keep rates and the dropped's variances.

    Nothing learns in these coordinates: they are standard parameters.
    """

    mean: PyTree
    variance: PyTree
    keep: Any
    dropped_variance: PyTree


@dataclasses.dataclass(frozen=True)
class UnitMixture(Family):
    """A mixture of kept and dropped for every unit, over a tree of weights.

    q(theta_j) = pi N(m_j, v_j) + (1 - pi) N(0, v_0).

    Attributes:
        units: for every leaf by its path, the shape of its units with ones for the axes that they
            span; None for leaves without units.

    Example:
      >>> import jax.numpy as jnp
      >>> from blr_optax.optimizers._posteriors.unit_mixture import UnitMixture
      >>> family = UnitMixture((("['w']", (3, 1)), ("['b']", None)))
      >>> tree = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
      >>> lam = family.natural(mean=tree, keep=0.5)
      >>> print(family.mean(lam)["w"][0], family.variance(lam)["w"][0], family.variance(lam)["b"])
      [0.5 0.5] [0.25 0.25] [0. 0.]
    """

    units: tuple[tuple[str, tuple[int, ...] | None], ...]

    Natural: ClassVar[type] = UnitMixtureNatural

    def _map(self, fun: Callable, *trees: Any) -> Any:
        """fun(shape of the units or None, *leaves) at every leaf."""
        shapes = dict(self.units)
        return jax.tree_util.tree_map_with_path(
            lambda path, *leaves: fun(shapes[_tree.leaf_name(path)], *leaves), *trees
        )

    def natural(
        self, *, mean: PyTree, variance: PyTree = None, keep: Any, dropped_variance: PyTree = 0.0
    ) -> UnitMixtureNatural:
        """From trees of means and variances (zero by default), and the rate at which units stay.

        The rate and the dropped's variance are numbers, the same for every leaf.
        """
        variance = jax.tree.map(jnp.zeros_like, mean) if variance is None else variance

        def everywhere(number: Any) -> Any:
            return jax.tree.map(lambda m: jnp.array(number, m.dtype), mean)

        return UnitMixtureNatural(mean, variance, everywhere(keep), everywhere(dropped_variance))

    def standard(self, lam: UnitMixtureNatural) -> dict[str, PyTree]:
        return {name: getattr(lam, name) for name in lam._fields}

    def in_domain(self, lam: UnitMixtureNatural) -> Bool[Array, ""]:
        inside = [
            jnp.all(jnp.isfinite(m) & (v >= 0) & jnp.isfinite(v) & (k > 0) & (k <= 1) & (d >= 0))
            for m, v, k, d in zip(*map(jax.tree.leaves, lam), strict=True)
        ]
        return jnp.all(jnp.array(inside))

    def mean(self, lam: UnitMixtureNatural) -> PyTree:
        return self._map(lambda units, m, v, k, d: m if units is None else k * m, *lam)

    def variance(self, lam: UnitMixtureNatural) -> PyTree:
        def leaf(units: Any, m: Array, v: Array, k: Array, d: Array) -> Array:
            return v if units is None else k * (v + (1 - k) * m * m) + (1 - k) * d

        return self._map(leaf, *lam)

    def join(
        self, lam: UnitMixtureNatural, other: Family, other_lam: NaturalParameters
    ) -> tuple | None:
        """With another mixture of units: over the leaves and units of both."""
        if not isinstance(other, UnitMixture):
            return None
        family = UnitMixture(tuple(sorted(self.units + other.units)))
        return family, UnitMixtureNatural(*map(_tree.fill, lam, other_lam))

    def sample(self, key: Array, lam: UnitMixtureNatural, shape: tuple[int, ...] = ()) -> PyTree:
        shapes = dict(self.units)

        def leaf(path: Any, m: Array, v: Array, k: Array, d: Array) -> Array:
            noise, stay = jax.random.split(jax.random.fold_in(key, _tree.path_hash(path)))
            eps = jax.random.normal(noise, shape + m.shape, m.dtype)
            kept, units = m + jnp.sqrt(v) * eps, shapes[_tree.leaf_name(path)]
            if units is None:
                return kept
            return jnp.where(jax.random.bernoulli(stay, k, shape + units), kept, jnp.sqrt(d) * eps)

        return jax.tree_util.tree_map_with_path(leaf, *lam)

    def log_prob(self, lam: UnitMixtureNatural, theta: PyTree) -> Float[Array, ...]:
        """log q(theta); the variances must be positive."""

        def leaf(units: Any, m: Array, v: Array, k: Array, d: Array, x: Array) -> Array:
            lead = x.ndim - m.ndim

            def log_normal(mean: Any, var: Any, span: tuple[int, ...]) -> Array:
                each = -0.5 * ((x - mean) ** 2 / var + jnp.log(2 * jnp.pi * var))
                return jnp.sum(each, axis=tuple(lead + i for i in span))

            if units is None:
                return log_normal(m, v, tuple(range(m.ndim)))
            span = tuple(i for i, n in enumerate(units) if n != m.shape[i])
            kept = jnp.log(k) + log_normal(m, v, span)
            # Nothing is dropped at a keep rate of one, whatever the density of being dropped.
            some = k < 1
            spread = jnp.where(some, d, 1.0)
            odds = jnp.where(some, jnp.log1p(-jnp.where(some, k, 0.0)), -jnp.inf)
            both = jnp.logaddexp(kept, odds + log_normal(0.0, spread, span))
            return jnp.sum(both, axis=tuple(range(lead, both.ndim)))

        return sum(jax.tree.leaves(self._map(leaf, *lam, theta)))
