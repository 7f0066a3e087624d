"""Distributions of counts: 0, 1, 2, ...

`binomial` (successes in a known number of trials), `poisson`, `geometric` and `negative_binomial`
(failures before the first, and before a known number of successes). T(theta) = theta in all.

Densities are those of Poisson counts given their sum, so that terms of the order of the count
never cancel; E log h, which has no closed form, comes from `_log_factorial`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _loops
from blr_optax.families._base import domain
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import (
    COUNT,
    COUNT_RATE,
    FRACTION,
    REAL,
    SUCCESSES,
    checked,
)
from blr_optax.families._discrete.bernoulli import (
    Scalar,
    binary_entropy,
    binary_kl,
    logistic,
    logit_from,
    softplus,
)
from blr_optax.families._numerics import log_factorial as lf

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import Alternative, ExpectationParameters, NaturalParameters, PyTree


@parameters
class BinomialNatural(NamedTuple):
    """lambda of a number of successes: the logit, and the known number of trials."""

    linear: Array
    total: Array


@parameters
class BinomialExpectation(NamedTuple):
    """mu of a number of successes: its mean n p, and the number of trials."""

    linear: Array
    total: Array


@dataclasses.dataclass(frozen=True)
class Binomial(Scalar):
    """The distribution of the successes in n trials, n known, elementwise over any shape.

    log q(theta) = log(n! / (theta! (n - theta)!)) + theta logit - n log(1 + exp(logit)).

    Standard parameters: `logit` or `probability`, and `total` (n, known). Where that is 0 the count
    is 0 for any logit: the row says nothing, its natural gradients are zero, and no lambda belongs
    to its mu. Counts are exact up to 2^24 in float32, and multiples of 2, 4, ... beyond.

    lambda: linear = logit, total = n. mu: linear = n p, the mean, total = n.

    Example:
      >>> import blr_optax as blr
      >>> binomial = blr.families.get("binomial")
      >>> lam = binomial.natural(probability=0.25, total=8)
      >>> print(binomial.mean(lam), binomial.entropy(lam).round(4))
      2.0 1.5958
    """

    Natural: ClassVar[type] = BinomialNatural
    Expectation: ClassVar[type] = BinomialExpectation
    domains: ClassVar[dict] = {"linear": domain.real()}
    known: ClassVar[tuple[str, ...]] = ("total",)
    enumerable: ClassVar[bool] = True
    constant_base_measure: ClassVar[bool] = False

    @checked(total=COUNT, logit=REAL, probability=FRACTION)
    def natural(
        self, *, total: ArrayLike, logit: Alternative = None, probability: Alternative = None
    ) -> BinomialNatural:
        """lambda from the logit or probability, and the known total (0, 1, 2, ...)."""
        return BinomialNatural(logit_from(logit, probability), jnp.asarray(total))

    def standard(self, lam: BinomialNatural) -> dict[str, Array]:
        return {"logit": lam.linear, "total": lam.total}

    def mean(self, lam: BinomialNatural) -> Array:
        return lam.total * logistic(lam.linear)

    def variance(self, lam: BinomialNatural) -> Array:
        return lam.total * logistic(lam.linear) * logistic(-lam.linear)

    def log_partition(self, lam: BinomialNatural) -> Array:
        """Return A = n log(1 + exp(logit))."""
        return lam.total * softplus(lam.linear)

    def _inside(self, lam: BinomialNatural, x: Array) -> Array:
        return lf.is_count(x) & (x <= lam.total)

    def _log_h(self, lam: BinomialNatural, x: Array) -> Array:
        return lf.log_choose(x, lam.total - x)

    def _log_q(self, lam: BinomialNatural, x: Array) -> Array:
        a = lam.linear
        return lf.log_split(
            x, lam.total - x, logistic(a), logistic(-a), -softplus(-a), -softplus(a)
        )

    def _rare(self, lam: BinomialNatural) -> Array:
        """Return the probability of the rarer outcome."""
        return logistic(jnp.where(lam.linear > 0, -lam.linear, lam.linear))

    def expected_log_base_measure(self, lam: BinomialNatural) -> Array:
        return lf.log_coefficient(self._rare(lam), lam.total)

    def base_measure_gradient(self, lam: BinomialNatural) -> BinomialNatural:
        n = lam.total
        slope = lf.slope(lambda p: lf.log_coefficient(p, n), self._rare(lam)) / lf.trials(n)
        return BinomialNatural(jnp.where(lam.linear > 0, -slope, slope), jnp.zeros_like(n))

    def inverse_fisher_product(
        self, lam: BinomialNatural, v: BinomialExpectation
    ) -> BinomialNatural:
        """F^{-1} v; zero where there are no trials, and F is zero."""
        fisher = jnp.where(lam.total > 0, self.variance(lam), jnp.inf)
        return BinomialNatural(v.linear / fisher, jnp.zeros_like(lam.total))

    def natural_from_expectation(
        self, mu: BinomialExpectation, with_status: bool = False
    ) -> PyTree:
        """log(mu / (n - mu)); NaN, and status False, unless 0 < mu < n."""
        linear = jnp.log(mu.linear) - jnp.log(mu.total - mu.linear)
        return self._checked(mu, linear, with_status)

    def entropy(self, lam: BinomialNatural) -> Array:
        n, rare = lam.total, self._rare(lam)
        many = n * rare > lf.large(n.dtype)
        v = jnp.where(many, self.variance(lam), 1e4)
        exact = n * binary_entropy(lam.linear) - lf.log_coefficient(rare, n)
        return jnp.where(many, lf.entropy_series(v, -1.0 / lf.trials(n)), exact)

    def kl(self, lam_p: BinomialNatural, lam_q: BinomialNatural) -> Array:
        """KL(p || q) for one and the same total."""
        return lam_p.total * binary_kl(lam_p.linear, lam_q.linear)

    def sample(self, key: Array, lam: BinomialNatural, shape: tuple[int, ...] = ()) -> Array:
        p, not_p = (jnp.broadcast_to(logistic(a), (*shape, *a.shape)) for a in (lam[0], -lam[0]))
        return lf.draw_binomial(key, lam.total, p, not_p)

    def support(self, lam: BinomialNatural, total: int | None = None) -> Float[Array, "values ..."]:
        """0 .. n along a new leading axis, n one and the same for the batch."""
        counts = jnp.arange(lf.common_total(lam.total, total) + 1, dtype=lam.linear.dtype)
        return lf.spread(counts, lam.linear.shape)

    def probabilities(self, mu: BinomialExpectation, total: int | None = None) -> Array:
        """Those of `support`, polynomials of mu; NaN where n is another than `total`."""
        n = lf.common_total(mu.total, total)
        p = jnp.stack([mu.linear, n - mu.linear], -1) / max(n, 1)
        return lf.chances(p, lf.compositions(n, 2)) * jnp.where(mu.total == n, 1.0, jnp.nan)


@parameters
class PoissonNatural(NamedTuple):
    """lambda of a Poisson count: the log of the rate."""

    linear: Array


@parameters
class PoissonExpectation(NamedTuple):
    """mu of a Poisson count: the rate."""

    linear: Array


@dataclasses.dataclass(frozen=True)
class Poisson(Scalar):
    """The Poisson distribution, elementwise over any shape.

    log q(theta) = theta log(rate) - rate - log(theta!).

    Standard parameters: `rate`. lambda: linear = log(rate). mu: linear = rate, the mean.

    Example:
      >>> import blr_optax as blr
      >>> poisson = blr.families.get("poisson")
      >>> lam = poisson.natural(rate=2.0)
      >>> print(lam.linear.round(4), poisson.entropy(lam).round(4))
      0.6931 1.7049
    """

    Natural: ClassVar[type] = PoissonNatural
    Expectation: ClassVar[type] = PoissonExpectation
    domains: ClassVar[dict] = {"linear": domain.real()}
    constant_base_measure: ClassVar[bool] = False

    @checked(rate=COUNT_RATE)
    def natural(self, *, rate: ArrayLike) -> PoissonNatural:
        """lambda from the rate (> 0)."""
        return PoissonNatural(jnp.log(rate))

    def standard(self, lam: PoissonNatural) -> dict[str, Array]:
        return {"rate": self.mean(lam)}

    def mean(self, lam: PoissonNatural) -> Array:
        return jnp.exp(lam.linear)

    def variance(self, lam: PoissonNatural) -> Array:
        return jnp.exp(lam.linear)

    def log_partition(self, lam: PoissonNatural) -> Array:
        """Return A = exp(lambda)."""
        return jnp.exp(lam.linear)

    def _log_h(self, lam: PoissonNatural, x: Array) -> Array:
        return 1.0 + lf.log_poisson(x, 1.0, 0.0)  # the density of rate one has h, and e^{-1}

    def _log_q(self, lam: PoissonNatural, x: Array) -> Array:
        return lf.log_poisson(x, self.mean(lam), lam.linear)

    def expected_log_base_measure(self, lam: PoissonNatural) -> Array:
        return -lf.poisson_log_factorial(self.mean(lam))

    def base_measure_gradient(self, lam: PoissonNatural) -> PoissonNatural:
        return PoissonNatural(-lf.slope(lf.poisson_log_factorial, self.mean(lam)))

    def natural_from_expectation(self, mu: PoissonExpectation, with_status: bool = False) -> PyTree:
        """log(mu); NaN, and status False, unless mu > 0."""
        return self._checked(mu, jnp.log(mu.linear), with_status)

    def entropy(self, lam: PoissonNatural) -> Array:
        m = self.mean(lam)
        many = m > lf.large(m.dtype)
        low = jnp.where(many, 0.0, lam.linear)
        rate = jnp.exp(low)
        few = rate * (1.0 - low) + lf.poisson_log_factorial(rate)
        series = lf.entropy_series(jnp.where(many, m, 1e4), jnp.zeros_like(m))
        return jnp.where(many, series, few)

    def kl(self, lam_p: PoissonNatural, lam_q: PoissonNatural) -> Array:
        d, m = lam_q.linear - lam_p.linear, self.mean(lam_p)
        near = jnp.abs(d) < 1.0
        close = m * lf.exp_excess(jnp.where(near, d, 0.0))
        return jnp.where(near, close, self.mean(lam_q) - m - m * d)

    def sample(self, key: Array, lam: PoissonNatural, shape: tuple[int, ...] = ()) -> Array:
        m = self.mean(lam)
        return lf.draw_poisson(key, jnp.broadcast_to(m, (*shape, *m.shape)))


class Waiting(Scalar):
    """What the two families of failures share: r successes are waited for, one if not said."""

    domains: ClassVar[dict] = {"linear": domain.negative()}

    def _total(self, lam: NaturalParameters) -> Array:
        return lam.total if self.known else jnp.ones_like(lam.linear)

    def standard(self, lam: NaturalParameters) -> dict[str, Array]:
        known = {name: getattr(lam, name) for name in self.known}
        return {"probability": -jnp.expm1(lam.linear), **known}

    def mean(self, lam: NaturalParameters) -> Array:
        return self._total(lam) * lf.failures(lam.linear)

    def variance(self, lam: NaturalParameters) -> Array:
        return self.mean(lam) / -jnp.expm1(lam.linear)

    def natural_from_expectation(
        self, mu: ExpectationParameters, with_status: bool = False
    ) -> PyTree:
        """-log(1 + r / mu); NaN, and status False, unless mu > 0."""
        return self._checked(mu, -jnp.log1p(self._total(mu) / mu.linear), with_status)

    def kl(self, lam_p: NaturalParameters, lam_q: NaturalParameters) -> Array:
        """KL(p || q), for one and the same total."""
        return self._total(lam_p) * lf.waiting_kl(lam_p.linear, lam_q.linear)


@parameters
class GeometricNatural(NamedTuple):
    """lambda of a waiting time: log(1 - p)."""

    linear: Array


@parameters
class GeometricExpectation(NamedTuple):
    """mu of a waiting time: its mean (1 - p) / p."""

    linear: Array


@dataclasses.dataclass(frozen=True)
class Geometric(Waiting):
    """The distribution of the failures before the first success, elementwise over any shape.

    log q(theta) = theta log(1 - p) + log p.

    Standard parameters: `probability` (p, of success).
    lambda: linear = log(1 - p). mu: linear = (1 - p) / p, the mean.

    Example:
      >>> import blr_optax as blr
      >>> geometric = blr.families.get("geometric")
      >>> lam = geometric.natural(probability=0.25)
      >>> print(geometric.mean(lam).round(4), geometric.entropy(lam).round(4))
      3.0 2.2493
    """

    Natural: ClassVar[type] = GeometricNatural
    Expectation: ClassVar[type] = GeometricExpectation

    @checked(probability=FRACTION)
    def natural(self, *, probability: ArrayLike) -> GeometricNatural:
        """lambda from the probability of success, in (0, 1)."""
        return GeometricNatural(jnp.log1p(jnp.negative(probability)))

    def log_partition(self, lam: GeometricNatural) -> Array:
        """Return A = -log(1 - exp(lambda))."""
        return -lf.log_success(lam.linear)

    def _log_q(self, lam: GeometricNatural, x: Array) -> Array:
        return x * lam.linear + lf.log_success(lam.linear)

    def entropy(self, lam: GeometricNatural) -> Array:
        return -lf.log_success(lam.linear) - lam.linear * lf.failures(lam.linear)

    def sample(self, key: Array, lam: GeometricNatural, shape: tuple[int, ...] = ()) -> Array:
        x = lam.linear
        return jnp.floor(jax.random.exponential(key, (*shape, *x.shape), x.dtype) / -x)


@parameters
class NegativeBinomialNatural(NamedTuple):
    """lambda of a number of failures: log(1 - p), and the known number of successes."""

    linear: Array
    total: Array


@parameters
class NegativeBinomialExpectation(NamedTuple):
    """mu of a number of failures: its mean r (1 - p) / p, and the number of successes."""

    linear: Array
    total: Array


@dataclasses.dataclass(frozen=True)
class NegativeBinomial(Waiting):
    """The distribution of the failures before the r-th success, r > 0 known and real, elementwise.

    log q(theta) = log(Gamma(r + theta) / (Gamma(r) theta!)) + theta log(1 - p) + r log p.

    Standard parameters: `probability` (p, of success) and `total` (r, known).
    lambda: linear = log(1 - p), total = r. mu: linear = r (1 - p) / p, the mean, total = r.

    Example:
      >>> import blr_optax as blr
      >>> negative_binomial = blr.families.get("negative_binomial")
      >>> lam = negative_binomial.natural(probability=0.25, total=2.0)
      >>> print(negative_binomial.mean(lam).round(4), negative_binomial.entropy(lam).round(4))
      6.0 2.8054
    """

    Natural: ClassVar[type] = NegativeBinomialNatural
    Expectation: ClassVar[type] = NegativeBinomialExpectation
    known: ClassVar[tuple[str, ...]] = ("total",)
    constant_base_measure: ClassVar[bool] = False

    @checked(probability=FRACTION, total=SUCCESSES)
    def natural(self, *, probability: ArrayLike, total: ArrayLike) -> NegativeBinomialNatural:
        """lambda from the probability of success, in (0, 1), and the known total (> 0)."""
        return NegativeBinomialNatural(jnp.log1p(jnp.negative(probability)), jnp.asarray(total))

    def log_partition(self, lam: NegativeBinomialNatural) -> Array:
        """Return A = -r log(1 - exp(lambda))."""
        return -lam.total * lf.log_success(lam.linear)

    # The last trial is a success: r of all r + x are, in r / (r + x) of their orders.

    def _log_h(self, lam: NegativeBinomialNatural, x: Array) -> Array:
        return lf.log_choose(x, lam.total) - jnp.log1p(x / lam.total)

    def _log_q(self, lam: NegativeBinomialNatural, x: Array) -> Array:
        r, a = lam.total, lam.linear
        split = lf.log_split(x, r, jnp.exp(a), -jnp.expm1(a), a, lf.log_success(a))
        return split - jnp.log1p(x / r)

    def expected_log_base_measure(self, lam: NegativeBinomialNatural) -> Array:
        return lf.rising_over_factorial(self.mean(lam), lam.total)

    def base_measure_gradient(self, lam: NegativeBinomialNatural) -> NegativeBinomialNatural:
        slope = lf.slope(lambda m: lf.rising_over_factorial(m, lam.total), self.mean(lam))
        return NegativeBinomialNatural(slope, jnp.zeros_like(lam.total))

    def entropy(self, lam: NegativeBinomialNatural) -> Array:
        r, m = lam.total, self.mean(lam)
        many = jnp.minimum(r, m) > lf.large(m.dtype)
        v, rho = (jnp.where(many, x, 1e4) for x in (self.variance(lam), r))
        log_q = r * lf.log_success(lam.linear) + lam.linear * m
        exact = -log_q - self.expected_log_base_measure(lam)
        return jnp.where(many, lf.entropy_series(v, 1.0 / rho), exact)

    def sample(
        self, key: Array, lam: NegativeBinomialNatural, shape: tuple[int, ...] = ()
    ) -> Array:
        """Draw a Poisson count whose rate is a draw from a gamma density."""
        key_rate, key_count = jax.random.split(key)
        key_rate = _loops.key_for(key_rate, lam.total)
        g = jax.random.gamma(key_rate, lam.total, (*shape, *lam.total.shape), lam.total.dtype)
        return lf.draw_poisson(key_count, g * lf.failures(lam.linear))
