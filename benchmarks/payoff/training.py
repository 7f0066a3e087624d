"""One compiled program per method and kind: train, watch the validation rows, predict."""

from __future__ import annotations

import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import blr_optax as blr
from benchmarks.payoff import network
from benchmarks.payoff.loop import one_step
from benchmarks.payoff.methods import METHODS, Method, Setting
from benchmarks.payoff.tasks import Arrays, Kind

EVERY, EMA = 50, 0.998
_lock = threading.Lock()


def stepper(method: Method, kind: Kind, classes: Any, hyper: Any, key: Any) -> Any:
    """(tx, weights, state, rows, t) -> (weights, state): one step of a method."""
    loss = network.loss_of(kind, classes)

    def step(tx: Any, weights: Any, state: Any, x: Any, y: Any, t: Any) -> tuple[Any, Any]:
        drop = (jax.random.fold_in(key, t), hyper["rate"]) if method.dropout else ()
        return one_step(method, loss, tx)(weights, state, x, y, *drop)

    return step


def masked_mean(x: Any, mask: Any) -> Any:
    """Mean over the rows that count."""
    return jnp.sum(jnp.where(mask > 0, x, 0.0)) / jnp.sum(mask)


def predictions(kind: Kind, outputs: Any, log_noise: Any) -> dict[str, Any]:
    """What scores need, from outputs with a leading axis of samples.

    Of classes the log of the averaged probabilities, and the average of the samples' entropies.
    """
    if kind.regression:
        return {"mean": outputs[..., 0], "log_noise": log_noise}
    log_probs = jax.nn.log_softmax(outputs)
    return {
        "log_probs": jax.nn.logsumexp(log_probs, 0) - jnp.log(len(outputs)),
        "doubt": jnp.mean(-jnp.sum(jnp.exp(log_probs) * log_probs, -1), 0),
    }


def trainer(method: Method, kind: Kind, every: int = EVERY) -> Any:
    """(hyper, split) -> predictions by view and part, validation NLL, last weights."""

    def train(hyper: dict[str, Any], a: Arrays) -> dict[str, Any]:
        first, noise, last = jax.random.split(jax.random.key(a.seed), 3)
        weights = network.initial(first, kind, a.features, a.classes)
        scales = network.scales(weights, a.features, a.classes)
        steps = a.batches.shape[0]
        tx = method.make(Setting(hyper, scales, a.n, steps, noise))
        step = stepper(method, kind, a.classes, hyper, noise)

        def valid_nll(weights: Any) -> Any:
            outputs = network.apply(weights, a.valid_x, a.classes)
            rows = network.per_row(kind, outputs, weights.get("log_noise"), a.valid_y)
            return masked_mean(rows, a.valid_mask)

        def one(carry: tuple, at: tuple) -> tuple[tuple, None]:
            weights, state, ema = carry
            t, rows = at
            weights, state = step(tx, weights, state, a.x[rows], a.y[rows], t)
            ema = jax.tree.map(lambda e, w: EMA * e + (1 - EMA) * w, ema, weights)
            return (weights, state, ema), None

        def chunk(carry: tuple, at: tuple) -> tuple[tuple, Any]:
            inner, best, least = carry
            inner, _ = jax.lax.scan(one, inner, at)
            found = valid_nll(inner[0])
            better = found < least
            best = jax.tree.map(lambda b, w: jnp.where(better, w, b), best, inner[0])
            return (inner, best, jnp.where(better, found, least)), found

        zeros = jax.tree.map(jnp.zeros_like, weights)
        carry = ((weights, tx.init(weights), zeros), weights, jnp.float32(jnp.inf))
        chunks = steps // every
        at = (jnp.arange(steps).reshape(chunks, every), a.batches.reshape(chunks, every, -1))
        ((weights, state, ema), best, _), curve = jax.lax.scan(chunk, carry, at)
        ema = jax.tree.map(lambda e: e / (1 - EMA**steps), ema)

        def outputs(weights: Any, *drop: Any) -> Any:
            both = jnp.concatenate([a.valid_x, a.test_x])
            return network.apply(weights, both, a.classes, *drop), weights.get(
                "log_noise", jnp.zeros(())
            )

        views = {k: jax.tree.map(lambda o: o[None], outputs(w))
                 for k, w in {"mean": weights, "stopped": best, "ema": ema}.items()}  # fmt: skip
        keys, deviation = jax.random.split(last, kind.samples), ()
        if method.dropout:
            views["samples"] = jax.lax.map(lambda k: outputs(weights, k, hyper["rate"]), keys)
        elif method.sampled:
            q = blr.posterior(state, weights)
            views["samples"] = jax.lax.map(lambda k: outputs(q.sample(k)), keys)
            if isinstance(q.variance, dict):  # of leaves, not along a basis
                deviation = jax.tree.map(jnp.sqrt, q.variance)
        cut = len(a.valid_x)
        return {
            "views": {
                view: {
                    "valid": predictions(kind, found[:, :cut], log_noise),
                    "test": predictions(kind, found[:, cut:], log_noise),
                }
                for view, (found, log_noise) in views.items()
            },
            "curve": curve,
            "weights": weights,
            "deviation": deviation,
        }

    return train


@functools.cache
def _compiled(method: str, kind: Kind, shapes: tuple) -> Any:
    a, names = shapes
    a = Arrays(*(jax.ShapeDtypeStruct(*x) for x in a))
    hyper = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in names}
    return jax.jit(trainer(METHODS[method], kind)).lower(hyper, a).compile()


def program(method: str, kind: Kind, hyper: dict[str, float], a: Arrays) -> Any:
    """The compiled (hyper, split) -> predictions, made once per method, kind and length of run."""
    shapes = tuple((x.shape, x.dtype) for x in a), tuple(sorted(hyper))
    with _lock:  # two threads that ask for one program compile it once
        return _compiled(method, kind, shapes)


def train(method: str, kind: Kind, hyper: dict[str, float], a: Arrays) -> dict[str, Any]:
    """Train on a padded split; arrays of numpy."""
    found = program(method, kind, hyper, a)({k: jnp.float32(v) for k, v in hyper.items()}, a)
    return jax.tree.map(np.asarray, found)
