"""One step of the rule for a conditional family: block natural gradients, block moves.

    E(theta) = ess * mean loss(theta) - log prior(theta)
    lambda_b <- lambda_b - rho * natural gradient of { E_q[E] - H(q) } in block b

The blocks have no common mu, so the natural gradient comes from the family itself; estimators and
steps keep their names (Lin, Khan and Schmidt 2019; Khan and Rue 2023, Sec. 3.2 and 5.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax._distribution import Distribution, check_distribution
from blr_optax._validate import scalar_loss
from blr_optax.estimators import natural_gradient
from blr_optax.estimators._curvature import SquaredGradient
from blr_optax.estimators._natural_gradient import check_plain, chosen
from blr_optax.families import MeanField, Raveled
from blr_optax.rule._natural_step import check_step, spread
from blr_optax.rule._start import check_like, check_params, first_natural

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import LossOrTerm, NaturalParameters, Params, PyTree
    from blr_optax.estimators import Estimator
    from blr_optax.families import ConditionalFamily


class ConditionalStep:
    """What `blr_update` does with a conditional family; arguments as there.

    Attributes:
        estimator: as given or chosen.
    """

    def __init__(
        self,
        family: ConditionalFamily,
        loss: LossOrTerm,
        estimator: Estimator | None,
        prior: Distribution | None,
        step: str,
    ) -> None:
        """Check the arguments, and build the natural gradient."""
        if prior is not None:
            check_distribution("prior", prior)
        self.family, self.prior, self.step = family, prior, check_step(step, family)
        self.estimator = chosen(family, estimator)
        check_plain(loss, family)
        if isinstance(getattr(self.estimator, "curvature", None), SquaredGradient):
            raise ValueError(
                "curvature=squared_gradient(...): blr_update adds ess and prior to the loss of a "
                f"{type(family).__name__}, which would be squared with it; use exact() or "
                "reparameterized()."
            )

        loss = scalar_loss("blr_update", loss, real=False)

        def potential(theta: Any, prior: Distribution | None, ess: Array, *batch: Any) -> Array:
            total = ess * loss(theta, *batch)
            return total if prior is None else total - jnp.sum(prior.log_prob(theta))

        self.gradient = natural_gradient(family, potential, self.estimator)

    def first(self, params: Params, init: Distribution | None) -> PyTree:
        """Return the first lambda, after checks of everything that must fit the parameters."""
        family, given = self.family, getattr(init, "family", None)
        prior_over(self.prior, params)
        flat = family.family if isinstance(family, Raveled) else family
        if given is not None and jax.tree.leaves(params) and given not in (family, flat):
            raise ValueError(
                f"init is a member of {given}, not of {flat}; give blr_update the family itself, "
                "such as init.family."
            )
        check_like("init", init, family, params)
        lam = first_natural(family, params, init, None)
        check_params(family, lam, params)
        return lam

    def direction(
        self, key: Array, lam: NaturalParameters, batch: tuple, ess: Array, points: PyTree
    ) -> tuple[Array, PyTree]:
        """(E_q[E] / ess, the natural gradient of E_q[E] - H(q))."""
        prior = prior_over(self.prior, jax.eval_shape(self.family.mean, lam))
        value, gradient = self.gradient(key, lam, prior, ess, *batch, points=points)
        return value / ess, gradient

    def move(
        self, lam: NaturalParameters, d: PyTree, rho: Array, count: Array
    ) -> tuple[NaturalParameters, Array]:
        """Return the new lambda, block by block; a member is retracted where need be, uncounted."""
        del count
        return self.family.move(lam, d, rho, self.step), jnp.zeros((), jnp.int32)


def prior_over(prior: Any, params: Params) -> Distribution | None:
    """Return a prior for the loss of a conditional family; of one number, for every weight.

    Raises:
        ValueError: when it is not over a tree like params.
    """
    if prior is None or not jax.tree.leaves(params):  # optax's placeholder has no leaves
        return prior
    check_distribution("prior", prior)
    if prior.family.elementwise:
        prior = spread(prior, MeanField(prior.family), params)
    mean = jax.eval_shape(prior.family.mean, prior.natural)
    found, wanted = (jax.tree.map(jnp.shape, x) for x in (mean, params))
    if found != wanted:
        raise ValueError(
            f"prior: it is over structure and shapes {found}, params have {wanted}. Give one over "
            "a tree like params, or one number for all, "
            "Distribution(normal, normal.natural(mean=0.0, precision=1.0))."
        )
    return prior
