"""THE RULE, one step: how lambda moves and stays in its domain.

    no prior     lambda <- lambda - rho ( lambda + ess grad_mu E_q[l] + grad_mu E_q[log h] )
    with prior   lambda <- lambda + rho ( lambda_0 - lambda - ess grad_mu E_q[l] )

l is a mean loss, `ess` the number of examples it stands for. The first line's density is flat; with
a prior of the family log h cancels (DESIGN section 1; Khan and Rue 2023, Eq. 5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax._distribution import Distribution
from blr_optax.families import Family, MeanField, Product, SideBySide, get
from blr_optax.families._base.conditional import STEPS as CONDITIONAL_STEPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array

    from blr_optax._typing import ExpectationParameters, NaturalParameters, PyTree, Scalar


STEPS = ("auto", "plain", "improved", "improved_old", "square_root")


def check_step(step: str, family: Family) -> str:
    """Raise ValueError for an unknown step, or one that the family does not have."""
    if family.conditional:
        if step not in CONDITIONAL_STEPS:
            known = ", ".join(CONDITIONAL_STEPS)
            raise ValueError(f"step={step!r}: {type(family).__name__} knows {known}.")
        return step
    if step not in STEPS:
        raise ValueError(f"step={step!r} is unknown; known: {', '.join(STEPS)}.")
    learns_scale = getattr(family, "curvature", None) in ("matrix", "diagonal")
    if step in ("improved_old", "square_root") and not learns_scale:
        raise ValueError(
            f"step={step!r} needs a Gaussian family that learns its precision; got "
            f"{type(family).__name__}. Use 'auto', 'plain' or 'improved'."
        )
    return step


def own_part(prior: PyTree, family: Family) -> PyTree:
    """Of a joint posterior with points or of several families the part of one family, as prior.

    Args:
        prior: a posterior; without such a part it comes back as it is.
        family: the family.
    """
    joint = getattr(prior, "family", None)
    if isinstance(joint, SideBySide) and family in joint.families:
        return Distribution(family, prior.natural.parts[joint.families.index(family)])
    return prior


def spread(prior: Any, family: Any, like: PyTree) -> Any:
    """Return a prior of one number as that of every number of a tree; other priors as they are.

    Args:
        prior: a posterior of the family; anything else comes back as it is.
        family: the family.
        like: a tree of parameters; for a product, of every factor by name.
    """
    lam: Any = getattr(prior, "natural", None)
    if not family.exponential or not isinstance(lam, family.Natural):
        return prior
    if isinstance(family, Product):
        parts = {
            name: spread(Distribution(factor, lam.parts[name]), factor, like[name]).natural
            for name, factor in family.factors
        }
        return Distribution(family, family.Natural(parts))
    is_number = all(jax.tree_util.all_leaves([x]) and not jnp.ndim(x) for x in lam)
    if getattr(family, "curvature", None) == "matrix" and is_number:
        size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(like))
        full = jnp.full(size, lam.linear), lam.quadratic * jnp.eye(size)
        return Distribution(family, family.Natural(*full))
    if not (isinstance(family, MeanField) and is_number):
        return prior

    def everywhere(x: Array) -> Any:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(x, jnp.shape(leaf)), like)

    return Distribution(family, family.Natural(*map(everywhere, lam)))


def spread_over(prior: PyTree, family: Any, lam: NaturalParameters) -> PyTree:
    """`spread` over the tree of a lambda."""

    def tree(family: Any, lam: NaturalParameters) -> Any:
        if isinstance(family, Product):
            return {name: tree(factor, lam.parts[name]) for name, factor in family.factors}
        return lam[0]

    return None if prior is None else spread(prior, family, tree(family, lam))


def direction(
    family: Any,
    lam: NaturalParameters,
    grad_mu: ExpectationParameters,
    prior: Distribution | None,
    ess: Scalar,
) -> PyTree:
    """Return minus grad_mu { ess E_q[l] - H(q) }, of the natural type: the step's direction."""
    if prior is None:
        pull = family.combine((-1.0, lam), (-1.0, family.base_measure_gradient(lam)))
    else:
        pull = family.combine((-1.0, lam), (1.0, prior.natural))
    return family.combine((1.0, pull), (-ess, grad_mu))


def move(
    family: Any, lam: NaturalParameters, step: PyTree, how: str
) -> tuple[NaturalParameters, Array]:
    """lambda after a step, and how many of its members had to be retracted."""
    if how == "auto":
        return family.safe_step(lam, step)
    if how == "plain":
        return family.combine((1.0, lam), (1.0, step)), jnp.zeros((), jnp.int32)
    form = {} if how == "improved" else {"form": how}
    return family.retract(lam, step, **form), jnp.zeros((), jnp.int32)


def kept_step(
    family: Any,
    lam: NaturalParameters,
    d: PyTree,
    moved: Callable[[PyTree], tuple[NaturalParameters, Array]],
) -> tuple[NaturalParameters, PyTree, Array, Array]:
    """Move along a direction of any numbers, where that leads to a member.

    Args:
        family: the family.
        lam: lambda.
        d: the direction; where it is not finite a member stays.
        moved: lambda after a step along a finite direction, and how many members were retracted.

    Returns:
        lambda, its mean, how many members stayed where they were, and how many were retracted.
    """
    known = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), d)
    new, retracted = moved(known)
    new = jax.tree.map(lambda x, old: x.astype(old.dtype), new, lam)
    return *family.keep(lam, new, d), retracted


def natural_step(
    family: str | Family,
    lam: NaturalParameters,
    grad_mu: ExpectationParameters,
    learning_rate: Scalar,
    prior: Distribution | None = None,
    ess: Scalar = 1.0,
    step: str = "auto",
) -> NaturalParameters:
    """One step of the Bayesian learning rule on natural parameters.

    lambda <- lambda + rho ( lambda_0 - lambda - ess grad_mu E_q[mean loss] ), kept in the domain.

    Whatever the gradient, huge or not a number, lambda stays a member of the family with finite
    numbers, as in `blr_update`: a step that would end elsewhere is retracted, or not made, and
    lambda comes back as it was. Members that are independent are judged one by one. `step="plain"`
    alone is what the formula says, wherever that leads.

    Args:
        family: a registered name or a family.
        lam: natural parameters.
        grad_mu: grad_mu E_q[mean loss], of the natural type (from `estimators.natural_gradient`).
        learning_rate: rho; 1 solves a conjugate problem in one step.
        prior: a posterior of the same family; None is a flat density.
        ess: effective sample size, the number of examples the mean loss stands for.
        step: "auto" is the plain step where it stays in the domain and the retraction where it
            would not; "plain" may leave it, and is not guarded; "improved" is the second-order
            retraction, the mean preconditioned with the new precision; "improved_old" with the old
            one; "square_root" steps in the Cholesky factor of the covariance.

    Returns:
        The new natural parameters.

    Raises:
        ValueError: for an unknown or a conditional family, or an unknown step.

    Source: Khan and Rue (2023), Eq. 5; retraction: Lin, Schmidt and Khan (2020). `blr_update` is
    `estimators.natural_gradient` followed by this.

    Example:
      >>> import blr_optax as blr
      >>> normal = blr.families.get("normal")
      >>> lam = normal.natural(mean=0.0, precision=1.0)
      >>> site = normal.natural(mean=2.0, precision=3.0)
      >>> gradient = normal.combine((-1.0, site))  # of the loss -<site, T>
      >>> new = blr.natural_step("normal", lam, gradient, 1.0, prior=blr.Distribution(normal, lam))
      >>> print(normal.mean(new), normal.precision(new))
      1.5 4.0
    """
    family = get(family)
    family.check_learnable("natural_step")
    if family.conditional:
        raise ValueError(
            f"natural_step: {type(family).__name__} is a conditional family without a common mu; "
            "use blr_update, or the family's own move(lam, gradient, learning_rate)."
        )
    d = direction(family, lam, grad_mu, spread_over(prior, family, lam), ess)
    how = check_step(step, family)

    def moved(d: PyTree) -> tuple[NaturalParameters, Array]:
        return move(family, lam, family.combine((learning_rate, d)), how)

    return moved(d)[0] if how == "plain" else kept_step(family, lam, d, moved)[0]
