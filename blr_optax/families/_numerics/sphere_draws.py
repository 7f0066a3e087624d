"""Draws from a von Mises-Fisher density, and how they move with lambda.

A draw is x = w u + sqrt(1 - w^2) v with w = <u, x> by rejection (Wood 1994) and v uniform across u.
Its derivative is a velocity field that carries the density along (div(q dx) = -dq), one of many:

    radial       dx = c(w) (u - w x) dkappa,   c = -(dF(w) / dkappa) / (q(w) (1 - w^2))
    tangential   dx = (w a - <a, x> u) / kappa for a = dlambda across u: the rotation; and
                 dx = f(w) (a - <a, x> x), f(w) = int_0^1 s^(d - 2) exp(-kappa w (1 - s)) ds

F is the distribution function of w. The rotation is unbounded as kappa goes to zero and the other
field grows like exp(kappa), so each serves on its side of kappa = 1. Near zero both halves tend
to dx = (dlambda - <dlambda, x> x) / (d - 1), whatever u is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import _loops
from blr_optax.families._numerics.bessel import bessel

if TYPE_CHECKING:
    from jaxtyping import Array, Float

DEPTH = 40.0  # integrals are cut where the integrand has fallen by exp(-DEPTH)
TERMS = 20
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
_NODES, _WEIGHTS = 0.5 * (_NODES + 1.0), 0.5 * _WEIGHTS


def polar(linear: Float[Array, "... d"]) -> tuple[Array, Array]:
    """kappa and u of lambda; at zero u is the first axis, and neither has a derivative."""
    x = jnp.sum(linear * linear, axis=-1)
    zero = x == 0
    kappa = jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))
    first = jnp.zeros_like(linear).at[..., 0].set(1.0)
    turned = linear / jnp.where(zero, 1.0, kappa)[..., None]
    return kappa, jnp.where(zero[..., None], first, turned)


def _versine(key: Array, kappa: Float[Array, ...], d: int) -> Float[Array, ...]:
    """Draws of 1 - w: in closed form for d = 3, else by rejection from a beta envelope."""
    if d == 3:
        u = jax.random.uniform(key, kappa.shape, kappa.dtype)
        safe = jnp.where(kappa > 0, kappa, 1.0)
        found = -jnp.log1p((1.0 - u) * jnp.expm1(-2.0 * safe)) / safe
        return jnp.clip(jnp.where(kappa > 0, found, 2.0 * u), 0.0, 2.0)
    n = d - 1.0
    b = n / (2.0 * kappa + jnp.sqrt(4.0 * kappa * kappa + n * n))
    # With x0 = (1 - b) / (1 + b): 1 - x0 and 1 - x0^2, which x0 itself would round away.
    x0, gap, gap2 = (1.0 - b) / (1.0 + b), 2.0 * b / (1.0 + b), 4.0 * b / jnp.square(1.0 + b)

    def propose(carry: tuple) -> tuple:
        key, versine, done = carry
        key, key_z, key_u = jax.random.split(key, 3)
        z = jax.random.beta(key_z, 0.5 * n, 0.5 * n, kappa.shape, kappa.dtype)
        new = 2.0 * b * z / ((1.0 - z) + b * z)
        height = kappa * (gap - new) + n * jnp.log((gap + x0 * new) / gap2)
        accept = height + jax.random.exponential(key_u, kappa.shape, kappa.dtype) >= 0
        return key, jnp.where(done, versine, new), done | accept

    begin = (_loops.key_for(key, kappa), jnp.zeros_like(kappa), jnp.zeros(kappa.shape, bool))
    _, versine, _ = _loops.while_loop(lambda c: ~jnp.all(c[2]), propose, begin)
    return versine


def draw(key: Array, linear: Float[Array, "... d"], shape: tuple[int, ...]) -> Float[Array, ...]:
    """Draws of x with leading `shape`, without derivatives."""
    d = linear.shape[-1]
    linear = jnp.broadcast_to(jax.lax.stop_gradient(linear), shape + linear.shape)
    kappa, u = polar(linear)
    key_w, key_v = jax.random.split(key)
    versine = _versine(key_w, kappa, d)[..., None]
    v = jax.random.normal(key_v, linear.shape, linear.dtype)
    v = v - jnp.sum(u * v, axis=-1, keepdims=True) * u
    v = v - jnp.sum(u * v, axis=-1, keepdims=True) * u  # once more, for what rounding left
    v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
    return (1.0 - versine) * u + jnp.sqrt(versine * (2.0 - versine)) * v


def _radial(versine: Array, kappa: Array, d: int) -> Float[Array, ...]:
    """c(w), by quadrature over the angle phi from the nearer pole to w = cos(theta).

    c = |int (cos phi - R) exp(kappa (cos phi - w)) (sin phi / sin theta)^(d - 2) dphi| / sin theta,
    on the side of theta on which cos phi - R keeps its sign, so that nothing cancels.
    """
    n = d - 2.0
    rest = bessel(0.5 * d - 1.0, kappa * kappa).rest
    tiny = jnp.sqrt(jnp.finfo(kappa.dtype).tiny)
    theta = 2.0 * jnp.arcsin(jnp.sqrt(0.5 * jnp.clip(versine, tiny, 2.0 - 1e-6)))
    sine = jnp.sin(theta)
    upper = versine < rest
    side = jnp.where(upper, -1.0, 1.0)
    end = jnp.where(upper, theta, np.pi - theta)

    def fall(z: Array) -> Array:
        """How far the logarithm of the integrand falls from theta to phi = theta +- z."""
        phi = theta + side * z
        # w - cos phi without cancellation
        drop = 2.0 * jnp.sin(0.5 * (phi + theta)) * jnp.sin(0.5 * side * z)
        return kappa * drop - n * jnp.log(jnp.maximum(jnp.sin(phi), tiny) / sine)

    # Where a parabola has fallen by DEPTH; beyond the equator the integrand may fall more slowly.
    slope = side * (kappa * sine - n * jnp.cos(theta) / sine)
    bend = jnp.maximum(kappa * jnp.cos(theta) + n / jnp.square(sine), 0.0)
    reach = 2.0 * DEPTH / (slope + jnp.sqrt(slope * slope + 2.0 * DEPTH * bend) + tiny)
    for _ in range(4):
        reach = jnp.where(fall(reach) < DEPTH, 1.5 * reach, reach)
    reach = jnp.minimum(jax.lax.stop_gradient(reach), end)

    nodes, weights = (jnp.asarray(a, kappa.dtype) for a in (_NODES, _WEIGHTS))
    theta, sine, side, kappa = (a[..., None] for a in (theta, sine, side, kappa))
    z = reach[..., None] * nodes
    lever = jnp.abs(rest[..., None] - 2.0 * jnp.square(jnp.sin(0.5 * (theta + side * z))))
    return reach * jnp.sum(weights * lever * jnp.exp(-fall(z)), axis=-1) / sine[..., 0]


def _velocity(linear: Array, x: Array, change: Array) -> Float[Array, "... d"]:
    """dx for dlambda = change."""
    d = linear.shape[-1]
    kappa, u = polar(linear)
    along = jnp.sum(u * change, axis=-1, keepdims=True)
    a = change - along * u
    versine = 0.5 * jnp.sum(jnp.square(x - u), axis=-1)
    height = jnp.sum(a * x, axis=-1, keepdims=True)
    far = kappa > 1.0
    low = -jnp.where(far, 0.0, kappa * (1.0 - versine))
    series = jnp.ones_like(low)
    for k in reversed(range(TERMS)):
        series = 1.0 + series * low / (d + k)
    kappa, far, versine = kappa[..., None], far[..., None], versine[..., None]
    rotation = ((1.0 - versine) * a - height * u) / jnp.where(far, kappa, 1.0)
    field = series[..., None] / (d - 1.0) * (a - height * x)
    radial = _radial(versine[..., 0], kappa[..., 0], d)[..., None]
    return radial * along * (u - x + versine * x) + jnp.where(far, rotation, field)


@jax.custom_jvp
def attach(linear: Float[Array, "... d"], x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """x itself, with the derivative in lambda of a draw at x."""
    return x


@attach.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (linear, x), (change, dx) = primals, tangents
    return attach(linear, x), dx + _velocity(linear, x, change)
