"""The Gaussian whose precision is a diagonal plus low rank: S = diag(u) + W W^T, W of r columns.

Everything goes through the capacitance matrix C = I + W^T diag(u)^{-1} W of size r (Woodbury),

    S^{-1} = diag(u)^{-1} - diag(u)^{-1} W C^{-1} W^T diag(u)^{-1}
    log det S = sum log u + log det C

in O(d r^2); no matrix of size d is formed. A step adds curvature of the same form, diag(h) + X X^T:

    W W^T  <-  [sqrt(1 - rho) W, sqrt(rho) X]: its r leading singular directions
    u      <-  (1 - rho) u + rho h + squared row sums of the directions left out
    m      <-  m - rho S_new^{-1} E[grad f]

so that the diagonal of S is always right (Jones, Chang and Murphy 2024). X are the gradients
themselves (`squared_gradient`); or the leading positive part of H - diag(u), by one power iteration
from W and the gradients, and then h is what X leaves of the diagonal of H.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from blr_optax.families._base import domain
from blr_optax.families._base.conditional import (
    ConditionalFamily,
    check_step,
    hessian_diagonal,
    move_field,
    normals,
)
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import POSITIVE, REAL, checked
from blr_optax.families._continuous.gaussian import matvec
from blr_optax.families._numerics.quantiles import GaussianMarginals
from blr_optax.families._numerics.special import LOG_2PI

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool

    from blr_optax._typing import Scalar


@parameters
class LowRankNatural(NamedTuple):
    """Parameters of a low-rank Gaussian: m, and u and W of its precision diag(u) + W W^T."""

    mean: Array
    diagonal: Array
    factor: Array


@parameters
class LowRankGradient(NamedTuple):
    """Natural gradient of E[f]: E[grad f], u - h, and the columns X of the curvature's factor."""

    mean: Array
    diagonal: Array
    factor: Array


class LowRankNoise(NamedTuple):
    """Standard normal numbers: one per coordinate [samples, d], one per column [samples, r]."""

    wide: Array
    narrow: Array


@dataclasses.dataclass(frozen=True)
class GaussianLowRank(GaussianMarginals, ConditionalFamily):
    """The Gaussian with precision diag(u) + W W^T; the rank is the number of columns of W.

    log q(theta) = -(theta - m)^T S (theta - m) / 2 + log det(S / 2 pi) / 2.

    Standard parameters: `mean` and `diagonal` (u > 0) [..., d], `factor` (W) [..., d, r], which are
    also the state: S determines W up to a rotation of its columns only.

    lambda: mean = m [..., d], diagonal = u [..., d], factor = W [..., d, r]. There is no mu.

    Losses may return several terms, whose sum is the potential: with `squared_gradient` each term's
    gradient is a column of its own, as the empirical Fisher wants it.

    Attributes:
        known_curvature: a diagonal curvature that is known, added to h with `squared_gradient`: the
            precision of a Gaussian prior whose gradient is in the loss.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> family, a = blr.families.get("gaussian_low_rank"), jnp.array([1.0, 2.0, -1.0, 0.5])
      >>> loss = lambda x: 0.5 * (jnp.sum((x - 3.0) ** 2) + (a @ (x - 3.0)) ** 2)
      >>> lam = family.natural(mean=jnp.zeros(4), diagonal=jnp.ones(4), factor=jnp.zeros((4, 1)))
      >>> estimate = blr.estimators.natural_gradient(family, loss, blr.estimators.delta())
      >>> lam = family.move(lam, estimate(None, lam)[1], 1.0)
      >>> print(*(x.round(3) for x in (family.mean(lam), lam.diagonal, jnp.abs(lam.factor[:, 0]))))
      [3. 3. 3. 3.] [1. 1. 1. 1.] [1.  2.  1.  0.5]
    """

    known_curvature: float = 0.0

    Natural: ClassVar[type] = LowRankNatural
    curvatures: ClassVar[tuple[str, ...]] = ("exact", "reparameterized", "squared_gradient")
    at_means: ClassVar[bool] = True

    @checked(mean=REAL.over("d"), diagonal=POSITIVE.over("d"), factor=REAL.over("d r"))
    def natural(self, *, mean: ArrayLike, diagonal: ArrayLike, factor: ArrayLike) -> LowRankNatural:
        """Return the parameters, checked and broadcast."""
        return LowRankNatural(*map(jnp.asarray, (mean, diagonal, factor)))

    def standard(self, lam: LowRankNatural) -> dict[str, Array]:
        return dict(lam._asdict())

    def _capacitance(self, lam: LowRankNatural) -> tuple[Array, Array]:
        """(diag(u)^{-1} W, the Cholesky factor of C)."""
        scaled = lam.factor / lam.diagonal[..., None]
        eye = jnp.eye(lam.factor.shape[-1], dtype=lam.factor.dtype)
        return scaled, jnp.linalg.cholesky(eye + jnp.swapaxes(lam.factor, -1, -2) @ scaled)

    def _covariance_root(self, lam: LowRankNatural) -> Array:
        """R [..., d, r] with S^{-1} = diag(u)^{-1} - R R^T."""
        scaled, root = self._capacitance(lam)
        half = jax.scipy.linalg.solve_triangular(root, jnp.swapaxes(scaled, -1, -2), lower=True)
        return jnp.swapaxes(half, -1, -2)

    def precision_product(self, lam: LowRankNatural, v: Array) -> Array:
        """S v."""
        inner = matvec(jnp.swapaxes(lam.factor, -1, -2), v)
        return lam.diagonal * v + matvec(lam.factor, inner)

    def solve(self, lam: LowRankNatural, v: Array) -> Array:
        """S^{-1} v."""
        r = self._covariance_root(lam)
        return v / lam.diagonal - matvec(r, matvec(jnp.swapaxes(r, -1, -2), v))

    def _log_det(self, lam: LowRankNatural) -> Array:
        root = self._capacitance(lam)[1]
        narrow = jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1)
        return jnp.sum(jnp.log(lam.diagonal), axis=-1) + 2.0 * narrow

    def log_prob(self, lam: LowRankNatural, theta: Array) -> Array:
        d = theta - lam.mean
        along = jnp.einsum("...dr,...d->...r", lam.factor, d)
        squared = jnp.sum(lam.diagonal * d * d, axis=-1) + jnp.sum(along * along, axis=-1)
        return 0.5 * (self._log_det(lam) - squared - d.shape[-1] * LOG_2PI)

    def entropy(self, lam: LowRankNatural) -> Array:
        return 0.5 * (lam.mean.shape[-1] * (1.0 + LOG_2PI) - self._log_det(lam))

    def kl(self, lam_p: LowRankNatural, lam_q: LowRankNatural) -> Array:
        # tr(S_q S_p^{-1}) column by column of W_q.
        r, w = self._covariance_root(lam_p), lam_q.factor
        trace = jnp.sum(lam_q.diagonal * self.variance(lam_p), axis=-1)
        trace += jnp.sum(w * w / lam_p.diagonal[..., None], axis=(-2, -1))
        trace -= jnp.sum(jnp.square(jnp.swapaxes(r, -1, -2) @ w), axis=(-2, -1))
        d = lam_p.mean - lam_q.mean
        squared = jnp.sum(d * self.precision_product(lam_q, d), axis=-1)
        dets = self._log_det(lam_p) - self._log_det(lam_q)
        return 0.5 * (trace - d.shape[-1] + dets + squared)

    def mean(self, lam: LowRankNatural) -> Array:
        return lam.mean

    def variance(self, lam: LowRankNatural) -> Array:
        removed = jnp.sum(jnp.square(self._covariance_root(lam)), axis=-1)
        return 1.0 / lam.diagonal - removed

    def in_domain(self, lam: LowRankNatural) -> Bool[Array, ...]:
        finite = jnp.all(jnp.isfinite(lam.mean), axis=-1)
        finite &= jnp.all(jnp.isfinite(lam.factor), axis=(-2, -1))
        return finite & domain.positive(1).contains(lam.diagonal)

    def displace(self, lam: LowRankNatural, z: LowRankNoise) -> Array:
        """S^{-1} (diag(u)^{1/2} z + W z'), whose covariance is S^{-1} S S^{-1}: exact."""
        y = jnp.sqrt(lam.diagonal) * z.wide + jnp.einsum("...dr,...r->...d", lam.factor, z.narrow)
        return self.solve(lam, y)

    def noise(
        self, key: Array, lam: LowRankNatural, samples: int, antithetic: bool = False
    ) -> LowRankNoise:
        keys, shapes = jax.random.split(key), (lam.mean.shape, lam.factor.shape[-1:])
        return LowRankNoise(
            *(
                normals(k, (samples, *shape), lam.mean.dtype, antithetic)
                for k, shape in zip(keys, shapes, strict=True)
            )
        )

    def sample(self, key: Array, lam: LowRankNatural, shape: tuple[int, ...] = ()) -> Array:
        wide, narrow = jax.random.split(key)
        batch, dtype = lam.mean.shape[:-1], lam.mean.dtype
        z = LowRankNoise(
            jax.random.normal(wide, shape + lam.mean.shape, dtype),
            jax.random.normal(narrow, (*shape, *batch, lam.factor.shape[-1]), dtype),
        )
        return lam.mean + self.displace(lam, z)

    def natural_gradient_at(
        self,
        lam: LowRankNatural,
        loss: Callable,
        noise: LowRankNoise,
        weights: Array,
        curvature: str = "exact",
    ) -> tuple[Array, LowRankGradient]:
        away = self.displace(lam, noise)
        theta = lam.mean + away

        def total(x: Array) -> Array:
            return jnp.sum(loss(x))

        value, slope = jax.vmap(jax.value_and_grad(total))(theta)
        g = weights @ slope
        if curvature == "squared_gradient":
            terms = jax.vmap(jax.jacrev(lambda x: jnp.atleast_1d(loss(x))))(theta)
            columns = jnp.sqrt(weights)[:, None, None] * terms
            x = columns.reshape(-1, columns.shape[-1]).T
            h = jnp.full_like(lam.diagonal, self.known_curvature)
            return weights @ value, LowRankGradient(g, lam.diagonal - h, x)

        basis = jnp.linalg.qr(jnp.concatenate([lam.factor, slope.T], axis=-1))[0]
        if curvature == "exact":

            def curved(v: Array) -> Array:
                def one(x: Array) -> Array:
                    return jax.vmap(
                        lambda e: jax.jvp(jax.grad(total), (x,), (e,))[1], in_axes=1, out_axes=1
                    )(v)

                return jnp.tensordot(weights, jax.lax.map(one, theta), 1)

            look = jax.lax.map(lambda x: hessian_diagonal(total, x), theta)
            diagonal = weights @ look
        else:
            pulled = weights[:, None] * self.precision_product(lam, away)

            def curved(v: Array) -> Array:
                return 0.5 * (pulled.T @ (slope @ v) + slope.T @ (pulled @ v))

            diagonal = jnp.sum(pulled * slope, axis=0)

        def rest_of(v: Array) -> Array:
            return curved(v) - lam.diagonal[:, None] * v

        basis = jnp.linalg.qr(rest_of(basis))[0]
        rest = basis.T @ rest_of(basis)
        values, vectors = jnp.linalg.eigh(0.5 * (rest + rest.T))
        x = basis @ vectors * jnp.sqrt(jnp.maximum(values, 0.0))
        h = diagonal - jnp.sum(x * x, axis=-1)
        return weights @ value, LowRankGradient(g, lam.diagonal - h, x)

    def move(
        self,
        lam: LowRankNatural,
        gradient: LowRankGradient,
        learning_rate: Scalar,
        step: str = "auto",
    ) -> LowRankNatural:
        check_step(step)
        old, new = (jnp.sqrt(jnp.maximum(x, 0.0)) for x in (1.0 - learning_rate, learning_rate))
        columns = jnp.concatenate([old * lam.factor, new * gradient.factor], axis=-1)
        left, sizes, _ = jnp.linalg.svd(columns, full_matrices=False)
        columns, rank = left * sizes, lam.factor.shape[-1]
        # A rank above d leaves columns of zeros.
        columns = jnp.pad(columns, ((0, 0), (0, max(0, rank - columns.shape[-1]))))
        d = -learning_rate * gradient.diagonal
        diagonal = move_field(domain.positive(), lam.diagonal, d, step)
        diagonal += jnp.sum(jnp.square(columns[:, rank:]), axis=-1)
        moved = LowRankNatural(lam.mean, diagonal, columns[:, :rank])
        by = lam if step == "improved_old" else moved
        return moved._replace(mean=lam.mean - learning_rate * self.solve(by, gradient.mean))
