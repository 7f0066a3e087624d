"""`check` has no warning about right set-ups: every row, wrappers, dtypes, networks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import ROWS, make_batch
from test_check import EXAMPLES, GIVEN, START, STEPS_OF_USERS, N, X, Y, ivon, mean, names, user_step

import blr_optax as blr

RNG = np.random.default_rng(1)
NET = {
    "w1": jnp.asarray(RNG.normal(size=(3, 16)).astype(np.float32)),
    "b": jnp.zeros(16),
    "w2": jnp.asarray(RNG.normal(size=(16, 2)).astype(np.float32) / 4),
}
LABELS = (X[:, 0] * X[:, 1] > 0).astype(np.int32)


def logits(p, x):
    return jnp.tanh(x @ p["w1"] + p["b"]) @ p["w2"]


def cross_entropy(p, x, y):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits(p, x), y).mean()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_are_silent(row):
    batch = jax.tree.map(np.asarray, make_batch())
    examples = round(row.numbers.get("ess", 50))
    report = blr.check(
        row.tx(), row.objective, row.params(), *batch, num_examples=examples, num_steps=500
    )
    assert report.ok, str(report)
    if "b2" in report.numbers:
        np.testing.assert_allclose(report.numbers["b2"], row.numbers["b2"], rtol=1e-5)


def short(tree):
    return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.bfloat16), tree)


def masked_dropout(p, x, y, key):
    return cross_entropy(p, jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0), y)


GROUPS = {"w1": "point", "b": "point", "w2": "bayes"}
RIGHT = {
    "classification": (ivon(), cross_entropy, NET, X, LABELS),
    "chain, clip after": (optax.chain(ivon(), optax.clip(0.1)), cross_entropy, NET, X, LABELS),
    "apply_if_finite": (optax.apply_if_finite(ivon(), 3), cross_entropy, NET, X, LABELS),
    "MultiSteps": (optax.MultiSteps(ivon(), 4), cross_entropy, NET, X, LABELS),
    "MultiSteps as a transformation": (
        optax.MultiSteps(ivon(), 4).gradient_transformation(), cross_entropy, NET, X, LABELS,
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(blr.ivon)(learning_rate=0.1, ess=float(EXAMPLES), b2=0.99),
        cross_entropy, NET, X, LABELS,
    ),
    "partition": (
        optax.partition({"bayes": ivon(), "point": optax.adamw(0.1)}, GROUPS),
        cross_entropy, NET, X, LABELS,
    ),
    "schedule from zero": (
        blr.ivon(optax.linear_schedule(0.0, 0.1, 50), ess=EXAMPLES, b2=0.99),
        cross_entropy, NET, X, LABELS,
    ),
    "bfloat16": (ivon(), cross_entropy, short(NET), short(X), LABELS),
    "masks drawn in the loss": (ivon(), masked_dropout, NET, X, LABELS, jax.random.key(0)),
    "clip before adam": (
        optax.chain(optax.clip(0.1), blr.adam(0.1, ess=EXAMPLES)), cross_entropy, NET, X, LABELS,
    ),
    "newton": (blr.newton(mean, ess=EXAMPLES), mean, START, X, Y),
    "a tempered posterior": (ivon(ess=4 * EXAMPLES), cross_entropy, NET, X, LABELS),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_set_ups_are_silent(name):
    tx, loss, params, *batch = RIGHT[name]
    report = blr.check(tx, loss, params, *batch, **GIVEN)
    assert report.ok and "sum_loss" not in report, str(report)
    assert ("temperature" in report) == (name == "a tempered posterior")


def test_models_of_nnx_are_silent():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.tanh(self.first(x)))

    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)

    def loss(p, x, y):
        value = optax.losses.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, p)(x), y)
        return value.mean()

    assert blr.check(ivon(), loss, params, X, LABELS, **GIVEN).ok


IN_FRONT = {
    "ema": (optax.ema(0.9), "averaged_gradient"),
    "debiased ema": (optax.ema(0.9, debias=True), "averaged_gradient"),
    "trace": (optax.trace(0.9), "averaged_gradient"),
    "adam": (optax.scale_by_adam(), "averaged_gradient"),
    "rms": (optax.scale_by_rms(), "averaged_gradient"),
    "clip": (optax.clip(0.1), "transformed_gradient"),
    "scale": (optax.scale(0.5), "transformed_gradient"),
    "schedule": (optax.scale_by_schedule(lambda t: 1 - 0.1 * t), "transformed_gradient"),
    "decay": (optax.add_decayed_weights(0.1), "transformed_gradient"),
    "noise": (optax.add_noise(0.1, 0.1, 0), "transformed_gradient"),
    "normalised": (optax.normalize_by_update_norm(), "transformed_gradient"),
    "centred": (optax.centralize(), "transformed_gradient"),
}


@pytest.mark.parametrize("name", IN_FRONT)
def test_what_stands_in_front_is_named(name):
    member, finding = IN_FRONT[name]
    for tx in (optax.chain(member, ivon()), optax.MultiSteps(optax.chain(member, ivon()), 2)):
        assert names(blr.check(tx, cross_entropy, NET, X, LABELS, **GIVEN)) == [finding]


@pytest.mark.parametrize("row", ["evon", "bayesbinn", "lie_affine", "mixture_ivon"])
def test_a_clip_in_front_of_other_rows_is_named(row):
    (row,) = (one for one in ROWS if one.name == row)
    batch, ess = jax.tree.map(np.asarray, make_batch()), round(row.numbers["ess"])
    inner = optax.partition(
        {"all": optax.chain(optax.clip(1e-2), row.tx())},
        jax.tree.map(lambda _: "all", row.params()),
    )
    report = blr.check(inner, row.objective, row.params(), *batch, num_examples=ess)
    assert names(report) == ["transformed_gradient"]


@pytest.mark.parametrize("kind", STEPS_OF_USERS)
@pytest.mark.parametrize("name", ["soba", "vadam", "evon", "lie_affine", "lie_additive"])
def test_steps_of_other_rows(name, kind):
    (row,) = (one for one in ROWS if one.name == name)
    tx, batch = row.tx(), jax.tree.map(np.asarray, make_batch())
    step = user_step(tx, kind, row.objective)
    report = blr.check(tx, row.objective, row.params(), *batch, step=step)
    assert names(report) == ([kind] if kind else [])


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("samples", [1, 4])
def test_steps_of_make_step_are_right(samples, antithetic):
    """Also mirrored draws of a squared loss, whose gradient is that at the parameters."""
    for tx in (ivon(), blr.vogn(0.1, ess=EXAMPLES, b2=0.99), blr.bsam(0.1, ess=EXAMPLES, b2=0.99)):
        step = blr.make_step(tx, mean, samples=samples, antithetic=antithetic)
        assert blr.check(tx, mean, START, X, Y, step=step, **GIVEN).ok


def test_learnt_mixing_weights_need_the_losses():
    tx = blr.mixture_ivon(0.1, ess=N, b2=0.99, weight_rate=0.1)
    start = jnp.stack([START, -START])

    def loss(w, x, y):
        each = jax.vmap(mean, (0, None, None))(w, x, y)
        return jnp.sum(each), each

    report = blr.check(tx, loss, start, X, Y, num_examples=N, has_aux=True)
    assert report.ok, str(report)
    with pytest.raises(ValueError, match="needs losses=, an auxiliary output"):
        blr.check(tx, lambda *args: loss(*args)[0], start, X, Y)


def test_losses_that_are_no_functions_of_the_weights_are_said_not_to_be_looked_at():
    terms = blr.estimators.glm(lambda x, y: x, lambda z, x, y: 0.5 * (z - y) ** 2)
    tx = blr.variational_online_newton(terms, 0.5, ess=N)
    report = blr.check(tx, terms, START, X, Y, num_examples=N)
    assert report.ok and "the loss, which is not a function" in report.unchecked[0]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_arrays_on_a_mesh(kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType[kind],))

    def loss(w, x, y):
        return 0.5 * jnp.mean((jnp.einsum("nd,d->n", x, w) - y) ** 2)

    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, jax.P("d"))
        w = jax.device_put(np.full(8, 0.3, np.float32), split)
        x = jax.device_put(RNG.normal(size=(N, 8)).astype(np.float32), split)
        y = jax.device_put(Y, split)
        assert blr.check(ivon(), loss, w, x, y, **GIVEN, step=blr.make_step(ivon(), loss)).ok
        clipped = optax.chain(optax.clip(0.01), ivon())
        assert names(blr.check(clipped, loss, w, x, y, **GIVEN)) == ["transformed_gradient"]
