"""What a user hands to README's functions by mistake is taken as meant, or refused in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blr_optax as blr

TREE = {"in": np.ones((1, 8), np.float32), "out": np.ones((8, 1), np.float32)}
X = np.linspace(-1, 1, 6, dtype=np.float32)[:, None]
KEYS = jax.random.split(jax.random.key(0), 2)
PROBS, LABELS = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [0, 1, 1]


def net(w, x):
    return jnp.tanh(x @ w["in"]) @ w["out"]


@pytest.fixture(scope="module")
def q():
    return blr.distribution("normal", mean=TREE, precision=4.0)


PREDICTIONS = {
    "x and apply swapped": (
        lambda q: blr.predict(0, q, X, net), r"apply must be a function .* \(key, q, apply",
    ),
    "the network's outputs": (
        lambda q: blr.predict_regression(0, q, net(TREE, X), X), "apply must be a function",
    ),
    "a name for the link": (
        lambda q: blr.predict(0, q, net, X, link="softmax"), "link='softmax' must be a function",
    ),
    "several keys": (lambda q: blr.predict(KEYS, q, net, X), r"one typed key, .* shape \(2,\)"),
    "a text for the noise": (
        lambda q: blr.predict_regression(0, q, net, X, noise_variance="0.1"), "variance='0.1'",
    ),
    "noise of other examples": (
        lambda q: blr.predict_regression(0, q, net, X, samples=2, noise_variance=np.ones(7)),
        r"noise_variance has the shape \(7,\), and the outputs of apply \(6, 1\)",
    ),
    "noise that would make a square of a column": (
        lambda q: blr.predict_regression(0, q, net, X, samples=2, noise_variance=np.ones(6)),
        r"noise_variance has the shape \(6,\), and the outputs of apply \(6, 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PREDICTIONS)
def test_wrong_calls_of_predictions(q, name):
    call, words = PREDICTIONS[name]
    with pytest.raises(ValueError, match=words):
        call(q)


def test_no_example_is_no_reason_to_warn(q):
    two = lambda w, x: jnp.concatenate([net(w, x), -net(w, x)], 1)  # noqa: E731
    assert blr.predict(0, q, two, X[:0], samples=1).probabilities.shape == (0, 2)


def test_densities_of_weights_of_another_shape_are_refused(q):
    """A transposed leaf broadcasts against its members, to a sum of 64 terms for 8."""
    exact = 16 * 0.5 * np.log(4 / (2 * np.pi))
    assert float(q.log_prob(TREE)) == pytest.approx(exact, rel=1e-5)
    draws = jax.tree.map(lambda w: np.stack([w] * 3), TREE)
    np.testing.assert_allclose(q.log_prob(draws), np.full(3, exact), rtol=1e-5)
    for wrong in (TREE["in"].T, TREE["in"][0, :4], TREE["in"][:, :1], draws["in"].T):
        with pytest.raises(ValueError, match=r"leaf of shape .* the parameters have \(1, 8\)"):
            q.log_prob({**TREE, "in": wrong})
    with pytest.raises(ValueError, match="axes of draws lead"):
        blr.distribution(
            blr.families.MeanField("gamma"), concentration=np.ones(3), rate=1.0
        ).log_prob(np.ones((3, 1)))


def test_shapes_of_draws(q):
    small = q.part("out")
    for shape in (2, np.int64(2), [2], (np.int32(2),), np.uint8(2)):
        assert small.sample(0, shape).shape == (2, 8, 1)
    for shape in (2.0, "2", (2.5,), -1, None, KEYS):
        with pytest.raises(ValueError, match=r"Distribution\.sample: shape=.* whole numbers"):
            small.sample(0, shape)
    predictive = blr.predict_distribution(0, q, net, X, samples=2, noise_variance=0.1)
    assert predictive.sample(0, np.int64(3)).shape == (3, 6, 1)
    with pytest.raises(ValueError, match=r"sample: shape=3\.0"):
        predictive.sample(0, 3.0)
    for power in ("2", np.ones(2)):
        with pytest.raises(ValueError, match=r"the power .* must be one number"):
            q**power


def test_arrays_of_keys_are_refused_where_one_is_wanted(q):
    for call in (
        lambda: q.sample(KEYS),
        lambda: blr.ivon(0.1, ess=10.0, key=KEYS).init(TREE),
        lambda: blr.bayesbinn(0.1, ess=10.0, key=KEYS).init(TREE),
        lambda: blr.reseed(blr.ivon(0.1, ess=10.0).init(TREE), KEYS),
    ):
        with pytest.raises(ValueError, match=r"one typed key, not an array of shape \(2,\)"):
            call()


def test_numbers_of_numpy_are_numbers():
    params = np.ones(3, np.float32)
    tx = blr.ivon(np.float64(0.1), ess=np.int64(10), key=np.int32(3))
    loss = lambda w, x: jnp.mean((x @ w) ** 2)  # noqa: E731
    step = blr.make_step(tx, loss, samples=np.int64(2), jit=False)
    shapes = jax.eval_shape(lambda p: step(p, tx.init(p), np.ones((4, 3), np.float32))[0], params)
    assert shapes.shape == (3,)


def test_metrics_take_lists_and_refuse_what_is_no_number():
    """Two of three are right; the ranking of scores 0.9, 0.2 against 0.4 is right in one of two."""
    assert float(blr.metrics.accuracy(PROBS, LABELS)) == pytest.approx(2 / 3)
    np.testing.assert_allclose(blr.metrics.nll(PROBS, LABELS), -np.log([0.9, 0.8, 0.4]), rtol=1e-6)
    traced = jax.jit(lambda p, q: blr.metrics.accuracy([[p, 1 - p], [q, 1 - q]], [0, 1]))
    assert float(traced(0.9, 0.8)) == 0.5
    assert float(blr.metrics.auroc([0.9, 0.4, 0.2], [True, False, True])) == 0.5
    for call, words in (
        (lambda: blr.metrics.accuracy(PROBS, ["a", "b", "b"]), "labels: give numbers in an array"),
        (lambda: blr.metrics.accuracy(PROBS, None), "labels: .* got NoneType"),
        (lambda: blr.metrics.accuracy(None, LABELS), "probs: .* got NoneType"),
        (lambda: blr.metrics.auroc(["a"], [True]), "scores: give numbers"),
        (lambda: blr.metrics.auroc([0.5], [None]), "positive: give numbers"),
        (lambda: blr.metrics.temperature([["a", "b"]], [0]), "logits: give numbers"),
        (lambda: blr.metrics.calibration(PROBS, LABELS, bins="10"), "bins='10' must be a plain"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_figures_take_columns():
    """Predictions of a network with one output have shape (n, 1), as README's."""
    plots, column = blr.plots, np.arange(4.0)[::-1, None]
    (ax,) = plots.regression_band(column, 2 * column, 0 * column, 0.25, data=(column, column)).axes
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 0], [1, 2], [2, 4], [3, 6]])
    (ax,) = plots.training_curves({"a": column}).axes
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [3, 2, 1, 0])
    (ax,) = plots.entropy_histogram(np.zeros(3), np.zeros((2, 1))).axes
    assert ax.get_xlim() == (0.0, 1.0)


FOUND = blr.RegressionPredictive(np.ones(4), np.ones(4), np.ones(4))
FIGURES = {
    "a whole prediction": (
        lambda p: p.regression_band(X, FOUND, 1.0), "mean is a RegressionPredictive; .*.epistemic",
    ),
    "two outputs": (
        lambda p: p.regression_band(np.ones(3), np.ones((3, 2)), 1.0), r"mean has shape \(3, 2\)",
    ),
    "other sizes": (
        lambda p: p.regression_band(np.ones(3), np.ones(4), 1.0), "'x': 3, 'mean': 4",
    ),
    "a negative variance": (
        lambda p: p.regression_band(X, X, -1.0), "epistemic is a variance; got -1",
    ),
    "no example": (lambda p: p.entropy_histogram([], [1.0]), "inside: .* of no example"),
    "nan": (lambda p: p.entropy_histogram([1.0], [1.0, np.nan]), "outside: entropies are finite"),
    "log-probabilities": (
        lambda p: p.entropy_histogram([1.0], [-1.0, -3.0]), "between -3 and -1",
    ),
    "curves without names": (lambda p: p.training_curves([1.0, 2.0]), "values by name"),
    "no curve": (lambda p: p.training_curves({}), "values by name"),
    "other steps": (
        lambda p: p.training_curves({"a": [1.0, 2.0]}, steps=[1]), r"curves\['a'\] has 2 .* 1\.",
    ),
    "names": (lambda p: p.training_curves({"a": ["b"]}), "give an array of numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_wrong_calls_of_figures(name):
    call, words = FIGURES[name]
    with pytest.raises(ValueError, match=words):
        call(blr.plots)
