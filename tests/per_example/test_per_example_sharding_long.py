"""`per_example` with its batch spread over eight devices: the same numbers, and no gathering."""

import functools
from collections import Counter

import jax
import pytest
from jax.sharding import AxisType
from test_per_example import BOTH, assert_exact, truth
from test_per_example_sharding import KINDS, compiled, gathered, spread

import blr_optax as blr


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", KINDS)
def test_same_numbers_and_nothing_gathered(x64, name, kind):
    mesh, loss, params, batch, everywhere, parts = spread(name, kind)
    expected, allowed = truth(loss, params, batch), Counter()
    if name == "convnet":  # XLA gathers the images of a grouped one, in a plain gradient too
        auto, *_, here, there = spread(name, AxisType.Auto)
        with jax.set_mesh(auto):
            allowed = gathered(compiled(jax.grad(loss), here, *there))
    for microbatch in (None, 16):
        f = functools.partial(blr.per_example, loss, statistics=BOTH, microbatch=microbatch)
        with jax.set_mesh(mesh):
            program = compiled(f, everywhere, *parts)
            found = program(everywhere, *parts)
        assert_exact(jax.device_get(found), expected, 1e-10)
        assert gathered(program) <= allowed
        same = jax.tree.map(
            lambda x, p: x.sharding.is_equivalent_to(p.sharding, p.ndim),
            found.sum_squares,
            everywhere,
        )
        assert all(jax.tree.leaves(same))
