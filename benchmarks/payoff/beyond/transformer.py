"""A small character transformer: two layers of width 48 and a context of 64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.payoff.loop import fan_in

LAYERS, WIDTH, HEADS, CONTEXT = 2, 48, 4, 64


def initial(key: Any, characters: int) -> dict[str, Any]:
    """First weights, without biases or gains."""
    keys = iter(jax.random.split(key, 3 + 4 * LAYERS))
    weights = {
        "embedding": 0.5 * jax.random.normal(next(keys), (characters, WIDTH)),
        "position": 0.1 * jax.random.normal(next(keys), (CONTEXT, WIDTH)),
        "logits": fan_in(next(keys), WIDTH, characters),
    }
    for i in range(LAYERS):
        weights[f"attend{i}"] = fan_in(next(keys), WIDTH, 3 * WIDTH)
        weights[f"join{i}"] = fan_in(next(keys), WIDTH, WIDTH, gain=0.5)
        weights[f"up{i}"] = fan_in(next(keys), WIDTH, 4 * WIDTH)
        weights[f"down{i}"] = fan_in(next(keys), 4 * WIDTH, WIDTH, gain=0.5)
    return weights


def normalised(x: Any) -> Any:
    """Zero mean and unit variance along the width."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


def attention(x: Any, attend: Any, join: Any) -> Any:
    """Causal attention of all heads."""
    batch, length, _ = x.shape
    q, k, v = jnp.split((x @ attend).reshape(batch, length, HEADS, -1), 3, axis=-1)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) / jnp.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones((length, length), bool))
    share = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    return jnp.einsum("bhij,bjhd->bihd", share, v).reshape(batch, length, -1) @ join


def apply(weights: dict[str, Any], text: Any, key: Any = None, rate: Any = 0.0) -> Any:
    """Logits of the next character at every place; with a key, what a layer adds is dropped."""

    def dropped(x: Any, at: int) -> Any:
        if key is None:
            return x
        kept = jax.random.bernoulli(jax.random.fold_in(key, at), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0.0)

    x = dropped(weights["embedding"][text] + weights["position"][: text.shape[-1]], 0)
    for i in range(LAYERS):
        added = attention(normalised(x), weights[f"attend{i}"], weights[f"join{i}"])
        x = x + dropped(added, 2 * i + 1)
        added = jax.nn.gelu(normalised(x) @ weights[f"up{i}"]) @ weights[f"down{i}"]
        x = x + dropped(added, 2 * i + 2)
    return normalised(x) @ weights["logits"]


def nll(logits: Any, following: Any) -> Any:
    """Negative log likelihood of every next character."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, following[..., None], -1)[..., 0]
