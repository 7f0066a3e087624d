"""How good, how calibrated and how uncertain are probabilistic predictions?

Scores of one example (`nll`, `brier`, `entropy`, ...) are returned per example, as optax's losses
are: take ``.mean()``. What only a set has (`accuracy`, `calibration`, `auroc`, ...) is one number,
with its per-bin data beside it. All are pure functions of arrays, in their dtype (float32 for half
precision), jit-able with keyword arguments static. What has no value is NaN, and nothing is
clipped. Logits in place of probabilities are refused outside `jit`.

What takes labels takes two more: `ignore_index`, the label of examples that have none (padding),
and `weights`, how much every example counts, 0 or more. Of a score per example an ignored one is
NaN; with `weights` it is ``score w / mean(w)``, 0 where ignored, so that its ``.mean()`` is the
weighted mean.

Above 500 lines: short functions with a number to check each, under the one name that users import.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import stats
from jax.scipy.special import erf, ndtri

from blr_optax._scoring import (
    Labelled,
    Scored,
    example_weights,
    fit_temperature,
    labelled,
    probabilities,
    scored,
    wide,
)
from blr_optax._validate import check_whole, require

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float, Int

    from blr_optax._typing import AnyArray

    # What is given: anything that jax makes an array of. n is a batch, or a batch of pixels.
    Probs = Float[ArrayLike, "*n k"]  # probabilities of k classes
    Labels = Int[ArrayLike, "*n"]  # the class of each example
    Reals = Float[ArrayLike, "*n"]  # one number per example
    Truths = Bool[ArrayLike, "*n"] | Int[ArrayLike, "*n"]  # one truth, or 0 or 1, per example
    # How much an example counts: a number, how often it occurs, or whether it does.
    Weights = Float[ArrayLike, "*n"] | Int[ArrayLike, "*n"] | Bool[ArrayLike, "*n"]
    Numbers = Float[ArrayLike, "*#n"]  # one number per example, or one for all

    # What is returned.
    Scores = Float[Array, "*n"]  # one number per example
    Scalar = Float[Array, ""]


__all__ = [
    "Calibration",
    "EntropySplit",
    "OperatingPoint",
    "Regression",
    "accuracy",
    "adaptive_calibration",
    "auroc",
    "average_precision",
    "brier",
    "calibration",
    "classwise_calibration",
    "correct",
    "entropy",
    "entropy_split",
    "fpr_at_tpr",
    "gaussian_crps",
    "gaussian_nll",
    "gaussian_pit",
    "in_vs_out",
    "nll",
    "regression",
    "split_means",
    "temperature",
]


def correct(probs: Probs, labels: Labels, *, ignore_index: int | None = None) -> Bool[Array, "*n"]:
    """Whether the most probable class, the first one on ties, is the label; per example.

    False where a probability is NaN, and where the label is ignored.

    >>> correct(jnp.array([[0.9, 0.1], [0.5, 0.5]]), jnp.array([0, 1])).tolist()
    [True, False]
    """
    return _correct(labelled(probs, labels, ignore_index))


def _correct(given: Labelled) -> Bool[Array, "*n"]:
    hit = (given.probs.argmax(-1) == given.labels) & given.used & given.known
    return hit & ~jnp.any(jnp.isnan(given.probs), -1)


def accuracy(
    probs: Probs,
    labels: Labels,
    *,
    ignore_index: int | None = None,
    weights: Weights | None = None,
) -> Scalar:
    """Fraction of examples whose most probable class is the label.

    >>> float(accuracy(jnp.array([[0.9, 0.1], [0.5, 0.5]]), jnp.array([0, 1])))
    0.5
    """
    given = labelled(probs, labels, ignore_index, weights)
    mass, hit, dtype = given.mass(), _correct(given), given.probs.dtype
    share = jnp.sum(mass * hit).astype(dtype) / jnp.sum(mass).astype(dtype)
    missing = jnp.any(jnp.isnan(given.probs), -1) | ~given.known
    return jnp.where(jnp.any(missing & (mass > 0)), jnp.nan, share)


def nll(
    probs: Probs,
    labels: Labels,
    *,
    log: bool = False,
    ignore_index: int | None = None,
    weights: Weights | None = None,
) -> Scores:
    """Negative log-likelihood ``-log p[label]`` in nats, per example.

    Args:
        probs: Probabilities, or their logarithms if `log`; never logits.
        labels: Integer classes.
        log: Whether `probs` holds log-probabilities (static). They stay finite where a probability
            underflows to 0 and its NLL is infinite.
        ignore_index: Label of examples without one (static).
        weights: How much every example counts.

    >>> nll(jnp.array([[0.5, 0.5], [1.0, 0.0]]), jnp.array([0, 1])).tolist()
    [0.6931..., inf]
    """
    given = labelled(probs, labels, ignore_index, weights, log=log)
    p = jnp.take_along_axis(given.probs, given.labels[..., None], axis=-1)[..., 0]
    return given.scores(-p if log else -jnp.log(p))


def brier(
    probs: Probs,
    labels: Labels,
    *,
    ignore_index: int | None = None,
    weights: Weights | None = None,
) -> Scores:
    """Brier score ``sum_k (p_k - 1[k = label])^2``, between 0 and 2, per example.

    For two classes this is twice the binary score ``(p_1 - label)^2``.

    >>> round(float(brier(jnp.array([0.8, 0.2]), jnp.array(0))), 6)  # 0.2^2 + 0.2^2
    0.08
    """
    given = labelled(probs, labels, ignore_index, weights)
    target = jax.nn.one_hot(given.labels, given.probs.shape[-1], dtype=given.probs.dtype)
    return given.scores(jnp.sum((given.probs - target) ** 2, axis=-1))


def temperature(
    logits: Float[ArrayLike, "*n k"],
    labels: Labels,
    *,
    ignore_index: int | None = None,
    weights: Weights | None = None,
) -> Scalar:
    """Fit the T for which softmax(logits / T) is most likely, on held-out examples.

    One number, which changes no decision: above 1 the model was too sure. `logits` may be
    log-probabilities, such as those of an average. NaN where the likelihood has no maximum, as for
    labels that are all predicted, whatever T. Source: Guo et al. (2017), arXiv:1706.04599.

    >>> logits = jnp.log(jnp.array([[0.9, 0.1]] * 4))  # 9 : 1, and right in 3 of 4
    >>> round(float(temperature(logits, jnp.array([0, 0, 0, 1]))), 3)  # log 9 / log 3
    2.0
    """
    return fit_temperature(labelled(logits, labels, ignore_index, weights, logits=True))


def entropy(probs: Probs) -> Scores:
    """Entropy ``-sum_k p_k log p_k`` in nats with ``0 log 0 = 0``, per example.

    The gradient at ``p_k = 0`` is set to 0, its limit behind a softmax that underflowed.

    >>> entropy(jnp.array([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [0.6931..., 0.0]
    """
    return _entropy(probabilities(probs))


def _entropy(probs: Array) -> Array:
    return jnp.sum(-probs * jnp.log(jnp.where(probs == 0, 1, probs)), axis=-1)


class EntropySplit(NamedTuple):
    """Entropy of the averaged prediction and its two parts, in nats, per example."""

    total: Scores
    aleatoric: Scores
    epistemic: Scores


def entropy_split(sample_probs: Float[ArrayLike, "s *n k"], *, axis: int = 0) -> EntropySplit:
    """Split predictive entropy into noise in the data and disagreement between weight samples.

    ``total = H(mean_s p_s)``, ``aleatoric = mean_s H(p_s)`` and ``epistemic = total - aleatoric``,
    the mutual information of label and weights (BALD, never negative); the samples ``s`` lie along
    `axis` (static). `blr_optax.predict` needs no stored samples. Houlsby et al., arXiv:1112.5745.

    >>> split = entropy_split(jnp.array([[1.0, 0.0], [0.0, 1.0]]))  # certain, and opposed
    >>> [round(float(part), 4) for part in split]
    [0.6931, 0.0, 0.6931]
    """
    sample_probs = probabilities(sample_probs)
    if axis % sample_probs.ndim == sample_probs.ndim - 1:
        raise ValueError(f"axis={axis} is the axis of the classes; give the axis of the samples.")
    return split_means(sample_probs.mean(axis), _entropy(sample_probs).mean(axis))


def split_means(probs: Probs, aleatoric: Scores) -> EntropySplit:
    """`entropy_split` given the sample means of the probabilities and of their entropies.

    >>> split = split_means(jnp.array([0.5, 0.5]), jnp.array(0.2))  # log 2 in all
    >>> [round(float(part), 3) for part in split]
    [0.693, 0.2, 0.493]
    """
    total = _entropy(wide(probs))
    # Jensen makes the difference non-negative; rounding can leave it an ulp below zero.
    return EntropySplit(total, aleatoric, jnp.maximum(total - aleatoric, 0))


class Calibration(NamedTuple):
    """Calibration errors and the bins they come from; an empty bin holds zeros.

    With ``gap = |confidence - accuracy|`` of a bin, `ece` is its mean over examples, `mce` its
    maximum over bins and `rms` the root of the mean of its square over examples.
    """

    ece: Float[Array, "*k"]
    mce: Float[Array, "*k"]
    rms: Float[Array, "*k"]
    edges: Float[Array, "*k bins+1"]
    count: Int[Array, "*k bins"]
    confidence: Float[Array, "*k bins"]
    accuracy: Float[Array, "*k bins"]


def calibration(
    probs: Probs,
    labels: Labels,
    *,
    bins: int = 15,
    closed: Literal["left", "right"] = "left",
    ignore_index: int | None = None,
    weights: Weights | None = None,
) -> Calibration:
    """Return the calibration errors of the most probable class, in bins of equal width.

    Args:
        probs: Probabilities.
        labels: Integer classes.
        bins: Number ``n`` of bins of equal width on [0, 1] (static).
        closed: Which bin owns a confidence exactly on an edge (static). "left": ``[k/n, (k+1)/n)``,
            with 1 in the last bin, that is ``floor(n p)``. "right": ``(k/n, (k+1)/n]``, with 0 in
            the first, that is ``ceil(n p) - 1``: Guo et al. (2017), arXiv:1706.04599.
        ignore_index: Label of examples without one, which are left out (static).
        weights: How much every example counts; `count` stays a number of examples.

    >>> probs = jnp.array([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.5, 0.5]])
    >>> c = calibration(probs, jnp.array([0, 0, 1, 0]), bins=4)
    >>> c.count.tolist(), c.confidence.tolist()
    ([0, 0, 1, 3], [0.0, 0.0, 0.5, 0.75])
    >>> round(float(c.ece), 4)  # 1/4 |0.5 - 1| + 3/4 |0.75 - 2/3|
    0.1875
    """
    given = labelled(probs, labels, ignore_index, weights).flat()
    return _equal_width(given, given.probs.max(-1), _correct(given), bins, closed)


def classwise_calibration(
    probs: Probs,
    labels: Labels,
    *,
    bins: int = 15,
    closed: Literal["left", "right"] = "left",
    ignore_index: int | None = None,
    weights: Weights | None = None,
) -> Calibration:
    """Calibration of every class's probability against how often that class occurs.

    Every field has a leading axis over classes, and `accuracy` is the frequency of the class; the
    classwise ECE is ``.ece.mean()``. Arguments as in `calibration`. Source: Kull et al. (2019),
    arXiv:1910.12656.

    >>> probs = jnp.array([[0.75, 0.25], [0.75, 0.25]])
    >>> classwise_calibration(probs, jnp.array([0, 1]), bins=4).ece.tolist()  # both 0.75 - 0.5
    [0.25, 0.25]
    """
    given = labelled(probs, labels, ignore_index, weights).flat()
    columns = given.probs.T
    occurs = given.labels == jnp.arange(len(columns))[:, None]
    return jax.vmap(lambda p, y: _equal_width(given, p, y, bins, closed))(columns, occurs)


def adaptive_calibration(
    probs: Probs,
    labels: Labels,
    *,
    bins: int = 15,
    ignore_index: int | None = None,
    weights: Weights | None = None,
) -> Calibration:
    """Calibration of the most probable class in bins of equal mass.

    Examples are sorted by confidence (stably) and cut into `bins` groups of sizes that differ by
    one at most, the larger first (`numpy.array_split`). ``edges[k]`` is the smallest confidence of
    group ``k``, ``edges[-1]`` the largest of all. Source: Nixon et al. (2019), arXiv:1904.01685.

    >>> probs = jnp.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    >>> c = adaptive_calibration(probs, jnp.array([0, 0, 0]), bins=2)
    >>> c.edges.tolist(), c.count.tolist(), float(c.ece)  # (2 * 0.375 + 1 * 0) / 3
    ([0.5, 1.0, 1.0], [2, 1], 0.25)
    """
    require("bins", check_whole("bins", bins), "at least 1", lambda n: n >= 1)
    given = labelled(probs, labels, ignore_index, weights).flat()
    counts = given.mass() > 0
    # Those that count come first, by confidence; the first n % bins groups have one more.
    ranks = jnp.nan_to_num(given.probs.max(-1), nan=-1.0)
    order = jnp.argsort(jnp.where(counts, ranks, jnp.inf), stable=True)
    given = jax.tree.map(lambda x: x[order], given)
    n, i = jnp.sum(counts), jnp.arange(len(order))
    least, more = n // bins, n % bins
    longer = more * (least + 1)
    after = more + (i - longer) // jnp.maximum(least, 1)
    index = jnp.where(i < longer, i // (least + 1), after)
    k = jnp.arange(bins + 1)
    starts = jnp.clip(k * least + jnp.minimum(k, more), 0, jnp.maximum(n - 1, 0))
    confidence = given.probs.max(-1)
    edges = confidence[starts] if len(order) else jnp.full(bins + 1, jnp.nan, confidence.dtype)
    return _binned(given, confidence, _correct(given), index, edges)


def _equal_width(
    given: Labelled, confidence: Array, outcome: Array, bins: int, closed: str
) -> Calibration:
    require("bins", check_whole("bins", bins), "at least 1", lambda n: n >= 1)
    if closed not in ("left", "right"):
        raise ValueError(f'closed={closed!r} is not a bin convention; use "left" or "right".')
    index = jnp.floor(confidence * bins) if closed == "left" else jnp.ceil(confidence * bins) - 1
    index = jnp.clip(index.astype(int), 0, bins - 1)
    edges = jnp.linspace(0, 1, bins + 1, dtype=confidence.dtype)
    return _binned(given, confidence, outcome, index, edges)


def _binned(
    given: Labelled, confidence: Array, outcome: Array, index: Array, edges: Array
) -> Calibration:
    """Return the errors and the bin data when example ``i`` lies in bin ``index[i]``."""
    bins, dtype, mass = len(edges) - 1, confidence.dtype, given.mass()
    counts = mass > 0
    confidence = jnp.where(given.known, confidence, jnp.nan)
    count, size, hits, total = (
        jax.ops.segment_sum(jnp.where(counts, x, 0), jnp.asarray(index), bins)
        for x in (counts.astype(int), mass, mass * outcome, mass * confidence)
    )
    inside = jnp.where(size > 0, size, 1).astype(dtype)
    gap = jnp.abs(total / inside - hits / inside)
    weight = size.astype(dtype) / jnp.sum(size).astype(dtype)  # NaN where nothing counts
    ece, rms = jnp.sum(weight * gap), jnp.sqrt(jnp.sum(weight * gap**2))
    mce = jnp.where(jnp.sum(size) > 0, gap.max(), jnp.nan)
    return Calibration(ece, mce, rms, edges, count, total / inside, hits / inside)


def in_vs_out(
    inside: Float[ArrayLike, "*n"], outside: Float[ArrayLike, "*m"]
) -> tuple[Float[Array, " s"], Bool[Array, " s"]]:
    """Join the scores of two sets into the ``(scores, positive)`` of `auroc` and its neighbours.

    Correct against wrong needs no joining: ``auroc(probs.max(-1), correct(probs, labels))``.

    >>> float(auroc(*in_vs_out(jnp.array([0.9, 0.6]), jnp.array([0.6]))))  # one win, one tie
    0.75
    """
    scores = jnp.concatenate([jnp.ravel(inside), jnp.ravel(outside)])
    return scores, jnp.arange(scores.size) < jnp.size(inside)


def auroc(scores: Reals, positive: Truths, *, weights: Weights | None = None) -> Scalar:
    """Probability that a positive scores above a negative, a tie counting one half.

    >>> float(auroc(jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1])))
    0.75
    """
    given = scored(scores, positive, weights)
    negatives = given.mass * ~given.positive
    below, upto = _ranks(given.scores, negatives)
    wins = wide((below + upto) / (2 * jnp.sum(negatives)))
    return given.unless_nan(_mean_of_positives(given, wins))


def average_precision(scores: Reals, positive: Truths, *, weights: Weights | None = None) -> Scalar:
    """Area under the precision-recall steps, ``sum_k (R_k - R_{k-1}) P_k`` (as scikit-learn).

    Computed as the mean over positives of the precision at their own score. With the other class as
    the positive one: ``average_precision(-scores, ~positive)``.

    >>> ap = average_precision(jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1]))
    >>> round(float(ap), 4)  # (1/1 + 2/3) / 2
    0.8333
    """
    given = scored(scores, positive, weights)
    positives = given.mass * given.positive
    hits = jnp.sum(positives) - _ranks(given.scores, positives)[0]
    found = jnp.sum(given.mass) - _ranks(given.scores, given.mass)[0]
    return given.unless_nan(_mean_of_positives(given, wide(hits / found)))


def _mean_of_positives(given: Scored, values: Array) -> Array:
    """Return the weighted mean over the positives, NaN without any."""
    mass = (given.mass * given.positive).astype(values.dtype)
    return jnp.sum(jnp.where(mass > 0, mass * values, 0.0)) / jnp.sum(mass)


class OperatingPoint(NamedTuple):
    """False-positive rate of a detector, and the threshold at or above which it says positive."""

    fpr: Scalar
    threshold: Scalar


def fpr_at_tpr(
    scores: Reals, positive: Truths, *, tpr: float = 0.95, weights: Weights | None = None
) -> OperatingPoint:
    """False-positive rate at the highest threshold that finds a fraction `tpr` of the positives.

    The threshold is the ``ceil(tpr n)``-th largest of the ``n`` positive scores; `tpr` is static.
    (Code descending from ODIN averages over all thresholds that find fewer: not this number.)

    >>> point = fpr_at_tpr(jnp.array([1.0, 2.0, 3.0, 1.5, 0.5]), jnp.array([1, 1, 1, 0, 0]))
    >>> float(point.threshold), float(point.fpr)  # finding all three lets 1.5 through, not 0.5
    (1.0, 0.5)
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr={tpr} is not a fraction of the positives; give one in (0, 1].")
    given = scored(scores, positive, weights)
    scores, positive, mass = given
    if weights is not None:
        order = jnp.argsort(scores, descending=True)
        found = jnp.cumsum((mass * positive)[order])
        n, enough = found[-1], found >= tpr * found[-1] * (1 - 4 * jnp.finfo(found.dtype).eps)
        threshold = scores[order][jnp.argmax(enough)]
        negatives = mass * ~positive
        fpr = jnp.sum(negatives * (scores >= threshold)) / jnp.sum(negatives)
        fpr = given.unless_nan(jnp.where(n > 0, fpr, jnp.nan))
        return OperatingPoint(fpr, given.unless_nan(wide(threshold)))
    # ceil(tpr n) in integers: a float32 product may round to the other side of the ceiling.
    share, n = Fraction(str(tpr)).limit_denominator(10_000), jnp.sum(positive)
    whole, rest = jnp.divmod(n, share.denominator)
    needed = share.numerator * whole - (-share.numerator * rest) // share.denominator
    threshold = jnp.sort(jnp.where(positive, scores, -jnp.inf), descending=True)[needed - 1]
    above = (scores >= threshold).astype(wide(scores).dtype)
    fpr = given.unless_nan(jnp.mean(above, where=~positive))
    return OperatingPoint(jnp.where(n > 0, fpr, jnp.nan), given.unless_nan(wide(threshold)))


def _ranks(scores: AnyArray, member: AnyArray) -> tuple[Array, Array]:
    """For each score, how much of `member` lies strictly below it, and at or below it."""
    order = jnp.argsort(scores)
    ranked = jnp.concatenate([jnp.zeros(1, member.dtype), jnp.cumsum(member[order])])
    below, upto = (jnp.searchsorted(scores[order], scores, side=s) for s in ("left", "right"))
    return ranked[below], ranked[upto]


def gaussian_nll(mean: Numbers, std: Numbers, targets: Numbers) -> Float[Array, "*#n"]:
    """Negative log-density ``log(2 pi std^2)/2 + (target - mean)^2/(2 std^2)``, per example.

    >>> round(float(gaussian_nll(0.0, 1.0, 0.0)), 4)  # log(2 pi) / 2
    0.9189
    """
    mean, std, targets = map(wide, (mean, std, targets))
    return -stats.norm.logpdf(targets, mean, std)


def gaussian_crps(mean: Numbers, std: Numbers, targets: Numbers) -> Float[Array, "*#n"]:
    """Continuous ranked probability score ``int (F(t) - 1[t >= target])^2 dt``, per example.

    ``std (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi))`` with ``z = (target - mean) / std``, in the
    unit of the target; smaller is better. Source: Gneiting & Raftery (2007), equation 21.

    >>> round(float(gaussian_crps(0.0, 1.0, 0.0)), 4)  # (sqrt(2) - 1) / sqrt(pi)
    0.2337
    """
    mean, std, targets = map(wide, (mean, std, targets))
    z = (targets - mean) / std
    return std * (z * erf(z / np.sqrt(2)) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))


def gaussian_pit(mean: Numbers, std: Numbers, targets: Numbers) -> Float[Array, "*#n"]:
    """Probability integral transform ``F(target)``, per example; uniform if the model is right.

    >>> float(gaussian_pit(0.0, 1.0, 0.0))
    0.5
    """
    return stats.norm.cdf(*map(wide, (targets, mean, std)))


class Regression(NamedTuple):
    """Scores of Gaussian predictions: means over the examples, and central intervals by level.

    `chi2` is the mean of ``z^2`` (1 if the spread is right), `sharpness` that of ``std``. Intervals
    ``mean +- q std`` of probability `levels` hold the fraction `coverage`; `width` is their mean.
    """

    nll: Scalar
    rmse: Scalar
    mae: Scalar
    crps: Scalar
    chi2: Scalar
    sharpness: Scalar
    levels: Float[Array, " l"]
    coverage: Float[Array, " l"]
    width: Float[Array, " l"]


def regression(
    mean: Numbers,
    std: Numbers,
    targets: Numbers,
    *,
    levels: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95),
    weights: Weights | None = None,
) -> Regression:
    """Accuracy, likelihood, coverage and sharpness of Gaussian predictions (`std` with the noise).

    With `weights`, all means are weighted; examples of weight 0 are left out.

    >>> r = regression(jnp.zeros(2), jnp.ones(2), jnp.array([0.5, -3.0]), levels=(0.95,))
    >>> float(r.mae), float(r.coverage[0]), round(float(r.width[0]), 2)  # 2 * 1.96
    (1.75, 0.5, 3.92)
    """
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels={levels} are not probabilities; give fractions, not percent.")
    for name in ("mean", "epistemic"):
        if hasattr(mean, name) and not hasattr(mean, "dtype"):
            raise ValueError(
                f"mean is a {type(mean).__name__}, p; give p.mean and p.variance ** 0.5."
            )
    require("std", std, "at least zero, a standard deviation", lambda s: ~(s < 0))
    mean, std, targets = jnp.broadcast_arrays(*map(wide, (mean, std, targets)))
    error, z = targets - mean, (targets - mean) / std
    fractions = jnp.asarray(levels, z.dtype)
    q = ndtri((1 + fractions) / 2)
    mass = jnp.ones(z.shape, z.dtype) if weights is None else example_weights(weights, z.shape)

    def average(x: Array) -> Array:
        """Over the examples, which may be several axes; NaN without any."""
        if weights is None:
            return jnp.mean(x, axis=tuple(range(-z.ndim, 0)))
        total = jnp.sum(jnp.where(mass > 0, mass * x, 0.0), axis=tuple(range(-z.ndim, 0)))
        return total / jnp.sum(mass)

    inside = jnp.abs(z) <= q.reshape(-1, *[1] * z.ndim)
    return Regression(
        nll=average(gaussian_nll(mean, std, targets)),
        rmse=jnp.sqrt(average(error**2)),
        mae=average(jnp.abs(error)),
        crps=average(gaussian_crps(mean, std, targets)),
        chi2=average(z**2),
        sharpness=average(std),
        levels=fractions,
        coverage=average(jnp.where(jnp.isnan(z), jnp.nan, inside.astype(z.dtype))),
        width=2 * q * average(std),
    )
