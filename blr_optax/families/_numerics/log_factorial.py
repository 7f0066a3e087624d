"""log x! in densities, its expectations and what is left of it in entropies, without cancellation.

With u = 1 - e^{-t} and the generating function E (1 - u)^x = G(u) of a count x with mean m,

    E log x! = integral over t > 0 of (m - (1 - G(u)) / u) e^{-t} / t            (Malmsten)

so that no expectation is a sum over the support. The integrand lives on any scale between 1 / m
and 1, hence the trapezoid rule in log t: it is analytic there, and the error falls exponentially
with the number of nodes. Derivatives are integrals of the same kind, over the same nodes.

For large counts the entropy is a small difference of such numbers, and an asymptotic series in
1 / m takes over: Stirling's series at x, expanded about m, with the exact central moments of a
family whose variance is m q, q = 1 + rho m (rho = 0: Poisson, -1 / n: binomial, 1 / r: negative
binomial).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from blr_optax import _loops
from blr_optax._validate import concrete
from blr_optax.families._numerics.special import LOG_2PI, relative_excess, stirling

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

LARGEST_SUPPORT = 100_000
NODES = 200
MANY = 1000.0  # the variance from which draws follow the expansion of their quantiles
# E log x! = m log m - m + log(2 pi m) / 2 + q / 2 + sum_k P_k(q) / m^k: P_1 to P_4, q^0 first.
_FACTORIAL = (
    (1 / 12, -1 / 12, -1 / 12),
    (0.0, 0.0, -1 / 24),
    (-1 / 360, 1 / 120, -1 / 30, -1 / 30, 1 / 120),
    (0.0, 0.0, -1 / 60, -1 / 10, 1 / 240),
)
# H = log(2 pi e v) / 2 + sum_k sum_j a_kj rho^j / v^(k - j), v the variance: a_1 to a_4.
_ENTROPY = (
    (-1 / 12, -1 / 3),
    (-1 / 24, -1 / 6, -1 / 12),
    (-19 / 360, -17 / 60, -1 / 3, -1 / 90),
    (-9 / 80, -23 / 30, -22 / 15, -2 / 3, 1 / 120),
)


def large(dtype: jnp.dtype) -> float:
    """Return the counts from which the series are exact to rounding."""
    return 1000.0 if jnp.finfo(dtype).eps < 1e-10 else 20.0


@jax.custom_jvp
def exp_excess_near(x: Float[Array, ...]) -> Float[Array, ...]:
    """exp(x) - 1 - x for |x| < 1: at least zero, to the last digit."""
    last = 10 if jnp.finfo(x.dtype).bits <= 32 else 18
    series = jnp.array([1 / math.factorial(k) for k in range(last, 1, -1)], x.dtype)
    return x * x * jnp.polyval(series, x, unroll=32)


@exp_excess_near.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (x,), (dx,) = primals, tangents
    return exp_excess_near(x), dx * jnp.expm1(x)


def exp_excess(x: Float[Array, ...]) -> Float[Array, ...]:
    """exp(x) - 1 - x: at least zero, to the last digit."""
    near = jnp.abs(x) < 1.0
    return jnp.where(near, exp_excess_near(jnp.where(near, x, 0.0)), jnp.expm1(x) - x)


def deviance(
    x: Array, mean: Array | float, log_mean: Array | float, difference: Array | None = None
) -> Float[Array, ...]:
    """x log(x / m) - x + m for a count x >= 0: at least zero, to the last digit.

    `difference` is m - x, where it is known to more digits.
    """
    positive = jnp.where(x > 0, x, 1.0)
    excess = relative_excess(positive, mean, log_mean - jnp.log(positive), difference)
    return jnp.where(x > 0, positive * excess, mean)


def log_factorial_excess(x: Float[Array, ...]) -> Float[Array, ...]:
    """log x! - (x log x - x) for x >= 0: of the order of log x."""
    positive = jnp.where(x > 0, x, 1.0)
    return jnp.where(x > 0, 0.5 * (LOG_2PI + jnp.log(positive)) + stirling(positive), 0.0)


def log_poisson(x: Array, mean: Array | float, log_mean: Array | float) -> Float[Array, ...]:
    """log(m^x e^{-m} / x!)."""
    return -deviance(x, mean, log_mean) - log_factorial_excess(x)


def log_split(x: Array, y: Array, p: Array, not_p: Array, log_p: Array, log_not_p: Array) -> Array:
    """log of (x + y choose x) p^x (1 - p)^y, x and y real: two Poisson counts, given their sum."""
    n = x + y
    log_n = jnp.log(trials(n))
    # Both counts are off by one and the same number; the smaller tells it to more digits.
    off = jnp.where(x < y, n * p - x, y - n * not_p)
    parts = deviance(x, n * p, log_n + log_p, off)
    parts += deviance(y, n * not_p, log_n + log_not_p, -off)
    mixed = log_factorial_excess(n) - log_factorial_excess(x) - log_factorial_excess(y) - parts
    # A compiler need not round log n! twice in the same way.
    return jnp.where(x * y > 0, mixed, x * log_p + y * log_not_p)


def log_choose(x: Float[Array, ...], y: Float[Array, ...]) -> Float[Array, ...]:
    """log of (x + y choose x), x and y real."""
    excess = log_factorial_excess(x + y) - log_factorial_excess(x) - log_factorial_excess(y)
    divide = lambda a, b: jnp.where(b > 0, a, 0.0) / jnp.where(b > 0, b, 1.0)  # noqa: E731
    mixed = excess + x * jnp.log1p(divide(y, x)) + y * jnp.log1p(divide(x, y))
    return jnp.where(x * y > 0, mixed, 0.0)


@jax.custom_jvp
def log_success(x: Float[Array, ...]) -> Float[Array, ...]:
    """log p = log(1 - exp(x)), x < 0 the log of the probability to fail."""
    often = x > -0.7
    high, low = jnp.where(often, x, -1.0), jnp.where(often, -1.0, x)
    return jnp.where(often, jnp.log(-jnp.expm1(high)), jnp.log1p(-jnp.exp(low)))


@log_success.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (x,), (dx,) = primals, tangents
    return log_success(x), -dx * failures(x)


def failures(x: Float[Array, ...]) -> Float[Array, ...]:
    """(1 - p) / p, the mean number of failures per success."""
    return jnp.exp(x) / -jnp.expm1(x)


def trials(n: Float[Array, ...]) -> Float[Array, ...]:
    """Return a number of trials that may be divided by: one where there are none."""
    return jnp.where(n > 0, n, 1.0)


def is_count(x: Float[Array, ...]) -> Bool[Array, ...]:
    """Whether x is in 0, 1, 2, ..."""
    return (x >= 0) & (x == jnp.round(x)) & jnp.isfinite(x)


def common_total(total: Array, named: int | None = None) -> int:
    """Return the one value of a batch of known totals; a traced one must be named."""
    if named is not None:
        return named
    if not concrete(total):
        raise ValueError(
            "support: the total must be concrete, not traced by jit or vmap; name it, total=n."
        )
    values = np.unique(np.asarray(total))
    if len(values) != 1:
        raise ValueError(f"support: the total must be common to the batch; got {values}.")
    return int(values[0])


def waiting_kl(x: Float[Array, ...], y: Float[Array, ...]) -> Float[Array, ...]:
    """KL of the failures before one success: that of a trial times the mean number of trials."""
    d, fail = y - x, jnp.exp(x)
    near = jnp.abs(d) < 1.0
    low = jnp.where(near, d, 0.0)
    missed = jnp.where(near, fail * exp_excess(low), jnp.exp(y) - fail - fail * d)
    # The relative change of p is small only where both probabilities are close.
    change = fail * jnp.expm1(low) / jnp.expm1(x)
    small = near & (jnp.abs(change) < 0.5)
    close = jnp.log1p(jnp.where(small, change, 0.0))
    log_ratio = jnp.where(small, close, log_success(y) - log_success(x))
    return exp_excess(log_ratio) - missed / jnp.expm1(x)


def spread(values: Array, batch: Sequence[int]) -> Array:
    """Values along the first axis, the same for each element of a batch, which comes second."""
    values = values.reshape(len(values), *[1] * len(batch), *values.shape[1:])
    return jnp.broadcast_to(values, (len(values), *batch, *values.shape[1 + len(batch) :]))


def compositions(n: int, k: int) -> np.ndarray:
    """All ways to write n as a sum of k counts, one per row."""
    size = math.comb(n + k - 1, k - 1)
    if size > LARGEST_SUPPORT:
        raise ValueError(
            f"support: {size} values are more than {LARGEST_SUPPORT}: use a sampling estimator."
        )
    bars = list(itertools.combinations(range(n + k - 1), k - 1))
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, n + k - 1)))
    return np.diff(edges) - 1


def chances(p: Float[Array, "... K"], counts: Int[np.ndarray, "values K"]) -> Array:
    """n! / prod_k x_k! prod_k p_k^x_k of every row x, along a new leading axis."""
    rows = counts.tolist()
    ways = [math.factorial(sum(x)) // math.prod(map(math.factorial, x)) for x in rows]
    if max(ways) > float(jnp.finfo(p.dtype).max):
        raise ValueError(
            f"probabilities: the total {sum(rows[0])} is too large for {p.dtype}: use a sampling "
            "estimator."
        )
    coefficients, powers = (
        jnp.asarray(x, p.dtype).reshape(len(rows), *[1] * (p.ndim - 1), *x.shape[1:])
        for x in (np.array(ways, np.float64), counts)
    )
    # The derivative of p^0 at p = 0 would be NaN.
    return coefficients * jnp.prod(jnp.where(powers > 0, p, 1.0) ** powers, -1)


def slope(f: Callable, x: Array) -> Array:
    """Return the derivative of an elementwise function."""
    return jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


# --- integrals ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _trapezes(kernel: Callable, low: Array, high: Array, *args: Array) -> Array:
    """Integrate kernel(t, *args) over log t; kernel goes to zero like t, and after high."""
    step = (jnp.log(high) - jnp.log(low)) / (NODES - 1)

    def add(k: Array, total: Array) -> Array:
        t = low * jnp.exp(k * step)
        return total + kernel(t, *args)

    # The nodes below the first one are a geometric series.
    first = kernel(low, *args) / -jnp.expm1(-step)
    return step * _loops.fori_loop(1, NODES, add, first)


@functools.cache
def _slope(kernel: Callable, i: int) -> Callable:
    """Return the derivative of an elementwise kernel in its i-th argument after t."""

    def changed(t: Array, *args: Array) -> Array:
        return slope(lambda x: kernel(t, *args[:i], x, *args[i + 1 :]), args[i])

    return changed


# Without this rule reverse mode would keep every node.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _integral(kernel: Callable, low: Array, high: Array, *args: Array) -> Array:
    return _trapezes(kernel, low, high, *args)


@functools.partial(_integral.defjvp, symbolic_zeros=True)
def _(kernel: Callable, primals: tuple, tangents: tuple) -> tuple:
    low, high, *args = primals
    value = _integral(kernel, low, high, *args)
    change = jnp.zeros_like(value)
    for i, d in enumerate(tangents[2:]):
        if not isinstance(d, SymbolicZero):
            change += d * _integral(_slope(kernel, i), low, high, *args)
    return value, change


def _integrate(kernel: Callable, scale: Array, decay: Array, *args: Array) -> Array:
    """Integrate a kernel that is straight for t << 1 / scale and decays like e^(-decay t)."""
    *rest, scale, decay = jnp.broadcast_arrays(*args, scale, decay)
    eps = float(jnp.finfo(scale.dtype).eps)
    low = jax.lax.stop_gradient(eps**0.5 / scale)
    high = jax.lax.stop_gradient((4.0 - jnp.log(eps)) / decay).astype(low.dtype)
    return _integral(kernel, low, high, *rest)


def _poisson(t: Array, m: Array) -> Array:
    u = -jnp.expm1(-t)
    return jnp.exp(-t) * exp_excess(-m * u) / u


def _binomial(t: Array, p: Array, n: Array) -> Array:
    u = -jnp.expm1(-t)
    w = jnp.log1p(-jnp.minimum(p * u, 1.0 - jnp.finfo(t.dtype).eps))
    return jnp.exp(-t) * (exp_excess(n * w) - n * exp_excess(w)) / u


def _falling(t: Array, q: Array, n: Array) -> Array:
    # n q u - ((1 - (1 - q) u)^n - e^{-n t}), with e^w = 1 + q u e^t and its first order cancelled.
    u, w = -jnp.expm1(-t), jnp.log1p(q * jnp.expm1(t))
    direct = (n * t < 50.0) | (n * w < 1.0)
    low = jnp.exp(-n * t) * exp_excess(jnp.where(direct, n * w, 0.0))
    high = jnp.exp(n * (w - t)) - jnp.exp(-n * t) * (1.0 + n * w)
    more = jnp.where(direct, low, high) - n * jnp.exp(-n * t) * exp_excess(w)
    return jnp.exp(-t) * (-n * q * jnp.expm1((1.0 - n) * t) - more / u)


def _rising(t: Array, m: Array, r: Array) -> Array:
    u = -jnp.expm1(-t)
    missed = -jnp.expm1(-r * jnp.log1p(m * u / r))
    more = r > 1
    high, low = jnp.where(more, r, 2.0), jnp.where(more, 0.5, r)
    above = -jnp.exp(-t) * jnp.expm1((1.0 - high) * t)
    below = jnp.exp(-low * t) * jnp.expm1((low - 1.0) * t)
    return missed * jnp.where(more, above, below) / u


def poisson_log_factorial(m: Float[Array, ...]) -> Float[Array, ...]:
    """E log x! of a Poisson count with mean m."""
    return _integrate(_poisson, 1.0 + m, jnp.ones_like(m), m)


def binomial_log_factorial(p: Float[Array, ...], n: Float[Array, ...]) -> Float[Array, ...]:
    """E log x! of the number of successes in n trials with probability p."""
    return _integrate(_binomial, 1.0 + n * p, jnp.ones_like(p), p, n)


def binomial_log_falling(q: Float[Array, ...], n: Float[Array, ...]) -> Float[Array, ...]:
    """E log(n! / (n - x)!) of the number x of successes in n trials with probability q."""
    return _integrate(_falling, 1.0 + n, jnp.ones_like(q), q, n)


def log_coefficient(rare: Float[Array, ...], n: Float[Array, ...]) -> Float[Array, ...]:
    """E log(n choose x) of the number x of the rarer outcome."""
    return binomial_log_falling(rare, n) - binomial_log_factorial(rare, n)


def rising_over_factorial(m: Float[Array, ...], r: Float[Array, ...]) -> Float[Array, ...]:
    """E log(Gamma(r + x) / (Gamma(r) x!)) of a negative binomial count with mean m."""
    return _integrate(_rising, 1.0 + m + m / r + r, jnp.minimum(r, 1.0), m, r)


# --- series ---------------------------------------------------------------------------------------


def factorial_series(m: Float[Array, ...], q: Float[Array, ...]) -> Float[Array, ...]:
    """E log x! - (m log m - m) of a count with large mean m and variance m q, 0 < q <= 1."""
    total = jnp.zeros_like(m * q)
    for row in reversed(_FACTORIAL):
        total = (total + sum(c * q**j for j, c in enumerate(row) if c)) / m
    return 0.5 * (LOG_2PI + jnp.log(m) + q) + total


def entropy_series(v: Float[Array, ...], rho: Float[Array, ...]) -> Float[Array, ...]:
    """Return the entropy of a count with large variance v = m (1 + rho m) and small rho."""
    terms = (
        a * rho**j * v ** (j - k) for k, row in enumerate(_ENTROPY, 1) for j, a in enumerate(row)
    )
    return 0.5 * (1.0 + LOG_2PI + jnp.log(v)) + sum(terms)


# --- draws ----------------------------------------------------------------------------------------


def quanta(p: Float[Array, ...]) -> Array:
    """Probabilities below one as numbers of 2^-32 (of 2^-64 in float64): random bits below them."""
    dtype, kind, bits = jnp.float32, jnp.uint32, 32
    if p.dtype == jnp.float64:
        dtype, kind, bits = jnp.float64, jnp.uint64, 64
    return jnp.round(p.astype(dtype) * 2.0**bits).astype(kind)


def _draw_many(
    key: Array, mean: Array, v: Array, skew: Array | float, tail: Array | float
) -> Float[Array, ...]:
    """Draw by Cornish-Fisher, rounded; skew and tail are the third and fourth cumulant over v."""
    z = jax.random.normal(key, mean.shape, mean.dtype)
    bend = skew * (z * z - 1.0) / 6.0
    bend += (tail * (z**3 - 3.0 * z) / 24.0 - skew**2 * (2.0 * z**3 - 5.0 * z) / 36.0) / jnp.sqrt(v)
    return jnp.round(mean + (jnp.sqrt(v) * z + bend))


def draw_poisson(key: Array, rate: Float[Array, ...]) -> Float[Array, ...]:
    """Poisson counts (threefry keys only).

    From rate `MANY` on by Cornish and Fisher's expansion of the quantiles: jax's rejection loses
    its digits to rounding there in float32, and its integers overflow.
    """
    many = rate > MANY
    high, low = jnp.where(many, rate, MANY), jnp.where(many, 1.0, rate)
    draws = jax.random.poisson(_loops.key_for(key, low), low).astype(rate.dtype)
    return jnp.where(many, _draw_many(key, high, high, 1.0, 1.0), draws)


def draw_binomial(key: Array, n: Array, p: Array, not_p: Array) -> Float[Array, ...]:
    """Numbers of successes in n trials; for variances above `MANY` as in `draw_poisson`.

    Where jax's rejection rounds n away (beyond 8e5 in float32) and the variance is lower still, the
    rarer outcome is drawn as its limit, a Poisson count: its probability is at most 1.2e-3.
    """
    key, key_rare, key_many = jax.random.split(_loops.key_for(key, n, p, not_p), 3)
    n, p, not_p = jnp.broadcast_arrays(n, p, not_p)
    rare = jnp.minimum(p, not_p)
    variance = n * rare * (1.0 - rare)
    many = variance > MANY
    limit = ~many & (n * jnp.finfo(n.dtype).eps > 0.1)
    v, skew = jnp.where(many, variance, MANY), 1.0 - 2.0 * rare
    high = _draw_many(key_many, n * rare, v, skew, 1.0 - 6.0 * rare * (1.0 - rare))
    low = draw_poisson(key_rare, jnp.where(limit, n * rare, 0.0))
    x = jax.random.binomial(key, jnp.where(many | limit, 1.0, n), rare, dtype=n.dtype)
    x = jnp.clip(jnp.where(many, high, jnp.where(limit, low, x)), 0.0, n)
    return jnp.where(p > not_p, n - x, x)


def draw_multinomial(key: Array, n: Array, p: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """Return counts of n labels, one category after the other out of those that are left."""
    p = jnp.moveaxis(p, -1, 0)
    after = jnp.flip(jnp.cumsum(jnp.flip(p[1:], 0), 0), 0)
    after = jnp.concatenate([after, jnp.zeros_like(p[:1])])

    def draw(left: Array, this: tuple) -> tuple[Array, Array]:
        key, p, q = this
        whole = jnp.where(p + q > 0, p + q, 1.0)
        x = draw_binomial(key, left, p / whole, q / whole)
        return left - x, x

    n = jnp.broadcast_to(n, p.shape[1:])
    _, counts = _loops.scan(draw, n, (jax.random.split(key, len(p)), p, after))
    return jnp.moveaxis(counts, 0, -1)
