"""What the compiled training step does: one draw of every normal, and Adam's memory."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import blr_optax as blr

SHAPE = (256, 384)


def loss(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"]) ** 2)


def ivon_step(tx):
    def step(params, state, x):
        grads = jax.grad(loss)(blr.sample(state, params), x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def estimate_step(tx, **options):
    def step(params, state, x):
        est = blr.estimate(loss, state, params, x, **options)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        return optax.apply_updates(params, updates), state

    return step


def plain_step(tx):
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled(step, tx):
    params = {"w": jnp.ones(SHAPE) / 100}
    args = (params, tx.init(params), jnp.ones((16, SHAPE[0])))
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


def draws(program, generator):
    """How often the program makes normals of the weights' shape: its logarithms or inverse erfs."""
    text = program.as_text()
    shape = re.escape(f"f32[{SHAPE[0]},{SHAPE[1]}]")
    # "hash" takes the square root of the logarithm; "jax" shows as an inverse error function,
    # whose two branches meet in one select on the sign of a logarithm.
    pattern = r"\S* sqrt\(" if generator == "hash" else r"\S* log-plus-one\("
    return len(re.findall(shape + pattern, text))


@pytest.mark.parametrize("generator", ["hash", "jax"])
def test_every_normal_is_drawn_once_per_step(generator):
    tx = blr.soba(0.1, ess=50.0, generator=generator)
    alone = jax.jit(blr.sample).lower(*(lambda p: (tx.init(p), p))({"w": jnp.ones(SHAPE)}))
    once = draws(alone.compile(), generator)
    assert once >= 1
    assert draws(compiled(ivon_step(tx), tx), generator) == once
    assert draws(compiled(estimate_step(tx), tx), generator) == once


def test_state_is_as_large_as_adams():
    params = {"w": jnp.ones(SHAPE)}

    def size(state):
        return sum(leaf.size * 4 for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))

    adam = size(optax.adamw(1e-3).init(params))
    assert size(blr.ivon(0.1, ess=50.0).init(params)) <= adam + 64


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="XLA before jax 0.10.2 keeps another temporary"
)
def test_peak_memory_is_one_parameter_sized_temporary_above_adams():
    def peak(program):
        m = program.memory_analysis()
        return (
            m.temp_size_in_bytes
            + m.argument_size_in_bytes
            + m.output_size_in_bytes
            - m.alias_size_in_bytes
        )

    weights = 4 * SHAPE[0] * SHAPE[1]
    adam = optax.adamw(1e-3)
    base = peak(compiled(plain_step(adam), adam))
    tx = blr.ivon(0.1, ess=50.0)
    assert peak(compiled(ivon_step(tx), tx)) <= base + 1.05 * weights
    assert peak(compiled(estimate_step(tx), tx)) <= base + 2.05 * weights
