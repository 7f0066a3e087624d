"""One step of the rule for an exponential family: its natural gradient, its natural step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from blr_optax._distribution import check_distribution
from blr_optax.estimators import natural_gradient
from blr_optax.estimators._natural_gradient import chosen
from blr_optax.rule._natural_step import check_step, direction, move, spread, spread_over
from blr_optax.rule._start import check_like, check_params, check_shapes, first_natural

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._distribution import Distribution
    from blr_optax._typing import Loss, NaturalParameters, Params, PyTree
    from blr_optax.estimators import Estimator
    from blr_optax.estimators._terms import Term
    from blr_optax.families import ExponentialFamily


class ExponentialStep:
    """What `blr_update` does with an exponential family; arguments as there.

    Attributes:
        estimator: of plain functions, as given or chosen.
    """

    def __init__(
        self,
        family: ExponentialFamily,
        loss: Loss | Term,
        estimator: Estimator | None,
        prior: Distribution | None,
        step: str,
    ) -> None:
        """Check the arguments, and build the natural gradient."""
        if prior is not None:
            check_distribution("prior", prior)
        self.family, self.prior, self.step = family, prior, check_step(step, family)
        self.estimator = chosen(family, estimator)
        self.gradient = natural_gradient(family, loss, self.estimator)

    def first(self, params: Params, init: Distribution | None) -> PyTree:
        """Return the first lambda, after checks of everything that must fit the parameters."""
        own = spread(self.prior, self.family, params)
        check_like("prior", own, self.family, params)
        check_like("init", init, self.family, params)
        lam = first_natural(self.family, params, init, own)
        if own is not None and jax.tree.leaves(params):
            check_shapes("prior", own, lam)
        check_params(self.family, lam, params)
        return lam

    def direction(
        self, key: Array, lam: NaturalParameters, batch: tuple, ess: Array, points: PyTree
    ) -> tuple[Array, PyTree]:
        """(E_q[mean loss], lambda_0 - lambda - ess grad_mu E_q[mean loss])."""
        value, grad_mu = self.gradient(key, lam, *batch, points=points)
        prior = spread_over(self.prior, self.family, lam)
        return value, direction(self.family, lam, grad_mu, prior, ess)

    def move(
        self, lam: NaturalParameters, d: PyTree, rho: Array, count: Array
    ) -> tuple[NaturalParameters, Array]:
        """lambda + rho d in the domain, and how many of its members had to be retracted."""
        del count
        return move(self.family, lam, self.family.combine((rho, d)), self.step)
