"""`per_example` with models of Flax Linen, Flax NNX and Equinox, none of which knows of it."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from per_example_networks import B, K, T, first_fast, xent
from test_per_example import BOTH, QUICK, assert_exact, cast, truth

import blr_optax as blr
from blr_optax.per_example._taps._sums import traced

WIDTH = 8


def data(kind):
    r = np.random.default_rng(7)
    shape = {"images": (B, 6, 6, 2), "tokens": (B, T), "vectors": (B, WIDTH)}[kind]
    x = r.integers(0, 11, shape) if kind == "tokens" else r.normal(size=shape)
    return np.asarray(x, jnp.asarray(x).dtype), r.integers(0, K, B)


# --- models: each returns (params, f), f(params, x) -> logits -------------------------------------


class LinenConvnet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3), strides=2)(x)))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x)
        x = nn.avg_pool(nn.gelu(nn.Conv(4, (3, 3), feature_group_count=4)(x)), (2, 2), (2, 2))
        return nn.Dense(K)(x.reshape(x.shape[0], -1))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(16)(nn.RMSNorm()(x))))


class LinenTransformer(nn.Module):
    block: type[nn.Module] = LinenBlock

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(11, WIDTH)(x)
        x = x + self.param("positions", nn.initializers.normal(1.0), (T, WIDTH))
        return nn.Dense(K)(self.block()(x).mean(1))


class LinenScanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        step = lambda block, x, _: (block(x), None)  # noqa: E731
        layers = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(K)(layers(LinenBlock(), nn.Embed(11, WIDTH)(x), None)[0].mean(1))


class LinenRecurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(
            nn.RNN(nn.LSTMCell(4, param_dtype=jnp.float64))(nn.Embed(11, WIDTH)(x))[:, -1]
        )


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(WIDTH)(x)))
        return nn.Dense(K)(x)


def linen(module, x):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(module.init)(keys, x)
    rngs = {"dropout": jax.random.key(2)}
    return jax.device_get(variables), lambda p, x: module.apply(p, x, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.out = nnx.Linear(4, K, rngs=rngs)

    def __call__(self, x):
        x = self.norm(nnx.relu(self.conv(x))).reshape(x.shape[0], -1, 4)
        return self.out(self.attention(x).mean(1))


def of_nnx(x):
    # Initialised as one program.
    graph, params = nnx.split(nnx.jit(lambda: NnxModel(nnx.Rngs(0)))(), nnx.Param)
    return jax.device_get(params), lambda p, x: nnx.merge(graph, p)(x)


class EquinoxModel(eqx.Module):
    """Of one example, as Equinox has it; `vmap` brings in the batch."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(6, 4, 3, padding=1, key=a)
        self.norm = eqx.nn.LayerNorm(2)
        self.attention = eqx.nn.MultiheadAttention(1, 2, key=b)
        self.mlp = eqx.nn.MLP(2, K, 8, 2, key=c)

    def __call__(self, x):
        x = jax.nn.relu(self.conv(x)).reshape(-1, 2)
        x = jax.vmap(self.norm)(x)
        return self.mlp(self.attention(x, x, x).mean(0))


class EquinoxRecurrent(eqx.Module):
    embedding: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    out: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(11, WIDTH, key=a)
        self.cell = eqx.nn.GRUCell(WIDTH, 4, key=b)
        self.out = eqx.nn.Linear(4, K, key=c)

    def __call__(self, x):
        step = lambda h, x: (self.cell(x, h), None)  # noqa: E731
        return self.out(jax.lax.scan(step, jnp.zeros(4), jax.vmap(self.embedding)(x))[0])


def equinox(model):
    whole = eqx.filter_jit(model)(jax.random.key(0))
    params, static = eqx.partition(whole, eqx.is_inexact_array)
    return jax.device_get(params), lambda p, x: jax.vmap(eqx.combine(p, static))(x)


# (model, data, parameters that do not go by their places)
MODELS = {
    "linen convnet": (functools.partial(linen, LinenConvnet()), "images", 0),
    "linen transformer": (functools.partial(linen, LinenTransformer()), "tokens", 0),
    "linen remat": (
        functools.partial(linen, LinenTransformer(nn.remat(LinenBlock))),
        "tokens",
        0,
    ),
    "linen scan": (functools.partial(linen, LinenScanned()), "tokens", 0),
    "linen lstm": (functools.partial(linen, LinenRecurrent()), "tokens", 12),
    "linen dropout": (functools.partial(linen, LinenDropout()), "vectors", 0),
    "nnx": (of_nnx, "images", 0),
    "equinox": (lambda x: equinox(EquinoxModel), "images", 0),
    "equinox gru": (lambda x: equinox(EquinoxRecurrent), "tokens", 4),
}
EACH = first_fast((name, name.split()[0], model) for name, model in MODELS.items())


@pytest.mark.parametrize("make, kind, looped", EACH)
def test_exact(x64, make, kind, looped):
    x, y = data(kind)
    params, f = make(x)
    params = cast(params, jnp.float64)
    loss = lambda p, x, y: xent(f(p, x), y)  # noqa: E731
    ways = [way.kind for way in traced(loss, params, (x, y)).ways]
    assert len(ways) - ways.count("places") == looped, ways
    ask = functools.partial(blr.per_example, loss, statistics=BOTH)
    found = jax.jit(ask, compiler_options=QUICK)(params, x, y)
    assert_exact(found, truth(loss, params, (x, y)), 1e-10)
    assert jax.tree.structure(found.sum_squares) == jax.tree.structure(params)


class LinenBatchNorm(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(nn.BatchNorm(use_running_average=not self.train)(nn.Dense(4)(x)))


class NnxBatchNorm(nnx.Module):
    def __init__(self, train):
        self.norm = nnx.BatchNorm(WIDTH, use_running_average=not train, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(WIDTH, K, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.out(self.norm(x))


def linen_batch_norm(train, x):
    variables = jax.jit(LinenBatchNorm(train).init)(jax.random.key(0), x)
    stats = variables["batch_stats"]

    def f(p, x):
        variables = {"params": p, "batch_stats": stats}
        return LinenBatchNorm(train).apply(variables, x, mutable=["batch_stats"])[0]

    return variables["params"], f


def nnx_batch_norm(train, x):
    model = nnx.jit(lambda: NnxBatchNorm(train))()
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    return params, lambda p, x: nnx.merge(graph, p, stats, copy=True)(x)


@pytest.mark.parametrize("make", [linen_batch_norm, nnx_batch_norm])
def test_batch_norm_is_refused_in_training_only(make):
    x, y = data("vectors")
    params, f = make(True, x)
    with pytest.raises(ValueError, match=r"couples its examples: .*inference mode"):
        blr.per_example(lambda p, x, y: xent(f(p, x), y), params, x, y)
    params, f = make(False, x)
    loss = lambda p, x, y: xent(f(p, x), y)  # noqa: E731
    ask = functools.partial(blr.per_example, loss, statistics=BOTH)
    found = jax.jit(ask, compiler_options=QUICK)(params, x, y)
    assert_exact(found, truth(loss, params, (x, y)), 1e-5)
