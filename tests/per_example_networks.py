"""Convolutions, embeddings and transformers: the rest of the table of `per_example_models`."""

import functools
import operator

import jax
import jax.numpy as jnp
import pytest
from per_example_models import (
    ROWS,
    B,
    D,
    Draws,
    K,
    Row,
    T,
    images,
    model,
    row,
    sequences,
    tokens,
    xent,
)

# --- convolutions ---------------------------------------------------------------------------------

NHWC = ("NHWC", "HWIO", "NHWC")
conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=NHWC)


def group_norm(h, groups):
    m = h.reshape(h.shape[0], -1, groups, h.shape[-1] // groups)
    m = (m - m.mean((1, 3), keepdims=True)) / jnp.sqrt(m.var((1, 3), keepdims=True) + 1e-5)
    return m.reshape(h.shape)


@model(
    lambda r: {
        "k": r(3, 3, 2, 4),
        "b": r.x(4),
        "s": r.x(4),
        "g": r(2, 2, 2, 6),
        "d": r(2, 2, 1, 12),
        "t": r(3, 3, 12, K),
    },
    images(8, 7, 2),
    "convolution",
)
def convnet(p, x):
    """Strided and dilated, grouped, depthwise, transposed."""
    h = conv(x, p["k"], (2, 1), "SAME", rhs_dilation=(1, 2)) + p["b"]
    h = group_norm(jax.nn.relu(h), 2) * p["s"]
    h = conv(h, p["g"], (1, 1), [(1, 0), (0, -1)], feature_group_count=2)
    h = conv(h, p["d"], (1, 1), "VALID", feature_group_count=6)
    return jax.lax.conv_transpose(h, p["t"], (2, 2), "SAME", dimension_numbers=NHWC).mean((1, 2))


@model(lambda r: {"one": r(4, D, 3), "back": r(2, 4, K), "three": r(2, 2, 1, 1, 2)}, sequences,
       "convolution")  # fmt: skip
def convnet_layouts(p, x):
    """One and three dimensions, channels first, a kernel that is turned around."""
    h = jax.lax.conv_general_dilated(
        x, p["one"], (1,), "SAME", dimension_numbers=("NWC", "OIW", "NCW")
    )
    h = jax.lax.conv_transpose(
        jnp.tanh(h), p["back"], (2,), "SAME", dimension_numbers=("NCW", "WOI", "NWC"),
        transpose_kernel=True,
    )  # fmt: skip
    h = h.reshape(h.shape[0], 2, T, K, 1)
    h = conv(h, p["three"], (1, 2, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
    return jnp.sin(h).mean((1, 2, 4))


# --- embeddings and transformers ------------------------------------------------------------------


@model(lambda r: {"e": r(11, D), "v": r(D, K)}, tokens(labels=(B,)), "lookup")
def embedding(p, x):
    return jnp.tanh(jnp.take(p["e"], x, axis=0).mean(1)) @ p["v"]


@model(lambda r: {"e": r(600, D), "v": r(D, K)}, tokens(labels=(B,)), "lookup")
def embedding_large(p, x):
    """Most tokens are repeated within an example; negative ones count from the end."""
    return jnp.tanh(p["e"][x % 3 - 1] * 2).mean(1) @ p["v"]


@row(lambda r: {"e": r(11, D)}, tokens(), e="copy")
def tied_head(p, x, y):
    return xent(p["e"][x] @ p["e"].T, y)


@row(lambda r: {"e": r(600, D), "w": r(D, D)}, tokens(), e="chunks", w="chunks")
def tied_head_large(p, x, y):
    return xent(jnp.tanh(p["e"][x] @ p["w"]) @ p["e"].T, y)


@model(lambda r: {"e": r(11), "two": r(3, 4, D), "v": r(D, K)}, tokens(labels=(B,)), "lookup")
def other_gathers(p, x):
    h = p["two"][x % 3, x % 4] * p["e"][x][..., None]
    return jnp.tanh(h.mean(1)) @ p["v"]


def layer_norm(h, s, b):
    h = (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)
    return h * s + b


def block(h, w):
    z = layer_norm(h, w["s"], w["b"])
    q, k, v = jnp.einsum("btd,dshe->sbthe", z, w["qkv"])
    a = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k) / 2)
    h = h + jnp.einsum("bthe,hed->btd", jnp.einsum("bhts,bshe->bthe", a, v), w["o"])
    rms = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5) * (1 + w["r"])
    return h + jax.nn.gelu(rms @ w["u"]) @ w["dn"], None


def transformer_params(r):
    w = {
        "s": r.x(2, D),
        "b": r.x(2, D),
        "qkv": r(2, D, 3, 2, 4),
        "o": r(2, 2, 4, D),
        "r": r.x(2, D) / 9,
    }
    w |= {"u": r(2, D, 16), "dn": r(2, 16, D)}
    return {"emb": r(11, D), "pos": r(7, D), "w": w, "head": r(D, K)}


def transformer_of(blocks):
    def loss(p, x, y):
        return xent(blocks(p["emb"][x] + p["pos"][: x.shape[1]], p["w"]) @ p["head"], y)

    return loss


def unrolled(step):
    def blocks(h, w):
        for i in range(2):
            h, _ = step(h, jax.tree.map(operator.itemgetter(i), w))
        return h

    return blocks


def scanned(step):
    return lambda h, w: jax.lax.scan(step, h, w)[0]


for name, blocks in {
    "transformer": unrolled(block),
    "transformer_remat": unrolled(jax.checkpoint(block)),
    "transformer_scan": scanned(block),
    "transformer_scan_remat": scanned(jax.checkpoint(block)),
}.items():
    ROWS[name] = Row(
        name,
        transformer_of(blocks),
        transformer_params(Draws(name)),
        tokens()(Draws(name)),
        {},
        "loop" if "scan" in name else "dense",
    )


# --- the fast and the slow ------------------------------------------------------------------------


def first_fast(models):
    """Parameters for pytest of (name, kind, values): the first of a kind is fast, others slow."""
    models = list(models)
    first = {kind: name for name, kind, _ in reversed(models)}
    return [
        pytest.param(*values, id=name, marks=[] if first[kind] == name else [pytest.mark.slow])
        for name, kind, values in models
    ]


def rows():
    """All models, for pytest."""
    return first_fast((r.name, r.kind, [r]) for r in ROWS.values())
