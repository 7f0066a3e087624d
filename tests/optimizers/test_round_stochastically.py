"""Stochastic rounding is exact on average, lands on the grid, and leaves wide weights alone.

Two seconds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr

SIZE = 1 << 15


def new_weights(mean, step, dtype=jnp.bfloat16, key=0):
    params = jnp.full(SIZE, mean, dtype)
    tx = blr.round_stochastically(key)

    @jax.jit
    def update(params):
        updates, _ = tx.update(jnp.full(SIZE, step, jnp.float32), tx.init(params), params)
        return optax.apply_updates(params, updates)

    return np.asarray(update(params), np.float64)


@pytest.mark.parametrize(
    ("mean", "step", "below", "above"),
    [
        (1.0, 1e-3, 1.0, 1 + 2.0**-7),
        (1.0, -1e-3, 1 - 2.0**-8, 1.0),  # the grid below a power of two is finer
        (-100.0, 0.1, -100.0, -99.5),
        (1.0, 0.0, 1.0, 1.0),
        (0.0, 1.003, 1.0, 1 + 2.0**-7),
        (1.5, -1.5, 0.0, 0.0),
    ],
)
def test_the_neighbours_are_taken_in_proportion(mean, step, below, above):
    found = new_weights(mean, step)
    assert set(np.unique(found)) <= {below, above}
    if above > below:
        share = (mean + step - below) / (above - below)
        error = np.sqrt(share * (1 - share) / SIZE)
        assert abs(np.mean(found == above) - share) < 4 * error


def test_small_steps_add_up():
    params, tx = {"w": jnp.ones(4096, jnp.bfloat16)}, blr.round_stochastically(1)
    plain = optax.chain(optax.sgd(1e-4))
    chained = optax.chain(optax.sgd(1e-4), tx)

    def run(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update({"w": -jnp.ones(4096, jnp.bfloat16)}, state, params)
            return (optax.apply_updates(params, updates), state), None

        (found, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=300))(
            (params, tx.init(params))
        )
        return np.asarray(found["w"], np.float64).mean()

    assert run(plain) == 1.0  # what rounding to the nearest makes of it
    assert abs(run(chained) - 1.03) < 0.001


def test_steps_and_leaves_are_rounded_by_other_numbers():
    params = {"a": jnp.ones(64, jnp.bfloat16), "b": jnp.ones(64, jnp.bfloat16)}
    tx = blr.round_stochastically()
    half = jax.tree.map(lambda p: jnp.full_like(p, 2.0**-8), params)
    first, state = tx.update(half, tx.init(params), params)
    second, _ = tx.update(half, state, params)
    assert np.any(first["a"] != first["b"]) and np.any(first["a"] != second["a"])
    assert first["a"].dtype == jnp.bfloat16


def test_wide_weights_are_left_alone():
    params, step = jnp.ones(8), jnp.full(8, 1e-9)
    tx = blr.round_stochastically()
    np.testing.assert_array_equal(tx.update(step, tx.init(params), params)[0], step)


def test_it_needs_the_weights():
    tx = blr.round_stochastically()
    with pytest.raises(ValueError, match="params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
