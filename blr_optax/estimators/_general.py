"""Natural gradients for any exponential family.

    closed_form       grad_mu E[l]     of a loss that is written as a function of mu
    pathwise          grad_lambda E[l] = mean of grad_lambda l(theta(lambda)), times F(lambda)^{-1}
    score_function    grad_lambda E[l] = Cov(T, l), times F(lambda)^{-1}
    least_squares     grad_mu E[l]     = slope of the regression of l on T

The last two need values of the loss only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax.estimators._estimator import Estimator, check_key, check_samples, mean_of, others

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax._typing import NaturalParameters
    from blr_optax.families import ExponentialFamily

BASELINES = ("mean", "none")


def _draw(
    family: ExponentialFamily,
    loss: Callable,
    key: Array,
    lam: NaturalParameters,
    batch: tuple,
    samples: int,
) -> tuple[Any, Float[Array, " s"], Any, Callable]:
    """Return samples of `family.centred`, the values of the loss there, its lambda and `back`."""
    local, away, back = family.centred(lam)
    theta = family.sample(key, local, (samples,))
    return theta, jax.vmap(lambda x: loss(x, *batch))(away(theta)), local, back


@dataclasses.dataclass(frozen=True)
class ClosedForm(Estimator):
    """The gradient of a loss of mu; see `closed_form`."""

    def natural_gradient(
        self,
        family: ExponentialFamily,
        loss: Callable,
        key: Array | None,
        lam: NaturalParameters,
        batch: tuple,
    ) -> tuple[Array, NaturalParameters]:
        """(l(mu), grad l(mu)) of a loss that is written as a function of mu."""
        try:
            value, gradient = jax.value_and_grad(loss)(family.expectation(lam), *batch)
        except TypeError as error:
            error.add_note(
                "estimators.closed_form() calls the loss with mu, the expectation parameters "
                f"{family.Expectation.__name__}{family.Expectation._fields}, not with theta."
            )
            raise
        return value, family.gradient_in_mu(gradient)


@dataclasses.dataclass(frozen=True)
class Pathwise(Estimator):
    """Gradients through the family's samples; see `pathwise`."""

    samples: int

    def check(self, family: ExponentialFamily) -> None:
        if not family.reparameterized:
            raise ValueError(
                f"pathwise: samples of {type(family).__name__} have no gradient; use "
                f"{others(family)}."
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
        local, away, back = family.centred(lam)

        def at(k: Array) -> tuple[Array, Any]:
            return jax.value_and_grad(lambda x: loss(away(family.sample(k, x)), *batch))(local)

        value, gradient = mean_of(at, check_key("pathwise", key), self.samples)
        return value, back(family.gradient_in_lambda(local, gradient))


@dataclasses.dataclass(frozen=True)
class ScoreFunction(Estimator):
    """Covariances of values and statistics; see `score_function`."""

    samples: int
    baseline: str

    def natural_gradient(
        self,
        family: ExponentialFamily,
        loss: Callable,
        key: Array | None,
        lam: NaturalParameters,
        batch: tuple,
    ) -> tuple[Array, NaturalParameters]:
        """F^{-1} mean_s (l_s - b_s) grad_lambda log q(theta_s), the score being T - mu."""
        key = check_key("score_function", key)
        theta, values, local, back = _draw(family, loss, key, lam, batch, self.samples)
        centred = values
        if self.baseline == "mean":  # of the other samples: l_s - b_s = S (l_s - mean l) / (S - 1)
            centred = (values - jnp.mean(values)) * (self.samples / (self.samples - 1))

        def scored(x: Any) -> Array:
            log_q = jax.vmap(lambda one: jnp.sum(family.log_prob(x, one)))(theta)
            return jnp.mean(centred.astype(log_q.dtype) * log_q)

        gradient = family.gradient_in_lambda(local, jax.grad(scored)(local))
        return jnp.mean(values), back(gradient)


@dataclasses.dataclass(frozen=True)
class LeastSquares(Estimator):
    """Regression of values on statistics; see `least_squares`."""

    samples: int

    def natural_gradient(
        self,
        family: ExponentialFamily,
        loss: Callable,
        key: Array | None,
        lam: NaturalParameters,
        batch: tuple,
    ) -> tuple[Array, NaturalParameters]:
        """Return the slope b of l_s ~ a + <b, T_s - mu>, the score of a sample being T_s - mu."""
        key = check_key("least_squares", key)
        theta, values, local, back = _draw(family, loss, key, lam, batch, self.samples)
        to_flat, to_fields = family.coordinates(local)
        score = jax.grad(lambda x, one: jnp.sum(family.log_prob(x, one)))
        t = jax.vmap(lambda one: to_flat(score(local, one)))(theta)  # T - mu
        if self.samples <= t.shape[1] + 1:
            raise ValueError(
                f"least_squares: samples={self.samples} must exceed the {t.shape[1]} statistics of "
                f"the family plus the intercept; use at least {t.shape[1] + 2}."
            )
        # A statistic that differs by its rounding only is one that the draws say nothing about.
        rounding = 4.0 * jnp.finfo(t.dtype).eps * jnp.max(jnp.abs(t), axis=0)
        t = t - jnp.mean(t, axis=0)
        scale = jnp.sqrt(jnp.mean(t * t, axis=0))
        t = jnp.where(scale > rounding, t, 0.0)
        scale = jnp.where(scale > rounding, scale, 1.0)
        centred = (values - jnp.mean(values)).astype(t.dtype)
        slope = jnp.linalg.lstsq(t / scale, centred)[0] / scale
        return jnp.mean(values), back(family.gradient_in_mu(to_fields(slope)))


def closed_form() -> ClosedForm:
    """Differentiate a loss that is known as a function of mu: `loss(mu, *batch) = E_q[l]`.

    For conjugate-exponential models that is variational message passing.

    Source: Khan and Rue (2023), Sec. 5.1; Winn and Bishop (2005). Special case of `blr_update` with
    `estimator=closed_form()`.

    Example:
      >>> import blr_optax as blr
      >>> gradient = blr.estimators.natural_gradient(
      ...     "poisson", lambda mu: 2.0 * mu.linear, blr.estimators.closed_form()
      ... )
      >>> value, g = gradient(None, blr.families.get("poisson").natural(rate=3.0))
      >>> print(value, g.linear)
      6.0 2.0
    """
    return ClosedForm()


def pathwise(samples: int = 10) -> Pathwise:
    """Gradients through samples: F^{-1} mean_s grad_lambda l(theta_s(lambda)), unbiased.

    For every family whose samples carry gradients, by reparameterisation or implicitly.

    Args:
        samples: number of draws.

    Raises:
        ValueError: for samples < 1, or a family whose samples have no gradient.

    Source: Figurnov, Mohamed and Mnih (2018); Salimans and Knowles (2013). Special case of
    `blr_update` with `estimator=pathwise(samples)`.

    Example:
      >>> import jax, blr_optax as blr
      >>> gradient = blr.estimators.natural_gradient(
      ...     "normal", lambda x: 3.0 * x, blr.estimators.pathwise(2000)
      ... )
      >>> lam = blr.families.get("normal").natural(mean=1.0, precision=4.0)
      >>> print(abs(gradient(jax.random.key(0), lam)[1].linear - 3.0) < 0.5)
      True
    """
    return Pathwise(check_samples("pathwise", samples))


def score_function(samples: int = 100, baseline: str = "mean") -> ScoreFunction:
    """Return the score-function estimator: values of the loss only, for any family and any loss.

    grad_lambda E_q[l] = E[(l - b) (T - mu)], unbiased; then times F^{-1}.

    Args:
        samples: number of draws; its standard error falls like 1 / sqrt(samples) and is large.
        baseline: "mean" subtracts from every value the mean of the others (unbiased, at least two
            samples); "none" subtracts nothing.

    Raises:
        ValueError: for samples < 1 (2 with a baseline) or an unknown baseline.

    Source: Khan and Rue (2023), Sec. 2; papers on black-box variational inference. Special case of
    `blr_update` with `estimator=score_function(...)`: black-box natural-gradient descent.

    Example:
      >>> import jax, blr_optax as blr
      >>> gradient = blr.estimators.natural_gradient(
      ...     "poisson", lambda x: 2.0 * x, blr.estimators.score_function(2000)
      ... )
      >>> lam = blr.families.get("poisson").natural(rate=3.0)
      >>> print(abs(gradient(jax.random.key(0), lam)[1].linear - 2.0) < 0.2)
      True
    """
    check_samples("score_function", samples)
    if baseline not in BASELINES:
        raise ValueError(f"score_function: baseline={baseline!r}; known: {', '.join(BASELINES)}.")
    if baseline == "mean" and samples < 2:
        raise ValueError(
            f"score_function: samples={samples} leaves no other sample for baseline='mean'; use at "
            "least 2, or baseline='none'."
        )
    return ScoreFunction(samples, baseline)


def least_squares(samples: int = 100) -> LeastSquares:
    """Regression of the loss on the sufficient statistics: gradient-free, exact for linear losses.

    grad_mu E_q[l] = argmin_b min_a E[(l(theta) - a - <b, T(theta)>)^2], over draws of q.

    The slope of a finite sample is biased by O(1 / samples) (a ratio of moments: its relative size
    is about (number of statistics) / samples times the share of the loss that T does not explain);
    a loss that is linear in T is recovered exactly, at any number of samples.

    Args:
        samples: number of draws; more than the number of statistics plus one.

    Raises:
        ValueError: for too few samples.

    Source: Le Fay, Chopin and Barthelme (2025), "Least squares variational inference". Special case
    of `blr_update` with `estimator=least_squares(...)`.

    Example:
      >>> import jax, blr_optax as blr
      >>> gradient = blr.estimators.natural_gradient(
      ...     "normal", lambda x: 3.0 * x**2 + x, blr.estimators.least_squares(10)
      ... )
      >>> lam = blr.families.get("normal").natural(mean=1.0, precision=2.0)
      >>> print(gradient(jax.random.key(0), lam)[1].quadratic.round(3))
      3.0
    """
    return LeastSquares(check_samples("least_squares", samples))
