"""A loss that draws by itself (dropout) gets a key of its own for every draw and micro-batch.

About three seconds, all of it compiling.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def listening():
    """A loss with dropout, and the list of (key, first weight) at which it was evaluated."""
    seen = []

    def loss(theta, x, *, key):
        jax.debug.callback(
            lambda k, w: seen.append((tuple(np.ravel(k).tolist()), float(w))),
            jax.random.key_data(key),
            theta[0],
        )
        return jnp.mean(((x * jax.random.bernoulli(key, 0.5, x.shape[1:])) @ theta - 1.0) ** 2)

    return loss, seen


def start(tx=None):
    tx = tx or blr.ivon(0.1, ess=8.0, b2=0.9)
    params = jnp.ones(3)
    return tx, params, tx.init(params)


@pytest.mark.parametrize("samples", [3, 6])  # unrolled, and a scan
def test_every_draw_and_micro_batch_has_its_own_key(samples):
    loss, seen = listening()
    _, params, state = start()
    blr.estimate(loss, state, params, X, samples=samples, microbatch=4, antithetic=True, key=1)
    jax.effects_barrier()
    keys = {key for key, _ in seen}
    assert len(seen) >= 4 * samples and len(keys) == 2 * samples
    weights = {key: {w for k, w in seen if k == key} for key in keys}
    assert all(len(both) == 2 for both in weights.values())  # an antithetic pair shares its key


def test_the_gradient_is_the_average_over_keys():
    loss, seen = listening()
    _, params, state = start(blr.adam(0.1, ess=8.0))
    est = jax.jit(lambda s, p: blr.estimate(loss, s, p, X, samples=2, key=jax.random.key(3)))(
        state, params
    )
    jax.effects_barrier()
    grads = []
    for key, _ in seen:
        kept = jax.random.bernoulli(jax.random.wrap_key_data(jnp.array(key, jnp.uint32)), 0.5, (3,))
        x = X * np.asarray(kept)
        grads.append(2 * x.T @ (x @ np.ones(3) - 1) / len(x))
    assert len(grads) == 2 and np.any(grads[0] != grads[1])
    np.testing.assert_allclose(est.grad, np.mean(grads, 0), rtol=1e-5)


def test_a_step_passes_its_key_on():
    loss, seen = listening()
    tx, params, state = start()
    step = blr.make_step(tx, loss, samples=2, donate=False)
    for number in range(3):
        params, state, _ = step(params, state, X, key=jax.random.key(number))
    jax.effects_barrier()
    assert len({key for key, _ in seen}) == 6


def test_a_line_search_evaluates_under_the_noise_of_the_gradient():
    loss, seen = listening()
    tx, params, state = start(optax.lbfgs())
    blr.make_step(tx, loss, donate=False)(params, state, X, key=0)
    jax.effects_barrier()
    assert len(seen) > 1 and len({key for key, _ in seen}) == 1


def test_replicas_draw_under_different_keys():
    loss, seen = listening()
    _, params, state = start()

    def one(x):
        return blr.estimate(loss, state, params, x, axis_name="replica", key=0).value

    jax.vmap(one, axis_name="replica")(np.stack([X, X]))
    jax.effects_barrier()
    assert len({key for key, _ in seen}) == 2


def test_an_optimizer_that_evaluates_the_loss_takes_no_key():
    params = jnp.ones(3)
    loss = lambda w, x: jnp.mean((x @ w) ** 2)  # noqa: E731
    tx = blr.blr_update("normal", loss, 0.1, ess=8.0)
    step = blr.make_step(tx, loss, donate=False)
    with pytest.raises(ValueError, match="make_step: key"):
        step(params, tx.init(params), X, key=0)
