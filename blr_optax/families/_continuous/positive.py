"""Families of a number whose statistics follow another law: log normal, Laplace and Weibull.

`log_normal` is the normal density of log x. Laplace's |x - location| and Weibull's x^k are
exponential with rate b = -lambda, and so is the statistic of every `RateFamily`:

    T ~ b exp(-b T)    mu = 1 / b    F = 1 / b^2    KL = b_q / b_p - 1 - log(b_q / b_p)
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax.families._base import domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import POSITIVE, REAL, checked
from blr_optax.families._continuous.gaussian import GaussianExpectation, GaussianNatural, Normal
from blr_optax.families._numerics.special import (
    LOG_2PI,
    NEAR,
    excess_near,
    log_gamma,
    log_power,
    relative_excess,
    stirling_divergence,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import Alternative, ExpectationParameters, NaturalParameters, PyTree


@parameters
class LogNormalNatural(NamedTuple):
    """lambda of a log-normal density: S m and -S / 2 of the normal density of log x."""

    log: Array
    log_squared: Array


@parameters
class LogNormalExpectation(NamedTuple):
    """mu of a log-normal density: E[log x] and E[log^2 x]."""

    log: Array
    log_squared: Array


@dataclasses.dataclass(frozen=True)
class LogNormal(ExponentialFamily):
    """The density of a positive number whose logarithm is normal, elementwise.

    log q(x) = -S (log x - m)^2 / 2 + log(S / 2 pi) / 2 - log x.

    Standard parameters: `location` m, and `variance` or `precision` S, of log x; the base measure
    is 1 / (x sqrt(2 pi)).

    lambda: log = S m, log_squared = -S / 2. mu: log = E[log x] = m, log_squared = E[log^2 x].

    Example:
      >>> import blr_optax as blr
      >>> log_normal = blr.families.get("log_normal")
      >>> lam = log_normal.natural(location=0.0, variance=2.0)
      >>> print(log_normal.mean(lam).round(4))
      2.7183
    """

    Natural: ClassVar[type] = LogNormalNatural
    Expectation: ClassVar[type] = LogNormalExpectation
    domains: ClassVar[dict] = {"log": domain.real(), "log_squared": domain.negative()}
    constant_base_measure: ClassVar[bool] = False

    @checked(location=REAL, variance=POSITIVE, precision=POSITIVE)
    def natural(
        self, *, location: ArrayLike, variance: Alternative = None, precision: Alternative = None
    ) -> LogNormalNatural:
        """lambda from the mean and the variance or precision (> 0) of log x."""
        of_log = Normal().natural(mean=location, variance=variance, precision=precision)
        return LogNormalNatural(*of_log)

    def standard(self, lam: LogNormalNatural) -> dict[str, Array]:
        normal = Normal().standard(GaussianNatural(*lam))
        return {"location": normal["mean"], "variance": normal["variance"]}

    def mean(self, lam: LogNormalNatural) -> Array:
        m, v = self.standard(lam).values()
        return jnp.exp(m + 0.5 * v)

    def variance(self, lam: LogNormalNatural) -> Array:
        m, v = self.standard(lam).values()
        return jnp.expm1(v) * jnp.exp(2.0 * m + v)

    def log_partition(self, lam: LogNormalNatural) -> Array:
        """Return A = S m^2 / 2 - log(S) / 2."""
        return Normal().log_partition(GaussianNatural(*lam))

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> LogNormalExpectation:
        log_x = jnp.log(theta)
        return LogNormalExpectation(log_x, log_x * log_x)

    def log_base_measure(self, lam: LogNormalNatural, theta: Array) -> Array:
        log_x = jnp.log(theta)
        return Normal().log_base_measure(GaussianNatural(*lam), log_x) - log_x

    def expected_log_base_measure(self, lam: LogNormalNatural) -> Array:
        return -0.5 * LOG_2PI - self.expectation(lam).log

    def base_measure_gradient(self, lam: LogNormalNatural) -> LogNormalNatural:
        """grad_mu E_q[log h] = (-1, 0)."""
        return LogNormalNatural(-jnp.ones_like(lam.log), jnp.zeros_like(lam.log_squared))

    def expectation(self, lam: LogNormalNatural) -> LogNormalExpectation:
        return LogNormalExpectation(*Normal().expectation(GaussianNatural(*lam)))

    def natural_from_expectation(
        self, mu: LogNormalExpectation, with_status: bool = False
    ) -> PyTree:
        """lambda(mu) in closed form; NaN, and status False, where log x has no variance."""
        found = Normal().natural_from_expectation(GaussianExpectation(*mu), with_status=True)
        lam = LogNormalNatural(*found[0])
        return (lam, found[1]) if with_status else lam

    def log_prob(self, lam: LogNormalNatural, theta: Array) -> Array:
        inside = theta > 0
        log_x = jnp.log(jnp.where(inside, theta, 1.0))
        return jnp.where(inside, Normal().log_prob(GaussianNatural(*lam), log_x) - log_x, -jnp.inf)

    def entropy(self, lam: LogNormalNatural) -> Array:
        return Normal().entropy(GaussianNatural(*lam)) + self.expectation(lam).log

    def kl(self, lam_p: LogNormalNatural, lam_q: LogNormalNatural) -> Array:
        return Normal().kl(GaussianNatural(*lam_p), GaussianNatural(*lam_q))

    def fisher_product(self, lam: LogNormalNatural, v: LogNormalNatural) -> LogNormalExpectation:
        """F = [[v, 2 m v], [2 m v, 4 m^2 v + 2 v^2]] with the variance v."""
        m, spread = self.standard(lam).values()
        tilt = spread * (v.log + 2.0 * m * v.log_squared)
        return LogNormalExpectation(tilt, 2.0 * (m * tilt + spread * spread * v.log_squared))

    def inverse_fisher_product(
        self, lam: LogNormalNatural, v: LogNormalExpectation
    ) -> LogNormalNatural:
        m, spread = self.standard(lam).values()
        bend = 0.5 * (v.log_squared - 2.0 * m * v.log) / spread / spread
        return LogNormalNatural(v.log / spread - 2.0 * m * bend, bend)

    def cdf(self, lam: LogNormalNatural, theta: Array) -> Array:
        """Return P(log x <= log theta), 0 for what is not positive."""
        log_x = jnp.log(jnp.maximum(theta, 0.0))
        return Normal().cdf(GaussianNatural(*lam), log_x)

    def quantile(self, lam: LogNormalNatural, p: Array) -> Array:
        return jnp.exp(Normal().quantile(GaussianNatural(*lam), p))

    def sample(self, key: Array, lam: LogNormalNatural, shape: tuple[int, ...] = ()) -> Array:
        return jnp.exp(Normal().sample(key, GaussianNatural(*lam), shape))


class RateFamily(ExponentialFamily):
    """Families of one statistic T that is itself exponential: lambda = -b with E[T] = 1 / b."""

    def rate(self, lam: NaturalParameters) -> Array:
        """b."""
        (name,) = self.domains
        return -getattr(lam, name)

    def _fields(self, kind: type, like: Any, value: Array, still: bool = False) -> Any:
        """Fill the field of T with a value; known fields as in `like`, or zero for a derivative."""
        (name,) = self.domains
        known = {name: getattr(like, name) for name in self.known}
        return kind(**{name: value}, **(jax.tree.map(jnp.zeros_like, known) if still else known))

    def _given(self, lam: NaturalParameters) -> Any:
        if lam is None:
            names = " and ".join(self.known)
            raise ValueError(f"{type(self).__name__}: T needs the known {names}: pass lam=.")
        return lam

    def expectation(self, lam: NaturalParameters) -> ExpectationParameters:
        return self._fields(self.Expectation, lam, 1.0 / self.rate(lam))

    def natural_from_expectation(
        self, mu: ExpectationParameters, with_status: bool = False
    ) -> PyTree:
        """lambda = -1 / mu; NaN, and status False, unless mu is positive."""
        found = -self.rate(mu)
        proper = domain.positive().contains(found) & domain.positive().contains(1.0 / found)
        lam = self._fields(self.Natural, mu, -1.0 / jnp.where(proper, found, jnp.nan))
        return (lam, proper) if with_status else lam

    def kl(self, lam_p: NaturalParameters, lam_q: NaturalParameters) -> Array:
        return relative_excess(self.rate(lam_p), self.rate(lam_q))

    def fisher_product(self, lam: NaturalParameters, v: PyTree) -> ExpectationParameters:
        """F = 1 / b^2."""
        b = self.rate(lam)
        return self._fields(self.Expectation, lam, -self.rate(v) / b / b, still=True)

    def inverse_fisher_product(self, lam: NaturalParameters, v: PyTree) -> NaturalParameters:
        b = self.rate(lam)
        return self._fields(self.Natural, lam, -self.rate(v) * b * b, still=True)


@parameters
class LaplaceNatural(NamedTuple):
    """lambda of a Laplace density: -1 / scale, and the location, which never moves."""

    deviation: Array
    location: Array


@parameters
class LaplaceExpectation(NamedTuple):
    """mu of a Laplace density: E|x - location|, and the location."""

    deviation: Array
    location: Array


@dataclasses.dataclass(frozen=True)
class Laplace(RateFamily):
    """The Laplace density around a known location, elementwise.

    log q(x) = -|x - location| / scale - log(2 scale).

    Standard parameters: `scale`, and `location` (known).

    lambda: deviation = -1 / scale, location. mu: deviation = E|x - location| = scale, location.

    Example:
      >>> import blr_optax as blr
      >>> laplace = blr.families.get("laplace")
      >>> lam = laplace.natural(scale=2.0, location=1.0)
      >>> print(lam.deviation, laplace.variance(lam))
      -0.5 8.0
    """

    Natural: ClassVar[type] = LaplaceNatural
    Expectation: ClassVar[type] = LaplaceExpectation
    domains: ClassVar[dict] = {"deviation": domain.negative()}
    known: ClassVar[tuple[str, ...]] = ("location",)

    @checked(scale=POSITIVE, location=REAL)
    def natural(self, *, scale: ArrayLike, location: ArrayLike) -> LaplaceNatural:
        """lambda from the scale (> 0) and the known location."""
        return LaplaceNatural(jnp.divide(-1.0, scale), jnp.asarray(location))

    def standard(self, lam: LaplaceNatural) -> dict[str, Array]:
        return {"scale": -1.0 / lam.deviation, "location": lam.location}

    def mean(self, lam: LaplaceNatural) -> Array:
        return lam.location

    def variance(self, lam: LaplaceNatural) -> Array:
        return 2.0 * jnp.square(1.0 / lam.deviation)

    def log_partition(self, lam: LaplaceNatural) -> Array:
        """Return A = log(2 scale)."""
        return -jnp.log(-0.5 * lam.deviation)

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> LaplaceExpectation:
        """T, which needs the known location of lambda."""
        location = self._given(lam).location
        return LaplaceExpectation(*jnp.broadcast_arrays(jnp.abs(theta - location), location))

    def log_base_measure(self, lam: LaplaceNatural, theta: Array) -> Array:
        return jnp.zeros_like(theta * lam.deviation)

    def log_prob(self, lam: LaplaceNatural, theta: Array) -> Array:
        return lam.deviation * jnp.abs(theta - lam.location) - self.log_partition(lam)

    def kl(self, lam_p: LaplaceNatural, lam_q: LaplaceNatural) -> Array:
        """KL(p || q), also when the known locations differ."""
        b_p, b_q = self.rate(lam_p), self.rate(lam_q)
        # With u = b_p |shift|, a shift costs (u + exp(-u) - 1) b_q / b_p.
        u = b_p * jnp.abs(lam_p.location - lam_q.location)
        fall = jnp.expm1(-u)
        near = jnp.abs(fall) < NEAR
        shift = jnp.where(near, excess_near(jnp.where(near, fall, 0.0)), fall + u)
        return relative_excess(b_p, b_q) + shift * b_q / b_p

    def cdf(self, lam: LaplaceNatural, theta: Array) -> Array:
        """exp(-|z|) / 2 below the location, and its complement above."""
        standard = self.standard(lam)
        z = (theta - standard["location"]) / standard["scale"]
        tail = 0.5 * jnp.exp(-jnp.abs(z))
        return jnp.where(z < 0, tail, 1.0 - tail)

    def quantile(self, lam: LaplaceNatural, p: Array) -> Array:
        """Return location -+ scale log(2 min(p, 1 - p))."""
        standard = self.standard(lam)
        size = jnp.log(2.0 * jnp.minimum(p, 1.0 - p))
        away = standard["scale"] * jnp.where(p < 0.5, size, -size)
        return standard["location"] + away

    def sample(self, key: Array, lam: LaplaceNatural, shape: tuple[int, ...] = ()) -> Array:
        batch = jnp.broadcast_shapes(lam.deviation.shape, lam.location.shape)
        z = jax.random.laplace(key, shape + batch, lam.deviation.dtype)
        return lam.location - z / lam.deviation


@parameters
class WeibullNatural(NamedTuple):
    """lambda of a Weibull density: -scale^-k, and the shape k, which never moves."""

    power: Array
    shape: Array


@parameters
class WeibullExpectation(NamedTuple):
    """mu of a Weibull density: E[x^k], and the shape k."""

    power: Array
    shape: Array


@dataclasses.dataclass(frozen=True)
class Weibull(RateFamily):
    """The Weibull density of a positive number with a known shape k, elementwise.

    log q(x) = -(x / scale)^k + (k - 1) log x + log k - k log scale.

    Standard parameters: `scale`, and `shape` k (known); the base measure is k x^(k - 1).

    lambda: power = -scale^-k, shape = k. mu: power = E[x^k] = scale^k, shape = k.

    Example:
      >>> import blr_optax as blr
      >>> weibull = blr.families.get("weibull")
      >>> lam = weibull.natural(scale=2.0, shape=2.0)
      >>> print(lam.power, weibull.mean(lam).round(4))
      -0.25 1.7725
    """

    Natural: ClassVar[type] = WeibullNatural
    Expectation: ClassVar[type] = WeibullExpectation
    domains: ClassVar[dict] = {"power": domain.negative()}
    known: ClassVar[tuple[str, ...]] = ("shape",)
    constant_base_measure: ClassVar[bool] = False

    @checked(scale=POSITIVE, shape=POSITIVE)
    def natural(self, *, scale: ArrayLike, shape: ArrayLike) -> WeibullNatural:
        """lambda from the scale and the known shape (both > 0)."""
        shape = jnp.asarray(shape)
        return WeibullNatural(-jnp.power(scale, -shape), shape)

    def _log_scale(self, lam: WeibullNatural) -> Array:
        return -jnp.log(-lam.power) / lam.shape

    def standard(self, lam: WeibullNatural) -> dict[str, Array]:
        return {"scale": jnp.exp(self._log_scale(lam)), "shape": lam.shape}

    def mean(self, lam: WeibullNatural) -> Array:
        """scale Gamma(1 + 1 / k)."""
        return jnp.exp(self._log_scale(lam) + log_gamma(1.0 + 1.0 / lam.shape))

    def variance(self, lam: WeibullNatural) -> Array:
        """scale^2 Gamma(1 + 2 / k) - mean^2, whose terms cancel on paper for large k."""
        step = 1.0 / lam.shape
        # log Gamma(1) + log Gamma(1 + 2 / k) - 2 log Gamma(1 + 1 / k), about step^2 when small:
        # taken at a step that adding it to one does not round. Without the barrier XLA takes
        # (1 + step) - 1 for step.
        rounded = jax.lax.optimization_barrier(1.0 + step)
        near = jnp.maximum(rounded - 1.0, jnp.finfo(step.dtype).eps)
        bend = _log_gamma_divergence(1.0 + near, 1.0 + 2.0 * near)
        bend = bend + _log_gamma_divergence(1.0 + near, jnp.ones_like(near))
        return jnp.square(self.mean(lam)) * jnp.expm1(bend * jnp.square(step / near))

    def log_partition(self, lam: WeibullNatural) -> Array:
        """Return A = k log scale."""
        return -jnp.log(-lam.power)

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> WeibullExpectation:
        """T, which needs the known shape of lambda."""
        k = self._given(lam).shape
        return WeibullExpectation(*jnp.broadcast_arrays(theta**k, k))

    def log_base_measure(self, lam: WeibullNatural, theta: Array) -> Array:
        """log k + (k - 1) log x."""
        return jnp.log(lam.shape) + log_power(lam.shape - 1.0, theta)

    def expected_log_base_measure(self, lam: WeibullNatural) -> Array:
        """log k + (k - 1) E[log x], with E[log x] = log scale - euler / k."""
        log_x = self._log_scale(lam) - np.euler_gamma / lam.shape
        return jnp.log(lam.shape) + (lam.shape - 1.0) * log_x

    def base_measure_gradient(self, lam: WeibullNatural) -> WeibullNatural:
        """grad_mu E_q[log h] = (1 - 1 / k) / mu."""
        slope = -lam.power * (1.0 - 1.0 / lam.shape)
        return WeibullNatural(slope, jnp.zeros_like(lam.shape))

    def log_prob(self, lam: WeibullNatural, theta: Array) -> Array:
        """log q; at 0 that is -log scale for k = 1, infinite for k < 1."""
        inside, end = (theta > 0) & (theta < jnp.inf), theta == 0
        log_x = jnp.log(jnp.where(inside, theta, 1.0))
        log_t = lam.shape * log_x + jnp.log(-lam.power)
        found = jnp.where(inside, log_t - log_x - jnp.exp(log_t), -jnp.inf)
        zero = jnp.where(end, theta, 1.0)
        limit = log_power(lam.shape - 1.0, zero) + jnp.log(-lam.power) + lam.power * zero
        return jnp.log(lam.shape) + jnp.where(end, limit, found)

    def kl(self, lam_p: WeibullNatural, lam_q: WeibullNatural) -> Array:
        """KL(p || q), also when the known shapes differ."""
        b_p, b_q = self.rate(lam_p), self.rate(lam_q)
        ratio = lam_q.shape / lam_p.shape
        # E_p[b_q x^k_q] = b_q b_p^-ratio Gamma(1 + ratio), in which log Gamma is split at 1.
        bend = _log_gamma_divergence(jnp.ones_like(ratio), ratio)
        drift = (1.0 - ratio) * (jnp.log(b_p) + np.euler_gamma) + jnp.log(ratio) + bend
        return relative_excess(b_p * jnp.exp(-drift), b_q) + bend

    def cdf(self, lam: WeibullNatural, theta: Array) -> Array:
        """Return 1 - exp(-(x / scale)^k)."""
        standard = self.standard(lam)
        x = jnp.maximum(theta, 0.0) / standard["scale"]
        return -jnp.expm1(-(x ** standard["shape"]))

    def quantile(self, lam: WeibullNatural, p: Array) -> Array:
        standard = self.standard(lam)
        return standard["scale"] * (-jnp.log1p(-p)) ** (1.0 / standard["shape"])

    def sample(self, key: Array, lam: WeibullNatural, shape: tuple[int, ...] = ()) -> Array:
        batch = jnp.broadcast_shapes(lam.power.shape, lam.shape.shape)
        t = jax.random.exponential(key, shape + batch, lam.power.dtype)
        log_t = jnp.log(jnp.maximum(t, jnp.finfo(t.dtype).tiny))
        return jnp.exp((log_t - jnp.log(-lam.power)) / lam.shape)


def _log_gamma_divergence(a: Array, b: Array) -> Float[Array, ...]:
    """log Gamma(b) - log Gamma(a) - psi(a) (b - a), to the last digit."""
    return stirling_divergence(a, b) + b * relative_excess(b, a)
