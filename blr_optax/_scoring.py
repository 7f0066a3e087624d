"""What the metrics are given: checked where Python may look, wide enough to be summed.

Logits, logarithms and whole predictions are refused where probabilities are wanted. Numbers of half
precision become float32. Labels are counted as int32 at least, since 8 bits do not hold all classes
of many a model; those that are ignored are marked, and so are the ones that no class has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax._validate import concrete

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float, Int

SLACK = 3e-2  # of sums of probabilities, which may have been computed in half precision


def wide(x: ArrayLike) -> Array:
    """Return numbers in float32 or wider: sums in half precision lose their digits."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def probabilities(probs: ArrayLike, *, log: bool = False) -> Float[Array, "*n k"]:
    """Return probabilities, or their logarithms, in float32 or wider.

    Raises:
        ValueError: for a prediction in place of its probabilities, and where Python may look for
            what is no distribution over the last axis.
    """
    for name in ("probabilities", "components", "epistemic", "aleatoric"):
        if hasattr(probs, name) and not hasattr(probs, "dtype"):
            own = "give its .probabilities" if name == "probabilities" else "it has no classes"
            raise ValueError(f"probs is a {type(probs).__name__}; {own}.")
    probs = _array("probs", probs)
    if jnp.ndim(probs) == 0:
        raise ValueError(f"probs={probs!r} has no axis of classes; give one number per class.")
    if concrete(probs):
        _check_values(np.asarray(probs), log)
    return wide(probs)


def _array(name: str, given: ArrayLike) -> ArrayLike:
    """Return what has a shape, such as a list of numbers made an array.

    Raises:
        ValueError: for what is no array of numbers.
    """
    if isinstance(given, (jax.Array, np.ndarray)) and given.dtype != object:
        return given
    if not concrete(given):
        return jnp.asarray(given)
    array = np.asarray(given) if given is not None else None
    if array is None or array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: give numbers in an array; got {type(given).__name__}.")
    return jnp.asarray(array)


def _check_values(probs: np.ndarray, log: bool) -> None:
    x = probs.astype(np.float64 if probs.dtype == np.float64 else np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        p = np.exp(x) if log else x
        outside = (p < 0) | (p > 1.001)
        away = np.abs(p.sum(-1) - 1) > SLACK  # False for NaN, which stays NaN
    if np.any(outside) or np.any(away):
        what = "after exp, since log=True" if log else "being probabilities"
        logs = not log and np.all(x <= 0) and not np.any(np.abs(np.exp(x).sum(-1) - 1) > SLACK)
        fix = "jax.nn.log_softmax(logits)" if log else "jax.nn.softmax(logits)"
        fix = "log=True for nll, or exp of it" if logs else f"of logits, give {fix}"
        if np.any(outside):
            found = f"values between {np.nanmin(x):.3g} and {np.nanmax(x):.3g}"
        else:
            found = f"sums between {np.nanmin(p.sum(-1)):.3g} and {np.nanmax(p.sum(-1)):.3g}"
        raise ValueError(
            f"probs must be in [0, 1] and sum to one over the last axis, {what}; "
            f"got {found} ({fix})."
        )


class Labelled(NamedTuple):
    """Predictions of which the right class is known."""

    probs: Float[Array, "*n k"]
    labels: Int[Array, "*n"]  # a class, also where there is none
    used: Bool[Array, "*n"]  # not ignored
    known: Bool[Array, "*n"]  # ignored, or the label of a class
    weights: Float[Array, "*n"] | None  # 0 where ignored

    def scores(self, scores: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Return scores of examples, NaN where there is none; weighted, so that their mean is.

        With weights, ``score w / mean(w)`` and 0 where ignored.
        """
        scores = jnp.where(self.known, scores, jnp.nan)
        if self.weights is None:
            return jnp.where(self.used, scores, jnp.nan)
        counted = jnp.where(self.weights > 0, scores, 0.0)
        return counted * (self.weights / jnp.mean(self.weights))

    def mass(self) -> Array:
        """Return how much every example counts: its weight, or 1 or 0 as integers."""
        return self.used.astype(int) if self.weights is None else self.weights

    def flat(self) -> Labelled:
        """Return the same, as one batch."""
        axes = self.labels.ndim
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), self)


def labelled(
    probs: ArrayLike,
    labels: ArrayLike,
    ignore_index: int | None = None,
    weights: ArrayLike | None = None,
    *,
    log: bool = False,
    logits: bool = False,
) -> Labelled:
    """Return predictions with their labels, checked.

    Raises:
        ValueError: as `probabilities`; for labels of another shape or type, or of no class; for
            weights that are negative or of another shape.
    """
    probs = wide(_array("logits", probs)) if logits else probabilities(probs, log=log)
    labels = jnp.asarray(_array("labels", labels))
    if labels.shape != probs.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        need = f"integer classes of shape {probs.shape[:-1]} (from one-hot: labels.argmax(-1))"
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}; give {need}.")
    k = probs.shape[-1]
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    used = jnp.ones(labels.shape, bool) if ignore_index is None else labels != ignore_index
    known = ~used | ((labels >= 0) & (labels < k))
    if concrete(known) and not np.all(np.asarray(known)):
        wrong = np.unique(np.asarray(labels)[~np.asarray(known)])[:5].tolist()
        raise ValueError(
            f"labels hold {wrong}, which are none of the {k} classes 0 to {k - 1}; if they mark "
            f"examples without a label, give ignore_index={wrong[0]}."
        )
    labels = jnp.clip(labels, 0, k - 1)
    if weights is not None:
        weights = jnp.where(used, example_weights(weights, labels.shape), 0.0)
    return Labelled(probs, labels, used, known, weights)


def example_weights(weights: ArrayLike, shape: tuple[int, ...]) -> Float[Array, "*n"]:
    """Return weights of examples in float32 or wider.

    Raises:
        ValueError: for weights of another shape, or negative ones.
    """
    weights = wide(weights)
    if weights.shape != shape:
        raise ValueError(f"weights have shape {weights.shape}; give one per example, {shape}.")
    if concrete(weights) and np.any(np.asarray(weights) < 0):
        raise ValueError("weights must not be negative; 0 leaves an example out.")
    return weights


class Scored(NamedTuple):
    """Scores of a detector, what is to be detected, and how much every entry counts."""

    scores: Array
    positive: Bool[Array, " n"]
    mass: Array

    def unless_nan(self, value: Array) -> Array:
        """Return NaN where a score that counts has no value."""
        return jnp.where(jnp.any(jnp.isnan(self.scores) & (self.mass > 0)), jnp.nan, value)


def scored(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike | None) -> Scored:
    """Return scores with the truths, flat, checked.

    Raises:
        ValueError: for different sizes, and truths that are neither true or false nor 0 or 1.
    """
    scores = jnp.ravel(_array("scores", scores))
    positive = jnp.ravel(_array("positive", positive))
    if scores.shape != positive.shape:
        raise ValueError(f"positive has {positive.size} entries, scores {scores.size}; pair them.")
    if concrete(positive) and not np.all(np.isin(np.asarray(positive), (0, 1))):
        raise ValueError(
            "positive must be true or false, or 1 or 0; of classes, say which is the positive one, "
            "labels == k."
        )
    if weights is None:
        return Scored(scores, positive.astype(bool), jnp.ones(scores.shape, int))
    return Scored(scores, positive.astype(bool), example_weights(jnp.ravel(weights), scores.shape))


def fit_temperature(given: Labelled) -> Array:
    """Return the T > 0 at which the log-likelihood of softmax(logits / T) is largest.

    Its derivative in 1 / T, the mean of ``z_label - E_p[z]``, falls: bisection of log T.
    """
    given = given.flat()
    z = given.probs - jnp.max(given.probs, -1, keepdims=True)
    right = jnp.take_along_axis(z, given.labels[:, None], -1)[:, 0]
    mass = given.mass().astype(z.dtype)

    def slope(log_t: Array) -> Array:
        p = jax.nn.softmax(z * jnp.exp(-log_t))
        terms = right - jnp.sum(jnp.where(p > 0, p * z, 0.0), -1)
        return jnp.sum(jnp.where(mass > 0, mass * terms, 0.0))

    low, high = (jnp.asarray(x, z.dtype) for x in (-LOG_RANGE, LOG_RANGE))
    found = (slope(low) < 0) & (slope(high) > 0) & jnp.all(given.known)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        warmer = slope(middle) < 0  # too sure at this temperature
        return jnp.where(warmer, middle, low), jnp.where(warmer, high, middle)

    low, high = jax.lax.fori_loop(0, 60, halve, (low, high))
    return jnp.where(found, jnp.exp(0.5 * (low + high)), jnp.nan)


LOG_RANGE = 7.0  # temperatures from 1e-3 to 1e3
