"""Hyper-parameters and gradients at the ends of what numbers can be, over all rows."""

import functools

import jax
import numpy as np
import optax
import pytest
from registry import Programs, make_batch, one_step, rows

import blr_optax as blr

# Not those of the other lines of the contract, whose traces are counted.
own_programs = functools.cache(Programs)


def full(tree, value, leading=()):
    return jax.tree.map(lambda x: np.full(leading + x.shape, value, x.dtype), tree)


def finite(tree):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("row", rows())
def test_numbers_that_are_not_finite_are_refused(row, bad):
    """Each by its name, as a float and as an array; `sgd(nan)` had NaN for weights, unsaid."""
    theirs = {"learning_rate"} if row.name in ("evon_whitened", "scale_by_precision") else set()
    for name in row.numbers.keys() - theirs:  # not of chains that end in optax's own rate
        for value in (bad, np.float32(bad)):
            with pytest.raises(ValueError, match=name):
                row.tx(**{name: value})


@pytest.mark.parametrize("size", [3e18, 1e20, 3e38])
@pytest.mark.parametrize("row", rows(loss=False))
def test_no_finite_gradient_stops_the_run(row, size):
    """Whatever it does to one step, which is taken or counted: the next move, to finite weights.

    The square of 1e20 is infinite in float32, the sum of two 3e38 as well.
    """
    run = own_programs(row)
    params, state = run.after(1)
    step = jax.jit(functools.partial(one_step, row, run.tx))
    if row.estimated:
        extra = {"statistic": full(params, size, row.leading)}
    else:
        extra = {}
    before = sum(int(n) for _, n in optax.tree.get_all_with_path(state, "skipped"))
    updates, state = run.update(full(params, size), state, params, **extra)
    after = sum(int(n) for _, n in optax.tree.get_all_with_path(state, "skipped"))
    moved = any(np.any(u) for u in jax.tree.leaves(updates))
    assert finite(updates)
    assert moved or after == before + 1
    params = jax.tree.map(lambda p, u: p + u, params, updates)
    if moved:  # far away, where the loss itself may overflow: back where its gradient is ordinary
        params = row.params()
    for _ in range(3):
        new, state = step(params, state, make_batch())
        assert finite(new)
        assert any(
            np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (params, new)), strict=True)
        )
        params = new
    assert finite(blr.posterior(state, params).variance)
