"""One step of the rule for a conditional family: block natural gradients, block moves.

    E(theta) = ess * mean loss(theta) - log prior(theta)
    lambda_b <- lambda_b - rho * natural gradient of { E_q[E] - H(q) } in block b

The blocks have no common mu, so the natural gradient comes from the family itself; estimators and
steps keep their names (Lin, Khan and Schmidt 2019; Khan and Rue 2023, Sec. 3.2 and 5.4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax._distribution import Posterior
from blr_optax._validate import at
from blr_optax.estimators import Estimator, delta, monte_carlo
from blr_optax.estimators._curvature import Exact, Reparameterized
from blr_optax.estimators._expectation import Delta, MonteCarlo
from blr_optax.estimators._terms import Term
from blr_optax.families import Conditional, MeanField
from blr_optax.rule._natural_step import spread

if TYPE_CHECKING:
    from jaxtyping import Array

STEPS = ("auto", "improved", "improved_old")
HESSIANS = {Exact: "exact", Reparameterized: "reparameterized"}


@dataclasses.dataclass(frozen=True)
class MixtureDraws:
    """An estimator for mixtures: draws of the mixture itself, each counted for every component.

    Attributes:
        samples: how many; `update(..., points=)` replaces them by recorded ones.
        hessian: "exact" or "reparameterized".
    """

    samples: int
    hessian: str = "exact"


@dataclasses.dataclass(frozen=True)
class MixtureStep:
    """A step for mixtures whose weights have their own rate.

    Attributes:
        form: "auto", "improved" or "improved_old", as for other conditional families.
        weight_rate: of the weights, relative to the components', a number or schedule.
    """

    form: str
    weight_rate: Any


def conditional_move(
    family: Conditional, lam: Any, gradient: Any, rho: Array, step: Any, count: Array
) -> Any:
    """The new lambda; `step` is the name of a form or a `MixtureStep`."""
    if not isinstance(step, MixtureStep):
        return family.move(lam, gradient, rho, step)
    rate = rho * jnp.asarray(at(step.weight_rate, count), rho.dtype)
    return family.move(lam, gradient, rho, step.form, weight_learning_rate=rate)


def conditional_options(estimator: Estimator | None) -> dict[str, Any]:
    """An estimator as the options of `Conditional.natural_gradient`.

    Raises:
        ValueError: for an estimator that is neither `monte_carlo(...)` nor `delta(...)`, or for
            another generator: the family itself draws.
    """
    estimator = monte_carlo(10, antithetic=True) if estimator is None else estimator
    kind = HESSIANS.get(type(getattr(estimator, "curvature", None)))
    if isinstance(estimator, MonteCarlo) and kind:
        if estimator.generator != "threefry":
            raise ValueError(
                f"estimator: generator={estimator.generator!r} is for Gaussian families; "
                "conditional ones draw with 'threefry'."
            )
        return {
            "samples": estimator.samples,
            "antithetic": estimator.antithetic,
            "hessian": kind,
        }
    if isinstance(estimator, Delta) and kind:
        return {"delta": True, "hessian": kind}
    raise ValueError(
        f"estimator={estimator!r}: conditional families take monte_carlo(...) or delta(...), with "
        "the curvature exact() or reparameterized()."
    )


def check_conditional(family: Conditional, loss: Any, step: str, estimator: Any) -> None:
    """Raises ValueError for what a conditional family cannot do."""
    if isinstance(loss, Term) or not callable(loss):
        raise ValueError(
            f"{type(family).__name__} is no exponential family: its loss must be one plain "
            "function loss(theta, *batch)."
        )
    if isinstance(step, MixtureStep):
        step = step.form
    if step not in STEPS:
        raise ValueError(f"step={step!r}: {type(family).__name__} knows {', '.join(STEPS)}.")
    if isinstance(estimator, MixtureDraws):
        return
    if conditional_options(estimator).get("delta") and not family.at_means:
        raise ValueError(
            f"estimator={delta()!r}: the delta method never looks away from the mean, which says "
            f"nothing about the shape of {type(family).__name__}; use monte_carlo(...)."
        )


def prior_over(prior: Posterior | None, params: Any) -> Posterior | None:
    """A prior for the loss of a conditional family; of one number, for every weight.

    Raises:
        ValueError: when it is not over a tree like params.
    """
    if prior is None or not jax.tree.leaves(params):  # optax's placeholder has no leaves
        return prior
    if not isinstance(prior, Posterior):
        raise ValueError(f"prior must be a Posterior; got {type(prior).__name__}.")
    if getattr(prior.family, "elementwise", False):
        prior = spread(prior, MeanField(prior.family), params)
    mean = jax.eval_shape(prior.family.mean, prior.natural)
    found, wanted = (jax.tree.map(jnp.shape, x) for x in (mean, params))
    if found != wanted:
        raise ValueError(
            f"prior: it is over structure and shapes {found}, params have {wanted}. Give one over "
            "a tree like params, or one number for all, "
            "Posterior(normal, normal.natural(mean=0.0, precision=1.0))."
        )
    return prior


def conditional_gradient(
    family: Conditional,
    loss: Callable,
    estimator: Estimator | None,
    key: Array,
    lam: Any,
    batch: tuple,
    ess: Any,
    prior: Posterior | None,
    points: Any = None,
) -> tuple[Array, Any]:
    """(E_q[E] / ess, the natural gradient of E_q[E] - H(q)), at recorded `points` where given."""

    def potential(theta: Array) -> Array:
        total = ess * loss(theta, *batch)
        return total if prior is None else total - jnp.sum(prior.log_prob(theta))

    if isinstance(estimator, MixtureDraws):
        if points is None:
            points = family.sample(key, lam, (estimator.samples,))
        value, gradient = family.natural_gradient_from(lam, potential, points, estimator.hessian)
        return value / ess, gradient
    value, gradient = family.natural_gradient(key, lam, potential, **conditional_options(estimator))
    return value / ess, gradient
