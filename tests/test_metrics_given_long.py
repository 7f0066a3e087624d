"""What metrics are given: logits refused, labels ignored, examples weighted, nothing undefined."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.metrics import average_precision_score, roc_auc_score

import blr_optax as blr
from blr_optax import metrics, plots

RNG = np.random.default_rng(0)
LOGITS = (2 * RNG.normal(size=(40, 5))).astype(np.float32)
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
LABELS = RNG.integers(0, 5, 40)
WEIGHTS = RNG.integers(0, 4, 40)  # counts, so that repeating rows is the truth
MASKED = np.where(np.arange(40) % 3 == 0, -100, LABELS)
KEPT = MASKED >= 0

SETS = {
    "accuracy": lambda *a, **k: [metrics.accuracy(*a, **k)],
    "calibration": lambda *a, **k: metrics.calibration(*a, bins=4, **k),
    "classwise": lambda *a, **k: metrics.classwise_calibration(*a, bins=4, **k),
    "adaptive": lambda *a, **k: metrics.adaptive_calibration(*a, bins=4, **k),
}
EACH = {
    "nll": metrics.nll,
    "brier": metrics.brier,
    "logs": lambda p, *a, **k: metrics.nll(jnp.log(p), *a, log=True, **k),
}


def close(a, b, rtol=2e-5):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


# --- ignored labels and weights -------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_ignored_examples_are_as_if_they_were_not_there(name):
    f, broken = SETS[name], np.where(KEPT[:, None], PROBS, np.nan)
    run = jax.jit(lambda p, y: f(p, y, ignore_index=-100))
    expected = jax.jit(f)(PROBS[KEPT], LABELS[KEPT])
    close(run(PROBS, MASKED), expected)
    close(run(broken, MASKED), expected)  # whatever stands in their place
    close(run(PROBS.reshape(4, 10, 5), MASKED.reshape(4, 10)), expected)  # tokens of sequences
    none = run(PROBS, np.full(40, -100))
    assert np.isnan(np.asarray(none[0])).all()  # no score of nobody


@pytest.mark.parametrize("name", ["accuracy", "calibration", "classwise"])
def test_weights_are_how_often_an_example_counts(name):
    f = SETS[name]
    repeated = f(np.repeat(PROBS, WEIGHTS, 0), np.repeat(LABELS, WEIGHTS))
    weighted = jax.jit(lambda p, y, w: f(p, y, weights=w))(PROBS, LABELS, 0.5 * WEIGHTS)
    for field, (x, y) in enumerate(zip(weighted, repeated, strict=True)):
        if field != 4:  # a number of examples, not of their weights
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)
    if name != "accuracy":
        assert np.sum(np.atleast_2d(weighted.count)[0]) == np.sum(WEIGHTS > 0)


def test_adaptive_bins_hold_equal_numbers_and_weigh_within():
    order = np.argsort(PROBS[WEIGHTS > 0].max(-1), kind="stable")
    confidence = PROBS[WEIGHTS > 0].max(-1)[order]
    right = (PROBS.argmax(-1) == LABELS)[WEIGHTS > 0][order]
    w = WEIGHTS[WEIGHTS > 0][order]
    groups = np.array_split(np.arange(len(w)), 4)
    gaps = [
        abs(np.average(confidence[g], weights=w[g]) - np.average(right[g], weights=w[g]))
        for g in groups
    ]
    shares = [w[g].sum() / w.sum() for g in groups]
    found = jax.jit(functools.partial(metrics.adaptive_calibration, bins=4))(
        PROBS, LABELS, weights=WEIGHTS
    )
    np.testing.assert_allclose(found.ece, np.dot(shares, gaps), rtol=2e-5)
    assert found.count.tolist() == [len(g) for g in groups]


@pytest.mark.parametrize("name", EACH)
def test_scores_of_examples_are_nan_where_ignored_and_their_mean_is_weighted(name):
    f = jax.jit(EACH[name], static_argnames="ignore_index")
    plain = np.asarray(f(PROBS, LABELS))
    ignored = np.asarray(f(PROBS, MASKED, ignore_index=-100))
    np.testing.assert_allclose(ignored[KEPT], plain[KEPT], rtol=1e-6)
    assert np.isnan(ignored[~KEPT]).all()
    weighted = f(PROBS, MASKED, ignore_index=-100, weights=WEIGHTS)
    np.testing.assert_allclose(
        np.mean(weighted), np.average(plain[KEPT], weights=WEIGHTS[KEPT]), rtol=1e-5
    )
    assert np.all(np.asarray(weighted)[~KEPT] == 0)


def test_detectors_and_regressions_take_weights(x64):
    scores, positive = RNG.integers(0, 6, 40) / 6, RNG.random(40) < 0.4
    w = RNG.random(40) * (RNG.random(40) < 0.8)
    run = jax.jit(
        lambda s, p, w: (
            metrics.auroc(s, p, weights=w),
            metrics.average_precision(s, p, weights=w),
            metrics.fpr_at_tpr(s, p, tpr=0.8, weights=w),
            metrics.fpr_at_tpr(s, p, tpr=0.8, weights=jnp.ones(40)),
            metrics.fpr_at_tpr(s, p, tpr=0.8),
        )
    )
    auroc, precision, point, ones, plain = run(scores, positive, w)
    np.testing.assert_allclose(auroc, roc_auc_score(positive, scores, sample_weight=w), rtol=1e-12)
    np.testing.assert_allclose(
        precision, average_precision_score(positive, scores, sample_weight=w), rtol=1e-12
    )
    close(ones, plain)
    found = lambda t: w[positive & (scores >= t)].sum() / w[positive].sum()  # noqa: E731
    higher = [t for t in np.unique(scores[w > 0]) if t > point.threshold]
    assert found(float(point.threshold)) >= 0.8 > max(map(found, higher), default=0.0)
    above = w[~positive & (scores >= float(point.threshold))].sum() / w[~positive].sum()
    np.testing.assert_allclose(point.fpr, above, rtol=1e-12)
    mean, std, y = RNG.normal(size=(3, 40))
    whole = jax.jit(metrics.regression)(*(np.repeat(x, WEIGHTS) for x in (mean, std**2, y)))
    y = np.where(WEIGHTS > 0, y, np.nan)
    close(jax.jit(metrics.regression)(mean, std**2, y, weights=WEIGHTS), whole, rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16])
def test_labels_of_few_bits_among_many_classes(dtype):
    probs = np.full((4, 300), 0.5 / 299, np.float32)
    labels = np.array([0, 5, 100, 127])
    probs[np.arange(4), labels] = 0.5
    near = probs.copy()
    near[:, -1] = 0.9  # 299 = 43 in eight bits
    assert float(metrics.accuracy(probs, jnp.asarray(labels, dtype))) == 1
    np.testing.assert_allclose(metrics.nll(probs, jnp.asarray(labels, dtype)), np.log(2), rtol=1e-6)
    brier = 0.25 + 299 * (0.5 / 299) ** 2
    np.testing.assert_allclose(metrics.brier(probs, jnp.asarray(labels, dtype)), brier, rtol=1e-5)
    found = metrics.classwise_calibration(probs, jnp.asarray(labels, dtype), bins=2)
    expected = metrics.classwise_calibration(probs, labels, bins=2)
    np.testing.assert_array_equal(found.ece, expected.ece)


# --- temperature ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_temperature_is_where_the_likelihood_is_largest(scale):
    def loss(log_t, keep=slice(None)):
        z = scale * LOGITS[keep].astype(float) / np.exp(log_t)
        top = np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1)
        return np.mean(top - z[np.arange(len(z)), LABELS2[keep]])

    noise = np.random.default_rng(1).gumbel(size=LOGITS.shape)
    LABELS2 = np.argmax(LOGITS + noise, -1)
    found = jax.jit(metrics.temperature)(scale * LOGITS, LABELS2)
    best = optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded").x
    np.testing.assert_allclose(np.log(found), best, atol=2e-3)
    kept = metrics.temperature(scale * LOGITS, np.where(KEPT, LABELS2, -1), ignore_index=-1)
    best = optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded", args=(KEPT,)).x
    np.testing.assert_allclose(np.log(kept), best, atol=2e-3)


def test_a_likelihood_without_a_maximum_has_no_temperature():
    assert np.isnan(
        metrics.temperature(LOGITS, LOGITS.argmax(-1))
    )  # all right, the colder the better
    assert np.isnan(metrics.temperature(LOGITS, LOGITS.argmin(-1)))  # all wrong, the hotter
    masked = jnp.where(jnp.arange(5) == 4, -1e9, LOGITS)  # a class that is masked away
    reduced = metrics.temperature(LOGITS[:, :4], LABELS % 4)
    np.testing.assert_allclose(metrics.temperature(masked, LABELS % 4), reduced, rtol=1e-4)


# --- what is no probability -----------------------------------------------------------------------

FUNCTIONS = {
    "correct": metrics.correct,
    "accuracy": metrics.accuracy,
    "nll": metrics.nll,
    "brier": metrics.brier,
    "calibration": metrics.calibration,
    "classwise": metrics.classwise_calibration,
    "adaptive": metrics.adaptive_calibration,
    "entropy": lambda p, y: metrics.entropy(p),
    "split": lambda p, y: metrics.entropy_split(jnp.stack([p, p]) if hasattr(p, "dtype") else p),
}
PREDICTION = blr.Predictive(PROBS, *PROBS.T[:3])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_logits_and_whole_predictions_are_refused_everywhere(name):
    f = FUNCTIONS[name]
    f(PROBS, LABELS)  # and the same in half precision
    f(jnp.asarray(PROBS, jnp.bfloat16), LABELS)
    for wrong, message in (
        (LOGITS, r"probs must be in .*being probabilities.*softmax\(logits\)"),
        (jnp.asarray(LOGITS, jnp.bfloat16), r"softmax\(logits\)"),
        (np.abs(LOGITS) / 10, r"sum to one"),
        (np.log(PROBS), r"log=True"),
        (PREDICTION, r"probs is a Predictive; give its .probabilities"),
    ):
        with pytest.raises(ValueError, match=message):
            f(wrong, LABELS)


def test_other_things_that_are_no_predictions():
    for call, message in (
        (lambda: metrics.nll(LOGITS, LABELS, log=True), r"after exp.*log_softmax\(logits\)"),
        (lambda: metrics.nll(PROBS, MASKED), r"labels hold \[-100\].*ignore_index=-100"),
        (lambda: metrics.accuracy(PROBS, LABELS + 3), r"none of the 5 classes 0 to 4"),
        (lambda: metrics.accuracy(PROBS, LABELS, weights=-np.ones(40)), r"must not be negative"),
        (lambda: metrics.nll(PROBS, LABELS, weights=np.ones(3)), r"weights have shape \(3,\)"),
        (lambda: metrics.auroc(PROBS.max(-1), LABELS), r"positive must be true or false"),
        (lambda: metrics.regression(0.0, -1.0, 0.0), r"std must be at least zero"),
        (
            lambda: metrics.regression(blr.RegressionPredictive(0.0, 1.0, 1.0), 1.0, 0.0),
            r"mean is a RegressionPredictive.*p.mean",
        ),
        (lambda: plots.reliability_diagram(PROBS), r"metrics.calibration\(probs, labels\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- no value is no number ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SETS, *EACH])
def test_a_nan_or_a_label_of_no_class_makes_no_score(name):
    f = {**SETS, **EACH}[name]
    broken = PROBS.copy()
    broken[7] = np.nan
    for probs, labels in ((broken, LABELS), (PROBS, np.where(np.arange(40) == 7, 9, LABELS))):
        found = jax.jit(f)(probs, labels)
        first = np.asarray(found if name in EACH else found[0])
        if name in EACH:
            assert np.isnan(first[7]) and np.isfinite(np.delete(first, 7)).all()
        else:
            assert np.isnan(first).any()
    if name in SETS:
        empty = f(PROBS[:0], LABELS[:0])
        assert all(np.isnan(np.asarray(x)).all() for x in empty[:3])


def test_nan_scores_have_no_ranking():
    scores, positive = np.array([0.1, np.nan, 0.3, 0.2]), np.array([0, 1, 1, 0])
    assert not metrics.correct(np.array([np.nan, 0.5]), np.array(0))
    assert np.isnan(metrics.auroc(scores, positive))
    assert np.isnan(metrics.average_precision(scores, positive))
    assert np.isnan(metrics.fpr_at_tpr(scores, positive).fpr)
    kept = metrics.auroc(scores, positive, weights=np.array([1, 0, 1, 1]))
    assert float(kept) == 1.0
    r = metrics.regression(np.zeros(2), np.array([1.0, 0.0]), np.zeros(2))
    assert np.isnan(r.coverage).all() and np.isnan(r.chi2)


def test_half_precision_is_summed_in_float32():
    half = jnp.asarray(PROBS, jnp.bfloat16)
    exact = np.asarray(half, np.float32)
    pairs = [
        (metrics.entropy(half), -(exact * np.log(exact)).sum(-1)),
        (metrics.nll(half, LABELS), -np.log(exact[np.arange(40), LABELS])),
        (
            metrics.gaussian_nll(half[:, 0], 1.0, half[:, 1]),
            -stats.norm.logpdf(exact[:, 1], exact[:, 0]),
        ),
        (metrics.accuracy(half, LABELS), np.mean(exact.argmax(-1) == LABELS)),
    ]
    for found, expected in pairs:
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    scores = (np.arange(70_000) / 1e5).astype(np.float16)
    positive = np.arange(70_000) % 2 == 0  # more pairs than float16 counts
    np.testing.assert_allclose(metrics.auroc(scores, positive), 0.5, atol=1e-3)
    integers = metrics.fpr_at_tpr(np.array([3, 2, 1, 0]), np.array([1, 1, 0, 0]))
    assert float(integers.fpr) == 0.0 and integers.fpr.dtype == jnp.float32
    half_of = metrics.fpr_at_tpr(np.array([3, 1, 2, 0]), np.array([1, 1, 0, 0]))
    assert float(half_of.fpr) == 0.5
