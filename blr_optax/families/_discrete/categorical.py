"""Distributions over K categories, minimal: K - 1 natural parameters relative to the last category.

    lambda_k = log(p_k / p_K)    T = (x_1 .. x_{K-1}), x_k how often k came up

Two members: `categorical` (one label), here, and `multinomial` (counts of a known number of them).
Everything is computed relative to the likeliest category, whose own deviation from one is the sum
of the others' probabilities: no logit is too large for entropies, divergences and Fisher products.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax.families._base import domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import DISTRIBUTION, REAL, checked
from blr_optax.families._numerics import log_factorial as lf

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float, Int

    from blr_optax._typing import Alternative, ExpectationParameters, NaturalParameters, PyTree

DEEPEST = {4: 512.0, 8: 65536.0}  # of float32 and float64: exp(-x) is 0, and 1 + x still has digits
MANY = 4096  # categories beyond which the rounding of their probabilities would add up


def likeliest(logits: Float[Array, "... K"]) -> Bool[Array, "... K"]:
    """Mark one category of largest logit."""
    return jnp.argmax(logits, -1, keepdims=True) == jnp.arange(logits.shape[-1])


def _relative(mask: Bool[Array, "... K"], x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """x minus its entry in the mask."""
    return x - jnp.sum(jnp.where(mask, x, 0.0), -1, keepdims=True)


@jax.custom_jvp
def log_softmax(logits: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """log p_k, to the last digit also where p_k is almost one."""
    mask = likeliest(logits)
    x = _relative(mask, logits)
    return x - jnp.log1p(jnp.sum(jnp.where(mask, 0.0, jnp.exp(x)), -1, keepdims=True))


@log_softmax.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (logits,), (v,) = primals, tangents
    return log_softmax(logits), _centred(logits, v)


@jax.custom_jvp
def softmax(logits: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """p_k."""
    x = jnp.exp(_relative(likeliest(logits), logits))
    return x / jnp.sum(x, -1, keepdims=True)


@softmax.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    (logits,), (v,) = primals, tangents
    p = softmax(logits)
    return p, p * _centred(logits, v)


def _centred(logits: Float[Array, "... K"], v: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """v - sum_j p_j v_j: the change of log p along v."""
    w = _relative(likeliest(logits), v)
    return w - jnp.sum(softmax(logits) * w, -1, keepdims=True)


def rest(logits: Float[Array, "... K"]) -> Float[Array, ...]:
    """Return the probability that the likeliest category does not come up."""
    return jnp.sum(jnp.where(likeliest(logits), 0.0, softmax(logits)), -1)


def choice_entropy(logits: Float[Array, "... K"]) -> Float[Array, ...]:
    """-sum_k p_k log p_k."""
    return -jnp.sum(softmax(logits) * log_softmax(logits), -1)


def choice_kl(logits_p: Float[Array, "... K"], logits_q: Float[Array, "... K"]) -> Array:
    """KL(p || q) of one choice: log E[exp(u)], u = d - E[d], d the change of the logits.

    E[u] = 0: log(1 + E[exp(u) - 1 - u]) is a sum of terms >= 0.
    """
    p, log_p = softmax(logits_p), log_softmax(logits_p)
    d = _relative(likeliest(logits_p), logits_q - logits_p)
    u = d - jnp.sum(p * d, -1, keepdims=True)
    # log_p + u, of which two large numbers cancel where p_k is nothing: from the likeliest one on.
    mask = likeliest(logits_p)
    joint = _relative(mask, logits_q) + jnp.sum(jnp.where(mask, log_p + u, 0.0), -1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(joint, -1, keepdims=True) - 1.0, 0.0))
    q = jnp.exp(joint - top)  # up to a factor
    near = jnp.abs(u) < 1.0
    excess = jnp.where(near, p * lf.exp_excess_near(jnp.where(near, u, 0.0)), q - p - p * u)
    distant = top[..., 0] > 0.0
    close = jnp.log1p(jnp.where(distant, 0.0, jnp.sum(excess, -1)))
    return jnp.where(distant, top[..., 0] + jnp.log(jnp.sum(q, -1)), close)


def full_logits(linear: Float[Array, "... learnt"]) -> Float[Array, "... K"]:
    """lambda with the zero of the last category."""
    return jnp.concatenate([linear, jnp.zeros_like(linear[..., :1])], -1)


def _label(theta: Int[ArrayLike, ...]) -> Int[Array, ...]:
    """Return labels in which K can be counted: eight bits do not hold 256."""
    theta = jnp.asarray(theta)
    return theta.astype(jnp.promote_types(theta.dtype, jnp.int32))


LABEL = {
    "logits": dataclasses.replace(REAL, unique=False).over("K", least=2),
    "probabilities": DISTRIBUTION.over("K", least=2),
}


def linear_from(
    logits: ArrayLike | None, probabilities: ArrayLike | None
) -> Float[Array, "... learnt"]:
    """lambda from K logits or K probabilities.

    All are relative to the last, so that one that is masked away, by -1e9, would take the digits of
    the others with it: it counts as `DEEPEST` below the largest, where its probability is zero.
    """
    x = jnp.asarray(logits) if probabilities is None else jnp.log(probabilities)
    deepest = DEEPEST.get(x.dtype.itemsize, jnp.inf)
    last = jnp.maximum(x[..., -1:], jnp.max(x, -1, keepdims=True) - deepest)
    return x[..., :-1] - last


class Simplex(ExponentialFamily):
    """What the two families share; the total is 1 for a label."""

    domains: ClassVar[dict] = {"linear": domain.real(1)}
    reparameterized: ClassVar[bool] = False

    def _total(self, lam: NaturalParameters) -> Float[Array, "... 1"]:
        return jnp.stack([lam.total if self.known else jnp.ones_like(lam.linear[..., 0])], -1)

    def standard(self, lam: NaturalParameters) -> dict[str, Array]:
        """Return the logits whose last is 0, which unlike probabilities are never rounded to 1."""
        return {"logits": full_logits(lam.linear), **{n: getattr(lam, n) for n in self.known}}

    def mean(self, lam: NaturalParameters) -> Float[Array, "... K"]:
        return self._total(lam) * softmax(full_logits(lam.linear))

    def variance(self, lam: NaturalParameters) -> Float[Array, "... K"]:
        logits = full_logits(lam.linear)
        p = softmax(logits)
        others = jnp.where(likeliest(logits), rest(logits)[..., None], 1.0 - p)
        return self._total(lam) * p * others

    def expectation(self, lam: NaturalParameters) -> ExpectationParameters:
        return self.Expectation(self.mean(lam)[..., :-1], *lam[1:])

    def natural_from_expectation(
        self, mu: ExpectationParameters, with_status: bool = False
    ) -> PyTree:
        """log(mu_k / mu_K); NaN, and status False, unless all K means are positive."""
        first = mu.linear / self._total(mu)
        last = 1.0 - jnp.sum(first, -1, keepdims=True)
        proper = jnp.all(first > 0, -1, keepdims=True) & (last > 0)
        first, last = (jnp.where(proper, x, 0.25) for x in (first, last))
        linear = jnp.where(proper, jnp.log(first) - jnp.log(last), jnp.nan)
        lam = self.Natural(linear, *mu[1:])
        return (lam, self.in_domain(lam)) if with_status else lam

    def kl(self, lam_p: NaturalParameters, lam_q: NaturalParameters) -> Array:
        """KL(p || q), for one and the same total."""
        one = choice_kl(full_logits(lam_p.linear), full_logits(lam_q.linear))
        return self._total(lam_p)[..., 0] * one

    def fisher_product(self, lam: NaturalParameters, v: PyTree) -> ExpectationParameters:
        """n p_k (v_k - sum_j p_j v_j), in O(K)."""
        logits = full_logits(lam.linear)
        change = self._total(lam) * softmax(logits) * _centred(logits, full_logits(v.linear))
        return self.Expectation(change[..., :-1], *map(jnp.zeros_like, lam[1:]))

    def inverse_fisher_product(self, lam: NaturalParameters, v: PyTree) -> NaturalParameters:
        """(v_k / p_k + sum_j v_j / p_K) / n, in O(K)."""
        # Without draws F is zero, and so is what is left to turn.
        m = jnp.where(self._total(lam) > 0, self.mean(lam), jnp.inf)
        change = v.linear / m[..., :-1] + jnp.sum(v.linear, -1, keepdims=True) / m[..., -1:]
        return self.Natural(change, *map(jnp.zeros_like, lam[1:]))


@parameters
class CategoricalNatural(NamedTuple):
    """lambda of a label: log(p_k / p_K), K - 1 of them."""

    linear: Array


@parameters
class CategoricalExpectation(NamedTuple):
    """mu of a label: the first K - 1 probabilities."""

    linear: Array


@dataclasses.dataclass(frozen=True)
class Categorical(Simplex):
    """The distribution of one label in 0 .. K-1.

    log q(theta) = log p_theta. theta is an int32 label; `mean` and `variance` are those of its
    indicators, p_k and p_k (1 - p_k), with K entries.

    Standard parameters: `logits` (K of them, as for a softmax: a common constant does not matter;
    `standard` returns those whose last is 0) or `probabilities` (K). T is the indicator of the
    first K - 1 labels.

    lambda: linear = log(p_k / p_K) [..., K - 1]. mu: linear = p_k [..., K - 1].

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> categorical = blr.families.get("categorical")
      >>> lam = categorical.natural(probabilities=jnp.array([0.5, 0.25, 0.25]))
      >>> print(lam.linear.round(4), categorical.entropy(lam).round(4))
      [0.6931 0.    ] 1.0397
    """

    Natural: ClassVar[type] = CategoricalNatural
    Expectation: ClassVar[type] = CategoricalExpectation
    enumerable: ClassVar[bool] = True
    relaxable: ClassVar[bool] = True

    @checked(**LABEL)
    def natural(
        self, *, logits: Alternative = None, probabilities: Alternative = None
    ) -> CategoricalNatural:
        """lambda from K softmax logits or K probabilities (positive, of sum 1)."""
        return CategoricalNatural(linear_from(logits, probabilities))

    def log_partition(self, lam: CategoricalNatural) -> Array:
        """Return A = log(1 + sum_k exp lambda_k)."""
        return -log_softmax(full_logits(lam.linear))[..., -1]

    def sufficient_statistics(
        self, theta: Int[Array, ...], lam: CategoricalNatural | None = None
    ) -> CategoricalExpectation:
        """Return indicators of the first K - 1 labels; lambda says how many there are."""
        if lam is None:
            raise ValueError("categorical: T of a label depends on K: pass lam.")
        labels = jnp.arange(lam.linear.shape[-1])
        chosen = _label(theta)[..., None] == labels
        return CategoricalExpectation(chosen.astype(lam.linear.dtype))

    def log_base_measure(self, lam: CategoricalNatural, theta: Int[Array, ...]) -> Array:
        batch = jnp.broadcast_shapes(jnp.shape(theta), lam.linear.shape[:-1])
        return jnp.zeros(batch, lam.linear.dtype)

    def expected_log_base_measure(self, lam: CategoricalNatural) -> Array:
        return jnp.zeros_like(lam.linear[..., 0])

    def log_prob(self, lam: CategoricalNatural, theta: Int[Array, ...]) -> Array:
        logits, theta = full_logits(lam.linear), _label(theta)[..., None]
        k = logits.shape[-1]
        label = jnp.clip(theta, 0, k - 1).astype(jnp.int32)
        batch = jnp.broadcast_shapes(label.shape[:-1], logits.shape[:-1])
        logits, label = jnp.broadcast_to(logits, (*batch, k)), jnp.broadcast_to(label, (*batch, 1))
        x = logits - jnp.take_along_axis(logits, label, -1)
        # -log(1 + sum of the others' exp(x)), which the largest may make too large.
        top = jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True))
        others = jnp.where(label == jnp.arange(k), 0.0, jnp.exp(x - top))
        found = -top - jnp.log1p(jnp.sum(others, -1, keepdims=True) + jnp.expm1(-top))
        return jnp.where(label == theta, found, -jnp.inf)[..., 0]

    def entropy(self, lam: CategoricalNatural) -> Array:
        return choice_entropy(full_logits(lam.linear))

    def sample(self, key: Array, lam: CategoricalNatural, shape: tuple[int, ...] = ()) -> Array:
        logits = full_logits(lam.linear)
        shape = (*shape, *logits.shape[:-1])
        if logits.shape[-1] > MANY:
            return jax.random.categorical(key, logits, shape=shape, mode="high").astype(jnp.int32)
        # Rounded probabilities; what is missing to one belongs to the likeliest label.
        others = jnp.where(likeliest(logits), 0.0, softmax(logits))
        edges = jnp.cumsum(lf.quanta(others), -1)
        bits = jax.random.bits(key, shape, edges.dtype)
        label = jnp.sum(bits[..., None] >= edges, -1)
        return jnp.where(bits < edges[..., -1], label, jnp.argmax(logits, -1)).astype(jnp.int32)

    def support(self, lam: CategoricalNatural, total: int | None = None) -> Int[Array, "K ..."]:
        """Return the labels 0 .. K-1, along a new leading axis."""
        *batch, k = lam.linear.shape
        return lf.spread(jnp.arange(k + 1, dtype=jnp.int32), batch)

    def probabilities(
        self, mu: CategoricalExpectation, total: int | None = None
    ) -> Float[Array, "K ..."]:
        """Those of `support`, linear in mu."""
        last = 1.0 - jnp.sum(mu.linear, -1, keepdims=True)
        return jnp.moveaxis(jnp.concatenate([mu.linear, last], -1), -1, 0)

    def relaxed_sample(
        self, key: Array, lam: CategoricalNatural, temperature: float, shape: tuple[int, ...] = ()
    ) -> Float[Array, "... K"]:
        """softmax((logits + Gumbel noise) / temperature): K numbers in place of the label."""
        logits = full_logits(lam.linear)
        noise = jax.random.gumbel(key, (*shape, *logits.shape), logits.dtype)
        return softmax((logits + noise) / temperature)
