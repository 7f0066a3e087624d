"""The skew Gaussian: a Gaussian whose mean is shifted along one direction by a half-normal number.

    theta = m + |w| a + S^{-1/2} eps,   w and eps standard normal;   c = E|w| = sqrt(2 / pi)

Given w it is Gaussian: lambda = (S m, S a, -S / 2), T = (theta, |w| theta, theta theta^T). With the
ordinary gradients g_m = E[grad f], g_a = E[|w| grad f] and H = 2 g_Sigma = E[hess f] the natural
ones are

    S:  H        m:  (g_m - c g_a) / (1 - c^2)        a:  (g_a - c g_m) / (1 - c^2)

the last two preconditioned with S (Lin, Khan and Schmidt 2019). The marginal is, with
t^2 = 1 + a^T S a,

    log q(theta) = log 2 + log N(theta; m, S^{-1} + a a^T) + log Phi(a^T S (theta - m) / t)

and its entropy needs one integral over the line: J(s) = E[log 2 Phi(sqrt(s) y)], y of density
2 phi(y) Phi(sqrt(s) y), s = a^T S a. Only the loss is sampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax.families._base.conditional import (
    ConditionalFamily,
    move_gaussian,
    normals,
    repeated,
)
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import DEFINITE, REAL, checked
from blr_optax.families._continuous.gaussian import Gaussian, GaussianNatural, matvec, solve
from blr_optax.families._numerics.special import LOG_2PI

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float

    from blr_optax._typing import Alternative, Scalar

GAUSSIAN = Gaussian()
SHIFT = float(np.sqrt(2.0 / np.pi))  # c
_LOG_2, _ROOT_2 = float(np.log(2.0)), float(np.sqrt(2.0))


@parameters
class SkewGaussianNatural(NamedTuple):
    """lambda of a skew Gaussian: S m, S a and -S / 2."""

    linear: Array
    skew: Array
    quadratic: Array


class SkewNoise(NamedTuple):
    """The hidden |w| [samples] and standard normal eps [samples, d]."""

    shift: Array
    normal: Array


def _line(s: Array) -> tuple[Array, Array, Array]:
    """r = sqrt(s) and a rule (y, weights) for integrands that live on scales 1 and 1 / r."""
    r = jnp.sqrt(s)
    # Trapezes in u, y = sinh(u) / max(r, 1): spectral, from one scale to the other.
    scale = jnp.maximum(r, 1.0)[..., None]
    reach = jnp.arcsinh(12.0 * scale)
    u = reach * jnp.asarray(np.linspace(-1.0, 1.0, 241), s.dtype)
    return r, jnp.sinh(u) / scale, jnp.cosh(u) / scale * reach / 120.0


@jax.custom_jvp
def _asymmetry(s: Float[Array, ...]) -> Float[Array, ...]:
    """J(s) = E[log 2 Phi(sqrt(s) y)], zero at s = 0 and log 2 at infinity."""
    r, y, weight = _line(s)
    log_phi = jax.scipy.special.log_ndtr(r[..., None] * y)
    density = jnp.exp(_LOG_2 - 0.5 * (y * y + LOG_2PI) + log_phi)
    return jnp.sum(weight * density * (_LOG_2 + log_phi), axis=-1)


@_asymmetry.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (s,), (ds,) = primals, tangents
    return _asymmetry(s), _asymmetry_slope(s) * ds


def _asymmetry_slope(s: Float[Array, ...]) -> Float[Array, ...]:
    """J'(s) = integral of y phi(y) phi(r y) log(Phi(r y) / Phi(-r y)) / (2 r), r = sqrt(s)."""
    low = jnp.finfo(s.dtype).tiny ** 0.5
    r, y, weight = _line(jnp.maximum(s, low))
    x = r[..., None] * y
    near = jnp.abs(x) < 1.0
    close = 2.0 * jnp.arctanh(jax.scipy.special.erf(jnp.where(near, x, 0.0) / _ROOT_2))
    far = jnp.where(near, 1.0, x)
    odds = jax.scipy.special.log_ndtr(far) - jax.scipy.special.log_ndtr(-far)
    density = jnp.exp(-0.5 * (y * y + x * x) - LOG_2PI)
    total = jnp.sum(weight * density * y * jnp.where(near, close, odds), axis=-1)
    return 0.5 * total / r


@dataclasses.dataclass(frozen=True)
class SkewGaussian(ConditionalFamily):
    """The skew Gaussian over vectors.

    theta = mean + |w| skew + S^{-1/2} eps; log q is at the head of this file.

    Standard parameters: `mean` and `skew` [..., d], and `covariance` or `precision` [..., d, d], of
    the Gaussian part: E_q[theta] = mean + sqrt(2 / pi) skew.

    lambda: linear = S mean [..., d], skew = S skew [..., d], quadratic = -S / 2 [..., d, d]. There
    is no mu.

    Example:
      >>> import jax.numpy as jnp
      >>> from blr_optax.families._conditional.skew_gaussian import SkewGaussian
      >>> skewed = SkewGaussian()
      >>> lam = skewed.natural(mean=jnp.zeros(1), skew=jnp.array([3.0]), covariance=jnp.eye(1))
      >>> print(skewed.mean(lam), skewed.variance(lam), skewed.entropy(lam))
      [2.394] [4.270] 2.104
    """

    Natural: ClassVar[type] = SkewGaussianNatural

    @checked(mean=REAL.over("d"), skew=REAL.over("d"), covariance=DEFINITE, precision=DEFINITE)
    def natural(
        self,
        *,
        mean: ArrayLike,
        skew: ArrayLike,
        covariance: Alternative = None,
        precision: Alternative = None,
    ) -> SkewGaussianNatural:
        """lambda from the Gaussian part and the direction of the skew."""
        inner = GAUSSIAN.natural(mean=mean, covariance=covariance, precision=precision)
        linear = matvec(GAUSSIAN.precision(inner), jnp.asarray(skew))
        return SkewGaussianNatural(inner.linear, linear, inner.quadratic)

    def _inner(self, lam: SkewGaussianNatural) -> GaussianNatural:
        return GaussianNatural(lam.linear, lam.quadratic)

    def _parts(self, lam: SkewGaussianNatural) -> tuple[Array, Array, Array]:
        """(m, a, S)."""
        s = GAUSSIAN.precision(lam)
        return solve(s, lam.linear), solve(s, lam.skew), s

    def standard(self, lam: SkewGaussianNatural) -> dict[str, Array]:
        m, a, _ = self._parts(lam)
        return {"mean": m, "skew": a, "covariance": GAUSSIAN.covariance(self._inner(lam))}

    def log_prob(self, lam: SkewGaussianNatural, theta: Array) -> Array:
        m, a, _ = self._parts(lam)
        spread = 1.0 + jnp.sum(lam.skew * a, axis=-1)
        along = jnp.sum(lam.skew * (theta - m), axis=-1) / jnp.sqrt(spread)
        # The Gaussian with covariance S^{-1} + a a^T, by Sherman and Morrison.
        gaussian = GAUSSIAN.log_prob(self._inner(lam), theta) + 0.5 * along * along
        return _LOG_2 + gaussian - 0.5 * jnp.log(spread) + jax.scipy.special.log_ndtr(along)

    def entropy(self, lam: SkewGaussianNatural) -> Array:
        """H = log det(2 pi e (S^{-1} + a a^T)) / 2 - J(a^T S a), by quadrature on the line."""
        s = jnp.sum(lam.skew * solve(GAUSSIAN.precision(lam), lam.skew), axis=-1)
        return GAUSSIAN.entropy(self._inner(lam)) + 0.5 * jnp.log1p(s) - _asymmetry(s)

    def mean(self, lam: SkewGaussianNatural) -> Array:
        m, a, _ = self._parts(lam)
        return m + SHIFT * a

    def variance(self, lam: SkewGaussianNatural) -> Array:
        _, a, _ = self._parts(lam)
        return GAUSSIAN.variance(self._inner(lam)) + (1.0 - SHIFT**2) * a * a

    def in_domain(self, lam: SkewGaussianNatural) -> Bool[Array, ...]:
        return GAUSSIAN.in_domain(self._inner(lam)) & jnp.all(jnp.isfinite(lam.skew), axis=-1)

    def sample(self, key: Array, lam: SkewGaussianNatural, shape: tuple[int, ...] = ()) -> Array:
        m, a, _ = self._parts(lam)
        hidden, draw = jax.random.split(key)
        shift = jnp.abs(jax.random.normal(hidden, shape + m.shape[:-1], m.dtype))
        z = jax.random.normal(draw, shape + m.shape, m.dtype)
        return m + shift[..., None] * a + GAUSSIAN.displace(self._inner(lam), z)

    def noise(
        self, key: Array, lam: SkewGaussianNatural, samples: int, antithetic: bool = False
    ) -> SkewNoise:
        hidden, draw = jax.random.split(key)
        like = lam.linear
        shift = jnp.abs(jax.random.normal(hidden, (samples,), like.dtype))
        z = normals(draw, (samples, *like.shape), like.dtype, antithetic)
        return SkewNoise(repeated(shift, antithetic), z)

    def natural_gradient_at(
        self,
        lam: SkewGaussianNatural,
        loss: Callable,
        noise: SkewNoise,
        weights: Array,
        curvature: str = "exact",
    ) -> tuple[Array, SkewGaussianNatural]:
        m, a, s = self._parts(lam)
        away = GAUSSIAN.displace(self._inner(lam), noise.normal)
        theta = m + noise.shift[:, None] * a + away
        value, slope = jax.vmap(jax.value_and_grad(loss))(theta)
        if curvature == "exact":
            h = jnp.tensordot(weights, jax.vmap(jax.hessian(loss))(theta), 1)
        else:
            h = jnp.einsum("n,de,ne,nf->df", weights, s, away, slope)
        # The entropy depends on a and S through log det S and a^T S a.
        bend = jax.grad(lambda x: 0.5 * jnp.log1p(x) - _asymmetry(x))(lam.skew @ a)
        h = h - s + 2.0 * bend * jnp.outer(lam.skew, lam.skew)
        g_m = weights @ slope
        g_a = (weights * noise.shift) @ slope - 2.0 * bend * lam.skew
        rest = 1.0 - SHIFT**2
        inner = GAUSSIAN.gradient(self._inner(lam), (g_m - SHIFT * g_a) / rest, h)
        skew = (g_a - SHIFT * g_m) / rest - 2.0 * matvec(inner.quadratic, a)
        return weights @ value, SkewGaussianNatural(inner.linear, skew, inner.quadratic)

    def move(
        self,
        lam: SkewGaussianNatural,
        gradient: SkewGaussianNatural,
        learning_rate: Scalar,
        step: str = "auto",
    ) -> SkewGaussianNatural:
        d = jax.tree.map(lambda g: -learning_rate * g, gradient)
        old = GAUSSIAN.precision(lam)
        inner = move_gaussian(GAUSSIAN, self._inner(lam), self._inner(d), step)
        new = GAUSSIAN.precision(inner)
        a = solve(old, lam.skew)
        change = d.skew + 2.0 * matvec(d.quadratic, a)
        a = a + solve(old if step == "improved_old" else new, change)
        return SkewGaussianNatural(inner.linear, matvec(new, a), inner.quadratic)
