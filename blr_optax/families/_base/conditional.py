"""The second, smaller base: densities that are no exponential family but have one inside.

    q(theta) = integral of q(w) q(theta | w) over a hidden w

A mixture hides its component, a Student-t its scale, a skew Gaussian its shift; a matrix Gaussian
is one in each of its factors. The joint q(w, theta) is a minimal conditional exponential family:
its Fisher matrix is block-diagonal, and each block has a natural gradient in closed form (Lin, Khan
and Schmidt 2019). With the total potential E,

    L(q) = E_q[E(theta)] - H(q)              E = ess * mean loss - log prior
    lambda_b  <-  lambda_b - rho * (natural gradient of L in block b)

There is no arithmetic of natural parameters and no map from mu to lambda: the product of two
members is not a member. What learns makes two calls,

    value, gradient = estimators.natural_gradient(family, E)(key, lam)      value = E_q[E]
    lam = family.move(lam, gradient, rho)                                   inside for any rho
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from blr_optax._validate import unwritten
from blr_optax.families._base.domain import Domain
from blr_optax.families._base.family import Family

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax._typing import DTypeLike, NaturalParameters, PyTree, Scalar

STEPS = ("auto", "improved", "improved_old")


@dataclasses.dataclass(frozen=True)
class ConditionalFamily(Family):
    """Base of the conditional families; see the head of this file.

    A subclass defines what every family has (`natural`, `standard`, `sample`, `log_prob`, `mean`,
    `variance`, `in_domain`), and `noise`, `natural_gradient_at` and `move`.
    Densities, samples and moments take any leading batch dimensions; natural gradients and moves
    are of one member (`jax.vmap` for more).

    Attributes:
        curvatures: the names of the curvatures that `natural_gradient_at` evaluates.
        at_means: whether the delta method makes sense: evaluation at the means only.
        shares_draws: whether it has components that can share draws, `natural_gradient_from`.
    """

    event_ndim: ClassVar[int] = 1
    conditional: ClassVar[bool] = True
    curvatures: ClassVar[tuple[str, ...]] = ("exact", "reparameterized")
    at_means: ClassVar[bool] = False
    shares_draws: ClassVar[bool] = False

    # How it learns.

    def noise(
        self, key: Array, lam: NaturalParameters, samples: int, antithetic: bool = False
    ) -> PyTree:
        """Return the noise for `natural_gradient_at`: a tree with a leading axis of samples."""
        raise unwritten(self, "noise(self, key, lam, samples, antithetic=False)")

    def natural_gradient_at(
        self,
        lam: NaturalParameters,
        loss: Callable,
        noise: PyTree,
        weights: Array,
        curvature: str = "exact",
    ) -> tuple[Array, PyTree]:
        """E_q[loss] and the natural gradient of E_q[loss] - H(q), block by block.

        Args:
            lam: natural parameters.
            loss: `loss(theta) -> number`, the total potential, prior included.
            noise: from `noise`, or a quadrature rule, or a recording.
            weights: of the noise, with sum one.
            curvature: "exact", by automatic differentiation (Price's form); "reparameterized",
                S (theta - m) grad^T symmetrised, from gradients alone and right for piecewise
                linear networks; "squared_gradient", grad grad^T, where the family has it.
        """
        raise unwritten(
            self, 'natural_gradient_at(self, lam, loss, noise, weights, curvature="exact")'
        )

    def natural_gradient_from(
        self, lam: NaturalParameters, loss: Callable, theta: Array, curvature: str = "exact"
    ) -> tuple[Array, PyTree]:
        """`natural_gradient_at` from draws of q itself, where components can share them."""
        raise unwritten(self, 'natural_gradient_from(self, lam, loss, theta, curvature="exact")')

    def move(
        self,
        lam: NaturalParameters,
        gradient: PyTree,
        learning_rate: Scalar,
        step: str = "auto",
    ) -> NaturalParameters:
        """lambda - rho * gradient to first order, inside the domain for any rho.

        Args:
            lam: natural parameters.
            gradient: from `natural_gradient_at`.
            learning_rate: rho.
            step: how a precision moves by D. "auto" is S + D where that stays positive, else
                "improved", the second-order step S + D + D S^{-1} D / 2; the mean is
                preconditioned with the new precision. "improved_old": with the old one.
        """
        raise unwritten(self, 'move(self, lam, gradient, learning_rate, step="auto")')


# What the members share.


def check_step(step: str) -> str:
    """Raise ValueError for an unknown way to move."""
    if step not in STEPS:
        raise ValueError(f"step={step!r} is unknown; known: {', '.join(STEPS)}.")
    return step


def normals(
    key: Array, shape: tuple[int, ...], dtype: DTypeLike, antithetic: bool = False
) -> Float[Array, ...]:
    """Return standard normal numbers, followed by their mirror images when antithetic."""
    z = jax.random.normal(key, shape, dtype)
    return jnp.concatenate([z, -z]) if antithetic else z


def repeated(x: Array, antithetic: bool) -> Array:
    """Repeat x for the mirrored half of antithetic draws."""
    return jnp.concatenate([x, x]) if antithetic else x


def move_field(domain: Domain, x: Array, d: Array, step: str) -> Array:
    """x moved by d in its domain; under "auto" the retraction only where x + d would leave it."""
    retracted = domain.retract(x, d)
    if check_step(step) != "auto":
        return retracted
    inside = jnp.expand_dims(domain.contains(x + d), tuple(range(-domain.event_ndim, 0)))
    return jnp.where(inside, x + d, retracted)


def move_gaussian(family: Any, lam: NaturalParameters, d: PyTree, step: str) -> PyTree:
    """Move a Gaussian's lambda by d, see `ConditionalFamily.move`."""
    if check_step(step) == "auto":
        return family.safe_step(lam, d)[0]
    return family.retract(lam, d, form=step)


def hessian_diagonal(fun: Callable[[Array], Array], theta: Float[Array, " d"]) -> Array:
    """Return the diagonal of a Hessian, one Hessian-vector product per coordinate."""
    gradient = jax.grad(fun)

    def entry(j: Array) -> Array:
        e = jnp.zeros_like(theta).at[j].set(1.0)
        return jax.jvp(gradient, (theta,), (e,))[1][j]

    return jax.lax.map(entry, jnp.arange(theta.size))
