"""The inverse Gaussian, and the implicit derivatives that its samples carry.

    m     mean        phi   s / m, the inverse of the squared coefficient of variation
    s     shape       G     G(y) = exp(y) E_1(y)

A sample at a fixed quantile u of F(x; theta) moves with theta as dx = -(dF / dtheta) / q(x), here
in closed form: an ordinary function of x, so that it can be differentiated again.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.special

from blr_optax import _loops
from blr_optax.families._base import domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import POSITIVE, checked
from blr_optax.families._numerics.special import (
    LOG_2PI,
    relative_excess,
    scaled_exp1,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import PyTree

FRACTION_FROM = 1.5  # where continued fractions take over


def _mills(w: Float[Array, ...]) -> tuple[Array, Array]:
    """(M, 1 - w M) with the Mills ratio M(w) = Phi(-w) / phi(w) of the normal law, w > 0."""
    small = w < 2.0 * FRACTION_FROM
    low, high = jnp.where(small, w, 1.0), jnp.where(small, 2.0 * FRACTION_FROM, w)
    near = jnp.exp(jax.scipy.special.log_ndtr(-low) + 0.5 * (low * low + LOG_2PI))

    def back(step: Array, tail: Array) -> Array:  # M = 1 / (w + 1 / (w + 2 / (w + ...)))
        return high + (80.0 - step) / tail

    tail = _loops.fori_loop(0, 79, back, high)
    far = 1.0 / (high + 1.0 / tail)
    return jnp.where(small, near, far), jnp.where(small, 1.0 - low * near, far / tail)


def inverse_gaussian_slopes(m: Array, s: Array, x: Array) -> tuple[Array, Array]:
    """(dx / dm, dx / ds) of an inverse Gaussian x at a fixed quantile.

    With y = x / m, w = sqrt(phi / y) (1 + y) and the Mills ratio M(w), dx / dm is
    2 y sqrt(phi y) M and dx / ds is (y / phi) (1 - 2 sqrt(phi y) M); near y = 1 the latter
    cancels, and 2 sqrt(phi y) = 2 y w / (1 + y) makes it (1 - y) / (1 + y) + ....
    """
    phi, y = s / m, x / m
    w = jnp.sqrt(phi / y) * (1.0 + y)
    ratio, rest = _mills(w)
    weight = 2.0 * y / (1.0 + y)
    return y * weight * w * ratio, y / phi * ((m - x) / (m + x) + weight * rest)


@jax.custom_jvp
def _follow_inverse_gaussian(m: Array, s: Array, x: Array) -> Array:
    """x, as a function of the mean and the shape at a fixed quantile."""
    return x


@_follow_inverse_gaussian.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x = _follow_inverse_gaussian(*primals)
    by_mean, by_shape = inverse_gaussian_slopes(primals[0], primals[1], x)
    return x, by_mean * tangents[0] + by_shape * tangents[1]


def _scaled_exp2(y: Float[Array, ...]) -> Float[Array, ...]:
    """exp(y) E_2(y) = 1 - y G(y) for y > 0, which cancels when y is large."""
    small = y < FRACTION_FROM
    low, high = jnp.where(small, y, 1.0), jnp.where(small, FRACTION_FROM, y)

    def back(step: Array, tail: Array) -> Array:  # 1 / (y + 2 - 2 / (y + 4 - 6 / (y + 6 - ...)))
        n = 80.0 - step
        return high + 2.0 * n - n * (n + 1.0) / tail

    tail = _loops.fori_loop(0, 80, back, high + 162.0)
    return jnp.where(small, 1.0 - low * scaled_exp1(low), 1.0 / tail)


@parameters
class InverseGaussianNatural(NamedTuple):
    """lambda of an inverse Gaussian: -s / (2 m^2) and -s / 2."""

    linear: Array
    reciprocal: Array


@parameters
class InverseGaussianExpectation(NamedTuple):
    """mu of an inverse Gaussian: E[x] and E[1 / x]."""

    linear: Array
    reciprocal: Array


@dataclasses.dataclass(frozen=True)
class InverseGaussian(ExponentialFamily):
    """The inverse Gaussian density of a positive number, elementwise over any shape.

    log q(x) = -s (x - m)^2 / (2 m^2 x) + log(s) / 2 - log(2 pi x^3) / 2.

    Standard parameters: `mean` m and `shape` s; the base measure is (2 pi x^3)^(-1/2).

    lambda: linear = -s / (2 m^2), reciprocal = -s / 2. mu: linear = m, reciprocal = E[1 / x].

    Example:
      >>> import blr_optax as blr
      >>> inverse_gaussian = blr.families.get("inverse_gaussian")
      >>> lam = inverse_gaussian.natural(mean=2.0, shape=4.0)
      >>> print(inverse_gaussian.expectation(lam).reciprocal, inverse_gaussian.variance(lam))
      0.75 2.0
    """

    Natural: ClassVar[type] = InverseGaussianNatural
    Expectation: ClassVar[type] = InverseGaussianExpectation
    support_of_marginals: ClassVar[str] = "positive"
    domains: ClassVar[dict] = {"linear": domain.negative(), "reciprocal": domain.negative()}
    constant_base_measure: ClassVar[bool] = False

    @checked(mean=POSITIVE, shape=POSITIVE)
    def natural(self, *, mean: ArrayLike, shape: ArrayLike) -> InverseGaussianNatural:
        """lambda from the mean and the shape (both > 0)."""
        half = jnp.multiply(-0.5, shape)
        return InverseGaussianNatural(half / mean / mean, half)

    def standard(self, lam: InverseGaussianNatural) -> dict[str, Array]:
        return {"mean": self.mean(lam), "shape": -2.0 * lam.reciprocal}

    def mean(self, lam: InverseGaussianNatural) -> Array:
        return jnp.sqrt(lam.reciprocal / lam.linear)

    def variance(self, lam: InverseGaussianNatural) -> Array:
        """m^3 / s."""
        m, s = self.standard(lam).values()
        return m * m * (m / s)

    def log_partition(self, lam: InverseGaussianNatural) -> Array:
        """Return A = -s / m - log(s) / 2."""
        m, s = self.standard(lam).values()
        return -s / m - 0.5 * jnp.log(s)

    def sufficient_statistics(self, theta: Array, lam: PyTree = None) -> InverseGaussianExpectation:
        return InverseGaussianExpectation(theta, 1.0 / theta)

    def log_base_measure(self, lam: InverseGaussianNatural, theta: Array) -> Array:
        return -0.5 * LOG_2PI - 1.5 * jnp.log(theta) + jnp.zeros_like(lam.linear)

    def _expected_log(self, lam: InverseGaussianNatural) -> Array:
        """E[log x] = log m - G(2 phi)."""
        m, s = self.standard(lam).values()
        return jnp.log(m) - scaled_exp1(2.0 * s / m)

    def expected_log_base_measure(self, lam: InverseGaussianNatural) -> Array:
        return -0.5 * LOG_2PI - 1.5 * self._expected_log(lam)

    def base_measure_gradient(self, lam: InverseGaussianNatural) -> InverseGaussianNatural:
        """-3/2 of grad_mu E[log x], with phi = 1 / (mu_1 mu_2 - 1) and -G' = e^y E_2(y) / y."""
        m, s = self.standard(lam).values()
        phi = s / m
        slope = 1.5 * phi * _scaled_exp2(2.0 * phi)  # of E[log h] in 1 / phi
        # slope (1 / m + 1 / s) - 1.5 / m, by e^y E_2(y) = 1 - y G(y) where it cancels
        wide = -1.5 * phi * (2.0 * (1.0 + phi) * scaled_exp1(2.0 * phi) - 1.0) / m
        linear = jnp.where(phi < 1.0, wide, slope * (1.0 / m + 1.0 / s) - 1.5 / m)
        return InverseGaussianNatural(linear, slope * m)

    def expectation(self, lam: InverseGaussianNatural) -> InverseGaussianExpectation:
        m, s = self.standard(lam).values()
        return InverseGaussianExpectation(m, 1.0 / m + 1.0 / s)

    def natural_from_expectation(
        self, mu: InverseGaussianExpectation, with_status: bool = False
    ) -> PyTree:
        """s = 1 / (mu_2 - 1 / mu_1); NaN, and status False, where that is not positive."""
        known = domain.positive().contains(mu.linear)
        m = jnp.where(known, mu.linear, 1.0)
        spread = (mu.linear * mu.reciprocal - 1.0) / m
        proper = known & domain.positive().contains(spread)
        s = 1.0 / jnp.where(proper, spread, jnp.nan)
        lam = InverseGaussianNatural(-0.5 * s / m / m, -0.5 * s)
        proper &= self.in_domain(lam)
        lam = InverseGaussianNatural(*(jnp.where(proper, x, jnp.nan) for x in lam))
        return (lam, proper) if with_status else lam

    def log_prob(self, lam: InverseGaussianNatural, theta: Array) -> Array:
        inside = (theta > 0) & (theta < jnp.inf)
        x = jnp.where(inside, theta, 1.0)
        m, s = self.standard(lam).values()
        apart = (x - m) / m
        found = -s * apart * (apart / x) + jnp.log(s) - LOG_2PI - 3.0 * jnp.log(x)
        return jnp.where(inside, 0.5 * found, -jnp.inf)

    def entropy(self, lam: InverseGaussianNatural) -> Array:
        s = -2.0 * lam.reciprocal
        return 0.5 * (1.0 + LOG_2PI - jnp.log(s)) + 1.5 * self._expected_log(lam)

    def kl(self, lam_p: InverseGaussianNatural, lam_q: InverseGaussianNatural) -> Array:
        (m_p, s_p), (m_q, s_q) = (self.standard(lam).values() for lam in (lam_p, lam_q))
        apart = (m_p - m_q) / m_q
        return 0.5 * (relative_excess(s_p, s_q) + s_q * apart * (apart / m_p))

    def fisher_product(
        self, lam: InverseGaussianNatural, v: InverseGaussianNatural
    ) -> InverseGaussianExpectation:
        """F = [[m^3 / s, -m / s], [-m / s, 1 / (m s) + 2 / s^2]]."""
        m, s = self.standard(lam).values()
        along = (m * v.linear - v.reciprocal / m) / s
        return InverseGaussianExpectation(m * m * along, -along + 2.0 * v.reciprocal / s / s)

    def inverse_fisher_product(
        self, lam: InverseGaussianNatural, v: InverseGaussianExpectation
    ) -> InverseGaussianNatural:
        m, s = self.standard(lam).values()
        reciprocal = 0.5 * s * s * (v.linear / m / m + v.reciprocal)
        return InverseGaussianNatural((reciprocal + s * v.linear / m) / m / m, reciprocal)

    def cdf(self, lam: InverseGaussianNatural, theta: Array) -> Array:
        """Phi(r (x / m - 1)) + exp(2 s / m) Phi(-r (x / m + 1)) with r = sqrt(s / x)."""
        m, s = self.standard(lam).values()
        positive = theta > 0
        x = jnp.where(positive, theta, 1.0)
        r = jnp.sqrt(s / x)
        ahead, behind = r * (x / m - 1.0), -r * (x / m + 1.0)
        second = jnp.exp(2.0 * s / m + jax.scipy.special.log_ndtr(behind))
        return jnp.where(positive, jax.scipy.special.ndtr(ahead) + second, 0.0)

    def sample(self, key: Array, lam: InverseGaussianNatural, shape: tuple[int, ...] = ()) -> Array:
        """Choose one root of a quadratic (Michael, Schucany and Haas 1976)."""
        m, s = jnp.broadcast_arrays(*self.standard(lam).values())
        key, key_side = jax.random.split(key)
        z = jax.random.normal(key, shape + m.shape, m.dtype)
        q = 0.5 * z * z * jax.lax.stop_gradient(m / s)
        root = 1.0 / (1.0 + q + jnp.sqrt(q * (2.0 + q)))
        side = jax.random.uniform(key_side, q.shape, q.dtype) * (1.0 + root) <= 1.0
        x = jax.lax.stop_gradient(m) * jnp.where(side, root, 1.0 / root)
        return _follow_inverse_gaussian(m, s, x)
