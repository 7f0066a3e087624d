"""One step of any method, and the methods of the tables on weights of any shape, unpadded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import blr_optax as blr
from benchmarks.payoff.methods import METHODS, Method, Setting


def scales(weights: dict[str, Any]) -> dict[str, Any]:
    """Root mean square of the first weights of every leaf.

    Leaves of zeros take the smallest one of the others, at most 0.3.
    """
    found = {k: jnp.sqrt(jnp.mean(w**2)) for k, w in weights.items()}
    of_others = jnp.stack([jnp.where(s > 0, s, jnp.inf) for s in found.values()])
    least = jnp.minimum(jnp.min(of_others), 0.3)
    return {k: jnp.where(s > 0, s, least) for k, s in found.items()}


def transformation(
    method: str, weights: Any, n: Any, steps: int, hyper: dict[str, Any], key: Any
) -> optax.GradientTransformation:
    """A method of the tables for these first weights."""
    return METHODS[method].make(Setting(hyper, scales(weights), n, steps, key))


def one_step(
    method: Method, loss: Callable, tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any]]:
    """(weights, state, *batch) -> (weights, state).

    A dropout method's loss takes two arguments more, key and rate: they end the batch.
    """

    def one(weights: Any, state: Any, *batch: Any) -> tuple[Any, Any]:
        if method.posterior:
            est = blr.estimate(loss, state, weights, *batch)
            extra = {} if est.statistic is None else {"statistic": est.statistic}
            updates, state = tx.update(est.grad, state, weights, **extra)
        else:
            updates, state = tx.update(jax.grad(loss)(weights, *batch), state, weights)
        return optax.apply_updates(weights, updates), state

    return one


def fan_in(key: Any, *shape: int, gain: float = 1.0) -> Any:
    """A matrix, or filters, of deviation gain / sqrt(inputs)."""
    inputs = 1
    for size in shape[:-1]:
        inputs *= size
    return gain * jax.random.normal(key, shape) / jnp.sqrt(inputs)
