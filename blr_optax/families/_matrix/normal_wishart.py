"""A Gaussian whose precision matrix is Wishart, jointly.

    x | Lambda ~ N(m, (kappa Lambda)^{-1}),    Lambda ~ Wishart(W, nu)

lambda mixes the coordinates: its matrix is -(W^{-1} + kappa m m^T) / 2. Everything is written in
(m, kappa) and the Wishart density of Lambda; W^{-1} is what is left of lambda, and loses digits
where kappa m m^T is large beside it: there `families.Centered` counts x from a point near m.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from blr_optax.families._base import domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import DEFINITE, POSITIVE, REAL, checked
from blr_optax.families._continuous.gaussian import matvec, solve
from blr_optax.families._continuous.joint import FAR, MARGIN, MeanPrecision, retract_shortened
from blr_optax.families._matrix.wishart import (
    Wishart,
    WishartExpectation,
    WishartNatural,
    check_degrees,
)
from blr_optax.families._numerics.special import LOG_2PI, relative_excess

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool

    from blr_optax._typing import NaturalParameters, PyTree

WISHART = Wishart()


def _outer(a: Array, b: Array) -> Array:
    """Return (a b^T + b a^T) / 2."""
    product = a[..., :, None] * b[..., None, :]
    return 0.5 * (product + jnp.swapaxes(product, -1, -2))


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=-1)


@parameters
class NormalWishartNatural(NamedTuple):
    """lambda: kappa m, -kappa / 2, (nu - d) / 2 and -(W^{-1} + kappa m m^T) / 2."""

    linear: Array
    quadratic: Array
    log_det: Array
    matrix: Array


@parameters
class NormalWishartExpectation(NamedTuple):
    """mu: E[Lambda x], E[x^T Lambda x], E[log|Lambda|] and E[Lambda]."""

    linear: Array
    quadratic: Array
    log_det: Array
    matrix: Array


@dataclasses.dataclass(frozen=True)
class NormalWishart(ExponentialFamily):
    """The normal-Wishart density of a mean vector x and a precision matrix Lambda.

    log q(x, Lambda) = log N(x; m, (kappa Lambda)^{-1}) + log Wishart(Lambda; W, nu).

    Standard parameters: `mean` m [..., d], `kappa`, `scale` W [..., d, d] and `degrees` nu > d - 1.
    theta is a `MeanPrecision`.

    lambda: linear = kappa m [..., d], quadratic = -kappa / 2, log_det = (nu - d) / 2, matrix =
    -(W^{-1} + kappa m m^T) / 2 [..., d, d]. mu: linear = E[Lambda x], quadratic =
    E[x^T Lambda x], log_det = E[log|Lambda|], matrix = E[Lambda].

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> family = blr.families.NormalWishart()
      >>> lam = family.natural(mean=jnp.ones(2), kappa=2.0, scale=jnp.eye(2), degrees=4.0)
      >>> print(lam.linear, lam.log_det, jnp.diagonal(family.mean(lam).precision).round(3))
      [2. 2.] 1.0 [4. 4.]
    """

    Natural: ClassVar[type] = NormalWishartNatural
    Expectation: ClassVar[type] = NormalWishartExpectation
    domains: ClassVar[dict] = {
        "linear": domain.real(1),
        "quadratic": domain.negative(),
        "log_det": domain.above(-0.5),
        "matrix": domain.negative_definite(),
    }
    joint: ClassVar[bool] = True
    when_lost: ClassVar[str] = FAR

    @checked(mean=REAL.over("d"), kappa=POSITIVE, scale=DEFINITE, degrees=REAL)
    def natural(
        self, *, mean: ArrayLike, kappa: ArrayLike, scale: ArrayLike, degrees: ArrayLike
    ) -> NormalWishartNatural:
        """lambda from the mean, kappa (> 0), the scale matrix and the degrees of freedom."""
        check_degrees(self, scale, degrees)
        m, kappa = jnp.asarray(mean), jnp.asarray(kappa)
        return self._joined(m, kappa, WISHART.natural(scale=scale, degrees=degrees))

    def _joined(self, m: Array, kappa: Array, wishart: WishartNatural) -> NormalWishartNatural:
        linear = kappa[..., None] * m
        matrix = wishart.matrix - 0.5 * _outer(m, linear)
        return NormalWishartNatural(linear, -0.5 * kappa, wishart.log_det + 0.5, matrix)

    def normal(self, lam: NormalWishartNatural) -> tuple[Array, Array]:
        """m and kappa."""
        kappa = -2.0 * lam.quadratic
        return lam.linear / kappa[..., None], kappa

    def wishart(self, lam: NormalWishartNatural) -> WishartNatural:
        """Return the Wishart density of Lambda."""
        m, _ = self.normal(lam)
        return WishartNatural(lam.log_det - 0.5, lam.matrix + 0.5 * _outer(m, lam.linear))

    def standard(self, lam: NormalWishartNatural) -> dict[str, Array]:
        m, kappa = self.normal(lam)
        return {"mean": m, "kappa": kappa, **WISHART.standard(self.wishart(lam))}

    def mean(self, lam: NormalWishartNatural) -> MeanPrecision:
        return MeanPrecision(self.normal(lam)[0], WISHART.mean(self.wishart(lam)))

    def variance(self, lam: NormalWishartNatural) -> MeanPrecision:
        """Of x the diagonal of W^{-1} / (kappa (nu - d - 1)), infinite for nu <= d + 1."""
        wishart, (_, kappa) = self.wishart(lam), self.normal(lam)
        finite = (wishart.log_det > 0)[..., None]
        scale = (kappa * wishart.log_det)[..., None]
        diagonal = -jnp.diagonal(wishart.matrix, axis1=-2, axis2=-1)
        of_mean = jnp.where(finite, diagonal / jnp.where(finite, scale, 1.0), jnp.inf)
        return MeanPrecision(of_mean, WISHART.variance(wishart))

    def log_partition(self, lam: NormalWishartNatural) -> Array:
        """Return A = log Gamma_d(nu / 2) - nu / 2 log|(2 W)^{-1}| - d / 2 log(kappa / (2 pi))."""
        d, (_, kappa) = lam.linear.shape[-1], self.normal(lam)
        return WISHART.log_partition(self.wishart(lam)) + 0.5 * d * (LOG_2PI - jnp.log(kappa))

    def sufficient_statistics(
        self, theta: MeanPrecision, lam: NaturalParameters = None
    ) -> NormalWishartExpectation:
        wishart = WISHART.sufficient_statistics(theta.precision)
        linear = matvec(theta.precision, theta.mean)
        return NormalWishartExpectation(linear, _dot(theta.mean, linear), *wishart)

    def log_base_measure(self, lam: NormalWishartNatural, theta: MeanPrecision) -> Array:
        return jnp.zeros_like(lam.quadratic * theta.mean[..., 0])

    def expectation(self, lam: NormalWishartNatural) -> NormalWishartExpectation:
        (m, kappa), mu = self.normal(lam), WISHART.expectation(self.wishart(lam))
        linear = matvec(mu.matrix, m)
        quadratic = m.shape[-1] / kappa + _dot(m, linear)
        return NormalWishartExpectation(linear, quadratic, mu.log_det, mu.matrix)

    def natural_from_expectation(
        self, mu: NormalWishartExpectation, with_status: bool = False
    ) -> PyTree:
        """lambda(mu): d / kappa = mu_quadratic - m^T mu_linear, and the Wishart density's solve."""
        wishart, proper = WISHART.natural_from_expectation(
            WishartExpectation(mu.log_det, mu.matrix), with_status=True
        )
        eye = jnp.eye(mu.linear.shape[-1], dtype=mu.linear.dtype)
        m = solve(jnp.where(proper[..., None, None], mu.matrix, eye), mu.linear)
        spread = mu.quadratic - _dot(m, mu.linear)
        proper &= domain.positive().contains(spread) & jnp.all(jnp.isfinite(m), axis=-1)
        kappa = m.shape[-1] / jnp.where(proper, spread, jnp.nan)
        lam = self._joined(m, kappa, wishart)
        lam = lam._replace(log_det=jnp.where(proper, lam.log_det, jnp.nan))
        return (lam, proper & self.in_domain(lam)) if with_status else lam

    def log_prob(self, lam: NormalWishartNatural, theta: MeanPrecision) -> Array:
        (m, kappa), (x, precision) = self.normal(lam), theta
        inside = domain.positive_definite().contains(precision)
        eye = jnp.eye(m.shape[-1], dtype=precision.dtype)
        precision = jnp.where(inside[..., None, None], precision, eye)
        (log_det, _), apart = WISHART.sufficient_statistics(precision), x - m
        square = kappa * _dot(apart, matvec(precision, apart))
        normal = 0.5 * (m.shape[-1] * (jnp.log(kappa) - LOG_2PI) - square)
        found = normal + 0.5 * log_det + WISHART.log_prob(self.wishart(lam), precision)
        # At a singular precision the power of both determinants counts.
        square = kappa * _dot(apart, matvec(theta.precision, apart))
        normal = 0.5 * (m.shape[-1] * (jnp.log(kappa) - LOG_2PI) - square)
        limit = normal + WISHART.log_edge(self.wishart(lam), theta.precision, lam.log_det)
        return jnp.where(inside, found, limit)

    def entropy(self, lam: NormalWishartNatural) -> Array:
        wishart, (m, kappa) = self.wishart(lam), self.normal(lam)
        log_det = WISHART.expectation(wishart).log_det
        normal = m.shape[-1] * (1.0 + LOG_2PI - jnp.log(kappa)) - log_det
        return WISHART.entropy(wishart) + 0.5 * normal

    def kl(self, lam_p: NormalWishartNatural, lam_q: NormalWishartNatural) -> Array:
        (m_p, kappa_p), (m_q, kappa_q) = self.normal(lam_p), self.normal(lam_q)
        p, q = self.wishart(lam_p), self.wishart(lam_q)
        apart = m_p - m_q
        shift = kappa_q * _dot(apart, matvec(WISHART.mean(p), apart))
        normal = 0.5 * (m_p.shape[-1] * relative_excess(kappa_p, kappa_q) + shift)
        return normal + WISHART.kl(p, q)

    def inverse_fisher_product(
        self, lam: NormalWishartNatural, v: NormalWishartExpectation
    ) -> NormalWishartNatural:
        """F^{-1} through (m, kappa) and the Wishart density, whose own F^{-1} cancels nowhere."""
        (m, kappa), wishart = self.normal(lam), self.wishart(lam)
        by = WISHART.inverse_fisher_product(wishart, WishartExpectation(v.log_det, v.matrix))
        moved = matvec(v.matrix, m)
        dm = (
            matvec(-wishart.matrix, v.linear - moved)
            / WISHART.concentrations(wishart)[0][..., None]
        )
        dkappa = -kappa * kappa / m.shape[-1] * (v.quadratic - _dot(m, 2.0 * v.linear - moved))
        linear = kappa[..., None] * dm + dkappa[..., None] * m
        # kappa m m^T changes by 2 m dlinear^T - m m^T dkappa, made symmetric
        matrix = by.matrix - _outer(m, linear - 0.5 * dkappa[..., None] * m)
        return NormalWishartNatural(linear, -0.5 * dkappa, by.log_det, matrix)

    def sample(
        self, key: Array, lam: NormalWishartNatural, shape: tuple[int, ...] = ()
    ) -> MeanPrecision:
        key_wishart, key_normal = jax.random.split(key)
        m, kappa = self.normal(lam)
        b, root = WISHART.bartlett(key_wishart, self.wishart(lam), shape)
        half = jax.scipy.linalg.solve_triangular(root, b, lower=True, trans=1)
        # Lambda = half half^T and half^{-T} = root b^{-T}: no factor of a draw, which may fail.
        z = jax.random.normal(key_normal, b.shape[:-1], b.dtype)[..., None]
        z = jax.scipy.linalg.solve_triangular(b, z, lower=True, trans=1)
        x = m + (root @ z)[..., 0] * jax.lax.rsqrt(kappa)[..., None]
        return MeanPrecision(x, half @ jnp.swapaxes(half, -1, -2))

    def in_domain(self, lam: NormalWishartNatural) -> Bool[Array, ...]:
        """Also W positive definite, as far as lambda's rounding tells."""
        return super().in_domain(lam) & WISHART.in_domain(self.wishart(lam))

    def retract(
        self, lam: NormalWishartNatural, step: NormalWishartNatural
    ) -> NormalWishartNatural:
        """Second-order steps of kappa, nu, W^{-1}; m' = m + (step.linear - m dkappa) / kappa'."""
        return retract_shortened(self, lam, step, self._move)

    def _move(
        self, lam: NormalWishartNatural, step: NormalWishartNatural
    ) -> tuple[NormalWishartNatural, Array]:
        """Return the step of `retract`, and whether W^{-1} survives rounding."""
        (m, kappa), dkappa = self.normal(lam), -2.0 * step.quadratic
        matrix = step.matrix + _outer(m, step.linear - 0.5 * dkappa[..., None] * m)
        new = WISHART.retract(self.wishart(lam), WishartNatural(step.log_det, matrix))
        kappa = domain.positive().retract(kappa, dkappa)
        m = m + (step.linear - dkappa[..., None] * m) / kappa[..., None]
        moved = self._joined(m, kappa, new)
        largest = -jnp.trace(moved.matrix, axis1=-2, axis2=-1)[..., None, None]
        eye = MARGIN * jnp.finfo(m.dtype).eps * jnp.eye(m.shape[-1], dtype=m.dtype)
        return moved, domain.negative_definite().contains(new.matrix + largest * eye)
