"""What an estimator is: a way to get E_q[l] and its natural gradient under a family.

    value = E_q[l],    gradient = grad_mu E_q[l] = F(lambda)^{-1} grad_lambda E_q[l]

An estimator is a static value. Those of `_expectation` evaluate the loss around a Gaussian's mean,
those of `_general` and `_discrete` take any exponential family. A conditional family has no common
mu: there the gradient is that of E_q[E] - H(q) for the total potential E, block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from blr_optax._validate import unwritten

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import NaturalParameters, PyTree
    from blr_optax.families import ConditionalFamily, ExponentialFamily


class Estimator:
    """Base of all estimators; subclasses are frozen dataclasses and static pytree nodes.

    Attributes:
        takes_points: whether recorded draws may stand for its own.
    """

    takes_points: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Estimators are closed over and compared, never traced."""
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_static(cls)

    def check(self, family: ExponentialFamily) -> None:
        """Raise ValueError when this estimator does not apply to the family."""

    def natural_gradient(
        self,
        family: ExponentialFamily,
        loss: Callable,
        key: Array | None,
        lam: NaturalParameters,
        batch: tuple,
    ) -> tuple[Array, NaturalParameters]:
        """(E_q[l], grad_mu E_q[l]), the gradient of the family's natural type."""
        raise unwritten(
            self, "natural_gradient(self, family, loss, key, lam, batch)", "your_own_estimator"
        )

    def check_conditional(self, family: ConditionalFamily) -> None:
        """Raise ValueError when this estimator does not apply to the conditional family."""
        shared = ", shared_draws(...)" if family.shares_draws else ""
        raise ValueError(
            f"estimator={self!r}: {type(family).__name__} is a conditional family, which takes "
            f"monte_carlo(...) or delta(...){shared}."
        )

    def block_gradient(
        self,
        family: ConditionalFamily,
        potential: Callable,
        key: Array | None,
        lam: NaturalParameters,
        points: PyTree,
    ) -> tuple[Array, PyTree]:
        """(E_q[E], the natural gradient of E_q[E] - H(q) in every block), E the potential."""
        raise unwritten(
            self, "block_gradient(self, family, potential, key, lam, points)", "your_own_estimator"
        )


def others(family: ExponentialFamily, *refused: str) -> str:
    """Return the estimators that a family that is not Gaussian takes, in words."""
    takes = {
        "closed_form()": True,
        "pathwise(...)": family.reparameterized,
        "score_function(...)": True,
        "least_squares(...)": True,
        "enumeration()": family.enumerable,
        "concrete(...)": family.relaxable,
    }
    *first, last = [name for name, known in takes.items() if known and name not in refused]
    return f"{', '.join(first)} or {last}"


def check_samples(who: str, samples: int) -> int:
    """Raise ValueError for fewer than one sample."""
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"{who}: samples={samples} must be an integer, at least 1.")
    return samples


def check_points(estimator: Estimator, points: PyTree) -> None:
    """Raise ValueError for recorded draws that the estimator does not take."""
    if points is not None and not estimator.takes_points:
        raise ValueError(
            f"points= are draws for estimator=shared_draws(...) alone; got estimator={estimator!r}."
        )


def check_key(who: str, key: Array | None) -> Array:
    """Raise ValueError when an estimator that draws has no key."""
    if key is None:
        raise ValueError(f"natural_gradient: {who} draws samples; pass a typed key, not None.")
    return key


def mean_of(f: Callable[[Array], PyTree], key: Array, samples: int) -> PyTree:
    """Average f(key) over independent keys, one at a time: the memory of one evaluation."""
    keys = jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(samples))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(f, keys))
