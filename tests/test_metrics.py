"""Metrics against the golden tables, scikit-learn, brute force, and identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate
from scipy import stats as scipy_stats
from sklearn.metrics import average_precision_score, roc_auc_score
from tools import load_golden

from blr_optax import metrics

GOLDEN = load_golden("duality_metrics")
TABLES = GOLDEN["tables"]
CALIBRATIONS = [(table, key) for table, t in TABLES.items() for key in t if key.startswith("ece_")]


def close(actual, expected, rtol=1e-12, atol=0.0):
    actual = np.asarray(actual)
    assert actual.dtype in (np.float64, np.int64), actual.dtype
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def table(name):
    probs = np.asarray(TABLES[name]["probs"], jnp.asarray(0.0).dtype)
    return probs, np.asarray(TABLES[name]["y"])


@functools.cache
def compiled(f, **options):
    """`f` as one program; an eager operation is a program of its own."""
    return jax.jit(functools.partial(f, **options))


# --- golden numbers, float64 ----------------------------------------------------------------------


@jax.jit
def classification_numbers(probs, labels, entropies):
    """Every scalar or per-example number a golden classification table may hold, by its key."""
    right, confidence = metrics.correct(probs, labels), probs.max(-1)
    per_example = metrics.nll(probs, labels)
    return {
        "accuracy": metrics.accuracy(probs, labels),
        "nll": per_example.mean(),
        "nll_per_example": per_example,
        "brier_sum_over_classes": metrics.brier(probs, labels).mean(),
        "brier_binary": metrics.brier(probs, labels).mean() / 2,
        "entropy": entropies,
        "mean_entropy": entropies.mean(),
        "mean_confidence": confidence.mean(),
        "adaptive_ece_equal_mass_10": metrics.adaptive_calibration(probs, labels, bins=10).ece,
        "classwise_ece_10_left_closed": metrics.classwise_calibration(
            probs, labels, bins=10
        ).ece.mean(),
        "auroc_misclassification_maxprob": metrics.auroc(confidence, right),
        "auroc_misclassification_neg_entropy": metrics.auroc(-entropies, right),
        "aupr_success": metrics.average_precision(confidence, right),
        "auroc_class1": metrics.auroc(probs[:, 1], labels == 1),
        "aupr_class1": metrics.average_precision(probs[:, 1], labels == 1),
    }


@pytest.mark.parametrize("name", TABLES)
def test_golden_classification(x64, name):
    expected = {k: v for k, v in TABLES[name].items() if not k.startswith("ece_")}
    probs, labels = table(name)
    # Not under jit: fused multiply-adds would break ties between entropies of permuted rows.
    entropies = metrics.entropy(probs)
    actual = classification_numbers(probs, labels, entropies)
    for key in expected.keys() - {"probs", "y"}:
        close(actual[key], expected[key])


@pytest.mark.parametrize(("name", "key"), CALIBRATIONS)
def test_golden_calibration(x64, name, key):
    _, bins, closed, _ = key.split("_")
    actual = compiled(metrics.calibration, bins=int(bins), closed=closed)(*table(name))
    expected = dict(TABLES[name][key])
    close(actual.rms, expected.pop("rms_ce"))
    close(actual.edges, np.linspace(0, 1, int(bins) + 1))
    for field, value in expected.items():
        close(getattr(actual, field), value, atol=1e-16)


@jax.jit
def out_of_distribution_numbers(inside, outside, *entropies):
    """What the golden section of that name holds, by its key."""
    scores, positive = metrics.in_vs_out(inside.max(-1), outside.max(-1))
    certainty = metrics.in_vs_out(*(-e for e in entropies))
    point = metrics.fpr_at_tpr(scores, positive)
    return {
        "auroc_maxprob": metrics.auroc(scores, positive),
        "auroc_neg_entropy": metrics.auroc(*certainty),
        "aupr_in_maxprob": metrics.average_precision(scores, positive),
        "aupr_out_maxprob": metrics.average_precision(-scores, ~positive),
        "fpr_at_95tpr_maxprob": point.fpr,
        "threshold_at_95tpr": point.threshold,
    }


def test_golden_out_of_distribution(x64):
    expected = GOLDEN["ood"]
    inside, outside = np.array(expected["probs_in"]), np.array(expected["probs_out"])
    entropies = metrics.entropy(inside), metrics.entropy(outside)  # not under jit, as above
    actual = out_of_distribution_numbers(inside, outside, *entropies)
    for key in expected.keys() - {"probs_in", "probs_out"}:
        close(actual[key], expected[key])


def test_golden_entropy_split(x64):
    expected = GOLDEN["bald"]
    probs = np.array(expected["sample_probs_N_S_K"])
    split = jax.device_get(compiled(metrics.entropy_split, axis=1)(probs))
    close(probs.mean(1), expected["mean_probs"])
    close(split.total, expected["total_entropy"])
    # The file's readme defines the aleatoric part as the mean entropy over samples; its numbers are
    # that mean times the number of classes (they exceed the total, and even log K), and its
    # epistemic part is the total minus those, hence negative. We check the library against the
    # definition, and the file's numbers up to that factor.
    classes = probs.shape[-1]
    close(classes * split.aleatoric, expected["expected_entropy_aleatoric"])
    close(
        split.total - classes * split.aleatoric,
        expected["mutual_information_epistemic"],
        atol=1e-14,
    )
    assert np.max(expected["mutual_information_epistemic"]) < 0 < split.epistemic.min()
    close(split.aleatoric, scipy_stats.entropy(probs, axis=-1).mean(1))


def test_golden_nll_of_the_average_and_average_of_nlls(x64):
    expected = GOLDEN["bald"]["nll_of_mean_vs_mean_of_nll"]
    probs, labels = np.array(GOLDEN["bald"]["sample_probs_N_S_K"]), np.array(expected["y"])
    nll = compiled(metrics.nll)
    of_average = np.mean(nll(probs.mean(1), labels))
    of_samples = np.mean(nll(probs, np.broadcast_to(labels[:, None], probs.shape[:2])))
    close(of_average, expected["nll_of_averaged_probs"])
    close(of_samples, expected["average_of_nlls"])
    assert of_average < of_samples  # Jensen


def test_golden_regression(x64):
    expected = GOLDEN["regression"]
    arrays = [np.array(expected[key]) for key in ("mean", "std", "y")]
    levels = expected["central_interval_levels"]
    r = compiled(metrics.regression, levels=tuple(levels))(*arrays)
    actual = {
        "nll_mean": r.nll,
        "rmse": r.rmse,
        "mae": r.mae,
        "crps_mean": r.crps,
        "chi2_mean_z2": r.chi2,
        "pit": compiled(metrics.gaussian_pit)(*arrays),
        "central_interval_levels": r.levels,
        "coverage": r.coverage,
        "mean_width": r.width,
        "sharpness_mean_std": r.sharpness,
    }
    for key in expected.keys() - {"mean", "std", "y"}:
        close(actual[key], expected[key])


def test_golden_file_has_no_other_section():
    assert GOLDEN.keys() == {"readme", "tables", "ood", "bald", "regression"}
    assert GOLDEN["bald"].keys() == {
        "sample_probs_N_S_K",
        "mean_probs",
        "total_entropy",
        "expected_entropy_aleatoric",
        "mutual_information_epistemic",
        "nll_of_mean_vs_mean_of_nll",
    }


# --- peers and brute force ------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 5, 1000])  # few levels: many ties
def test_ranking_equals_scikit_learn_and_pair_counting(x64, levels):
    rng = np.random.default_rng(levels)
    scores, positive = rng.integers(0, levels, 300) / levels, rng.random(300) < 0.3
    pairs = scores[positive][:, None] - scores[~positive]
    by_pairs = np.mean((pairs > 0) + 0.5 * (pairs == 0))
    area = compiled(metrics.auroc)(scores, positive)
    close(area, by_pairs)
    close(area, roc_auc_score(positive, scores))
    precision = compiled(metrics.average_precision)(scores, positive)
    close(precision, average_precision_score(positive, scores))


RATES = (0.5, 0.9, 0.95, 0.999, 1.0)


@jax.jit
def points_at_all_rates(scores, positive):
    return {tpr: metrics.fpr_at_tpr(scores, positive, tpr=tpr) for tpr in RATES}


@pytest.mark.parametrize("n", [1, 7, 20, 60, 1000])
@pytest.mark.parametrize("tpr", RATES)
def test_fpr_at_tpr_finds_enough_positives_and_no_more(n, tpr):
    rng = np.random.default_rng(n)
    scores = rng.permutation(2 * n).astype(np.float32)
    positive = np.arange(2 * n) < n
    point = points_at_all_rates(scores, positive)[tpr]
    found = int((scores[positive] >= float(point.threshold)).sum())
    assert found >= tpr * n > found - 1
    np.testing.assert_allclose(point.fpr, np.mean(scores[~positive] >= float(point.threshold)))


def test_crps_equals_its_integral_and_the_absolute_error_of_a_point(x64):
    mean, std, target = 0.3, 0.7, 1.9
    integrand = lambda t: (scipy_stats.norm.cdf(t, mean, std) - (t >= target)) ** 2  # noqa: E731
    pieces = [(-20, mean), (mean, target), (target, 20)]
    integral = sum(integrate.quad(integrand, *piece, epsabs=1e-13)[0] for piece in pieces)
    crps = compiled(metrics.gaussian_crps)
    close(crps(mean, std, target), integral, rtol=1e-10)
    close(crps(mean, 1e-12, target), target - mean, rtol=1e-11)


def test_coverage_of_the_true_distribution_is_its_level():
    y = np.random.default_rng(0).normal(size=40_000).astype(np.float32)
    regression = compiled(metrics.regression, levels=(0.0, 0.3, 0.9, 1.0))
    r = jax.device_get(regression(np.zeros_like(y), np.ones_like(y), y))
    np.testing.assert_allclose(r.coverage, r.levels, atol=0.01)
    assert np.isinf(r.width[-1])


# --- identities -----------------------------------------------------------------------------------


def test_edges_of_bins_belong_to_the_documented_side():
    confidence = np.array([0.5, 0.75, 1.0], np.float32)
    probs, labels = np.stack([confidence, 1 - confidence], -1), np.zeros(3, int)
    left = compiled(metrics.calibration, bins=4, closed="left")(probs, labels)
    right = compiled(metrics.calibration, bins=4, closed="right")(probs, labels)
    assert left.count.tolist() == [0, 0, 1, 2]  # 1.0 joins the last bin
    assert right.count.tolist() == [0, 1, 1, 1]
    classwise = compiled(metrics.classwise_calibration, bins=4, closed="right")(probs, labels)
    zero = np.asarray(classwise.count)[1]
    assert zero.tolist() == [2, 1, 0, 0]  # 0 joins the first bin, 0.25 and 0.5 close theirs


def test_calibration_of_pixels_is_calibration_of_the_flat_batch():
    probs, labels = table("near_uniform_80x3")
    image, truth = probs.reshape(4, 5, 4, 3), labels.reshape(4, 5, 4)
    for f in (metrics.calibration, metrics.classwise_calibration, metrics.adaptive_calibration):
        both = compiled(f)(image, truth), compiled(f)(probs, labels)
        jax.tree.map(np.testing.assert_array_equal, *both)
    for f in (metrics.nll, metrics.brier, metrics.correct):
        assert jax.eval_shape(f, image, truth).shape == truth.shape


def test_adaptive_bins_hold_equal_mass_and_survive_too_few_examples(x64):
    probs, labels = table("multiclass_200x4")
    c = jax.device_get(compiled(metrics.adaptive_calibration, bins=7)(probs, labels))
    assert c.count.tolist() == [29, 29, 29, 29, 28, 28, 28]
    assert np.all(np.diff(c.edges) >= 0)
    np.testing.assert_array_equal(c.edges[[0, -1]], np.sort(probs.max(-1))[[0, -1]])
    few = compiled(metrics.adaptive_calibration, bins=5)(probs[:3], labels[:3])
    assert few.count.tolist() == [1, 1, 1, 0, 0]
    right = np.asarray(compiled(metrics.correct)(probs[:3], labels[:3]))
    close(few.ece, np.mean(np.abs(probs[:3].max(-1) - right)))


def test_nll_of_logs_is_finite_where_that_of_probabilities_is_infinite():
    log_probs = np.array([0.0, -200.0], np.float32)  # of the logits 200 and 0
    assert compiled(metrics.nll)(np.exp(log_probs), 1) == np.inf
    np.testing.assert_allclose(compiled(metrics.nll, log=True)(log_probs, 1), 200.0)


def test_entropy_and_scores_have_finite_gradients_at_the_corners():
    logits = np.array([200.0, 0.0, -200.0], np.float32)  # the softmax underflows

    def score(z):
        probs = jax.nn.softmax(z)
        return metrics.entropy(probs) + metrics.brier(probs, jnp.array(0))

    np.testing.assert_allclose(jax.jit(jax.grad(score))(logits), 0.0, atol=1e-30)
    uniform = jax.jit(jax.grad(metrics.entropy))(np.full(4, 0.25, np.float32))
    np.testing.assert_allclose(uniform, np.log(4) - 1, rtol=1e-6)


def test_epistemic_part_vanishes_for_equal_samples_and_is_never_negative():
    odds = np.exp(3 * np.random.default_rng(0).normal(size=(1, 500, 10)))
    probs = (odds / odds.sum(-1, keepdims=True)).astype(np.float32)
    split = compiled(metrics.entropy_split)
    equal = jax.device_get(split(np.broadcast_to(probs, (7, 500, 10))))
    np.testing.assert_allclose(equal.epistemic, 0, atol=2e-6)
    assert equal.epistemic.min() >= 0


def test_everything_runs_under_jit_in_the_input_dtype():
    probs, labels = map(jnp.asarray, table("multiclass_200x4"))
    assert probs.dtype == jnp.float32
    scores, right = probs.max(-1), metrics.correct(probs, labels)
    for f, args in [
        (metrics.accuracy, (probs, labels)),
        (metrics.nll, (probs, labels)),
        (metrics.brier, (probs, labels)),
        (metrics.calibration, (probs, labels)),
        (metrics.classwise_calibration, (probs, labels)),
        (metrics.adaptive_calibration, (probs, labels)),
        (metrics.auroc, (scores, right)),
        (metrics.average_precision, (scores, right)),
        (metrics.fpr_at_tpr, (scores, right)),
        (metrics.regression, (scores, scores, scores[::-1])),
    ]:
        eager, jitted = f(*args), jax.jit(f)(*args)
        close32 = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # noqa: E731
        jax.tree.map(close32, eager, jitted)
        floats = [x.dtype for x in jax.tree.leaves(jitted) if x.dtype != jnp.int32]
        assert set(floats) == {jnp.dtype(jnp.float32)}, f.__name__


def test_large_float32_sets_keep_their_accuracy():
    confidence = np.random.default_rng(0).uniform(0.5, 1, 500_000).astype(np.float32)
    probs, labels = np.stack([confidence, 1 - confidence], -1), np.zeros(confidence.size, int)
    ece = compiled(metrics.calibration)(probs, labels).ece
    exact = 1 - np.mean(confidence, dtype=np.float64)
    np.testing.assert_allclose(ece, exact, rtol=1e-4)


def test_one_empty_side_is_nan_not_a_number_that_looks_good():
    scores, nobody = np.array([0.1, 0.2], np.float32), np.array([False, False])
    auroc, precision, rate = map(
        compiled, (metrics.auroc, metrics.average_precision, metrics.fpr_at_tpr)
    )
    assert np.isnan(auroc(scores, nobody)) and np.isnan(auroc(scores, ~nobody))
    assert np.isnan(precision(scores, nobody))
    assert np.isnan(rate(scores, ~nobody).fpr)


# --- bad input ------------------------------------------------------------------------------------

PROBS, LABELS = jnp.full((3, 2), 0.5), jnp.zeros(3, int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.nll(PROBS, jax.nn.one_hot(LABELS, 2)), r"labels are .*argmax"),
        (lambda: metrics.accuracy(PROBS, LABELS[:2]), r"labels are .*\(2,\).*shape \(3,\)"),
        (lambda: metrics.brier(PROBS, LABELS.astype(float)), r"labels are float32"),
        (lambda: metrics.calibration(PROBS, LABELS, bins=0), r"bins must be .*; got 0"),
        (lambda: metrics.adaptive_calibration(PROBS, LABELS, bins=-1), r"bins must be .*; got -1"),
        (lambda: metrics.calibration(PROBS, LABELS, closed="both"), r"closed='both'.*left"),
        (lambda: metrics.auroc(jnp.ones(3), jnp.ones(2)), r"positive has 2 entries, scores 3"),
        (lambda: metrics.fpr_at_tpr(jnp.ones(2), jnp.ones(2), tpr=95), r"tpr=95"),
        (lambda: metrics.entropy_split(PROBS, axis=-1), r"axis=-1 is the axis of the classes"),
        (lambda: metrics.regression(0.0, 1.0, 0.0, levels=(95,)), r"levels=\(95,\).*percent"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
