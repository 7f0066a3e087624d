"""The multinomial distribution: how often each of K labels occurs in a known number of draws."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax.numpy as jnp

from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import COUNT, checked
from blr_optax.families._discrete.categorical import (
    LABEL,
    Simplex,
    choice_entropy,
    full_logits,
    likeliest,
    linear_from,
    log_softmax,
    rest,
    softmax,
)
from blr_optax.families._numerics import log_factorial as lf

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float

    from blr_optax._typing import Alternative, NaturalParameters


@parameters
class MultinomialNatural(NamedTuple):
    """lambda of counts: log(p_k / p_K), and the known total."""

    linear: Array
    total: Array


@parameters
class MultinomialExpectation(NamedTuple):
    """mu of counts: the first K - 1 mean counts, and the total."""

    linear: Array
    total: Array


@dataclasses.dataclass(frozen=True)
class Multinomial(Simplex):
    """The distribution of the counts of n labels in K categories, n known; the event is K counts.

    log q(theta) = log(n! / prod_k theta_k!) + sum_k theta_k log p_k.

    Standard parameters: `logits` (K, up to a common constant) or `probabilities` (K), and `total`
    (n, known). T is the first K - 1 counts. Where n is 0 all counts are, whatever the logits: the
    row says nothing, its natural gradients are zero, and no lambda belongs to its mu. Counts are
    exact up to 2^24 in float32; beyond, the sum of theta need only be n up to rounding.

    lambda: linear = log(p_k / p_K) [..., K - 1], total = n. mu: linear = n p_k, total = n.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> multinomial = blr.families.get("multinomial")
      >>> lam = multinomial.natural(probabilities=jnp.array([0.5, 0.25, 0.25]), total=4)
      >>> print(multinomial.mean(lam), multinomial.entropy(lam).round(4))
      [2. 1. 1.] 2.3726
    """

    Natural: ClassVar[type] = MultinomialNatural
    Expectation: ClassVar[type] = MultinomialExpectation
    known: ClassVar[tuple[str, ...]] = ("total",)
    event_ndim: ClassVar[int] = 1
    enumerable: ClassVar[bool] = True
    constant_base_measure: ClassVar[bool] = False

    @checked(total=COUNT, **LABEL)
    def natural(
        self, *, total: ArrayLike, logits: Alternative = None, probabilities: Alternative = None
    ) -> MultinomialNatural:
        """lambda from K logits or probabilities, and the known total (0, 1, 2, ...)."""
        return MultinomialNatural(linear_from(logits, probabilities), jnp.asarray(total))

    def log_partition(self, lam: MultinomialNatural) -> Array:
        """Return A = n log(1 + sum_k exp lambda_k)."""
        return -lam.total * log_softmax(full_logits(lam.linear))[..., -1]

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> MultinomialExpectation:
        return MultinomialExpectation(theta[..., :-1], jnp.zeros_like(theta[..., 0]))

    def log_base_measure(self, lam: MultinomialNatural, theta: Array) -> Array:
        """log(n! / prod_k theta_k!)."""
        x, n = jnp.asarray(theta, lam.linear.dtype), lam.total
        share = jnp.where(x > 0, x / lf.trials(n)[..., None], 1.0)
        parts = jnp.sum(x * jnp.log(share) + lf.log_factorial_excess(x), -1)
        return jnp.where(_counts_to(x, n), lf.log_factorial_excess(n) - parts, -jnp.inf)

    def _log_factorials(self, lam: MultinomialNatural) -> tuple[Float[Array, "... K"], Array]:
        """E log x_k! per category, and E log h."""
        logits, n = full_logits(lam.linear), lam.total
        each = lf.binomial_log_factorial(softmax(logits), n[..., None])
        # The likeliest count stays with n!, so that nothing cancels when it is nearly all of n.
        others = jnp.sum(jnp.where(likeliest(logits), 0.0, each), -1)
        return each, lf.binomial_log_falling(rest(logits), n) - others

    def expected_log_base_measure(self, lam: MultinomialNatural) -> Array:
        return self._log_factorials(lam)[1]

    def base_measure_gradient(self, lam: MultinomialNatural) -> MultinomialNatural:
        logits, n = full_logits(lam.linear), lam.total
        slope = lf.slope(lambda q: lf.binomial_log_falling(q, n), rest(logits))[..., None]
        n = n[..., None]
        slope -= lf.slope(lambda p: lf.binomial_log_factorial(p, n), softmax(logits))
        slope = jnp.where(likeliest(logits), 0.0, slope) / lf.trials(n)
        return MultinomialNatural(slope[..., :-1] - slope[..., -1:], jnp.zeros_like(lam.total))

    def log_prob(self, lam: MultinomialNatural, theta: Array) -> Array:
        # Independent Poisson counts, given their sum.
        x, n = jnp.asarray(theta, lam.linear.dtype), lam.total
        log_p = log_softmax(full_logits(lam.linear))
        excess = lf.log_factorial_excess(n) - jnp.sum(lf.log_factorial_excess(x), -1)
        parts = lf.deviance(x, self.mean(lam), log_p + jnp.log(lf.trials(n))[..., None])
        mixed = jnp.max(x, -1) < n
        found = jnp.where(mixed, excess - jnp.sum(parts, -1), jnp.sum(x * log_p, -1))
        return jnp.where(_counts_to(x, n), found, -jnp.inf)

    def entropy(self, lam: MultinomialNatural) -> Array:
        logits, n = full_logits(lam.linear), lam.total
        m, (log_factorials, log_h) = self.mean(lam), self._log_factorials(lam)
        # E log x_k! - (m log m - m) per category, of the order of log m; their sum is the entropy.
        many = m > lf.large(m.dtype)
        some = lf.trials(n)[..., None]
        few = log_factorials - m * (log_softmax(logits) + jnp.log(some) - 1.0)
        high = jnp.where(many, m, 1e4)
        part = jnp.where(many, lf.factorial_series(high, 1.0 - high / some), few)
        spread = jnp.sum(part, -1) - lf.log_factorial_excess(n)
        return jnp.where(n * rest(logits) > 1.0, spread, n * choice_entropy(logits) - log_h)

    def sample(self, key: Array, lam: MultinomialNatural, shape: tuple[int, ...] = ()) -> Array:
        p = softmax(full_logits(lam.linear))
        return lf.draw_multinomial(key, lam.total, jnp.broadcast_to(p, (*shape, *p.shape)))

    def support(
        self, lam: MultinomialNatural, total: int | None = None
    ) -> Float[Array, "values ... K"]:
        """All counts with the known total, one and the same for the batch, along a new axis."""
        n, (*batch, k) = lf.common_total(lam.total, total), lam.linear.shape
        return lf.spread(jnp.asarray(lf.compositions(n, k + 1), lam.linear.dtype), batch)

    def probabilities(
        self, mu: MultinomialExpectation, total: int | None = None
    ) -> Float[Array, "values ..."]:
        """Those of `support`, polynomials of mu; NaN where n is another than `total`."""
        n = lf.common_total(mu.total, total)
        last = n - jnp.sum(mu.linear, -1, keepdims=True)
        p = jnp.concatenate([mu.linear, last], -1) / max(n, 1)
        counts = lf.compositions(n, p.shape[-1])
        return lf.chances(p, counts) * jnp.where(mu.total == n, 1.0, jnp.nan)


def _counts_to(x: Float[Array, "... K"], n: Array) -> Bool[Array, ...]:
    """Whether x is counts whose sum is n, up to rounding where numbers of that size are rounded."""
    eps = float(jnp.finfo(x.dtype).eps)
    slack = jnp.where(eps * n <= 2.0, 0.0, eps * n * x.shape[-1])
    return jnp.all(lf.is_count(x), -1) & (jnp.abs(jnp.sum(x, -1) - n) <= slack)
