"""Rules without chance for E_q[f] ~ sum_k w_k f(m + C z_k), z standard normal.

gauss_hermite  tensor product of the one-dimensional rule
cubature       points on spheres, 2 d or about 2 d^2 of them
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from blr_optax.estimators._curvature import Curvature, from_name
from blr_optax.estimators._expectation import NodeRule

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax._typing import PyTree

LARGEST_GRID = 2**20


@dataclasses.dataclass(frozen=True)
class GaussHermite(NodeRule):
    """Tensor-product quadrature; see `gauss_hermite`."""

    order: int
    curvature: Curvature

    def nodes(self, key: Array | None, like: PyTree) -> tuple[PyTree, Float[Array, " k"]]:
        flat, unravel = jax.flatten_util.ravel_pytree(like)
        if self.order**flat.size > LARGEST_GRID:
            raise ValueError(
                f"gauss_hermite: order={self.order} in {flat.size} dimensions makes "
                f"{self.order}**{flat.size} nodes. Use monte_carlo, or a glm term, whose "
                "quadrature is one-dimensional."
            )
        x, w = hermite_rule(self.order)
        grid = np.stack(np.meshgrid(*[x] * flat.size, indexing="ij"), -1).reshape(-1, flat.size)
        weights = np.prod(np.stack(np.meshgrid(*[w] * flat.size, indexing="ij"), -1), -1).reshape(
            -1
        )
        return jax.vmap(unravel)(jnp.asarray(grid, flat.dtype)), jnp.asarray(weights, flat.dtype)


@dataclasses.dataclass(frozen=True)
class Cubature(NodeRule):
    """Points on spheres; see `cubature`."""

    degree: int
    curvature: Curvature

    def nodes(self, key: Array | None, like: PyTree) -> tuple[PyTree, Float[Array, " k"]]:
        flat, unravel = jax.flatten_util.ravel_pytree(like)
        z, w = cubature_rule(flat.size, self.degree)
        return jax.vmap(unravel)(jnp.asarray(z, flat.dtype)), jnp.asarray(w, flat.dtype)


def cubature_rule(d: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for a standard normal in d dimensions, exact to degree 3 or 5.

    Degree 3: +-sqrt(d) e_i. Degree 5 adds the centre and (+-e_i +- e_j) sqrt((d + 2) / 2).
    """
    axes = np.concatenate([np.eye(d), -np.eye(d)])
    if degree == 3:
        return np.sqrt(d) * axes, np.full(2 * d, 0.5 / d)
    pairs = [
        a * np.eye(d)[i] + b * np.eye(d)[j]
        for i in range(d) for j in range(i) for a in (1, -1) for b in (1, -1)
    ]  # fmt: skip
    z = [np.zeros((1, d)), np.sqrt(d + 2) * axes]
    w = [[2 / (d + 2)], np.full(2 * d, 0.5 * (4 - d) / (d + 2) ** 2)]
    if pairs:
        z.append(np.sqrt(0.5 * (d + 2)) * np.array(pairs))
        w.append(np.full(len(pairs), 1.0 / (d + 2) ** 2))
    return np.concatenate(z), np.concatenate(w)


def hermite_rule(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights with sum_k w_k f(x_k) = E[f(z)], z ~ N(0, 1), exact to degree 2 order - 1.

    The nodes are the eigenvalues of the Jacobi matrix of the Hermite polynomials (Golub and
    Welsch), the weights 1 / sum_k p_k(x)^2 over the orthonormal ones, which keeps the digits of the
    smallest. Any order will do, where `numpy.polynomial.hermite_e.hermegauss` overflows near 370.
    """
    off = np.sqrt(np.arange(1, order))
    x = np.linalg.eigvalsh(np.diag(off, 1) + np.diag(off, -1))
    x = 0.5 * (x - x[::-1])  # exactly symmetric
    with np.errstate(over="ignore", invalid="ignore"):
        before, p = np.zeros_like(x), np.ones_like(x)
        total = p * p
        for k in range(order - 1):
            before, p = p, (x * p - np.sqrt(k) * before) / np.sqrt(k + 1)
            total += p * p
        w = np.nan_to_num(1.0 / total, nan=0.0)  # beyond 1e-308 a weight is zero
    return x, w / w.sum()


def gauss_hermite(order: int = 20, curvature: str | Curvature = "exact") -> GaussHermite:
    """Gauss-Hermite quadrature: exact for polynomials of degree 2 order - 1 in each coordinate.

    The grid has order^d nodes: for small d. A `glm` term needs one dimension per example only.

    Args:
        order: nodes per coordinate.
        curvature: a name or an object.

    Raises:
        ValueError: for order < 1, an unknown curvature, or a grid of more than a million nodes.

    Source: Golub and Welsch (1969). Special case of `blr_update` with
    `estimator=gauss_hermite(order)`: the variational Newton step with exact expectations.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> z, w = blr.estimators.gauss_hermite(5).nodes(None, jnp.ones(1))
      >>> print((w * z[:, 0] ** 4).sum().round(5))
      3.0
    """
    if order < 1:
        raise ValueError(f"gauss_hermite: order={order} must be at least 1.")
    return GaussHermite(order, from_name(curvature))


def cubature(degree: int = 5, curvature: str | Curvature = "exact") -> Cubature:
    """Cubature for Gaussians: exact for polynomials of total degree 3 or 5, cheap in d dimensions.

    E[f(z)] = sum_k w_k f(z_k) with 2 d points (degree 3) or 2 d^2 + 1 (degree 5); gauss_hermite's
    grid has order^d. Beyond that degree the error is that of the loss's Taylor remainder; above
    four dimensions the degree-5 rule has negative weights.

    Args:
        degree: 3 or 5.
        curvature: a name or an object.

    Raises:
        ValueError: for another degree, or an unknown curvature.

    Source: McNamee and Stenger (1967); Arasaratnam and Haykin (2009). Special case of `blr_update`
    with `estimator=cubature(degree)`: the variational Newton step of the cubature Kalman filter.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> z, w = blr.estimators.cubature(5).nodes(None, jnp.ones(3))
      >>> print(z.shape, (w * z[:, 0] ** 2 * z[:, 1] ** 2).sum().round(5))
      (19, 3) 1.0
    """
    if degree not in (3, 5):
        raise ValueError(f"cubature: degree={degree} must be 3 or 5.")
    return Cubature(degree, from_name(curvature))
