"""The mixture of IVONs with one component is IVON, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import make_batch, make_params, mean_loss
from test_mixture_ivon import COMMON, stacked

import blr_optax as blr


@pytest.mark.parametrize("more", [{}, {"clip_radius": 0.1, "rescale_lr": False, "b1": 0.5}])
def test_one_component_is_ivon_to_the_bit(more):
    """The arithmetic is eager: in one program equal things may be rounded otherwise."""
    one, batch = jax.tree.map(np.asarray, (make_params(), make_batch()))
    one = jax.tree.map(lambda x: jnp.asarray(x[None]), one)
    grad = jax.jit(jax.grad(lambda w: stacked(mean_loss)(w, *batch)[0]))
    sample, found = jax.jit(blr.sample), []
    for make in (blr.mixture_ivon, blr.ivon):
        tx = make(0.1, **COMMON, **more)
        state, params = jax.jit(tx.init)(one), one
        for _ in range(4):
            updates, state = tx.update(grad(sample(state, params)), state, params)
            params = optax.apply_updates(params, updates)
        found.append((params, optax.tree.get(state, "precision")))
    jax.tree.map(np.testing.assert_array_equal, *found)
