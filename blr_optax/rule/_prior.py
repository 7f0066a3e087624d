"""The prior of a diagonal Gaussian as trees like the parameters, per example and per leaf.

    d0   prior precision per example:  weight_decay + S_0 / ess
    S_0  total precision of a `prior=` posterior

and, re-estimated from the posterior itself at every step (empirical Bayes), one per leaf:

    d0  =  P / ( ess sum_j (m_j^2 + sigma_j^2) ),    P entries in the leaf,  sigma^2 = 1 / (ess p)
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax._distribution import Posterior
from blr_optax._validate import at
from blr_optax.families import GaussianNatural, MeanField, Normal
from blr_optax.rule._natural_step import own_part, spread

if TYPE_CHECKING:
    from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class EmpiricalPrior:
    """A `weight_decay=` of `scale_by_precision` that follows the posterior, one number per leaf.

    Among all zero-mean priors of one precision S_0 per leaf, KL(q || prior) is smallest at
    S_0 = P / sum_j (m_j^2 + sigma_j^2). The rule's step then goes towards c + S_0 / ess, at its own
    rate: a precision that took the new prior in at once would grow without bound where m = 0.

    Attributes:
        first: the weight decay from which the first precision is made.
    """

    first: float = 0.0

    def __call__(self, count: Any) -> float:
        """Before there is a posterior: a constant schedule."""
        return self.first

    def of(self, params: Any, precision: Any, ess: Any) -> Any:
        """d0 for every leaf, a tree of numbers."""

        def leaf(m: Array, p: Array) -> Array:
            size = jnp.asarray(ess, p.dtype)
            second_moment = jnp.sum(size * jnp.square(m.astype(p.dtype)) + 1.0 / p)
            return p.size / second_moment

        return jax.tree.map(leaf, params, precision)


def filled(m: Any, x: Any) -> Array:
    """x in the shape and sharding of a parameter, in its statistics dtype."""
    return jnp.zeros_like(m, dtype=_tree.statistics_dtype(m.dtype)) + x


def prior_trees(prior: Posterior | None, params: Any, name: str = "prior") -> Any:
    """The natural parameters of a mean-field Gaussian as trees like params; () for None.

    One of one number holds for every parameter.

    Raises:
        ValueError: for another family or another tree structure.
    """
    if prior is None:
        return ()
    prior = own_part(spread(prior, MeanField(Normal()), params), MeanField(Normal()))
    if not isinstance(prior, Posterior) or prior.family not in (Normal(), MeanField(Normal())):
        found = prior.family if isinstance(prior, Posterior) else type(prior).__name__
        raise ValueError(
            f"{name} must be a mean-field Gaussian Posterior (gaussian_diagonal); got {found}."
        )
    fields = [_tree.matching_leaves(field, params, name) for field in prior.natural]
    return GaussianNatural(*(jax.tree.map(filled, params, field) for field in fields))


def prior_precision(weight_decay: Any, prior: Any, ess: Any, like: Any, count: Any) -> Any:
    """d0 = weight_decay + S_0 / ess for every leaf: the prior's precision per example."""
    decay = _tree.prefix_leaves(at(weight_decay, count), like, "weight_decay (prior_precision)")
    if prior == ():
        return decay
    return jax.tree.map(
        lambda w, q: jnp.asarray(w, q.dtype) - 2.0 * q / jnp.asarray(ess, q.dtype),
        decay,
        prior.quadratic,
    )
