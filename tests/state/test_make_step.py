"""`make_step` is the loop written by hand, for every row and for optimizers of optax."""

import functools

import jax
import numpy as np
import optax
import pytest
from registry import (
    ROWS,
    make_batch,
    make_params,
    make_stacked,
    mean_loss,
    one_step,
    rows,
    stacked_loss,
)
from tools import assert_same, near

import blr_optax as blr

STEPS = 2


def run(step, params, opt_state, batch, steps=STEPS):
    for _ in range(steps):
        params, opt_state, *info = step(params, opt_state, *batch)
    return params, opt_state, *info


@pytest.mark.parametrize("row", rows())
def test_every_row_takes_the_steps_of_its_loop(row):
    tx, params, batch = row.tx(), row.params(), make_batch()
    init = jax.jit(tx.init)
    step = blr.make_step(tx, row.objective, donate=False)
    made, state, info = run(step, params, init(params), batch)
    by_hand = jax.jit(functools.partial(one_step, row, tx))
    wanted, wanted_state = params, init(params)
    for _ in range(STEPS):
        wanted, wanted_state = by_hand(wanted, wanted_state, batch)
    near(made, wanted, rtol=2e-5, atol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(wanted_state)
    assert int(info.skipped) == 0 and np.isfinite(info.value) and info.aux is None


def reduced(learning_rate):
    return optax.chain(optax.adam(learning_rate), optax.contrib.reduce_on_plateau(patience=1))


@pytest.mark.parametrize("tx", [optax.adamw(0.1), optax.lbfgs(), reduced(0.1)])
def test_optimizers_of_optax_take_their_own_steps(tx):
    """The last two need the value, and the function itself."""
    params, batch = make_params(), make_batch()
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def by_hand(params, state, *batch):
        value, grad = jax.value_and_grad(mean_loss)(params, *batch)
        extra = {"value": value, "grad": grad, "value_fn": lambda p: mean_loss(p, *batch)}
        updates, state = tx.update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state, value

    step = blr.make_step(tx, mean_loss, donate=False)
    made, state, info = run(step, params, tx.init(params), batch)
    wanted, wanted_state, value = run(by_hand, params, tx.init(params), batch)
    near((made, state, info.value), (wanted, wanted_state, value), rtol=1e-5, atol=1e-6)
    assert int(info.skipped) == 0


def test_draws_and_micro_batches_are_those_of_estimate():
    params, batch, tx = make_params(), make_batch(), blr.ivon(0.1, ess=50.0)
    options = {"samples": 2, "antithetic": True, "microbatch": 4, "has_aux": True}

    def loss(params, x, y):
        value = mean_loss(params, x, y)
        return value, {"twice": 2.0 * value}

    @jax.jit
    def by_hand(params, state):
        est = blr.estimate(loss, state, params, *batch, **options)
        updates, _ = tx.update(est.grad, state, params, statistic=est.statistic)
        return optax.apply_updates(params, updates), est.value, est.aux

    state = tx.init(params)
    made, _, info = blr.make_step(tx, loss, donate=False, **options)(params, state, *batch)
    near((made, info.value, info.aux), by_hand(params, state), rtol=1e-6)
    near(info.aux["twice"], 2.0 * np.asarray(info.value), rtol=1e-6)


def test_a_mixture_gets_the_losses_of_its_components():
    batch = make_batch()
    tx = blr.mixture_ivon(0.1, ess=30.0, weight_rate=0.1)
    params = make_stacked()

    def losses(params, x, y):
        each = jax.vmap(mean_loss, (0, None, None))(params, x, y)
        return each.sum(), each

    _, state, info = blr.make_step(tx, losses, has_aux=True, donate=False)(
        params, tx.init(params), *batch
    )
    assert info.aux.shape == (2,) and float(abs(state[0].log_odds[0])) > 0.0
    with pytest.raises(ValueError, match=r"losses.*has_aux=True"):
        blr.make_step(tx, stacked_loss, donate=False)(params, tx.init(params), *batch)


def test_options_for_draws_do_nothing_where_none_are_drawn():
    params, batch = make_params(), make_batch()
    for tx in (optax.adamw(0.1), blr.adam(0.1)):
        plain, many = (
            blr.make_step(tx, mean_loss, donate=False, **options)(params, tx.init(params), *batch)
            for options in ({}, {"samples": 3, "antithetic": True})
        )
        assert_same(plain[0], many[0])
        pieces = blr.make_step(tx, mean_loss, microbatch=2, donate=False)
        near(pieces(params, tx.init(params), *batch)[0], plain[0], rtol=1e-5)


def test_steps_that_are_not_finite_are_counted():
    params, (x, y), tx = make_params(), make_batch(), blr.ivon(0.1, ess=50.0)
    step = blr.make_step(tx, mean_loss, donate=False)
    made, state, info = step(params, tx.init(params), x, y * np.nan)
    assert_same(made, params)
    assert int(info.skipped) == 1 and np.isnan(info.value)
    assert int(step(made, state, x, y)[2].skipped) == 1


def test_memory_is_reused_only_where_that_is_asked_for():
    tx, batch = blr.ivon(0.1, ess=50.0), make_batch()
    for donate in (True, False):
        params = make_params()
        state = tx.init(params)
        blr.make_step(tx, mean_loss, donate=donate)(params, state, *batch)
        assert all(leaf.is_deleted() == donate for leaf in jax.tree.leaves((params, state[0])))


def test_a_posterior_outlives_the_step_that_reuses_its_memory():
    """Points as well: the parameters that they are go to the next step."""
    groups = {"w": blr.ivon(0.1, ess=9.0), "b": optax.sgd(0.1), "c": blr.bayesbinn(0.1, ess=9.0)}
    tx, params = optax.partition(groups, {name: name for name in groups}), make_params()
    state, step = tx.init(params), blr.make_step(tx, mean_loss)
    q = blr.posterior(state, params)
    mean = jax.tree.map(np.asarray, q.mean)
    step(params, state, *make_batch())
    assert_same(q.mean, mean)


def test_a_loss_that_is_not_finite_is_told():
    """By rows that evaluate the loss themselves too, whose state keeps the last finite one."""
    (x, y), params = make_batch(), make_params()
    tx = next(row for row in ROWS if row.name == "online_newton").tx()
    step = blr.make_step(tx, mean_loss, donate=False)
    params, state, first = step(params, tx.init(params), x, y)
    _, state, info = step(params, state, x, y * np.nan)
    assert np.isfinite(first.value) and np.isnan(info.value) and int(info.skipped) == 1
    np.testing.assert_array_equal(state.expected_loss, first.value)


def test_a_step_that_is_not_compiled_is_part_of_a_program():
    tx, params, batch = blr.ivon(0.1, ess=50.0), make_params(), make_batch()
    step = blr.make_step(tx, mean_loss, jit=False)

    @jax.jit
    def train(params):
        def body(carry, _):
            params, state, info = step(*carry, *batch)
            return (params, state), info.value

        return jax.lax.scan(body, (params, tx.init(params)), None, length=STEPS)

    (scanned, _), values = train(params)
    made = run(blr.make_step(tx, mean_loss, donate=False), params, tx.init(params), batch)
    near(scanned, made[0], rtol=1e-5)
    near(values[-1], made[2].value, rtol=1e-5)


def test_replicas_average_over_a_named_axis():
    """Without noise, halves of a batch on two replicas are the whole batch."""
    tx, params, batch = blr.adam(0.1), make_params(), make_batch()
    step = blr.make_step(tx, mean_loss, axis_name="i", jit=False)
    halves = jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), batch)
    both = jax.jit(jax.vmap(step, (None, None, 0, 0), axis_name="i"))
    made, _, info = both(params, tx.init(params), *halves)
    wanted, _, whole = blr.make_step(tx, mean_loss, donate=False)(params, tx.init(params), *batch)
    for replica in range(2):
        near(jax.tree.map(lambda a, r=replica: a[r], made), wanted, rtol=1e-5)
    near(info.value, np.full(2, whole.value), rtol=1e-6)


def test_wrong_arguments_are_refused_in_words():
    params, batch = make_params(), make_batch()
    with pytest.raises(ValueError, match="transformation"):
        blr.make_step(optax.adam, mean_loss)
    with pytest.raises(ValueError, match="samples=0"):
        blr.make_step(optax.adam(0.1), mean_loss, samples=0)
    own = next(row for row in ROWS if row.name == "online_newton").tx()
    for options in ({"samples": 2}, {"antithetic": True}, {"has_aux": True}, {"microbatch": 2}):
        step = blr.make_step(own, mean_loss, **options)
        with pytest.raises(ValueError, match=f"{next(iter(options))}.*evaluates the loss itself"):
            step(params, own.init(params), *batch)
    both = optax.partition(
        {"own": own, "ivon": blr.ivon(0.1, ess=9.0)}, {"w": "own", "b": "ivon", "c": "ivon"}
    )
    with pytest.raises(ValueError, match="evaluates the loss itself"):
        blr.make_step(both, mean_loss)(params, both.init(params), *batch)
    several = optax.MultiSteps(blr.ivon(0.1, ess=9.0), 2)
    with pytest.raises(ValueError, match="microbatch="):
        blr.make_step(several, mean_loss)(params, several.init(params), *batch)
