"""Rows in a group of `optax.partition`: of no leaf, or of some beside another row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def start():
    return {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}


def loss(p, x):
    return jnp.mean((x @ p["w"] + p["b"] - 1.0) ** 2)


TWO_GRADIENTS = {
    "sam": lambda: blr.sam(0.1),
    "bsam": lambda: blr.bsam(0.1, ess=8.0),
    "vogn": lambda: blr.vogn(0.1, ess=8.0),
    "ogn": lambda: blr.ogn(0.1, ess=8.0),
}


@pytest.mark.parametrize("name", TWO_GRADIENTS)
def test_a_group_of_no_leaf_asks_for_no_statistic(name):
    """The others take their own step, by `make_step` and with one plain gradient."""
    tx = optax.partition(
        {"bayes": TWO_GRADIENTS[name](), "point": blr.sgd(0.1)}, dict.fromkeys(start(), "point")
    )
    params, _, _ = blr.make_step(tx, loss)(start(), tx.init(start()), X)
    grads = jax.grad(loss)(start(), X)
    updates, _ = tx.update(grads, tx.init(start()), start())
    for key, g in grads.items():
        np.testing.assert_allclose(updates[key], -0.1 * g, rtol=1e-6)
        np.testing.assert_allclose(params[key], start()[key] - 0.1 * g, rtol=1e-6)
    alone = TWO_GRADIENTS[name]()
    assert alone.update({}, alone.init({}), {})[0] == {}


def test_posteriors_without_leaves():
    none = blr.mixture_ivon(0.1, ess=8.0)
    assert blr.posterior(none.init({}), {}).mean == {}
    masked = optax.masked(none, dict.fromkeys(start(), False))
    q = blr.posterior(masked.init(start()), start())
    np.testing.assert_array_equal(q.mean["w"], start()["w"])
    np.testing.assert_array_equal(q.variance["w"], np.zeros((3, 2)))


def quadratic(p, *batch):
    """Of the leaves that a row knows: 1/2 (x - 2)^2 each."""
    return sum(0.5 * jnp.sum((x - 2.0) ** 2) for x in jax.tree.leaves(p))


ROWS = {
    "normal": lambda: blr.blr_update("normal", quadratic, 0.5),
    "gaussian": lambda: blr.blr_update("gaussian", quadratic, 0.5),
    "newton": lambda: blr.newton(quadratic, ess=1.0),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_evaluates_the_loss_over_some_leaves(name):
    """Beside a row of gradients it is read, sampled and stepped over its own leaves alone."""
    tx = optax.partition({"a": ROWS[name](), "b": blr.sgd(0.5, ess=2.0)}, {"w": "a", "b": "b"})
    params = start()
    state = tx.init(params)
    theta = blr.sample(state, params)
    np.testing.assert_array_equal(theta["b"], params["b"])
    q = blr.posterior(state, params)
    np.testing.assert_allclose(q.variance["b"], 1 / (2.0 / 0.5))  # sgd's: rate / ess
    np.testing.assert_allclose(q.variance["w"], 1.0)
    np.testing.assert_array_equal(q.mean["w"], params["w"])


@pytest.mark.parametrize("name", ROWS)
def test_a_masked_row_that_evaluates_the_loss(name):
    """By hand: the precision stays 1, so that a step of 1/2 goes half of the way to 2."""
    tx = optax.masked(ROWS[name](), {"w": True, "b": False})
    params, state, info = blr.make_step(tx, quadratic)(start(), tx.init(start()), X)
    np.testing.assert_allclose(params["w"], 2.0 if name == "newton" else 1.5, rtol=1e-6)
    np.testing.assert_array_equal(params["b"], start()["b"])
    q = blr.posterior(state, params)
    np.testing.assert_allclose(q.variance["w"], 1.0, rtol=1e-6)
    np.testing.assert_array_equal(q.mean["b"], params["b"])
    assert int(info.skipped) == 0


def test_a_row_that_evaluates_the_loss_over_no_leaf():
    tx = optax.masked(ROWS["normal"](), dict.fromkeys(start(), False))
    state = tx.init(start())
    updates, new = tx.update(start(), state, start())
    np.testing.assert_array_equal(updates["w"], start()["w"])
    assert int(new.inner_state.count) == 1
    np.testing.assert_array_equal(blr.sample(state, start())["w"], start()["w"])
    with pytest.raises(ValueError, match=r"no leaves.*A group of optax\.partition"):
        ROWS["gaussian"]().init({})
