"""The second, smaller base: densities that are no exponential family but have one inside.

    q(theta) = integral of q(w) q(theta | w) over a hidden w

A mixture hides its component, a Student-t its scale, a skew Gaussian its shift; a matrix Gaussian
is one in each of its factors. The joint q(w, theta) is a minimal conditional exponential family:
its Fisher matrix is block-diagonal, and each block has a natural gradient in closed form (Lin, Khan
and Schmidt 2019). With the total potential E,

    L(q) = E_q[E(theta)] - H(q)              E = ess * mean loss - log prior
    lambda_b  <-  lambda_b - rho * (natural gradient of L in block b)

There is no arithmetic of natural parameters and no map from mu to lambda: the product of two
members is no member. What learns calls two methods,

    value, gradient = family.natural_gradient(key, lam, E, samples)         value = E_q[E]
    lam = family.move(lam, gradient, rho)                                   inside for any rho
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from blr_optax.families._base.domain import Domain
from blr_optax.families._base.family import Density

if TYPE_CHECKING:
    from jaxtyping import Array, Float

FORMS = ("auto", "improved", "improved_old")


@dataclasses.dataclass(frozen=True)
class Conditional(Density):
    """Base of the conditional families; see the head of this file.

    A subclass defines what every family has (`natural`, `standard`, `sample`, `log_prob`, `mean`,
    `variance`, `in_domain`), and `noise`, `natural_gradient_at` and `move`.
    Densities, samples and moments take any leading batch dimensions; natural gradients and moves
    are of one member (`jax.vmap` for more).

    Attributes:
        hessians: the curvatures that `natural_gradient` knows.
        at_means: whether the delta method makes sense: looking at the means only.
    """

    event_ndim: ClassVar[int] = 1
    conditional: ClassVar[bool] = True
    hessians: ClassVar[tuple[str, ...]] = ("exact", "reparameterized")
    at_means: ClassVar[bool] = False

    # How it learns.

    def noise(self, key: Array, lam: Any, samples: int, antithetic: bool = False) -> Any:
        """What `natural_gradient_at` turns into draws: a tree with a leading axis of samples."""
        raise NotImplementedError

    def natural_gradient_at(
        self, lam: Any, loss: Callable, noise: Any, weights: Array, hessian: str = "exact"
    ) -> tuple[Array, Any]:
        """`natural_gradient` from given noise and its weights (a quadrature rule, a recording)."""
        raise NotImplementedError

    def move(self, lam: Any, gradient: Any, learning_rate: Any, form: str = "auto") -> Any:
        """lambda - rho * gradient to first order, inside the domain for any rho.

        Args:
            lam: natural parameters.
            gradient: from `natural_gradient`.
            learning_rate: rho.
            form: how a precision moves by D. "auto" is S + D where that stays positive, else
                "improved", the second-order step S + D + D S^{-1} D / 2; the mean is
                preconditioned with the new precision. "improved_old": with the old one.
        """
        raise NotImplementedError

    def natural_gradient(
        self,
        key: Array | None,
        lam: Any,
        loss: Callable[[Array], Array],
        samples: int = 10,
        *,
        hessian: str = "exact",
        delta: bool = False,
        antithetic: bool = False,
    ) -> tuple[Array, Any]:
        """E_q[loss] and the natural gradient of E_q[loss] - H(q), block by block.

        Args:
            key: a typed key; None with `delta`.
            lam: natural parameters.
            loss: `loss(theta) -> number`, the total potential, prior included.
            samples: draws of q; of every component for a mixture.
            hessian: "exact", by automatic differentiation (Price's form); "reparameterized",
                S (theta - m) grad^T symmetrised, from gradients alone and right for piecewise
                linear networks; "squared_gradient", grad grad^T, where the family has it.
            delta: look at the means only, where the family allows it.
            antithetic: look at the mirror images of the draws as well.

        Raises:
            ValueError: for options that the family does not have.
        """
        name = type(self).__name__
        if hessian not in self.hessians:
            known = ", ".join(self.hessians)
            raise ValueError(f"{name}: hessian={hessian!r} is unknown; known: {known}.")
        if delta and not self.at_means:
            raise ValueError(
                f"{name}: delta=True would never look away from the mean, which says nothing about "
                "the shape of the density; use samples."
            )
        if delta and hessian == "reparameterized":
            raise ValueError(
                "hessian='reparameterized' needs displacements from the mean, which delta=True "
                "does not have; use 'exact'."
            )
        if samples < 1:
            raise ValueError(f"{name}: samples={samples} must be at least 1.")
        if delta:
            like = jax.eval_shape(lambda: self.noise(jax.random.key(0), lam, 1))
            noise = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        elif key is None:
            raise ValueError(f"{name}: natural_gradient draws samples; pass a typed key, not None.")
        else:
            noise = self.noise(key, lam, samples, antithetic)
        leaf = jax.tree.leaves(noise)[0]
        weights = jnp.full(leaf.shape[0], 1.0 / leaf.shape[0], leaf.dtype)
        return self.natural_gradient_at(lam, loss, noise, weights, hessian)

    def step(
        self,
        key: Array | None,
        lam: Any,
        loss: Callable[[Array], Array],
        learning_rate: Any,
        samples: int = 10,
        *,
        form: str = "auto",
        **options: Any,
    ) -> tuple[Array, Any]:
        """`natural_gradient` and `move`: (E_q[loss] before the step, the new lambda)."""
        value, gradient = self.natural_gradient(key, lam, loss, samples, **options)
        return value, self.move(lam, gradient, learning_rate, form=form)


# What the members share.


def check_form(form: str) -> str:
    """Raises ValueError for an unknown way to move."""
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; known: {', '.join(FORMS)}.")
    return form


def normals(
    key: Array, shape: tuple[int, ...], dtype: Any, antithetic: bool = False
) -> Float[Array, ...]:
    """Standard normal numbers, followed by their mirror images when antithetic."""
    z = jax.random.normal(key, shape, dtype)
    return jnp.concatenate([z, -z]) if antithetic else z


def repeated(x: Array, antithetic: bool) -> Array:
    """What goes with `normals` and has no mirror image."""
    return jnp.concatenate([x, x]) if antithetic else x


def move_field(domain: Domain, x: Array, d: Array, form: str) -> Array:
    """x moved by d in its domain; under "auto" the retraction only where x + d would leave it."""
    retracted = domain.retract(x, d)
    if check_form(form) != "auto":
        return retracted
    inside = jnp.expand_dims(domain.contains(x + d), tuple(range(-domain.event_ndim, 0)))
    return jnp.where(inside, x + d, retracted)


def move_gaussian(family: Any, lam: Any, step: Any, form: str) -> Any:
    """A Gaussian's lambda moved by a step, see `Conditional.move`."""
    if check_form(form) == "auto":
        return family.safe_step(lam, step)[0]
    return family.retract(lam, step, form=form)


def hessian_diagonal(fun: Callable[[Array], Array], theta: Float[Array, " d"]) -> Array:
    """The diagonal of a Hessian, one Hessian-vector product per coordinate."""
    gradient = jax.grad(fun)

    def entry(j: Array) -> Array:
        e = jnp.zeros_like(theta).at[j].set(1.0)
        return jax.jvp(gradient, (theta,), (e,))[1][j]

    return jax.lax.map(entry, jnp.arange(theta.size))
