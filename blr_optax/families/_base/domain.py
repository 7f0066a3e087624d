"""Domains of natural parameters: what a field may be, and how it moves without leaving it.

For a coordinate x > 0 whose Fisher information is c / x^2, the geodesic step to second order is

    x  <-  x + d + d^2 / (2 x)                                   (Lin, Schmidt and Khan 2020)

which is at least x / 2 for any d; its matrix form is S + D + D S^{-1} D / 2. Both equal the plain
step x + d to first order.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from blr_optax._typing import DTypeLike

# Relative steps beyond this are cut, so that their square stays finite in float32.
LARGEST_RELATIVE_STEP = 1e9


@dataclasses.dataclass(frozen=True)
class Domain:
    """The set a field of natural parameters lives in.

    Attributes:
        event_ndim: 0 for numbers, 1 for vectors, 2 for symmetric matrices.
        sign: 0 for the whole line, +1 for above `bound`, -1 for below it; for matrices the
            sign of the eigenvalues.
        bound: the finite end of a half-line.
    """

    event_ndim: int = 0
    sign: int = 0
    bound: float = 0.0

    def contains(self, x: Float[Array, ...]) -> Bool[Array, ...]:
        """Whether x is finite and inside, for every batch element."""
        axes = tuple(range(-self.event_ndim, 0))
        inside = jnp.all(jnp.isfinite(x), axis=axes)
        if self.sign and self.event_ndim < 2:
            inside &= jnp.all(self.sign * (x - self.bound) > 0, axis=axes)
        elif self.sign:
            factor = jnp.linalg.cholesky(self.sign * jnp.where(jnp.isfinite(x), x, 0.0))
            inside &= jnp.all(jnp.isfinite(factor), axis=axes)
        return inside

    def sound(self, x: Float[Array, ...]) -> Bool[Array, ...]:
        """Whether x is inside by more than its rounding: a step from there can be made.

        Pivots of a matrix that are below one rounding of its diagonal have an accidental sign.
        """
        inside = self.contains(x)
        if self.sign and self.event_ndim == 2:
            s = self.sign * jnp.where(jnp.isfinite(x), x, 0.0)  # as in `contains`: one factor
            pivots, diagonal = (
                jnp.diagonal(y, axis1=-2, axis2=-1) for y in (jnp.linalg.cholesky(s), s)
            )
            least = jnp.finfo(x.dtype).eps * diagonal
            inside &= jnp.all(jnp.square(pivots) > least, axis=-1)
        return inside

    def retract(self, x: Float[Array, ...], d: Float[Array, ...]) -> Float[Array, ...]:
        """x + d to first order, inside for any finite d (see the head of this file)."""
        if not self.sign:
            return x + d
        if self.event_ndim == 2:
            return self.sign * _retract_matrix(self.sign * x, self.sign * d)
        s = self.sign * (x - self.bound)
        u = jnp.clip(self.sign * d / s, -LARGEST_RELATIVE_STEP, LARGEST_RELATIVE_STEP)
        # Half of the smallest distance from the bound would round to none.
        distance = jnp.maximum(s * (1.0 + u + 0.5 * u * u), self._smallest(x.dtype))
        return self.bound + self.sign * distance

    def _smallest(self, dtype: DTypeLike) -> float:
        """Return the smallest distance from the bound that a number of this type can have."""
        end = np.asarray(self.bound, dtype)
        beside = np.nextafter(end, np.asarray(self.bound + self.sign, dtype))
        return float(max(abs(beside - end), jnp.finfo(dtype).tiny))

    def inside(self, like: Float[Array, ...]) -> Float[Array, ...]:
        """Return some point inside, in the shape of `like`: where a solver may start."""
        if self.event_ndim == 2:
            return jnp.broadcast_to(
                self.sign * jnp.eye(like.shape[-1], dtype=like.dtype), like.shape
            )
        return jnp.full_like(like, self.bound + self.sign)


def _retract_matrix(s: Float[Array, "... d d"], d: Float[Array, "... d d"]) -> Array:
    """S + D + D S^{-1} D / 2, with D cut short where rounding would lose the eigenvalues of S."""
    root = jnp.linalg.cholesky(s)
    # Large steps in units of D, so that nothing overflows before they are cut.
    unit = jnp.max(jnp.abs(d), axis=(-2, -1), keepdims=True)
    unit = jax.lax.stop_gradient(jnp.clip(unit, 1.0, 0.25 / float(jnp.finfo(s.dtype).tiny)))
    half = jax.scipy.linalg.solve_triangular(root, d / unit, lower=True)
    relative = jax.scipy.linalg.solve_triangular(root, jnp.swapaxes(half, -1, -2), lower=True)
    largest = jnp.max(jnp.abs(relative), axis=(-2, -1), keepdims=True)
    cut = jnp.finfo(s.dtype).eps ** -0.25 / largest / unit

    def move(t: Any) -> Array:
        scaled = (t * unit) * half
        return s + t * d + 0.5 * jnp.swapaxes(scaled, -1, -2) @ scaled

    inside = positive_definite().sound(move(1.0))[..., None, None]
    # One move, not a choice of two: the one left out could have a derivative that is not finite.
    return move(jax.lax.stop_gradient(jnp.where(inside, 1.0, cut)))


def real(event_ndim: int = 0) -> Domain:
    """Any finite number, vector or matrix."""
    return Domain(event_ndim)


def positive(event_ndim: int = 0) -> Domain:
    """Numbers above zero."""
    return Domain(event_ndim, 1)


def negative(event_ndim: int = 0) -> Domain:
    """Numbers below zero."""
    return Domain(event_ndim, -1)


def above(bound: float, event_ndim: int = 0) -> Domain:
    """Numbers above `bound`, such as -1 for the shape of a gamma density."""
    return Domain(event_ndim, 1, bound)


def positive_definite() -> Domain:
    """Symmetric matrices with positive eigenvalues."""
    return Domain(2, 1)


def negative_definite() -> Domain:
    """Symmetric matrices with negative eigenvalues."""
    return Domain(2, -1)
