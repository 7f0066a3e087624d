"""Where the loss is evaluated: rules sum_k w_k f(m + C z_k) for E_q[f], z standard normal.

    delta          z = 0
    monte_carlo    z drawn, with or without its mirror image -z

and the rules of `_quadrature`. Each carries the curvature that it evaluates at those points.
Conditional families, which have noise of their own, take these two, and mixtures

    shared_draws   draws of q, each counted for every component
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from blr_optax._random import check_generator, standard_normal
from blr_optax._validate import unwritten
from blr_optax.estimators._curvature import (
    Curvature,
    Reparameterized,
    Sample,
    SquaredGradient,
    from_name,
)
from blr_optax.estimators._estimator import Estimator, check_key, check_samples, others

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax._typing import NaturalParameters, PyTree
    from blr_optax.families import ConditionalFamily, ExponentialFamily


def check_blocks(family: ConditionalFamily, curvature: Curvature) -> None:
    """Raise ValueError for a curvature that a conditional family does not evaluate."""
    who, known = type(family).__name__, family.curvatures
    if curvature.name not in known:
        raise ValueError(f"curvature={curvature.name}(): {who} knows {', '.join(known)}.")
    if isinstance(curvature, SquaredGradient) and curvature != SquaredGradient(1, official=False):
        raise ValueError(
            f"curvature={curvature}: the loss of {who} is the total potential, whose gradient is "
            "squared as it is; use squared_gradient(1)."
        )


class NodeRule(Estimator):
    """Base of the rules that evaluate the loss at m + C z_k: for Gaussian families.

    With g = sum_k w_k grad l(theta_k) and H = sum_k w_k curvature_k, Bonnet's and Price's theorems
    give grad_mu E_q[l] = (g - H m, H / 2).
    """

    curvature: Curvature

    def nodes(self, key: Array | None, like: PyTree) -> tuple[PyTree, Float[Array, " k"]]:
        """(z, w): a tree with a leading axis of nodes, and their weights."""
        raise unwritten(self, "nodes(self, key, like)", "your_own_estimator")

    def check(self, family: ExponentialFamily) -> None:
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
        if form == "matrix" and self.curvature.diagonal_only:
            raise ValueError(
                f"curvature={self.curvature.name}() estimates a diagonal; a full-covariance "
                "gaussian needs exact() or reparameterized()."
            )

    def natural_gradient(
        self,
        family: Any,
        loss: Callable,
        key: Array | None,
        lam: NaturalParameters,
        batch: tuple,
    ) -> tuple[Array, NaturalParameters]:
        """(E_q[l], (g - H m, H / 2))."""
        mean, precision = family.mean(lam), family.precision(lam)
        if family.curvature == "matrix" and jnp.ndim(precision) > 2:
            raise ValueError(
                f"{type(self).__name__} evaluates around one gaussian; got a batch of them, "
                f"lambda with precisions {jnp.shape(precision)}. Use jax.vmap where their losses "
                f"are apart, else {others(family)}."
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
            probe = None if curvature_key is None else jax.random.fold_in(curvature_key, index)
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


class NoiseRule(NodeRule):
    """Base of the rules that conditional families take too, turning their own noise into draws."""

    def noise(self, family: ConditionalFamily, key: Array | None, lam: NaturalParameters) -> PyTree:
        """Return the noise for `natural_gradient_at`, with a leading axis of samples."""
        raise unwritten(self, "noise(self, family, key, lam)", "your_own_estimator")

    def check_conditional(self, family: ConditionalFamily) -> None:
        check_blocks(family, self.curvature)

    def block_gradient(
        self,
        family: ConditionalFamily,
        potential: Callable,
        key: Array | None,
        lam: NaturalParameters,
        points: PyTree,
    ) -> tuple[Array, PyTree]:
        noise = self.noise(family, key, lam)
        leaf = jax.tree.leaves(noise)[0]
        weights = jnp.full(leaf.shape[0], 1.0 / leaf.shape[0], leaf.dtype)
        return family.natural_gradient_at(lam, potential, noise, weights, self.curvature.name)


@dataclasses.dataclass(frozen=True)
class Delta(NoiseRule):
    """One evaluation, at the mean; see `delta`."""

    curvature: Curvature

    def check_conditional(self, family: ConditionalFamily) -> None:
        super().check_conditional(family)
        if not family.at_means:
            raise ValueError(
                f"estimator=delta(): the delta method never looks away from the mean, which says "
                f"nothing about the shape of {type(family).__name__}; use monte_carlo(...)."
            )

    def noise(self, family: ConditionalFamily, key: Array | None, lam: NaturalParameters) -> PyTree:
        like = jax.eval_shape(lambda: family.noise(jax.random.key(0), lam, 1))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def nodes(self, key: Array | None, like: PyTree) -> tuple[PyTree, Float[Array, " k"]]:
        return jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), like), jnp.ones(1)


@dataclasses.dataclass(frozen=True)
class MonteCarlo(NoiseRule):
    """Samples of q; see `monte_carlo`."""

    samples: int
    antithetic: bool
    curvature: Curvature
    generator: str

    def check_conditional(self, family: ConditionalFamily) -> None:
        super().check_conditional(family)
        if self.generator != "jax":
            raise ValueError(
                f"monte_carlo: generator={self.generator!r} is for Gaussian families; "
                f"{type(family).__name__} draws with 'jax'."
            )

    def noise(self, family: ConditionalFamily, key: Array | None, lam: NaturalParameters) -> PyTree:
        return family.noise(check_key("monte_carlo", key), lam, self.samples, self.antithetic)

    def nodes(self, key: Array | None, like: PyTree) -> tuple[PyTree, Float[Array, " k"]]:
        key = check_key("monte_carlo", key)
        keys = jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(self.samples))
        z = jax.vmap(lambda k: standard_normal(k, like, self.generator))(keys)
        if self.antithetic:
            z = jax.tree.map(lambda x: jnp.concatenate([x, -x]), z)
        count = self.samples * (2 if self.antithetic else 1)
        return z, jnp.full(count, 1.0 / count)


@dataclasses.dataclass(frozen=True)
class SharedDraws(Estimator):
    """Draws of a mixture, each counted for every component; see `shared_draws`."""

    samples: int
    curvature: Curvature
    takes_points = True

    def check(self, family: ExponentialFamily) -> None:
        raise ValueError(
            f"shared_draws: {type(family).__name__} has no components to share draws; use "
            "monte_carlo(...)."
        )

    def check_conditional(self, family: ConditionalFamily) -> None:
        if not family.shares_draws:
            self.check(family)
        check_blocks(family, self.curvature)

    def block_gradient(
        self,
        family: Any,
        potential: Callable,
        key: Array | None,
        lam: NaturalParameters,
        points: PyTree,
    ) -> tuple[Array, PyTree]:
        if points is None:
            points = family.sample(check_key("shared_draws", key), lam, (self.samples,))
        return family.natural_gradient_from(lam, potential, points, self.curvature.name)


def delta(curvature: str | Curvature = "exact") -> Delta:
    """Return the delta method: E_q[f(theta)] ~ f(m); for a mixture at the mean of every component.

    Args:
        curvature: a name or an object.

    Raises:
        ValueError: for an unknown curvature, or one made of displacements, which vanish here.

    Source: Khan and Rue (2023), Sec. 1.3; Nickl et al. (2023), Eq. 30. Special case of `blr_update`
    with `estimator=delta()`: online Newton, and Newton at learning rate 1.

    Example:
      >>> import blr_optax as blr
      >>> print(blr.estimators.delta().nodes(None, __import__("jax").numpy.ones(2))[0])
      [[0. 0.]]
    """
    rule = from_name(curvature)
    if isinstance(rule, Reparameterized):
        raise ValueError(
            "delta: reparameterized() needs displacements from the mean, which the delta method "
            "does not have. Use exact(), hutchinson() or squared_gradient(...)."
        )
    return Delta(rule)


def monte_carlo(
    samples: int = 10,
    antithetic: bool = False,
    curvature: str | Curvature = "exact",
    *,
    generator: str = "jax",
) -> MonteCarlo:
    """Monte Carlo: E_q[f] ~ mean_s f(m + C z_s), unbiased.

    Args:
        samples: number of draws z_s; for a mixture of every component.
        antithetic: evaluate at -z_s as well, twice the evaluations: exact for odd functions of z,
            and the noise g(m) z / sigma of the reparameterised curvature cancels.
        curvature: a name or an object; "reparameterized" for piecewise linear networks.
        generator: "jax" or "hash", the fast one for perturbing weights.

    Raises:
        ValueError: for samples < 1, an unknown curvature or an unknown generator.

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
        from_name(curvature),
        check_generator(generator),
    )


def shared_draws(samples: int = 10, curvature: str | Curvature = "exact") -> SharedDraws:
    """Draws of a mixture itself, each counted for every component: E_k[f] ~ mean_s r_ks f(theta_s).

    r_ks = N_k(theta_s) / q(theta_s): unbiased, at a variance that grows like 1 / pi_k, while
    `monte_carlo` draws from every component. Recorded draws may stand for the estimator's own,
    `update(..., points=theta)`.

    Args:
        samples: number of draws of the mixture.
        curvature: "exact" or "reparameterized", or the object.

    Raises:
        ValueError: for samples < 1, an unknown curvature, or a family without components.

    Source: Lin, Schmidt and Khan (2020). Special case of `blr_update` with family "mixture" and
    `estimator=shared_draws(...)`.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> mixture = blr.families.get("mixture")
      >>> gradient = blr.estimators.natural_gradient(
      ...     mixture, lambda x: jnp.sum(3.0 * x), blr.estimators.shared_draws(1)
      ... )
      >>> lam = mixture.natural(
      ...     weights=jnp.ones(2) / 2,
      ...     mean=jnp.array([[-1.0], [1.0]]),
      ...     precision=jnp.ones((2, 1, 1)),
      ... )
      >>> value, g = gradient(None, lam, points=jnp.array([[0.5], [1.5]]))
      >>> print(value, g.log_odds.shape)
      3.0 (1,)
    """
    return SharedDraws(check_samples("shared_draws", samples), from_name(curvature))
