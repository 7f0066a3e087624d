"""A normal density whose precision is gamma, jointly; and the same with its variance.

    x | tau ~ N(m, 1 / (kappa tau)),    tau ~ gamma(a, rate b),    v = 1 / tau

lambda mixes the coordinates: linear = kappa m, quadratic = -kappa / 2, and the coefficient of tau
(of 1 / v) is -(b + kappa m^2 / 2). Everything is written in (m, kappa) and the gamma density of
tau; b is what is left of lambda, and loses digits where kappa m^2 is large beside it: there
`families.Centered` counts x from a point near m.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax.families._base import domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import POSITIVE, REAL, checked
from blr_optax.families._continuous.gamma import (
    Gamma,
    GammaExpectation,
    GammaNatural,
    InverseGamma,
    InverseGammaNatural,
)
from blr_optax.families._continuous.joint import (
    FAR,
    MARGIN,
    MeanPrecision,
    MeanVariance,
    retract_shortened,
)
from blr_optax.families._numerics.special import LOG_2PI, log_power, relative_excess

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool

    from blr_optax._typing import NaturalParameters, PyTree

GAMMA, INVERSE_GAMMA = Gamma(), InverseGamma()


@parameters
class NormalGammaNatural(NamedTuple):
    """lambda of a normal-gamma density: kappa m, -kappa / 2, a - 1/2 and -(b + kappa m^2 / 2)."""

    linear: Array
    quadratic: Array
    log: Array
    precision: Array


@parameters
class NormalGammaExpectation(NamedTuple):
    """mu of a normal-gamma density: E[tau x], E[tau x^2], E[log tau] and E[tau]."""

    linear: Array
    quadratic: Array
    log: Array
    precision: Array


@dataclasses.dataclass(frozen=True)
class NormalGamma(ExponentialFamily):
    """The normal-gamma density of a mean x and a precision tau, elementwise over any shape.

    log q(x, tau) = log N(x; m, 1 / (kappa tau)) + log gamma(tau; a, b).

    Standard parameters: `mean` m, `kappa`, `concentration` a and `rate` b. theta is a
    `MeanPrecision`.

    lambda: linear = kappa m, quadratic = -kappa / 2, log = a - 1/2,
    precision = -(b + kappa m^2 / 2).
    mu: linear = E[tau x], quadratic = E[tau x^2], log = E[log tau], precision = E[tau].

    Example:
      >>> import blr_optax as blr
      >>> normal_gamma = blr.families.NormalGamma()
      >>> lam = normal_gamma.natural(mean=1.0, kappa=2.0, concentration=3.0, rate=4.0)
      >>> print(lam.linear, lam.precision, normal_gamma.mean(lam).precision)
      2.0 -5.0 0.75
    """

    Natural: ClassVar[type] = NormalGammaNatural
    Expectation: ClassVar[type] = NormalGammaExpectation
    domains: ClassVar[dict] = {
        "linear": domain.real(),
        "quadratic": domain.negative(),
        "log": domain.above(-0.5),
        "precision": domain.negative(),
    }
    joint: ClassVar[bool] = True
    when_lost: ClassVar[str] = FAR

    @checked(mean=REAL, kappa=POSITIVE, concentration=POSITIVE, rate=POSITIVE)
    def natural(
        self, *, mean: ArrayLike, kappa: ArrayLike, concentration: ArrayLike, rate: ArrayLike
    ) -> NormalGammaNatural:
        """lambda from the mean, and kappa, the concentration and the rate (all > 0)."""
        m, kappa, a, b = map(jnp.asarray, (mean, kappa, concentration, rate))
        return NormalGammaNatural(kappa * m, -0.5 * kappa, a - 0.5, -(b + 0.5 * kappa * m * m))

    def normal(self, lam: NormalGammaNatural) -> tuple[Array, Array]:
        """m and kappa."""
        kappa = -2.0 * lam.quadratic
        return lam.linear / kappa, kappa

    def gamma(self, lam: NormalGammaNatural) -> GammaNatural:
        """Return the gamma density of tau."""
        m, _ = self.normal(lam)
        return GammaNatural(lam.log - 0.5, lam.precision + 0.5 * m * lam.linear)

    def standard(self, lam: NormalGammaNatural) -> dict[str, Array]:
        m, kappa = self.normal(lam)
        return {"mean": m, "kappa": kappa, **GAMMA.standard(self.gamma(lam))}

    def mean(self, lam: NormalGammaNatural) -> MeanPrecision:
        return MeanPrecision(self.normal(lam)[0], GAMMA.mean(self.gamma(lam)))

    def variance(self, lam: NormalGammaNatural) -> MeanPrecision:
        """Of x it is b / (kappa (a - 1)), infinite for a <= 1."""
        gamma, kappa = self.gamma(lam), self.normal(lam)[1]
        finite = gamma.log > 0
        of_mean = -gamma.linear / (kappa * jnp.where(finite, gamma.log, 1.0))
        return MeanPrecision(jnp.where(finite, of_mean, jnp.inf), GAMMA.variance(gamma))

    def log_partition(self, lam: NormalGammaNatural) -> Array:
        """Return A = log Gamma(a) - a log b - log(kappa) / 2 + log(2 pi) / 2."""
        _, kappa = self.normal(lam)
        return GAMMA.log_partition(self.gamma(lam)) + 0.5 * (LOG_2PI - jnp.log(kappa))

    def sufficient_statistics(
        self, theta: MeanPrecision, lam: NaturalParameters = None
    ) -> NormalGammaExpectation:
        x, tau = theta
        return NormalGammaExpectation(tau * x, tau * x * x, jnp.log(tau), tau)

    def log_base_measure(self, lam: NormalGammaNatural, theta: MeanPrecision) -> Array:
        return jnp.zeros_like(lam.linear * theta.mean)

    def expectation(self, lam: NormalGammaNatural) -> NormalGammaExpectation:
        (m, kappa), mu = self.normal(lam), GAMMA.expectation(self.gamma(lam))
        linear = m * mu.linear
        return NormalGammaExpectation(linear, 1.0 / kappa + m * linear, mu.log, mu.linear)

    def natural_from_expectation(
        self, mu: NormalGammaExpectation, with_status: bool = False
    ) -> PyTree:
        """lambda(mu): 1 / kappa = mu_quadratic - m mu_linear, and the gamma density's solve."""
        gamma, proper = GAMMA.natural_from_expectation(
            GammaExpectation(mu.log, mu.precision), with_status=True
        )
        m = mu.linear / jnp.where(proper, mu.precision, 1.0)
        spread = mu.quadratic - m * mu.linear
        proper &= domain.positive().contains(spread) & jnp.isfinite(m)
        kappa = 1.0 / jnp.where(proper, spread, jnp.nan)
        log = jnp.where(proper, gamma.log + 0.5, jnp.nan)
        linear = kappa * m
        lam = NormalGammaNatural(linear, -0.5 * kappa, log, gamma.linear - 0.5 * m * linear)
        return (lam, proper & self.in_domain(lam)) if with_status else lam

    def log_prob(self, lam: NormalGammaNatural, theta: MeanPrecision) -> Array:
        """log q; at tau = 0 that is finite for a = 1/2, infinite below."""
        (m, kappa), (x, tau), gamma = self.normal(lam), theta, self.gamma(lam)
        inside, end = tau > 0, tau == 0
        inner, zero = jnp.where(inside, tau, 1.0), jnp.where(end, tau, 1.0)
        square = 0.5 * kappa * jnp.square(x - m)
        normal = 0.5 * (jnp.log(kappa * inner) - LOG_2PI) - inner * square
        found = normal + GAMMA.log_prob(gamma, inner)
        # Gamma(1/2)^2 = pi.
        limit = log_power(lam.log, zero) + (lam.log + 0.5) * jnp.log(-gamma.linear)
        limit += 0.5 * (jnp.log(kappa / jnp.pi) - LOG_2PI) + zero * (gamma.linear - square)
        return jnp.where(end, limit, jnp.where(inside, found, -jnp.inf))

    def entropy(self, lam: NormalGammaNatural) -> Array:
        gamma, (_, kappa) = self.gamma(lam), self.normal(lam)
        log_precision = jnp.log(kappa) + GAMMA.expectation(gamma).log
        return GAMMA.entropy(gamma) + 0.5 * (1.0 + LOG_2PI - log_precision)

    def kl(self, lam_p: NormalGammaNatural, lam_q: NormalGammaNatural) -> Array:
        (m_p, kappa_p), (m_q, kappa_q) = self.normal(lam_p), self.normal(lam_q)
        p, q = self.gamma(lam_p), self.gamma(lam_q)
        shift = kappa_q * GAMMA.mean(p) * jnp.square(m_p - m_q)
        return 0.5 * (relative_excess(kappa_p, kappa_q) + shift) + GAMMA.kl(p, q)

    def inverse_fisher_product(
        self, lam: NormalGammaNatural, v: NormalGammaExpectation
    ) -> NormalGammaNatural:
        """F^{-1} through (m, kappa) and the gamma density, whose own F^{-1} cancels nowhere."""
        (m, kappa), gamma = self.normal(lam), self.gamma(lam)
        by = GAMMA.inverse_fisher_product(gamma, GammaExpectation(v.log, v.precision))
        dm = (v.linear - m * v.precision) / GAMMA.mean(gamma)
        dkappa = -kappa * kappa * (v.quadratic - 2.0 * m * v.linear + m * m * v.precision)
        linear = kappa * dm + m * dkappa
        precision = by.linear - kappa * m * dm - 0.5 * m * m * dkappa
        return NormalGammaNatural(linear, -0.5 * dkappa, by.log, precision)

    def sample(
        self, key: Array, lam: NormalGammaNatural, shape: tuple[int, ...] = ()
    ) -> MeanPrecision:
        key_gamma, key_normal = jax.random.split(key)
        m, kappa = self.normal(lam)
        tau = GAMMA.sample(key_gamma, self.gamma(lam), shape)
        z = jax.random.normal(key_normal, tau.shape, tau.dtype)
        return MeanPrecision(m + z * jax.lax.rsqrt(kappa * tau), tau)

    def in_domain(self, lam: NormalGammaNatural) -> Bool[Array, ...]:
        """Also b > 0, as far as lambda's rounding tells."""
        return super().in_domain(lam) & GAMMA.in_domain(self.gamma(lam))

    def retract(self, lam: NormalGammaNatural, step: NormalGammaNatural) -> NormalGammaNatural:
        """Second-order steps of kappa, a and b; m' = m + (step.linear - m dkappa) / kappa'."""
        return retract_shortened(self, lam, step, self.move)

    def move(
        self, lam: NormalGammaNatural, step: NormalGammaNatural
    ) -> tuple[NormalGammaNatural, Array]:
        """Return the step of `retract`, and whether b survives rounding."""
        (m, kappa), dkappa = self.normal(lam), -2.0 * step.quadratic
        rate = step.precision + m * step.linear - 0.5 * m * m * dkappa
        new = GAMMA.retract(self.gamma(lam), GammaNatural(step.log, rate))
        kappa = domain.positive().retract(kappa, dkappa)
        m = m + (step.linear - m * dkappa) / kappa
        drowning = 0.5 * kappa * m * m
        safe = -new.linear > MARGIN * jnp.finfo(m.dtype).eps * drowning
        precision = new.linear - drowning
        return NormalGammaNatural(kappa * m, -0.5 * kappa, new.log + 0.5, precision), safe


NORMAL_GAMMA = NormalGamma()


@parameters
class NormalInverseGammaNatural(NamedTuple):
    """lambda of its density: kappa m, -kappa / 2, -(a + 3/2) and -(b + kappa m^2 / 2)."""

    linear: Array
    quadratic: Array
    log: Array
    reciprocal: Array


@parameters
class NormalInverseGammaExpectation(NamedTuple):
    """mu of its density: E[x / v], E[x^2 / v], E[log v] and E[1 / v]."""

    linear: Array
    quadratic: Array
    log: Array
    reciprocal: Array


@dataclasses.dataclass(frozen=True)
class NormalInverseGamma(ExponentialFamily):
    """The normal-inverse-gamma density of a mean x and a variance v, elementwise.

    log q(x, v) = log N(x; m, v / kappa) + log inverse_gamma(v; a, b).

    Standard parameters: `mean` m, `kappa`, `concentration` a and `scale` b. theta is a
    `MeanVariance`.

    lambda: linear = kappa m, quadratic = -kappa / 2, log = -(a + 3/2), reciprocal =
    -(b + kappa m^2 / 2). mu: linear = E[x / v], quadratic = E[x^2 / v], log = E[log v],
    reciprocal = E[1 / v].

    Example:
      >>> import blr_optax as blr
      >>> family = blr.families.NormalInverseGamma()
      >>> lam = family.natural(mean=1.0, kappa=2.0, concentration=3.0, scale=4.0)
      >>> print(lam.log, family.mean(lam).variance)
      -4.5 2.0
    """

    Natural: ClassVar[type] = NormalInverseGammaNatural
    Expectation: ClassVar[type] = NormalInverseGammaExpectation
    domains: ClassVar[dict] = {
        "linear": domain.real(),
        "quadratic": domain.negative(),
        "log": domain.Domain(sign=-1, bound=-1.5),
        "reciprocal": domain.negative(),
    }
    joint: ClassVar[bool] = True
    when_lost: ClassVar[str] = FAR

    @checked(mean=REAL, kappa=POSITIVE, concentration=POSITIVE, scale=POSITIVE)
    def natural(
        self, *, mean: ArrayLike, kappa: ArrayLike, concentration: ArrayLike, scale: ArrayLike
    ) -> NormalInverseGammaNatural:
        """lambda from the mean, and kappa, the concentration and the scale (all > 0)."""
        m, kappa, a, b = map(jnp.asarray, (mean, kappa, concentration, scale))
        reciprocal = -(b + 0.5 * kappa * m * m)
        return NormalInverseGammaNatural(kappa * m, -0.5 * kappa, -(a + 1.5), reciprocal)

    def _precise(self, lam: NormalInverseGammaNatural) -> NormalGammaNatural:
        """Return the density of (x, 1 / v)."""
        return NormalGammaNatural(lam.linear, lam.quadratic, -lam.log - 2.0, lam.reciprocal)

    def _varied(self, lam: NormalGammaNatural) -> NormalInverseGammaNatural:
        return NormalInverseGammaNatural(lam.linear, lam.quadratic, -lam.log - 2.0, lam.precision)

    def standard(self, lam: NormalInverseGammaNatural) -> dict[str, Array]:
        standard = NORMAL_GAMMA.standard(self._precise(lam))
        standard["scale"] = standard.pop("rate")
        return standard

    def mean(self, lam: NormalInverseGammaNatural) -> MeanVariance:
        """(m, b / (a - 1)), the second infinite for a <= 1."""
        precise = self._precise(lam)
        inverse = INVERSE_GAMMA.mean(_inverse_gamma(precise))
        return MeanVariance(NORMAL_GAMMA.normal(precise)[0], inverse)

    def has_mean(self, lam: NormalInverseGammaNatural) -> Array:
        return INVERSE_GAMMA.has_mean(_inverse_gamma(self._precise(lam)))

    def variance(self, lam: NormalInverseGammaNatural) -> MeanVariance:
        """Of x it is infinite for a <= 1, of v for a <= 2."""
        precise = self._precise(lam)
        inverse = INVERSE_GAMMA.variance(_inverse_gamma(precise))
        return MeanVariance(NORMAL_GAMMA.variance(precise).mean, inverse)

    def log_partition(self, lam: NormalInverseGammaNatural) -> Array:
        """Return A = log Gamma(a) - a log b - log(kappa) / 2 + log(2 pi) / 2."""
        return NORMAL_GAMMA.log_partition(self._precise(lam))

    def sufficient_statistics(
        self, theta: MeanVariance, lam: NaturalParameters = None
    ) -> NormalInverseGammaExpectation:
        x, v = theta
        return NormalInverseGammaExpectation(x / v, x * (x / v), jnp.log(v), 1.0 / v)

    def log_base_measure(self, lam: NormalInverseGammaNatural, theta: MeanVariance) -> Array:
        return jnp.zeros_like(lam.linear * theta.mean)

    def expectation(self, lam: NormalInverseGammaNatural) -> NormalInverseGammaExpectation:
        linear, quadratic, log, precision = NORMAL_GAMMA.expectation(self._precise(lam))
        return NormalInverseGammaExpectation(linear, quadratic, -log, precision)

    def natural_from_expectation(
        self, mu: NormalInverseGammaExpectation, with_status: bool = False
    ) -> PyTree:
        """lambda(mu) as for the normal-gamma density of (x, 1 / v)."""
        turned = NormalGammaExpectation(mu.linear, mu.quadratic, -mu.log, mu.reciprocal)
        precise, proper = NORMAL_GAMMA.natural_from_expectation(turned, with_status=True)
        lam = self._varied(precise)
        return (lam, proper) if with_status else lam

    def log_prob(self, lam: NormalInverseGammaNatural, theta: MeanVariance) -> Array:
        inside = (theta.variance > 0) & (theta.variance < jnp.inf)
        v = jnp.where(inside, theta.variance, 1.0)
        turned = MeanPrecision(theta.mean, 1.0 / v)
        found = NORMAL_GAMMA.log_prob(self._precise(lam), turned) - 2.0 * jnp.log(v)
        return jnp.where(inside, found, -jnp.inf)

    def entropy(self, lam: NormalInverseGammaNatural) -> Array:
        # |dv / dtau| = v^2
        return NORMAL_GAMMA.entropy(self._precise(lam)) + 2.0 * self.expectation(lam).log

    def kl(self, lam_p: NormalInverseGammaNatural, lam_q: NormalInverseGammaNatural) -> Array:
        return NORMAL_GAMMA.kl(self._precise(lam_p), self._precise(lam_q))

    def inverse_fisher_product(
        self, lam: NormalInverseGammaNatural, v: NormalInverseGammaExpectation
    ) -> NormalInverseGammaNatural:
        turned = NormalGammaExpectation(v.linear, v.quadratic, -v.log, v.reciprocal)
        solved = NORMAL_GAMMA.inverse_fisher_product(self._precise(lam), turned)
        return NormalInverseGammaNatural(
            solved.linear, solved.quadratic, -solved.log, solved.precision
        )

    def sample(
        self, key: Array, lam: NormalInverseGammaNatural, shape: tuple[int, ...] = ()
    ) -> MeanVariance:
        x, tau = NORMAL_GAMMA.sample(key, self._precise(lam), shape)
        return MeanVariance(x, 1.0 / tau)

    def in_domain(self, lam: NormalInverseGammaNatural) -> Bool[Array, ...]:
        """Also b > 0, as far as lambda's rounding tells."""
        return super().in_domain(lam) & NORMAL_GAMMA.in_domain(self._precise(lam))

    def retract(
        self, lam: NormalInverseGammaNatural, step: NormalInverseGammaNatural
    ) -> NormalInverseGammaNatural:
        """As for the normal-gamma density of (x, 1 / v)."""

        def move(
            lam: NormalInverseGammaNatural, step: NormalInverseGammaNatural
        ) -> tuple[NormalInverseGammaNatural, Array]:
            turned = NormalGammaNatural(step.linear, step.quadratic, -step.log, step.reciprocal)
            new, safe = NORMAL_GAMMA.move(self._precise(lam), turned)
            return self._varied(new), safe

        return retract_shortened(self, lam, step, move)


def _inverse_gamma(lam: NormalGammaNatural) -> InverseGammaNatural:
    """Return the inverse gamma density of 1 / tau."""
    gamma = NORMAL_GAMMA.gamma(lam)
    return InverseGammaNatural(-gamma.log - 2.0, gamma.linear)
