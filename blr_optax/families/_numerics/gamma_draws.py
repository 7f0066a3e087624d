"""Gamma draws in log space, with the implicit derivative in the concentration that they carry.

A sample at a fixed quantile u of F(x; a) moves with a as dx = -(dF / da) / q(x): a power series
below the mean, else an integral whose integrand has one sign. Both are ordinary functions of x, so
that they can be differentiated again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import _loops
from blr_optax.families._numerics.special import NEAR, excess_near, log_minus_digamma

if TYPE_CHECKING:
    from jaxtyping import Array, Float

SERIES_BELOW = 8.0  # concentrations below this have a power series below their mean
SERIES_TERMS = 45
REACH = 36.0  # the gamma integral ends where its integrand has fallen by exp(-REACH)
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
_NODES, _WEIGHTS = 0.5 * (_NODES + 1.0), 0.5 * _WEIGHTS


def _lower_slope(a: Array, x: Array, centre: Array) -> Float[Array, ...]:
    """d log x / da from the series F = x^a e^{-x} / Gamma(a + 1) sum_n x^n / (a + 1)_n."""

    def back(step: Array, carry: Any) -> Any:
        total, slope = carry  # of the sum from its n-th term on, relative to that term
        n = SERIES_TERMS - step
        ratio = x / (a + n)
        return 1.0 + ratio * total, ratio * (slope - total / (a + n))

    start = (jnp.ones_like(x), jnp.zeros_like(x))
    total, slope = _loops.fori_loop(0, SERIES_TERMS, back, start)
    return -(total * (centre - 1.0 / a) + slope) / a


def _middle_slope(a: Array, x: Array, centre: Array) -> Float[Array, ...]:
    """d log x / da from dF / da, the integral of (log t - psi(a)) q(t) over t < x or t > x.

    With t = x e^v the integrand beside q(x) x is (log x + v - psi(a)) exp(a v - x (e^v - 1)), and
    on the side away from the mean it has one sign: nothing cancels, however large a is.
    """
    d = x - a
    above, h = d > 0, jnp.abs(d)
    # Bounds of the v where the exponent is -REACH; above the mean, one that e^v soon tightens.
    high = 2.0 * REACH / (h + jnp.sqrt(h * h + 2.0 * a * REACH))
    for _ in range(2):
        high = jnp.minimum(high, jnp.log1p((REACH + a * high) / x))
    p = 2.0 * h - REACH
    low = -4.0 * REACH / (p + jnp.sqrt(p * p + 8.0 * a * REACH))
    end = jax.lax.stop_gradient(jnp.where(above, high, low))[..., None]
    v = end * jnp.asarray(_NODES, x.dtype)
    y = jnp.expm1(v)
    near = jnp.abs(y) < NEAR
    bend = jnp.where(near, excess_near(jnp.where(near, y, 0.0)), y - v)
    inside = jnp.exp(-a[..., None] * bend - d[..., None] * y)
    return jnp.sum(end * jnp.asarray(_WEIGHTS, x.dtype) * inside * (centre[..., None] + v), -1)


def gamma_slope(a: Float[Array, ...], log_x: Float[Array, ...]) -> Float[Array, ...]:
    """d log x / da of a gamma variable x of rate one at a fixed quantile."""
    x = jnp.exp(log_x)
    beside = jnp.abs(x - a) < NEAR * a
    relative = jnp.where(beside, x - a, 0.0) / a
    log_ratio = jnp.where(beside, jnp.log1p(relative), log_x - jnp.log(a))
    centre = log_ratio + log_minus_digamma(a)  # log x - psi(a)
    low = (a < SERIES_BELOW) & (log_x < jnp.log(jnp.maximum(a, 1.0)))
    lower = _lower_slope(jnp.where(low, a, 1.0), jnp.where(low, x, 0.0), centre)
    middle = _middle_slope(jnp.where(low, 1.0, a), jnp.where(low, 1.0, x), centre)
    return jnp.where(low, lower, middle)


@jax.custom_jvp
def _follow_gamma(a: Float[Array, ...], log_x: Float[Array, ...]) -> Float[Array, ...]:
    """log x, as a function of the concentration at a fixed quantile."""
    return log_x


@_follow_gamma.defjvp
def _(primals: Any, tangents: Any) -> Any:
    log_x = _follow_gamma(*primals)
    return log_x, gamma_slope(primals[0], log_x) * tangents[0]


def gamma_log_draw(
    key: Array, a: Float[Array, ...], shape: tuple[int, ...] = ()
) -> tuple[Array, Array, Array]:
    """Gamma draws of rate one as (g, c, log x): x = g e^c, where c keeps it from underflowing.

    Only log x carries the derivative in the concentration; for large ones g has more digits.
    """
    frozen = jax.lax.stop_gradient(a)
    key, key_power = jax.random.split(_loops.key_for(key, frozen))
    # For a < 1, x = g u^{1 / a} with g of concentration a + 1 and u uniform (Marsaglia and Tsang).
    small = frozen < 1.0
    g = jax.random.gamma(key, jnp.where(small, frozen + 1.0, frozen), shape + a.shape, a.dtype)
    g = jnp.maximum(g, jnp.finfo(a.dtype).tiny)
    power = jax.random.exponential(key_power, shape + a.shape, a.dtype)
    c = jnp.where(small, -power / frozen, 0.0)
    return g, c, _follow_gamma(jnp.broadcast_to(a, g.shape), jnp.log(g) + c)


def following(value: Float[Array, ...], log_value: Float[Array, ...]) -> Float[Array, ...]:
    """Return the value, with the derivatives of exp(log_value), which may have fewer digits."""
    still = jax.lax.stop_gradient
    return still(value) * jnp.exp(log_value - still(log_value))
