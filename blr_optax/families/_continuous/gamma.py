"""Families built on the gamma density: gamma, inverse gamma and exponential.

    a      concentration           r(a)   Stirling's remainder
    b      rate                    l(a)   log a - psi(a)
    m      a / b, the mean         E(m, x) = x / m - 1 - log(x / m), at least zero

    log q(x) = -a E(m, x) + log(a) / 2 - log(2 pi) / 2 - r(a) - log x

holds for any a and cancels nowhere: log Gamma(a) and a log b, which are huge when a is, have been
combined on paper. Divergences, entropies and the Fisher matrix are written in the same way.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammainc, gammaincc

from blr_optax.families._base import domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import POSITIVE, checked
from blr_optax.families._continuous.positive import RateFamily
from blr_optax.families._numerics.gamma_draws import following, gamma_log_draw
from blr_optax.families._numerics.special import (
    LOG_2PI,
    inverse_log_minus_digamma,
    log_gamma,
    log_minus_digamma,
    log_power,
    relative_excess,
    stirling,
    stirling_curvature,
    stirling_divergence,
    stirling_slope,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import NaturalParameters, PyTree

NEGLIGIBLE = 1e-20  # a ratio below this is nothing beside one, and may underflow in float32


def mean_excess(
    m: Array, x: Array, log_x: Array, difference: Array | None = None
) -> Float[Array, ...]:
    """E(m, x) = x / m - 1 - log(x / m), also where the ratio underflows.

    `difference` is x - m, where it is known to more digits.
    """
    low = x < NEGLIGIBLE * m
    off = None if difference is None else jnp.where(low, 0.0, difference)
    found = relative_excess(m, jnp.where(low, m, x), difference=off)
    return jnp.where(low, jnp.log(m) - log_x - 1.0, found)


def held(lam: NaturalParameters) -> Any:
    """Return lambda as it is stored: XLA would take (a - 1) + 1 for a, which is never rounded."""
    return jax.lax.optimization_barrier(jax.lax.stop_gradient(lam))


def log_entropy(a: Float[Array, ...]) -> Float[Array, ...]:
    """Return the entropy of log x when x is gamma: a l(a) + r(a) - log(a) / 2 + log(2 pi) / 2."""
    return a * log_minus_digamma(a) + stirling(a) - 0.5 * jnp.log(a) + 0.5 * LOG_2PI


def trigamma_excess(a: Float[Array, ...]) -> Float[Array, ...]:
    """Return a psi'(a) - 1, about 1 / (2 a) when large and 1 / a when small."""
    return 0.5 / a + a * stirling_curvature(a)


def trigamma(a: Float[Array, ...]) -> Float[Array, ...]:
    """psi'(a) for a > 0."""
    return (1.0 + trigamma_excess(a)) / a


@jax.custom_jvp
def concentration_divergence(a: Float[Array, ...], b: Float[Array, ...]) -> Float[Array, ...]:
    """`stirling_divergence` with its derivatives in closed form, which are cheap to compile."""
    return stirling_divergence(a, b)


@concentration_divergence.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (a, b), (da, db) = primals, tangents
    by_b = 0.5 * (b - a) / a / b + stirling_slope(b) - stirling_slope(a)
    by_a = -(0.5 / (a * a) + stirling_curvature(a)) * (b - a)
    return concentration_divergence(a, b), by_a * da + by_b * db


def _log_density(a: Array, m: Array, x: Array, log_x: Array) -> Float[Array, ...]:
    """Return the density of log x when x is gamma."""
    return -a * mean_excess(m, x, log_x) + 0.5 * (jnp.log(a) - LOG_2PI) - stirling(a)


@parameters
class GammaNatural(NamedTuple):
    """lambda of a gamma density: a - 1 and -b."""

    log: Array
    linear: Array


@parameters
class GammaExpectation(NamedTuple):
    """mu of a gamma density: E[log x] and E[x]."""

    log: Array
    linear: Array


@dataclasses.dataclass(frozen=True)
class Gamma(ExponentialFamily):
    """The gamma density of a positive number, elementwise over any shape.

    log q(x) = (a - 1) log x - b x + a log b - log Gamma(a).

    Standard parameters: `concentration` a and `rate` b. lambda holds a from 3e-5 on in float32
    (6e-14 in float64) to 0.1 %; smaller ones are refused.

    lambda: log = a - 1, linear = -b. mu: log = E[log x], linear = E[x].

    Example:
      >>> import blr_optax as blr
      >>> gamma = blr.families.get("gamma")
      >>> lam = gamma.natural(concentration=3.0, rate=2.0)
      >>> print(gamma.mean(lam), gamma.entropy(lam).round(4))
      1.5 1.1545
    """

    Natural: ClassVar[type] = GammaNatural
    Expectation: ClassVar[type] = GammaExpectation
    support_of_marginals: ClassVar[str] = "positive"
    domains: ClassVar[dict] = {"log": domain.above(-1.0), "linear": domain.negative()}

    @checked(concentration=POSITIVE, rate=POSITIVE)
    def natural(self, *, concentration: ArrayLike, rate: ArrayLike) -> GammaNatural:
        """lambda from the concentration and the rate (both > 0)."""
        return GammaNatural(jnp.subtract(concentration, 1.0), jnp.negative(rate))

    def standard(self, lam: GammaNatural) -> dict[str, Array]:
        return {"concentration": 1.0 + lam.log, "rate": -lam.linear}

    def mean(self, lam: GammaNatural) -> Array:
        return (1.0 + lam.log) / -lam.linear

    def variance(self, lam: GammaNatural) -> Array:
        return self.mean(lam) / -lam.linear

    def log_partition(self, lam: GammaNatural) -> Array:
        """Return A = log Gamma(a) - a log b."""
        a = 1.0 + lam.log
        return log_gamma(a) - a * jnp.log(-lam.linear)

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> GammaExpectation:
        return GammaExpectation(jnp.log(theta), theta)

    def log_base_measure(self, lam: GammaNatural, theta: Array) -> Array:
        return jnp.zeros_like(theta * lam.log)

    def expectation(self, lam: GammaNatural) -> GammaExpectation:
        m = self.mean(lam)
        return GammaExpectation(jnp.log(m) - log_minus_digamma(1.0 + lam.log), m)

    def natural_from_expectation(self, mu: GammaExpectation, with_status: bool = False) -> PyTree:
        """lambda(mu) from log a - psi(a) = log E[x] - E[log x]; NaN where lambda holds none."""
        known = domain.positive().contains(mu.linear)
        m = jnp.where(known, mu.linear, 1.0)
        gap = jnp.log(m) - mu.log
        proper = known & domain.positive().contains(gap)
        a = inverse_log_minus_digamma(jnp.where(proper, gap, 1.0))
        lam = GammaNatural(a - 1.0, -a / m)
        proper &= self.in_domain(held(lam))  # unless a is too small for a - 1 to tell
        lam = GammaNatural(*(jnp.where(proper, x, jnp.nan) for x in lam))
        return (lam, proper) if with_status else lam

    def log_prob(self, lam: GammaNatural, theta: Array) -> Array:
        """log q; at 0 that is log b for a = 1, infinite for a < 1."""
        inside, end = (theta > 0) & (theta < jnp.inf), theta == 0
        x, zero = jnp.where(inside, theta, 1.0), jnp.where(end, theta, 1.0)
        log_x, a = jnp.log(x), 1.0 + lam.log
        found = _log_density(a, self.mean(lam), x, log_x) - log_x
        # Gamma(1) = 1: only there is it finite.
        limit = log_power(lam.log, zero) + lam.linear * zero + a * jnp.log(-lam.linear)
        return jnp.where(end, limit, jnp.where(inside, found, -jnp.inf))

    def entropy(self, lam: GammaNatural) -> Array:
        return log_entropy(1.0 + lam.log) + self.expectation(lam).log

    def kl(self, lam_p: GammaNatural, lam_q: GammaNatural) -> Array:
        a_p, a_q = 1.0 + lam_p.log, 1.0 + lam_q.log
        spread = a_q * relative_excess(self.mean(lam_q), self.mean(lam_p))
        return spread + concentration_divergence(a_p, a_q)

    def fisher_product(self, lam: GammaNatural, v: GammaNatural) -> GammaExpectation:
        """F = [[psi'(a), 1 / b], [1 / b, a / b^2]]."""
        a, b = 1.0 + lam.log, -lam.linear
        along = v.linear / b
        return GammaExpectation(trigamma(a) * v.log + along, (v.log + a * along) / b)

    def inverse_fisher_product(self, lam: GammaNatural, v: GammaExpectation) -> GammaNatural:
        """F^{-1}, whose determinant (a psi'(a) - 1) / b^2 would cancel for large a."""
        a, b = 1.0 + lam.log, -lam.linear
        log = (a * v.log - b * v.linear) / trigamma_excess(a)
        return GammaNatural(log, b * (b * v.linear - log) / a)

    def cdf(self, lam: GammaNatural, theta: Array) -> Array:
        """Return the regularised incomplete gamma function of b x."""
        a, b = self.standard(lam).values()
        return gammainc(a, b * jnp.maximum(theta, 0.0))

    def sample(self, key: Array, lam: GammaNatural, shape: tuple[int, ...] = ()) -> Array:
        a, b = jnp.broadcast_arrays(1.0 + lam.log, -lam.linear)
        g, c, log_x = gamma_log_draw(key, a, shape)
        # At least the smallest normal number: at zero the density may be infinite.
        x = jnp.maximum(g * jnp.exp(c) / b, jnp.finfo(g.dtype).tiny)
        return following(x, log_x - jnp.log(b))


@parameters
class InverseGammaNatural(NamedTuple):
    """lambda of an inverse gamma density: -a - 1 and -b."""

    log: Array
    reciprocal: Array


@parameters
class InverseGammaExpectation(NamedTuple):
    """mu of an inverse gamma density: E[log x] and E[1 / x]."""

    log: Array
    reciprocal: Array


@dataclasses.dataclass(frozen=True)
class InverseGamma(ExponentialFamily):
    """The density of a positive number whose reciprocal is gamma, elementwise.

    log q(x) = -(a + 1) log x - b / x + a log b - log Gamma(a).

    Standard parameters: `concentration` a and `scale` b. lambda holds a from 6e-5 on in float32
    (1.2e-13 in float64) to 0.1 %; smaller ones are refused.

    lambda: log = -a - 1, reciprocal = -b. mu: log = E[log x], reciprocal = E[1 / x].

    Example:
      >>> import blr_optax as blr
      >>> inverse_gamma = blr.families.get("inverse_gamma")
      >>> lam = inverse_gamma.natural(concentration=3.0, scale=4.0)
      >>> print(inverse_gamma.mean(lam), inverse_gamma.expectation(lam).reciprocal)
      2.0 0.75
    """

    Natural: ClassVar[type] = InverseGammaNatural
    Expectation: ClassVar[type] = InverseGammaExpectation
    support_of_marginals: ClassVar[str] = "positive"
    domains: ClassVar[dict] = {
        "log": domain.Domain(sign=-1, bound=-1.0),
        "reciprocal": domain.negative(),
    }

    @checked(concentration=POSITIVE, scale=POSITIVE)
    def natural(self, *, concentration: ArrayLike, scale: ArrayLike) -> InverseGammaNatural:
        """lambda from the concentration and the scale (both > 0)."""
        return InverseGammaNatural(jnp.subtract(-1.0, concentration), jnp.negative(scale))

    def _gamma(self, lam: InverseGammaNatural) -> GammaNatural:
        """Return the density of 1 / x."""
        return GammaNatural(-lam.log - 2.0, lam.reciprocal)

    def standard(self, lam: InverseGammaNatural) -> dict[str, Array]:
        return {"concentration": -1.0 - lam.log, "scale": -lam.reciprocal}

    def mean(self, lam: InverseGammaNatural) -> Array:
        """b / (a - 1), infinite for a <= 1."""
        over = -lam.log - 2.0
        return jnp.where(over > 0, -lam.reciprocal / jnp.where(over > 0, over, 1.0), jnp.inf)

    def has_mean(self, lam: InverseGammaNatural) -> Array:
        return lam.log < -2.0

    def variance(self, lam: InverseGammaNatural) -> Array:
        """b^2 / ((a - 1)^2 (a - 2)), infinite for a <= 2."""
        over = -lam.log - 3.0
        safe = jnp.where(over > 0, over, 1.0)
        mean = -lam.reciprocal / (1.0 + safe)
        return jnp.where(over > 0, mean * mean / safe, jnp.inf)

    def log_partition(self, lam: InverseGammaNatural) -> Array:
        """Return A = log Gamma(a) - a log b."""
        return Gamma().log_partition(self._gamma(lam))

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> InverseGammaExpectation:
        return InverseGammaExpectation(jnp.log(theta), 1.0 / theta)

    def log_base_measure(self, lam: InverseGammaNatural, theta: Array) -> Array:
        return jnp.zeros_like(theta * lam.log)

    def expectation(self, lam: InverseGammaNatural) -> InverseGammaExpectation:
        mu = Gamma().expectation(self._gamma(lam))
        return InverseGammaExpectation(-mu.log, mu.linear)

    def natural_from_expectation(
        self, mu: InverseGammaExpectation, with_status: bool = False
    ) -> PyTree:
        """lambda(mu) as for the gamma density of 1 / x."""
        reciprocal = GammaExpectation(-mu.log, mu.reciprocal)
        gamma, proper = Gamma().natural_from_expectation(reciprocal, with_status=True)
        lam = InverseGammaNatural(-gamma.log - 2.0, gamma.linear)
        proper &= self.in_domain(held(lam))  # -a - 1 has a digit less than a - 1
        lam = InverseGammaNatural(*(jnp.where(proper, x, jnp.nan) for x in lam))
        return (lam, proper) if with_status else lam

    def log_prob(self, lam: InverseGammaNatural, theta: Array) -> Array:
        inside = (theta > 0) & (theta < jnp.inf)
        x = jnp.where(inside, theta, 1.0)
        log_x, gamma = jnp.log(x), self._gamma(lam)
        found = _log_density(1.0 + gamma.log, Gamma().mean(gamma), 1.0 / x, -log_x) - log_x
        return jnp.where(inside, found, -jnp.inf)

    def entropy(self, lam: InverseGammaNatural) -> Array:
        return log_entropy(-1.0 - lam.log) + self.expectation(lam).log

    def kl(self, lam_p: InverseGammaNatural, lam_q: InverseGammaNatural) -> Array:
        return Gamma().kl(self._gamma(lam_p), self._gamma(lam_q))

    def fisher_product(
        self, lam: InverseGammaNatural, v: InverseGammaNatural
    ) -> InverseGammaExpectation:
        change = Gamma().fisher_product(self._gamma(lam), GammaNatural(-v.log, v.reciprocal))
        return InverseGammaExpectation(-change.log, change.linear)

    def inverse_fisher_product(
        self, lam: InverseGammaNatural, v: InverseGammaExpectation
    ) -> InverseGammaNatural:
        turned = GammaExpectation(-v.log, v.reciprocal)
        solved = Gamma().inverse_fisher_product(self._gamma(lam), turned)
        return InverseGammaNatural(-solved.log, solved.linear)

    def cdf(self, lam: InverseGammaNatural, theta: Array) -> Array:
        """Return the probability that 1 / x is at least 1 / theta."""
        a, b = self.standard(lam).values()
        positive = theta > 0
        above = gammaincc(a, b / jnp.where(positive, theta, 1.0))
        return jnp.where(positive, above, 0.0)

    def sample(self, key: Array, lam: InverseGammaNatural, shape: tuple[int, ...] = ()) -> Array:
        a, b = jnp.broadcast_arrays(-1.0 - lam.log, -lam.reciprocal)
        g, c, log_x = gamma_log_draw(key, a, shape)
        x = jnp.minimum(b / g * jnp.exp(-c), jnp.finfo(g.dtype).max)  # infinity is no draw
        return following(x, jnp.log(b) - log_x)


@parameters
class ExponentialNatural(NamedTuple):
    """lambda of an exponential density: -b."""

    linear: Array


@parameters
class ExponentialExpectation(NamedTuple):
    """mu of an exponential density: E[x]."""

    linear: Array


@dataclasses.dataclass(frozen=True)
class Exponential(RateFamily):
    """The exponential density of a positive number, elementwise.

    log q(x) = -b x + log b.

    Standard parameters: `rate` b. lambda: linear = -b. mu: linear = E[x] = 1 / b.

    Example:
      >>> import blr_optax as blr
      >>> exponential = blr.families.get("exponential")
      >>> print(exponential.expectation(exponential.natural(rate=4.0)).linear)
      0.25
    """

    Natural: ClassVar[type] = ExponentialNatural
    Expectation: ClassVar[type] = ExponentialExpectation
    domains: ClassVar[dict] = {"linear": domain.negative()}

    @checked(rate=POSITIVE)
    def natural(self, *, rate: ArrayLike) -> ExponentialNatural:
        """lambda from the rate (> 0)."""
        return ExponentialNatural(jnp.negative(rate))

    def standard(self, lam: ExponentialNatural) -> dict[str, Array]:
        return {"rate": -lam.linear}

    def mean(self, lam: ExponentialNatural) -> Array:
        return -1.0 / lam.linear

    def variance(self, lam: ExponentialNatural) -> Array:
        return jnp.square(self.mean(lam))

    def log_partition(self, lam: ExponentialNatural) -> Array:
        """Return A = -log b."""
        return -jnp.log(-lam.linear)

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> ExponentialExpectation:
        return ExponentialExpectation(theta)

    def log_base_measure(self, lam: ExponentialNatural, theta: Array) -> Array:
        return jnp.zeros_like(theta * lam.linear)

    def log_prob(self, lam: ExponentialNatural, theta: Array) -> Array:
        found = lam.linear * theta + jnp.log(-lam.linear)
        return jnp.where(theta >= 0, found, -jnp.inf)

    def entropy(self, lam: ExponentialNatural) -> Array:
        return 1.0 - jnp.log(-lam.linear)

    def cdf(self, lam: ExponentialNatural, theta: Array) -> Array:
        return -jnp.expm1(-self.standard(lam)["rate"] * jnp.maximum(theta, 0.0))

    def quantile(self, lam: ExponentialNatural, p: Array) -> Array:
        return -jnp.log1p(-p) / self.standard(lam)["rate"]

    def sample(self, key: Array, lam: ExponentialNatural, shape: tuple[int, ...] = ()) -> Array:
        mean = self.mean(lam)
        return mean * jax.random.exponential(key, shape + mean.shape, mean.dtype)
