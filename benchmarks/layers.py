"""Models for `bench_per_example`: one of every kind of layer, in plain JAX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from benchmarks.models import Problem

CLASSES = 10


def _normal(key, *shape):
    fan_in = shape[-2] if len(shape) < 3 else shape[0] * shape[1] * shape[2]
    return jax.random.normal(key, shape) / jnp.sqrt(fan_in)


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _norm(x, p, axes=(-1,)):
    x = x - x.mean(axes, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + 1e-5)
    return x.reshape(*x.shape[:3], -1) * p[0] + p[1] if len(axes) > 1 else x * p[0] + p[1]


def mlp(batch: int = 128, width: int = 512) -> Problem:
    """Three hidden layers."""
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = (width, width, width, width, CLASSES)
    params = [
        {"w": _normal(k, a, b), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]

    def loss(params, x, y):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return _cross_entropy(x @ params[-1]["w"] + params[-1]["b"], y)

    x = jax.random.normal(keys[-1], (batch, width))
    return Problem(params, loss, (x, jnp.arange(batch) % CLASSES), 60_000)


def convnet(batch: int = 64, size: int = 8, channels: int = 32) -> Problem:
    """Four convolutions with GroupNorm, one of them strided."""
    keys = jax.random.split(jax.random.key(1), 6)
    widths, strides = (3, channels, channels, 2 * channels, 2 * channels), (1, 1, 2, 1)
    params = {
        "convs": [
            {"w": _normal(k, 3, 3, a, b), "norm": jnp.stack([jnp.ones(b), jnp.zeros(b)])}
            for k, a, b in zip(keys, widths, widths[1:], strict=False)
        ],
        "head": _normal(keys[4], widths[-1], CLASSES),
    }

    def loss(params, x, y):
        for conv, stride in zip(params["convs"], strides, strict=True):
            x = jax.lax.conv_general_dilated(
                x, conv["w"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            groups = x.reshape(*x.shape[:3], 8, -1)
            x = jax.nn.relu(_norm(groups, conv["norm"], (1, 2, 4)))
        return _cross_entropy(x.mean((1, 2)) @ params["head"], y)

    x = jax.random.normal(keys[5], (batch, size, size, 3))
    return Problem(params, loss, (x, jnp.arange(batch) % CLASSES), 50_000)


def transformer(
    batch: int = 32, length: int = 32, width: int = 128, layers: int = 2, tied: bool = False
) -> Problem:
    """Blocks of attention and an MLP; `tied`: the embedding is the output head too."""
    keys = jax.random.split(jax.random.key(2), 4 + layers)
    heads, vocabulary = 4, 64

    def block(key):
        k = jax.random.split(key, 6)
        square = {n: _normal(i, width, width) for n, i in zip("qkvo", k, strict=False)}
        norms = {n: jnp.stack([jnp.ones(width), jnp.zeros(width)]) for n in ("norm1", "norm2")}
        up, down = _normal(k[4], width, 4 * width), _normal(k[5], 4 * width, width)
        return {**square, **norms, "up": up, "up_b": jnp.zeros(4 * width), "down": down}

    params = {
        "tokens": _normal(keys[0], vocabulary, width),
        "positions": _normal(keys[1], length, width),
        "blocks": [block(k) for k in keys[4:]],
        **({} if tied else {"head": _normal(keys[2], width, vocabulary)}),
    }

    def loss(params, tokens, labels):
        h = params["tokens"][tokens] + params["positions"]
        for p in params["blocks"]:
            z = _norm(h, p["norm1"])
            q, k, v = ((z @ p[n]).reshape(*z.shape[:2], heads, -1) for n in "qkv")
            scores = jnp.einsum("bthe,bshe->bhts", q, k) / jnp.sqrt(width / heads)
            mixed = jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(scores), v)
            h = h + mixed.reshape(z.shape) @ p["o"]
            h = h + jax.nn.gelu(_norm(h, p["norm2"]) @ p["up"] + p["up_b"]) @ p["down"]
        head = params["tokens"].T if tied else params["head"]
        return _cross_entropy(h @ head, labels)

    tokens = jax.random.randint(keys[3], (batch, length + 1), 0, vocabulary)
    return Problem(params, loss, (tokens[:, :-1], tokens[:, 1:]), 10_000)


def lstm(batch: int = 32, length: int = 16, width: int = 64) -> Problem:
    """One LSTM layer in a `lax.scan`: its kernels are used at every step."""
    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        "x": _normal(keys[0], width, 4 * width),
        "h": _normal(keys[1], width, 4 * width),
        "b": jnp.zeros(4 * width),
        "head": _normal(keys[2], width, CLASSES),
    }

    def loss(params, x, y):
        def cell(carry, x):
            h, c = carry
            gates = x @ params["x"] + h @ params["h"] + params["b"]
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), None

        zero = jnp.zeros((x.shape[0], width), x.dtype)
        (h, _), _ = jax.lax.scan(cell, (zero, zero), x.swapaxes(0, 1))
        return _cross_entropy(h @ params["head"], y)

    x = jax.random.normal(keys[3], (batch, length, width))
    return Problem(params, loss, (x, jnp.arange(batch) % CLASSES), 10_000)


PROBLEMS = {
    "mlp_64": functools.partial(mlp, 64),
    "mlp_256": functools.partial(mlp, 256),
    "conv_8": convnet,
    "conv_32": functools.partial(convnet, 16, 32),
    "blocks_8_64": functools.partial(transformer, 64, 8, 64),
    "blocks_32_128": transformer,
    "blocks_64_256": functools.partial(transformer, 8, 64, 256),
    "tied_32_128": functools.partial(transformer, tied=True),
    "lstm": lstm,
}
TIED = ("tied_32_128", "lstm")
