"""Kronecker factors count inputs and outputs as they come in the leaf of the kernel.

The truth knows nothing of windows or dimension numbers: a layer is linear in its kernel, so the
derivative of one of its outputs by the leaf *is* the input, at the places of the leaf that belong
to that output, read row by row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_per_example import QUICK

import blr_optax as blr

B = 3


def conv(kernel, images="NCHW", **options):
    options = {"window_strides": (1,) * (len(images) - 2), "padding": "VALID", **options}

    def apply(w, x):
        numbers = (images, kernel, images)
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)

    return apply


OIHW = conv("OIHW")
# Layer, shape of the leaf, its axes of outputs, shape of an input, a result's axes of outputs.
LAYERS = {
    "OIHW": (OIHW, (4, 2, 2, 3), (0,), (2, 4, 5), (1,)),
    "HWIO": (conv("HWIO"), (2, 3, 2, 4), (3,), (2, 4, 5), (1,)),
    "IOHW": (conv("IOHW"), (2, 4, 2, 3), (1,), (2, 4, 5), (1,)),
    "OHWI": (conv("OHWI", "NHWC"), (4, 2, 3, 2), (0,), (4, 5, 2), (3,)),
    "IHWO, images CHWN": (
        lambda w, x: jnp.moveaxis(conv("IHWO", "CHWN")(w, jnp.moveaxis(x, 0, -1)), -1, 0),
        (2, 2, 3, 4), (3,), (2, 4, 5), (1,),
    ),
    "WHIO": (conv("WHIO"), (3, 2, 2, 4), (3,), (2, 4, 5), (1,)),
    "OIW": (conv("OIW", "NCW"), (4, 2, 3), (0,), (2, 5), (1,)),
    "WIO": (conv("WIO", "NWC"), (3, 2, 4), (2,), (5, 2), (2,)),
    "OIDHW": (conv("OIDHW", "NCDHW"), (3, 2, 2, 1, 2), (0,), (2, 3, 2, 3), (1,)),
    "DHWIO": (conv("DHWIO", "NDHWC"), (2, 2, 1, 2, 3), (4,), (3, 3, 2, 2), (4,)),
    "strides, dilations": (
        conv("OIHW", window_strides=(2, 1), rhs_dilation=(1, 2), lhs_dilation=(2, 1),
             padding=((1, 0), (0, 1))),
        (4, 2, 2, 3), (0,), (2, 4, 5), (1,),
    ),
    "transposed to HWIO": (
        lambda w, x: conv("HWIO")(jnp.transpose(w, (2, 3, 1, 0)), x),
        (4, 2, 2, 3), (0,), (2, 4, 5), (1,),
    ),
    "flipped": (
        lambda w, x: OIHW(jnp.flip(w, (2, 3)), x), (4, 2, 2, 3), (0,), (2, 4, 5), (1,),
    ),
    "outputs in another order": (
        lambda w, x: OIHW(w[::-1], x), (4, 2, 2, 3), (0,), (2, 4, 5), (1,),
    ),
    "conv_transpose": (
        lambda w, x: jax.lax.conv_transpose(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
        ),
        (2, 3, 4, 2), (2,), (3, 2, 2), (3,),
    ),
    "a flat leaf": (
        lambda w, x: OIHW(w.reshape(4, 2, 2, 3), x), (48,), (0,), (2, 4, 5), (1,),
    ),
    "contracted backwards": (
        lambda w, x: jnp.einsum("bhd,dhk->bk", x, w), (3, 2, 4), (2,), (2, 3), (1,),
    ),
    "outputs between": (
        lambda w, x: jnp.einsum("bthd,dkh->btk", x, w), (3, 4, 2), (1,), (5, 2, 3), (2,),
    ),
    "two axes of outputs": (
        lambda w, x: jnp.einsum("btd,khd->bthk", x, w), (4, 2, 3), (0, 1), (5, 3), (3, 2),
    ),
    "out, in": (lambda w, x: x @ w.T, (4, 3), (0,), (3,), (1,)),
    "reversed inputs": (lambda w, x: x @ w[::-1], (3, 4), (1,), (3,), (1,)),
    "joined from its parts": (
        lambda w, x: x @ jnp.concatenate([w[2:], w[:2]]), (5, 4), (1,), (5,), (1,),
    ),
}  # fmt: skip


def loss(layer, w, x):
    return jnp.mean(jax.vmap(lambda y: jnp.sum(jnp.sin(y) ** 2))(layer(w, x)))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def both(layer, w, x):
    """What the library finds, and derivatives of losses by outputs and of outputs by the leaf."""
    ask = functools.partial(blr.per_example, functools.partial(loss, layer), w, x)
    y = layer(w, x)
    slopes = jax.grad(lambda y: jnp.sum(jnp.sin(y) ** 2))(y)
    found = ask(statistics=("kfac",), labels="true").kfac[""]
    return found, slopes, jax.jacobian(layer)(w, x)


def behind(axes, ndim):
    """The order of axes that puts these last."""
    return [i for i in range(ndim) if i not in axes] + [*axes]


@pytest.mark.parametrize("name", LAYERS)
def test_factors_are_in_the_order_of_the_leaf(x64, name):
    layer, shape, of_leaf, size, of_result = LAYERS[name]
    r = np.random.default_rng(0)
    found, d, j = jax.device_get(both(layer, r.normal(size=shape), r.normal(size=(B, *size))))
    shape = shape if len(shape) > 1 else (4, 12)  # of the flat leaf, outputs first
    of_d, of_j = behind(of_result, d.ndim), behind(of_leaf, len(shape))
    j = j.reshape(*d.shape, *shape).transpose(*of_d, *(i + d.ndim for i in of_j))
    k = np.prod([shape[i] for i in of_leaf])
    j = j.reshape(d.size // k, k, -1, k)  # [examples and positions, result, inputs, outputs]
    result = np.argmax(np.any(j != 0, (0, 2)), 0)  # which one an output of the leaf is
    a, d = j[:, result[0], :, 0], d.transpose(of_d).reshape(-1, k)[:, result]
    for ours, truth in zip(found, (a.T @ a / len(a), a.mean(0), d.T @ d), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=0, atol=1e-12 * np.max(np.abs(truth)))


def test_a_gradient_is_the_product_of_its_factors(x64):
    """Of one example at one position g g^T = A (x) G, in the numbers of the leaf."""
    r = np.random.default_rng(1)
    w, x = r.normal(size=(3, 2, 2, 4)), r.normal(size=(1, 2, 2, 4))
    for layer in (OIHW, LAYERS["flipped"][0]):
        found, _, _ = jax.device_get(both(layer, w, x))
        g = np.asarray(jax.grad(lambda w, layer=layer: loss(layer, w, x))(w)).reshape(3, -1)
        expected = np.einsum("km,ln->kmln", g, g)
        product = np.einsum("mn,kl->kmln", found.inputs, found.outputs)
        np.testing.assert_allclose(product, expected, rtol=0, atol=1e-12 * np.max(np.abs(expected)))


def test_layers_in_a_loop_over_a_moved_leaf(x64):
    """Steps, inputs and outputs are those of the leaf [outputs, steps, inputs], not of the loop."""
    r = np.random.default_rng(2)
    w, x = r.normal(size=(3, 2, 3)), r.normal(size=(B, 3))

    def looped(w, x):
        layers = jnp.transpose(w, (1, 2, 0))[::-1, ::-1]
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, layers)[0]

    def unrolled(layers, x):
        for w in layers[::-1]:
            x = jnp.tanh(x @ w.T[::-1])
        return x

    layers = [w[:, 0], w[:, 1]]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def factors(w, layers):
        ask = functools.partial(blr.per_example, statistics=("kfac",), labels="true")
        one = ask(functools.partial(loss, looped), w, x).kfac[""]
        return one, ask(functools.partial(loss, unrolled), layers, x).kfac

    one, each = jax.device_get(factors(w, layers))
    for step in range(2):
        for ours, truth in zip(one, each[f"[{step}]"], strict=True):
            np.testing.assert_allclose(ours[step], truth, rtol=0, atol=1e-12)


def test_what_has_no_inputs_of_its_own_is_left_out():
    """Half of the leaf turned: the first output's inputs are not those of the second."""

    def turned(w, x):
        return x @ jnp.concatenate([w[:2], w[2:].T])

    ask = functools.partial(blr.per_example, statistics=("kfac",), labels="true")
    w, x = np.ones((4, 2), np.float32), np.ones((B, 4), np.float32)
    assert jax.eval_shape(functools.partial(ask, functools.partial(loss, turned)), w, x).kfac == {}
    grouped = conv("OIHW", feature_group_count=2)
    w, x = np.ones((4, 1, 2, 2), np.float32), np.ones((B, 2, 3, 3), np.float32)
    assert jax.eval_shape(functools.partial(ask, functools.partial(loss, grouped)), w, x).kfac == {}
