"""Optax's optimizers with a posterior: where a schedule ends, and where a statistic overflows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr

M = np.array([1.0, -2.5, 0.0, 3e-5, 7e7], np.float32)
COSINE = optax.cosine_decay_schedule(0.1, 3)
LINEAR = optax.linear_schedule(0.1, 0.0, 3)
WARMUP = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 6)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda: blr.sgd(COSINE, ess=100.0), 3),
        (lambda: blr.sgd(WARMUP, ess=100.0, momentum=0.9), 0),
        (lambda: blr.gradient_descent(LINEAR, ess=1e9), 3),
        (lambda: blr.sam(LINEAR, ess=100.0), 4),
        (lambda: blr.sgd(0.0), 0),
        (lambda: blr.dropout(blr.sgd(COSINE, ess=100.0), 1.0), 3),
        (lambda: optax.inject_hyperparams(blr.sgd)(COSINE, ess=100.0), 4),  # those of the last step
    ],
)
def test_at_a_rate_of_zero_the_posterior_is_the_point(make, steps):
    """m exactly, and no noise that a weight would show: eagerly, under jit, and as a prior."""
    tx, params = make(), jnp.asarray(M)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        _, state = update(jnp.zeros(5), state, params, statistic=jnp.zeros(5))
    for look in (blr.posterior, jax.jit(blr.posterior)):
        q = look(state, params)
        np.testing.assert_array_equal(q.mean, M)
        assert np.all(np.asarray(q.variance) < 1e-29)
        drawn = q.sample(jax.random.key(0), (3,))
        np.testing.assert_allclose(drawn, [M] * 3, rtol=0, atol=1e-14)
        assert np.all(np.isfinite(q.log_prob(params)))
        assert np.all(np.asarray(q.proper))


def test_just_above_a_rate_of_zero_nothing_is_cut():
    q = blr.posterior(blr.sgd(1e-20, ess=1e5).init(jnp.asarray(M)), M)
    np.testing.assert_allclose(q.variance, np.full(5, 1e-25), rtol=1e-6)


ROWS = {
    "adam": (lambda: blr.adam(0.1), lambda: optax.adam(0.1)),
    "rmsprop": (lambda: blr.rmsprop(0.1), lambda: optax.rmsprop(0.1)),
    "ste": (lambda: blr.ste(0.1, clip=None), lambda: optax.adam(0.1)),
    "centered": (
        lambda: blr.rmsprop(0.1, centered=True, momentum=0.9),
        lambda: optax.rmsprop(0.1, centered=True, momentum=0.9),
    ),
}


@pytest.mark.parametrize(
    ("dtype", "over", "under"), [(np.float32, 1.9e19, 1.8e19), (np.float16, 257.0, 250.0)]
)
@pytest.mark.parametrize("name", ROWS)
def test_a_square_that_overflows_is_skipped_and_one_that_does_not_is_taken(
    name, dtype, over, under
):
    """The step with an infinite second moment is as if it had never been; the other is optax's."""
    ours, optaxs = (make() for make in ROWS[name])
    params, ones = np.ones(2, dtype), np.ones(2, dtype)
    update, peer = jax.jit(ours.update), jax.jit(optaxs.update)
    _, state = update(ones, ours.init(params), params)
    assert under < np.sqrt(float(np.finfo(dtype).max)) < over
    updates, skipped = update(np.array([over, 1.0], dtype), state, params)
    np.testing.assert_array_equal(updates, np.zeros(2))
    assert int(skipped.skipped) == 1 and int(skipped.count) == 1
    wanted, _ = update(ones, state, params)
    found, _ = update(ones, skipped, params)
    np.testing.assert_array_equal(found, wanted)
    assert np.all(np.asarray(found))

    large = np.array([under, 1.0], dtype)
    found, state = update(large, ours.init(params), params)
    wanted, _ = peer(large, optaxs.init(params), params)
    np.testing.assert_array_equal(found, wanted)
    assert int(state.skipped) == 0


@pytest.mark.parametrize(
    ("tx", "size"),
    [(blr.sgd(0.1, momentum=0.9), 1e38), (blr.sam(0.1, momentum=0.9), 1e38), (blr.sgd(10.0), 1e38)],
)
def test_sums_and_steps_that_overflow_are_skipped(tx, size):
    """Ten of these in a row would be 1e39 and more."""
    params = jnp.ones(2)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(10):
        updates, state = update(jnp.full(2, size), state, params, statistic=params)
        np.testing.assert_array_equal(updates, np.zeros(2))
    assert int(state.skipped) == 10
    updates, _ = update(jnp.ones(2), state, params, statistic=params)
    assert np.all(np.asarray(updates) < 0)
