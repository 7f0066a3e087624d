"""What a likelihood says of the curvature in a model's outputs, as cotangents to send back.

    f       outputs of the model for one example, logits or means
    s       grad_f -log p(y | f) at a label y ~ p(. | f)
    Lambda  the likelihood's Hessian in f, E_y[ s s^T ]

`exact_cotangent` is a column of an L with L L^T = Lambda, one backward pass for each;
`sampled_cotangent` is one draw of s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def _categorical(f: Array) -> Array:
    """p (e_k - p) (e_k - p)^T summed over the labels k is diag(p) - p p^T."""
    p = jax.nn.softmax(f)
    return jnp.sqrt(p)[:, None] * (jnp.eye(f.shape[-1], dtype=f.dtype) - p)


def _bernoulli(f: Array) -> Array:
    """p (1 - p), each output on its own."""
    return jnp.diag(jnp.sqrt(jax.nn.sigmoid(f) * jax.nn.sigmoid(-f)))


def _gaussian(f: Array) -> Array:
    """Return the identity: unit variance."""
    return jnp.eye(f.shape[-1], dtype=f.dtype)


def _sampled_categorical(key: Array, f: Array) -> Array:
    label = jax.random.categorical(key, f)
    return jax.nn.softmax(f) - jax.nn.one_hot(label, f.shape[-1], dtype=f.dtype)


def _sampled_bernoulli(key: Array, f: Array) -> Array:
    p = jax.nn.sigmoid(f)
    return p - jax.random.bernoulli(key, p).astype(f.dtype)


def _sampled_gaussian(key: Array, f: Array) -> Array:
    return jax.random.normal(key, f.shape, f.dtype)


EXACT: dict[str, Callable[[Array], Array]] = {
    "categorical": _categorical,
    "bernoulli": _bernoulli,
    "gaussian": _gaussian,
}
SAMPLED: dict[str, Callable[[Array, Array], Array]] = {
    "categorical": _sampled_categorical,
    "bernoulli": _sampled_bernoulli,
    "gaussian": _sampled_gaussian,
}


def exact_cotangent(
    likelihood: str, f: Float[Array, "B ... k"], index: Array
) -> Float[Array, "B ... k"]:
    """Column `index` of L: one output at one position, of as many as one example has outputs."""
    batch, k = f.shape[0], f.shape[-1]
    rows = f.reshape(batch, -1, k)
    columns = jax.vmap(jax.vmap(lambda row: EXACT[likelihood](row)[index % k]))(rows)
    here = jnp.arange(rows.shape[1]) == index // k
    return jnp.where(here[:, None], columns, 0).reshape(f.shape)


def sampled_cotangent(
    likelihood: str, key: Array, f: Float[Array, "B ... k"]
) -> Float[Array, "B ... k"]:
    """One draw of a label for every example and position."""
    return SAMPLED[likelihood](key, f)
