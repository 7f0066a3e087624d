"""Means and samples of a posterior have the dtypes of the weights that were trained.

About five seconds, nearly all of it compiling.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr

HALF = jnp.bfloat16
WEIGHTS = {"a": jnp.ones((2, 3), HALF), "b": jnp.eye(3, dtype=HALF), "c": jnp.ones((3, 2), HALF)}

ROWS = {
    "ivon": blr.ivon(0.1, ess=100.0),
    "evon": blr.evon(0.1, ess=100.0),
    "bayesbinn": blr.bayesbinn(0.1, ess=100.0),
    "adam": blr.adam(0.1, ess=100.0),
    "lie_affine": blr.lie_affine(0.1, ess=100.0),
    "partition": optax.partition(
        {"learnt": blr.ivon(0.1, ess=100.0), "frozen": optax.set_to_zero()},
        {"a": "learnt", "b": "frozen", "c": "learnt"},
    ),
}


def dtypes(tree):
    return {str(x.dtype) for x in jax.tree.leaves(tree)}


def recurrent(weights, x):
    """A network whose scan refuses a carry of another dtype than its input."""

    def cell(h, u):
        return jnp.tanh(u @ weights["a"] + h @ weights["b"]), None

    h, _ = jax.lax.scan(cell, jnp.zeros((x.shape[0], 3), x.dtype), jnp.swapaxes(x, 0, 1))
    return h @ weights["c"]


@pytest.mark.parametrize("tx", ROWS.values(), ids=ROWS)
def test_what_trained_predicts(tx):
    state = tx.init(WEIGHTS)
    q = blr.posterior(state, WEIGHTS)
    assert dtypes(q.mean) == dtypes(q.sample(0)) == dtypes(q.sample(0, (3,))) == {"bfloat16"}
    found = jax.jit(lambda q, x: blr.predict(0, q, recurrent, x, samples=2).probabilities)(
        q, jnp.ones((4, 5, 2), HALF)
    )
    assert np.all(np.isfinite(np.asarray(found, np.float32)))


def test_every_leaf_has_its_own():
    weights = {"half": jnp.ones(2, jnp.float16), "single": jnp.ones(3)}
    q = blr.posterior(blr.ivon(0.1, ess=10.0).init(weights), weights)
    for theta in (q.mean, q.sample(1), (q * q).mean, (q**0.5).sample(1), (q * q / q).mean):
        assert (theta["half"].dtype, theta["single"].dtype) == (jnp.float16, jnp.float32)
    # Its own parameters stay wide, so that a product loses nothing.
    assert dtypes(q.natural) == dtypes(q.standard()) == dtypes(q.variance) == {"float32"}


def test_a_part_keeps_its_own():
    weights = {"half": jnp.ones(2, jnp.float16), "single": jnp.ones(3)}
    q = blr.posterior(blr.ivon(0.1, ess=10.0).init(weights), weights)
    assert q.part("half").mean.dtype == jnp.float16
    assert q.part("single").sample(0).dtype == jnp.float32


def test_a_posterior_of_wide_weights_is_as_before():
    weights = jnp.ones(3)
    q = blr.posterior(blr.ivon(0.1, ess=10.0).init(weights), weights)
    assert q.dtypes is None and q.mean.dtype == jnp.float32


def test_they_survive_a_program():
    q = blr.posterior(ROWS["ivon"].init(WEIGHTS), WEIGHTS)
    inside = jax.jit(lambda q: q * q)(q)
    assert dtypes(inside.mean) == {"bfloat16"}
    members = jax.vmap(lambda key: q.sample(key))(jax.random.split(jax.random.key(0), 4))
    assert dtypes(members) == {"bfloat16"}
