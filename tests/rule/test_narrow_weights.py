"""Weights in bfloat16 and float16 whose posterior is narrower than their spacing still learn it.

The truth is the curvature of a quadratic, 1. Three seconds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blr_optax as blr
from blr_optax import _tree

# (dtype, mean, ess); the first posterior is wider than the spacing, all others narrower.
CASES = [
    (jnp.bfloat16, 0.05, 1e4),
    (jnp.bfloat16, 1.0, 1e6),  # a power of two: below it the grid is twice as fine
    (jnp.bfloat16, 100.0, 1e4),
    (jnp.bfloat16, 0.05, 1e10),
    (jnp.bfloat16, -3.0, 1e8),
    (jnp.bfloat16, 0.0, 1e8),
    (jnp.float16, 1.5, 1e9),
    (jnp.float16, 1000.0, 1e4),
]


def gradient(theta, m):
    return theta.astype(jnp.float32) - m.astype(jnp.float32)


@pytest.mark.parametrize(("dtype", "mean", "ess"), CASES)
def test_the_curvature_is_that_of_the_loss(dtype, mean, ess):
    params = jnp.full(8192, mean, dtype)
    state = blr.ivon(0.1, ess=ess, hess_init=1.0, weight_decay=0.0).init(params)

    def loss(w):
        return 0.5 * jnp.sum(jnp.square(gradient(w, params)))

    est = jax.jit(lambda s: blr.estimate(loss, s, params, samples=4, antithetic=True))(state)
    # 3 standard errors of a mean of 8192 x 4 values of relative variance 2.
    assert abs(float(est.statistic.mean()) - 1.0) < 3 * np.sqrt(2 / (4 * params.size))


def test_the_precision_is_learnt():
    tx = blr.ivon(0.0, ess=1e6, b2=0.98, hess_init=0.2, weight_decay=0.0)
    params = jnp.full(256, 100.0, jnp.bfloat16)

    def step(state, _):
        g = gradient(blr.sample(state, params), params)
        return tx.update(g, state, params)[1], None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, length=600))(tx.init(params))
    found = np.asarray(1.0 / blr.posterior(state, params).variance) / 1e6
    assert abs(found.mean() - 1.0) < 0.05


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_spacing_is_the_distance_to_the_next_number(dtype):
    ones = [1.0, 1.5, 1.99, 2.0, 0.05, 100.0, 3e-3, 6e4, -7.0]
    x = jnp.array(ones, dtype)
    up = (np.abs(np.asarray(x)).view(np.uint16) + 1).view(x.dtype).astype(np.float64)
    wanted = up - np.abs(np.asarray(x)).astype(np.float64)
    np.testing.assert_array_equal(np.asarray(_tree.spacing(x), np.float64), wanted)
    zero = float(_tree.spacing(jnp.zeros((), dtype)))
    assert 0 <= zero <= float(jnp.finfo(dtype).smallest_normal)
