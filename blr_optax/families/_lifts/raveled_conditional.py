"""A conditional family over the flat vector of a pytree, as `Raveled` is for exponential ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blr_optax.families._base.conditional import Conditional
from blr_optax.families._lifts.raveled import Raveled

if TYPE_CHECKING:
    from jaxtyping import Array


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
    hessians = property(lambda self: self.family.hessians)
    at_means = property(lambda self: self.family.at_means)

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
        self, lam: Any, loss: Callable, noise: Any, weights: Array, hessian: str = "exact"
    ) -> tuple[Array, Any]:
        def flat(theta: Array) -> Array:
            return loss(self.unravel(theta))

        return self.family.natural_gradient_at(lam, flat, noise, weights, hessian)

    def natural_gradient_from(
        self, lam: Any, loss: Callable, theta: Any, hessian: str = "exact"
    ) -> tuple[Array, Any]:
        """As a mixture's, from draws that are trees."""

        def flat(theta: Array) -> Array:
            return loss(self.unravel(theta))

        return self.family.natural_gradient_from(lam, flat, self.ravel(theta), hessian)

    def move(
        self, lam: Any, gradient: Any, learning_rate: Any, form: str = "auto", **rates: Any
    ) -> Any:
        return self.family.move(lam, gradient, learning_rate, form, **rates)
