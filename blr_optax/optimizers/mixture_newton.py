"""Multimodal optimisation: a mixture of Gaussians, every component a Newton's method of its own.

    q(theta)  =  sum_k pi_k N(m_k, S_k^{-1}),     f  =  ess l - tau log prior + tau log q
    S_k  <-  S_k + rho E_k[hess f]
    m_k  <-  m_k - rho S_k^{-1} E_k[grad f]                    with the new S_k
    log(pi_k / pi_K)  <-  log(pi_k / pi_K) - rho w ( E_k[f] - E_K[f] )

    mixture_newton    delta method: f is evaluated at the means, E_k[f] ~ f(m_k)
    mixture_vi        expectations under the components, or under q itself

Alone or far from the others, -hess log q(m_k) = S_k and component k is online Newton. Where
components overlap, grad log q(m_k) = sum_j r_j S_j (m_j - m_k) pushes them apart, r_j being the
responsibility of j for m_k. The metric is that of the joint density of component and point.

Khan and Rue (2023), Sec. 3.2; Lin, Khan and Schmidt (2019). Both rows evaluate the loss themselves:
`update(None, opt_state, params, batch=(...))`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._distribution import Distribution
from blr_optax._random import canonical_key
from blr_optax._validate import at, check_count, check_number, check_positive, is_schedule
from blr_optax.estimators import delta
from blr_optax.families import Raveled, get
from blr_optax.optimizers._zero_mean_prior import as_prior
from blr_optax.rule._blr_update import from_steps
from blr_optax.rule._conditional_step import ConditionalStep

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import (
        Hyperparameter,
        KeyLike,
        NaturalParameters,
        Params,
        PyTree,
        ScalarOrSchedule,
    )
    from blr_optax.estimators import Estimator

KINDS = {"full": "gaussian", "diagonal": "normal"}


def _family(covariance: str) -> Any:
    if covariance not in KINDS:
        raise ValueError(f"covariance={covariance!r} is unknown; known: {', '.join(KINDS)}.")
    return get("mixture", family=KINDS[covariance])


class MixtureStep(ConditionalStep):
    """The step of a mixture whose weights have a rate of their own, relative to the components'."""

    def __init__(self, weight_rate: ScalarOrSchedule, *arguments: Any) -> None:
        """Make a `ConditionalStep` of the other arguments."""
        super().__init__(*arguments)
        self.weight_rate = weight_rate

    def move(
        self, lam: NaturalParameters, d: PyTree, rho: Array, count: Array
    ) -> tuple[NaturalParameters, Array]:
        """Return the new lambda, the weights at their own rate."""
        rate = rho * jnp.asarray(at(self.weight_rate, count), rho.dtype)
        new = self.family.move(lam, d, rho, self.step, weight_learning_rate=rate)
        return new, jnp.zeros((), jnp.int32)


def _spread_out(
    params: Params, components: Any, scale: Any, covariance: str, key: KeyLike
) -> Distribution:
    """Equal components of variance scale^2, at random around params, their mean."""
    flat = jnp.concatenate(
        [jnp.ravel(p).astype(_tree.statistics_dtype(p.dtype)) for p in jax.tree.leaves(params)]
        or [jnp.zeros(0)]  # optax's placeholder has no leaves
    )
    z = jax.random.normal(canonical_key(key), (components, flat.size), flat.dtype)
    means = flat + scale * (z - jnp.mean(z, axis=0))
    precision = jnp.full_like(means, 1.0) / jnp.asarray(scale, means.dtype) ** 2
    if covariance == "full":
        precision = precision[..., None] * jnp.eye(flat.size, dtype=flat.dtype)
    family = _family(covariance)
    weights = jnp.full(components, 1.0 / components, flat.dtype)
    return Distribution(family, family.natural(weights=weights, mean=means, precision=precision))


def _mixture(
    loss: Callable,
    learning_rate: ScalarOrSchedule,
    components: int | None,
    estimator: Estimator | None,
    *,
    ess: ScalarOrSchedule,
    prior: Distribution | None,
    init: Distribution | None,
    covariance: str,
    scale: Any,
    temperature: ScalarOrSchedule,
    weight_rate: ScalarOrSchedule,
    step: str | None,
    key: KeyLike,
) -> optax.GradientTransformationExtraArgs:
    """`blr_update` for a mixture: E_q[ess l] + tau KL is tau times the rule's with ess / tau."""
    check_positive("learning_rate", learning_rate, scalar=True, zero=is_schedule(learning_rate))
    check_positive("ess", ess, scalar=True)
    check_positive("temperature", temperature, scalar=True)
    check_positive("weight_rate", weight_rate, zero=True, scalar=True)
    check_number("scale", scale)
    if components is not None:
        check_count("components", components)
    family = _family(covariance)
    if (components is None) == (init is None):
        raise ValueError(
            "give either components=K, for a random start around params, or init=, a Distribution "
            f"of the mixture family; got components={components} and "
            f"{'no init' if init is None else 'init'}."
        )
    given = getattr(init, "family", None)
    flat = given.family if isinstance(given, Raveled) else given
    if init is not None and not isinstance(flat, type(family)):
        raise ValueError(
            "init must be a Distribution of the mixture family, families.get('mixture'); got "
            f"{given}."
        )
    if components is not None and components < 1:
        raise ValueError(f"components={components} must be at least 1.")

    def spread_out(params: Params) -> Distribution:
        return _spread_out(params, components, scale, covariance, key)

    form = "auto" if step is None else step
    return from_steps(
        family if init is None else init.family,
        lambda over: MixtureStep(weight_rate, over, loss, estimator, prior, form),
        lambda count: at(learning_rate, count) * at(temperature, count),
        ess=lambda count: at(ess, count) / at(temperature, count),
        init=spread_out if init is None else init,
        key=key,
    )


def mixture_newton(
    loss: Callable,
    learning_rate: ScalarOrSchedule,
    components: int | None = None,
    *,
    ess: ScalarOrSchedule = 1.0,
    prior: Distribution | None = None,
    prior_precision: Hyperparameter = None,
    init: Distribution | None = None,
    covariance: str = "full",
    scale: float | Array = 1.0,
    temperature: ScalarOrSchedule = 1.0,
    weight_rate: ScalarOrSchedule = 1.0,
    step: str | None = None,
    key: KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Multimodal optimisation: online Newton from several places at once, which repel each other.

    S_k <- S_k + rho hess f(m_k);  m_k <- m_k - rho S_k^{-1} grad f(m_k);
    f = ess l + tau (log q - log prior).

    The parameters are the mean of the mixture; the components are in the posterior,
    `posterior(opt_state, params).standard()`: weights, means and (co)variances.

    Args:
        loss: `loss(theta, *batch)`, a mean loss.
        learning_rate: rho, a number or schedule.
        components: K of them at random around the first params, of equal weight. Or give `init`.
        ess: effective sample size; may be a schedule.
        prior: any posterior over params with a density; None is flat.
        prior_precision: total precision of the prior N(0, 1 / prior_precision), in place of prior.
        init: the first posterior, of the mixture family; covariance is then its own.
        covariance: "full" or "diagonal".
        scale: standard deviation of the first components and of their means.
        temperature: tau, multiplies log q and the prior; a number or schedule, large at first to
            explore.
        weight_rate: of the mixing weights, relative to rho; 0 keeps them, may be a schedule.
        step: "auto", "improved", or "improved_old", which uses the old S_k for the means.
        key: typed key or integer seed, of the first means.

    Raises:
        ValueError: for arguments out of range, unknown names, both or neither of components and
            init, and as `blr_update`.

    Source: Khan and Rue (2023), Sec. 3.2. Special case of `blr_update` with family "mixture" and
    `estimator=delta()`; with one component it is `online_newton`.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> wells = lambda x: jnp.sum((x**2 - 4.0) ** 2)
      >>> tx, params = blr.mixture_newton(wells, 0.3, 2, ess=10.0, key=1), jnp.zeros(1)
      >>> state = tx.init(params)
      >>> step = jax.jit(tx.update)
      >>> for _ in range(50):
      ...     updates, state = step(None, state, params)
      ...     params = params + updates
      >>> print(jnp.sort(blr.posterior(state, params).standard()["mean"][:, 0]).round(2))
      [-2.  2.]
    """
    return _mixture(
        loss, learning_rate, components, delta(),
        ess=ess, prior=as_prior(prior, prior_precision), init=init, covariance=covariance,
        scale=scale,
        temperature=temperature, weight_rate=weight_rate, step=step, key=key,
    )  # fmt: skip


def mixture_vi(
    loss: Callable,
    learning_rate: ScalarOrSchedule,
    components: int | None = None,
    *,
    ess: ScalarOrSchedule = 1.0,
    prior: Distribution | None = None,
    prior_precision: Hyperparameter = None,
    init: Distribution | None = None,
    covariance: str = "full",
    estimator: Estimator | None = None,
    scale: float | Array = 1.0,
    temperature: ScalarOrSchedule = 1.0,
    weight_rate: ScalarOrSchedule = 1.0,
    step: str | None = None,
    key: KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Variational inference with a mixture of Gaussians: `mixture_newton` without delta method.

    S_k <- S_k + rho E_k[hess f];  m_k <- m_k - rho S_k^{-1} E_k[grad f];
    f = ess l + tau (log q - log prior).

    Args:
        loss, learning_rate, components, ess, prior, prior_precision: as in `mixture_newton`.
        init, covariance: as in `mixture_newton`.
        scale, temperature, weight_rate, step: as in `mixture_newton`.
        estimator: of the expectations: `monte_carlo(...)`, draws of every component, by default ten
            antithetic pairs; or `shared_draws(...)`, draws of q, which may also be given,
            `update(..., points=theta)`. With `curvature="reparameterized"` gradients of the loss
            are enough.
        key: typed key or integer seed, of the first means and of the draws.

    Raises:
        ValueError: as `mixture_newton`.

    Source: Lin, Khan and Schmidt (2019); with `step="improved_old"` and `shared_draws(...)` Lin,
    Schmidt and Khan (2020). Special case of `blr_update` with family "mixture"; with one component
    it is `variational_online_newton`.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> wells = lambda x: jnp.sum((x**2 - 4.0) ** 2)
      >>> tx, params = blr.mixture_vi(wells, 0.3, 2, ess=10.0, key=1), jnp.zeros(1)
      >>> state = tx.init(params)
      >>> step = jax.jit(tx.update)
      >>> for _ in range(50):
      ...     updates, state = step(None, state, params)
      ...     params = params + updates
      >>> print(jnp.sort(blr.posterior(state, params).standard()["mean"][:, 0]).round(1))
      [-2.  2.]
    """
    return _mixture(
        loss, learning_rate, components, estimator,
        ess=ess, prior=as_prior(prior, prior_precision), init=init, covariance=covariance,
        scale=scale,
        temperature=temperature, weight_rate=weight_rate, step=step, key=key,
    )  # fmt: skip
