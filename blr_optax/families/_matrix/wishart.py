"""The Wishart density of a positive definite matrix.

    a     nu / 2, half the degrees of freedom       a_j   a - j / 2,  j = 0 ... d - 1
    M     V^{-1} / 2, so that E[X] = a M^{-1}       E     E(Y) = tr Y - d - log|Y|, at least zero

    log q(X) = -(d + 1) / 2 log|X| - a E(M X / a) + sum_j [terms of order log a] + constant

holds for any a and cancels nowhere: the multivariate log Gamma and a log|M|, which are huge when
a is, have been combined on paper. Entropies, divergences and F are written in the same way.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np

from blr_optax import _loops
from blr_optax._validate import require
from blr_optax.families._base import domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import DEFINITE, REAL, checked, name_of
from blr_optax.families._continuous.gamma import trigamma, trigamma_excess
from blr_optax.families._continuous.gaussian import (
    _inverse,
    _log_det,
    _matrix_excess,
    _symmetric,
)
from blr_optax.families._numerics.gamma_draws import gamma_log_draw
from blr_optax.families._numerics.special import (
    LOG_2PI,
    NEAR,
    excess_near,
    log_gamma,
    log_minus_digamma,
    log_power,
    stirling,
    stirling_divergence,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float

    from blr_optax._typing import DTypeLike, NaturalParameters, PyTree

NEWTON_STEPS = 10


def _transpose(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _trace(x: Array) -> Array:
    return jnp.trace(x, axis1=-2, axis2=-1)


def factor_log_det(root: Array) -> Float[Array, ...]:
    """log|X| for X = root root^T, root triangular."""
    return 2.0 * jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1)


def _steps(d: int, dtype: DTypeLike) -> Float[Array, " d"]:
    """s_j = j / 2."""
    return 0.5 * jnp.arange(d, dtype=dtype)


def _constant(d: int) -> float:
    """Return what the multivariate log Gamma has beside a sum of log Gammas."""
    return 0.25 * d * (d - 1) * float(np.log(np.pi))


def _excess(x: Array, ratio: Array) -> Float[Array, ...]:
    """x - log(1 + x) to the last digit; `ratio` is 1 + x, from where x was not rounded."""
    near = jnp.abs(x) < NEAR
    far = jnp.where(near, 1.0, x - jnp.log(jnp.where(near, 1.0, ratio)))
    return jnp.where(near, excess_near(jnp.where(near, x, 0.0)), far)


def _relative_spread(r: Array, log_det: Array) -> Float[Array, ...]:
    """E(I + R) = tr R - log|I + R| to the last digit; `log_det` is log|I + R|."""
    near = jnp.linalg.norm(r, axis=(-2, -1)) < NEAR
    small = jnp.where(near[..., None, None], _symmetric(r), 0.0)
    return jnp.where(near, _matrix_excess(small), _trace(r) - log_det)


def singular(x: Float[Array, "... d d"]) -> Bool[Array, ...]:
    """Whether a symmetric matrix is singular, up to rounding, with eigenvalues of at least zero."""
    definite = domain.positive_definite().contains
    rounding = 4 * x.shape[-1] * jnp.finfo(x.dtype).eps
    size = jnp.maximum(jnp.max(jnp.abs(x), axis=(-2, -1)), jnp.finfo(x.dtype).tiny / rounding)
    up = (rounding * size)[..., None, None] * jnp.eye(x.shape[-1], dtype=x.dtype)
    return definite(x + up) & ~definite(x)


def _gap_terms(b: Array, d: int) -> tuple[Array, Array]:
    """log a - psi(a_j) and its negative slope, summed over j, at b = a - (d - 1) / 2."""
    s = _steps(d, b.dtype)
    a = b[..., None] + s[-1]
    each = a - s
    gap = log_minus_digamma(each) + jnp.log1p(s / each)
    slope = (trigamma_excess(each) + s / a) / each
    return jnp.sum(gap, axis=-1), jnp.sum(slope, axis=-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def _solve_gap(gap: Array, d: int) -> Float[Array, ...]:
    """Solve sum_j [log a - psi(a_j)] = gap > 0 for b, by Newton in log b on the log of the gap."""

    def newton(_: Array, b: Array) -> Array:
        found, slope = _gap_terms(b, d)
        return b * jnp.exp(jnp.clip(jnp.log(found / gap) * found / (b * slope), -2.0, 2.0))

    start = (0.25 * d * (d + 1) + gap) / (gap * (1.0 + gap))
    return _loops.fori_loop(0, NEWTON_STEPS, newton, start)


@_solve_gap.defjvp
def _(d: int, primals: tuple, tangents: tuple) -> tuple:
    b = _solve_gap(*primals, d)
    return b, -tangents[0] / _gap_terms(b, d)[1]


@parameters
class WishartNatural(NamedTuple):
    """lambda of a Wishart density: (nu - d - 1) / 2 and -V^{-1} / 2."""

    log_det: Array
    matrix: Array


@parameters
class WishartExpectation(NamedTuple):
    """mu of a Wishart density: E[log|X|] and E[X]."""

    log_det: Array
    matrix: Array


@dataclasses.dataclass(frozen=True)
class Wishart(ExponentialFamily):
    """The Wishart density of a symmetric positive definite matrix; the event is two axes.

    log q(X) = (nu - d - 1) / 2 log|X| - tr(V^{-1} X) / 2 - nu / 2 log|2 V| - log Gamma_d(nu / 2).

    Standard parameters: `scale` V [..., d, d], `degrees` nu > d - 1.

    lambda: log_det = (nu - d - 1) / 2, matrix = -V^{-1} / 2 [..., d, d]. mu: log_det = E[log|X|],
    matrix = E[X].

    Where X is singular the density is finite for nu = d + 1 and infinite below that. Draws near the
    edge of the domain are singular to the precision of the numbers: in float32 1% of them at
    nu = d - 1/2 and 14% at nu = d - 4/5 (2% in float64), so that estimators which need the density
    of draws are biased.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> wishart = blr.families.Wishart()
      >>> lam = wishart.natural(scale=jnp.diag(jnp.array([1.0, 2.0])), degrees=4.0)
      >>> print(lam.log_det, jnp.diagonal(wishart.mean(lam)).round(3))
      0.5 [4. 8.]
    """

    Natural: ClassVar[type] = WishartNatural
    Expectation: ClassVar[type] = WishartExpectation
    domains: ClassVar[dict] = {
        "log_det": domain.above(-1.0),
        "matrix": domain.negative_definite(),
    }
    event_ndim: ClassVar[int] = 2

    @checked(scale=DEFINITE, degrees=REAL)
    def natural(self, *, scale: ArrayLike, degrees: ArrayLike) -> WishartNatural:
        """lambda from the scale matrix (positive definite) and the degrees of freedom (> d - 1)."""
        check_degrees(self, scale, degrees)
        s, n = jnp.asarray(scale), jnp.asarray(degrees)
        return WishartNatural(0.5 * (n - s.shape[-1] - 1.0), -0.5 * _inverse(s))

    def concentrations(self, lam: WishartNatural) -> tuple[Array, Array]:
        """Return a, and a_j along a new last axis."""
        d = lam.matrix.shape[-1]
        s = _steps(d, lam.matrix.dtype)
        return lam.log_det + 0.5 * (d + 1), lam.log_det[..., None] + (1.0 + s[::-1])

    def standard(self, lam: WishartNatural) -> dict[str, Array]:
        degrees = 2.0 * lam.log_det + (lam.matrix.shape[-1] + 1.0)
        return {"scale": 0.5 * _inverse(-lam.matrix), "degrees": degrees}

    def mean(self, lam: WishartNatural) -> Array:
        return self.concentrations(lam)[0][..., None, None] * _inverse(-lam.matrix)

    def variance(self, lam: WishartNatural) -> Array:
        """nu (V_ij^2 + V_ii V_jj)."""
        v = _inverse(-lam.matrix)
        diagonal = jnp.diagonal(v, axis1=-2, axis2=-1)
        squares = v * v + diagonal[..., :, None] * diagonal[..., None, :]
        return 0.5 * self.concentrations(lam)[0][..., None, None] * squares

    def log_partition(self, lam: WishartNatural) -> Array:
        """Return A = log Gamma_d(a) - a log|M|, with a = nu / 2 and M = V^{-1} / 2."""
        a, each = self.concentrations(lam)
        log_gammas = jnp.sum(log_gamma(each), axis=-1) + _constant(each.shape[-1])
        return log_gammas - a * _log_det(-lam.matrix)

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> WishartExpectation:
        return WishartExpectation(_log_det(theta), theta)

    def log_base_measure(self, lam: WishartNatural, theta: Array) -> Array:
        return jnp.zeros_like(lam.log_det * theta[..., 0, 0])

    def expectation(self, lam: WishartNatural) -> WishartExpectation:
        _, each = self.concentrations(lam)
        log_det = jnp.sum(jnp.log(each) - log_minus_digamma(each), axis=-1) - _log_det(-lam.matrix)
        return WishartExpectation(log_det, self.mean(lam))

    def natural_from_expectation(self, mu: WishartExpectation, with_status: bool = False) -> PyTree:
        """lambda(mu) from sum_j [log a - psi(a_j)] = log|E X| - E log|X|; NaN unless positive."""
        d = mu.matrix.shape[-1]
        definite = domain.positive_definite().contains(mu.matrix)
        eye = jnp.eye(d, dtype=mu.matrix.dtype)
        mean = jnp.where(definite[..., None, None], mu.matrix, eye)
        gap = _log_det(mean) - mu.log_det
        proper = definite & domain.positive().contains(gap)
        b = jnp.where(proper, _solve_gap(jnp.where(proper, gap, 1.0), d), jnp.nan)
        matrix = -(b + 0.5 * (d - 1))[..., None, None] * _inverse(mean)
        lam = WishartNatural(b - 1.0, matrix)
        return (lam, proper & self.in_domain(lam)) if with_status else lam

    def log_prob(self, lam: WishartNatural, theta: Array) -> Array:
        inside = domain.positive_definite().contains(theta)
        eye = jnp.eye(theta.shape[-1], dtype=theta.dtype)
        root = jnp.linalg.cholesky(jnp.where(inside[..., None, None], theta, eye))
        half, log_det = _transpose(root) @ jnp.linalg.cholesky(-lam.matrix), factor_log_det(root)
        found = self.log_density(lam, half, log_det) - 0.5 * (eye.shape[-1] + 1.0) * log_det
        return jnp.where(inside, found, self.log_edge(lam, theta, lam.log_det))

    def log_edge(self, lam: WishartNatural, theta: Array, power: Array) -> Array:
        """log q at a singular X, with |X|^power in place of |X|^(nu - d - 1)/2; elsewhere -inf."""
        edge = singular(theta)
        exponent = jnp.sum(lam.matrix * theta, axis=(-2, -1)) - self.log_partition(lam)
        found = exponent + log_power(power, jnp.where(edge, 0.0, jnp.ones_like(exponent)))
        return jnp.where(edge, found, -jnp.inf)

    def log_density(self, lam: WishartNatural, half: Array, log_det: Array) -> Array:
        """log q(X) + (d + 1) / 2 log|X|, at half^T half = K^T X K for M = K K^T and log|X|."""
        a, each = self.concentrations(lam)
        d = each.shape[-1]
        s = _steps(d, each.dtype)
        spread = _transpose(half) @ half / a[..., None, None]
        log_det = log_det + _log_det(-lam.matrix) - d * jnp.log(a)
        excess = _relative_spread(spread - jnp.eye(d, dtype=each.dtype), log_det)
        terms = a[..., None] * _excess(-s / a[..., None], each / a[..., None])
        terms = terms + (s + 0.5) * jnp.log(each) - stirling(each) - 0.5 * LOG_2PI
        return jnp.sum(terms, axis=-1) - a * excess - _constant(d)

    def entropy(self, lam: WishartNatural) -> Array:
        _, each = self.concentrations(lam)
        d = each.shape[-1]
        s = _steps(d, each.dtype)
        terms = (0.5 * d - s) * jnp.log(each) + s + stirling(each) + 0.5 * LOG_2PI
        terms = terms + lam.log_det[..., None] * log_minus_digamma(each)
        return jnp.sum(terms, axis=-1) + _constant(d) - 0.5 * (d + 1) * _log_det(-lam.matrix)

    def kl(self, lam_p: WishartNatural, lam_q: WishartNatural) -> Array:
        (a_p, each_p), (a_q, each_q) = self.concentrations(lam_p), self.concentrations(lam_q)
        d = each_p.shape[-1]
        s, move = _steps(d, each_p.dtype), (lam_q.log_det - lam_p.log_det)[..., None]
        # The mean of p relative to that of q, minus one: digits survive when p is close to q.
        root_p, root_q = jnp.linalg.cholesky(-lam_p.matrix), jnp.linalg.cholesky(-lam_q.matrix)
        change = lam_p.matrix - lam_q.matrix + (move / a_q[..., None])[..., None] * lam_q.matrix
        root_p, change = jnp.broadcast_arrays(root_p, change)
        half = jax.scipy.linalg.solve_triangular(root_p, change, lower=True)
        relative = jax.scipy.linalg.solve_triangular(root_p, _transpose(half), lower=True)
        log_det = factor_log_det(root_q) - factor_log_det(root_p) + d * jnp.log(a_p / a_q)
        spread = a_q * _relative_spread(relative, log_det)
        # a_qj E(a_qj, a_pj) - a_q E(a_q, a_p) of the gamma densities, without its cancellation.
        a_p, a_q = a_p[..., None], a_q[..., None]
        first = s * _excess(move / each_p, each_q / each_p)
        second = a_q * _excess(s * move / (a_q * each_p), (a_p / each_p) * (each_q / a_q))
        return spread + jnp.sum(stirling_divergence(each_p, each_q) + first - second, axis=-1)

    def fisher_product(self, lam: WishartNatural, v: WishartNatural) -> WishartExpectation:
        a, each = self.concentrations(lam)
        inverse = _inverse(-lam.matrix)
        log_det = jnp.sum(trigamma(each), axis=-1) * v.log_det + _trace(inverse @ v.matrix)
        across = a[..., None, None] * _symmetric(inverse @ v.matrix @ inverse)
        return WishartExpectation(log_det, v.log_det[..., None, None] * inverse + across)

    def inverse_fisher_product(self, lam: WishartNatural, v: WishartExpectation) -> WishartNatural:
        """F^{-1}, in which sum_j psi'(a_j) - d / a would cancel for large a."""
        a, each = self.concentrations(lam)
        m, (_, slope) = -lam.matrix, _gap_terms(each[..., -1], each.shape[-1])
        log_det = (v.log_det - _trace(m @ v.matrix) / a) / slope
        matrix = _symmetric(m @ v.matrix @ m) - log_det[..., None, None] * m
        return WishartNatural(log_det, matrix / a[..., None, None])

    def bartlett(
        self, key: Array, lam: WishartNatural, shape: tuple[int, ...] = ()
    ) -> tuple[Array, Array]:
        """(B, K) with M = K K^T, B lower triangular: a draw is K^{-T} B B^T K^{-1}."""
        _, each = self.concentrations(lam)
        root = jnp.linalg.cholesky(-lam.matrix)
        d = each.shape[-1]
        batch = shape + jnp.broadcast_shapes(each.shape[:-1], root.shape[:-2])
        key_gamma, key_normal = jax.random.split(key)
        g, log_scale, log_g = gamma_log_draw(key_gamma, jnp.broadcast_to(each, (*batch, d)))
        # Half the logarithm, since draws of a small shape underflow; log_g carries the derivative.
        # What underflows all the same stays above zero, so that a draw has an inverse.
        path = log_scale + log_g - jax.lax.stop_gradient(log_g)
        chi = jnp.sqrt(g) * jnp.exp(0.5 * path)
        chi = jnp.maximum(chi, 4.0 * np.sqrt(jnp.finfo(chi.dtype).tiny).astype(chi.dtype))
        normal = jax.random.normal(key_normal, (*batch, d, d), root.dtype)
        below = jnp.tril(normal, -1) * np.sqrt(0.5).astype(root.dtype)
        b = below + chi[..., None] * jnp.eye(d, dtype=root.dtype)
        return b, jnp.broadcast_to(root, b.shape)

    def sample(self, key: Array, lam: WishartNatural, shape: tuple[int, ...] = ()) -> Array:
        b, root = self.bartlett(key, lam, shape)
        half = jax.scipy.linalg.solve_triangular(root, b, lower=True, trans=1)
        return _symmetric(half @ _transpose(half))


def check_degrees(family: ExponentialFamily, scale: ArrayLike, degrees: ArrayLike) -> None:
    """Raise ValueError when there are too few degrees of freedom for the scale matrix."""
    least = jnp.shape(scale)[-1] - 1
    name, valid = f"{name_of(family)}.natural: degrees", f"above d - 1 = {least}"
    require(name, degrees, valid, lambda n: n > least)
