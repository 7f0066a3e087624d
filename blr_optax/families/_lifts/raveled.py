"""Families over the flat vector of a tree of weights.

`Raveled(family, ...)`: a vector family, such as `gaussian`, over a tree's flat vector, and
`RaveledConditional` the same for conditional families.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax.families._base.conditional import Conditional
from blr_optax.families._base.exponential import Family

if TYPE_CHECKING:
    from jaxtyping import Array


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


@dataclasses.dataclass(frozen=True)
class RaveledConditional(Conditional):
    """A conditional vector family whose theta, mean and samples are trees.

    lambda: that of the wrapped family over the flat vector, leaves in the order of the tree.

    Attributes:
        family: a conditional family whose event is one vector, such as `mixture` of `gaussian`.
        treedef: the structure of theta.
        shapes: the shapes of its leaves, in order.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> family = blr.families.RaveledConditional.like(
      ...     blr.families.get("student_t"), {"w": jnp.ones(2), "b": jnp.zeros(())}
      ... )
      >>> lam = family.natural(mean=jnp.arange(3.0), scale=jnp.eye(3), degrees=5.0)
      >>> print(family.mean(lam)["w"])
      [1. 2.]
    """

    family: Conditional
    treedef: Any
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def like(cls, family: Conditional, theta: Any) -> RaveledConditional:
        """The family over trees shaped like theta.

        Raises:
            ValueError: for a family whose event is no vector.
        """
        if family.event_ndim != 1:
            raise ValueError(
                f"{type(family).__name__} is over one array with {family.event_ndim} axes, not "
                "over a tree; Leafwise gives every leaf a member of its own."
            )
        raveled = Raveled.like(family, theta)
        return cls(family, raveled.treedef, raveled.shapes)

    Natural = property(lambda self: self.family.Natural)
    location = property(lambda self: self.family.location)
    curvatures = property(lambda self: self.family.curvatures)
    at_means = property(lambda self: self.family.at_means)
    shares_draws = property(lambda self: self.family.shares_draws)

    ravel = Raveled.ravel
    unravel = Raveled.unravel

    def natural(self, **standard: Array) -> Any:
        return self.family.natural(**standard)

    def standard(self, lam: Any) -> dict[str, Array]:
        return self.family.standard(lam)

    def natural_at(self, location: Any, like: Any = None) -> Any:
        return self.family.natural_at(self.ravel(location), like)

    def sample(self, key: Array, lam: Any, shape: tuple[int, ...] = ()) -> Any:
        return self.unravel(self.family.sample(key, lam, shape))

    def log_prob(self, lam: Any, theta: Any) -> Array:
        return self.family.log_prob(lam, self.ravel(theta))

    def mean(self, lam: Any) -> Any:
        return self.unravel(self.family.mean(lam))

    def variance(self, lam: Any) -> Any:
        return self.unravel(self.family.variance(lam))

    def in_domain(self, lam: Any) -> Array:
        return self.family.in_domain(lam)

    def entropy(self, lam: Any) -> Array:
        return self.family.entropy(lam)

    def kl(self, lam_p: Any, lam_q: Any) -> Array:
        return self.family.kl(lam_p, lam_q)

    def noise(self, key: Array, lam: Any, samples: int, antithetic: bool = False) -> Any:
        return self.family.noise(key, lam, samples, antithetic)

    def natural_gradient_at(
        self, lam: Any, loss: Callable, noise: Any, weights: Array, curvature: str = "exact"
    ) -> tuple[Array, Any]:
        def flat(theta: Array) -> Array:
            return loss(self.unravel(theta))

        return self.family.natural_gradient_at(lam, flat, noise, weights, curvature)

    def natural_gradient_from(
        self, lam: Any, loss: Callable, theta: Any, curvature: str = "exact"
    ) -> tuple[Array, Any]:
        """As a mixture's, from draws that are trees."""

        def flat(theta: Array) -> Array:
            return loss(self.unravel(theta))

        return self.family.natural_gradient_from(lam, flat, self.ravel(theta), curvature)

    def move(
        self, lam: Any, gradient: Any, learning_rate: Any, step: str = "auto", **rates: Any
    ) -> Any:
        return self.family.move(lam, gradient, learning_rate, step, **rates)
