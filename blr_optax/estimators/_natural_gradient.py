"""The natural gradient grad_mu E_q[l] of a loss under a family, from an estimator.

For Gaussian families (Bonnet and Price), with nodes z_k and weights w_k,

    theta_k = m + C z_k      g = sum_k w_k grad l(theta_k)      H = sum_k w_k curvature_k
    grad_mu E_q[l] = (g - H m, H / 2)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from blr_optax.estimators._curvature import Hutchinson, Sample, SquaredGradient
from blr_optax.estimators._expectation import Estimator, MonteCarlo, monte_carlo
from blr_optax.estimators._terms import Conjugate, Term, terms
from blr_optax.families import Family, MeanField, get

if TYPE_CHECKING:
    from jaxtyping import Array


def default_estimator() -> Estimator:
    """What a plain function gets when no estimator is named: ten antithetic pairs."""
    return monte_carlo(10, antithetic=True)


def _function_gradient(
    family: Any, loss: Callable, estimator: Estimator, key: Array, lam: Any, batch: tuple
) -> tuple[Array, Any]:
    """(E_q[l], grad_mu E_q[l]) of a plain function under a Gaussian family."""
    mean, precision = family.mean(lam), family.precision(lam)
    if key is None and isinstance(estimator, MonteCarlo):
        raise ValueError("natural_gradient: monte_carlo draws samples; pass a typed key, not None.")
    node_key, curvature_key = (None, None) if key is None else (key, jax.random.fold_in(key, 2**31))
    z, w = estimator.nodes(node_key, mean)

    def at(z: Any, index: Array) -> tuple[Array, Any, Any]:
        displacement = family.displace(lam, z)
        theta = jax.tree.map(jnp.add, mean, displacement)
        value, grad = jax.value_and_grad(loss)(theta, *batch)
        if family.curvature == "none":
            return value, grad, None
        probe = None if key is None else jax.random.fold_in(curvature_key, index)
        if family.curvature == "diagonal":
            sample = Sample(
                lambda x: loss(x, *batch), theta, grad, displacement, precision, None, probe
            )
            return value, grad, estimator.curvature.diagonal(sample)
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
        )
        return value, grad, estimator.curvature.matrix(sample)

    # One node at a time: memory of one Hessian, whatever the number of nodes.
    value, g, h = jax.lax.map(lambda node: at(*node), (z, jnp.arange(w.size)))
    average = lambda x: jnp.tensordot(w.astype(x.dtype), x, 1)  # noqa: E731
    g, h = jax.tree.map(average, g), jax.tree.map(average, h)
    return average(value), family.gradient(lam, g, h)


def natural_gradient(
    family: str | Family, loss: Any, estimator: Estimator | None = None
) -> Callable:
    """The natural gradient of an expected loss: (key, lam, *batch) -> (E_q[l], grad_mu E_q[l]).

    Args:
        family: a registered name or a family. Plain functions need a Gaussian one.
        loss: `loss(theta, *batch)`, a mean loss; or `conjugate(natural)`, `glm(features, loss)`, or
            a sum of these. theta is what the family samples: an array, or the tree of a mean field.
        estimator: `delta()`, `monte_carlo(...)`, `gauss_hermite(...)`; ten antithetic pairs by
            default. Concerns plain functions only.

    Returns:
        A pure function of a typed key (None when nothing is drawn), natural parameters and the
        batch. The gradient is of the family's natural type, per example of the mean loss.

    Raises:
        ValueError: for an unknown family, a loss of no known kind, or a plain function under a
            family without an estimator for it.

    Source: Khan and Rue (2023), Eqs. 10-11. `blr_update` is this followed by `natural_step`.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> gradient = blr.estimators.natural_gradient(
      ...     "gaussian", lambda x: jnp.sum(x**2), blr.estimators.gauss_hermite(3)
      ... )
      >>> lam = blr.families.get("gaussian").natural(mean=jnp.ones(2), precision=jnp.eye(2))
      >>> value, g = gradient(None, lam)
      >>> print(value.round(4), g.linear.round(4) + 0.0, g.quadratic.round(4)[0, 0])
      4.0 [0. 0.] 1.0
    """
    family = get(family)
    parts, estimator = terms(loss), default_estimator() if estimator is None else estimator
    if not isinstance(estimator, Estimator):
        raise ValueError(
            f"estimator={estimator!r} is unknown; known: delta(), monte_carlo(...), "
            "gauss_hermite(...)."
        )
    form = getattr(family, "curvature", None)
    sampled = [part for part in parts if not isinstance(part, Conjugate)]
    if sampled and form is None:
        raise ValueError(
            f"{type(family).__name__} is not Gaussian: its loss must be conjugate(natural)."
        )
    if (
        form is not None
        and isinstance(estimator.curvature, SquaredGradient)
        and estimator.curvature.official
    ):
        raise ValueError(
            "squared_gradient(official=True) is scaled by ess, which only ivon and "
            "scale_by_precision know; use squared_gradient(batch_size)."
        )
    if form == "matrix" and isinstance(estimator.curvature, Hutchinson):
        raise ValueError(
            "curvature=hutchinson() estimates a diagonal; a full-covariance gaussian needs "
            "exact() or reparameterized()."
        )
    # `normal` is elementwise: a loss couples its elements, so it is treated as one mean field.
    lifted = (
        MeanField(family) if form == "diagonal" and not isinstance(family, MeanField) else family
    )

    def gradient(key: Array | None, lam: Any, *batch: Any) -> tuple[Array, Any]:
        results = []
        for part in parts:
            if isinstance(part, Term):
                results.append(part.natural_gradient(lifted, lam, batch))
            else:
                results.append(_function_gradient(lifted, part, estimator, key, lam, batch))
        value = sum(value for value, _ in results)
        return value, lifted.combine(*((1.0, g) for _, g in results))

    return gradient
