"""Quantiles of a number from its distribution function, by bisection over floating-point numbers.

The floats of a sign, read as integers, are in order; so 32 halvings of an interval of integers
(64 in float64) find the smallest float x with F(x) >= p, whatever its scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import NaturalParameters


class GaussianMarginals:
    """What families have whose coordinates are normal, each alone."""

    mean: Callable[..., Array]
    variance: Callable[..., Array]

    def cdf(self, lam: NaturalParameters, theta: Array) -> Array:
        """Return Phi((theta - m) / s)."""
        return ndtr((theta - self.mean(lam)) / jnp.sqrt(self.variance(lam)))

    def quantile(self, lam: NaturalParameters, p: Array) -> Array:
        """Return m + s Phi^-1(p)."""
        return self.mean(lam) + jnp.sqrt(self.variance(lam)) * ndtri(p)


ENDS = {"real": (-np.inf, np.inf), "positive": (0.0, np.inf), "unit": (0.0, 1.0)}


def ordinal(x: Array) -> Array:
    """Return the integer of a float; larger floats have larger ones."""
    width = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[x.dtype.itemsize]
    i = jax.lax.bitcast_convert_type(x, width)
    return jnp.where(i < 0, jnp.iinfo(width).min - i, i)


def from_ordinal(i: Array, dtype: jnp.dtype) -> Array:
    """Return the float of an integer."""
    return jax.lax.bitcast_convert_type(jnp.where(i < 0, jnp.iinfo(i.dtype).min - i, i), dtype)


def quantile(cdf: Callable[[Array], Array], p: Array, support: str) -> Array:
    """Return the smallest x with cdf(x) >= p, of the shape of p; NaN for p outside [0, 1].

    Its derivatives are those of the implicit function F(x) = p.

    Args:
        cdf: the distribution function, elementwise, of arrays shaped like p.
        p: probabilities, float32 or float64.
        support: "real", "positive" or "unit".
    """
    ends = [jnp.asarray(end, p.dtype) for end in ENDS[support]]
    # Between the ends: subnormal numbers are zeros to XLA.
    info = jnp.finfo(p.dtype)
    inside = {"real": (info.min, info.max), "positive": (info.tiny, info.max)}
    low, high = inside.get(support, (info.tiny, 1.0 - 0.5 * info.eps))
    lo, hi = (ordinal(jnp.full(p.shape, end, p.dtype)) for end in (low, high))

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        lo, hi = ends
        middle = (lo >> 1) + (hi >> 1) + (lo & hi & 1)
        reached = cdf(from_ordinal(middle, p.dtype)) >= p
        return jnp.where(reached, lo, middle), jnp.where(reached, middle, hi)

    _, hi = jax.lax.fori_loop(0, 8 * p.dtype.itemsize, halve, (lo, hi))
    x = jax.lax.stop_gradient(from_ordinal(hi, p.dtype))
    slope = jax.jvp(cdf, (x,), (jnp.ones_like(x),))[1]  # of every number alone
    density = jax.lax.stop_gradient(slope)
    step = (p - cdf(x)) / jnp.where((density > 0) & jnp.isfinite(density), density, jnp.inf)
    x = x + (step - jax.lax.stop_gradient(step))
    x = jnp.where(p <= 0, ends[0], jnp.where(p >= 1, ends[1], x))
    return jnp.where((p >= 0) & (p <= 1), x, jnp.nan)
