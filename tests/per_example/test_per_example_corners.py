"""Corners of `per_example`: repeated numbers, roundings, complex ones, sizes that grow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_per_example import BOTH, QUICK, assert_exact, truth

import blr_optax as blr

B, D, K = 6, 4, 3
RNG = np.random.default_rng(5)
X, W, V = RNG.normal(size=(B, D)), RNG.normal(size=(D, K)), RNG.normal(size=D)
Y, SQUARE = np.arange(B) % K, RNG.normal(size=(D, D)) / 2


def mean(f):
    """A loss from what it squares: (params, x) -> [B, ...]."""
    return lambda p, x: jnp.mean(jnp.sum(jnp.sin(f(p, x)).reshape(len(x), -1) ** 2, -1))


def layers(p, x, stack):
    return jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, stack(p))[0]


def ask(loss, params, *batch, **options):
    """`per_example` as one program."""
    f = functools.partial(blr.per_example, loss, **options)
    return jax.jit(f, compiler_options=QUICK)(params, *batch)


SAME_NUMBERS = {
    "columns twice": (lambda p, x: jnp.tanh(x @ jnp.concatenate([p, p], 1)), W),
    "rows twice": (lambda p, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([p, p], 0), W),
    "a stack": (lambda p, x: jnp.einsum("bi,eij->bj", x, jnp.stack([p, p])), W),
    "a bias twice": (lambda p, x: jnp.tanh(x + p).sum(0) * 0 + jnp.concatenate([x, x], 1)
                     + jnp.concatenate([p, p]), V),
    "shared layers": (lambda p, x: layers(p, x, lambda p: jnp.stack([p] * 3)), SQUARE),
    "half of it twice": (lambda p, x: x @ jnp.concatenate([p[:, :2], p[:, 1:]], 1), W),
    "two parameters": (lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1), {"a": W, "b": 2 * W}),
    "multiples in a loop": (
        lambda p, x: jax.lax.scan(
            lambda h, k: (jnp.tanh(h @ jnp.concatenate(k, 1)), None), x, (2 * p["a"], p["b"])
        )[0],
        {"a": np.stack([SQUARE[:, :2]] * 3), "b": np.stack([SQUARE[:, 2:]] * 3)},
    ),
    "integers": (lambda p, x: x @ (5 * p["a"]).astype(jnp.int32).astype(x.dtype) + x @ p["b"],
                 {"a": W, "b": W}),
    "truth values": (lambda p, x: x @ p["a"].astype(bool).astype(x.dtype) + x @ p["b"],
                     {"a": W, "b": W}),
    "a spectrum before": (lambda p, x: jnp.abs(jnp.fft.fft(jnp.tanh(x @ p["a"])) @ p["b"]),
                          {"a": W, "b": W[:3]}),
    "a spectrum": (lambda p, x: jnp.abs(jnp.fft.fft(x) @ p), W),
    "imaginary": (lambda p, x: jnp.abs(x + (p * 1j)), V),
    "complex weights": (lambda p, x: jnp.abs(jnp.tanh(x @ p["a"]) @ (p["b"] + 1j * p["c"])),
                        {"a": W, "b": W.T, "c": W.T + 1}),
    "a phase": (lambda p, x: jnp.real(jnp.exp(1j * (x @ p))), W),
    "two precisions": (lambda p, x: jnp.tanh(x @ p["a"].astype(x.dtype)) @ p["b"],
                       {"a": W.astype(np.float32).astype(np.float64), "b": W.T}),
    "an identity": (lambda p, x: x @ jax.lax.optimization_barrier(p), W),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME_NUMBERS)
def test_exact(x64, name):
    f, params = SAME_NUMBERS[name]
    loss = mean(f)
    if name == "a bias twice":
        loss = mean(lambda p, x: jnp.concatenate([x, x], 1) + jnp.concatenate([p, p]))
    if name == "two precisions":
        params = {"a": params["a"].astype(np.float32), "b": params["b"]}
    found = ask(loss, params, X, statistics=BOTH)
    assert_exact(found, truth(loss, params, (X,)), 1e-6 if name == "two precisions" else 1e-10)


def test_scaled_kernels_in_a_loop_have_no_factors(x64):
    loss = mean(lambda p, x: layers(p, x, lambda p: 3 * p))
    found = ask(loss, np.stack([SQUARE] * 3), X, statistics=("kfac",), labels="true")
    assert found.kfac == {}


def test_low_precision_values_are_summed_in_float32():
    w, x = np.ones((4, 3), np.float16), np.ones((1024, 4), np.float16)
    loss = lambda p, x: jnp.mean((x @ p * 5) ** 2)  # noqa: E731
    for microbatch in (None, 1):
        found = ask(loss, w, x, microbatch=microbatch)
        assert found.value == 400.0 and found.value.dtype == jnp.float16


def test_a_parameter_without_numbers():
    loss = lambda p, x: jnp.mean((x @ p["w"]) ** 2) + jnp.sum(p["none"])  # noqa: E731
    params = {"w": W.astype(np.float32), "none": np.zeros((0, 3), np.float32)}
    assert ask(loss, params, X).sum_squares["none"].shape == (0, 3)


# --- how the loss depends on the number of examples ----------------------------------------------


def inner(p, x):
    return (x @ p) ** 2


NOT_MEANS = {
    "penalty over B": lambda p, x: jnp.mean(inner(p, x)) + jnp.sum(p**2) / len(x),
    "all over B": lambda p, x: (jnp.sum(inner(p, x)) + jnp.sum(p**2)) / len(x),
    "inner jit": lambda p, x: jax.jit(lambda p, x: jnp.mean(inner(p, x)) + jnp.sum(p) / len(x))(
        p, x
    ),
    "weights over B": lambda p, x: jnp.mean((x @ (p / len(x))) ** 2),
    "inside the square": lambda p, x: jnp.mean((x @ p / len(x)) ** 2),
    "inside a product": lambda p, x: jnp.sum((x @ p / len(x)) * (x @ p / len(x))),
    "mean and sum": lambda p, x: jnp.mean(inner(p, x)) + jnp.sum(x @ p),
    "both over B": lambda p, x: (jnp.mean(inner(p, x)) + jnp.sum(x @ p)) / len(x),
    "only a penalty": lambda p, x: jnp.sum(p**2) / len(x) + 0 * jnp.mean(x),
}


@pytest.mark.parametrize("name", NOT_MEANS)
def test_other_powers_of_the_batch_are_refused(name):
    with pytest.raises(ValueError, match="not a mean over the batch"):
        blr.per_example(NOT_MEANS[name], jnp.asarray(W), X)


MIXES = {
    "reshape": lambda p, x: jnp.mean(jnp.prod((x @ p)[:, :2].reshape(2, len(x)), 0)),
    "turned": lambda p, x: jnp.mean(jnp.tanh(x @ p).T.reshape(len(x), -1).prod(-1)),
    "segments": lambda p, x: jnp.mean(
        jax.ops.segment_sum(x @ p, jnp.argmax(x, 1), len(x)) ** 2
    ),
    "scattered": lambda p, x: jnp.mean(jnp.zeros(len(x)).at[jnp.argmax(x, 1)].add((x @ p)[:, 0])),
    "shifted": lambda p, x: jnp.mean(
        x[:, 0] * jnp.zeros(len(x)).at[(jnp.arange(len(x)) + 1) % len(x)].set((x @ p)[:, 0])
    ),
    "positions": lambda p, x: jnp.arange(len(x)) * 1.0 @ jnp.tanh(x @ p)[:, 0] / len(x),
    "numbered": lambda p, x: jnp.mean(jnp.cumsum(jnp.ones(len(x))) * (x @ p)[:, 0]),
    "constants by number": lambda p, x: jnp.mean(np.arange(len(x)) * (x @ p)[:, 0]),
    "a loop": lambda p, x: jnp.mean(
        jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: 2 * c - c.mean(0), x) @ p
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXES)
def test_mixed_examples_are_refused(name):
    with pytest.raises(ValueError, match="couples its examples"):
        blr.per_example(MIXES[name], jnp.asarray(W), X)


UNSEEN = {
    "nonlinear": lambda p, x: jnp.mean(jnp.exp(-x @ p / len(x))),
    "callback": lambda p, x: jnp.mean(
        jax.pure_callback(lambda h: h, jax.ShapeDtypeStruct(x.shape, x.dtype), x,
                          vmap_method="broadcast_all") @ p),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_what_cannot_be_seen_warns(name):
    with pytest.warns(UserWarning, match="cannot see whether the loss is a mean"):
        blr.explain(UNSEEN[name], jnp.asarray(W), X)


WIDE = RNG.normal(size=(K, 1009))
MEANS = {
    "constant first": lambda p, x: 2.0 / len(x) * jnp.sum(inner(p, x)),
    "tenths": lambda p, x: 0.3 / len(x) * jnp.sum(inner(p, x)),
    "nats": lambda p, x: jnp.sum(inner(p, x)) / (len(x) * np.log(2)),
    "variance": lambda p, x: jnp.sum(inner(p, x)) / (2 * len(x) * 0.01),
    "half": lambda p, x: jnp.sum(inner(p, x)) / (len(x) / 2),
    "root": lambda p, x: jnp.sum((x @ p / np.sqrt(len(x))) ** 2),
    "an array": lambda p, x: jnp.full(len(x), 1 / len(x)) @ inner(p, x)[:, 0],
    "a numpy array": lambda p, x: np.full(len(x), 1 / len(x)) @ inner(p, x)[:, 0],
    "time first": lambda p, x: jnp.mean(
        jnp.tanh(jnp.stack([x, 2 * x]).reshape(-1, x.shape[1]) @ p).reshape(2, len(x), -1).sum(0)
    ),
    "another axis": lambda p, x: jnp.mean(
        jnp.where(jax.lax.broadcasted_iota(int, (len(x), 3), 1) < 2, x @ p, 0.0)
    ),
    "a prime width": lambda p, x: jnp.mean((x @ p) @ WIDE) / 1013,
    "half precision": lambda p, x: (
        (jnp.sum((x @ p).astype(jnp.bfloat16) * 0) / len(x)).astype(x.dtype) + jnp.mean(x @ p)
    ),
    "a step": lambda p, x: jnp.mean(jnp.maximum(x @ p, 0.0) + jnp.abs(x @ p)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MEANS)
def test_means_however_they_are_written(x64, name):
    found = ask(MEANS[name], W, X, statistics=BOTH)
    assert_exact(found, truth(MEANS[name], W, (X,)), 1e-10)
    np.testing.assert_allclose(found.value, jax.jit(MEANS[name])(W, X), rtol=1e-10)


def test_a_penalty_at_its_own_anchor(x64):
    anchor = jnp.asarray(W)
    loss = lambda p, x: jnp.mean(inner(p, x)) + jnp.sum((p - anchor) ** 2)  # noqa: E731
    found = ask(loss, anchor, X, statistics=BOTH)
    assert_exact(found, truth(loss, anchor, (X,)), 1e-10)


# --- the rest -------------------------------------------------------------------------------------


def test_outputs_that_close_over_their_parameters_are_refused():
    w = jnp.asarray(W)
    loss = lambda p, x: jnp.mean(inner(p, x))  # noqa: E731
    with pytest.raises(ValueError, match="outputs uses its parameters other than"):
        blr.per_example(loss, w, X, statistics=("kfac",), outputs=lambda p, x: x @ w,
                        likelihood="categorical")  # fmt: skip


def test_labels_of_a_term(x64):
    term = blr.estimators.glm(lambda x, y: x, lambda f, x, y: 2.0 * (f - y) ** 2)
    loss = lambda p, x, y: jnp.mean(2.0 * (x @ p - y) ** 2)  # noqa: E731
    options = {"statistics": ("kfac",), "labels": "true"}
    found = ask(term, V, X, Y * 1.0, **options).kfac[""]
    expected = ask(loss, V, X, Y * 1.0, **options).kfac[""]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b), tuple(found), tuple(expected))
    with pytest.raises(ValueError, match="a glm term has a loss"):
        blr.per_example(term, V, X, Y * 1.0, statistics=("kfac",), labels="sampled", key=0)
    for refuses in (blr.explain, lambda *a: blr.per_example_dot(a[0], a[1], *a[1:])):
        with pytest.raises(ValueError, match="loss must be a function"):
            refuses(term, jnp.asarray(V), X, Y * 1.0)


def test_a_direction_of_another_precision():
    loss = lambda p, x: jnp.mean(inner(p, x))  # noqa: E731
    dot = jax.jit(functools.partial(blr.per_example_dot, loss))
    w = W.astype(np.float32)
    found = [dot(w, np.ones((D, K), t), X) for t in ("f4", "f8", "i4")]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_the_matrix_of_squares_refuses_what_the_diagonal_refuses():
    rule = blr.estimators.delta(blr.estimators.per_example_squares())
    gaussian = blr.families.get("gaussian")
    lam = gaussian.natural(mean=jnp.zeros(D), precision=jnp.eye(D))
    for loss in (
        lambda w, x: jnp.mean(jnp.tanh((x - x.mean(0)) @ w)),
        lambda w, x: jnp.sum(jnp.tanh(x @ w)),
    ):
        with pytest.raises(ValueError, match=r"couples its examples|not a mean"):
            blr.estimators.natural_gradient("gaussian", loss, rule)(None, lam, X)


def test_a_tree_of_first_precisions():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    for prior in (1.0, {"a": 1.0, "b": 2.0}):
        tx = blr.vogn(0.1, ess=10.0, prior_precision=prior, init_precision={"a": 4.0, "b": 5.0})
        first = jax.jit(lambda p, tx=tx: blr.posterior(tx.init(p), p).variance)
        variance = first(params)
        np.testing.assert_allclose(variance["a"], 1 / 4, rtol=1e-6)
        np.testing.assert_allclose(variance["b"], 1 / 5, rtol=1e-6)


def test_bad_arguments_say_which():
    loss = lambda p, x: jnp.mean(inner(p, x))  # noqa: E731
    w, ask = jnp.asarray(W), blr.per_example
    for message, call in {
        "statistics=None; give a tuple": lambda: ask(loss, w, X, statistics=None),
        "microbatch=3.0 must divide": lambda: ask(loss, w, X, microbatch=3.0),
        "loss must be a function or a glm term": lambda: ask(None, w, X),
        "Pass arrays, not lists": lambda: ask(loss, w, X.tolist()),
        "the batch is empty": lambda: ask(loss, w, X[:0]),
        "have one class": lambda: ask(
            loss, w, X, statistics=("kfac",), outputs=lambda p, x: x @ p[:, :1],
            likelihood="categorical",
        ),
        "not both": lambda: blr.vogn(
            0.1, ess=10.0, init_precision=5.0,
            init=blr.Distribution(MEAN_FIELD, MEAN_FIELD.natural(mean=0.0, precision=5.0)),
        ),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert ask(loss, w, X, weights=[1.0] * B).value == pytest.approx(float(loss(w, X)))


MEAN_FIELD = blr.families.get("gaussian_diagonal")


def test_negative_squares_are_skipped_and_counted():
    params, one, tx = np.zeros(2, np.float32), np.ones(2, np.float32), blr.vogn(0.1, ess=10.0)
    step = jax.jit(lambda p: tx.update(one, tx.init(p), p, statistic=-one))
    updates, state = step(params)
    assert int(state[0].skipped) == 1 and not np.any(updates)


def test_a_mask_of_each_example(x64):
    """Dropout with a key per example is a loss of separate examples."""
    keys = jax.random.split(jax.random.key(0), B)

    def loss(p, x, keys):
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (D,)))(keys)
        return jnp.mean(jnp.sum((x * keep) @ p, -1) ** 2)

    # Copies: jax keeps what it made of W and X outside float64, and hands it out here too.
    w, x = jnp.asarray(W.copy()), jnp.asarray(X.copy())
    found = ask(loss, w, x, keys)
    np.testing.assert_allclose(found.grad, jax.jit(jax.grad(loss))(w, x, keys), rtol=1e-10)
