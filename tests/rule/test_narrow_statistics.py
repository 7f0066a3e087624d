"""What is averaged for bfloat16 weights is averaged in float32, whatever the optimizer.

The truth is the same optimizer of optax in float32, given the same gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import ROWS

import blr_optax as blr

PEERS = {
    "adam": (lambda: blr.adam(0.01), lambda: optax.adam(0.01)),
    "rmsprop": (lambda: blr.rmsprop(0.01, decay=0.999), lambda: optax.rmsprop(0.01, 0.999)),
    "ste": (lambda: blr.ste(0.01, clip=None), lambda: optax.adam(0.01)),
    "sgd": (lambda: blr.sgd(0.01, momentum=0.999), lambda: optax.sgd(0.01, 0.999)),
}


def run(tx, params, sizes, dtype):
    """Updates of gradients of these sizes at parameters that stay, and the last state."""

    def step(state, g):
        updates, state = tx.update(jnp.full(2, g, dtype), state, params)
        return state, updates

    return jax.jit(lambda s: jax.lax.scan(step, s, jnp.asarray(sizes, dtype)))(tx.init(params))


# Large gradients, then small ones: a decay of 0.999 forgets the first within 5000 steps.
SIZES = np.concatenate([np.ones(500), np.full(5000, 1 / 64)])


@pytest.mark.parametrize(
    "name", [n if n == "adam" else pytest.param(n, marks=pytest.mark.slow) for n in PEERS]
)
def test_averages_forget(name):
    ours, optaxs = (make() for make in PEERS[name])
    state, updates = run(ours, jnp.ones(2, jnp.bfloat16), SIZES, jnp.bfloat16)
    peer, wanted = run(optaxs, jnp.ones(2), SIZES, jnp.float32)
    assert updates.dtype == jnp.bfloat16
    for x, y in zip(jax.tree.leaves(state.inner), jax.tree.leaves(peer), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
        assert x.dtype == y.dtype
    np.testing.assert_allclose(np.float32(updates), wanted, rtol=2.0**-8)


@pytest.mark.slow
def test_the_posterior_is_that_of_float32():
    found, wanted = (
        blr.posterior(
            run(blr.adam(0.01, ess=9.0), jnp.ones(2, dtype), SIZES, dtype)[0], jnp.ones(2)
        )
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    np.testing.assert_allclose(found.variance, wanted.variance, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [row.name for row in ROWS])
def test_no_state_is_narrower_than_float32(name):
    (row,) = (row for row in ROWS if row.name == name)
    state = row.tx().init(row.params(jnp.bfloat16))
    narrow = [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    ]
    assert not narrow


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gamma", "beta", "gaussian_diagonal"])
def test_samples_of_every_family_have_the_type_of_the_weights(name):
    standard = {
        "gamma": {"concentration": jnp.full(3, 3.0), "rate": jnp.full(3, 1.5)},
        "beta": {"alpha": jnp.full(3, 2.0), "beta": jnp.full(3, 2.0)},
        "gaussian_diagonal": {"mean": jnp.ones(3), "precision": jnp.ones(3)},
    }[name]
    family = blr.families.get(name)
    family = family if name == "gaussian_diagonal" else blr.families.MeanField(family)
    init = blr.Distribution(family, family.natural(**standard))
    params = jnp.asarray(init.mean, jnp.bfloat16)
    tx = blr.blr_update(family, lambda w: jnp.sum(w * w), 0.1, ess=5.0, init=init)
    state = tx.init(params)
    assert blr.sample(state, params).dtype == jnp.bfloat16
    assert blr.posterior(state, params).sample(jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.slow
def test_shapes_and_accumulators_that_were_asked_for():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    for tx in (blr.adam(0.1), blr.sgd(0.1, momentum=0.9), blr.rmsprop(0.1, initial_scale=0.5)):
        assert types(tx.init(shapes)) == types(tx.init(params))
    for tx, field in (
        (blr.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16), "trace"),
        (blr.adam(0.1, mu_dtype=jnp.bfloat16), "mu"),
    ):
        found = optax.tree.get(tx.init(params), field)
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
@pytest.mark.parametrize("make", [blr.adam, blr.rmsprop])
def test_float16_steps_that_are_not_finite_are_skipped(make):
    """The square of 1e-4 is 0 in float16, and 1e-8 too: optax divides by 0."""
    tx, params = make(0.1), jnp.ones(2, jnp.float16)
    updates, state = tx.update(jnp.full(2, 1e-4, jnp.float16), tx.init(params), params)
    np.testing.assert_array_equal(updates, np.zeros(2))
    assert int(state.skipped) == 1
    updates, state = tx.update(jnp.ones(2, jnp.float16), state, params)
    assert np.all(np.isfinite(updates)) and np.all(updates < 0)
    assert int(state.skipped) == 1
