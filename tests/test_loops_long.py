"""Inside `jax.shard_map` with its checks on, as it is by default, everything runs as outside.

The checks know over which devices a number varies: a loop's carry must go in as it comes out, and
`jax.grad` adds up the gradients of the devices where parameters are the same on all of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_rows import rows as family_rows
from family_tools import stacked
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from per_example_models import mlp
from per_example_networks import ROWS as NETWORKS
from registry import ROWS, first_of_kind, make_batch
from tools import near

import blr_optax as blr
from blr_optax import _loops

DEVICES = 2
# jax.random.binomial itself starts its loop with a constant (jax 0.9.2 to 0.10.2).
NO_DRAWS = ("Binomial", "Multinomial")


EVERYWHERE = P()


def on_devices(f, *specs, out=EVERYWHERE, check=True):
    """f as one program on two devices, of which each sees its part of what is `P("d")`."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check)
    return jax.jit(sharded)


def mean_over_devices(tree):
    return jax.tree.map(lambda x: jax.lax.pmean(x, "d"), tree)


def test_loops_start_with_constants_and_end_as_the_data():
    def each(x):
        fall = lambda c: (c[0] / 2, c[1] + 1)  # noqa: E731
        a = _loops.while_loop(lambda c: c[0] + x[0] * c[1] > 1, fall, (1.0, 0))[1]
        b = _loops.fori_loop(0, 3, lambda k, c: c + k * x[0], jnp.zeros(()))
        c, ys = _loops.scan(lambda c, y: (c + y * x[0], c), jnp.zeros(()), jnp.arange(4.0))
        return jnp.stack([a, b, c, ys.sum()])[None]

    x = np.array([1.5, 2.0], np.float32)
    found = on_devices(each, P("d"), out=P("d"))(x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    close(found[:, 1:], x[:, None] * [3, 6, 4])
    close(found[:, 0], jax.jit(jax.vmap(each))(x[:, None])[:, 0, 0])


KINDS = ["mlp", "tied_large", "tied_small", "convnet", "scan_layers", "embedding_large"]


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=() if k == "mlp" else pytest.mark.slow) for k in KINDS]
)
def test_per_example_is_that_of_the_examples_of_a_device(x64, name):
    row = NETWORKS[name]
    batch = jax.tree.map(lambda x: np.resize(x, (8, *x.shape[1:])), row.batch)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), row.params)
    options = {"statistics": ("sum_squares", "norms", "kfac"), "labels": "true"}
    if name == "mlp":
        options = {"statistics": (*options["statistics"], "ggn_diagonal"), "microbatch": 2,
                   "outputs": lambda p, x, y: mlp(p, x), "likelihood": "categorical"}  # fmt: skip
    ask = functools.partial(blr.per_example, row.loss, **options)
    dot = functools.partial(blr.per_example_dot, row.loss)

    def local(params, *batch):
        found, dots = ask(params, *batch), dot(params, params, *batch)
        mean, total = mean_over_devices((found._replace(norms=None), found.sum_squares))
        return mean, jax.tree.map(lambda x: DEVICES * x, total), found.norms, dots

    def whole(params, *batch):
        found, dots = ask(params, *batch), dot(params, params, *batch)
        return found, found.sum_squares, found.norms, dots

    parts = on_devices(local, P(), *[P("d")] * len(batch), out=(P(), P(), P("d"), P("d")))
    mean, total, norms, dots = parts(params, *batch)
    expected = jax.jit(whole)(params, *batch)
    near((total, norms, dots), expected[1:], 1e-9, 1e-12)
    near((mean.value, mean.grad), (expected[0].value, expected[0].grad), 1e-9, 1e-12)
    for one, other in zip(mean.kfac.values(), expected[0].kfac.values(), strict=True):
        near(one.inputs, other.inputs, 1e-9, 1e-12)
        near(DEVICES * one.outputs, other.outputs, 1e-9, 1e-12)
    if mean.ggn_diagonal is not None:
        ggn = jax.tree.map(lambda x: DEVICES * x, mean.ggn_diagonal)
        near(ggn, expected[0].ggn_diagonal, 1e-9, 1e-12)


ESTIMATED = [
    pytest.param(row, id=row.name, marks=() if row.name in ("sgd", "vogn") else pytest.mark.slow)
    for row in ROWS
    if not row.loss and (first_of_kind(row) or row.name in ("sgd", "ogn", "sam"))
]


@pytest.mark.parametrize("row", ESTIMATED)
def test_estimate_is_as_without_the_checks(row):
    """Which know nothing of varying numbers: every gradient is the device's own there."""
    params, tx, batch = row.params(), row.tx(), make_batch(8)
    state = jax.jit(tx.init)(params)

    def step(params, state, *batch):
        one = blr.estimate(row.objective, state, params, *batch, axis_name="d", microbatch=2)
        two = blr.estimate(row.objective, state, params, *batch, samples=5)
        updates, _ = tx.update(one.grad, state, params, statistic=one.statistic)
        return updates, one[:3], mean_over_devices((two.value, two.grad))

    specs = (P(), P(), P("d"), P("d"))
    found = on_devices(step, *specs)(params, state, *batch)
    expected = on_devices(step, *specs, check=False)(params, state, *batch)
    near(found, expected, 1e-4, 1e-5)


def test_a_gradient_is_averaged_once():
    """By `axis_name`, by the caller, or inside the loss, of parameters without noise."""
    loss = lambda w, x: jnp.mean((x @ w) ** 2)  # noqa: E731
    averaged = lambda w, x: jax.lax.pmean(loss(w, x), "d")  # noqa: E731
    x, w = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), np.ones(3, np.float32)
    tx = blr.sgd(0.1, ess=8.0)

    def three(state, w, x):
        return (
            blr.estimate(loss, state, w, x, axis_name="d").grad,
            jax.lax.pmean(blr.estimate(loss, state, w, x).grad, "d"),
            blr.estimate(averaged, state, w, x).grad,
        )

    expected = 2 * x.T @ (x @ w) / 8
    for found in on_devices(three, P(), P(), P("d"))(tx.init(w), w, x):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("family", ["normal", "gaussian", "student_t"])
def test_the_rule_takes_the_gradient_of_its_loss(x64, family):
    """Averaged inside the loss it is that of the whole batch; else each device has its own."""
    loss = lambda w, x: jnp.mean((x @ w - 1.0) ** 2)  # noqa: E731
    averaged = lambda w, x: jax.lax.pmean(loss(w, x), "d")  # noqa: E731
    x, w = np.random.default_rng(1).normal(size=(8, 2)), np.ones(2)
    estimator = blr.estimators.monte_carlo(2)
    rule = functools.partial(blr.blr_update, family, ess=8.0, estimator=estimator)
    rule = functools.partial(rule, learning_rate=0.3)
    if family == "student_t":
        init = blr.distribution(family, mean=w, scale=np.eye(2), degrees=5.0)
        rule = functools.partial(rule, init=init)
    state = rule(loss=loss).init(w)

    def step(loss, state, w, x):
        return rule(loss=loss).update(None, state, w, batch=(x,))[0]

    own = on_devices(lambda *a: step(loss, *a)[None], P(), P(), P("d"), out=P("d"))
    all_ = on_devices(lambda *a: step(averaged, *a), P(), P(), P("d"))
    one = jax.jit(functools.partial(step, loss))
    near(all_(state, w, x), one(state, w, x), 1e-9, 1e-12)
    near(own(state, w, x), np.stack([one(state, w, x[:4]), one(state, w, x[4:])]), 1e-9, 1e-12)


@pytest.mark.parametrize("row", family_rows())
def test_families_of_numbers_that_vary(x64, row):
    """Solves, draws and their derivatives, of which several are loops."""
    family, lam = row.family, stacked(row)
    lam = jax.tree.map(lambda x: np.resize(x, (DEVICES, *x.shape[1:])), lam)
    draws = type(family).__name__ not in NO_DRAWS

    def all_of(lam):
        mu, key = family.expectation(lam), jax.random.key(0)
        theta = family.sample(key, lam) if draws else family.mean(lam)
        slopes = None
        if family.reparameterized:
            total = lambda lam: sum(map(jnp.sum, jax.tree.leaves(family.sample(key, lam))))  # noqa: E731
            slopes = jax.grad(total)(lam)
        step = jax.tree.map(lambda x: -0.5 * x, lam)
        solved = family.natural_from_expectation(mu)
        return theta, slopes, solved, family.retract(lam, step), family.kl(lam, solved)

    # Only traced: what does not fit is refused there, and the numbers are those of other tests.
    found = jax.eval_shape(on_devices(all_of, P("d"), out=P("d")), lam)
    each = jax.eval_shape(all_of, lam)
    assert [x.shape for x in jax.tree.leaves(found)] == [x.shape for x in jax.tree.leaves(each)]
