"""Where the loss is looked at: rules sum_k w_k f(m + C z_k) for E_q[f], z standard normal.

    delta          z = 0
    monte_carlo    z drawn, with or without its mirror image -z
    gauss_hermite  tensor product of the one-dimensional rule

Each carries the curvature that it evaluates at those points.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from blr_optax.estimators._curvature import Curvature, Exact, Reparameterized
from blr_optax.estimators._noise import check_generator, standard_normal

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LARGEST_GRID = 2**20


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Delta:
    """One look, at the mean; see `delta`."""

    curvature: Curvature

    def nodes(self, key: Array | None, like: Any) -> tuple[Any, Float[Array, " k"]]:
        """(z, w): a tree with a leading axis of nodes, and their weights."""
        return jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), like), jnp.ones(1)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MonteCarlo:
    """Samples of q; see `monte_carlo`."""

    samples: int
    antithetic: bool
    curvature: Curvature
    generator: str

    def nodes(self, key: Array, like: Any) -> tuple[Any, Float[Array, " k"]]:
        keys = jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(self.samples))
        z = jax.vmap(lambda k: standard_normal(k, like, self.generator))(keys)
        if self.antithetic:
            z = jax.tree.map(lambda x: jnp.concatenate([x, -x]), z)
        count = self.samples * (2 if self.antithetic else 1)
        return z, jnp.full(count, 1.0 / count)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class GaussHermite:
    """Tensor-product quadrature; see `gauss_hermite`."""

    order: int
    curvature: Curvature

    def nodes(self, key: Array | None, like: Any) -> tuple[Any, Float[Array, " k"]]:
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


Estimator = Delta | MonteCarlo | GaussHermite


def hermite_rule(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights with sum_k w_k f(x_k) = E[f(z)], z ~ N(0, 1), exact to degree 2 order - 1.

    The nodes are the eigenvalues of the Jacobi matrix of the Hermite polynomials (Golub and
    Welsch), the weights 1 / sum_k p_k(x)^2 over the orthonormal ones, which keeps the digits of the
    smallest.
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


def delta(curvature: Curvature | None = None) -> Delta:
    """The delta method: E_q[f(theta)] ~ f(m).

    Args:
        curvature: `exact()` by default.

    Raises:
        ValueError: for a curvature made of displacements, which vanish here.

    Source: Khan and Rue (2023), Sec. 1.3; Nickl et al. (2023), Eq. 30. Special case of `blr_update`
    with `estimator=delta()`: online Newton, and Newton at learning rate 1.

    Example:
      >>> import blr_optax as blr
      >>> print(blr.estimators.delta().nodes(None, __import__("jax").numpy.ones(2))[0])
      [[0. 0.]]
    """
    curvature = Exact() if curvature is None else curvature
    if isinstance(curvature, Reparameterized):
        raise ValueError(
            "delta: reparameterized() needs displacements from the mean, which the delta method "
            "does not have. Use exact(), hutchinson() or squared_gradient(...)."
        )
    return Delta(curvature)


def monte_carlo(
    samples: int = 10,
    antithetic: bool = False,
    curvature: Curvature | None = None,
    *,
    generator: str = "threefry",
) -> MonteCarlo:
    """Monte Carlo: E_q[f] ~ mean_s f(m + C z_s), unbiased.

    Args:
        samples: number of draws z_s.
        antithetic: evaluate at -z_s as well, twice the evaluations: exact for odd functions of z,
            and the noise g(m) z / sigma of the reparameterised curvature cancels.
        curvature: `exact()` by default; `reparameterized()` for piecewise linear networks.
        generator: "threefry" or "hash", the fast one for perturbing weights.

    Raises:
        ValueError: for samples < 1 or an unknown generator.

    Source: Khan and Rue (2023); Lin, Khan and Schmidt (2019). Special case of `blr_update` with
    `estimator=monte_carlo(...)`: variational online Newton.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> z, w = blr.estimators.monte_carlo(3, antithetic=True).nodes(
      ...     jax.random.key(0), jnp.ones(2)
      ... )
      >>> print(z.shape, z.sum(), w.sum())
      (6, 2) 0.0 1.0
    """
    if samples < 1:
        raise ValueError(f"monte_carlo: samples={samples} must be at least 1.")
    return MonteCarlo(
        samples, antithetic, Exact() if curvature is None else curvature, check_generator(generator)
    )


def gauss_hermite(order: int = 20, curvature: Curvature | None = None) -> GaussHermite:
    """Gauss-Hermite quadrature: exact for polynomials of degree 2 order - 1 in each coordinate.

    The grid has order^d nodes: for small d. A `glm` term needs one dimension per example only.

    Args:
        order: nodes per coordinate.
        curvature: `exact()` by default.

    Raises:
        ValueError: for order < 1, or a grid of more than a million nodes.

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
    return GaussHermite(order, Exact() if curvature is None else curvature)
