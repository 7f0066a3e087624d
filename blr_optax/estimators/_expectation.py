"""Where the loss is looked at: rules sum_k w_k f(m + C z_k) for E_q[f], z standard normal.

    delta          z = 0
    monte_carlo    z drawn, with or without its mirror image -z
    gauss_hermite  tensor product of the one-dimensional rule
    cubature       points on spheres, 2 d or about 2 d^2 of them

Each carries the curvature that it evaluates at those points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from blr_optax._random import check_generator, standard_normal
from blr_optax.estimators._curvature import (
    Curvature,
    Exact,
    Hutchinson,
    Reparameterized,
    Sample,
    SquaredGradient,
)
from blr_optax.estimators._estimator import Estimator, check_key, check_samples, others

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax.families import Family

LARGEST_GRID = 2**20


class NodeRule(Estimator):
    """Base of the rules that look at the loss at m + C z_k: for Gaussian families.

    With g = sum_k w_k grad l(theta_k) and H = sum_k w_k curvature_k, Bonnet's and Price's theorems
    give grad_mu E_q[l] = (g - H m, H / 2).
    """

    curvature: Curvature

    def nodes(self, key: Array | None, like: Any) -> tuple[Any, Float[Array, " k"]]:
        """(z, w): a tree with a leading axis of nodes, and their weights."""
        raise NotImplementedError

    def check(self, family: Family) -> None:
        form = getattr(family, "curvature", None)
        if form is None:
            raise ValueError(
                f"{type(self).__name__} is for Gaussian families; {type(family).__name__} takes "
                f"{others(family)}."
            )
        if isinstance(self.curvature, SquaredGradient) and self.curvature.official:
            raise ValueError(
                "squared_gradient(official=True) is scaled by ess, which only ivon and "
                "scale_by_precision know; use squared_gradient(batch_size)."
            )
        if isinstance(self.curvature, Hutchinson) and form == "matrix":
            raise ValueError(
                "curvature=hutchinson() estimates a diagonal; a full-covariance gaussian needs "
                "exact() or reparameterized()."
            )

    def natural_gradient(
        self, family: Any, loss: Callable, key: Array | None, lam: Any, batch: tuple
    ) -> tuple[Array, Any]:
        """(E_q[l], (g - H m, H / 2))."""
        mean, precision = family.mean(lam), family.precision(lam)
        if family.curvature == "matrix" and jnp.ndim(precision) > 2:
            raise ValueError(
                f"{type(self).__name__} looks at one gaussian; got a batch of them, lambda with "
                f"precisions {jnp.shape(precision)}. Use jax.vmap where their losses are apart, "
                f"else {others(family)}."
            )
        node_key, curvature_key = (
            (None, None) if key is None else (key, jax.random.fold_in(key, 2**31))
        )
        z, w = self.nodes(node_key, mean)

        def at(z: Any, index: Array) -> tuple[Array, Any, Any]:
            displacement = family.displace(lam, z)
            theta = jax.tree.map(jnp.add, mean, displacement)
            value, grad = jax.value_and_grad(loss)(theta, *batch)
            if family.curvature == "none":
                return value, grad, None
            probe = None if key is None else jax.random.fold_in(curvature_key, index)
            if family.curvature == "diagonal":
                sample = Sample(
                    lambda x: loss(x, *batch), theta, grad, displacement, precision, None, probe,
                    loss, batch,
                )  # fmt: skip
                return value, grad, self.curvature.diagonal(sample)
            theta, unravel = jax.flatten_util.ravel_pytree(theta)
            grad_flat, displacement = (
                jax.flatten_util.ravel_pytree(x)[0] for x in (grad, displacement)
            )
            sample = Sample(
                lambda x: loss(unravel(x), *batch),
                theta,
                grad_flat,
                displacement,
                precision,
                None,
                probe,
                lambda x, *b: loss(unravel(x), *b),
                batch,
            )
            return value, grad, self.curvature.matrix(sample)

        # One node at a time: memory of one Hessian, whatever the number of nodes.
        value, g, h = jax.lax.map(lambda node: at(*node), (z, jnp.arange(w.size)))
        average = lambda x: jnp.tensordot(w.astype(x.dtype), x, 1)  # noqa: E731
        g, h = jax.tree.map(average, g), jax.tree.map(average, h)
        return average(value), family.gradient(lam, g, h)


@dataclasses.dataclass(frozen=True)
class Delta(NodeRule):
    """One look, at the mean; see `delta`."""

    curvature: Curvature

    def nodes(self, key: Array | None, like: Any) -> tuple[Any, Float[Array, " k"]]:
        return jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), like), jnp.ones(1)


@dataclasses.dataclass(frozen=True)
class MonteCarlo(NodeRule):
    """Samples of q; see `monte_carlo`."""

    samples: int
    antithetic: bool
    curvature: Curvature
    generator: str

    def nodes(self, key: Array, like: Any) -> tuple[Any, Float[Array, " k"]]:
        key = check_key("monte_carlo", key)
        keys = jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(self.samples))
        z = jax.vmap(lambda k: standard_normal(k, like, self.generator))(keys)
        if self.antithetic:
            z = jax.tree.map(lambda x: jnp.concatenate([x, -x]), z)
        count = self.samples * (2 if self.antithetic else 1)
        return z, jnp.full(count, 1.0 / count)


@dataclasses.dataclass(frozen=True)
class GaussHermite(NodeRule):
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


@dataclasses.dataclass(frozen=True)
class Cubature(NodeRule):
    """Points on spheres; see `cubature`."""

    degree: int
    curvature: Curvature

    def nodes(self, key: Array | None, like: Any) -> tuple[Any, Float[Array, " k"]]:
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
    return MonteCarlo(
        check_samples("monte_carlo", samples),
        antithetic,
        Exact() if curvature is None else curvature,
        check_generator(generator),
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


def cubature(degree: int = 5, curvature: Curvature | None = None) -> Cubature:
    """Cubature for Gaussians: exact for polynomials of total degree 3 or 5, cheap in d dimensions.

    E[f(z)] = sum_k w_k f(z_k) with 2 d points (degree 3) or 2 d^2 + 1 (degree 5); gauss_hermite's
    grid has order^d. Beyond that degree the error is that of the loss's Taylor remainder; above
    four dimensions the degree-5 rule has negative weights.

    Args:
        degree: 3 or 5.
        curvature: `exact()` by default.

    Raises:
        ValueError: for another degree.

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
    return Cubature(degree, Exact() if curvature is None else curvature)
