"""Special functions as families need them: free of cancellation, differentiable twice.

    log Gamma(a) = (a - 1/2) log a - a + log(2 pi) / 2 + r(a)          Stirling's remainder r
    psi(a)       = log a - l(a),    l(a) = 1 / (2 a) - r'(a)           log minus digamma

For large a everything that a density needs is small beside log Gamma(a) itself, so entropies and
divergences are written in r and l. Both are short series in 1 / a for large a and are brought there
by their recurrences; as much of both as the precision of a asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from blr_optax import _loops

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import DTypeLike

LOG_2PI = float(np.log(2.0 * np.pi))
NEAR = 0.3  # relative changes below which differences are summed without cancellation
# r(a) = sum_k c_k a^{-1 - 2 k} from a small a on: Stirling's c_k = B_2k / (2k (2k - 1)) of an
# asymptotic series, changed so that the third derivative is interpolated at Chebyshev's nodes.
_STIRLING_SINGLE = (
    0.08333333258439031,
    -0.002777739010188822,
    0.0007926679861856663,
    -0.00058063131150268,
    0.000700232785705362,
    -0.000939191908787746,
    0.000974444136780102,
    -0.0005133214836440447,
)
_STIRLING_DOUBLE = (
    0.08333333333333333,
    -0.0027777777777753055,
    0.0007936507930095578,
    -0.0005952379988892357,
    0.0008417415306567195,
    -0.0019169097780155466,
    0.006380977510452392,
    -0.028525083529440234,
    0.15241230457059274,
    -0.8274619510693111,
    3.8044755229349065,
    -12.11591796155246,
    19.089656524201086,
)
# From where that holds, the coefficients, and nodes of the quadrature for divergences.
_SINGLE, _DOUBLE = (2, _STIRLING_SINGLE, 4), (4, _STIRLING_DOUBLE, 7)


def floating(x: ArrayLike) -> Array:
    """Return numbers as floating ones: products of integers of few bits would wrap."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)


def _single(dtype: DTypeLike) -> bool:
    return jnp.finfo(dtype).bits <= 32


def _effort(dtype: DTypeLike) -> tuple[int, tuple[float, ...], int]:
    return _SINGLE if _single(dtype) else _DOUBLE


def _atanh_excess(y: Float[Array, ...]) -> Float[Array, ...]:
    """2 atanh(y) / y - 2 where log((1 + y) / (1 - y)) is below NEAR."""
    z = y * y
    last = 9 if _single(y.dtype) else 21
    series = [2 / k for k in range(last, 1, -2)]
    return z * jnp.polyval(jnp.array(series, z.dtype), z, unroll=16)


def excess_near(x: Float[Array, ...]) -> Float[Array, ...]:
    """x - log(1 + x) for |x| < NEAR, to the last digit."""
    # log(1 + x) = 2 atanh(y) with 2 y = x - x y, so that the leading terms cancel on paper.
    y = x / (2.0 + x)
    return y * (x - _atanh_excess(y))


def relative_excess(
    a: Array,
    b: Array | float,
    log_ratio: Array | float | None = None,
    difference: Array | None = None,
) -> Float[Array, ...]:
    """b / a - 1 - log(b / a) for positive a and b: at least zero, to the last digit.

    `log_ratio` and `difference` are log(b / a) and b - a, where they are known to more digits.
    """
    # As above with x = b / a - 1.
    d = b - a if difference is None else difference
    near = jnp.abs(d) < NEAR * a
    y = jnp.where(near, d / (b + a), 0.0)
    log_ratio = jnp.log(b / a) if log_ratio is None else log_ratio
    return jnp.where(near, y, 1.0) * (d / a - jnp.where(near, _atanh_excess(y), log_ratio))


@jax.custom_jvp
def log_power(k: Float[Array, ...], x: Float[Array, ...]) -> Float[Array, ...]:
    """log x^k for x >= 0, with 0^0 = 1: zero where k is, also at x = 0."""
    return jnp.where(k == 0, 0.0, k * jnp.log(x))


@functools.partial(log_power.defjvp, symbolic_zeros=True)
def _(primals: Any, tangents: Any) -> Any:
    (k, x), (dk, dx) = primals, tangents
    change = jnp.zeros(jnp.broadcast_shapes(jnp.shape(k), jnp.shape(x)), jnp.result_type(k, x))
    if not isinstance(dk, SymbolicZero):
        change += dk * jnp.log(x)
    if not isinstance(dx, SymbolicZero):
        flat = k == 0
        change += dx * jnp.where(flat, 0.0, k / jnp.where(flat, 1.0, x))
    return log_power(k, x), change


def _recurrence(
    a: Float[Array, ...],
    coefficients: Callable[[int, float], float],
    power: int,
    term: Callable[[Array], Array],
) -> Float[Array, ...]:
    """f with f(a) = f(a + 1) + term(a), and f(a) = sum_k coefficients(k, c_k) a^{-power - 2 k}."""
    a = jnp.asarray(a)
    shift, stirling_coefficients, _ = _effort(a.dtype)
    small = a < shift
    low = jnp.where(small, a, 1.0)
    steps = sum(term(low + k) for k in range(shift))
    x = 1.0 / jnp.where(small, a + shift, a)
    series = [coefficients(k, c) for k, c in enumerate(stirling_coefficients)]
    tail = jnp.polyval(jnp.array(series[::-1], x.dtype), x * x, unroll=16)
    return tail * x**power + jnp.where(small, steps, 0.0)


@jax.custom_jvp
def stirling(a: Float[Array, ...]) -> Float[Array, ...]:
    """r(a) = log Gamma(a) - (a - 1/2) log a + a - log(2 pi) / 2 for a > 0."""

    def term(x: Array) -> Array:
        return (x + 0.5) * jnp.log1p(1.0 / x) - 1.0

    return _recurrence(a, lambda k, c: c, 1, term)


@jax.custom_jvp
def stirling_slope(a: Float[Array, ...]) -> Float[Array, ...]:
    """r'(a), below zero."""

    def term(x: Array) -> Array:
        return jnp.log1p(1.0 / x) - (x + 0.5) / (x * (x + 1.0))

    return _recurrence(a, lambda k, c: -(2 * k + 1) * c, 2, term)


@jax.custom_jvp
def stirling_curvature(a: Float[Array, ...]) -> Float[Array, ...]:
    """r''(a) = sum_k 1 / (2 (a + k)^2 (a + k + 1)^2), above zero."""

    def term(x: Array) -> Array:
        return 0.5 / jnp.square(x * (x + 1.0))

    return _recurrence(a, lambda k, c: (2 * k + 1) * (2 * k + 2) * c, 3, term)


def _stirling_third(a: Float[Array, ...]) -> Float[Array, ...]:
    """r'''(a), below zero."""

    def term(x: Array) -> Array:
        return -(2.0 * x + 1.0) / (x * (x + 1.0)) ** 3

    return _recurrence(a, lambda k, c: -(2 * k + 1) * (2 * k + 2) * (2 * k + 3) * c, 4, term)


# Each is the derivative of the one before: graphs of derivatives stay as small as the functions.
stirling.defjvp(lambda primal, tangent: (stirling(*primal), tangent[0] * stirling_slope(*primal)))
stirling_slope.defjvp(
    lambda primal, tangent: (stirling_slope(*primal), tangent[0] * stirling_curvature(*primal))
)
stirling_curvature.defjvp(
    lambda primal, tangent: (stirling_curvature(*primal), tangent[0] * _stirling_third(*primal))
)


def _mean_between(f: Callable[[float], Array], dtype: DTypeLike) -> Array:
    """Return the integral from 0 to 1 of an f that changes by a few percent, by Gauss's rule."""
    nodes, weights = np.polynomial.legendre.leggauss(2 if _single(dtype) else 5)
    points = zip(nodes, weights, strict=True)
    return jnp.asarray(sum(float(0.5 * w) * f(float(0.5 * (t + 1.0))) for t, w in points))


@jax.custom_jvp
def stirling_slope_change(a: Array, b: Array, d: Array) -> Float[Array, ...]:
    """r'(b) - r'(a) with b = a + d, to the digits of d >= 0 where that is small beside a."""
    near = d < 0.05 * a
    step = jnp.where(near, d, 0.0)
    bend = _mean_between(lambda t: stirling_curvature(a + t * step), jnp.result_type(d))
    return jnp.where(near, bend * step, stirling_slope(b) - stirling_slope(a))


@stirling_slope_change.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (a, b, _), (ta, tb, _) = primals, tangents
    slope = stirling_curvature(b) * tb - stirling_curvature(a) * ta
    return stirling_slope_change(*primals), slope


def log_gamma(a: Float[Array, ...]) -> Float[Array, ...]:
    """log Gamma(a) for a > 0, to a few units of rounding of its largest term."""
    return (a - 0.5) * jnp.log(a) - a + 0.5 * LOG_2PI + stirling(a)


def log_minus_digamma(a: Float[Array, ...]) -> Float[Array, ...]:
    """l(a) = log a - psi(a) for a > 0: about 1 / (2 a) when large and 1 / a when small."""
    return 0.5 / a - stirling_slope(a)


def digamma(a: Float[Array, ...]) -> Float[Array, ...]:
    """psi(a) for a > 0."""
    return jnp.log(a) - log_minus_digamma(a)


def _curved(a: Float[Array, ...]) -> Float[Array, ...]:
    """-l'(a), the second derivative of log Gamma(a) - a log a + a."""
    return 0.5 / (a * a) + stirling_curvature(a)


@jax.custom_jvp
def stirling_divergence(a: Float[Array, ...], b: Float[Array, ...]) -> Float[Array, ...]:
    """f(b) - f(a) - f'(a) (b - a) of f = log Gamma(a) - a log a + a: what is left of log Gamma's.

    The Bregman divergence of log Gamma itself is this plus that of a log a - a, which is
    b (a / b - 1 - log(a / b)) and combines with other terms of a KL divergence before rounding.
    """
    d = b - a
    near = jnp.abs(d) < NEAR * a
    step = jnp.where(near, d, 0.0)
    # The remainder's divergence is the integral of (1 - t) r''(a + t d) d^2 over t from 0 to 1.
    nodes, weights = np.polynomial.legendre.leggauss(_effort(d.dtype)[2])
    t, w = 0.5 * (nodes + 1.0), 0.5 * weights
    bends = sum(
        float(w_k * (1.0 - t_k)) * stirling_curvature(a + float(t_k) * step)
        for t_k, w_k in zip(t, w, strict=True)
    )
    far = stirling(b) - stirling(a) - stirling_slope(a) * d
    return 0.5 * relative_excess(a, b) + jnp.where(near, bends * step * step, far)


def _divergence_slope(a: Array, b: Array, da: Array, db: Array) -> Array:
    """Return the derivative of `stirling_divergence` along (da, db)."""
    slope_b = log_minus_digamma(a) - log_minus_digamma(b)
    return slope_b * db - _curved(a) * (b - a) * da


@stirling_divergence.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return stirling_divergence(*primals), _divergence_slope(*primals, *tangents)


@jax.custom_jvp
def divergence_change(a: Array, b: Array, da: Array, db: Array) -> Float[Array, ...]:
    """`stirling_divergence` at (a + da, b + db) minus that at (a, b), for small steps >= 0."""
    return _mean_between(
        lambda t: _divergence_slope(a + t * da, b + t * db, da, db), jnp.result_type(a)
    )


@divergence_change.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (a, b, da, db), (ta, tb, tda, tdb) = primals, tangents
    moved = _divergence_slope(a + da, b + db, ta + tda, tb + tdb)
    return divergence_change(*primals), moved - _divergence_slope(a, b, ta, tb)


@jax.custom_jvp
def inverse_log_minus_digamma(gap: Float[Array, ...]) -> Float[Array, ...]:
    """Return the a > 0 with log a - psi(a) = gap, for gap > 0."""
    # Minka's approximation, then Newton in log a on log l: both ends are straight lines there.
    a = (3.0 - gap + jnp.sqrt((gap - 3.0) ** 2 + 24.0 * gap)) / (12.0 * gap)
    a = jnp.where(gap > 50.0, 1.0 / gap, a)
    for _ in range(6):
        miss = log_minus_digamma(a)
        slope = -a * _curved(a) / miss
        a = a * jnp.exp(jnp.clip(-jnp.log(miss / gap) / slope, -2.0, 2.0))
    return a


@inverse_log_minus_digamma.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (gap,), (dgap,) = primals, tangents
    a = inverse_log_minus_digamma(gap)
    return a, -dgap / _curved(a)


@jax.custom_jvp
def inverse_digamma(y: Float[Array, ...]) -> Float[Array, ...]:
    """Return the a > 0 with psi(a) = y."""
    # Minka's start; psi is concave, so Newton in log a never overshoots by much.
    low, high = jnp.minimum(y, -2.2), jnp.maximum(y, -2.2)
    a = jnp.where(y > -2.2, jnp.exp(high) + 0.5, -1.0 / (low + np.euler_gamma))
    for _ in range(6):
        slope = 1.0 / a + _curved(a)
        a = a * jnp.exp(jnp.clip((y - digamma(a)) / (a * slope), -2.0, 2.0))
    return a


@inverse_digamma.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (y,), (dy,) = primals, tangents
    a = inverse_digamma(y)
    return a, dy / (1.0 / a + _curved(a))


@jax.custom_jvp
def scaled_exp1(x: Float[Array, ...]) -> Float[Array, ...]:
    """exp(x) E_1(x) for x > 0, which does not underflow."""
    small = x < 1.5
    low = jnp.where(small, x, 1.0)
    # E_1(x) = -euler - log x - sum_k (-x)^k / (k k!)
    series, power = -np.euler_gamma - jnp.log(low), jnp.ones_like(low)
    for k in range(1, 25):
        power = power * (-low) / k
        series = series - power / k
    # Its continued fraction x + 1 - 1 / (x + 3 - 4 / (x + 5 - ...)), from behind.
    high = jnp.where(small, 1.0, x)

    def back(k: Array, tail: Array) -> Array:
        n = 80.0 - k
        return high + 2.0 * n - 1.0 - n * n / tail

    fraction = _loops.fori_loop(0, 80, back, high + 161.0)
    return jnp.where(small, jnp.exp(low) * series, 1.0 / fraction)


@scaled_exp1.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    found = scaled_exp1(x)
    return found, dx * (found - 1.0 / x)
