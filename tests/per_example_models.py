"""Models for the tests of `per_example`: every way in which a parameter can enter a loss.

A row is (name, loss, params, batch, ways, kind); the arrays are float64 and small. `ways` says of
each parameter that does not go by its places which way it goes instead. `kind` is what the row is
there for: the way of its parameters, or the place at which they enter; the fast run has the first
row of every kind (`rows` in `per_example_networks`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

B, T, D, K = 6, 5, 8, 3  # examples, positions, width, classes


class Row(NamedTuple):
    name: str
    loss: Callable[..., Any]
    params: Any
    batch: tuple
    ways: dict[str, str]
    kind: str = "dense"


ROWS: dict[str, Row] = {}


class Draws:
    """Deterministic arrays, each row of a table from its own stream."""

    def __init__(self, name):
        self.rng = np.random.default_rng(list(name.encode()))

    def __call__(self, *shape):
        """A kernel: its last axis are the outputs."""
        return self.rng.normal(size=shape) / math.sqrt(max(1, math.prod(shape[:-1])))

    def x(self, *shape):
        return self.rng.normal(size=shape)

    def y(self, *shape, below=K):
        return self.rng.integers(0, below, shape)


def xent(logits, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1))


def row(params, batch=lambda r: (r.x(B, D), r.y(B)), kind=None, **ways):
    """Adds the loss `f(params, *batch)` to the table under its name."""
    kind = kind or next(iter(ways.values()), "dense")

    def add(f):
        draws = Draws(f.__name__)
        ROWS[f.__name__] = Row(f.__name__, f, params(draws), batch(draws), ways, kind)
        return f

    return add


def model(params, batch=lambda r: (r.x(B, D), r.y(B)), kind=None, **ways):
    """Adds cross-entropy of the logits `f(params, x)`."""

    def add(f):
        loss = lambda p, x, y: xent(f(p, x), y)  # noqa: E731
        loss.__name__ = f.__name__
        row(params, batch, kind, **ways)(loss)
        return f

    return add


def tokens(shape=(B, T), below=11, labels=None):
    return lambda r: (r.y(*shape, below=below), r.y(*(shape if labels is None else labels)))


def images(*shape):
    return lambda r: (r.x(B, *shape), r.y(B))


def sequences(r):
    return r.x(B, T, D), r.y(B)


def wide(r):
    return r.x(B, 70), r.y(B)


# --- dense layers ---------------------------------------------------------------------------------


@model(lambda r: {"w1": r(D, 7), "b1": r.x(7), "w2": r(7, K), "b2": r.x(K)})
def mlp(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


@row(lambda r: {"w": r(D), "b": r.x()}, lambda r: ({"x": r.x(B, D), "y": r.y(B, below=2)},))
def logistic(p, batch):
    f = batch["x"] @ p["w"] + p["b"]
    return jnp.mean(jax.nn.softplus(f) - batch["y"] * f)


@model(lambda r: {"w1": r(D, 7), "b1": r.x(7), "w2": r(7, K)}, sequences)
def positions(p, x):
    return jnp.tanh(x @ p["w1"] + p["b1"]).mean(1) @ p["w2"]


@model(
    lambda r: {"left": r(7, D), "two": r(2, 7, 4), "out": r(K, 4), "swapped": r(4, 4)},
    lambda r: (r.x(B, T, D), r.y(B)),
)
def einsums(p, x):
    h = jnp.tanh(jnp.einsum("ki,bti->btk", p["left"], x))
    h = jnp.einsum("bstk,skf->bft", jnp.stack([h, h * h], 1), p["two"])
    h = jnp.einsum("gf,bft->tgb", p["swapped"], h)
    return (p["out"] @ jnp.tanh(h).mean(0)).T


@model(lambda r: {"w": r(2, 4, 5), "v": r(K, 5, 2), "s": r.x(2)}, kind="experts")
def experts(p, x):
    h = jnp.tanh(jnp.einsum("bgi,gio->bgo", x.reshape(-1, 2, 4), p["w"])) * p["s"][:, None]
    return jnp.einsum("bgo,kog->bk", h, p["v"])


@model(lambda r: {"w": r(D, K), "b": r.x(1, K), "t": r.x(), "free": r.x(2)}, free="unused")
def broadcasts(p, x):
    return (x @ p["w"] + p["b"]) * jnp.exp(p["t"])


@model(lambda r: {"fused": r(D, 3 * D), "o": r(D, K)}, sequences)
def fused_split(p, x):
    q, k, v = jnp.split(p["fused"], 3, axis=1)
    a = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ q, x @ k))
    return jnp.einsum("bts,bsd->bd", a, x @ v) @ p["o"]


@model(lambda r: {"w": r(D, 3, K)})
def slices_disjoint(p, x):
    return jnp.tanh(x @ p["w"][:, 0]) + jnp.sin(x @ p["w"][:, 2])


@model(lambda r: {"w": r(D, 6)}, w="copy")
def slices_overlapping(p, x):
    return jnp.tanh(x @ p["w"][:, :3]) + jnp.sin(x @ p["w"][:, 2:5])


@model(lambda r: {"a": r(D, 2), "b": r(1, D), "c": r.x(2), "d": r.x(1)})
def concatenated(p, x):
    w = jnp.concatenate([p["a"], p["b"].T], 1)
    return jnp.tanh(x @ w + jnp.concatenate([p["c"], p["d"]]))


@model(lambda r: {"a": r(D, 3), "b": r(D, 3)})
def stacked(p, x):
    return jnp.einsum("bi,eij->bej", x, jnp.stack([p["a"], p["b"]])).prod(1)


@model(lambda r: {"w": r(D, D), "v": r(K, D), "n": r(D, K), "b": r.x(K)})
def scaled(p, x):
    h = jnp.tanh(x @ (p["w"] / np.sqrt(D)) - x @ (0.3 * p["v"].T + 1) @ jnp.ones((K, D)))
    return h @ (1 - p["n"]) - p["b"] / 3


@model(lambda r: {"a": r(D, 2), "b": r(D, 1)}, a="copy", b="copy")
def scaled_and_joined(p, x):
    return x @ jnp.concatenate([2 * p["a"], -p["b"] / 3], 1)


@model(lambda r: {"w": r(D, K), "g": r.x(K), "m": r(D, D)}, w="copy")
def nonlinear(p, x):
    """Weight normalisation, and a masked kernel."""
    masked = p["m"] * np.tri(D)
    w = p["w"] / jnp.linalg.norm(p["w"], axis=0)
    return jnp.tanh(x @ masked) @ (w * jax.nn.softplus(p["g"]))


@model(lambda r: {"w": r(70, 70), "v": r(70, K)}, wide, w="chunks", v="chunks")  # fmt: skip
def nonlinear_large(p, x):
    return jnp.tanh(x @ (p["w"] / jnp.linalg.norm(p["w"]))) @ p["v"]


@model(lambda r: {"w": r(D, D), "v": r(D, K)}, w="copy")
def tied_small(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["v"]


@model(lambda r: {"w": r(70, 70), "v": r(70, K)}, wide, w="chunks",
       v="chunks")  # fmt: skip
def tied_large(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["v"]


@row(lambda r: {"w": r(D, K), "b": r.x(K)}, lambda r: (r.x(B, D), r.x(B, D), r.x(B)), w="copy",
     b="copy")  # fmt: skip
def siamese(p, x, z, y):
    near = jnp.sum(jnp.tanh(x @ p["w"] + p["b"]) * jnp.tanh(z @ p["w"] + p["b"]), -1)
    return jnp.mean((near - y) ** 2)


@model(lambda r: {"A": r(D, 2), "B": r(2, K), "w": r(D, K)}, w="unused")
def lora(p, x):
    return x @ p["A"] @ p["B"] + x @ jax.lax.stop_gradient(p["w"])


@model(lambda r: {"A": r(D, 2), "B": r(2, K), "w": r(D, K)})
def lora_merged(p, x):
    return x @ (p["w"] + 2 * p["A"] @ p["B"])


@model(lambda r: {"A": r(70, 2), "B": r(2, 70), "w": r(70, 70), "v": r(70, K)},
       wide)  # fmt: skip
def lora_merged_large(p, x):
    return jnp.tanh(x @ (p["w"] + 2 * p["A"] @ p["B"])) @ p["v"]


@row(lambda r: {"w": r(D, K), "b": r.x(K)}, w="copy", b="copy", batch=lambda r: (r.x(B, D), r.y(B)))
def penalty(p, x, y):
    return xent(x @ p["w"] + p["b"], y) + 0.1 * jnp.sum(p["w"] ** 2) + jnp.sum(p["b"])


@row(lambda r: {"w": r(70, 70)}, wide, w="chunks")
def penalty_large(p, x, y):
    return xent(x @ p["w"], y) + 0.1 * jnp.sum(p["w"] ** 2)


# --- activations and control flow -----------------------------------------------------------------


@jax.custom_vjp
def clipped(x):
    return jnp.tanh(x)


clipped.defvjp(lambda x: (jnp.tanh(x), x), lambda x, d: (d * jnp.exp(-x * x),))


@model(lambda r: {"w": r(D, D), "s": r.x(D), "v": r(D, K)})
def custom_vjp(p, x):
    return jax.nn.silu(clipped(x @ p["w"]) * p["s"]) @ p["v"]


@model(lambda r: {"w": r(D, D), "v": r(D, K)})
def vmap_inside(p, x):
    return jax.vmap(lambda z: jax.nn.gelu(z @ p["w"]) @ p["v"])(x)


@model(lambda r: {"w": r(D, D), "v": r(D, K)})
def branches(p, x):
    on = jnp.ones(()) > 0
    h = jax.lax.cond(on, lambda w, x: jnp.sin(x @ w), lambda w, x: x @ w, p["w"], x)
    return h @ p["v"]


@row(lambda r: {"w": r(D, 7), "v": r(7, 1)}, lambda r: (r.x(B, D),), w="copy", v="copy")
def derivative_inside(p, x):
    """The loss holds a derivative of the model, as with differential equations."""
    f = lambda z: jnp.sum(jnp.tanh(z @ p["w"]) @ p["v"])  # noqa: E731
    return jnp.mean(jax.vmap(lambda z: jnp.sum(jax.grad(f)(z) ** 2) + f(z))(x))


def lstm(p, x):
    def cell(c, xt):
        h, s = c
        i, f, g, o = jnp.split(xt @ p["wx"] + h @ p["wh"] + p["b"], 4, -1)
        s = jax.nn.sigmoid(f) * s + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(s), s), None

    zero = jnp.zeros((x.shape[0], p["wh"].shape[0]), x.dtype)
    return jax.lax.scan(cell, (zero, zero), x.swapaxes(0, 1))[0][0] @ p["o"]


@model(lambda r: {"wx": r(D, 16), "wh": r(4, 16), "b": r.x(16), "o": r(4, K)}, sequences,
       wx="copy", wh="copy", b="copy")  # fmt: skip
def lstm_small(p, x):
    return lstm(p, x)


@model(lambda r: {"wx": r(D, 160), "wh": r(40, 160), "b": r.x(160), "o": r(40, K)}, sequences,
       wx="chunks", wh="chunks", b="chunks", o="chunks")  # fmt: skip
def lstm_large(p, x):
    return lstm(p, x)


@model(
    lambda r: {"w": r(3, D, D), "b": r.x(3, D), "s": r.x(D), "v": r(D, K)}, kind="loop", s="copy"
)
def scan_layers(p, x):
    def layer(h, w):
        h = jnp.tanh(h @ w["w"] + w["b"]) * p["s"]
        return h, h.sum(-1)

    h, each = jax.lax.scan(layer, x, {"w": p["w"], "b": p["b"]}, reverse=True)
    return h @ p["v"] + each.T


@model(lambda r: {"w": r(2, D, D), "v": r(D, K)}, sequences, "loop", w="copy")
def scan_in_scan(p, x):
    """Over layers, and in each over time."""

    def layer(x, w):
        def step(h, xt):
            h = jnp.tanh(xt + h @ w)
            return h, h

        return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[1], None

    return jax.lax.scan(layer, x.swapaxes(0, 1), p["w"])[0][-1] @ p["v"]
