"""Modified Bessel functions I_nu as directional families need them: smooth at zero, no overflow.

With x = kappa^2 everything here is a smooth function of x >= 0, at 0 too:

    log I_nu(kappa) - nu log kappa          ratio   rho = I_{nu+1}(kappa) / (kappa I_nu(kappa))
    R = kappa rho                           slope   sigma = dR / dkappa = 1 - R^2 - (2 nu + 1) rho

Debye's uniform expansion, with p = sqrt(nu^2 + x), s = 1 / p and S = sum_k u_k(nu s) / nu^k,

    log I_nu - nu log kappa = p - nu log(nu + p) - log(2 pi p) / 2 + log S

holds to the last digit once p > LARGE. A smaller order is reached from a larger one by
rho_nu = 1 / (2 (nu + 1) + x rho_{nu+1}), which forgets errors.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import _loops
from blr_optax.families._numerics.special import LOG_2PI

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax._typing import DTypeLike


def _reach(dtype: DTypeLike) -> tuple[float, int]:
    """(LARGE, TERMS): from which p on how many terms of Debye's series are exact to rounding."""
    return (22.0, 20) if jnp.finfo(dtype).bits > 32 else (9.0, 8)


def _debye(terms: int) -> np.ndarray:
    """Coefficients c[k, j] of S = sum_kj c_kj s^k (nu s)^(2 j), and of s S', s^2 S''."""
    # u_{k+1}(t) = t^2 (1 - t^2) u_k'(t) / 2 + int_0^t (1 - 5 z^2) u_k(z) dz / 8,  u_0 = 1
    c = np.zeros((terms + 1, terms + 1))
    c[0, 0] = 1.0
    for k in range(terms):
        for j in range(k + 1):
            m = k + 2 * j
            c[k + 1, j] += c[k, j] * (m / 2 + 1 / (8 * (m + 1)))
            c[k + 1, j + 1] -= c[k, j] * (m / 2 + 5 / (8 * (m + 3)))
    power = np.arange(terms + 1)[:, None] + 2 * np.arange(terms + 1)
    return np.stack([c, power * c, power * (power - 1) * c])


class Bessel(NamedTuple):
    """What a density on the sphere needs of I_nu at kappa = sqrt(x).

    Attributes:
        log: log I_nu - nu log kappa.
        ratio: rho = I_{nu+1} / (kappa I_nu).
        slope: sigma = d(kappa rho) / dkappa.
        bend: 2 drho / dx.
        entropy: log - x rho, in which the large terms cancel on paper.
        rest: 1 - kappa rho, for kappa > 0 (its derivative in x is infinite at 0).
    """

    log: Float[Array, ...]
    ratio: Float[Array, ...]
    slope: Float[Array, ...]
    bend: Float[Array, ...]
    entropy: Float[Array, ...]
    rest: Float[Array, ...]


def _powers(x: Float[Array, ...], count: int) -> Float[Array, "... k"]:
    """1, x, ..., x^count along a new last axis; differentiable at zero."""
    powers = jnp.ones((*x.shape, 1), x.dtype)
    while powers.shape[-1] <= count:  # doubling: few operations to compile
        powers = jnp.concatenate([powers, powers * (powers[..., -1] * x)[..., None]], axis=-1)
    return powers[..., : count + 1]


def _uniform(nu: Float[Array, ...], x: Float[Array, ...]) -> tuple[Bessel, Array]:
    """Debye's expansion for p > LARGE, and its log S."""
    _, terms = _reach(x.dtype)
    p = jnp.sqrt(nu * nu + x)
    s, y = 1.0 / p, nu * nu / (nu * nu + x)
    rows = jnp.einsum(
        "...j,ckj->...ck",
        _powers(y, terms),
        jnp.asarray(_debye(terms), p.dtype),
        precision="highest",
    )
    total = jnp.einsum("...k,...ck->...c", _powers(s, terms), rows, precision="highest")
    first, second = total[..., 1] / total[..., 0], total[..., 2] / total[..., 0]
    log_sum = jnp.log(total[..., 0])
    rest_of_log = log_sum - nu * jnp.log(nu + p) - 0.5 * (LOG_2PI + jnp.log(p))
    half, turn = 0.5 + first, first + second - first * first
    kappa = _root(x)
    found = Bessel(
        log=p + rest_of_log,
        ratio=1.0 / (nu + p) - half * s * s,
        slope=nu * s / (nu + p) + (0.5 - y - first + (1.0 - y) * (2.0 * first + turn)) * s * s,
        bend=s * (s * s * s * (2.0 * half + turn) - 1.0 / jnp.square(nu + p)),
        # p - x / (nu + p) = nu
        entropy=nu + rest_of_log + (1.0 - y) * half,
        rest=(nu + nu * nu / (p + kappa)) / (nu + p) + kappa * half * s * s,
    )
    return found, log_sum


def _root(x: Float[Array, ...]) -> Float[Array, ...]:
    """sqrt(x) with derivative 0 at 0."""
    return jnp.sqrt(jnp.where(x > 0, x, 1.0)) * (x > 0)


@functools.partial(jax.jit, static_argnums=0)
def bessel(nu: float, x: Float[Array, ...]) -> Bessel:
    """I_nu at kappa = sqrt(x), for nu >= 0 and x >= 0."""
    large, _ = _reach(x.dtype)
    shift = max(0, math.ceil(large - nu))
    if not shift:
        return _uniform(jnp.asarray(nu, x.dtype), x)[0]
    top = nu + shift
    direct = nu * nu + x > large * large
    far, log_sum = _uniform(jnp.where(direct, nu, top).astype(x.dtype), x)

    # Down from order `top`. Logarithms are relative to kappa = 0, where they are known and large.
    x = jnp.where(direct, 0.0, x)
    p, kappa = jnp.sqrt(top * top + x), _root(x)
    at_zero = math.lgamma(top + 1.0) - (top + 0.5) * math.log(top) + top - 0.5 * LOG_2PI
    log = x / (p + top) - top * jnp.log1p(0.5 * x / (p + top) / top) - 0.5 * jnp.log(p / top)
    log = log + log_sum + at_zero
    orders = 2.0 * nu + 2.0 * jnp.arange(shift, 0, -1, dtype=x.dtype)

    def down(k: Array, carry: tuple) -> tuple:
        """From order nu + j to nu + j - 1, with orders[k] = 2 (nu + j)."""
        _, ratio, slope, rest, product = carry
        new = 1.0 / (orders[k] + x * ratio)
        slope = new * new * (orders[k] - x * slope)
        return ratio, new, slope, new * (orders[k] - kappa * rest), product * (orders[k] * new)

    start = (jnp.where(direct, 1.0, v) for v in (far.ratio, far.ratio, far.slope, far.rest))
    carry = _loops.fori_loop(0, shift, down, (*start, jnp.ones_like(x)))
    last, ratio, slope, rest, product = carry
    log = log - jnp.log(product) - nu * math.log(2.0) - math.lgamma(nu + 1.0)
    near = Bessel(log, ratio, slope, ratio * (last - ratio), log - x * ratio, rest)
    return Bessel(*(jnp.where(direct, a, b) for a, b in zip(far, near, strict=True)))
