"""Which curvature stands for E_q[hess l], the second half of a Gaussian natural gradient.

    l      mean loss                     d = theta - m    displacement of a sample
    g      grad l(theta)                 S                total precision (not per example)

Each rule gives a matrix for `gaussian` and a diagonal for elementwise families, per example of
the mean loss. `reparameterized` and `squared_gradient` need no more than the gradient. Conditional
families evaluate the rule themselves, and know it by its name.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp

from blr_optax._validate import check_count, unwritten

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import PyTree, Updates


class Sample(NamedTuple):
    """Where and what the loss was at one sample (trees, or flat vectors for `gaussian`).

    `mean_loss` and `batch` give `loss(theta) = mean_loss(theta, *batch)`; None where a curvature
    takes the gradient alone, as is a key that it does not need.
    """

    loss: Any
    theta: PyTree
    grad: Updates
    displacement: PyTree
    precision: PyTree
    ess: Array | None
    key: Any
    mean_loss: Any = None
    batch: tuple = ()


class Curvature:
    """Base of all curvatures; subclasses are frozen dataclasses and static pytree nodes.

    Attributes:
        name: by which every function that takes a curvature knows it, and conditional families.
        needs_loss: whether the gradient alone is not enough.
        diagonal_only: whether there is no matrix.
        order: k, where the curvature grows with the k-th power of the gradient.
    """

    name: ClassVar[str]
    needs_loss: ClassVar[bool]
    diagonal_only: ClassVar[bool] = False
    order: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Curvatures are closed over and compared, never traced."""
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_static(cls)

    def diagonal(self, at: Sample) -> PyTree:
        """Return the diagonal at one sample, a tree like theta."""
        raise unwritten(self, "diagonal(self, at)", "your_own_estimator")

    def matrix(self, at: Sample) -> Array:
        """Return the matrix at one sample."""
        raise unwritten(self, "matrix(self, at)", "your_own_estimator")


@dataclasses.dataclass(frozen=True)
class Exact(Curvature):
    """hess l(theta); see `exact`."""

    name = "exact"
    needs_loss = True

    def matrix(self, at: Sample) -> Array:
        """Return the Hessian of a loss of one vector."""
        return jax.hessian(at.loss)(at.theta)

    def diagonal(self, at: Sample) -> PyTree:
        """Its diagonal, one Hessian-vector product per coordinate."""
        flat, unravel = jax.flatten_util.ravel_pytree(at.theta)
        gradient = jax.grad(lambda x: at.loss(unravel(x)))

        def entry(j: Array) -> Array:
            e = jnp.zeros_like(flat).at[j].set(1.0)
            return jax.jvp(gradient, (flat,), (e,))[1][j]

        return unravel(jax.lax.map(entry, jnp.arange(flat.size)))


@dataclasses.dataclass(frozen=True)
class Reparameterized(Curvature):
    """S d g^T, symmetrised, or S d g elementwise; see `reparameterized`."""

    name = "reparameterized"
    needs_loss = False

    def matrix(self, at: Sample) -> Array:
        product = jnp.outer(at.precision @ at.displacement, at.grad)
        return 0.5 * (product + product.T)

    def diagonal(self, at: Sample) -> PyTree:
        return jax.tree.map(lambda s, d, g: s * d * g, at.precision, at.displacement, at.grad)


@dataclasses.dataclass(frozen=True)
class SquaredGradient(Curvature):
    """c g g^T, or c g^2 elementwise; see `squared_gradient`."""

    batch_size: int | None
    official: bool

    name = "squared_gradient"
    needs_loss = False
    order = 2

    def scale(self, at: Sample) -> PyTree:
        """c: the batch size, or the official code's effective sample size."""
        return at.ess if self.official else self.batch_size

    def matrix(self, at: Sample) -> Array:
        return self.scale(at) * jnp.outer(at.grad, at.grad)

    def diagonal(self, at: Sample) -> PyTree:
        c = self.scale(at)
        return jax.tree.map(lambda g: c * g * g, at.grad)


@dataclasses.dataclass(frozen=True)
class AbsoluteGradient(Curvature):
    """sqrt(p) |g|, p the precision per example; see `absolute_gradient`."""

    name = "absolute_gradient"
    needs_loss = False
    diagonal_only = True

    def diagonal(self, at: Sample) -> PyTree:
        ess = jnp.asarray(1.0 if at.ess is None else at.ess)
        return jax.tree.map(
            lambda s, g: jnp.sqrt(s / ess.astype(s.dtype)) * jnp.abs(g), at.precision, at.grad
        )


@dataclasses.dataclass(frozen=True)
class Hutchinson(Curvature):
    """E_v[v (hess l v)] over Rademacher v; see `hutchinson`."""

    samples: int
    name = "hutchinson"
    needs_loss = True
    diagonal_only = True

    def diagonal(self, at: Sample) -> PyTree:
        flat, unravel = jax.flatten_util.ravel_pytree(at.theta)
        gradient = jax.grad(lambda x: at.loss(unravel(x)))

        def probe(key: Array) -> Array:
            v = jax.random.rademacher(key, flat.shape, flat.dtype)
            return v * jax.jvp(gradient, (flat,), (v,))[1]

        keys = jax.random.split(at.key, self.samples)
        return unravel(jnp.mean(jax.vmap(probe)(keys), axis=0))


@dataclasses.dataclass(frozen=True)
class PerExampleSquares(Curvature):
    """mean_i g_i g_i^T, or mean_i g_i^2 elementwise; see `per_example_squares`."""

    name = "per_example_squares"
    needs_loss = True
    order = 2

    def matrix(self, at: Sample) -> Array:
        """Plain per-example gradients: the matrix has no shortcut."""
        from blr_optax.per_example._separable import batch_size, checked  # with all layer taps

        batch = self._batch(at)
        batch_size("per_example_squares", batch)
        checked("per_example_squares", at.mean_loss, at.theta, batch)
        examples = jax.tree.map(lambda x: jnp.expand_dims(x, 1), batch)
        g = jax.vmap(jax.grad(lambda w, b: at.mean_loss(w, *b)), (None, 0))(at.theta, examples)
        return g.T @ g / g.shape[0]

    def diagonal(self, at: Sample) -> PyTree:
        from blr_optax.per_example._separable import batch_size
        from blr_optax.per_example._statistics import per_example

        batch = self._batch(at)
        size = batch_size("per_example_squares", batch)
        squares = per_example(lambda w, b: at.mean_loss(w, *b), at.theta, batch).sum_squares
        return jax.tree.map(lambda x: x / size, squares)

    def _batch(self, at: Sample) -> tuple:
        if at.mean_loss is None:
            raise ValueError(
                "per_example_squares: one gradient does not hold those of its examples. Take both "
                "from est = blr.estimate(loss, opt_state, params, *batch), then "
                "tx.update(est.grad, opt_state, params, statistic=est.statistic)."
            )
        return at.batch


def exact() -> Exact:
    """Return the Hessian itself: H = hess l(theta), its diagonal for elementwise families.

    Right for twice differentiable losses, not for piecewise linear networks. The diagonal costs one
    Hessian-vector product per coordinate.

    Source: Khan and Rue (2023), the Newton rows. Special case of `blr_update` with
    `estimator=delta(exact())` at learning rate 1: Newton's method.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> rule = blr.estimators.natural_gradient(
      ...     "gaussian", lambda x: 3.0 * x[0] ** 2, blr.estimators.delta()
      ... )
      >>> lam = blr.families.get("gaussian").natural(mean=jnp.ones(1), precision=jnp.eye(1))
      >>> print(rule(None, lam)[1].quadratic)
      [[3.]]
    """
    return Exact()


def reparameterized() -> Reparameterized:
    """Price's first-order form: H = E[S d g^T], unbiased for E_q[hess l] from gradients alone.

    Holds for piecewise linear networks too. Its noise grows like sqrt(S); pairs of samples
    (`antithetic=True`) cancel the dominant term.

    Source: Lin, Khan and Schmidt (2019), Stein's lemma; IVON (Shen et al. 2024), line 3 of Alg. 1.
    Special case of `blr_update` with `estimator=monte_carlo(1, curvature=reparameterized())`: SOBA.

    Example:
      >>> import blr_optax as blr
      >>> print(blr.estimators.reparameterized().needs_loss)
      False
    """
    return Reparameterized()


def squared_gradient(batch_size: int | None = None, *, official: bool = False) -> SquaredGradient:
    """Squares of the mini-batch gradient: H = B g^2, per example.

    The mean gradient of B independent examples near an optimum has E[g^2] = E[g_i^2] / B, so B g^2
    estimates the Gauss-Newton (Fisher) diagonal of the mean loss; far from it, it is biased
    upwards.

    Args:
        batch_size: B, the examples of one gradient evaluation (of a micro-batch, if those are
            used).
        official: scale by the effective sample size instead, as the ivon-opt package does with
            `hess_approx="gradsq"`; too large by about ess / B, kept for parity.

    Raises:
        ValueError: unless exactly one of the two scales is chosen.

    Source: Khan et al. (2018), Vadam. Special case of `blr_update` with
    `estimator=monte_carlo(1, curvature=squared_gradient(B))`.

    Example:
      >>> import blr_optax as blr
      >>> print(blr.estimators.squared_gradient(32).batch_size)
      32
    """
    if (batch_size is None) == (not official):
        raise ValueError(
            "squared_gradient: give batch_size=, the examples of one gradient, or official=True "
            f"(scaled by ess); got batch_size={batch_size}, official={official}."
        )
    if batch_size is not None:
        check_count("squared_gradient: batch_size", batch_size)
    return SquaredGradient(batch_size, official)


def absolute_gradient() -> AbsoluteGradient:
    """Sizes of the gradient: H = sqrt(p) |g|, per example, p the posterior's precision per example.

    Never negative; the fixed point is p = (E|g|)^2. Diagonal families only, in `blr_update` at ess
    = 1, the loss being that of all examples.

    Source: Moellenhoff and Khan (2023), Eq. 13. Special case of `blr_update` with
    `estimator=monte_carlo(1, curvature=absolute_gradient())`: bSAM without its adversary.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> rule = blr.estimators.natural_gradient(
      ...     "gaussian_diagonal",
      ...     lambda w: 3.0 * jnp.sum(w),
      ...     blr.estimators.delta(blr.estimators.absolute_gradient()),
      ... )
      >>> lam = blr.families.get("gaussian_diagonal").natural(mean=jnp.ones(1), precision=4.0)
      >>> print(rule(None, lam)[1].quadratic)  # sqrt(4) 3 / 2
      [3.]
    """
    return AbsoluteGradient()


def hutchinson(samples: int = 1) -> Hutchinson:
    """Hutchinson's estimate of the Hessian diagonal: mean of v (H v) over Rademacher v.

    Unbiased for twice differentiable losses, a Hessian-vector product each; diagonal families only.

    Raises:
        ValueError: for samples < 1.

    Source: Hutchinson (1989); Yao et al. (2021), AdaHessian. Special case of `blr_update` with
    `estimator=monte_carlo(1, curvature=hutchinson())`.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> rule = blr.estimators.natural_gradient(
      ...     "gaussian_diagonal",
      ...     lambda x: x @ x,
      ...     blr.estimators.delta(blr.estimators.hutchinson()),
      ... )
      >>> lam = blr.families.get("gaussian_diagonal").natural(mean=jnp.ones(2), precision=1.0)
      >>> print(rule(jax.random.key(0), lam)[1].quadratic)
      [1. 1.]
    """
    if samples < 1:
        raise ValueError(f"hutchinson: samples={samples} must be at least 1.")
    return Hutchinson(samples)


def per_example_squares() -> PerExampleSquares:
    """Squares of per-example gradients: H = mean_i g_i g_i^T, its diagonal for diagonal families.

    Never negative, so the precision stays positive with the plain step. For a negative
    log-likelihood at the right parameters it estimates the Gauss-Newton (Fisher) matrix without
    bias, whatever the batch size, which squares of the mean gradient do not. The diagonal costs one
    more matrix product per layer (`per_example`), the matrix a gradient for every example. With
    weighted or padded rows take `found = per_example(loss, theta, *batch, weights=c)` at the sample
    theta, and pass `found.grad` and `found.sum_squares / sum(c)` to `update`.

    Source: Khan et al. (2018), VOGN; Osawa et al. (2019). Special case of `blr_update` with
    `estimator=monte_carlo(1, curvature=per_example_squares())`: VOGN; with `delta`: OGN.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> rule = blr.estimators.natural_gradient(
      ...     "gaussian_diagonal",
      ...     lambda w, x: jnp.mean(x @ w),
      ...     blr.estimators.delta(blr.estimators.per_example_squares()),
      ... )
      >>> lam = blr.families.get("gaussian_diagonal").natural(mean=jnp.ones(1), precision=1.0)
      >>> print(rule(None, lam, jnp.array([[1.0], [3.0]]))[1].quadratic)  # (1 + 9) / 2 / 2
      [2.5]
    """
    return PerExampleSquares()


MAKERS = {
    make.__name__: make
    for make in (
        exact,
        reparameterized,
        squared_gradient,
        absolute_gradient,
        hutchinson,
        per_example_squares,
    )
}


def from_name(curvature: str | Curvature) -> Curvature:
    """Return a curvature, by its name or as it is.

    Raises:
        ValueError: for an unknown name, or one that says too little: 'squared_gradient' needs a
            batch size, squared_gradient(batch_size).
    """
    if isinstance(curvature, Curvature):
        return curvature
    if not isinstance(curvature, str) or curvature not in MAKERS:
        raise ValueError(
            f"curvature={curvature!r} is unknown; known: {', '.join(MAKERS)}, by name or made by "
            "the function of that name in estimators."
        )
    return MAKERS[curvature]()


def from_gradient(curvature: str | Curvature) -> Curvature:
    """Return a curvature that the gradient alone gives, by name or as it is.

    Raises:
        ValueError: for an unknown name, or a curvature that needs the loss.
    """
    rule = from_name(curvature)
    if rule.needs_loss and not isinstance(rule, PerExampleSquares):
        raise ValueError(
            f"curvature={rule.name}() needs the loss, which this transformation never sees. Use "
            "'reparameterized' or squared_gradient(...); another one's values can be given to "
            "update(..., statistic=)."
        )
    return rule
