"""The network of all tasks of a kind, padded: d-100-100-k, or d-50-50-1 with one learnt noise.

Weights are drawn row by row of the padded side, so that a wider padding draws the same ones; those
of padded features and classes are zero and stay it, since their gradients are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.payoff.tasks import Kind

NEVER = 1e9  # by how much a padded class is less likely


def rows(key: Any, count: int, width: int) -> Any:
    """A (count, width) matrix of N(0, 1) whose row i does not depend on the count."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (width,)))(
        jnp.arange(count)
    )


def initial(key: Any, kind: Kind, features: Any, classes: Any) -> Any:
    """First weights: deviations sqrt(2 / inputs), of the last layer 1 / sqrt(inputs); no biases."""
    first, second, last = jax.random.split(key, 3)
    width = kind.hidden
    weights = {
        "w1": rows(first, kind.features, width) * features[:, None] * jnp.sqrt(2 / features.sum()),
        "b1": jnp.zeros(width),
        "w2": rows(second, width, width) * np.sqrt(2 / width),
        "b2": jnp.zeros(width),
        "w3": rows(last, kind.classes, width).T * classes / np.sqrt(width),
        "b3": jnp.zeros(kind.classes),
    }
    return {**weights, "log_noise": jnp.zeros(())} if kind.regression else weights


def scales(weights: Any, features: Any, classes: Any) -> Any:
    """Root mean square of the first weights of every leaf, without the padded ones.

    Leaves of zeros take the smallest one of the matrices, at most 0.3.
    """
    count = {"w1": features.sum() * weights["w1"].shape[1],
             "w2": weights["w2"].size,
             "w3": classes.sum() * weights["w3"].shape[0]}  # fmt: skip
    found = {k: jnp.sqrt(jnp.sum(weights[k] ** 2) / n) for k, n in count.items()}
    least = jnp.minimum(jnp.min(jnp.stack(list(found.values()))), 0.3)
    return {k: found.get(k, least) for k in weights}


def hidden(weights: Any, x: Any, key: Any = None, rate: Any = None) -> Any:
    """The last hidden layer; with a key, units are dropped at a rate and the others scaled up."""
    for i, name in enumerate(("1", "2")):
        x = jax.nn.relu(x @ weights["w" + name] + weights["b" + name])
        if key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, x.shape)
            x = jnp.where(kept, x / (1 - rate), 0.0)
    return x


def apply(weights: Any, x: Any, classes: Any, key: Any = None, rate: Any = None) -> Any:
    """Logits, with padded classes out of reach; or the predicted mean, in the only column."""
    return hidden(weights, x, key, rate) @ weights["w3"] + weights["b3"] + (classes - 1) * NEVER


def per_row(kind: Kind, outputs: Any, log_noise: Any, y: Any) -> Any:
    """Negative log likelihood of every row."""
    if kind.regression:
        scaled = (y - outputs[:, 0]) * jnp.exp(-log_noise)
        return 0.5 * scaled**2 + log_noise + 0.5 * np.log(2 * np.pi)
    log_probs = jax.nn.log_softmax(outputs)
    return -jnp.take_along_axis(log_probs, jnp.maximum(y, 0)[:, None], 1)[:, 0]


def loss_of(kind: Kind, classes: Any) -> Any:
    """The mean loss `loss(weights, x, y, *dropout key and rate)`."""

    def loss(weights: Any, x: Any, y: Any, *dropout: Any) -> Any:
        outputs = apply(weights, x, classes, *dropout)
        return jnp.mean(per_row(kind, outputs, weights.get("log_noise"), y))

    return loss
