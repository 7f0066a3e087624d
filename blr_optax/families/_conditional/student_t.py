"""Student's t as a Gaussian whose scale is hidden.

    theta | w ~ N(m, w S^{-1}),    w ~ inverse gamma(a, a),    a = nu / 2

Both are exponential families: theta | w has lambda = (S m, -S / 2), T = (theta, theta theta^T) / w
with expectation (m, S^{-1} + m m^T) since E[1 / w] = 1; w has lambda = a and T = -(log w + 1 / w).
The blocks do not mix, because the first expectation does not depend on a. The natural gradients of
E_q[f] are

    S:  E[w hess f] = E[S (theta - m) grad f^T]         m:  E[grad f], preconditioned with S
    a:  E[grad f . (theta - m) dlog w / da] / (2 F),    F = psi'(a) - 1 / a

with the implicit derivative of a draw of w (Lin, Khan and Schmidt 2019). The entropy of the
marginal is known, so that only the loss is sampled. F counts w as if it were seen: a moves the
slower the less theta says about w, as in EM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc

from blr_optax import _loops
from blr_optax._validate import require
from blr_optax.families._base import domain
from blr_optax.families._base.conditional import (
    ConditionalFamily,
    move_field,
    move_gaussian,
    normals,
    repeated,
)
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import DEFINITE, POSITIVE, REAL, checked
from blr_optax.families._continuous.gaussian import Gaussian, GaussianNatural, matvec
from blr_optax.families._numerics.special import (
    LOG_2PI,
    log_minus_digamma,
    stirling,
    stirling_curvature,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float

    from blr_optax._typing import Alternative, Scalar

GAUSSIAN = Gaussian()


@parameters
class StudentTNatural(NamedTuple):
    """lambda of a Student-t: S m and -S / 2 of theta given its scale, nu / 2 of the scale."""

    linear: Array
    quadratic: Array
    shape: Array


class StudentTNoise(NamedTuple):
    """log w and its derivative in a [samples], and standard normal eps [samples, d]."""

    log_scale: Array
    slope: Array
    normal: Array


def _entropy(a: Float[Array, ...], size: int) -> Float[Array, ...]:
    """Return the entropy for S = I: what log Gamma and psi have beside their logarithms."""
    half = 0.5 * size
    b = a + half
    logs = 0.5 * jnp.log1p(half / a) + half * (1.0 + LOG_2PI)
    tails = log_minus_digamma(a) - log_minus_digamma(b)
    return logs + stirling(a) - stirling(b) + b * tails


@dataclasses.dataclass(frozen=True)
class StudentT(ConditionalFamily):
    """The multivariate Student-t density with nu degrees of freedom.

    log q(theta) = log Gamma((nu + d) / 2) - log Gamma(nu / 2) + log det(S / (nu pi)) / 2
                   - (nu + d) log(1 + (theta - m)^T S (theta - m) / nu) / 2.

    Standard parameters: `mean` [..., d], `degrees` [...], and `scale`, the matrix S^{-1}, or
    `covariance`, nu / (nu - 2) S^{-1} with nu > 2, [..., d, d].

    lambda: linear = S m [..., d], quadratic = -S / 2 [..., d, d], shape = nu / 2. There is no mu.

    For nu <= 1 there is no expectation and `mean` is the centre; for nu <= 2 the variance is
    infinite.

    Example:
      >>> import jax.numpy as jnp
      >>> from blr_optax.families._conditional.student_t import StudentT
      >>> student = StudentT()
      >>> lam = student.natural(mean=jnp.zeros(1), scale=jnp.eye(1), degrees=1.0)
      >>> print(student.log_prob(lam, jnp.ones(1)), student.entropy(lam))  # Cauchy: log(4 pi)
      -1.838 2.531
    """

    Natural: ClassVar[type] = StudentTNatural

    @checked(mean=REAL.over("d"), degrees=POSITIVE, scale=DEFINITE, covariance=DEFINITE)
    def natural(
        self,
        *,
        mean: ArrayLike,
        degrees: ArrayLike,
        scale: Alternative = None,
        covariance: Alternative = None,
    ) -> StudentTNatural:
        """lambda from the centre, the degrees of freedom, and the scale matrix or covariance."""
        degrees = jnp.asarray(degrees)
        if covariance is not None:
            valid = "above 2 for a covariance"
            require("student_t.natural: degrees", degrees, valid, lambda x: x > 2)
            scale = (1.0 - 2.0 / degrees)[..., None, None] * covariance
        inner = GAUSSIAN.natural(mean=mean, covariance=scale)
        return StudentTNatural(inner.linear, inner.quadratic, 0.5 * degrees)

    def _inner(self, lam: StudentTNatural) -> GaussianNatural:
        return GaussianNatural(lam.linear, lam.quadratic)

    def standard(self, lam: StudentTNatural) -> dict[str, Array]:
        return {
            "mean": self.mean(lam),
            "degrees": 2.0 * lam.shape,
            "scale": GAUSSIAN.covariance(self._inner(lam)),
        }

    def log_prob(self, lam: StudentTNatural, theta: Array) -> Array:
        a, half = lam.shape, 0.5 * lam.linear.shape[-1]
        b = a + half
        d = theta - self.mean(lam)
        q = jnp.sum(d * matvec(GAUSSIAN.precision(lam), d), axis=-1)
        # log Gamma(b) - log Gamma(a) - half log a, without its large terms.
        gammas = (b - 0.5) * jnp.log1p(half / a) - half + stirling(b) - stirling(a)
        constant = GAUSSIAN.log_prob(self._inner(lam), self.mean(lam))
        return constant + gammas - b * jnp.log1p(0.5 * q / a)

    def entropy(self, lam: StudentTNatural) -> Array:
        """H(q) of the marginal."""
        size = lam.linear.shape[-1]
        scale = GAUSSIAN.entropy(self._inner(lam)) - 0.5 * size * (1.0 + LOG_2PI)
        return scale + _entropy(lam.shape, size)

    def mean(self, lam: StudentTNatural) -> Array:
        return GAUSSIAN.mean(self._inner(lam))

    def variance(self, lam: StudentTNatural) -> Array:
        a = lam.shape[..., None]
        finite = a > 1.0
        grown = a / jnp.where(finite, a - 1.0, 1.0)
        return jnp.where(finite, grown, jnp.inf) * GAUSSIAN.variance(self._inner(lam))

    def in_domain(self, lam: StudentTNatural) -> Bool[Array, ...]:
        return GAUSSIAN.in_domain(self._inner(lam)) & domain.positive().contains(lam.shape)

    def cdf(self, lam: StudentTNatural, theta: Array) -> Array:
        """Those of the coordinates, Student-t of the same degrees, by the incomplete beta."""
        m, v, scale = self.standard(lam).values()
        v = v[..., None]
        t = (theta - m) / jnp.sqrt(jnp.diagonal(scale, axis1=-2, axis2=-1))
        near = t * t < v
        # Of t^2 / (v + t^2) near the centre, of v / (v + t^2) in the tails: no digits are lost.
        middle = betainc(0.5, 0.5 * v, t * t / (v + t * t))
        tail = 0.5 * betainc(0.5 * v, 0.5, v / (v + t * t))
        below = jnp.where(near, 0.5 - 0.5 * middle, tail)
        return jnp.where(t < 0, below, jnp.where(near, 0.5 + 0.5 * middle, 1.0 - tail))

    def sample(self, key: Array, lam: StudentTNatural, shape: tuple[int, ...] = ()) -> Array:
        hidden, draw = jax.random.split(_loops.key_for(key, lam.shape))
        log_w = jnp.log(lam.shape) - jax.random.loggamma(
            hidden, lam.shape, shape + lam.shape.shape, lam.shape.dtype
        )
        z = jax.random.normal(draw, shape + lam.linear.shape, lam.linear.dtype)
        return self.mean(lam) + jnp.exp(0.5 * log_w)[..., None] * GAUSSIAN.displace(
            self._inner(lam), z
        )

    def noise(
        self, key: Array, lam: StudentTNatural, samples: int, antithetic: bool = False
    ) -> StudentTNoise:
        hidden, draw = jax.random.split(_loops.key_for(key, lam.shape))
        like = lam.linear

        def log_scale(a: Array) -> Array:
            return jnp.log(a) - jax.random.loggamma(hidden, a, (samples,), like.dtype)

        log_w, slope = jax.jvp(log_scale, (lam.shape,), (jnp.ones_like(lam.shape),))
        z = normals(draw, (samples, *like.shape), like.dtype, antithetic)
        return StudentTNoise(repeated(log_w, antithetic), repeated(slope, antithetic), z)

    def natural_gradient_at(
        self,
        lam: StudentTNatural,
        loss: Callable,
        noise: StudentTNoise,
        weights: Array,
        curvature: str = "exact",
    ) -> tuple[Array, StudentTNatural]:
        s, a = GAUSSIAN.precision(lam), lam.shape
        away = jnp.exp(0.5 * noise.log_scale)[:, None] * GAUSSIAN.displace(
            self._inner(lam), noise.normal
        )
        theta = self.mean(lam) + away
        value, slope = jax.vmap(jax.value_and_grad(loss))(theta)
        if curvature == "exact":
            scaled = weights * jnp.exp(noise.log_scale)
            h = jnp.tensordot(scaled, jax.vmap(jax.hessian(loss))(theta), 1)
        else:
            h = jnp.einsum("n,de,ne,nf->df", weights, s, away, slope)
        inner = GAUSSIAN.gradient(self._inner(lam), weights @ slope, h - s)
        g_a = 0.5 * (weights * noise.slope) @ jnp.sum(slope * away, axis=-1)
        g_a = g_a - jax.grad(_entropy)(a, lam.linear.shape[-1])
        fisher = 0.5 / (a * a) + stirling_curvature(a)  # psi'(a) - 1 / a
        return weights @ value, StudentTNatural(inner.linear, inner.quadratic, g_a / fisher)

    def move(
        self,
        lam: StudentTNatural,
        gradient: StudentTNatural,
        learning_rate: Scalar,
        step: str = "auto",
    ) -> StudentTNatural:
        d = jax.tree.map(lambda g: -learning_rate * g, gradient)
        inner = move_gaussian(GAUSSIAN, self._inner(lam), self._inner(d), step)
        shape = move_field(domain.positive(), lam.shape, d.shape, step)
        return StudentTNatural(inner.linear, inner.quadratic, shape)
