"""Predictions outside jit: compiled once, never stale, and in batches the same numbers."""

import builtins
import functools
import gc
import re
import warnings
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blr_optax as blr
from blr_optax import _averages, metrics

RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 3)).astype(np.float32)
WEIGHTS = RNG.normal(size=(3, 4)).astype(np.float32)


class Draws(NamedTuple):
    """A posterior whose draws are easily computed by numpy: a point and a uniform shift."""

    point: jax.Array
    width: jax.Array

    def sample(self, key, shape):
        return self.point + self.width * jax.random.uniform(key, (*shape, 1, 1))


Q = Draws(jnp.asarray(WEIGHTS), jnp.float32(1.0))


@functools.cache
def shifts(samples):
    keys = [jax.random.fold_in(jax.random.key(0), s) for s in range(samples)]
    return np.array([float(jax.random.uniform(key, (1, 1))[0, 0]) for key in keys])


def outputs(samples, x=X):
    """By numpy, in float64: [samples, examples, classes]."""
    return np.stack([x.astype(float) @ (WEIGHTS + u) for u in shifts(samples)])


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


class Counted:
    """A function that counts how often it is traced."""

    def __init__(self, f=lambda weights, x: x @ weights):
        self.calls, self.f = [], f

    def function(self):
        calls, f = self.calls, self.f
        return lambda weights, *x: (calls.append(1), f(weights, *x))[1]


@pytest.fixture
def compiled(monkeypatch):
    """How many programs were compiled so far; those of other tests do not count."""
    monkeypatch.setattr(_averages, "_programs", held := {})
    return lambda: len(held)


@pytest.mark.parametrize("f", [blr.predict, blr.predict_regression])
def test_one_shape_is_compiled_once_for_all_calls_keys_and_posteriors(f, compiled):
    for seed in range(3):
        f(seed, Draws(Q.point + seed, Q.width), lambda w, x: x @ w, X + seed, samples=4)
    assert compiled() == 1
    f(0, Q, lambda w, x: x @ w, X[:2], samples=4)
    f(1, Q, lambda w, x: x @ w, X[:2], samples=4)
    assert compiled() == 2  # another shape, once


def test_other_options_are_other_programs():
    apply = Counted().function()
    by = lambda **options: blr.predict(0, Q, apply, X, **options).probabilities  # noqa: E731
    np.testing.assert_allclose(by(samples=3), softmax(outputs(3)).mean(0), rtol=2e-5)
    np.testing.assert_allclose(by(samples=5), softmax(outputs(5)).mean(0), rtol=2e-5)
    np.testing.assert_allclose(by(samples=5, chunk=2), softmax(outputs(5)).mean(0), rtol=2e-5)
    reverse = lambda z: jax.nn.softmax(-z)  # noqa: E731
    np.testing.assert_allclose(by(samples=5, link=reverse), softmax(-outputs(5)).mean(0), rtol=2e-5)


SCALE = jnp.float32(1.0)


def scaled(weights, x):
    return SCALE * (x @ weights)


class Net:
    """A model whose attribute is replaced while it trains, as running statistics are."""

    def __init__(self, scale):
        self.scale = scale

    def apply(self, weights, x):
        return self.scale * (x @ weights)


def test_what_apply_reads_is_never_that_of_an_earlier_call():
    """A function reads globals, a closure, an object, an array that numpy changes in place."""
    net, box, array = Net(jnp.float32(1.0)), {"scale": jnp.float32(1.0)}, np.ones((), np.float32)
    reading = {
        "global": lambda w, x: scaled(w, x),
        "closure": lambda w, x: box["scale"] * (x @ w),
        "method": net.apply,
        "partial": functools.partial(lambda array, w, x: array * (x @ w), array),
    }
    for scale in (1.0, 2.0):
        globals()["SCALE"] = box["scale"] = net.scale = jnp.float32(scale)
        array[...] = scale
        for name, apply in reading.items():
            found = blr.predict(0, Q, apply, X, samples=2).probabilities
            expected = softmax(scale * outputs(2)).mean(0)
            np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=name)


def test_statistics_that_have_changed_are_not_compiled_anew(compiled):
    net = Net(jnp.ones(4))
    for scale in (1.0, 2.0):
        net.scale = scale * jnp.ones(4)
        found = blr.predict(0, Q, net.apply, X, samples=2).probabilities
        np.testing.assert_allclose(found, softmax(scale * outputs(2)).mean(0), rtol=2e-5)
    assert compiled() == 1


def test_functions_that_differ_in_a_number_only_are_two_programs(compiled):
    for scale in (1.0, 1.0 + 2.0**-22, 2.0):
        apply = functools.partial(lambda scale, w, x: (x @ w) * scale, scale)
        found = blr.predict(0, Q, apply, X, samples=2).probabilities
        np.testing.assert_allclose(found, softmax(scale * outputs(2)).mean(0), rtol=2e-5)
    assert compiled() == 3


def test_arguments_that_are_no_arrays_stay_python_values():
    def apply(weights, x, flip, mode):
        assert isinstance(flip, bool) and mode in ("plain", "double")
        return (-1 if flip else 1) * (2 if mode == "double" else 1) * (x @ weights)

    for factor, options in ((-1, (True, "plain")), (2, (False, "double")), (1, (False, "plain"))):
        found = blr.predict(0, Q, apply, X, *options, samples=2).probabilities
        np.testing.assert_allclose(found, softmax(factor * outputs(2)).mean(0), rtol=2e-5)


def test_programs_are_few_and_let_go_of_their_functions(monkeypatch, compiled):
    monkeypatch.setattr(_averages, "PROGRAMS", 2)
    held = []
    for factor in (0, 1, 2, 3, 2):
        apply = functools.partial(lambda factor, w, x: factor * (x @ w), factor)
        held.append(weakref.ref(apply))
        blr.predict(0, Q, apply, X[:1], samples=1)
        assert compiled() <= 2
    del apply
    gc.collect()
    assert all(ref() is None for ref in held)


def test_a_function_that_closes_over_a_trace_is_part_of_it():
    def total(scale):
        return blr.predict(0, Q, lambda w, x: scale * (x @ w), X, samples=2).probabilities[:, 0]

    with jax.checking_leaks():
        found = jax.jit(total)(2.0)
    np.testing.assert_allclose(found, softmax(2 * outputs(2)).mean(0)[:, 0], rtol=2e-5)


def test_a_scan_over_chunks_gives_the_numbers_of_the_loop():
    run = lambda x: blr.predict_regression(0, Q, lambda w, x: x @ w, x, samples=13, chunk=2)  # noqa: E731
    assert "scan" in str(jax.make_jaxpr(run)(X))
    expected = outputs(13)
    for found in (run(X), jax.jit(run)(X)):
        np.testing.assert_allclose(found.mean, expected.mean(0), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(found.epistemic, expected.var(0, ddof=1), rtol=1e-4)


def test_one_sample_at_a_time_on_a_cpu():
    assert _averages.default_chunk(None) == (1 if jax.default_backend() == "cpu" else 8)
    assert _averages.default_chunk(3) == 3


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [3, 7, 50])
def test_batches_give_the_numbers_of_the_whole_and_compile_once(batch_size, compiled):
    counted = Counted(lambda w, x, shift: x["x"] @ w + shift)
    apply = counted.function()
    found = blr.predict(0, Q, apply, {"x": X}, 0.5, samples=4, batch_size=batch_size)
    np.testing.assert_allclose(found.probabilities, softmax(outputs(4) + 0.5).mean(0), rtol=2e-5)
    assert found.total.shape == (7,) and len(counted.calls) == compiled() == 1
    longer = np.concatenate([X, X])  # of another length, in batches of the same shape
    blr.predict(1, Q, apply, {"x": jnp.asarray(longer)}, 0.5, samples=4, batch_size=batch_size)
    assert compiled() == 1


def test_batches_of_a_regression_with_noise_per_example():
    noise = np.arange(28.0).reshape(7, 4)
    run = functools.partial(
        blr.predict_regression, 0, Q, lambda w, x: x @ w, noise_variance=noise, samples=4
    )
    both = run(X), run(X, batch_size=2)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *both)
    np.testing.assert_allclose(both[1].aleatoric, noise)


def test_a_progress_bar_goes_over_the_batches(capsys):
    pytest.importorskip("rich")
    blr.predict(0, Q, lambda w, x: x @ w, X, samples=1, batch_size=2, progress=True)
    assert re.search(r"predict.*100%", capsys.readouterr().out, re.DOTALL)


def test_without_rich_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'blr_optax\[demo\]'"):
        blr.predict(0, Q, lambda w, x: x @ w, X, samples=1, batch_size=2, progress=True)


# --- outputs that are something else --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_outputs_that_are_probabilities_are_warned_about(dtype):
    probabilities = lambda w, x: jax.nn.softmax(x @ w).astype(dtype)  # noqa: E731
    with pytest.warns(UserWarning, match="probabilities already"):
        blr.predict(0, Q, probabilities, X, samples=2)
    with warnings.catch_warnings():  # as logits, log-probabilities, and with the right link
        warnings.simplefilter("error")
        as_logits = blr.predict(0, Q, lambda w, x: x @ w, X, samples=2)
        logs = blr.predict(0, Q, lambda w, x: jax.nn.log_softmax(x @ w), X, samples=2)
        same = blr.predict(0, Q, probabilities, X, samples=2, link=lambda p: p)
    np.testing.assert_allclose(logs.probabilities, as_logits.probabilities, rtol=1e-5)
    np.testing.assert_allclose(same.probabilities, as_logits.probabilities, rtol=2e-2)


def test_half_precision_logits_of_a_point_have_no_epistemic_part():
    logits = 3 * np.random.default_rng(0).normal(size=(1000, 10))
    for dtype in (jnp.bfloat16, jnp.float16):
        half = jnp.asarray(logits, dtype)
        point = Draws(jnp.zeros((1, 1)), jnp.zeros(()))
        found = jax.device_get(blr.predict(0, point, lambda w, z: z, half, samples=8))
        exact = softmax(np.asarray(half, float))
        np.testing.assert_allclose(found.probabilities, exact, rtol=1e-5)
        np.testing.assert_allclose(found.aleatoric, -(exact * np.log(exact)).sum(-1), rtol=1e-5)
        assert found.epistemic.max() < 1e-6
        both = blr.predict(0, point, lambda w, z: z[:, 0], half, samples=2, link=blr.binary_link)
        second = 1 / (1 + np.exp(-np.asarray(half[:, 0], float)))
        np.testing.assert_allclose(both.probabilities[:, 1], second, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blr.predict(0, Q, lambda w, x: x @ w[:, :1], X), r"single class.*binary_link"),
        (lambda: blr.predict(0, Q, lambda w, x: (x @ w)[0, 0], X), r"shape \(\).*binary_link"),
        (lambda: blr.predict(0, Q, lambda w, x: x @ w, X, link=jnp.exp), "do not sum to one"),
        (lambda: blr.predict(0, Q, lambda w, x: x @ w, X, progress=True), "give batch_size="),
        (lambda: blr.predict(0, Q, lambda w, x: x @ w, X, batch_size=0), "batch_size=0"),
        (
            lambda: blr.predict(0, Q, lambda w, x, y: x @ w, X, X[:3], batch_size=2),
            r"batch_size=2 needs one leading axis.*\[3, 7\]",
        ),
        (
            lambda: blr.predict(0, Q, lambda w, x: (x @ w).sum(0), X, batch_size=2),
            r"outputs with a leading axis",
        ),
        (
            lambda: jax.jit(lambda x: blr.predict(0, Q, lambda w, x: x @ w, x, batch_size=2))(X),
            r"outside jit",
        ),
        (
            lambda: blr.predict(
                0, blr.distribution("normal", mean=0.0, precision=1.0) ** -1.0, lambda w, x: x, X
            ),
            r"Distribution.sample: .*outside the domain",
        ),
    ],
)
def test_what_would_be_wrong_is_said_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- noise that depends on the weights ------------------------------------------------------------


def head(weights, x):
    z = x @ weights
    return z[:, 0], jnp.exp(z[:, 1])


HEADS = {
    "pair": head,
    "variance": lambda w, x: dict(zip(("mean", "variance"), head(w, x), strict=True)),
    "std": lambda w, x: {"mean": head(w, x)[0], "std": jnp.exp(0.5 * (x @ w)[:, 1])},
    "distribution": lambda w, x: blr.distribution(
        "normal", mean=head(w, x)[0], variance=head(w, x)[1]
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_network_that_predicts_its_noise(kind):
    z = outputs(6)
    found = blr.predict_regression(0, Q, HEADS[kind], X, samples=6)
    np.testing.assert_allclose(found.mean, z[..., 0].mean(0), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found.epistemic, z[..., 0].var(0, ddof=1), rtol=1e-4)
    np.testing.assert_allclose(found.aleatoric, np.exp(z[..., 1]).mean(0), rtol=2e-5)
    np.testing.assert_allclose(found.variance, found.epistemic + found.aleatoric)


def test_a_skewed_likelihood_has_its_own_mean_and_variance():
    """A Gamma observation of shape 3 and log-rate z: mean 3 exp(-z), variance 3 exp(-2 z)."""
    apply = lambda w, x: blr.distribution(  # noqa: E731
        "gamma", concentration=3.0, rate=jnp.exp((x @ w)[:, 0])
    )
    z = outputs(5)[..., 0]
    found = blr.predict_regression(0, Q, apply, X, samples=5)
    np.testing.assert_allclose(found.mean, (3 * np.exp(-z)).mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.epistemic, (3 * np.exp(-z)).var(0, ddof=1), rtol=1e-3)
    np.testing.assert_allclose(found.aleatoric, (3 * np.exp(-2 * z)).mean(0), rtol=1e-4)


def test_learnt_noise_is_a_function_of_the_weights():
    mean = lambda w, x: (x @ w)[:, 0]  # noqa: E731
    noise = lambda w, x: jnp.exp(w[0, 1])  # one number, a parameter  # noqa: E731
    found = blr.predict_regression(0, Q, mean, X, noise_variance=noise, samples=6)
    expected = np.exp(WEIGHTS[0, 1] + shifts(6)).mean()
    np.testing.assert_allclose(found.aleatoric, np.full(7, expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("apply", "options", "message"),
    [
        (head, {"noise_variance": 1.0}, "apply returns the variance.*leave that out"),
        (lambda w, x: (x @ w, x @ w - 100.0), {}, "negative.*logarithm"),
        (lambda w, x: (x, x, x), {}, r"3 outputs.*pair \(mean, variance\)"),
        (lambda w, x: {"loc": x, "scale": x}, {}, r"\['loc', 'scale'\]; give"),
        (lambda w, x: x @ w, {"noise_variance": -1.0}, "noise_variance must be at least zero"),
    ],
)
def test_outputs_that_say_nothing_clear_are_refused(apply, options, message):
    with pytest.raises(ValueError, match=message):
        blr.predict_regression(0, Q, apply, X, samples=2, **options)


def test_a_class_that_is_no_tree_is_sampled_as_it_is_now():
    plain = SimpleNamespace(point=jnp.asarray(WEIGHTS))
    plain.sample = lambda key, shape: plain.point
    for factor in (1.0, 2.0):
        plain.point = factor * jnp.asarray(WEIGHTS)
        found = blr.predict(0, plain, lambda w, x: x @ w, X, samples=2)
        np.testing.assert_allclose(
            found.probabilities, softmax(factor * X.astype(float) @ WEIGHTS), rtol=2e-5
        )
        assert metrics.entropy(found.probabilities).shape == (7,)
