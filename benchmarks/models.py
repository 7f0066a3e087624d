"""Models and batches for the benchmarks, in plain JAX: params, loss(params, *batch), batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model with its batch.

    Attributes:
        params: the weights.
        loss: mean loss of `(params, *batch)`.
        batch: the batch.
        examples: size of the data set that the batch stands for (`ess`).
        on_cpu: whether it is small enough for a CPU.
    """

    params: Any
    loss: Callable[..., jax.Array]
    batch: tuple
    examples: int
    on_cpu: bool = True


def _dense(key, n_in, n_out):
    return {
        "w": jax.random.normal(key, (n_in, n_out)) / jnp.sqrt(n_in),
        "b": jnp.zeros(n_out),
    }


def mlp(batch: int = 128) -> Problem:
    """An MLP of 2.2 M weights, 784-1024-1024-330-10."""
    sizes = (784, 1024, 1024, 330, 10)
    keys = jax.random.split(jax.random.key(0), len(sizes) + 1)
    params = [_dense(k, a, b) for k, a, b in zip(keys, sizes, sizes[1:], strict=False)]

    def loss(params, x, y):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        logits = x @ params[-1]["w"] + params[-1]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    x = jax.random.normal(keys[-1], (batch, sizes[0]))
    y = jax.random.randint(keys[-2], (batch,), 0, sizes[-1])
    return Problem(params, loss, (x, y), 60_000)


def convnet() -> Problem:
    """A convnet on 32 x 32 x 3 images: three 3 x 3 convolutions, a dense head, batch 64."""
    channels = (3, 32, 64, 64)
    keys = jax.random.split(jax.random.key(1), 6)
    convs = [
        {
            "w": jax.random.normal(k, (3, 3, a, b)) / jnp.sqrt(9 * a),
            "b": jnp.zeros(b),
        }
        for k, a, b in zip(keys, channels, channels[1:], strict=False)
    ]
    params = {"convs": convs, "head": _dense(keys[3], 4 * 4 * channels[-1], 10)}

    def loss(params, x, y):
        for conv in params["convs"]:
            x = jax.lax.conv_general_dilated(
                x, conv["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + conv["b"])
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
        logits = x.reshape(x.shape[0], -1) @ params["head"]["w"] + params["head"]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    x = jax.random.normal(keys[4], (64, 32, 32, 3))
    y = jax.random.randint(keys[5], (64,), 0, 10)
    return Problem(params, loss, (x, y), 50_000)


def transformer() -> Problem:
    """A decoder of GPT-2's shape with 124 M weights, float32, bfloat16 products, 8 x 512 tokens."""
    layers, heads, width, vocabulary, length = 12, 12, 768, 50257, 512
    keys = jax.random.split(jax.random.key(2), 8)
    scale = 0.02
    stack = lambda k, *shape: scale * jax.random.normal(k, (layers, *shape))  # noqa: E731
    params = {
        "tokens": scale * jax.random.normal(keys[0], (vocabulary, width)),
        "positions": scale * jax.random.normal(keys[1], (1024, width)),
        "blocks": {
            "qkv": stack(keys[2], width, 3 * width),
            "proj": stack(keys[3], width, width),
            "up": stack(keys[4], width, 4 * width),
            "down": stack(keys[5], 4 * width, width),
            "qkv_b": jnp.zeros((layers, 3 * width)),
            "proj_b": jnp.zeros((layers, width)),
            "up_b": jnp.zeros((layers, 4 * width)),
            "down_b": jnp.zeros((layers, width)),
            "norm1": jnp.ones((layers, 2, width)),
            "norm2": jnp.ones((layers, 2, width)),
        },
        "norm": jnp.ones((2, width)),
    }

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return p[0] * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) + p[1] - 1.0

    def product(x, w):
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)

    def block(x, p):
        b, t, d = x.shape
        qkv = product(norm(x, p["norm1"]), p["qkv"]) + p["qkv_b"]
        q, k, v = (z.reshape(b, t, heads, d // heads) for z in jnp.split(qkv, 3, -1))
        attended = jax.nn.dot_product_attention(
            *(z.astype(jnp.bfloat16) for z in (q, k, v)), is_causal=True
        )
        x = x + product(attended.reshape(b, t, d), p["proj"]) + p["proj_b"]
        h = jax.nn.gelu(product(norm(x, p["norm2"]), p["up"]) + p["up_b"])
        return x + product(h, p["down"]) + p["down_b"], None

    def loss(params, tokens):
        x = params["tokens"][tokens[:, :-1]] + params["positions"][: tokens.shape[1] - 1]
        x, _ = jax.lax.scan(jax.checkpoint(block), x, params["blocks"])
        logits = product(norm(x, params["norm"]), params["tokens"].T)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    tokens = jax.random.randint(keys[7], (8, length + 1), 0, vocabulary)
    return Problem(params, loss, (tokens,), 10_000_000, on_cpu=False)


PROBLEMS = {
    "mlp": mlp,
    "mlp_4096": functools.partial(mlp, 4096),
    "convnet": convnet,
    "transformer": transformer,
}
