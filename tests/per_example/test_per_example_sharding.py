"""`per_example` with its batch spread over eight devices: the same numbers, and no gathering."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from per_example_models import mlp
from per_example_networks import ROWS
from test_per_example import QUICK, cast

import blr_optax as blr

SIZE = 32
KINDS = (
    "mlp",
    "positions",
    "convnet",
    "embedding_large",
    "tied_small",
    "tied_large",
    "scan_layers",
)


def spread(name, kind):
    """A model, its parameters on all devices, and a batch spread over them."""
    row = ROWS[name]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))

    def longer(x):
        x = np.resize(x, (SIZE, *x.shape[1:]))
        if np.issubdtype(x.dtype, np.floating):
            x = x * np.linspace(0.5, 1.5, SIZE).reshape(-1, *[1] * (x.ndim - 1))
        return x

    params, batch = cast(row.params, jnp.float64), jax.tree.map(longer, row.batch)
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    return (
        mesh,
        row.loss,
        params,
        batch,
        everywhere,
        jax.device_put(batch, NamedSharding(mesh, P("d"))),
    )


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile(QUICK)


def gathered(program):
    """How many arrays, by the shape of an example, a compiled function moves between devices."""
    moves = r"= \w+\[\d+(\S+) (?:all-gather|all-to-all|collective-permute)"
    return Counter(re.findall(moves, program.as_text()))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_gauss_newton_and_factors(x64, kind):
    mesh, loss, params, batch, everywhere, parts = spread("mlp", kind)
    f = functools.partial(
        blr.per_example,
        loss,
        statistics=("ggn_diagonal", "kfac"),
        outputs=lambda p, x, y: mlp(p, x),
        likelihood="categorical",
        labels="sampled",
        key=jax.random.key(1),
    )
    whole = jax.jit(f, compiler_options=QUICK)
    expected = whole(params, *batch)
    with jax.set_mesh(mesh):
        found = jax.device_get(jax.jit(f, compiler_options=QUICK)(everywhere, *parts))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
