"""Gauss-Newton statistics of `per_example`: golden numbers, dense matrices, and glm terms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from per_example_networks import ROWS, B, D, K, T, conv
from test_per_example import (
    BOTH,
    QUICK,
    WEIGHTS,
    assert_exact,
    cast,
    errors,
    single_gradients,
    truth,
)

import blr_optax as blr

GGN, KFAC = ("ggn_diagonal",), ("kfac",)
ALL = ("sum_squares", "norms", "kfac", "ggn_diagonal")
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


def ask(loss, params, *batch, **options):
    f = functools.partial(blr.per_example, loss, **options)
    return jax.jit(f, compiler_options=QUICK)(params, *batch)


def close(found, expected, rtol=1e-10):
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * scale)


# --- models and their dense matrices --------------------------------------------------------------


def sequence(p, x, eps=0.0):
    """[B, T, K], one dense layer shared by the positions."""
    h = jnp.tanh(x @ p["w"] + p["b"] + eps)
    return (h + h.mean(1, keepdims=True)) @ p["v"]


def image(p, x, eps=0.0):
    """[B, K], one strided convolution of 2 x 3 pixels."""
    h = conv(x, p["w"], (1, 2), "VALID") + p["b"] + eps
    return jnp.tanh(h).mean((1, 2)) @ p["v"]


def loss_of(model):
    return lambda p, x: jnp.mean(jnp.sin(model(p, x)) ** 2)


def setting(name):
    r = np.random.default_rng(3)
    if name == "sequence":
        params = {"w": r.normal(size=(D, 4)), "b": r.normal(size=4), "v": r.normal(size=(4, K))}
        return sequence, cast(params, jnp.float64), r.normal(size=(B, T, D))
    params = {"w": r.normal(size=(2, 3, 2, 4)), "b": r.normal(size=4), "v": r.normal(size=(4, K))}
    return image, cast(params, jnp.float64), r.normal(size=(B, 5, 7, 2))


def negative_log_likelihood(likelihood, f, y):
    """Of one example's outputs [..., k], at labels of any value."""
    if likelihood == "categorical":
        return -jnp.sum(y * jax.nn.log_softmax(f))
    if likelihood == "bernoulli":
        return jnp.sum(jax.nn.softplus(f) - y * f)
    return jnp.sum((f - y) ** 2) / 2


def hessians(likelihood, f):
    """Lambda of every example, [B, outputs, outputs], by differentiating twice."""
    y = jnp.broadcast_to(jax.nn.one_hot(0, f.shape[-1]), f.shape[1:])
    each = jax.vmap(jax.hessian(lambda f: negative_log_likelihood(likelihood, f, y)))(f)
    return each.reshape(len(f), f[0].size, f[0].size)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def dense_ggn(model, likelihood, params, x, weights):
    """The diagonal of sum_i c_i J_i^T Lambda_i J_i, from the matrices themselves."""
    flat, unravel = ravel_pytree(params)
    f = model(params, x)
    jacobian = jax.jacobian(lambda w: model(unravel(w), x))(flat).reshape(len(x), f[0].size, -1)
    c = hessians(likelihood, f)
    return unravel(jnp.einsum("i,iap,iab,ibp->p", weights, jacobian, c, jacobian))


# --- golden numbers -------------------------------------------------------------------------------


def wine_outputs(p, x, y):
    return jnp.tanh(x @ p["W1"] + p["b1"]) @ p["W2"] + p["b2"]


def wine_loss(p, x, y):
    scores = jax.nn.log_softmax(wine_outputs(p, x, y))
    return -jnp.mean(jnp.take_along_axis(scores, y[:, None], 1))


@pytest.mark.parametrize("weights, microbatch", [("map", None), ("random_weights", 10)])
def test_golden_wine(x64, golden, weights, microbatch):
    data = golden("duality_mlp_wine")
    x, y, g = np.array(data["X"]), np.array(data["y"]), data[weights]
    w1, b1, w2, b2 = np.split(np.array(g["theta"]), [128, 144, 192])
    params = {"W1": w1.reshape(8, 16), "b1": b1, "W2": w2.reshape(16, 3), "b2": b2}
    flat = lambda t: np.concatenate([np.ravel(t[k]) for k in params])  # noqa: E731
    found = jax.device_get(ask(
        wine_loss, params, x, y, statistics=ALL, outputs=wine_outputs, likelihood="categorical",
        microbatch=microbatch,
    ))  # fmt: skip
    own = ask(wine_loss, params, x, y, statistics=KFAC, labels="true", microbatch=microbatch)
    close(found.value, np.mean(g["loss_per_example"]))
    if weights != "map":  # there it is zero but for the prior
        close(50 * flat(found.grad), g["grad_sum"])
    close(flat(found.sum_squares), g["per_example_grad_sq_sum"])
    close(found.norms**2, g["per_example_grad_sqnorm"])
    close(flat(found.ggn_diagonal), g["ggn_diag"])
    for layer in "12":
        k, name = found.kfac[f"['W{layer}']"], f"['W{layer}']"
        a = np.block([[k.inputs, k.mean[:, None]], [k.mean[None], np.ones((1, 1))]])
        close(a, g["kfac"][f"A{layer}"])
        close(k.outputs, g["kfac"][f"G{layer}"])
        close(own.kfac[name].outputs, g["kfac"][f"G{layer}_empirical"])
        close(own.kfac[name].inputs, k.inputs)
    assert set(found.kfac) == {"['W1']", "['W2']"}


# --- the exact diagonal, and draws of it ----------------------------------------------------------


@pytest.mark.parametrize("name", ["image", "sequence"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_diagonal_is_that_of_the_dense_matrix(x64, likelihood, name):
    model, params, x = setting(name)

    weights = WEIGHTS if name == "image" else None
    found = ask(
        loss_of(model), params, x, statistics=GGN, outputs=model, likelihood=likelihood,
        weights=weights,
    )  # fmt: skip
    expected = dense_ggn(model, likelihood, params, x, np.ones(B) if weights is None else weights)
    jax.tree.map(close, found.ggn_diagonal, expected)


def test_diagonal_of_tied_parameters_in_microbatches(x64):
    row = ROWS["tied_large"]
    params, (x, _) = cast((row.params, row.batch), jnp.float64)
    model = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["v"]  # noqa: E731
    found = ask(
        loss_of(model), params, x, statistics=GGN, outputs=model, likelihood="categorical",
        weights=WEIGHTS, microbatch=3,
    )  # fmt: skip
    jax.tree.map(close, found.ggn_diagonal, dense_ggn(model, "categorical", params, x, WEIGHTS))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_sampled_labels_are_unbiased(x64, likelihood):
    model, params, x = setting("sequence")
    per_example = functools.partial(
        blr.per_example, loss_of(model), params, x, statistics=("kfac", "ggn_diagonal"),
        outputs=model, likelihood=likelihood, weights=WEIGHTS, microbatch=3,
    )  # fmt: skip
    get = lambda found: (found.ggn_diagonal, found.kfac["['w']"].outputs)  # noqa: E731

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both():
        keys = jax.random.split(jax.random.key(4), 500)
        draws = jax.lax.map(lambda k: get(per_example(labels="sampled", key=k)), keys)
        return draws, get(per_example())

    drawn, exact = both()

    def unbiased(draws, exact):
        error = np.std(draws, axis=0) / np.sqrt(len(draws))
        assert np.all(error > 0)
        assert np.all(np.abs(np.mean(draws, axis=0) - exact) < 5 * error)

    jax.tree.map(unbiased, drawn, exact)


# --- Kronecker factors ----------------------------------------------------------------------------


def patches(x):
    """[B, positions, 2 * 3 * 2] under the strided windows of `image`, in the kernel's order."""
    at = [(i, j) for i in range(4) for j in range(0, 5, 2)]
    return np.stack([np.reshape(x[:, i : i + 2, j : j + 3], (len(x), -1)) for i, j in at], 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=QUICK)
def derivatives(model, labels, shape, params, x):
    """By the outputs of `w` at every position, and what they are multiplied with."""
    eps = jnp.zeros(shape)
    if labels == "true":
        each = lambda e: jax.vmap(  # noqa: E731
            lambda x, e: jnp.mean(jnp.sin(model(params, x[None], e[None])) ** 2)
        )(x, e)
        d = jax.grad(lambda e: each(e).sum())(eps).reshape(B, 1, -1, 4)
        return d, jnp.ones((B, 1, 1))
    # example i's outputs see example i's positions only
    d = jax.vmap(lambda x, e: jax.jacobian(lambda e: model(params, x[None], e[None]).ravel())(e))(
        x, eps
    ).reshape(B, -1, np.prod(shape[1:-1]), 4)
    return d, hessians("categorical", model(params, x))


def direct_kfac(name, labels, positions, weights):
    """The three factors of `w` from every position's input and output derivative."""
    model, params, x = setting(name)
    a = np.asarray(x) if name == "sequence" else patches(x)
    shape = (B, T, 4) if name == "sequence" else (B, 4, 3, 4)
    d, middle = jax.device_get(derivatives(model, labels, shape, params, x))
    if positions == "reduce":
        a, d = a.mean(1, keepdims=True), d.sum(2, keepdims=True)
    n = weights.sum()
    return (
        np.einsum("i,ipm,ipn->mn", weights, a, a) / a.shape[1] / n,
        np.einsum("i,ipm->m", weights, a) / a.shape[1] / n,
        np.einsum("i,iapk,iab,ibpl->kl", weights, d, middle, d),
    )


@pytest.mark.parametrize("positions", ["expand", "reduce"])
@pytest.mark.parametrize("labels", ["exact", "true"])
@pytest.mark.parametrize("name", ["image", "sequence"])
def test_kfac_is_that_of_inputs_and_derivatives(x64, name, labels, positions):
    model, params, x = setting(name)
    found = ask(
        loss_of(model), params, x, statistics=KFAC, labels=labels, positions=positions,
        outputs=model, likelihood="categorical", weights=WEIGHTS, microbatch=2,
    ).kfac  # fmt: skip
    assert set(found) == {"['w']", "['v']"}
    for a, b in zip(found["['w']"], direct_kfac(name, labels, positions, WEIGHTS), strict=True):
        close(a, b)


def test_kfac_of_layers_in_a_scan(x64):
    """One set of factors for each step, those of the unrolled network."""
    r = np.random.default_rng(5)
    w, x = cast((r.normal(size=(3, D, D)) / 3, r.normal(size=(B, D))), jnp.float64)

    def looped(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    def unrolled(p, x):
        for name in sorted(p):
            x = jnp.tanh(x @ p[name])
        return x

    options = {"statistics": KFAC, "likelihood": "gaussian"}
    one = ask(loss_of(looped), {"w": w}, x, outputs=looped, **options).kfac
    three = ask(
        loss_of(unrolled), dict(zip("abc", w, strict=True)), x, outputs=unrolled, **options
    ).kfac
    for i, name in enumerate("abc"):
        for a, b in zip(one["['w']"], three[f"['{name}']"], strict=True):
            close(np.asarray(a)[i], b)


def test_kfac_leaves_out_what_is_no_kernel_of_one_layer(x64):
    for name, kernels in {
        "mlp": {"['w1']", "['w2']"},
        "tied_small": {"['v']"},
        "embedding": {"['v']"},
        "fused_split": {"['o']"},
        "convnet": {"['k']", "['t']"},
        "experts": {"['v']"},
    }.items():
        row = ROWS[name]
        ask = functools.partial(blr.per_example, row.loss, statistics=KFAC, labels="true")
        found = jax.eval_shape(ask, row.params, *row.batch)
        assert set(found.kfac) == kernels, name


# --- glm terms, and products ----------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_glm_term_is_its_plain_loss(x64, weights):
    r = np.random.default_rng(6)
    x, y = cast((r.normal(size=(B, D)), r.integers(0, 2, B) * 1.0), jnp.float64)
    params = r.normal(size=D)
    term = blr.estimators.glm(lambda x, y: x, lambda f, x, y: jax.nn.softplus(f) - y * f)
    loss = lambda p, x, y: jnp.mean(jax.nn.softplus(x @ p) - y * (x @ p))  # noqa: E731
    options = {"statistics": ALL, "weights": weights}
    a = ask(term, params, x, y, **options)
    b = ask(
        loss, params, x, y, outputs=lambda p, x, y: (x @ p)[:, None], likelihood="bernoulli",
        **options,
    )  # fmt: skip
    assert_exact(a, truth(loss, params, (x, y), weights), 1e-12)
    assert max(errors(a, b).values()) < 1e-12
    close(a.ggn_diagonal, b.ggn_diagonal, 1e-12)
    for u, v in zip(a.kfac[""], b.kfac[""], strict=True):
        close(u, v, 1e-12)
    only = jax.eval_shape(functools.partial(blr.per_example, term, statistics=BOTH), params, x, y)
    assert only.kfac is None and only.ggn_diagonal is None


@pytest.mark.parametrize("name", ["custom_vjp", "mlp", "scan_layers", "tied_large"])
def test_products_with_gradients(x64, name):
    row = ROWS[name]
    params, batch = cast((row.params, row.batch), jnp.float64)
    v = jax.tree.map(lambda x: np.cos(3 * x), params)
    _, g = single_gradients(row.loss, params, batch)
    products = jax.tree.map(lambda g, v: g.reshape(len(g), -1) @ v.ravel(), g, v)
    dot = functools.partial(blr.per_example_dot, row.loss)
    found = jax.jit(dot, compiler_options=QUICK)(params, v, *batch)
    close(found, sum(jax.tree.leaves(products)), 1e-12)
