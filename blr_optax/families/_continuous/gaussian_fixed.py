"""The Gaussian whose precision matrix is known: only its mean is learnt.

    theta ~ N(m, S^{-1})    h = N(0, S^{-1})    T = theta    lambda = S m    mu = m

The base measure is what makes plain gradient descent come out of the rule without shrinkage: its
natural gradient -S m cancels the decay (1 - rho) lambda.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax.numpy as jnp

from blr_optax.families._base import domain
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import DEFINITE, REAL, checked
from blr_optax.families._continuous.gaussian import (
    Gaussian,
    GaussianFamily,
    GaussianNatural,
    solve,
)

if TYPE_CHECKING:
    from jaxtyping import Array


@parameters
class FixedNatural(NamedTuple):
    """lambda of a Gaussian with known precision: S m, and S itself, which never moves."""

    linear: Array
    precision: Array


@parameters
class FixedExpectation(NamedTuple):
    """mu of a Gaussian with known precision: m, and S."""

    linear: Array
    precision: Array


@dataclasses.dataclass(frozen=True)
class GaussianFixed(GaussianFamily):
    """The Gaussian whose precision matrix is known: only the mean is learnt.

    h(theta) = N(theta; 0, S^{-1}), T = theta. The rule gives m <- m - rho S^{-1} E_q[grad l]:
    gradient descent, without shrinkage.

    Standard parameters: `mean` m [..., d], and `covariance` or `precision` S [..., d, d] (known).

    lambda: linear = S m [..., d], precision = S [..., d, d]. mu: linear = m, precision = S.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> fixed = blr.families.get("gaussian_fixed")
      >>> lam = fixed.natural(mean=jnp.array([3.0]), precision=jnp.array([[2.0]]))
      >>> print(lam.linear, fixed.base_measure_gradient(lam).linear)
      [6.] [-6.]
    """

    Natural: ClassVar[type] = FixedNatural
    Expectation: ClassVar[type] = FixedExpectation
    domains: ClassVar[dict] = {"linear": domain.real(1)}
    known: ClassVar[tuple[str, ...]] = ("precision",)
    event_ndim: ClassVar[int] = 1
    constant_base_measure: ClassVar[bool] = False
    curvature: ClassVar[str] = "none"

    @checked(mean=REAL.over("d"), covariance=DEFINITE, precision=DEFINITE)
    def natural(
        self, *, mean: Array, covariance: Array | None = None, precision: Array | None = None
    ) -> FixedNatural:
        """lambda from the mean and the known covariance or precision matrix."""
        lam = Gaussian().natural(mean=mean, covariance=covariance, precision=precision)
        return FixedNatural(lam.linear, -2.0 * lam.quadratic)

    def from_mean(self, mean: Array, precision: Array) -> FixedNatural:
        lam = Gaussian().from_mean(mean, precision)
        return FixedNatural(lam.linear, -2.0 * lam.quadratic)

    def natural_at(self, location: Array, like: Any = None) -> FixedNatural:
        eye = jnp.eye(location.shape[-1], dtype=location.dtype)
        return self.from_mean(location, eye if like is None else like.precision)

    def precision(self, lam: FixedNatural) -> Array:
        return lam.precision

    def _free(self, lam: FixedNatural) -> GaussianNatural:
        """The same density as a member of `gaussian`."""
        return GaussianNatural(lam.linear, -0.5 * lam.precision)

    def standard(self, lam: FixedNatural) -> dict[str, Array]:
        return {"mean": self.mean(lam), "precision": lam.precision}

    def mean(self, lam: FixedNatural) -> Array:
        return solve(lam.precision, lam.linear)

    def variance(self, lam: FixedNatural) -> Array:
        return Gaussian().variance(self._free(lam))

    def log_partition(self, lam: FixedNatural) -> Array:
        """A = m^T S m / 2."""
        return 0.5 * jnp.sum(lam.linear * self.mean(lam), axis=-1)

    def sufficient_statistics(self, theta: Array, lam: Any = None) -> FixedExpectation:
        d = theta.shape[-1]
        return FixedExpectation(theta, jnp.zeros((*theta.shape[:-1], d, d), theta.dtype))

    def log_base_measure(self, lam: FixedNatural, theta: Array) -> Array:
        """log N(theta; 0, S^{-1})."""
        return Gaussian().log_prob(
            GaussianNatural(jnp.zeros_like(lam.linear), -0.5 * lam.precision), theta
        )

    def expected_log_base_measure(self, lam: FixedNatural) -> Array:
        # E_q[log h] = E_q[log q] - <lambda, mu> + A
        return -self.entropy(lam) - self.log_partition(lam)

    def base_measure_gradient(self, lam: FixedNatural) -> FixedNatural:
        """grad_mu E_q[log h] = -S m: it cancels the decay (1 - rho) lambda."""
        return FixedNatural(-lam.linear, jnp.zeros_like(lam.precision))

    def expectation(self, lam: FixedNatural) -> FixedExpectation:
        return FixedExpectation(self.mean(lam), lam.precision)

    def natural_from_expectation(self, mu: FixedExpectation, with_status: bool = False) -> Any:
        """lambda = S m."""
        lam = self.from_mean(mu.linear, mu.precision)
        return (lam, self.in_domain(lam)) if with_status else lam

    def log_prob(self, lam: FixedNatural, theta: Array) -> Array:
        return Gaussian().log_prob(self._free(lam), theta)

    def entropy(self, lam: FixedNatural) -> Array:
        return Gaussian().entropy(self._free(lam))

    def kl(self, lam_p: FixedNatural, lam_q: FixedNatural) -> Array:
        """KL(p || q), also when the known precisions differ."""
        return Gaussian().kl(self._free(lam_p), self._free(lam_q))

    def sample(self, key: Array, lam: FixedNatural, shape: tuple[int, ...] = ()) -> Array:
        return Gaussian().sample(key, self._free(lam), shape)

    def displace(self, lam: FixedNatural, z: Array) -> Array:
        return Gaussian().displace(self._free(lam), z)

    def gradient(self, lam: FixedNatural, g: Array, h: None) -> FixedNatural:
        return FixedNatural(g, jnp.zeros_like(lam.precision))
