"""The standard normal noise of both generators: distribution, independence, reproducibility.

Statistical bounds are five standard errors on fixed seeds: a right generator passes with
probability 1 - 6e-7 per comparison, and always again once it has.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from blr_optax import _random
from blr_optax._random import (
    GENERATORS,
    canonical_key,
    check_generator,
    hash_normal,
    standard_normal,
    step_key,
)

N = 2**22  # 4.2 million
every_generator = pytest.mark.parametrize("generator", GENERATORS)


def draw(key, shape, generator, name="w"):
    return standard_normal(key, {name: jax.ShapeDtypeStruct(shape, jnp.float32)}, generator)[name]


@functools.cache
def sample(generator, seed=0):
    """N draws in float64."""
    x = jax.jit(draw, static_argnums=(1, 2))(jax.random.key(seed), (N,), generator)
    return np.asarray(x, np.float64)


@functools.cache
def means_of_powers(generator):
    """Of the draws, from the first power to the eighth."""
    x, means = sample(generator), []
    power = np.ones_like(x)
    for _ in range(8):
        power *= x
        means.append(np.mean(power))
    return means


@functools.cache
def cells_of(generator):
    """Which of 32 intervals of equal probability each draw lies in."""
    return np.floor(32 * stats.norm.cdf(sample(generator))).astype(int).clip(0, 31)


def standardized(x):
    """The draws and their squares, each with mean 0 and variance 1."""
    return {"draws": x, "squares": (x * x - 1) / np.sqrt(2)}


def assert_uncorrelated(a, b, label):
    """`a` may be standardized already."""
    a, b = (x if isinstance(x, dict) else standardized(x) for x in (a, b))
    for name, u in a.items():
        for other, v in b.items():
            z = np.dot(u, v) / np.sqrt(u.size)
            assert abs(z) < 5, (label, name, other, z)


# --- distribution ---------------------------------------------------------------------------------


@every_generator
@pytest.mark.parametrize("order", range(1, 9))
def test_moments(generator, order):
    even = math.prod(range(1, order, 2)) if order % 2 == 0 else 0
    variance = math.prod(range(1, 2 * order, 2)) - even**2
    z = (means_of_powers(generator)[order - 1] - even) / np.sqrt(variance / N)
    assert abs(z) < 5, z


@every_generator
def test_distribution_function(generator):
    assert stats.kstest(sample(generator), "norm").pvalue > 1e-4


@every_generator
@pytest.mark.parametrize("level", [0.0, 1.0, 2.0, 3.0, 4.0, 4.5])
def test_tail_frequencies_on_both_sides(generator, level):
    x, p = sample(generator), stats.norm.sf(level)
    for count in (np.sum(x > level), np.sum(x < -level)):
        assert abs(count - N * p) < 5 * np.sqrt(N * p * (1 - p)), (count, N * p)


@every_generator
def test_finite_and_within_reach_of_24_bits(generator):
    x = sample(generator)
    assert np.isfinite(x).all()
    assert 4.9 < np.abs(x).max() < 6.0


# --- independence ---------------------------------------------------------------------------------


@every_generator
def test_neighbouring_counters(generator):
    spectra = {name: np.fft.rfft(u) for name, u in standardized(sample(generator)).items()}
    lags = np.array([*range(1, 65), 128, 256, 1024])
    for name, u in spectra.items():
        for other, v in spectra.items():
            z = np.fft.irfft(np.conj(u) * v)[lags] / np.sqrt(N)  # circular
            assert np.abs(z).max() < 5, (name, other, lags[np.abs(z).argmax()], np.abs(z).max())


@every_generator
@pytest.mark.parametrize("lag", [1, 2, 64, 1024])
def test_pairs_of_neighbours_are_jointly_normal(generator, lag):
    """Chi-square of a 32 x 32 histogram of (x_i, x_i+lag) with equal probabilities."""
    cells = cells_of(generator)
    table = np.bincount(32 * cells[:-lag] + cells[lag:], minlength=1024)
    assert stats.chisquare(table).pvalue > 1e-6


@every_generator
def test_leaves_steps_and_samples(generator):
    shape, key = (2**18,), jax.random.key(3)
    one = jax.jit(lambda k: draw(k, shape, generator))
    streams = {("step", t): one(step_key(key, t)) for t in range(8)}
    streams |= {("sample", s): one(step_key(key, 0, s)) for s in range(1, 8)}
    like = {str(i): jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(8)}
    leaves = jax.jit(lambda k: standard_normal(k, like, generator))(step_key(key, 0))
    streams |= {("leaf", name): x for name, x in leaves.items()}
    streams = {name: np.asarray(x, np.float64) for name, x in streams.items()}
    names = list(streams)
    matrix = np.stack([streams[name] for name in names])
    for name, rows in standardized(matrix).items():
        z = rows @ rows.T / np.sqrt(rows.shape[1])
        np.fill_diagonal(z, 0)
        worst = np.unravel_index(np.abs(z).argmax(), z.shape)
        assert np.abs(z).max() < 5.3, (
            name,
            names[worst[0]],
            names[worst[1]],
            z[worst],
        )  # 253 pairs


@every_generator
def test_keys_that_differ_in_one_bit(generator):
    base, shape = np.array([0x12345678, 0x9ABCDEF0], np.uint32), (2**16,)
    one = jax.jit(lambda data: draw(jax.random.wrap_key_data(data), shape, generator))
    x = standardized(np.asarray(one(base), np.float64))
    for word in range(2):
        for bit in range(32):
            flipped = base.copy()
            flipped[word] ^= np.uint32(1 << bit)
            assert_uncorrelated(x, np.asarray(one(flipped), np.float64), (word, bit))


def test_hash_streams_that_share_their_counters_share_nothing_else():
    """Equal first words put two streams on the same counters; the second words must part them."""
    rng = np.random.default_rng(0)
    one = jax.jit(lambda words: hash_normal(words, (2**18,)))
    for _ in range(24):
        first, a, b = rng.integers(2**32, size=3, dtype=np.uint32)
        x, y = (np.asarray(one(jnp.array([first, w])), np.float64) for w in (a, b))
        assert_uncorrelated(x, y, (first, a, b))


# --- reproducibility ------------------------------------------------------------------------------


def assert_same_up_to_fusing(a, b):
    """Programs of other shapes fuse multiplications and additions elsewhere: the last bits move."""
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_the_hash_counts_in_row_major_order():
    made = jax.jit(
        lambda shape: hash_normal(jnp.array([5, 7], jnp.uint32), shape), static_argnums=0
    )
    flat = np.asarray(made((2048,)))
    for shape in [(2, 1024), (4, 8, 64), (1, 2048)]:
        assert_same_up_to_fusing(np.ravel(made(shape)), flat)
    assert_same_up_to_fusing(made((100,)), flat[:100])
    assert made(()) == flat[0]
    assert made((0, 3)).shape == (0, 3)


@every_generator
def test_jit_vmap_and_eager_agree(generator):
    """Threefry to the bit; of the hash only the integers, jit fuses multiplications and sums."""
    same = functools.partial(
        np.testing.assert_allclose, rtol=0, atol=2e-6 if generator == "hash" else 0
    )
    keys = jax.random.split(jax.random.key(0), 3)
    eager = np.stack([draw(k, (257,), generator) for k in keys])
    jitted = jax.jit(draw, static_argnums=(1, 2))
    same(np.stack([jitted(k, (257,), generator) for k in keys]), eager)
    same(jax.vmap(lambda k: draw(k, (257,), generator))(keys), eager)


@every_generator
@pytest.mark.parametrize("spec", [("x", None), (None, "x"), (("x",), None)])
def test_sharded_equals_unsharded(generator, spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    like = np.zeros((64, 128), np.float32)
    alone = jax.jit(lambda k: standard_normal(k, like, generator))(jax.random.key(1))
    spread = jax.jit(
        lambda k, x: jax.lax.with_sharding_constraint(standard_normal(k, x, generator), sharding)
    )(jax.random.key(1), jax.device_put(like, sharding))
    assert spread.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(spread, alone)


@every_generator
def test_paths_dtypes_and_holes(generator):
    key = jax.random.key(0)
    zeros = np.zeros(64, np.float32)
    like = {"a": zeros, "b": {"a": zeros}, "h": zeros.astype(jnp.bfloat16)}
    normal = jax.jit(lambda key, like: standard_normal(key, like, generator))
    noise = jax.device_get(normal(key, like))
    assert jax.tree.map(lambda x: x.dtype.name, noise) == {
        "a": "float32", "b": {"a": "float32"}, "h": "float32"
    }  # fmt: skip
    rows = [noise["a"], noise["b"]["a"], noise["h"]]
    assert all(not np.any(x == y) for i, x in enumerate(rows) for y in rows[:i])
    masked = normal(key, {**like, "a": optax.MaskedNode()})
    np.testing.assert_array_equal(masked["b"]["a"], noise["b"]["a"])
    assert isinstance(masked["a"], optax.MaskedNode)


@every_generator
def test_float64_weights_get_float64_noise(x64, generator):
    normal = jax.jit(lambda key: standard_normal(key, np.zeros(64), generator))
    noise = normal(jax.random.key(0))
    assert noise.dtype == jnp.float64


# --- the polynomials ------------------------------------------------------------------------------


def test_log_over_the_numbers_it_is_given():
    """Within 1.5e-7 relative of numpy's float64 logarithm (1.2e-7 over all 2^24), never above 0."""
    words = np.r_[0 : 2**16, 2**16 : 2**24 : 15, 2**24 - 2**18 : 2**24].astype(np.float32)
    u = (words + np.float32(0.5)) * np.float32(2.0**-24)
    found = np.asarray(jax.jit(_random._log)(u), np.float64)
    truth = np.log(u.astype(np.float64))
    assert found.max() <= 0.0
    np.testing.assert_allclose(found, truth, rtol=1.5e-7, atol=0)


def test_cosine_over_its_range():
    """Within 5e-6 of numpy's float64 cosine for |t| <= 1/2."""
    t = np.linspace(-0.5, 0.5, 2**22, dtype=np.float32)
    found = jax.jit(lambda t: _random._polynomial(t * t, _random._COS))(t)
    truth = np.cos(2 * np.pi * t.astype(np.float64))
    np.testing.assert_allclose(np.asarray(found, np.float64), truth, rtol=0, atol=5e-6)


# --- keys and errors ------------------------------------------------------------------------------


def test_step_keys_are_distinct_and_the_key_is_canonical():
    key = canonical_key(7)
    assert key == jax.random.key(7) == canonical_key(jnp.array(7)) == canonical_key(np.int64(7))
    assert canonical_key(key) == key
    keys = [step_key(key, t, s) for t in range(4) for s in range(4)]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 16


def test_bad_generators_and_keys_name_themselves():
    with pytest.raises(ValueError, match="generator='philox' is unknown; known: hash, jax"):
        check_generator("philox")
    for bad in (jnp.zeros(2, jnp.uint32), 0.5):
        with pytest.raises(ValueError, match="typed key"):
            canonical_key(bad)
