"""Natural gradients of discrete families: all values at once, or a continuous relaxation.

enumeration   E_q[l] = sum_x l(x) prod_j P_j(x_j; mu), a polynomial in mu, differentiated
concrete      theta ~ softmax((lambda + Gumbel noise) / tau), differentiated in lambda
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax.estimators._estimator import (
    Estimator,
    check_key,
    check_samples,
    mean_of,
    others,
)

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import ExpectationParameters, NaturalParameters
    from blr_optax.families import ExponentialFamily

LARGEST_TABLE = 2**20
BLOCK = 1024  # losses evaluated at a time


@dataclasses.dataclass(frozen=True)
class Enumeration(Estimator):
    """Sums over the support; see `enumeration`."""

    total: int | None = None

    def check(self, family: ExponentialFamily) -> None:
        if not family.enumerable:
            raise ValueError(
                f"enumeration: {type(family).__name__} has no finite support; use {others(family)}."
            )
        if self.total is None and "total" in family.known:
            raise ValueError(
                f"enumeration: {type(family).__name__} counts up to a total that is part of "
                "lambda, traced under jit; name it, enumeration(total=n)."
            )

    def natural_gradient(
        self,
        family: ExponentialFamily,
        loss: Callable,
        key: Array | None,
        lam: NaturalParameters,
        batch: tuple,
    ) -> tuple[Array, NaturalParameters]:
        """grad_mu sum_x l(x) prod_j P_j(x_j; mu)."""
        mu = family.expectation(lam)
        probabilities = functools.partial(family.probabilities, total=self.total)
        values, treedef = jax.tree.flatten(family.support(lam, self.total))
        tables = treedef.flatten_up_to(jax.eval_shape(probabilities, mu))
        sizes = [(leaf.shape[0], int(np.prod(leaf.shape[1:]))) for leaf in tables]
        count = float(np.prod([float(k) ** n for k, n in sizes]))
        if count > LARGEST_TABLE:
            raise ValueError(
                f"enumeration: {count:.0f} values are too many (limit {LARGEST_TABLE}); use "
                f"{others(family, 'enumeration()')}."
            )
        choices = [np.arange(k) for k, n in sizes for _ in range(n)]
        table = np.stack(np.meshgrid(*choices, indexing="ij"), -1).reshape(-1, len(choices))
        ends = np.cumsum([n for _, n in sizes])[:-1]
        columns = np.split(table, ends, axis=1)

        def pick(leaf: Array, column: np.ndarray, like: Any) -> Array:
            """Return the value of every member in every combination."""
            members = leaf.reshape(leaf.shape[0], column.shape[1], *leaf.shape[len(like.shape) :])
            found = members[column, np.arange(column.shape[1])]
            return found.reshape(len(column), *leaf.shape[1:])

        theta = treedef.unflatten(
            [pick(leaf, c, like) for leaf, c, like in zip(values, columns, tables, strict=True)]
        )
        losses = jax.lax.map(lambda x: loss(x, *batch), theta, batch_size=BLOCK)

        def expected(mu: ExpectationParameters) -> Array:
            leaves = treedef.flatten_up_to(probabilities(mu))
            chances = [
                leaf.reshape(leaf.shape[0], -1)[c, np.arange(c.shape[1])]
                for leaf, c in zip(leaves, columns, strict=True)
            ]
            return losses @ jnp.prod(jnp.concatenate(chances, axis=1), axis=1)

        value, gradient = jax.value_and_grad(expected)(mu)
        return value, family.gradient_in_mu(gradient)


@dataclasses.dataclass(frozen=True)
class Concrete(Estimator):
    """A relaxation by Gumbel noise; see `concrete`."""

    temperature: float
    samples: int

    def check(self, family: ExponentialFamily) -> None:
        if not family.relaxable:
            raise ValueError(
                f"concrete: {type(family).__name__} has no relaxation; known for bernoulli, "
                "rademacher and categorical."
            )

    def natural_gradient(
        self,
        family: ExponentialFamily,
        loss: Callable,
        key: Array | None,
        lam: NaturalParameters,
        batch: tuple,
    ) -> tuple[Array, NaturalParameters]:
        """F^{-1} mean_s grad_lambda l(theta_s(lambda))."""
        key = check_key("concrete", key)

        def at(k: Array) -> tuple[Array, Any]:
            return jax.value_and_grad(
                lambda x: loss(family.relaxed_sample(k, x, self.temperature), *batch)
            )(lam)

        value, gradient = mean_of(at, key, self.samples)
        return value, family.gradient_in_lambda(lam, gradient)


def enumeration(total: int | None = None) -> Enumeration:
    """Exact sums over all values of a small discrete family; the gradient is exact.

    grad_mu sum_x l(x) prod_j P_j(x_j; mu): for one bernoulli, l(1) - l(0).

    Over a tree, or a batch, of P members with K values each it evaluates the loss K^P times (at
    most about a million).

    Args:
        total: the known total, for binomial and multinomial counts; the result is NaN when lambda
            has another.

    Raises:
        ValueError: for a family without a finite support, counts without a total, or too many
            values.

    Source: the definition of E_q. Special case of `blr_update` with `estimator=enumeration()`.

    Example:
      >>> import blr_optax as blr
      >>> gradient = blr.estimators.natural_gradient(
      ...     "bernoulli", lambda x: 5.0 * x + 1.0, blr.estimators.enumeration()
      ... )
      >>> print(gradient(None, blr.families.get("bernoulli").natural(logit=0.7))[1].linear.round(4))
      5.0
    """
    if total is not None and (isinstance(total, bool) or not isinstance(total, int) or total < 0):
        raise ValueError(f"enumeration: total={total!r} must be an integer, at least 0, or None.")
    return Enumeration(total)


def concrete(temperature: float = 0.5, samples: int = 1) -> Concrete:
    """Return the concrete (Gumbel-softmax) relaxation of bernoulli, rademacher and categorical.

    theta_s = sigmoid((lambda + logistic noise) / tau) or its +-1 and softmax forms;
    grad_mu ~ F^{-1} mean_s grad_lambda l(theta_s): needs the loss's gradient at relaxed values. For
    a categorical the loss gets a point of the simplex (K numbers) in place of the label.

    Biased at any temperature above zero, even for a linear loss: for a rademacher of mean 0.2 the
    gradient comes out too small by the factors 0.44, 0.68, 0.87 and 0.99 at temperatures 2, 1, 0.5
    and 0.1; the variance grows as the temperature falls.

    Args:
        temperature: tau > 0.
        samples: number of draws.

    Raises:
        ValueError: for a temperature that is not positive, samples < 1, or another family.

    Source: Meng, Bachmann and Khan (2020), BayesBiNN, Eq. 9; Maddison, Mnih and Teh (2017). Special
    case of `blr_update` with `estimator=concrete(...)`: BayesBiNN.

    Example:
      >>> import jax, blr_optax as blr
      >>> gradient = blr.estimators.natural_gradient(
      ...     "rademacher", lambda w: 3.0 * w, blr.estimators.concrete(0.1, 4000)
      ... )
      >>> lam = blr.families.get("rademacher").natural(probability=0.6)
      >>> print(abs(gradient(jax.random.key(0), lam)[1].linear - 3.0) < 0.5)
      True
    """
    check_samples("concrete", samples)
    if not temperature > 0:
        raise ValueError(f"concrete: temperature={temperature} must be positive.")
    return Concrete(float(temperature), samples)
