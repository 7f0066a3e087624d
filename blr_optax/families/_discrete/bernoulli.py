"""Distributions of one binary choice.

    P(high) = p    logit = log(p / (1 - p)) = (high - low) lambda    h = 1    T(theta) = theta

Two members: `bernoulli` on {0, 1} and `rademacher` on {-1, +1}. Both p and 1 - p are kept, each to
its last digit, so that no logit is too large: 1 - p is 4e-18 at logit 40.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax._validate import unwritten
from blr_optax.families._base import domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import FRACTION, REAL, checked
from blr_optax.families._numerics import log_factorial as lf

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import Alternative, ExpectationParameters, NaturalParameters, PyTree


@jax.custom_jvp
def logistic(x: Float[Array, ...]) -> Float[Array, ...]:
    """1 / (1 + exp(-x)), whose slope keeps its digits where the function is flat."""
    return jax.lax.logistic(x)


@logistic.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (x,), (dx,) = primals, tangents
    p = logistic(x)
    return p, dx * (p * logistic(-x))


@jax.custom_jvp
def softplus(x: Float[Array, ...]) -> Float[Array, ...]:
    """log(1 + exp(x)) = -log(1 - p) at the logit x, whose slope keeps its digits.

    The library's second derivative, p (1 - p), is zero in float32 from x = 15 on.
    """
    return jax.nn.softplus(x)


@softplus.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (x,), (dx,) = primals, tangents
    return softplus(x), dx * logistic(x)


def binary_entropy(logit: Float[Array, ...]) -> Float[Array, ...]:
    """-p log p - (1 - p) log(1 - p)."""
    return logistic(logit) * softplus(-logit) + logistic(-logit) * softplus(logit)


def binary_kl(logit_p: Float[Array, ...], logit_q: Float[Array, ...]) -> Float[Array, ...]:
    """KL(p || q) of one binary choice: log E[exp(u)], u = d (x - E[x]), d the change of logit."""
    p, not_p = logistic(logit_p), logistic(-logit_p)
    d = logit_q - logit_p
    near = jnp.abs(d) < 1.0
    small = jnp.where(near, d, 0.0)
    # E[u] = 0: a sum of two terms >= 0 when p is near q.
    yes, no = lf.exp_excess_near(not_p * small), lf.exp_excess_near(-p * small)
    close = jnp.log1p(p * yes + not_p * no)
    # softplus(x) = max(x, 0) + softplus(-|x|), and p + not_p = 1.
    flat = softplus(-jnp.abs(logit_q)) - softplus(-jnp.abs(logit_p))
    yes = jnp.minimum(logit_p, 0.0) - jnp.minimum(logit_q, 0.0)
    no = jnp.maximum(logit_q, 0.0) - jnp.maximum(logit_p, 0.0)
    return jnp.where(near, close, p * yes + not_p * no + flat)


def logit_from(logit: ArrayLike | None, probability: ArrayLike | None) -> Float[Array, ...]:
    """Return the logit, from itself or from a probability."""
    if logit is not None:
        return jnp.asarray(logit)
    p = jnp.asarray(probability)
    return jnp.log(p) - jnp.log1p(-p)


class Scalar(ExponentialFamily):
    """A family of one number with T = theta, lambda first in its fields: F is the variance.

    Densities are written on the support (unless said: 0, 1, 2, ...) and are -inf elsewhere.
    """

    reparameterized: ClassVar[bool] = False

    def _inside(self, lam: NaturalParameters, x: Array) -> Array:
        return lf.is_count(x)

    def _log_h(self, lam: NaturalParameters, x: Array) -> Array:
        """log h at a theta of the support."""
        raise unwritten(self, "_log_h(self, lam, x)")

    def _log_q(self, lam: NaturalParameters, x: Array) -> Array:
        """log q at a theta of the support."""
        raise unwritten(self, "_log_q(self, lam, x)")

    def _where_inside(self, f: Callable, lam: NaturalParameters, theta: Array) -> Array:
        x = jnp.asarray(theta, lam.linear.dtype) + jnp.zeros_like(lam.linear)
        inside = self._inside(lam, x)
        return jnp.where(inside, f(lam, jnp.where(inside, x, 0.0)), -jnp.inf)

    def log_prob(self, lam: NaturalParameters, theta: Array) -> Array:
        return self._where_inside(self._log_q, lam, theta)

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> ExpectationParameters:
        theta = jnp.asarray(theta)
        return self.Expectation(theta, **{name: jnp.zeros_like(theta) for name in self.known})

    def log_base_measure(self, lam: NaturalParameters, theta: Array) -> Array:
        if self.constant_base_measure:
            batch = jnp.broadcast_shapes(jnp.shape(theta), lam.linear.shape)
            return jnp.zeros(batch, lam.linear.dtype)
        return self._where_inside(self._log_h, lam, theta)

    def expectation(self, lam: NaturalParameters) -> ExpectationParameters:
        return self.Expectation(self.mean(lam), *lam[1:])

    def _checked(self, mu: ExpectationParameters, linear: Array, with_status: bool) -> Any:
        """lambda from its first field, NaN where that is not a member, and whether it is one."""
        proper = self.domains["linear"].contains(linear)
        lam = self.Natural(jnp.where(proper, linear, jnp.nan), *mu[1:])
        return (lam, proper) if with_status else lam

    def fisher_product(self, lam: NaturalParameters, v: PyTree) -> ExpectationParameters:
        return self.Expectation(self.variance(lam) * v.linear, *map(jnp.zeros_like, lam[1:]))

    def inverse_fisher_product(self, lam: NaturalParameters, v: PyTree) -> NaturalParameters:
        return self.Natural(v.linear / self.variance(lam), *map(jnp.zeros_like, lam[1:]))


class Binary(Scalar):
    """What the two families share. `low` is the lower value; the higher one is 1."""

    domains: ClassVar[dict] = {"linear": domain.real()}
    enumerable: ClassVar[bool] = True
    relaxable: ClassVar[bool] = True
    low: ClassVar[float]

    def _logit(self, lam: NaturalParameters) -> Array:
        return (1.0 - self.low) * lam.linear

    @checked(logit=REAL, probability=FRACTION)
    def natural(
        self, *, logit: Alternative = None, probability: Alternative = None
    ) -> NaturalParameters:
        """lambda from the logit or the probability (in (0, 1)) of the value 1."""
        return self.Natural(logit_from(logit, probability) / (1.0 - self.low))

    def standard(self, lam: NaturalParameters) -> dict[str, Array]:
        """Return the logit, which unlike the probability is never rounded to 1."""
        return {"logit": self._logit(lam)}

    def variance(self, lam: NaturalParameters) -> Array:
        logit = self._logit(lam)
        return (1.0 - self.low) ** 2 * logistic(logit) * logistic(-logit)

    def log_partition(self, lam: NaturalParameters) -> Array:
        """Return A = log(exp(lambda) + exp(low lambda))."""
        return softplus(self._logit(lam)) + self.low * lam.linear

    def _inside(self, lam: NaturalParameters, x: Array) -> Array:
        return (x == 1.0) | (x == self.low)

    def _log_q(self, lam: NaturalParameters, x: Array) -> Array:
        logit = self._logit(lam)
        return -softplus(jnp.where(x == 1.0, -logit, logit))

    def entropy(self, lam: NaturalParameters) -> Array:
        return binary_entropy(self._logit(lam))

    def kl(self, lam_p: NaturalParameters, lam_q: NaturalParameters) -> Array:
        return binary_kl(self._logit(lam_p), self._logit(lam_q))

    def sample(self, key: Array, lam: NaturalParameters, shape: tuple[int, ...] = ()) -> Array:
        logit = self._logit(lam)
        # The rarer outcome keeps its digits.
        threshold = lf.quanta(logistic(-jnp.abs(logit)))
        rare = jax.random.bits(key, (*shape, *logit.shape), threshold.dtype) < threshold
        return jnp.where(rare == (logit < 0), 1.0, self.low).astype(logit.dtype)

    def support(self, lam: NaturalParameters, total: int | None = None) -> Array:
        """Both values, along a new leading axis."""
        ones = jnp.ones_like(lam.linear)
        return jnp.stack([self.low * ones, ones])

    def probabilities(self, mu: ExpectationParameters, total: int | None = None) -> Array:
        """Those of `support`, linear in mu."""
        return jnp.stack([1.0 - mu.linear, mu.linear - self.low]) / (1.0 - self.low)

    def relaxed_sample(
        self, key: Array, lam: NaturalParameters, temperature: float, shape: tuple[int, ...] = ()
    ) -> Array:
        """Return the mean at (lambda + noise) / temperature, with logistic noise in the logit."""
        x = lam.linear
        noise = jax.random.logistic(key, (*shape, *x.shape), x.dtype) / (1.0 - self.low)
        return self.mean(self.Natural((x + noise) / temperature))


@parameters
class BernoulliNatural(NamedTuple):
    """lambda of a Bernoulli variable: the logit."""

    linear: Array


@parameters
class BernoulliExpectation(NamedTuple):
    """mu of a Bernoulli variable: the probability of 1."""

    linear: Array


@dataclasses.dataclass(frozen=True)
class Bernoulli(Binary):
    """The Bernoulli distribution on {0, 1}, elementwise over any shape.

    log q(theta) = theta logit - log(1 + exp(logit)).

    Standard parameters: `logit` or `probability` (of 1).

    lambda: linear = logit. mu: linear = p, the probability of 1.

    Example:
      >>> import blr_optax as blr
      >>> bernoulli = blr.families.get("bernoulli")
      >>> lam = bernoulli.natural(probability=0.75)
      >>> print(lam.linear.round(4), bernoulli.entropy(lam).round(4))
      1.0986 0.5623
    """

    Natural: ClassVar[type] = BernoulliNatural
    Expectation: ClassVar[type] = BernoulliExpectation
    low: ClassVar[float] = 0.0

    def mean(self, lam: BernoulliNatural) -> Array:
        return logistic(lam.linear)

    def natural_from_expectation(
        self, mu: BernoulliExpectation, with_status: bool = False
    ) -> PyTree:
        """Return the logit of mu; NaN, and status False, unless 0 < mu < 1."""
        return self._checked(mu, jnp.log(mu.linear) - jnp.log1p(-mu.linear), with_status)


@parameters
class RademacherNatural(NamedTuple):
    """lambda of a sign: half the logit."""

    linear: Array


@parameters
class RademacherExpectation(NamedTuple):
    """mu of a sign: its mean 2 p - 1."""

    linear: Array


@jax.custom_jvp
def _tanh(x: Float[Array, ...]) -> Float[Array, ...]:
    return jnp.tanh(x)


@_tanh.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    # 1 - tanh^2 without cancellation.
    (x,), (dx,) = primals, tangents
    return _tanh(x), dx * (4.0 * logistic(2.0 * x) * logistic(-2.0 * x))


@dataclasses.dataclass(frozen=True)
class Rademacher(Binary):
    """The Bernoulli distribution on {-1, +1}, elementwise over any shape: random signs.

    log q(theta) = theta lambda - log(2 cosh lambda).

    Standard parameters: `logit` or `probability` (of +1).

    lambda: linear = logit / 2. mu: linear = tanh lambda = 2 p - 1, the mean.

    Example:
      >>> import blr_optax as blr
      >>> rademacher = blr.families.get("rademacher")
      >>> lam = rademacher.natural(probability=0.75)
      >>> print(lam.linear.round(4), rademacher.mean(lam).round(4))
      0.5493 0.5
    """

    Natural: ClassVar[type] = RademacherNatural
    Expectation: ClassVar[type] = RademacherExpectation
    low: ClassVar[float] = -1.0

    def mean(self, lam: RademacherNatural) -> Array:
        return _tanh(lam.linear)

    def natural_from_expectation(
        self, mu: RademacherExpectation, with_status: bool = False
    ) -> PyTree:
        """artanh mu; NaN, and status False, unless -1 < mu < 1."""
        return self._checked(mu, jnp.arctanh(mu.linear), with_status)
