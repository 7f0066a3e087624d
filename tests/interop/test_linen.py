"""`blr.linen` walks the trajectory of the plain loop of a `TrainState`; two seconds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from tools import near

import blr_optax as blr

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 3)).astype(np.float32)
Y = np.sin(X[:, :1]) + X[:, 1:2] * X[:, 2:]


def ivon():
    return blr.ivon(0.05, ess=16.0, b2=0.9, hess_init=0.5, key=3)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(1)(x)


class Stats(TrainState):
    batch_stats: dict


def linen_state(tx):
    model = Linen()
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), X, False)
    return Stats.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=tx,
    )


def linen_loss(params, state, x, y, key):
    variables = {"params": params, "batch_stats": state.batch_stats}
    out, new = state.apply_fn(variables, x, True, mutable=["batch_stats"], rngs={"dropout": key})
    return jnp.mean((out - y) ** 2), {"batch_stats": new["batch_stats"]}


def test_a_train_state_walks_the_plain_loop():
    tx = ivon()
    state = linen_state(tx)
    step = blr.linen.make_step(linen_loss, samples=2, has_aux=True, donate=False)
    params, opt_state, first = state.params, state.opt_state, state

    @jax.jit
    def plain(state, key):
        est = blr.estimate(
            lambda theta, x, y, key: linen_loss(theta, state, x, y, key),
            state.opt_state, state.params, X, Y, samples=2, has_aux=True, key=key,
        )  # fmt: skip
        updates, opt_state = tx.update(
            est.grad, state.opt_state, state.params, statistic=est.statistic
        )
        return optax.apply_updates(state.params, updates), opt_state, est.aux["batch_stats"]

    for number in range(3):
        key = jax.random.key(number)
        params, opt_state, stats = plain(state, key)
        state, info = step(state, X, Y, key=key)
        near(state.params, params, rtol=1e-5, atol=1e-7)
        near(state.batch_stats, stats, rtol=1e-5, atol=1e-7)
    variance = blr.posterior(opt_state, params).variance
    near(blr.posterior(state.opt_state, state.params).variance, variance, rtol=1e-5)
    assert int(state.step) == 3 and int(info.skipped) == 0
    q, apply = blr.linen.posterior(state)
    evaluated = apply(q.mean, X, train=False)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    near(evaluated, Linen().apply(variables, X, False), rtol=1e-5)
    near(blr.linen.sampled(state).params, blr.sample(state.opt_state, state.params), rtol=1e-6)
    assert int(first.step) == 0


def test_a_train_state_is_asked_for_by_name():
    with pytest.raises(ValueError, match=r"linen\.posterior: give .*dict has no step, apply_fn"):
        blr.linen.posterior({})
    with pytest.raises(ValueError, match=r"linen\.make_step: .*tuple has no"):
        blr.linen.make_step(linen_loss, jit=False)((), X)
