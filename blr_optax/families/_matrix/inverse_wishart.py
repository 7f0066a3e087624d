"""The inverse Wishart density: that of a matrix whose inverse is Wishart.

All of it is the Wishart density of X^{-1}, with a = nu / 2 and M = Psi / 2, seen from X.
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
from blr_optax.families._base.standard_parameters import DEFINITE, REAL, checked
from blr_optax.families._continuous.gaussian import _inverse, _log_det
from blr_optax.families._matrix.wishart import (
    Wishart,
    WishartExpectation,
    WishartNatural,
    check_degrees,
    factor_log_det,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool

    from blr_optax._typing import NaturalParameters, PyTree


@parameters
class InverseWishartNatural(NamedTuple):
    """lambda of an inverse Wishart density: -(nu + d + 1) / 2 and -Psi / 2."""

    log_det: Array
    inverse: Array


@parameters
class InverseWishartExpectation(NamedTuple):
    """mu of an inverse Wishart density: E[log|X|] and E[X^{-1}]."""

    log_det: Array
    inverse: Array


@dataclasses.dataclass(frozen=True)
class InverseWishart(ExponentialFamily):
    """The density of a symmetric positive definite matrix whose inverse is Wishart.

    log q(X) = -(nu + d + 1) / 2 log|X| - tr(Psi X^{-1}) / 2 + nu / 2 log|Psi / 2|
               - log Gamma_d(nu / 2).

    Standard parameters: `scale` Psi [..., d, d], `degrees` nu > d - 1.

    lambda: log_det = -(nu + d + 1) / 2, inverse = -Psi / 2 [..., d, d]. mu: log_det = E[log|X|],
    inverse = E[X^{-1}].

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> inverse_wishart = blr.families.InverseWishart()
      >>> lam = inverse_wishart.natural(scale=jnp.diag(jnp.array([1.0, 2.0])), degrees=5.0)
      >>> print(lam.log_det, jnp.diagonal(inverse_wishart.mean(lam)))
      -4.0 [0.5 1. ]
    """

    Natural: ClassVar[type] = InverseWishartNatural
    Expectation: ClassVar[type] = InverseWishartExpectation
    domains: ClassVar[dict] = {
        "log_det": domain.negative(),  # in fact below -d, which depends on the other field
        "inverse": domain.negative_definite(),
    }
    event_ndim: ClassVar[int] = 2

    @checked(scale=DEFINITE, degrees=REAL)
    def natural(self, *, scale: ArrayLike, degrees: ArrayLike) -> InverseWishartNatural:
        """lambda from the scale matrix (positive definite) and the degrees of freedom (> d - 1)."""
        check_degrees(self, scale, degrees)
        s, n = jnp.asarray(scale), jnp.asarray(degrees)
        return InverseWishartNatural(-0.5 * (n + s.shape[-1] + 1.0), -0.5 * s)

    def _wishart(self, lam: InverseWishartNatural) -> WishartNatural:
        """Return the density of X^{-1}."""
        return WishartNatural(-lam.log_det - (lam.inverse.shape[-1] + 1.0), lam.inverse)

    def standard(self, lam: InverseWishartNatural) -> dict[str, Array]:
        degrees = -2.0 * lam.log_det - (lam.inverse.shape[-1] + 1.0)
        return {"scale": -2.0 * lam.inverse, "degrees": degrees}

    def mean(self, lam: InverseWishartNatural) -> Array:
        """Psi / (nu - d - 1); for nu <= d + 1 the diagonal is infinite, the rest undefined."""
        over = self._wishart(lam).log_det[..., None, None]
        eye = jnp.eye(lam.inverse.shape[-1], dtype=bool)
        finite = -lam.inverse / jnp.where(over > 0, over, 1.0)
        return jnp.where(over > 0, finite, jnp.where(eye, jnp.inf, jnp.nan))

    def has_mean(self, lam: InverseWishartNatural) -> Array:
        return self._wishart(lam).log_det > 0

    def variance(self, lam: InverseWishartNatural) -> Array:
        """Of every entry; infinite for nu <= d + 3."""
        over = self._wishart(lam).log_det[..., None, None]
        enough = over > 1
        o = jnp.where(enough, over, 2.0)
        scaled = lam.inverse / o
        diagonal = jnp.diagonal(scaled, axis1=-2, axis2=-1)
        products = diagonal[..., :, None] * diagonal[..., None, :]
        found = ((o + 1.0) * scaled * scaled + o * products) / ((2.0 * o + 1.0) * (o - 1.0))
        return jnp.where(enough, found, jnp.inf)

    def log_partition(self, lam: InverseWishartNatural) -> Array:
        """Return A = log Gamma_d(nu / 2) - nu / 2 log|Psi / 2|."""
        return Wishart().log_partition(self._wishart(lam))

    def sufficient_statistics(
        self, theta: Array, lam: NaturalParameters = None
    ) -> InverseWishartExpectation:
        return InverseWishartExpectation(_log_det(theta), _inverse(theta))

    def log_base_measure(self, lam: InverseWishartNatural, theta: Array) -> Array:
        return jnp.zeros_like(lam.log_det * theta[..., 0, 0])

    def expectation(self, lam: InverseWishartNatural) -> InverseWishartExpectation:
        mu = Wishart().expectation(self._wishart(lam))
        return InverseWishartExpectation(-mu.log_det, mu.matrix)

    def natural_from_expectation(
        self, mu: InverseWishartExpectation, with_status: bool = False
    ) -> PyTree:
        """lambda(mu) as for the Wishart density of X^{-1}."""
        turned = WishartExpectation(-mu.log_det, mu.inverse)
        wishart, proper = Wishart().natural_from_expectation(turned, with_status=True)
        log_det = -wishart.log_det - (mu.inverse.shape[-1] + 1.0)
        lam = InverseWishartNatural(log_det, wishart.matrix)
        return (lam, proper) if with_status else lam

    def log_prob(self, lam: InverseWishartNatural, theta: Array) -> Array:
        inside = domain.positive_definite().contains(theta)
        eye = jnp.eye(theta.shape[-1], dtype=theta.dtype)
        root = jnp.linalg.cholesky(jnp.where(inside[..., None, None], theta, eye))
        log_det = factor_log_det(root)
        root, scale = jnp.broadcast_arrays(root, jnp.linalg.cholesky(-lam.inverse))
        half = jax.scipy.linalg.solve_triangular(root, scale, lower=True)
        found = Wishart().log_density(self._wishart(lam), half, -log_det)
        return jnp.where(inside, found - 0.5 * (eye.shape[-1] + 1.0) * log_det, -jnp.inf)

    def entropy(self, lam: InverseWishartNatural) -> Array:
        # |dX / dX^{-1}| = |X|^{d + 1}
        moved = (lam.inverse.shape[-1] + 1.0) * self.expectation(lam).log_det
        return Wishart().entropy(self._wishart(lam)) + moved

    def kl(self, lam_p: InverseWishartNatural, lam_q: InverseWishartNatural) -> Array:
        return Wishart().kl(self._wishart(lam_p), self._wishart(lam_q))

    def fisher_product(
        self, lam: InverseWishartNatural, v: InverseWishartNatural
    ) -> InverseWishartExpectation:
        turned = WishartNatural(-v.log_det, v.inverse)
        change = Wishart().fisher_product(self._wishart(lam), turned)
        return InverseWishartExpectation(-change.log_det, change.matrix)

    def inverse_fisher_product(
        self, lam: InverseWishartNatural, v: InverseWishartExpectation
    ) -> InverseWishartNatural:
        turned = WishartExpectation(-v.log_det, v.inverse)
        solved = Wishart().inverse_fisher_product(self._wishart(lam), turned)
        return InverseWishartNatural(-solved.log_det, solved.matrix)

    def sample(self, key: Array, lam: InverseWishartNatural, shape: tuple[int, ...] = ()) -> Array:
        b, root = Wishart().bartlett(key, self._wishart(lam), shape)
        half = jax.scipy.linalg.solve_triangular(b, jnp.swapaxes(root, -1, -2), lower=True)
        return jnp.swapaxes(half, -1, -2) @ half

    def _log_det_domain(self, lam: InverseWishartNatural) -> domain.Domain:
        return domain.Domain(sign=-1, bound=-float(lam.inverse.shape[-1]))

    def in_domain(self, lam: InverseWishartNatural) -> Bool[Array, ...]:
        return self._log_det_domain(lam).contains(lam.log_det) & super().in_domain(lam)

    def retract(
        self, lam: InverseWishartNatural, step: InverseWishartNatural
    ) -> InverseWishartNatural:
        log_det = self._log_det_domain(lam).retract(lam.log_det, step.log_det)
        return super().retract(lam, step)._replace(log_det=log_det)
