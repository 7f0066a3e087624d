"""The natural gradient grad_mu E_q[l] of a loss under a family: a sum over the loss's terms.

Conjugate and GLM terms know their own; a plain function is the estimator's business. A conditional
family takes one plain function, its total potential.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blr_optax import _loops
from blr_optax._random import canonical_key
from blr_optax._validate import scalar_loss
from blr_optax.estimators._curvature import Curvature
from blr_optax.estimators._estimator import Estimator, check_points
from blr_optax.estimators._expectation import monte_carlo
from blr_optax.estimators._general import pathwise, score_function
from blr_optax.estimators._terms import GLM, Term, terms
from blr_optax.families import MeanField, get

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import Loss, NaturalParameters
    from blr_optax.families import ConditionalFamily, Family

KNOWN = (
    "delta()",
    "monte_carlo(...)",
    "gauss_hermite(...)",
    "cubature(...)",
    "closed_form()",
    "pathwise(...)",
    "score_function(...)",
    "least_squares(...)",
    "enumeration()",
    "concrete(...)",
    "shared_draws(...)",
)


def chosen(family: Family, estimator: Estimator | None) -> Estimator:
    """Return the estimator, or what a plain function gets when none is named.

    Ten antithetic pairs for Gaussians and conditional families, ten samples with gradients where
    the family has them, else the score function of a hundred.

    Raises:
        ValueError: for what is not an estimator.
    """
    if estimator is None:
        if family.conditional or getattr(family, "curvature", None) is not None:
            return monte_carlo(10, antithetic=True)
        return pathwise(10) if family.reparameterized else score_function(100)
    if isinstance(estimator, Curvature):
        raise ValueError(
            f"estimator={estimator!r} is a curvature; an estimator takes it, such as "
            f"monte_carlo(10, curvature={estimator.name!r})."
        )
    if not isinstance(estimator, Estimator):
        raise ValueError(f"estimator={estimator!r} is unknown; known: {', '.join(KNOWN)}.")
    return estimator


def natural_gradient(
    family: str | Family, loss: Loss | Term, estimator: Estimator | None = None
) -> Callable:
    """Return the function (key, lam, *batch) -> (E_q[l], grad_mu E_q[l]), the natural gradient.

    A conditional family (`mixture`, `student_t`, ...) has no common mu. Its loss is the *total*
    potential E(theta) = ess * mean loss - log prior, one plain function, and the result is (E_q[E],
    the natural gradient of E_q[E] - H(q) in every block): the entropy is in it, and
    `family.move(lam, gradient, rho)` makes the step.

    Args:
        family: a registered name or a family. GLM terms need a Gaussian one.
        loss: `loss(theta, *batch)`, a mean loss; or `conjugate(natural)`, `glm(features, loss)`, or
            a sum of these. theta is what the family samples: an array, or the tree of a mean field
            (and `loss(mu, *batch)` for `closed_form()`).
        estimator: for Gaussians `delta()`, `monte_carlo(...)`, `gauss_hermite(...)` or
            `cubature(...)`; for any exponential family `closed_form()`, `pathwise(...)`,
            `score_function(...)`, `least_squares(...)`; for discrete ones `enumeration()` and
            `concrete(...)`; for conditional ones `monte_carlo(...)` and `delta(...)`, for mixtures
            `shared_draws(...)`. By default ten antithetic pairs for Gaussians and conditional
            families, ten samples with gradients where the family has them, else the score function
            of a hundred. Concerns plain functions only.

    Returns:
        A pure function of a typed key (None when nothing is drawn), natural parameters and the
        batch. The gradient is of the family's natural type, per example of the mean loss. With
        `shared_draws(...)` it takes recorded draws as well, `points=theta`.

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
    over: Any = get(family)
    over.check_learnable("natural_gradient")
    estimator = chosen(over, estimator)
    if over.conditional:
        return _block_gradient(over, loss, estimator)
    parts = tuple(
        part if isinstance(part, Term) else scalar_loss("blr_update", part, real=False)
        for part in terms(loss)
    )
    if any(not isinstance(part, Term) for part in parts):
        estimator.check(over)
    gaussian = getattr(over, "curvature", None) is not None
    if any(isinstance(part, GLM) for part in parts) and not gaussian:
        raise ValueError(
            f"glm: {type(over).__name__} is not Gaussian, so that x . theta is no "
            "one-dimensional Gaussian; write the loss as a plain function."
        )
    # An elementwise family: a loss couples its elements, so it is treated as one mean field.
    lifted = MeanField(over) if over.elementwise else over

    def gradient(
        key: Array | None, lam: NaturalParameters, *batch: Any, points: Any = None
    ) -> tuple[Array, Any]:
        check_points(estimator, points)
        key = None if key is None else canonical_key(key)

        def at(lam: NaturalParameters) -> tuple[Array, Any]:
            results = []
            for part in parts:
                if isinstance(part, Term):
                    term: Any = part
                    results.append(term.natural_gradient(lifted, lam, batch))
                else:
                    results.append(estimator.natural_gradient(lifted, part, key, lam, batch))
            value: Any = sum(value for value, _ in results)
            return value, lifted.combine(*((1.0, g) for _, g in results))

        return at(_loops.by_its_value(at, lam))

    return gradient


def check_plain(loss: Loss | Term, family: ConditionalFamily) -> None:
    """Raise ValueError for a loss that is not one plain function."""
    if isinstance(loss, Term) or not callable(loss):
        raise ValueError(
            f"{type(family).__name__} is no exponential family: its loss must be one plain "
            "function loss(theta, *batch)."
        )


def _block_gradient(family: ConditionalFamily, loss: Any, estimator: Estimator) -> Callable:
    """`natural_gradient` of a conditional family."""
    check_plain(loss, family)
    estimator.check_conditional(family)

    def gradient(
        key: Array | None, lam: NaturalParameters, *batch: Any, points: Any = None
    ) -> tuple[Array, Any]:
        check_points(estimator, points)
        key = None if key is None else canonical_key(key)

        def at(lam: NaturalParameters) -> tuple[Array, Any]:
            return estimator.block_gradient(family, lambda x: loss(x, *batch), key, lam, points)

        return at(_loops.by_its_value(at, lam))

    return gradient
