"""Online Newton with a precision that fits in memory: Kronecker factors, diagonal plus low rank.

    kronecker_newton     every leaf W [n, p] has precision Q (x) P, its inverse V (x) U

        P  <-  P + rho (H_P / p - P)           H_P = E[ess hess l] contracted with V
        Q  <-  Q + rho (H_Q / n - Q)           H_Q = E[ess hess l] contracted with U
        W  <-  W - rho U ess E[grad l] V       new U and V; the scale that P, Q share moves once

    low_rank_newton      all weights together have precision S = diag(u) + X X^T, of rank r

        S  <-  (1 - rho) S + rho ess E[hess l],  the largest r directions in X, its diagonal exact
        m  <-  m - rho S^{-1} ess E[grad l]    new S

Lin, Khan and Schmidt (2019), Thm. 2, with the Hessian where they have Gauss and Newton's; and
Jones, Chang and Murphy (2024). Both evaluate the loss themselves, as in `newton`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.flatten_util
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax._distribution import Distribution
from blr_optax._random import canonical_key
from blr_optax._validate import check_count, check_number
from blr_optax.estimators import delta
from blr_optax.families import get
from blr_optax.optimizers._zero_mean_prior import as_prior
from blr_optax.rule import blr_update

if TYPE_CHECKING:
    import optax

    from blr_optax._typing import Hyperparameter, KeyLike, Loss, Params, ScalarOrSchedule
    from blr_optax.estimators import Estimator
    from blr_optax.estimators._terms import Term


def kronecker_newton(
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
    """Online Newton whose precision of every leaf is a Kronecker product.

    P <- P + rho (H_P / p - P);  Q <- Q + rho (H_Q / n - Q);  W <- W - rho U ess E[grad l] V.

    A leaf with more than two axes is a matrix of its last axis by all others, a vector is a column
    (P is its full precision) and a number is 1 x 1. Leaves are independent of each other.

    Args:
        loss: `loss(theta, *batch)`, a mean loss.
        learning_rate: rho, a number or schedule.
        ess: effective sample size.
        prior: a posterior over params of any family, added to the loss; None is a flat density.
        prior_precision: total precision of the prior N(0, 1 / prior_precision), in place of prior.
        init: the first posterior; by default centred at params, with precision one.
        estimator: of the expectations; by default `delta()`, which evaluates the loss at the mean
            and contracts the Hessian with one product per weight. `monte_carlo(10,
            antithetic=True, curvature="reparameterized")` needs gradients alone.
        step: "auto", "improved" or "improved_old", see `natural_step`.
        key: typed key or integer seed.

    Raises:
        ValueError: as `blr_update`.

    Source: Lin, Khan and Schmidt (2019), Thm. 2 and its matrix Gaussian. Special case of
    `blr_update` with family "matrix_gaussian" and `estimator=delta()`.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> a, b = jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.diag(jnp.array([1.0, 4.0]))
      >>> tx = blr.kronecker_newton(lambda w: 0.5 * jnp.sum(w * (a @ w @ b)), 1.0)
      >>> params = jnp.ones((2, 2))
      >>> state = tx.init(params)
      >>> update = jax.jit(lambda params, state: tx.update(None, state, params))
      >>> for _ in range(20):
      ...     updates, state = update(params, state)
      ...     params = params + updates
      >>> q = blr.posterior(state, params)
      >>> print(jnp.abs(params).max() < 1e-5, q.variance.round(3)[0])  # 2/3, 2/3 / 4
      True [0.667 0.167]
    """
    return blr_update(
        "matrix_gaussian",
        loss,
        learning_rate,
        ess=ess,
        prior=as_prior(prior, prior_precision),
        init=init,
        estimator=delta() if estimator is None else estimator,
        step=step,
        key=key,
    )


def low_rank_newton(
    loss: Loss | Term,
    learning_rate: ScalarOrSchedule,
    rank: int,
    *,
    ess: ScalarOrSchedule = 1.0,
    init_precision: Hyperparameter = 1.0,
    prior: Distribution | None = None,
    prior_precision: Hyperparameter = None,
    init: Distribution | None = None,
    estimator: Estimator | None = None,
    step: str | None = None,
    key: KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Online Newton whose precision is a diagonal plus a matrix of low rank, over all weights.

    S = diag(u) + X X^T <- (1 - rho) S + rho ess E[hess l];  m <- m - rho S^{-1} ess E[grad l].

    X finds its directions by one power iteration in a step. Until it has them S is too small along
    them, by up to the number of weights: start with a small rate, or a large init_precision. A step
    has no derivative in its data (singular values of zero have none).

    Args:
        loss: `loss(theta, *batch)`, a mean loss.
        learning_rate: rho, a number or schedule.
        rank: r, the number of columns of X.
        ess: effective sample size.
        init_precision: of the first posterior, which is centred at params; a small random X is
            there besides, for the power iteration to start from.
        prior: a posterior over params of any family, added to the loss; None is a flat density.
        prior_precision: total precision of the prior N(0, 1 / prior_precision), in place of prior.
        init: the first posterior, of family `gaussian_low_rank`, in place of init_precision and
            rank.
        estimator: of the expectations; by default `delta()`, which costs one product with the
            Hessian per weight, for its diagonal. `monte_carlo(10, antithetic=True,
            curvature="reparameterized")` needs gradients alone.
        step: "auto", "improved" or "improved_old", see `natural_step`.
        key: typed key or integer seed.

    Raises:
        ValueError: for rank < 1 or a precision that is not positive, and as `blr_update`.

    Source: Jones, Chang and Murphy (2024); Khan and Rue (2023), Sec. 4.2. Special case of
    `blr_update` with family "gaussian_low_rank" and `estimator=delta()`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> a = jnp.array([1.0, 2.0, -1.0, 0.5])
      >>> loss = lambda x: 0.5 * (jnp.sum((x - 3.0) ** 2) + (a @ (x - 3.0)) ** 2)
      >>> tx, params = blr.low_rank_newton(loss, 1.0, rank=1), jnp.zeros(4)
      >>> updates, state = tx.update(None, tx.init(params), params)
      >>> print((params + updates).round(4))
      [3. 3. 3. 3.]
    """
    check_count("low_rank_newton: rank", rank)
    check_number("init_precision", init_precision)
    family = get("gaussian_low_rank")

    def centred(params: Params) -> Distribution:
        wide = jax.tree.map(lambda p: jnp.asarray(p, _tree.statistics_dtype(p.dtype)), params)
        mean = jax.flatten_util.ravel_pytree(wide)[0]
        small = jnp.sqrt(1e-3 * jnp.asarray(init_precision, mean.dtype) / max(mean.size, 1))
        draw = jax.random.normal(canonical_key(key), (mean.size, rank), mean.dtype)
        diagonal = jnp.full_like(mean, jnp.asarray(init_precision, mean.dtype))
        return Distribution(family, family.Natural(mean, diagonal, small * draw))

    return blr_update(
        family,
        loss,
        learning_rate,
        ess=ess,
        prior=as_prior(prior, prior_precision),
        init=centred if init is None else init,
        estimator=delta() if estimator is None else estimator,
        step=step,
        key=key,
    )
