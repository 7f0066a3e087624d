"""Posterior predictives against stored samples, closed forms, and each other."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from blr_optax import Distribution, families, metrics
from blr_optax._predict import binary_link, predict, predict_regression

KEY = jax.random.key(3)


class Gaussian(NamedTuple):
    """The least a posterior must offer: independent normal weights, the last row a bias."""

    mean: jax.Array
    std: float

    def sample(self, key, shape):
        noise = jax.random.normal(key, shape + self.mean.shape, self.mean.dtype)
        return self.mean + self.std * noise


def linear(weights, x):
    return x @ weights[:-1] + weights[-1]


def problem(features=3, classes=4):
    return problem_in(features, classes, jax.config.jax_enable_x64)


@functools.cache
def problem_in(features, classes, x64):
    draw = jax.jit(
        lambda: (
            jax.random.normal(jax.random.key(0), (features + 1, classes)),
            jax.random.normal(jax.random.key(1), (6, features)),
        )
    )
    mean, x = jax.device_get(draw())
    return Gaussian(mean, 0.7), x


@functools.cache
def compiled(f, apply, **options):
    """`f(key, q, apply, *inputs, **options)` as one program of the key, q and the inputs."""
    return jax.jit(lambda key, q, *inputs: f(key, q, apply, *inputs, **options))


@functools.partial(jax.jit, static_argnums=(1, 3))
def stored_outputs(q, apply, x, samples, key=KEY):
    """The outputs under every weight sample, one at a time."""
    draws = [q.sample(jax.random.fold_in(key, s), ()) for s in range(samples)]
    return jnp.stack([apply(weights, x) for weights in draws])


@jax.jit
def split_of(logits):
    probs = jax.nn.softmax(logits)
    return probs, metrics.entropy_split(probs)


@pytest.mark.parametrize("chunk", [1, 3, 8, 10, 64])  # 10 samples: even, uneven, one, too many
def test_predict_equals_stored_samples_for_every_chunk(x64, chunk):
    q, x = problem()
    probs, expected = jax.device_get(split_of(stored_outputs(q, linear, x, 10)))
    p = compiled(predict, linear, samples=10, chunk=chunk)(KEY, q, x)
    np.testing.assert_allclose(p.probabilities, probs.mean(0), rtol=1e-13)
    np.testing.assert_allclose(p.total, expected.total, rtol=1e-13)
    np.testing.assert_allclose(p.aleatoric, expected.aleatoric, rtol=1e-13)
    np.testing.assert_allclose(p.epistemic, expected.epistemic, rtol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_predict_regression_equals_stored_samples_for_every_chunk(x64, chunk):
    q, x = problem(classes=2)
    outputs = np.asarray(stored_outputs(q, linear, x, 10))
    options = {"samples": 10, "chunk": chunk, "noise_variance": 0.25}
    p = jax.device_get(compiled(predict_regression, linear, **options)(KEY, q, x))
    np.testing.assert_allclose(p.mean, outputs.mean(0), rtol=1e-13)
    np.testing.assert_allclose(p.epistemic, outputs.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_array_equal(p.aleatoric, np.full((6, 2), 0.25))
    np.testing.assert_allclose(p.variance, p.epistemic + 0.25)


def test_linear_regression_reaches_its_closed_form():
    q, x = problem(classes=1)
    p = compiled(predict_regression, linear, samples=20_000, chunk=500)(KEY, q, x)
    variance = q.std**2 * (np.sum(x**2, -1, keepdims=True) + 1)
    standard_error = np.sqrt(variance.max() / 20_000)
    np.testing.assert_allclose(p.mean, linear(q.mean, x), atol=4 * standard_error)
    np.testing.assert_allclose(p.epistemic, variance, rtol=0.05)


def test_variance_survives_a_mean_far_above_the_spread():
    q = Gaussian(np.float32(1e4), 0.1)
    p = compiled(predict_regression, lambda weight: weight, samples=2000, chunk=500)(KEY, q)
    np.testing.assert_allclose(p.epistemic, 0.01, rtol=0.15)


def test_any_output_shape_including_pixels():
    q, _ = problem()
    images = np.random.default_rng(3).normal(size=(2, 5, 7, 3)).astype(np.float32)
    p = jax.device_get(compiled(predict, linear, samples=4)(KEY, q, images))
    assert p.probabilities.shape == (2, 5, 7, 4) and p.epistemic.shape == (2, 5, 7)
    np.testing.assert_allclose(p.probabilities.sum(-1), 1, rtol=1e-6)


def test_binary_link_equals_softmax_of_two_logits():
    q, x = problem(classes=1)
    one = lambda weights, x: linear(weights, x)[..., 0]  # noqa: E731
    two = lambda weights, x: jnp.pad(linear(weights, x), [(0, 0), (1, 0)])  # noqa: E731
    by_logit = compiled(predict, one, samples=16, link=binary_link)(KEY, q, x)
    by_softmax = compiled(predict, two, samples=16)(KEY, q, x)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, by_logit, by_softmax)
    assert by_logit.probabilities.shape == (6, 2)


def test_a_point_posterior_has_no_epistemic_part():
    q, x = problem()
    point = q._replace(std=0.0)
    p = jax.device_get(compiled(predict, linear, samples=5)(KEY, point, x))
    odds = np.exp(linear(q.mean, x))
    np.testing.assert_allclose(p.probabilities, odds / odds.sum(-1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(p.epistemic, 0, atol=1e-6)
    assert p.epistemic.min() >= 0
    r = compiled(predict_regression, linear, samples=5)(KEY, point, x)
    assert np.max(r.epistemic) == 0


def test_half_precision_outputs_are_averaged_in_float32():
    q, x = problem()
    half = lambda weights, x: linear(weights, x).astype(jnp.bfloat16)  # noqa: E731
    p = jax.device_get(compiled(predict, half, samples=300)(KEY, q, x))
    assert {leaf.dtype for leaf in p} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(p.probabilities.sum(-1), 1, atol=5e-3)
    assert jax.eval_shape(compiled(predict_regression, half), KEY, q, x).mean.dtype == jnp.float32


def test_jit_with_any_inputs_gives_the_same_numbers():
    q, x = problem()
    apply = lambda weights, x, shift: linear(weights, x["features"]) + shift  # noqa: E731
    run = lambda key, q, x, s: predict(key, q, apply, {"features": x}, s, samples=9)  # noqa: E731
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, jax.jit(run)(KEY, q, x, 1.0), run(KEY, q, x, 1.0))


def test_apply_never_sees_more_than_a_chunk_of_samples():
    q, x = problem()
    jaxpr = str(jax.make_jaxpr(lambda k: predict(k, q, linear, x, samples=60, chunk=5))(KEY))
    assert "f32[5,6,4]" in jaxpr  # one chunk of logits,
    assert "f32[60," not in jaxpr  # not all of them,
    assert "f32[12," not in jaxpr  # nor one sum per chunk


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_gives_the_same_numbers(axis_type):
    q, x = problem()
    devices = np.array(jax.devices()[:2])
    if len(devices) < 2:
        pytest.skip("needs two devices")
    with jax.set_mesh(jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))):
        spread = jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), PartitionSpec("batch")))
        p = jax.jit(lambda x: predict(KEY, q, linear, x, samples=10, chunk=4))(spread)
    expected = jax.jit(lambda x: predict(KEY, q, linear, x, samples=10, chunk=4))(x)
    np.testing.assert_allclose(p.probabilities, expected.probabilities, rtol=1e-5)
    assert p.probabilities.sharding.spec[0] == "batch"


def test_a_posterior_over_a_pytree(x64):
    family = families.MeanField(families.get("normal"))
    mean = {"w": np.array([[1.0, -1.0], [0.5, 2.0]]), "b": np.array([0.0, 1.0])}
    q = Distribution(family, family.natural(mean=mean, precision=4.0))
    x = np.array([[1.0, 2.0], [-1.0, 0.5]])
    apply = lambda weights, x: x @ weights["w"] + weights["b"]  # noqa: E731
    expected = np.mean(split_of(stored_outputs(q, apply, x, 12))[0], 0)
    p = jax.jit(lambda key, q, x: predict(key, q, apply, x, samples=12, chunk=5))(KEY, q, x)
    np.testing.assert_allclose(p.probabilities, expected, rtol=1e-12)


def test_inside_shard_map_it_sees_its_part_of_the_batch():
    q, x = problem()
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    run = lambda x: predict(KEY, q, linear, x, samples=10, chunk=4)  # noqa: E731
    parts = jax.shard_map(
        run, mesh=mesh, in_specs=PartitionSpec("batch"), out_specs=PartitionSpec("batch")
    )
    probabilities = jax.jit(parts)(x).probabilities
    np.testing.assert_allclose(probabilities, jax.jit(run)(x).probabilities, rtol=1e-5)


def test_gradients_reach_the_posterior(x64):
    q, x = problem()

    @jax.jit
    @jax.value_and_grad
    def loss(mean):
        p = predict(KEY, q._replace(mean=mean), linear, x, samples=6)
        return metrics.nll(p.probabilities, jnp.arange(6) % 4).sum()

    direction = np.random.default_rng(3).normal(size=q.mean.shape)
    ahead, behind = (loss(q.mean + step * direction)[0] for step in (1e-5, -1e-5))
    slope = np.vdot(loss(q.mean)[1], direction)
    np.testing.assert_allclose((ahead - behind) / 2e-5, slope, rtol=1e-7)


Q, X = problem()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict("0", Q, linear, X), r"key: give a typed key.*str"),
        (lambda: predict(jnp.zeros(2, jnp.uint32), Q, linear, X), r"jax.random.key\(seed\)"),
        (lambda: predict(jax.random.split(KEY), Q, linear, X), r"one typed key, not an array"),
        (lambda: predict_regression(0.5, Q, linear, X), r"key: give a typed key.*float"),
        (lambda: predict(KEY, Q, linear, X, samples=0), r"samples=0"),
        (lambda: predict(KEY, Q, linear, X, chunk=0), r"chunk=0"),
        (lambda: predict(KEY, Q, lambda w, x: linear(w, x)[..., 0], X), r"predict_regression"),
        (lambda: predict(KEY, Q, linear, X, link=jax.nn.sigmoid), r"link=.*binary_link"),
        (lambda: predict_regression(KEY, Q, linear, X, samples=1), r"samples=1 .*2"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_integer_is_a_seed():
    seeded, keyed = (
        predict(key, Q, linear, X, samples=4).probabilities for key in (3, jax.random.key(3))
    )
    np.testing.assert_array_equal(seeded, keyed)
