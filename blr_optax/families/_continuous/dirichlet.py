"""Dirichlet and beta: probabilities, with the logarithms of their parts as statistics.

    a_k   concentrations     s   their sum     abar_k = a_k / s, the mean
    r, l  Stirling's remainder, log a - psi(a)     E(m, x) = x / m - 1 - log(x / m)

    log q(x) = -sum_k a_k E(abar_k, x_k) - sum_k log x_k + (sum_k log a_k - log s) / 2
               - (K - 1) log(2 pi) / 2 + r(s) - sum_k r(a_k)

Here log Gamma(s) - sum_k log Gamma(a_k) has met a_k log x_k on paper; the linear terms of E sum
to zero. A beta density is the Dirichlet density of (x, 1 - x).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc

from blr_optax import _loops
from blr_optax.families._base import domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import POSITIVE, checked
from blr_optax.families._continuous.gamma import (
    concentration_divergence,
    held,
    log_entropy,
    mean_excess,
    trigamma,
    trigamma_excess,
)
from blr_optax.families._numerics.gamma_draws import following, gamma_log_draw
from blr_optax.families._numerics.special import (
    LOG_2PI,
    digamma,
    divergence_change,
    inverse_digamma,
    log_power,
    relative_excess,
    stirling,
    stirling_curvature,
    stirling_slope_change,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import AnyArray, NaturalParameters, PyTree

MAX_ROOT_STEPS = 200
MAX_POLISH_STEPS = 40
LOWEST, HIGHEST = -60.0, 60.0  # where log s is looked for
SUM_SLACK = 1e-3  # how far from one the parts of a point may sum: rounding, of float32 too
NEARLY_ALL = 0.05  # what others may have, relative to one part, for it to be taken with s


def _rest(a: Float[Array, "... k"]) -> Float[Array, "... k"]:
    """Return the sum of the other concentrations, without subtracting the largest from the sum."""
    largest = jnp.argmax(a, axis=-1, keepdims=True) == jnp.arange(a.shape[-1])
    total = jnp.sum(a, axis=-1, keepdims=True)
    others = jnp.sum(jnp.where(largest, 0.0, a), axis=-1, keepdims=True)
    return jnp.where(largest, others, total - jnp.where(largest, 0.0, a))


def _log_mean(a: Array, s: Array, rest: Array) -> Float[Array, ...]:
    """E[log x_k] = psi(a_k) - psi(s), also where a_k is almost all of s."""
    return -stirling_slope_change(a, s, rest) - jnp.log1p(rest / a) - 0.5 * rest / a / s


def _log_volume(a: Float[Array, "... k"]) -> Float[Array, ...]:
    """Return A = sum_k log Gamma(a_k) - log Gamma(s), also where one part is almost all of s."""
    s = jnp.sum(a, axis=-1)
    each = -a * jnp.log1p(_rest(a) / a) - 0.5 * (jnp.log(a) - LOG_2PI) + stirling(a)
    largest = jnp.argmax(a, axis=-1, keepdims=True) == jnp.arange(a.shape[-1])
    # What the largest part and s have in common is the last to be added.
    others = jnp.sum(jnp.where(largest, 0.0, each), axis=-1)
    top = jnp.sum(jnp.where(largest, each, 0.0), axis=-1)
    return others + (top + 0.5 * (jnp.log(s) - LOG_2PI) - stirling(s))


def _log_means(a: Float[Array, "... k"]) -> Float[Array, "... k"]:
    return _log_mean(a, jnp.sum(a, axis=-1, keepdims=True), _rest(a))


def _log_scale(a: Array) -> Float[Array, ...]:
    """log(a^a exp(-a) / Gamma(a))."""
    return 0.5 * (jnp.log(a) - LOG_2PI) - stirling(a)


def _log_part(a: Array, s: Array, x: Array, difference: Array | None = None) -> Float[Array, ...]:
    """Return what one part x >= 0 adds to log q; at x = 0 that is finite for a = 1 alone.

    `difference` is x - a / s, where it is known to more digits.
    """
    end = x == 0
    inner, zero = jnp.where(end, 1.0, x), jnp.where(end, x, 1.0)
    log_x = jnp.log(inner)
    found = _log_scale(a) - a * mean_excess(a / s, inner, log_x, difference) - log_x
    return jnp.where(end, log_power(a - 1.0, zero) + a * jnp.log(s) - s * zero, found)


def _kl(a_p: Float[Array, "... k"], a_q: Float[Array, "... k"]) -> Float[Array, ...]:
    """KL(p || q), also where one part is almost all of s: it then meets s before rounding."""
    s_p, s_q = (jnp.sum(a, axis=-1, keepdims=True) for a in (a_p, a_q))
    rest_p, rest_q = _rest(a_p), _rest(a_q)
    off = jnp.where(rest_p < a_p, rest_q / s_q - rest_p / s_p, a_p / s_p - a_q / s_q)
    spread = a_q * relative_excess(a_q / s_q, a_p / s_p, difference=off)
    near = (rest_p < NEARLY_ALL * a_p) & (rest_q < NEARLY_ALL * a_q)
    steps = (jnp.where(near, rest, 0.0) for rest in (rest_p, rest_q))
    bends = concentration_divergence(a_p, a_q)
    bends = jnp.where(near, -divergence_change(a_p, a_q, *steps), bends)
    whole = jnp.where(jnp.any(near, axis=-1), 0.0, concentration_divergence(s_p, s_q)[..., 0])
    return jnp.sum(spread + bends, axis=-1) - whole


def _fisher(a: Float[Array, "... k"], v: Float[AnyArray, "... k"]) -> Float[Array, "... k"]:
    """F v with F = diag(psi'(a)) - psi'(s) 1 1^T."""
    s, rest = jnp.sum(a, axis=-1, keepdims=True), _rest(a)
    # psi'(a) - psi'(s), term by term of psi'(a) = 1 / a + 1 / (2 a^2) + r''(a)
    gap = rest / a / s * (1.0 + 0.5 / a + 0.5 / s) + stirling_curvature(a) - stirling_curvature(s)
    return gap * v - trigamma(s) * (jnp.sum(v, axis=-1, keepdims=True) - v)


def _inverse_fisher(a: Float[Array, "... k"], w: Float[Array, "... k"]) -> Float[Array, "... k"]:
    """F^{-1} w = P w + P 1 (1^T P w) / (1 / psi'(s) - sum_k P_k), with P = 1 / psi'(a).

    For large concentrations 1 / psi'(a) = a - c(a) with c between 0 and 1 / 2: then the
    denominator is sum_k c(a_k) - c(s), and s is gone.
    """
    s = jnp.sum(a, axis=-1, keepdims=True)
    excess, excess_s = trigamma_excess(a), trigamma_excess(s)
    inverse, inverse_s = a / (1.0 + excess), s / (1.0 + excess_s)
    large = jnp.sum(inverse * excess, axis=-1, keepdims=True) - inverse_s * excess_s
    small = inverse_s - jnp.sum(inverse, axis=-1, keepdims=True)
    moved = inverse * w
    total = jnp.sum(moved, axis=-1, keepdims=True)
    return moved + inverse * (total / jnp.where(s < 1.0, small, large))


def _slack(g: Float[Array, "... k"]) -> Float[Array, ...]:
    """1 - sum_k exp(g_k): above zero when some Dirichlet has these E[log x_k]."""
    largest = jnp.argmax(g, axis=-1, keepdims=True) == jnp.arange(g.shape[-1])
    others = jnp.sum(jnp.where(largest, 0.0, jnp.exp(g)), axis=-1)
    return -jnp.expm1(jnp.max(g, axis=-1)) - others


def _root(g: Float[Array, "... k"]) -> Float[Array, "... k"]:
    """a_k = psi^{-1}(g_k + psi(s)) whose sum is s, by Newton in log s inside a bracket."""
    eps = float(jnp.finfo(g.dtype).eps)
    typical = jnp.mean(jnp.abs(g), axis=-1)
    start = 0.5 * (g.shape[-1] - 1) / _slack(g) / (1.0 + 0.5 * typical)

    def step(carry: Any) -> Any:
        t, low, high, _ = carry
        s = jnp.exp(t)
        a = inverse_digamma(g + digamma(s)[..., None])
        total = jnp.sum(a, axis=-1)
        miss = jnp.log(total) - t
        low, high = jnp.where(miss > 0, t, low), jnp.where(miss < 0, t, high)
        slope = s * trigamma(s) * jnp.sum(1.0 / trigamma(a), axis=-1) / total - 1.0
        newton = t - miss / slope
        inside = (newton > low) & (newton < high)
        new = jnp.where(inside | (miss == 0), newton, 0.5 * (low + high))
        near = (jnp.abs(new - t) <= eps**0.5) | (jnp.abs(miss) <= 8.0 * eps * (1.0 + jnp.abs(t)))
        return (new, low, high, near), a

    def running(carry: Any) -> Array:
        (*_, near), _, count = carry
        return ~jnp.all(near) & (count < MAX_ROOT_STEPS)

    def unless_near(carry: Any) -> Any:
        old, a, count = carry
        new, a_new = step(old)
        kept = jax.tree.map(lambda x, y: jnp.where(old[-1], x, y), old, new)
        return kept, jnp.where(old[-1][..., None], a, a_new), count + 1

    t = jnp.clip(jnp.log(start), LOWEST, HIGHEST)
    begin = (t, jnp.full_like(t, LOWEST), jnp.full_like(t, HIGHEST), jnp.zeros(t.shape, bool))
    (*_, near), a, _ = _loops.while_loop(running, unless_near, (begin, jnp.exp(g), 0))
    return jnp.where(near[..., None], a, jnp.nan)


@jax.custom_jvp
def _concentrations(g: Float[Array, "... k"]) -> Float[Array, "... k"]:
    """Return the a with E[log x_k] = g_k, NaN where the root was not found."""

    # Where one part is almost all of s the root is vague; these steps give each part its digits.
    def polish(carry: Any) -> Any:
        a, _, count = carry
        step = _inverse_fisher(a, g - _log_means(a)) / a
        largest = jnp.max(jnp.abs(step), initial=0.0)
        return a * jnp.exp(jnp.clip(step, -0.5, 0.5)), largest, count + 1

    def running(carry: Any) -> Array:
        _, largest, count = carry
        return (largest > jnp.finfo(g.dtype).eps ** 0.5) & (count < MAX_POLISH_STEPS)

    return _loops.while_loop(running, polish, (_root(g), jnp.array(jnp.inf, g.dtype), 0))[0]


@_concentrations.defjvp
def _(primals: Any, tangents: Any) -> Any:
    a = _concentrations(*primals)
    return a, _inverse_fisher(a, tangents[0])


@parameters
class DirichletNatural(NamedTuple):
    """lambda of a Dirichlet density: a_k - 1."""

    log: Array


@parameters
class DirichletExpectation(NamedTuple):
    """mu of a Dirichlet density: E[log x_k]."""

    log: Array


@dataclasses.dataclass(frozen=True)
class Dirichlet(ExponentialFamily):
    """The Dirichlet density of probabilities; the event is the last axis.

    log q(x) = sum_k (a_k - 1) log x_k + log Gamma(sum_k a_k) - sum_k log Gamma(a_k),

    with respect to all parts but one. Standard parameters: `concentration` a [..., K]. lambda holds
    a from 3e-5 on in float32 (6e-14 in float64) to 0.1 %; smaller ones are refused.

    lambda: log = a - 1 [..., K]. mu: log = E[log x] [..., K].

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> dirichlet = blr.families.get("dirichlet")
      >>> lam = dirichlet.natural(concentration=jnp.array([1.0, 2.0, 5.0]))
      >>> print(dirichlet.mean(lam), f"{dirichlet.entropy(lam):.3f}")
      [0.125 0.25  0.625] -1.716
    """

    Natural: ClassVar[type] = DirichletNatural
    Expectation: ClassVar[type] = DirichletExpectation
    support_of_marginals: ClassVar[str] = "unit"
    domains: ClassVar[dict] = {"log": domain.above(-1.0, 1)}
    event_ndim: ClassVar[int] = 1

    @checked(concentration=POSITIVE.over("K", least=2))
    def natural(self, *, concentration: ArrayLike) -> DirichletNatural:
        """lambda from the concentrations (> 0)."""
        return DirichletNatural(jnp.subtract(concentration, 1.0))

    def standard(self, lam: DirichletNatural) -> dict[str, Array]:
        return {"concentration": 1.0 + lam.log}

    def mean(self, lam: DirichletNatural) -> Array:
        return (1.0 + lam.log) / jnp.sum(1.0 + lam.log, axis=-1, keepdims=True)

    def variance(self, lam: DirichletNatural) -> Array:
        a = 1.0 + lam.log
        s = jnp.sum(a, axis=-1, keepdims=True)
        return (a / s) * (_rest(a) / s) / (1.0 + s)

    def log_partition(self, lam: DirichletNatural) -> Array:
        """Return A = sum_k log Gamma(a_k) - log Gamma(s)."""
        return _log_volume(1.0 + lam.log)

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> DirichletExpectation:
        return DirichletExpectation(jnp.log(theta))

    def log_base_measure(self, lam: DirichletNatural, theta: Array) -> Array:
        return jnp.zeros_like((theta * lam.log)[..., 0])

    def expectation(self, lam: DirichletNatural) -> DirichletExpectation:
        return DirichletExpectation(_log_means(1.0 + lam.log))

    def natural_from_expectation(
        self, mu: DirichletExpectation, with_status: bool = False
    ) -> PyTree:
        """lambda(mu) from one scalar root; NaN, and status False, where sum exp(mu) >= 1."""
        reachable = jnp.all(jnp.isfinite(mu.log), axis=-1) & (_slack(mu.log) > 0)
        safe = jnp.where(reachable[..., None], mu.log, -1.0 - jnp.log(1.0 * mu.log.shape[-1]))
        a = _concentrations(safe)
        proper = reachable & self.in_domain(held(DirichletNatural(a - 1.0)))
        lam = DirichletNatural(jnp.where(proper[..., None], a - 1.0, jnp.nan))
        return (lam, proper) if with_status else lam

    def log_prob(self, lam: DirichletNatural, theta: Array) -> Array:
        """log q; where x_k = 0 it is infinite but for a_k = 1, NaN where both infinities meet."""
        a = 1.0 + lam.log
        sums_to_one = jnp.abs(jnp.sum(theta, axis=-1) - 1.0) < SUM_SLACK
        inside = jnp.all(theta >= 0, axis=-1) & sums_to_one
        x = jnp.where(inside[..., None], theta, 1.0 / theta.shape[-1])
        s = jnp.sum(a, axis=-1)
        found = jnp.sum(_log_part(a, s[..., None], x), axis=-1) - _log_scale(s)
        return jnp.where(inside, found, -jnp.inf)

    def entropy(self, lam: DirichletNatural) -> Array:
        a = 1.0 + lam.log
        parts = _log_means(a) + log_entropy(a)
        return jnp.sum(parts, axis=-1) - log_entropy(jnp.sum(a, axis=-1))

    def kl(self, lam_p: DirichletNatural, lam_q: DirichletNatural) -> Array:
        return _kl(1.0 + lam_p.log, 1.0 + lam_q.log)

    def fisher_product(self, lam: DirichletNatural, v: DirichletNatural) -> DirichletExpectation:
        return DirichletExpectation(_fisher(1.0 + lam.log, v.log))

    def inverse_fisher_product(
        self, lam: DirichletNatural, v: DirichletExpectation
    ) -> DirichletNatural:
        return DirichletNatural(_inverse_fisher(1.0 + lam.log, v.log))

    def cdf(self, lam: DirichletNatural, theta: Array) -> Array:
        """Those of the parts, which are beta(a_k, s - a_k)."""
        a = self.standard(lam)["concentration"]
        return betainc(a, _rest(a), jnp.clip(theta, 0.0, 1.0))

    def sample(self, key: Array, lam: DirichletNatural, shape: tuple[int, ...] = ()) -> Array:
        g, c, log_x = gamma_log_draw(key, 1.0 + lam.log, shape)
        # Relative to the largest, so that not all parts underflow.
        top = jax.lax.stop_gradient(jnp.max(log_x, axis=-1, keepdims=True))
        x = following(g * jnp.exp(c - top), log_x - top)
        x = x / jnp.sum(x, axis=-1, keepdims=True)
        return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


@parameters
class BetaNatural(NamedTuple):
    """lambda of a beta density: alpha - 1 and beta - 1."""

    log: Array
    log1m: Array


@parameters
class BetaExpectation(NamedTuple):
    """mu of a beta density: E[log x] and E[log(1 - x)]."""

    log: Array
    log1m: Array


@dataclasses.dataclass(frozen=True)
class Beta(ExponentialFamily):
    """The beta density of a probability, elementwise over any shape.

    log q(x) = (alpha - 1) log x + (beta - 1) log(1 - x) - log B(alpha, beta).

    Standard parameters: `alpha` and `beta`. lambda holds them from 3e-5 on in float32 (6e-14 in
    float64) to 0.1 %; smaller ones are refused.

    lambda: log = alpha - 1, log1m = beta - 1. mu: log = E[log x], log1m = E[log(1 - x)].

    Example:
      >>> import blr_optax as blr
      >>> beta = blr.families.get("beta")
      >>> lam = beta.natural(alpha=2.0, beta=3.0)
      >>> print(beta.mean(lam), beta.expectation(lam).log.round(4))
      0.4 -1.0833
    """

    Natural: ClassVar[type] = BetaNatural
    Expectation: ClassVar[type] = BetaExpectation
    support_of_marginals: ClassVar[str] = "unit"
    domains: ClassVar[dict] = {"log": domain.above(-1.0), "log1m": domain.above(-1.0)}

    @checked(alpha=POSITIVE, beta=POSITIVE)
    def natural(self, *, alpha: ArrayLike, beta: ArrayLike) -> BetaNatural:
        """lambda from both concentrations (> 0)."""
        return BetaNatural(jnp.subtract(alpha, 1.0), jnp.subtract(beta, 1.0))

    def _pair(self, x: Any, kind: type = DirichletNatural) -> Any:
        """Return the Dirichlet parameters of (x, 1 - x)."""
        return kind(jnp.stack(jnp.broadcast_arrays(*x), axis=-1))

    def standard(self, lam: BetaNatural) -> dict[str, Array]:
        return {"alpha": 1.0 + lam.log, "beta": 1.0 + lam.log1m}

    def _sums(self, lam: BetaNatural) -> tuple[Array, Array, Array]:
        """alpha, beta and their sum."""
        a, b = 1.0 + lam.log, 1.0 + lam.log1m
        return a, b, a + b

    def mean(self, lam: BetaNatural) -> Array:
        a, _, s = self._sums(lam)
        return a / s

    def variance(self, lam: BetaNatural) -> Array:
        a, b, s = self._sums(lam)
        return (a / s) * (b / s) / (1.0 + s)

    def log_partition(self, lam: BetaNatural) -> Array:
        """Return A = log Gamma(alpha) + log Gamma(beta) - log Gamma(alpha + beta)."""
        return _log_volume(1.0 + self._pair(lam).log)

    def sufficient_statistics(self, theta: Array, lam: NaturalParameters = None) -> BetaExpectation:
        return BetaExpectation(jnp.log(theta), jnp.log1p(-theta))

    def log_base_measure(self, lam: BetaNatural, theta: Array) -> Array:
        return jnp.zeros_like(theta * lam.log)

    def expectation(self, lam: BetaNatural) -> BetaExpectation:
        a, b, s = self._sums(lam)
        return BetaExpectation(_log_mean(a, s, b), _log_mean(b, s, a))

    def natural_from_expectation(self, mu: BetaExpectation, with_status: bool = False) -> PyTree:
        """lambda(mu) as for the Dirichlet density; NaN where E[log x] and E[log(1 - x)] clash."""
        pair = self._pair(mu, DirichletExpectation)
        found, proper = Dirichlet().natural_from_expectation(pair, with_status=True)
        lam = BetaNatural(found.log[..., 0], found.log[..., 1])
        return (lam, proper) if with_status else lam

    def log_prob(self, lam: BetaNatural, theta: Array) -> Array:
        """log q; at 0 that is log beta for alpha = 1, at 1 log alpha for beta = 1."""
        a, b, s = self._sums(lam)
        inside = (theta >= 0) & (theta <= 1)
        x = jnp.where(inside, theta, 0.5)
        # 1 - x is rounded; both parts are off by one and the same number.
        off = jnp.where(a <= b, x - a / s, b / s - (1.0 - x))
        found = _log_part(a, s, x, off) + _log_part(b, s, 1.0 - x, -off) - _log_scale(s)
        return jnp.where(inside, found, -jnp.inf)

    def entropy(self, lam: BetaNatural) -> Array:
        return Dirichlet().entropy(self._pair(lam))

    def kl(self, lam_p: BetaNatural, lam_q: BetaNatural) -> Array:
        return _kl(1.0 + self._pair(lam_p).log, 1.0 + self._pair(lam_q).log)

    def fisher_product(self, lam: BetaNatural, v: BetaNatural) -> BetaExpectation:
        change = _fisher(1.0 + self._pair(lam).log, self._pair(v).log)
        return BetaExpectation(change[..., 0], change[..., 1])

    def inverse_fisher_product(self, lam: BetaNatural, v: BetaExpectation) -> BetaNatural:
        solved = _inverse_fisher(1.0 + self._pair(lam).log, self._pair(v).log)
        return BetaNatural(solved[..., 0], solved[..., 1])

    def cdf(self, lam: BetaNatural, theta: Array) -> Array:
        """Return the regularised incomplete beta function."""
        alpha, beta = self.standard(lam).values()
        return betainc(alpha, beta, jnp.clip(theta, 0.0, 1.0))

    def sample(self, key: Array, lam: BetaNatural, shape: tuple[int, ...] = ()) -> Array:
        x = Dirichlet().sample(key, self._pair(lam), shape)[..., 0]
        # At one itself the density may be infinite.
        return jnp.minimum(x, 1.0 - 0.5 * jnp.finfo(x.dtype).eps)
