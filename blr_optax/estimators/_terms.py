"""Losses that are sums of terms, so that each is treated as exactly as it allows.

    conjugate(natural)              -<natural, T(theta)>: its natural gradient is -natural, exactly
    glm(features, pointwise_loss)   mean_n l_n(x_n . theta): one-dimensional quadrature per example
    any function(theta, *batch)     the estimator's business

Conjugate terms bypass sampling; with the rule's step this is conjugate-computation variational
inference (Khan and Lin 2017).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from blr_optax.estimators._quadrature import hermite_rule

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax._typing import Loss, NaturalParameters, PyTree
    from blr_optax.families import ExponentialFamily


class Term:
    """A part of a loss; `+` with another term or a function makes a sum."""

    def __add__(self, other: Any) -> Sum:
        """Add two terms."""
        return Sum((*terms(self), *terms(other)))

    def __radd__(self, other: Any) -> Sum:
        """Add a function and a term."""
        return Sum((*terms(other), *terms(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Term):
    """A sum of terms and functions."""

    parts: tuple[PyTree, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Conjugate(Term):
    """-<natural, T(theta)>; see `conjugate`."""

    natural: NaturalParameters

    def natural_gradient(
        self, family: ExponentialFamily, lam: NaturalParameters, batch: tuple
    ) -> tuple[Array, NaturalParameters]:
        """(E_q[l], grad_mu E_q[l]) = (-<natural, mu>, -natural)."""
        value = -jnp.sum(family.inner(self.natural, family.expectation(lam)))
        return value, family.combine((0.0, lam), (-1.0, self.natural))


@dataclasses.dataclass(frozen=True, eq=False)
class GLM(Term):
    """mean_n l_n(x_n . theta); see `glm`."""

    features: Array | Callable[..., Array]
    pointwise_loss: Callable[..., Array]
    order: int

    def natural_gradient(
        self, family: Any, lam: NaturalParameters, batch: tuple
    ) -> tuple[Array, NaturalParameters]:
        """Exact up to the quadrature of N one-dimensional Gaussians f_n ~ N(x_n m, x_n V x_n)."""
        x = self.matrix(batch)
        n = x.shape[0]
        mean, unravel = jax.flatten_util.ravel_pytree(family.mean(lam))
        if family.curvature == "diagonal":
            variance = jax.flatten_util.ravel_pytree(family.variance(lam))[0]
            spread = jnp.sqrt((x * x) @ variance)
        else:
            # L^{-T} z has the covariance of q, so the rows of X L^{-T} have the wanted norms.
            columns = jax.vmap(
                lambda e: jax.flatten_util.ravel_pytree(family.displace(lam, unravel(e)))[0]
            )(jnp.eye(mean.size, dtype=mean.dtype))
            spread = jnp.linalg.norm(x @ columns.T, axis=-1)
        z, w = (jnp.asarray(a, mean.dtype) for a in hermite_rule(self.order))

        def at(z: Array) -> tuple[Array, Array, Array]:
            f = x @ mean + spread * z
            slope = jax.grad(lambda f: jnp.sum(self.pointwise_loss(f, *batch)))
            first, second = jax.jvp(slope, (f,), (jnp.ones_like(f),))
            return self.pointwise_loss(f, *batch), first, second

        value, first, second = (jnp.tensordot(w, v, 1) for v in jax.vmap(at)(z))
        g = unravel(x.T @ first / n)
        if family.curvature == "diagonal":
            h = unravel((x * x).T @ second / n)
        else:
            h = (x.T * second) @ x / n
        return jnp.mean(value), family.gradient(lam, g, h)

    def matrix(self, batch: tuple) -> Array:
        """X."""
        return self.features(*batch) if callable(self.features) else jnp.asarray(self.features)

    def size(self, batch: tuple) -> int:
        """Return the number of examples."""
        return self.matrix(batch).shape[0]

    def per_example(
        self, theta: PyTree, batch: tuple, weights: PyTree, true_labels: bool = False
    ) -> dict[str, PyTree]:
        """All statistics of `per_example` at a point: g_n = l_n' x_n, and l_n'' x_n x_n^T.

        With the true labels the factor of the outputs holds l_n'^2 in place of l_n''.
        """
        x = self.matrix(batch)
        flat, unravel = jax.flatten_util.ravel_pytree(theta)
        f, c = x @ flat, jnp.ones(x.shape[0], x.dtype) if weights is None else weights
        slope = jax.grad(lambda f: jnp.sum(self.pointwise_loss(f, *batch)))
        first, second = jax.jvp(slope, (f,), (jnp.ones_like(f),))
        n, outer = jnp.sum(c), first**2 if true_labels else second
        return {
            "value": c @ self.pointwise_loss(f, *batch) / n,
            "grad": unravel(x.T @ (c * first) / n),
            "sum_squares": unravel((x * x).T @ (c * first**2)),
            "norms": jnp.abs(first) * jnp.linalg.norm(x, axis=1),
            "ggn_diagonal": unravel((x * x).T @ (c * second)),
            "factors": ((x.T * c) @ x / n, c @ x / n, jnp.sum(c * outer)[None, None]),
        }


def terms(loss: Loss | Term) -> tuple[PyTree, ...]:
    """Return the parts of a loss: terms and plain functions.

    Raises:
        ValueError: for something that is neither.
    """
    if isinstance(loss, Sum):
        return loss.parts
    if isinstance(loss, Term) or callable(loss):
        return (loss,)
    raise ValueError(
        f"loss must be a function loss(theta, *batch), a term (conjugate, glm), or a sum of "
        f"them; got {type(loss).__name__}."
    )


def conjugate(natural: NaturalParameters) -> Conjugate:
    """Return a loss that is linear in the sufficient statistics: l(theta) = -<natural, T(theta)>.

    Its natural gradient is -natural at every q, so at learning rate 1 one step is Bayes' rule.

    Args:
        natural: natural parameters of the likelihood, of the family's natural type (per example of
            the mean loss: the rule multiplies by `ess`).

    Source: Khan and Lin (2017); Khan and Rue (2023), Sec. 5.1. Special case of `blr_update` with
    `loss=conjugate(natural), learning_rate=1.0`: conjugate Bayes.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> normal = blr.families.get("normal")
      >>> site = normal.natural(mean=2.0, precision=3.0)
      >>> value, gradient = blr.estimators.natural_gradient(
      ...     "normal", blr.estimators.conjugate(site)
      ... )(None, normal.natural(mean=0.0, precision=1.0))
      >>> print(gradient.linear)
      -6.0
    """
    return Conjugate(natural)


def glm(
    features: Array | Callable[..., Array],
    pointwise_loss: Callable[..., Float[Array, " n"]],
    order: int = 32,
) -> GLM:
    """Return a generalised linear model's mean loss: l(theta) = mean_n l_n(x_n . theta).

    Under a Gaussian q every f_n = x_n . theta is a one-dimensional Gaussian, so Gauss-Hermite
    quadrature gives grad_m = X^T E[l'] / n and H = X^T diag(E[l'']) X / n without sampling.

    Args:
        features: X [n, d], or a function of the batch that returns it; d counts the numbers of
            theta in the order of `jax.flatten_util.ravel_pytree`.
        pointwise_loss: f [n] (and the batch) -> losses [n], elementwise in f, twice differentiable.
        order: nodes; 20 to 40 are fine for a logistic loss unless the variance of f is beyond 50.

    Raises:
        ValueError: for order < 1.

    Source: Khan and Lin (2017). Special case of `blr_update` with
    `loss=glm(X, l)`: variational Newton for GLMs.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> loss = blr.estimators.glm(jnp.eye(2), lambda f: 0.5 * (f - 1.0) ** 2)
      >>> lam = blr.families.get("gaussian").natural(mean=jnp.zeros(2), precision=jnp.eye(2))
      >>> print(blr.estimators.natural_gradient("gaussian", loss)(None, lam)[0].round(5))
      1.0
    """
    if order < 1:
        raise ValueError(f"glm: order={order} must be at least 1.")
    return GLM(features, pointwise_loss, order)
