"""`per_example` against plain gradients of single examples, on every model of the table."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from per_example_networks import ROWS, K, rows, xent

import blr_optax as blr
from blr_optax.per_example._taps import _moments

BOTH = ("sum_squares", "norms")
# What halves the time that XLA takes for a program.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
WEIGHTS = np.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0])


def cast(tree, dtype):
    """Floating-point arrays of a row in another precision; numpy's stay numpy's."""

    def to(x):
        x = x if hasattr(x, "dtype") else np.asarray(x)
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(to, tree)


@functools.lru_cache  # several tests ask for the truth of one model
def gradient_of_each(loss, inputs):
    each = jax.vmap(jax.value_and_grad(loss), (None, *[0] * inputs))
    return jax.jit(each, compiler_options=QUICK)


def single_gradients(loss, params, batch):
    """Values and gradients of all examples, each on its own."""
    alone = jax.tree.map(lambda x: x[:, None], batch)
    values, grads = gradient_of_each(loss, len(batch))(params, *alone)
    return np.asarray(values, float), jax.tree.map(lambda g: np.asarray(g, float), grads)


def truth(loss, params, batch, weights=None):
    """What `per_example` must return, in float64 from the gradients of the loss as it is."""
    values, g = single_gradients(loss, params, batch)
    c = np.ones(len(values)) if weights is None else weights
    return blr.PerExample(
        c @ values / c.sum(),
        jax.tree.map(lambda g: np.tensordot(c, g, 1) / c.sum(), g),
        jax.tree.map(lambda g: np.tensordot(c, g**2, 1), g),
        np.sqrt(sum((x.reshape(len(x), -1) ** 2).sum(1) for x in jax.tree.leaves(g))),
        None,
        None,
    )


def errors(found, expected):
    """The largest error of each field, relative to its leaf's largest number."""

    def field(a, b):
        a, b = ([np.asarray(x, float) for x in jax.tree.leaves(t)] for t in (a, b))
        top = max(np.max(np.abs(x), initial=0) for x in b)
        small = 1e-6 * top  # structurally zero, such as an attention key's bias
        sizes = [np.max(np.abs(x), initial=0) for x in b]
        sizes = [top if size < small else size for size in sizes]
        assert all(x.shape == y.shape for x, y in zip(a, b, strict=True))
        return max(
            np.max(np.abs(x - y), initial=0) / s for x, y, s in zip(a, b, sizes, strict=True)
        )

    fields = zip(found[:4], expected[:4], strict=True)
    return {k: field(a, b) for k, (a, b) in zip(found._fields, fields, strict=False)}


def assert_exact(found, expected, tolerance):
    assert {k: e for k, e in errors(found, expected).items() if not e <= tolerance} == {}


def run(row, params, batch, **options):
    f = functools.partial(blr.per_example, row.loss, statistics=BOTH, **options)
    return jax.jit(f, compiler_options=QUICK)(params, *batch)


each_model = pytest.mark.parametrize("row", rows())


@each_model
def test_float64(x64, row):
    params, batch = cast((row.params, row.batch), jnp.float64)
    found = run(row, params, batch)
    assert_exact(found, truth(row.loss, params, batch), 1e-10)
    assert jax.tree.structure(found.sum_squares) == jax.tree.structure(params)


@each_model
def test_weights_and_microbatches(x64, row):
    params, batch = cast((row.params, row.batch), jnp.float64)
    expected = truth(row.loss, params, batch, WEIGHTS)
    assert_exact(run(row, params, batch, weights=WEIGHTS, microbatch=2), expected, 1e-10)


@each_model
def test_float32(row):
    with jax.enable_x64(True):
        params, batch = cast((row.params, row.batch), jnp.float32)
        wide = cast((params, batch), jnp.float64)
        expected = truth(row.loss, *wide)
    found = run(row, params, batch)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert_exact(found, expected, 1e-5)


@each_model
def test_bfloat16_compute_on_float32_parameters(row):
    params, batch = cast((row.params, row.batch), jnp.float32)

    def loss(params, *batch):
        return row.loss(*cast((params,), jnp.bfloat16), *cast(batch, jnp.bfloat16))

    found = run(row._replace(loss=loss), params, batch)
    assert {x.dtype for x in jax.tree.leaves(found.sum_squares)} == {jnp.dtype("float32")}
    # The numbers of single examples are those of the parameters as they are rounded.
    rounded = cast((params, batch), jnp.bfloat16)
    assert_exact(found, truth(row.loss, *rounded), 2e-2)


@each_model
def test_bfloat16_parameters(row):
    params, batch = cast((row.params, row.batch), jnp.bfloat16)
    found = run(row, params, batch)
    assert {x.dtype for x in jax.tree.leaves(found.grad)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(found.sum_squares)} == {jnp.dtype("float32")}
    assert_exact(found, truth(row.loss, params, batch), 2e-2)


# --- schedules ------------------------------------------------------------------------------------


SOME = ("positions", "tied_large", "convnet")


@pytest.mark.parametrize("name", SOME)
def test_few_examples_at_a_time(x64, monkeypatch, name):
    """As with more numbers than are formed at once; as on an accelerator, and on a CPU."""
    row = ROWS[name]
    params, batch = cast((row.params, row.batch), jnp.float64)
    expected = truth(row.loss, params, batch, WEIGHTS)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for numbers in (1, 2 * max(x.size for x in jax.tree.leaves(params)), 2**25):
        monkeypatch.setattr(_moments, "FORMED_AT_ONCE", numbers)
        assert_exact(run(row, params, batch, weights=WEIGHTS), expected, 1e-10)


def test_pieces_divide_the_examples():
    for examples in (1, 6, 7, 64):
        for numbers in (1, 2**21, 2**24, 2**25, 2**30):
            n = _moments.pieces(examples, numbers)
            most = _moments.one_for_each_device(examples)
            assert examples % n == 0
            assert n == most or examples // n * numbers <= _moments.FORMED_AT_ONCE
            # Every piece spreads over as many devices as the whole batch does.
            assert math.gcd(examples // n, jax.device_count()) == math.gcd(
                examples, jax.device_count()
            )


# --- under transformations ------------------------------------------------------------------------


def test_without_jit(x64):
    row = ROWS["mlp"]
    params, batch = cast((row.params, row.batch), jnp.float64)
    found = blr.per_example(row.loss, row.params, *row.batch, statistics=BOTH)
    assert_exact(found, truth(row.loss, params, batch), 1e-10)


@pytest.mark.parametrize("name", SOME)
def test_vmap_over_weight_samples(x64, name):
    row = ROWS[name]
    params, batch = cast((row.params, row.batch), jnp.float64)
    samples = jax.tree.map(lambda x: np.stack([x, 0.5 * x + 0.1, -x]), params)
    f = lambda p: blr.per_example(row.loss, p, *batch, statistics=BOTH)  # noqa: E731
    found = jax.device_get(jax.jit(jax.vmap(f), compiler_options=QUICK)(samples))
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], (found, samples))
        assert_exact(one[0], truth(row.loss, one[1], batch), 1e-10)


@pytest.mark.parametrize("name", ["mlp", "tied_large"])
def test_scan_over_micro_batches(x64, name):
    row = ROWS[name]
    params, batch = cast((row.params, row.batch), jnp.float64)
    parts = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), batch)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def total(parts):
        def step(squares, part):
            found = blr.per_example(row.loss, params, *part, statistics=BOTH)
            return jax.tree.map(jnp.add, squares, found.sum_squares), found

        zero = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(step, zero, parts)

    squares, each = jax.device_get(total(parts))
    found = each._replace(
        value=each.value.mean(),
        grad=jax.tree.map(lambda x: x.mean(0), each.grad),
        sum_squares=squares,
        norms=each.norms.ravel(),
    )
    assert_exact(found, truth(row.loss, params, batch), 1e-10)


def test_only_what_is_asked_is_returned(x64):
    row = ROWS["tied_large"]
    params, batch = cast((row.params, row.batch), jnp.float64)
    expected = truth(row.loss, params, batch)
    for names in ((), ("sum_squares",), ("norms",)):
        f = functools.partial(blr.per_example, row.loss, statistics=names)
        found = jax.jit(f, compiler_options=QUICK)(params, *batch)
        missing = {k for k, x in found._asdict().items() if x is None}
        assert missing == {"sum_squares", "norms", "kfac", "ggn_diagonal"} - {*names}
        same = expected._replace(**dict.fromkeys(missing))
        for k in ("value", "grad", *names):
            a, b = jax.tree.leaves(getattr(found, k)), jax.tree.leaves(getattr(same, k))
            for x, y in zip(a, b, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-13)


def test_batch_of_one_and_permuted_examples(x64):
    row = ROWS["positions"]
    params, batch = cast((row.params, row.batch), jnp.float64)
    one = jax.tree.map(lambda x: x[:1], batch)
    assert_exact(run(row, params, one), truth(row.loss, params, one), 1e-10)
    turned = jax.tree.map(lambda x: x[::-1], batch)
    a, b = run(row, params, batch, microbatch=2), run(row, params, turned, microbatch=3)
    a, b = jax.device_get((a, b))
    assert_exact(a._replace(norms=a.norms[::-1]), b, 1e-12)


def test_strict_modes(strict):
    batch, params = cast(ROWS["convnet"].batch, jnp.float32), {"w": np.ones((112, K), np.float32)}
    loss = lambda p, x, y: xent(jnp.tanh(x.reshape(x.shape[0], -1) @ p["w"]), y)  # noqa: E731
    ask = functools.partial(blr.per_example, loss, statistics=BOTH)
    found = jax.jit(ask, compiler_options=QUICK)(params, *batch)
    assert_exact(found, truth(loss, params, batch), 1e-5)
