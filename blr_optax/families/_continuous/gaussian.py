"""Gaussian families in natural parameters.

    theta ~ N(m, S^{-1})    lambda = (S m, -S / 2)    mu = (m, S^{-1} + m m^T)

`linear` is S m and `quadratic` is -S / 2; in mu they are E[theta] and E[theta theta^T]. Three
members: `normal` (elementwise), `gaussian` (full precision matrix), and `gaussian_fixed`, whose
precision matrix is known:

    theta ~ N(m, S^{-1})    h = N(0, S^{-1})    T = theta    lambda = S m    mu = m

Its base measure is what makes plain gradient descent come out of the rule without shrinkage: its
natural gradient -S m cancels the decay (1 - rho) lambda.

With g = E_q[grad l] and H = E_q[hess l], Bonnet and Price give the natural gradient

    grad_mu E_q[l] = (g - H m, H / 2)                          Khan and Rue (2023), Eqs. 10-11

Above 500 lines: the three share their arithmetic and are read side by side.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from blr_optax._validate import unwritten
from blr_optax.families._base import domain
from blr_optax.families._base.exponential import ExponentialFamily
from blr_optax.families._base.family import each_finite
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import DEFINITE, POSITIVE, REAL, checked
from blr_optax.families._numerics.quantiles import GaussianMarginals
from blr_optax.families._numerics.special import (
    LOG_2PI,
    NEAR,
    excess_near,
    floating,
    relative_excess,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import Alternative, NaturalParameters, PyTree


@parameters
class GaussianNatural(NamedTuple):
    """lambda of a Gaussian: S m and -S / 2."""

    linear: Array
    quadratic: Array


@parameters
class GaussianExpectation(NamedTuple):
    """mu of a Gaussian: E[theta] and E[theta theta^T] (elementwise for `normal`)."""

    linear: Array
    quadratic: Array


class GaussianFamily(GaussianMarginals, ExponentialFamily):
    """What Gaussian families share: the geometry that estimators and retractions use.

    `curvature` says in which form H is wanted: "matrix", "diagonal", or "none".
    """

    curvature: ClassVar[str]
    location: ClassVar[bool] = True

    def precision(self, lam: NaturalParameters) -> Array:
        """S, as a matrix or elementwise."""
        return jnp.asarray(-2.0 * lam.quadratic)

    def displace(self, lam: NaturalParameters, z: Array) -> Array:
        """C z with C C^T = S^{-1}: a draw's displacement from the mean, for standard normal z."""
        raise unwritten(self, "displace(self, lam, z)")

    def from_mean(self, mean: Array, precision: Array) -> NaturalParameters:
        """lambda = (S m, -S / 2)."""
        raise unwritten(self, "from_mean(self, mean, precision)")

    def gradient(self, lam: NaturalParameters, g: Array, h: PyTree) -> NaturalParameters:
        """grad_mu E_q[l] = (g - H m, H / 2) from g = E[grad l] and H = E[hess l]."""
        raise unwritten(self, "gradient(self, lam, g, h)")

    def centred(self, lam: NaturalParameters) -> tuple[NaturalParameters, Callable, Callable]:
        """Return N(0, S^{-1}): far from zero, E[theta^2] and E[theta] lose the variance."""
        m = self.mean(lam)

        def back(n: GaussianNatural) -> NaturalParameters:
            return self.gradient(lam, n.linear, 2.0 * n.quadratic)

        return lam._replace(linear=jnp.zeros_like(lam.linear)), lambda theta: m + theta, back

    def usable(self, lam: NaturalParameters) -> Array:
        """Whether the fields are finite and S has a factor, which the mean needs anyway."""
        like = lam.linear[(..., *[0] * self.event_ndim)]
        return each_finite((lam, self.mean(lam)), like)


@jax.custom_jvp
def _matrix_excess(r: Array) -> Array:
    """tr R - log det(I + R) for symmetric R with eigenvalues below NEAR."""
    return jnp.sum(excess_near(jnp.linalg.eigvalsh(r)), axis=-1)


@_matrix_excess.defjvp
def _(primals: Any, tangents: Any) -> Any:
    # (I + R)^{-1} R is smooth where the derivatives of eigenvalues are not: at p = q.
    (r,), (dr,) = primals, tangents
    slope = jnp.linalg.solve(jnp.eye(r.shape[-1], dtype=r.dtype) + r, r)
    return _matrix_excess(r), jnp.sum(slope * dr, axis=(-2, -1))


@dataclasses.dataclass(frozen=True)
class Normal(GaussianFamily):
    """The normal density of a number, elementwise over any shape.

    log q(theta) = -S (theta - m)^2 / 2 + log(S / 2 pi) / 2.

    Standard parameters: `mean` m, and `variance` or `precision` S.

    lambda: linear = S m, quadratic = -S / 2. mu: linear = m, quadratic = E[theta^2].

    Example:
      >>> import blr_optax as blr
      >>> normal = blr.families.get("normal")
      >>> lam = normal.natural(mean=1.0, variance=4.0)
      >>> print(lam.linear, lam.quadratic, normal.expectation(lam).quadratic)
      0.25 -0.125 5.0
    """

    Natural: ClassVar[type] = GaussianNatural
    Expectation: ClassVar[type] = GaussianExpectation
    domains: ClassVar[dict] = {"linear": domain.real(), "quadratic": domain.negative()}
    curvature: ClassVar[str] = "diagonal"

    @checked(mean=REAL, variance=POSITIVE, precision=POSITIVE)
    def natural(
        self, *, mean: ArrayLike, variance: Alternative = None, precision: Alternative = None
    ) -> GaussianNatural:
        """lambda from the mean and the variance or precision (> 0)."""
        if variance is not None:
            return GaussianNatural(jnp.divide(mean, variance), jnp.divide(-0.5, variance))
        return self.from_mean(jnp.asarray(mean), jnp.asarray(precision))

    def from_mean(self, mean: Array, precision: Array) -> GaussianNatural:
        mean, precision = jnp.broadcast_arrays(mean, precision)
        return GaussianNatural(precision * mean, -0.5 * precision)

    def natural_at(self, location: Array, like: PyTree = None) -> GaussianNatural:
        precision = jnp.ones_like(location) if like is None else self.precision(like)
        return self.from_mean(location, precision)

    def standard(self, lam: GaussianNatural) -> dict[str, Array]:
        return {"mean": self.mean(lam), "variance": self.variance(lam)}

    def mean(self, lam: GaussianNatural) -> Array:
        return lam.linear / self.precision(lam)

    def variance(self, lam: GaussianNatural) -> Array:
        return 1.0 / self.precision(lam)

    def log_partition(self, lam: GaussianNatural) -> Array:
        """Return A = S m^2 / 2 - log(S) / 2."""
        return 0.5 * lam.linear * self.mean(lam) - 0.5 * jnp.log(self.precision(lam))

    def sufficient_statistics(self, theta: Array, lam: PyTree = None) -> GaussianExpectation:
        theta = floating(theta)
        return GaussianExpectation(theta, theta * theta)

    def log_base_measure(self, lam: GaussianNatural, theta: Array) -> Array:
        return jnp.full_like(theta * lam.linear, -0.5 * LOG_2PI)

    def expectation(self, lam: GaussianNatural) -> GaussianExpectation:
        m = self.mean(lam)
        return GaussianExpectation(m, self.variance(lam) + m * m)

    def natural_from_expectation(
        self, mu: GaussianExpectation, with_status: bool = False
    ) -> PyTree:
        """lambda(mu) in closed form; NaN, and status False, where mu has no variance."""
        variance = mu.quadratic - mu.linear * mu.linear
        proper = domain.positive().contains(variance)
        lam = self.from_mean(mu.linear, 1.0 / jnp.where(proper, variance, jnp.nan))
        return (lam, self.in_domain(lam)) if with_status else lam

    def inverse_fisher_product(
        self, lam: GaussianNatural, v: GaussianExpectation
    ) -> GaussianNatural:
        """Return the change of lambda that changes mu by v, through those of m and S."""
        s, m = self.precision(lam), self.mean(lam)
        ds = -s * s * (v.quadratic - 2.0 * m * v.linear)
        return GaussianNatural(s * v.linear + ds * m, -0.5 * ds)

    def usable(self, lam: GaussianNatural) -> Array:
        return self.in_domain(lam) & jnp.isfinite(self.mean(lam))

    def log_prob(self, lam: GaussianNatural, theta: Array) -> Array:
        s, d = self.precision(lam), theta - self.mean(lam)
        return 0.5 * (jnp.log(s) - s * d * d - LOG_2PI)

    def entropy(self, lam: GaussianNatural) -> Array:
        return 0.5 * (1.0 + LOG_2PI - jnp.log(self.precision(lam)))

    def kl(self, lam_p: GaussianNatural, lam_q: GaussianNatural) -> Array:
        s_p, s_q = self.precision(lam_p), self.precision(lam_q)
        d = self.mean(lam_p) - self.mean(lam_q)
        return 0.5 * (relative_excess(s_p, s_q) + s_q * d * d)

    def sample(self, key: Array, lam: GaussianNatural, shape: tuple[int, ...] = ()) -> Array:
        like = self.mean(lam)
        return like + self.displace(lam, jax.random.normal(key, shape + like.shape, like.dtype))

    def displace(self, lam: GaussianNatural, z: Array) -> Array:
        return z * jax.lax.rsqrt(self.precision(lam))

    def gradient(self, lam: GaussianNatural, g: Array, h: Array) -> GaussianNatural:
        return GaussianNatural(g - h * self.mean(lam), 0.5 * h)

    def retract(
        self, lam: GaussianNatural, step: GaussianNatural, form: str = "improved"
    ) -> GaussianNatural:
        """Second-order step in (m, S); see `retract` of `Gaussian` for the forms."""
        s, m = self.precision(lam), self.mean(lam)
        d = -2.0 * step.quadratic
        new = domain.positive().retract(s, d)
        if form == "square_root":  # S^{-1} = c^2, c <- c - c (c^2 d) / 2
            factor = 1.0 - 0.5 * d / s
            root = s / jnp.square(factor)
            new = jnp.where((factor > 0) & domain.positive().contains(root), root, new)
        by = new if form == "improved" else s
        return self.from_mean(m + (step.linear - d * m) / by, new)


def solve(s: ArrayLike, b: ArrayLike) -> Array:
    """S^{-1} b for a batch of vectors b."""
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(s), True), b[..., None])[..., 0]


def _inverse(s: Array) -> Array:
    """S^{-1} through its Cholesky factor, exactly symmetric."""
    eye = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)
    root = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(s), eye, lower=True)
    return jnp.swapaxes(root, -1, -2) @ root


def _log_det(s: Array) -> Array:
    return 2.0 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(s), axis1=-2, axis2=-1)), axis=-1)


def matvec(s: Array, v: Array) -> Array:
    return (s @ v[..., None])[..., 0]


def _symmetric(x: Array) -> Array:
    return 0.5 * (x + jnp.swapaxes(x, -1, -2))


@dataclasses.dataclass(frozen=True)
class Gaussian(GaussianFamily):
    """The Gaussian with a full precision matrix; the event is the last axis.

    log q(theta) = -(theta - m)^T S (theta - m) / 2 + log det(S / 2 pi) / 2.

    Standard parameters: `mean` m [..., d], and `covariance` or `precision` S [..., d, d].

    lambda: linear = S m [..., d], quadratic = -S / 2 [..., d, d]. mu: linear = m, quadratic =
    E[theta theta^T].

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> gaussian = blr.families.get("gaussian")
      >>> lam = gaussian.natural(mean=jnp.array([1.0, 2.0]), covariance=4.0 * jnp.eye(2))
      >>> print(lam.linear, gaussian.entropy(lam).round(3))
      [0.25 0.5 ] 4.224
    """

    Natural: ClassVar[type] = GaussianNatural
    Expectation: ClassVar[type] = GaussianExpectation
    domains: ClassVar[dict] = {"linear": domain.real(1), "quadratic": domain.negative_definite()}
    event_ndim: ClassVar[int] = 1
    curvature: ClassVar[str] = "matrix"

    @checked(mean=REAL.over("d"), covariance=DEFINITE, precision=DEFINITE)
    def natural(
        self, *, mean: ArrayLike, covariance: Alternative = None, precision: Alternative = None
    ) -> GaussianNatural:
        """lambda from the mean and the covariance or precision matrix (positive definite)."""
        s = jnp.asarray(precision) if covariance is None else _inverse(jnp.asarray(covariance))
        return self.from_mean(jnp.asarray(mean), s)

    def from_mean(self, mean: Array, precision: Array) -> GaussianNatural:
        batch = jnp.broadcast_shapes(mean.shape[:-1], precision.shape[:-2])
        precision = jnp.broadcast_to(precision, (*batch, *precision.shape[-2:]))
        return GaussianNatural(matvec(precision, mean), -0.5 * precision)

    def natural_at(self, location: Array, like: PyTree = None) -> GaussianNatural:
        eye = jnp.eye(location.shape[-1], dtype=location.dtype)
        return self.from_mean(location, eye if like is None else self.precision(like))

    def standard(self, lam: GaussianNatural) -> dict[str, Array]:
        return {"mean": self.mean(lam), "covariance": self.covariance(lam)}

    def mean(self, lam: GaussianNatural) -> Array:
        return solve(self.precision(lam), lam.linear)

    def covariance(self, lam: GaussianNatural) -> Float[Array, "... d d"]:
        """S^{-1}."""
        return _inverse(self.precision(lam))

    def variance(self, lam: GaussianNatural) -> Array:
        return jnp.diagonal(self.covariance(lam), axis1=-2, axis2=-1)

    def log_partition(self, lam: GaussianNatural) -> Array:
        """Return A = m^T S m / 2 - log det(S) / 2."""
        return 0.5 * (jnp.sum(lam.linear * self.mean(lam), -1) - _log_det(self.precision(lam)))

    def sufficient_statistics(self, theta: Array, lam: PyTree = None) -> GaussianExpectation:
        theta = floating(theta)
        return GaussianExpectation(theta, theta[..., :, None] * theta[..., None, :])

    def log_base_measure(self, lam: GaussianNatural, theta: Array) -> Array:
        size = lam.linear.shape[-1]
        return jnp.full(jnp.shape(theta)[:-1], -0.5 * LOG_2PI * size, floating(theta).dtype)

    def expectation(self, lam: GaussianNatural) -> GaussianExpectation:
        m = self.mean(lam)
        return GaussianExpectation(m, self.covariance(lam) + m[..., :, None] * m[..., None, :])

    def natural_from_expectation(
        self, mu: GaussianExpectation, with_status: bool = False
    ) -> PyTree:
        """lambda(mu) in closed form; NaN, and status False, where no covariance is left."""
        covariance = mu.quadratic - mu.linear[..., :, None] * mu.linear[..., None, :]
        proper = domain.positive_definite().contains(covariance)
        lam = self.from_mean(mu.linear, _inverse(covariance))
        return (lam, proper) if with_status else lam

    def inverse_fisher_product(
        self, lam: GaussianNatural, v: GaussianExpectation
    ) -> GaussianNatural:
        """Return the change of lambda that changes mu by v, through those of m and S."""
        s, m = self.precision(lam), self.mean(lam)
        cross = m[..., :, None] * v.linear[..., None, :]
        ds = _symmetric(-s @ (v.quadratic - cross - jnp.swapaxes(cross, -1, -2)) @ s)
        return GaussianNatural(matvec(s, v.linear) + matvec(ds, m), -0.5 * ds)

    def log_prob(self, lam: GaussianNatural, theta: Array) -> Array:
        s, d = self.precision(lam), theta - self.mean(lam)
        quadratic = jnp.sum(d * matvec(s, d), axis=-1)
        return 0.5 * (_log_det(s) - quadratic - LOG_2PI * d.shape[-1])

    def entropy(self, lam: GaussianNatural) -> Array:
        return 0.5 * (lam.linear.shape[-1] * (1.0 + LOG_2PI) - _log_det(self.precision(lam)))

    def kl(self, lam_p: GaussianNatural, lam_q: GaussianNatural) -> Array:
        s_p, s = self.precision(lam_p), self.precision(lam_q)
        d = self.mean(lam_p) - self.mean(lam_q)
        root, root_q = jnp.linalg.cholesky(s_p), jnp.linalg.cholesky(s)
        # S_q relative to S_p, minus one: digits survive when p is close to q.
        half = jax.scipy.linalg.solve_triangular(root, s - s_p, lower=True)
        relative = jax.scipy.linalg.solve_triangular(root, jnp.swapaxes(half, -1, -2), lower=True)
        near = jnp.linalg.norm(relative, axis=(-2, -1)) < NEAR
        small = _symmetric(jnp.where(near[..., None, None], relative, 0.0))
        trace = jnp.trace(relative, axis1=-2, axis2=-1)
        diagonal_q, diagonal = (jnp.diagonal(x, axis1=-2, axis2=-1) for x in (root_q, root))
        far = trace - 2.0 * jnp.sum(jnp.log(diagonal_q / diagonal), axis=-1)
        spread = jnp.where(near, _matrix_excess(small), far)
        return 0.5 * (spread + jnp.sum(d * matvec(s, d), axis=-1))

    def sample(self, key: Array, lam: GaussianNatural, shape: tuple[int, ...] = ()) -> Array:
        m = self.mean(lam)
        return m + self.displace(lam, jax.random.normal(key, shape + m.shape, m.dtype))

    def displace(self, lam: GaussianNatural, z: Array) -> Array:
        """L^{-T} z with S = L L^T."""
        root = jnp.broadcast_to(jnp.linalg.cholesky(self.precision(lam)), z.shape + z.shape[-1:])
        return jax.scipy.linalg.solve_triangular(root, z[..., None], lower=True, trans=1)[..., 0]

    def gradient(self, lam: GaussianNatural, g: Array, h: Array) -> GaussianNatural:
        return GaussianNatural(g - matvec(h, self.mean(lam)), 0.5 * _symmetric(h))

    def retract(
        self, lam: GaussianNatural, step: GaussianNatural, form: str = "improved"
    ) -> GaussianNatural:
        """Return a step that keeps S positive definite; D = -2 step.quadratic is the step of S.

        "improved": S' = S + D + D S^{-1} D / 2, m' = m + S'^{-1} (step.linear - D m).

        "improved_old": the same S', the mean preconditioned with the old S.

        "square_root": S'^{-1} = C' C'^T, C' = C (I - tril_half(C^T D C)), C C^T = S^{-1}, the mean
        preconditioned with the old S; "improved" where the diagonal of C' would change its sign.

        tril_half is the strictly lower part plus half the diagonal (Lin, Schmidt
        and Khan 2020; Kumar et al. 2025).
        """
        s, m = self.precision(lam), self.mean(lam)
        d = -2.0 * _symmetric(step.quadratic)
        new = domain.positive_definite().retract(s, d)
        if form == "square_root":
            c = jnp.linalg.cholesky(_inverse(s))
            k = jnp.swapaxes(c, -1, -2) @ d @ c
            half = jnp.tril(k, -1) + 0.5 * k * jnp.eye(k.shape[-1], dtype=k.dtype)
            c = c - c @ half
            root = _symmetric(_inverse(c @ jnp.swapaxes(c, -1, -2)))
            keeps_sign = jnp.all(jnp.diagonal(half, axis1=-2, axis2=-1) < 1.0, axis=-1)
            inside = keeps_sign & domain.positive_definite().contains(root)
            new = jnp.where(inside[..., None, None], root, new)
        by = new if form == "improved" else s
        return self.from_mean(m + solve(by, step.linear - matvec(d, m)), _symmetric(new))


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
        self, *, mean: ArrayLike, covariance: Alternative = None, precision: Alternative = None
    ) -> FixedNatural:
        """lambda from the mean and the known covariance or precision matrix."""
        lam = Gaussian().natural(mean=mean, covariance=covariance, precision=precision)
        return FixedNatural(lam.linear, -2.0 * lam.quadratic)

    def from_mean(self, mean: Array, precision: Array) -> FixedNatural:
        lam = Gaussian().from_mean(mean, precision)
        return FixedNatural(lam.linear, -2.0 * lam.quadratic)

    def natural_at(self, location: Array, like: PyTree = None) -> FixedNatural:
        eye = jnp.eye(location.shape[-1], dtype=location.dtype)
        return self.from_mean(location, eye if like is None else like.precision)

    def precision(self, lam: FixedNatural) -> Array:
        return jnp.asarray(lam.precision)

    def _free(self, lam: FixedNatural) -> GaussianNatural:
        """Return the same density as a member of `gaussian`."""
        return GaussianNatural(lam.linear, -0.5 * lam.precision)

    def standard(self, lam: FixedNatural) -> dict[str, Array]:
        return {"mean": self.mean(lam), "precision": lam.precision}

    def mean(self, lam: FixedNatural) -> Array:
        return solve(lam.precision, lam.linear)

    def variance(self, lam: FixedNatural) -> Array:
        return Gaussian().variance(self._free(lam))

    def log_partition(self, lam: FixedNatural) -> Array:
        """Return A = m^T S m / 2."""
        return 0.5 * jnp.sum(lam.linear * self.mean(lam), axis=-1)

    def sufficient_statistics(self, theta: Array, lam: PyTree = None) -> FixedExpectation:
        theta, d = floating(theta), theta.shape[-1]
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

    def natural_from_expectation(self, mu: FixedExpectation, with_status: bool = False) -> PyTree:
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

    def gradient(self, lam: FixedNatural, g: Array, h: PyTree) -> FixedNatural:
        return FixedNatural(g, jnp.zeros_like(lam.precision))

    def centred(self, lam: FixedNatural) -> tuple[FixedNatural, Callable, Callable]:
        return lam, lambda theta: theta, lambda n: n

    def inverse_fisher_product(self, lam: FixedNatural, v: FixedExpectation) -> FixedNatural:
        """F^{-1} = S."""
        return FixedNatural(matvec(lam.precision, v.linear), jnp.zeros_like(lam.precision))
