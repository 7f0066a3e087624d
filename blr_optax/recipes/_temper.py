"""After training: how wide the posterior should be, and whether to average at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from blr_optax._distribution import Distribution, check_distribution
from blr_optax._ensemble import Ensemble, ensemble

if TYPE_CHECKING:
    from jaxtyping import Array, Float

SCALES = (0.0, 0.3, 0.5, 0.7, 1.0, 1.4)


class Tempered(NamedTuple):
    """A posterior whose width was chosen on validation data.

    Attributes:
        posterior: to predict with: q with its deviations times `scale`, or at 0 the mean alone.
        scale: the chosen one.
        scores: of every scale, in the order in which they were given.
    """

    posterior: Distribution | Ensemble
    scale: float
    scores: dict[float, float]


def scaled(q: Distribution, scale: float) -> Distribution | Ensemble:
    """Return q with its deviations times `scale`; at 0 the mean alone.

    Raises:
        ValueError: for a posterior that has no powers.
    """
    if scale == 0:
        return ensemble([q.mean])
    try:
        return q ** (1.0 / scale**2)
    except ValueError as error:
        raise ValueError(
            f"temper: a posterior of {q.family} has no powers ({error}). Those of ivon, vogn, "
            "bsam, adam and sgd have; of others compare the mean with q by hand."
        ) from error


def temper(
    q: Distribution,
    score: Callable[[Distribution | Ensemble], Float[Array, ""] | float],
    *,
    scales: Sequence[float] = SCALES,
) -> Tempered:
    """Choose a posterior's width on validation data: q^(1 / scale^2), or its mean alone.

    A posterior at temperature 1 is right about weights, and often too wide for labels that people
    have agreed on. One number mends that, and the same comparison tells whether to average at all.

    Args:
        q: a posterior with powers: an exponential family's, as of `ivon`, `vogn`, `bsam`; not of
            `evon` and `mixture_ivon`.
        score: of what predicts, on validation data; lower is better. It gets q at other widths, for
            `predict` or `predict_regression`.
        scales: of the deviations; 0 is the mean alone, 1 is q.

    Returns:
        A `Tempered`.

    Raises:
        ValueError: for negative scales, none, posteriors whose powers are none, or scores of which
            none is finite.

    Source: Wenzel et al. (2020), How good is the Bayes posterior in deep neural networks really?

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> q = blr.distribution("normal", mean=jnp.ones(2), precision=jnp.full(2, 4.0))
      >>> x, y = jnp.array([[1.0, 2.0], [-2.0, 1.0], [0.5, -2.0]]), jnp.array([1, 0, 0])
      >>> def score(q):
      ...     p = blr.predict(0, q, lambda w, x: x @ w, x, link=blr.binary_link)
      ...     return blr.metrics.nll(p.probabilities, y).mean()
      >>> found = blr.recipes.temper(q, score)
      >>> print(found.scale)
      0.0
    """
    check_distribution("temper: q", q)
    if len(scales) == 0 or any(not np.isfinite(s) or s < 0 for s in scales):
        raise ValueError(f"temper: scales={scales!r} must be numbers of at least 0.")
    scores = {float(s): float(score(scaled(q, s))) for s in scales}
    finite = {s: found for s, found in scores.items() if np.isfinite(found)}
    if not finite:
        raise ValueError(f"temper: no score is finite: {scores}.")
    best = min(finite, key=lambda s: finite[s])
    return Tempered(scaled(q, best), best, scores)
