"""How good, how calibrated and how uncertain are probabilistic predictions?

Scores of one example (`nll`, `brier`, `entropy`, ...) are returned per example, as optax's losses
are: take ``.mean()``. What only a set has (`accuracy`, `calibration`, `auroc`, ...) is one number,
with its per-bin data beside it. All are pure functions of arrays, in their dtype, jit-able with
keyword arguments static. What has no value is NaN, and nothing is clipped.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import stats
from jax.scipy.special import erf, ndtri

from blr_optax._validate import require

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float, Int

    # What is given: anything that jax makes an array of. n is a batch, or a batch of pixels.
    Probs = Float[ArrayLike, "*n k"]  # probabilities of k classes
    Labels = Int[ArrayLike, "*n"]  # the class of each example
    Reals = Float[ArrayLike, "*n"]  # one number per example
    Truths = Bool[ArrayLike, "*n"] | Int[ArrayLike, "*n"]  # one truth, or 0 or 1, per example
    Numbers = Float[ArrayLike, "*#n"]  # one number per example, or one for all

    # What is returned.
    Scores = Float[Array, "*n"]  # one number per example
    Scalar = Float[Array, ""]


def correct(probs: Probs, labels: Labels) -> Bool[Array, "*n"]:
    """Whether the most probable class, the first one on ties, is the label; per example.

    >>> correct(jnp.array([[0.9, 0.1], [0.5, 0.5]]), jnp.array([0, 1])).tolist()
    [True, False]
    """
    probs, labels = _examples(probs, labels)
    return probs.argmax(-1) == labels


def accuracy(probs: Probs, labels: Labels) -> Scalar:
    """Fraction of examples whose most probable class is the label.

    >>> float(accuracy(jnp.array([[0.9, 0.1], [0.5, 0.5]]), jnp.array([0, 1])))
    0.5
    """
    return jnp.mean(correct(probs, labels), dtype=jnp.asarray(probs).dtype)


def nll(probs: Probs, labels: Labels, *, log: bool = False) -> Scores:
    """Negative log-likelihood ``-log p[label]`` in nats, per example.

    Args:
        probs: Probabilities, or their logarithms if `log`; never logits.
        labels: Integer classes.
        log: Whether `probs` holds log-probabilities (static). They stay finite where a probability
            underflows to 0 and its NLL is infinite.

    >>> nll(jnp.array([[0.5, 0.5], [1.0, 0.0]]), jnp.array([0, 1])).tolist()
    [0.6931..., inf]
    """
    probs, labels = _examples(probs, labels)
    p = jnp.take_along_axis(probs, labels[..., None], axis=-1)[..., 0]
    return -p if log else -jnp.log(p)


def brier(probs: Probs, labels: Labels) -> Scores:
    """Brier score ``sum_k (p_k - 1[k = label])^2``, between 0 and 2, per example.

    For two classes this is twice the binary score ``(p_1 - label)^2``.

    >>> round(float(brier(jnp.array([0.8, 0.2]), jnp.array(0))), 6)  # 0.2^2 + 0.2^2
    0.08
    """
    probs, labels = _examples(probs, labels)
    target = jax.nn.one_hot(labels, probs.shape[-1], dtype=probs.dtype)
    return jnp.sum((probs - target) ** 2, axis=-1)


def entropy(probs: Probs) -> Scores:
    """Entropy ``-sum_k p_k log p_k`` in nats with ``0 log 0 = 0``, per example.

    The gradient at ``p_k = 0`` is set to 0, its limit behind a softmax that underflowed.

    >>> entropy(jnp.array([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [0.6931..., 0.0]
    """
    probs = _wide(probs)
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
    sample_probs = jnp.asarray(sample_probs)
    if axis % sample_probs.ndim == sample_probs.ndim - 1:
        raise ValueError(f"axis={axis} is the axis of the classes; give the axis of the samples.")
    return split_means(sample_probs.mean(axis), entropy(sample_probs).mean(axis))


def split_means(probs: Probs, aleatoric: Scores) -> EntropySplit:
    """`entropy_split` given the sample means of the probabilities and of their entropies."""
    total = entropy(probs)
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
    probs: Probs, labels: Labels, *, bins: int = 15, closed: Literal["left", "right"] = "left"
) -> Calibration:
    """Return the calibration errors of the most probable class, in bins of equal width.

    Args:
        probs: Probabilities.
        labels: Integer classes.
        bins: Number ``n`` of bins of equal width on [0, 1] (static).
        closed: Which bin owns a confidence exactly on an edge (static). "left": ``[k/n, (k+1)/n)``,
            with 1 in the last bin, that is ``floor(n p)``. "right": ``(k/n, (k+1)/n]``, with 0 in
            the first, that is ``ceil(n p) - 1``: Guo et al. (2017), arXiv:1706.04599.

    >>> probs = jnp.array([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.5, 0.5]])
    >>> c = calibration(probs, jnp.array([0, 0, 1, 0]), bins=4)
    >>> c.count.tolist(), c.confidence.tolist()
    ([0, 0, 1, 3], [0.0, 0.0, 0.5, 0.75])
    >>> round(float(c.ece), 4)  # 1/4 |0.5 - 1| + 3/4 |0.75 - 2/3|
    0.1875
    """
    probs, labels = _probabilities(probs, labels)
    return _equal_width(probs.max(-1).ravel(), correct(probs, labels).ravel(), bins, closed)


def classwise_calibration(
    probs: Probs, labels: Labels, *, bins: int = 15, closed: Literal["left", "right"] = "left"
) -> Calibration:
    """Calibration of every class's probability against how often that class occurs.

    Every field has a leading axis over classes, and `accuracy` is the frequency of the class; the
    classwise ECE is ``.ece.mean()``. Arguments as in `calibration`. Source: Kull et al. (2019),
    arXiv:1910.12656.

    >>> probs = jnp.array([[0.75, 0.25], [0.75, 0.25]])
    >>> classwise_calibration(probs, jnp.array([0, 1]), bins=4).ece.tolist()  # both 0.75 - 0.5
    [0.25, 0.25]
    """
    probs, labels = _probabilities(probs, labels)
    columns = probs.reshape(-1, probs.shape[-1]).T
    occurs = labels.ravel() == jnp.arange(len(columns))[:, None]
    return jax.vmap(lambda p, y: _equal_width(p, y, bins, closed))(columns, occurs)


def adaptive_calibration(probs: Probs, labels: Labels, *, bins: int = 15) -> Calibration:
    """Calibration of the most probable class in bins of equal mass.

    Examples are sorted by confidence (stably) and cut into `bins` groups of sizes that differ by
    one at most, the larger first (`numpy.array_split`). ``edges[k]`` is the smallest confidence of
    group ``k``, ``edges[-1]`` the largest of all. Source: Nixon et al. (2019), arXiv:1904.01685.

    >>> probs = jnp.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    >>> c = adaptive_calibration(probs, jnp.array([0, 0, 0]), bins=2)
    >>> c.edges.tolist(), c.count.tolist(), float(c.ece)  # (2 * 0.375 + 1 * 0) / 3
    ([0.5, 1.0, 1.0], [2, 1], 0.25)
    """
    probs, labels = _probabilities(probs, labels)
    require("bins", bins, "at least 1", lambda n: n >= 1)
    order = jnp.argsort(probs.max(-1).ravel(), stable=True)
    confidence, outcome = probs.max(-1).ravel()[order], correct(probs, labels).ravel()[order]
    n, sizes = len(order), [len(group) for group in np.array_split(np.arange(len(order)), bins)]
    starts = np.minimum(np.cumsum([0, *sizes]), n - 1)
    return _binned(confidence, outcome, np.repeat(np.arange(bins), sizes), confidence[starts])


def _equal_width(confidence: AnyArray, outcome: AnyArray, bins: int, closed: str) -> Calibration:
    require("bins", bins, "at least 1", lambda n: n >= 1)
    if closed not in ("left", "right"):
        raise ValueError(f'closed={closed!r} is not a bin convention; use "left" or "right".')
    index = jnp.floor(confidence * bins) if closed == "left" else jnp.ceil(confidence * bins) - 1
    index = jnp.clip(index.astype(int), 0, bins - 1)
    return _binned(confidence, outcome, index, jnp.linspace(0, 1, bins + 1, dtype=confidence.dtype))


def _binned(confidence: Array, outcome: Array, index: ArrayLike, edges: Array) -> Calibration:
    """Return the errors and the bin data when example ``i`` lies in bin ``index[i]``."""
    n, bins, dtype = len(confidence), len(edges) - 1, confidence.dtype
    count, hits, total = (
        jax.ops.segment_sum(x, jnp.asarray(index), bins)
        for x in (jnp.ones(n, int), outcome.astype(int), confidence)
    )
    size = jnp.maximum(count, 1).astype(dtype)
    gap = jnp.abs(total / size - hits / size)
    weight = count.astype(dtype) / n
    ece, rms = jnp.sum(weight * gap), jnp.sqrt(jnp.sum(weight * gap**2))
    return Calibration(ece, gap.max(), rms, edges, count, total / size, hits / size)


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


def auroc(scores: Reals, positive: Truths) -> Scalar:
    """Probability that a positive scores above a negative, a tie counting one half.

    >>> float(auroc(jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1])))
    0.75
    """
    scores, positive = _scored(scores, positive)
    below, upto = _ranks(scores, ~positive)
    wins = (below + upto).astype(scores.dtype) / (2 * jnp.sum(~positive))
    return jnp.mean(wins, where=positive)


def average_precision(scores: Reals, positive: Truths) -> Scalar:
    """Area under the precision-recall steps, ``sum_k (R_k - R_{k-1}) P_k`` (as scikit-learn).

    Computed as the mean over positives of the precision at their own score. With the other class as
    the positive one: ``average_precision(-scores, ~positive)``.

    >>> ap = average_precision(jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1]))
    >>> round(float(ap), 4)  # (1/1 + 2/3) / 2
    0.8333
    """
    scores, positive = _scored(scores, positive)
    hits = jnp.sum(positive) - _ranks(scores, positive)[0]
    found = scores.size - _ranks(scores, jnp.ones_like(positive))[0]
    return jnp.mean(hits.astype(scores.dtype) / found, where=positive)


class OperatingPoint(NamedTuple):
    """False-positive rate of a detector, and the threshold at or above which it says positive."""

    fpr: Scalar
    threshold: Scalar


def fpr_at_tpr(scores: Reals, positive: Truths, *, tpr: float = 0.95) -> OperatingPoint:
    """False-positive rate at the highest threshold that finds a fraction `tpr` of the positives.

    The threshold is the ``ceil(tpr n)``-th largest of the ``n`` positive scores; `tpr` is static.
    (Code descending from ODIN averages over all thresholds that find fewer: not this number.)

    >>> point = fpr_at_tpr(jnp.array([1.0, 2.0, 3.0, 1.5, 0.5]), jnp.array([1, 1, 1, 0, 0]))
    >>> float(point.threshold), float(point.fpr)  # finding all three lets 1.5 through, not 0.5
    (1.0, 0.5)
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr={tpr} is not a fraction of the positives; give one in (0, 1].")
    scores, positive = _scored(scores, positive)
    # ceil(tpr n) in integers: a float32 product may round to the other side of the ceiling.
    share, n = Fraction(str(tpr)).limit_denominator(10_000), jnp.sum(positive)
    whole, rest = jnp.divmod(n, share.denominator)
    needed = share.numerator * whole - (-share.numerator * rest) // share.denominator
    threshold = jnp.sort(jnp.where(positive, scores, -jnp.inf), descending=True)[needed - 1]
    fpr = jnp.mean(scores >= threshold, dtype=scores.dtype, where=~positive)
    return OperatingPoint(jnp.where(n > 0, fpr, jnp.nan), threshold)


def _ranks(scores: AnyArray, member: AnyArray) -> tuple[Array, Array]:
    """For each score, how many members lie strictly below it, and how many at or below it."""
    order = jnp.argsort(scores)
    ranked = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(member[order], dtype=int)])
    below, upto = (jnp.searchsorted(scores[order], scores, side=s) for s in ("left", "right"))
    return ranked[below], ranked[upto]


def gaussian_nll(mean: Numbers, std: Numbers, targets: Numbers) -> Float[Array, "*#n"]:
    """Negative log-density ``log(2 pi std^2)/2 + (target - mean)^2/(2 std^2)``, per example.

    >>> round(float(gaussian_nll(0.0, 1.0, 0.0)), 4)  # log(2 pi) / 2
    0.9189
    """
    return -stats.norm.logpdf(targets, mean, std)


def gaussian_crps(mean: Numbers, std: Numbers, targets: Numbers) -> Float[Array, "*#n"]:
    """Continuous ranked probability score ``int (F(t) - 1[t >= target])^2 dt``, per example.

    ``std (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi))`` with ``z = (target - mean) / std``, in the
    unit of the target; smaller is better. Source: Gneiting & Raftery (2007), equation 21.

    >>> round(float(gaussian_crps(0.0, 1.0, 0.0)), 4)  # (sqrt(2) - 1) / sqrt(pi)
    0.2337
    """
    z = (jnp.asarray(targets) - mean) / std
    return std * (z * erf(z / np.sqrt(2)) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))


def gaussian_pit(mean: Numbers, std: Numbers, targets: Numbers) -> Float[Array, "*#n"]:
    """Probability integral transform ``F(target)``, per example; uniform if the model is right.

    >>> float(gaussian_pit(0.0, 1.0, 0.0))
    0.5
    """
    return stats.norm.cdf(targets, mean, std)


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
) -> Regression:
    """Accuracy, likelihood, coverage and sharpness of Gaussian predictions (`std` with the noise).

    >>> r = regression(jnp.zeros(2), jnp.ones(2), jnp.array([0.5, -3.0]), levels=(0.95,))
    >>> float(r.mae), float(r.coverage[0]), round(float(r.width[0]), 2)  # 2 * 1.96
    (1.75, 0.5, 3.92)
    """
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels={levels} are not probabilities; give fractions, not percent.")
    mean, std, targets = jnp.broadcast_arrays(mean, std, targets)
    error, z = targets - mean, (targets - mean) / std
    fractions = jnp.asarray(levels, z.dtype)
    q = ndtri((1 + fractions) / 2)
    return Regression(
        nll=gaussian_nll(mean, std, targets).mean(),
        rmse=jnp.sqrt(jnp.mean(error**2)),
        mae=jnp.abs(error).mean(),
        crps=gaussian_crps(mean, std, targets).mean(),
        chi2=jnp.mean(z**2),
        sharpness=std.mean(),
        levels=fractions,
        coverage=jnp.mean(jnp.abs(z.ravel()) <= q[:, None], axis=1, dtype=z.dtype),
        width=2 * q * std.mean(),
    )


def _wide(x: ArrayLike) -> Array:
    """Return numbers in float32 or wider: sums in half precision lose their digits."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _examples(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    probs, labels = jnp.asarray(probs), jnp.asarray(labels)
    if labels.shape != probs.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        need = f"integer classes of shape {probs.shape[:-1]} (from one-hot: labels.argmax(-1))"
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}; give {need}.")
    return probs, labels


def _probabilities(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    require("probs", probs, "in [0, 1] (see softmax)", lambda p: (p >= 0) & (p < 1.001))
    return _examples(probs, labels)


def _scored(scores: ArrayLike, positive: ArrayLike) -> tuple[Array, Array]:
    scores, positive = jnp.ravel(scores), jnp.ravel(positive).astype(bool)
    if scores.shape != positive.shape:
        raise ValueError(f"positive has {positive.size} entries, scores {scores.size}; pair them.")
    return scores, positive
