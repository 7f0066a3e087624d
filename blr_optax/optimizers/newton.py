"""Newton's method and its online and variational forms: a full Gaussian.

    S  <-  (1 - rho) S + rho ess E_q[hess l]                   Khan and Rue (2023), Secs. 1.3, 4.2
    m  <-  m - rho S^{-1} ess E_q[grad l]                      with the new S

    newton                       delta method, rho = 1
    online_newton                delta method
    variational_online_newton    expectations under q

All evaluate the loss themselves: `update(None, opt_state, params, batch=(...))`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blr_optax.estimators import delta
from blr_optax.optimizers._zero_mean_prior import as_prior
from blr_optax.rule import blr_update

if TYPE_CHECKING:
    import optax

    from blr_optax._distribution import Distribution
    from blr_optax._typing import Hyperparameter, KeyLike, Loss, ScalarOrSchedule
    from blr_optax.estimators import Estimator
    from blr_optax.estimators._terms import Term


def newton(
    loss: Loss | Term,
    *,
    ess: ScalarOrSchedule = 1.0,
    prior: Distribution | None = None,
    prior_precision: Hyperparameter = None,
    init: Distribution | None = None,
    step: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Newton's method; its fixed point is the Laplace approximation.

    S <- ess hess l(m);  m <- m - S^{-1} ess grad l(m).

    Args:
        loss: `loss(theta, *batch)`, a mean loss, or terms.
        ess: effective sample size.
        prior: a Gaussian posterior over params, or one of one number for all of them; None is a
            flat density.
        prior_precision: total precision of the prior N(0, 1 / prior_precision), in place of prior.
        init: the first posterior; by default centred at params.
        step: see `natural_step`. "auto" retracts where the Hessian is not positive definite.

    Raises:
        ValueError: as `blr_update`.

    Source: Khan and Rue (2023), Sec. 1.3. Special case of `blr_update` with family "gaussian",
    `estimator=delta(exact())` and learning rate 1.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, params = blr.newton(lambda x: jnp.sum(3.0 * (x - 2.0) ** 2)), jnp.zeros(1)
      >>> updates, state = tx.update(None, tx.init(params), params)
      >>> print(params + updates)
      [2.]
    """
    prior = as_prior(prior, prior_precision)
    return online_newton(loss, 1.0, ess=ess, prior=prior, init=init, step=step)


def online_newton(
    loss: Loss | Term,
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule = 1.0,
    prior: Distribution | None = None,
    prior_precision: Hyperparameter = None,
    init: Distribution | None = None,
    step: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Newton's method with a moving average of Hessians.

    S <- (1 - rho) S + rho ess hess l(m);  m <- m - rho S^{-1} ess grad l(m).

    Args:
        loss: `loss(theta, *batch)`, a mean loss, or terms.
        learning_rate: rho, a number or schedule.
        ess: effective sample size.
        prior: a Gaussian posterior over params, or one of one number for all of them; None is a
            flat density.
        prior_precision: total precision of the prior N(0, 1 / prior_precision), in place of prior.
        init: the first posterior; by default centred at params.
        step: see `natural_step`.

    Raises:
        ValueError: as `blr_update`.

    Source: Khan and Rue (2023), Sec. 4.2; Nickl et al. (2023), Eq. 31. Special case of `blr_update`
    with family "gaussian" and `estimator=delta(exact())`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, params = blr.online_newton(lambda x: jnp.sum(x**2), 0.5), jnp.ones(1)
      >>> updates, state = tx.update(None, tx.init(params), params)  # S = 0.5 + 0.5 * 2
      >>> print((params + updates).round(4), blr.posterior(state, params).variance.round(4))
      [0.3333] [0.6667]
    """
    return blr_update(
        "gaussian",
        loss,
        learning_rate,
        ess=ess,
        prior=as_prior(prior, prior_precision),
        init=init,
        estimator=delta(),
        step=step,
    )


def variational_online_newton(
    loss: Loss | Term,
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule = 1.0,
    prior: Distribution | None = None,
    prior_precision: Hyperparameter = None,
    init: Distribution | None = None,
    estimator: Estimator | None = None,
    step: str | None = None,
    key: KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Online Newton without the delta method: full-covariance Gaussian variational inference.

    S <- (1 - rho) S + rho ess E_q[hess l];  m <- m - rho S^{-1} ess E_q[grad l].

    Args:
        loss: `loss(theta, *batch)`, a mean loss, or terms (a `glm` term needs no sampling).
        learning_rate: rho, a number or schedule.
        ess: effective sample size.
        prior: a Gaussian posterior over params, or one of one number for all of them; None is a
            flat density.
        prior_precision: total precision of the prior N(0, 1 / prior_precision), in place of prior.
        init: the first posterior; by default centred at params.
        estimator: of the expectations; ten antithetic pairs by default.
        step: see `natural_step`.
        key: typed key or integer seed.

    Raises:
        ValueError: as `blr_update`.

    Source: Khan and Rue (2023), Sec. 4.2; Nickl et al. (2023), Eq. 29. Special case of `blr_update`
    with family "gaussian".

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> tx = blr.variational_online_newton(
      ...     lambda x: jnp.sum(jnp.cosh(x)), 1.0, estimator=blr.estimators.gauss_hermite(20)
      ... )
      >>> params = jnp.zeros(1)
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(30):
      ...     updates, state = update(None, state, params)
      >>> print(blr.posterior(state, params).variance.round(4))  # v exp(v / 2) = 1
      [0.7035]
    """
    return blr_update(
        "gaussian",
        loss,
        learning_rate,
        ess=ess,
        prior=as_prior(prior, prior_precision),
        init=init,
        estimator=estimator,
        step=step,
        key=key,
    )
