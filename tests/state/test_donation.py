"""Steps that reuse memory, where parameters, first state and batch share some of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import make_batch, make_params, mean_loss
from tools import assert_same

import blr_optax as blr
from blr_optax.state import _donation
from blr_optax.state._donation import unshared


def start():
    return jax.tree.map(jnp.copy, make_params())


def run(step, tx, *more, steps=3):
    params = start()
    state = tx.init(params)
    for _ in range(steps):
        params, state, info = step(params, state, *make_batch(), *more)
    return params, state, info.value


OPTIMIZERS = {
    "lbfgs": lambda: optax.lbfgs(0.1, linesearch=None),
    "prodigy": optax.contrib.prodigy,
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
    "lbfgs with its line search": optax.lbfgs,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_that_hold_the_parameters_are_trained(name):
    """The steps are those that reuse no memory, to the last bit."""
    tx = OPTIMIZERS[name]()
    params = start()
    leaves = jax.tree.leaves((params, tx.init(params)))
    assert len({x.unsafe_buffer_pointer() for x in leaves}) < len(leaves)  # what this is about
    reusing, plain = (blr.make_step(tx, mean_loss, donate=donate) for donate in (True, False))
    assert_same(run(reusing, tx), run(plain, tx))


def test_a_second_run_of_a_step_starts_from_a_first_state_too():
    """Also from parameters that the step has returned."""
    tx = OPTIMIZERS["lbfgs"]()
    step = blr.make_step(tx, mean_loss)
    params, _, value = run(step, tx)
    params, state, info = step(params, tx.init(params), *make_batch())
    assert info.value < value
    step(params, state, *make_batch())


def test_a_batch_may_hold_the_parameters():
    """As an anchor of the loss: it is read, and stays."""
    params, batch = start(), make_batch()
    anchor = params

    def anchored(p, x, y, anchor):
        near = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), p, anchor)
        return mean_loss(p, x, y) + 0.1 * optax.tree.sum(near)

    tx = optax.sgd(0.1)
    step = blr.make_step(tx, anchored)
    params, state, _ = step(params, tx.init(params), *batch, anchor)
    params, _, info = step(params, state, *batch, anchor)
    assert np.isfinite(info.value) and not any(x.is_deleted() for x in jax.tree.leaves(anchor))


def test_what_shares_memory_is_copied_and_nothing_else():
    x, y, key = jnp.ones(3), jnp.zeros(2), jax.random.key(0)
    view = jax.device_put(x, x.devices().pop())
    assert view is not x and view.unsafe_buffer_pointer() == x.unsafe_buffer_pointer()
    given = {
        "x": x,
        "again": view,
        "y": y,
        "key": key,
        "none": None,
        "number": 1.0,
        "z": np.ones(2),
    }
    found = unshared(given)
    assert_same(found["x"], x)
    copied = [name for name in given if found[name] is not given[name]]
    assert copied in (["x"], ["again"])
    assert [name for name in given if unshared(given, (y, key))[name] is not given[name]] == [
        *copied,
        "y",
        "key",
    ]
    empty = jnp.zeros((0, 2))
    assert unshared((empty, empty))[1] is empty


def test_a_step_inside_another_program_copies_nothing():
    tx, batch = optax.sgd(0.1), make_batch()
    step = blr.make_step(tx, mean_loss)
    params = start()
    inside = jax.jit(lambda p: step(p, tx.init(p), *batch)[0])(params)
    assert_same(inside, step(params, tx.init(params), *batch)[0])
    assert all(x.is_deleted() for x in jax.tree.leaves(params))


def test_a_train_state_that_holds_the_parameters_twice():
    train_state = pytest.importorskip("flax.training.train_state")
    tx = OPTIMIZERS["lbfgs"]()
    state = train_state.TrainState.create(apply_fn=None, params=start(), tx=tx)
    step = blr.linen.make_step(lambda p, state, x, y: mean_loss(p, x, y))
    for _ in range(3):
        state, _ = step(state, *make_batch())
    assert_same(state.params, run(blr.make_step(tx, mean_loss, donate=False), tx)[0])


def test_optimizers_get_the_extra_arguments_that_they_name():
    """The `update` of optax's own SAM takes none."""
    tx = optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.sgd(0.05)))
    params = run(blr.make_step(tx, mean_loss), tx, steps=2)[0]
    theta = start()
    state, grad = tx.init(theta), jax.jit(jax.grad(mean_loss))
    for _ in range(2):
        updates, state = tx.update(grad(theta, *make_batch()), state, theta)
        theta = optax.apply_updates(theta, updates)
    assert all(np.allclose(params[k], theta[k], rtol=1e-5) for k in params)


def test_a_step_looks_once_at_what_it_has_returned(monkeypatch):
    looked = []
    monkeypatch.setattr(
        _donation, "unshared", lambda given, read: looked.append(1) or unshared(given, read)
    )
    tx = optax.sgd(0.1, momentum=0.9)
    step = blr.make_step(tx, mean_loss)
    run(step, tx)
    assert len(looked) == 1
    run(step, tx)
    assert len(looked) == 2
