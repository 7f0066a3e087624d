"""The natural gradient grad_mu E_q[l] of a loss under a family: a sum over the loss's terms.

Conjugate and GLM terms know their own; a plain function is the estimator's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blr_optax.estimators._curvature import Reparameterized
from blr_optax.estimators._estimator import Estimator
from blr_optax.estimators._expectation import monte_carlo
from blr_optax.estimators._general import ScoreFunction
from blr_optax.estimators._terms import GLM, Term, terms
from blr_optax.families import Family, MeanField, get

if TYPE_CHECKING:
    from jaxtyping import Array

KNOWN = (
    "delta()",
    "monte_carlo(...)",
    "gauss_hermite(...)",
    "cubature(...)",
    "exact()",
    "reparameterized(...)",
    "score_function(...)",
    "least_squares(...)",
    "enumerate()",
    "concrete(...)",
)


def default_estimator(family: Family) -> Estimator:
    """What a plain function gets when no estimator is named.

    Ten antithetic pairs for Gaussians, ten samples with gradients where the family has them, else
    the score function of a hundred.
    """
    if getattr(family, "curvature", None) is not None:
        return monte_carlo(10, antithetic=True)
    return Reparameterized(10) if family.reparameterized else ScoreFunction(100, "mean")


def natural_gradient(
    family: str | Family, loss: Any, estimator: Estimator | None = None
) -> Callable:
    """The natural gradient of an expected loss: (key, lam, *batch) -> (E_q[l], grad_mu E_q[l]).

    Args:
        family: a registered name or a family. GLM terms need a Gaussian one.
        loss: `loss(theta, *batch)`, a mean loss; or `conjugate(natural)`, `glm(features, loss)`, or
            a sum of these. theta is what the family samples: an array, or the tree of a mean field
            (and `loss(mu, *batch)` for `exact()`).
        estimator: for Gaussians `delta()`, `monte_carlo(...)`, `gauss_hermite(...)` or
            `cubature(...)`; for any family `exact()`, `reparameterized(...)`,
            `score_function(...)`, `least_squares(...)`; for discrete ones `enumerate()` and
            `concrete(...)`. By default ten antithetic pairs for Gaussians, ten samples with
            gradients where the family has them, else the score function of a hundred. Concerns
            plain functions only.

    Returns:
        A pure function of a typed key (None when nothing is drawn), natural parameters and the
        batch. The gradient is of the family's natural type, per example of the mean loss.

    Raises:
        ValueError: for an unknown family, a loss of no known kind, or an estimator that does not
            apply to the family.

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
    family.check_learnable("natural_gradient")
    if family.conditional:
        raise ValueError(
            f"natural_gradient: {type(family).__name__} is a conditional family without a common "
            "mu; use blr_update, or the family's own natural_gradient(key, lam, loss, samples)."
        )
    parts = terms(loss)
    estimator = default_estimator(family) if estimator is None else estimator
    if not isinstance(estimator, Estimator):
        raise ValueError(f"estimator={estimator!r} is unknown; known: {', '.join(KNOWN)}.")
    if any(not isinstance(part, Term) for part in parts):
        estimator.check(family)
    gaussian = getattr(family, "curvature", None) is not None
    if any(isinstance(part, GLM) for part in parts) and not gaussian:
        raise ValueError(
            f"glm: {type(family).__name__} is not Gaussian, so that x . theta is no "
            "one-dimensional Gaussian; write the loss as a plain function."
        )
    # An elementwise family: a loss couples its elements, so it is treated as one mean field.
    lifted = MeanField(family) if family.elementwise else family

    def gradient(key: Array | None, lam: Any, *batch: Any) -> tuple[Array, Any]:
        results = []
        for part in parts:
            if isinstance(part, Term):
                results.append(part.natural_gradient(lifted, lam, batch))
            else:
                results.append(estimator.natural_gradient(lifted, part, key, lam, batch))
        value = sum(value for value, _ in results)
        return value, lifted.combine(*((1.0, g) for _, g in results))

    return gradient
