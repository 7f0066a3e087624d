"""The adversary of SAM and bSAM is where it should be also in bfloat16, on average.

The loss is a quadratic, whose gradient at the adversary says how far that is from the parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blr_optax as blr

SIZE = 16384
# The move of every weight, at a gradient of 1, and the curvature of the loss.
MOVE, HESSIAN = 1e-4, 3.0


def sam():
    return blr.sam(0.1, rho=MOVE * SIZE**0.5, momentum=None)


def bsam():
    """m + r g / p at p = 1."""
    return blr.bsam(0.1, ess=1e12, rho=MOVE, prior_precision=0.0, damping=0.0, init_precision=1e12)


@pytest.mark.parametrize("make", [sam, bsam])
@pytest.mark.parametrize(
    ("dtype", "mean"), [(jnp.bfloat16, 1.5), (jnp.float16, -3.0), (jnp.float32, 1.5)]
)
def test_the_gradient_is_that_at_the_adversary(make, dtype, mean):
    """Its move is 1e-4, and the spacing of bfloat16 at 1.5 is 8e-3."""
    params = jnp.full(SIZE, mean, dtype)
    away = lambda w: w.astype(jnp.float32) - params.astype(jnp.float32)  # noqa: E731
    loss = lambda w: jnp.sum(away(w) + 0.5 * HESSIAN * jnp.square(away(w)))  # noqa: E731
    tx = make()
    state = tx.init(params)

    @jax.jit
    def moved(state):
        reader = state.reader if hasattr(state, "reader") else state[0].reader
        inner = state if hasattr(state, "reader") else state[0]
        return away(reader.adversary(inner, params, jax.grad(loss)(params)))

    found = np.asarray(moved(state), np.float64)
    error = max(found.std() / SIZE**0.5, 1e-3 * MOVE)
    assert abs(found.mean() - MOVE) < 3.5 * error
    grad = jax.jit(lambda s: blr.estimate(loss, s, params).grad)(state)
    spread = 3.5 * HESSIAN * error + 2.0**-9 * (dtype == jnp.bfloat16)  # of a gradient in bfloat16
    assert abs(np.float64(grad).mean() - 1.0 - HESSIAN * MOVE) < spread


@pytest.mark.slow
def test_every_step_rounds_anew():
    """At a move of half a spacing every second weight moves, others in the next step."""
    params, grads = jnp.full(64, 1.5, jnp.bfloat16), jnp.ones(64, jnp.bfloat16)
    tx = blr.sam(0.0, rho=2.0**-8 * 8)
    first = tx.init(params)
    _, second = tx.update(grads, first, params, statistic=grads)
    one, two = (np.asarray(s.reader.adversary(s, params, grads)) for s in (first, second))
    assert 16 < np.sum(one != params) < 48 and 16 < np.sum(two != params) < 48
    assert 16 < np.sum(one != two) < 48
