"""The matrix Gaussian: a covariance for the rows, one for the columns, and their Kronecker product.

    theta = M + U^{1/2} E V^{1/2}    P = U^{-1} [n, n]    Q = V^{-1} [p, p]    cov(vec) = V (x) U

With the others held fixed each of M, P, Q is a natural parameter of an exponential family: the
family is multi-linear, and steps block by block (Lin, Khan and Schmidt 2019, Thm. 2). With
D = theta - M, G = grad f and the curvature contracted with the other factor,

    H_row[i, k] = sum_jl V[j, l] d2f / dtheta[i, j] dtheta[k, l]  ~  E[P D G^T]  or  G V G^T
    H_col[j, l] = sum_ik U[i, k] d2f / dtheta[i, j] dtheta[k, l]  ~  E[Q D^T G]  or  G^T U G
    M  <-  M - rho U E[G] V      dP = rho (H_row / p - P)      dQ = rho (H_col / n - Q)

dP and dQ both move the one scale that P and Q share. The natural gradient of the pair (the Fisher
matrix is singular along P c, Q / c; this is its pseudo-inverse) makes the step of the scale once:
each gives up half of its part along P, or Q,

    dP - tr(P^{-1} dP) / (2 n) P          dQ - tr(Q^{-1} dQ) / (2 p) Q

without which a unit step on a quadratic loss would oscillate. No matrix of size np is ever formed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from blr_optax import _loops
from blr_optax.families._base import domain
from blr_optax.families._base.conditional import ConditionalFamily, move_field, normals
from blr_optax.families._base.parameters import parameters
from blr_optax.families._base.standard_parameters import DEFINITE, REAL, checked
from blr_optax.families._numerics.quantiles import GaussianMarginals
from blr_optax.families._numerics.special import LOG_2PI

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float

    from blr_optax._typing import PyTree, Scalar

POSITIVE = domain.positive_definite()


@parameters
class MatrixGaussianNatural(NamedTuple):
    """Parameters of a matrix Gaussian: M, and the row and column precisions P and Q."""

    mean: Array
    row_precision: Array
    column_precision: Array


def _transpose(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _solve(s: Array, b: Array) -> Array:
    """S^{-1} B for positive definite S."""
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(s), True), b)


def _inverse_root(s: Array) -> Array:
    """L^{-T} with S = L L^T: a root of S^{-1}, L^{-T} L^{-1}."""
    eye = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(s), eye, lower=True, trans=1)


def _log_det(s: Array) -> Array:
    diagonal = jnp.diagonal(jnp.linalg.cholesky(s), axis1=-2, axis2=-1)
    return 2.0 * jnp.sum(jnp.log(diagonal), axis=-1)


def _contract(
    loss: Callable, theta: Array, u: Array, root: Array, column: Array
) -> tuple[Array, Array]:
    """(H_row, H_col) at one point, one Hessian-vector product per entry; root root^T = V."""
    n, p = theta.shape
    gradient = jax.grad(loss)
    inverse = root.T @ column  # root^{-1}

    def add(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        row, column = carry
        i, c = index // p, index % p
        along = jnp.zeros_like(theta).at[i].set(root[:, c])
        bent = jax.jvp(gradient, (theta,), (along,))[1]
        return (
            row.at[:, i].add(bent @ root[:, c]),
            column + jnp.outer(bent.T @ u[:, i], inverse[c]),
        ), None

    start = (jnp.zeros((n, n), theta.dtype), jnp.zeros((p, p), theta.dtype))
    return _loops.scan(add, start, jnp.arange(n * p))[0]


@dataclasses.dataclass(frozen=True)
class MatrixGaussian(GaussianMarginals, ConditionalFamily):
    """The matrix Gaussian; an event is a matrix [n, p].

    log q(theta) = (p log det P + n log det Q - n p log 2 pi - tr(P D Q D^T)) / 2, D = theta - M.

    Standard parameters: `mean` [..., n, p], `row_precision` [..., n, n] and `column_precision`
    [..., p, p], which are also the state: the natural parameters of each block given the others.
    They are known up to a scale, P c and Q / c; a move leaves log det(P) / n = log det(Q) / p.

    lambda: mean = M [..., n, p], row_precision = P [..., n, n], column_precision = Q [..., p, p].
    There is no mu.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> family = blr.families.get("matrix_gaussian")
      >>> lam = family.natural(
      ...     mean=jnp.zeros((2, 3)), row_precision=jnp.eye(2), column_precision=jnp.eye(3)
      ... )
      >>> loss = lambda x: 2.0 * jnp.sum((x - 1.0) ** 2)
      >>> estimate = blr.estimators.natural_gradient(family, loss, blr.estimators.delta())
      >>> step = jax.jit(lambda lam: family.move(lam, estimate(None, lam)[1], 1.0))
      >>> for _ in range(6):
      ...     lam = step(lam)
      >>> print(family.mean(lam)[0], family.variance(lam)[0])
      [1. 1. 1.] [0.25 0.25 0.25]
    """

    Natural: ClassVar[type] = MatrixGaussianNatural
    event_ndim: ClassVar[int] = 2
    curvatures: ClassVar[tuple[str, ...]] = ("exact", "reparameterized", "squared_gradient")
    at_means: ClassVar[bool] = True
    location: ClassVar[bool] = True

    @checked(
        mean=REAL.over("n p"),
        row_precision=DEFINITE.over("n n"),
        column_precision=DEFINITE.over("p p"),
    )
    def natural(
        self, *, mean: ArrayLike, row_precision: ArrayLike, column_precision: ArrayLike
    ) -> MatrixGaussianNatural:
        """Return the parameters, checked and broadcast."""
        return MatrixGaussianNatural(*map(jnp.asarray, (mean, row_precision, column_precision)))

    def natural_at(self, location: Array, like: PyTree = None) -> MatrixGaussianNatural:
        """Return the member centred at a matrix, with the precisions of `like` (else one)."""
        if like is not None:
            return like._replace(mean=location)
        eyes = (jnp.eye(size, dtype=location.dtype) for size in location.shape[-2:])
        return MatrixGaussianNatural(location, *eyes)

    def standard(self, lam: MatrixGaussianNatural) -> dict[str, Array]:
        return dict(lam._asdict())

    def _log_dets(self, lam: MatrixGaussianNatural) -> Array:
        """log det of the whole precision, p log det P + n log det Q."""
        n, p = lam.mean.shape[-2:]
        return p * _log_det(lam.row_precision) + n * _log_det(lam.column_precision)

    def _squared(self, lam: MatrixGaussianNatural, d: Array) -> Array:
        """tr(P D Q D^T)."""
        return jnp.sum(d * (lam.row_precision @ d @ lam.column_precision), axis=(-2, -1))

    def log_prob(self, lam: MatrixGaussianNatural, theta: Array) -> Array:
        n, p = lam.mean.shape[-2:]
        squared = self._squared(lam, theta - lam.mean)
        return 0.5 * (self._log_dets(lam) - squared - n * p * LOG_2PI)

    def entropy(self, lam: MatrixGaussianNatural) -> Array:
        n, p = lam.mean.shape[-2:]
        return 0.5 * (n * p * (1.0 + LOG_2PI) - self._log_dets(lam))

    def kl(self, lam_p: MatrixGaussianNatural, lam_q: MatrixGaussianNatural) -> Array:
        n, p = lam_p.mean.shape[-2:]
        rows = jnp.trace(_solve(lam_p.row_precision, lam_q.row_precision), axis1=-2, axis2=-1)
        columns = _solve(lam_p.column_precision, lam_q.column_precision)
        traces = rows * jnp.trace(columns, axis1=-2, axis2=-1)
        dets = self._log_dets(lam_p) - self._log_dets(lam_q)
        return 0.5 * (traces - n * p + dets + self._squared(lam_q, lam_p.mean - lam_q.mean))

    def mean(self, lam: MatrixGaussianNatural) -> Array:
        return lam.mean

    def variance(self, lam: MatrixGaussianNatural) -> Array:
        rows, columns = (
            jnp.sum(jnp.square(_inverse_root(s)), axis=-1)
            for s in (lam.row_precision, lam.column_precision)
        )
        return rows[..., :, None] * columns[..., None, :]

    def in_domain(self, lam: MatrixGaussianNatural) -> Bool[Array, ...]:
        inside = POSITIVE.contains(lam.row_precision) & POSITIVE.contains(lam.column_precision)
        return inside & jnp.all(jnp.isfinite(lam.mean), axis=(-2, -1))

    def displace(self, lam: MatrixGaussianNatural, z: Array) -> Array:
        """L_P^{-T} z L_Q^{-1}: a draw's displacement from the mean, for standard normal z."""
        rows, columns = _inverse_root(lam.row_precision), _inverse_root(lam.column_precision)
        return rows @ z @ _transpose(columns)

    def sample(self, key: Array, lam: MatrixGaussianNatural, shape: tuple[int, ...] = ()) -> Array:
        z = jax.random.normal(key, shape + lam.mean.shape, lam.mean.dtype)
        return lam.mean + self.displace(lam, z)

    def noise(
        self, key: Array, lam: MatrixGaussianNatural, samples: int, antithetic: bool = False
    ) -> Float[Array, "samples n p"]:
        return normals(key, (samples, *lam.mean.shape), lam.mean.dtype, antithetic)

    def natural_gradient_at(
        self,
        lam: MatrixGaussianNatural,
        loss: Callable,
        noise: Float[Array, "samples n p"],
        weights: Array,
        curvature: str = "exact",
    ) -> tuple[Array, MatrixGaussianNatural]:
        (_, row, column), (n, p) = lam, lam.mean.shape
        row_root, column_root = _inverse_root(row), _inverse_root(column)
        u, v = row_root @ row_root.T, column_root @ column_root.T

        def look(z: Array) -> tuple[Array, ...]:
            away = row_root @ z @ column_root.T
            theta = lam.mean + away
            value, slope = jax.value_and_grad(loss)(theta)
            if curvature == "exact":
                bent = _contract(loss, theta, u, column_root, column)
            elif curvature == "reparameterized":
                bent = row @ away @ slope.T, column @ away.T @ slope
            else:
                bent = slope @ v @ slope.T, slope.T @ u @ slope
            return value, slope, *bent

        looked = jax.lax.map(look, noise)
        value, slope, h_row, h_column = (jnp.tensordot(weights, x, 1) for x in looked)

        def block(s: Array, cov: Array, h: Array, others: int) -> Array:
            d = 0.5 * (h + h.T) / others - s
            return 0.5 * jnp.sum(cov * d) / s.shape[0] * s - d

        gradient = MatrixGaussianNatural(
            u @ slope @ v, block(row, u, h_row, p), block(column, v, h_column, n)
        )
        return value, gradient

    def move(
        self,
        lam: MatrixGaussianNatural,
        gradient: MatrixGaussianNatural,
        learning_rate: Scalar,
        step: str = "auto",
    ) -> MatrixGaussianNatural:
        d = jax.tree.map(lambda g: -learning_rate * g, gradient)
        row = move_field(POSITIVE, lam.row_precision, d.row_precision, step)
        column = move_field(POSITIVE, lam.column_precision, d.column_precision, step)
        pull = d.mean
        if step != "improved_old":  # U G V with the new U and V
            raw = lam.row_precision @ d.mean @ lam.column_precision
            pull = _transpose(_solve(column, _transpose(_solve(row, raw))))
        # Of P c and Q / c the one with equal average log eigenvalues.
        shared = _log_det(column) / column.shape[-1] - _log_det(row) / row.shape[-1]
        c = jnp.exp(0.5 * shared)
        return MatrixGaussianNatural(lam.mean + pull, c * row, column / c)
