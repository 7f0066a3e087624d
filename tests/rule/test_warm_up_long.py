"""Schedules that start at zero, as every warm-up does: the first step moves nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr

START = np.zeros(2, np.float32)


def loss(w):
    return 0.5 * jnp.sum((w - 3.0) ** 2)


ROWS = {
    "normal": lambda rate: blr.blr_update("normal", loss, rate),
    "gaussian": lambda rate: blr.blr_update("gaussian", loss, rate),
    "online_newton": lambda rate: blr.online_newton(loss, rate),
    "low_rank_newton": lambda rate: blr.low_rank_newton(loss, rate, rank=1),
    "kronecker_newton": lambda rate: blr.kronecker_newton(loss, rate),
    "mixture_newton": lambda rate: blr.mixture_newton(loss, rate, components=2),
    "mixture_vi": lambda rate: blr.mixture_vi(loss, rate, components=2),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_warm_up_from_zero(name):
    tx = ROWS[name](optax.linear_schedule(0.0, 0.5, 1))
    params = START if name != "kronecker_newton" else START[:, None]
    state = tx.init(params)
    update = jax.jit(lambda s, p: tx.update(None, s, p))
    updates, after = update(state, params)
    q, new = (blr.posterior(s, params) for s in (state, after))
    np.testing.assert_allclose(q.mean, new.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(q.variance, new.variance, rtol=1e-5)
    if "mixture" not in name:
        np.testing.assert_allclose(updates, 0.0, atol=1e-6)
    assert int(after.skipped) == 0 and int(after.count) == 1
    moved = update(after, params)[0]
    assert np.all(np.asarray(moved) > 0.2)
    if name in ("normal", "gaussian", "online_newton"):
        np.testing.assert_allclose(moved, 1.5, rtol=1e-5)  # half of the way to 3


def test_a_rate_of_zero_and_a_negative_start_are_refused():
    for rate in (0.0, -0.1, optax.linear_schedule(-0.1, 0.5, 1)):
        with pytest.raises(ValueError, match="learning_rate"):
            ROWS["normal"](rate)
