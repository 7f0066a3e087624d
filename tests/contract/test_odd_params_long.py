"""Parameters as users have them: none, plain numbers, one matrix, split over an explicit mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import Contract, rows

import blr_optax as blr


@pytest.mark.parametrize("row", rows(Contract.MASKED, loss=False))
def test_a_group_that_matches_nothing(row):
    """As optax's own: the others move, and a tree without leaves is left alone."""
    params = row.params()
    tx = optax.partition({"a": row.tx(), "b": blr.sgd(0.1)}, dict.fromkeys(params, "b"))
    extra = {"statistic": params} if row.estimated else {}

    @jax.jit
    def step(params):
        state = tx.init(params)
        return tx.update(params, state, params, **extra)[0], blr.posterior(state, params).variance

    updates, variance = step(params)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -0.1 * p, rtol=1e-6), updates, params)
    jax.tree.map(lambda v: np.testing.assert_allclose(v, 0.1 + 0 * v, rtol=1e-6), variance)
    alone = row.tx()
    extra = {"statistic": {}} if row.estimated else {}
    assert alone.update({}, alone.init({}), {}, **extra)[0] == {}


@pytest.mark.parametrize("row", rows())
def test_numbers_of_python_are_taken_or_named(row):
    """The noise, and the reader, need arrays; SGD and Adam take numbers as optax does."""
    params = {"a": 1.5, "b": jnp.ones(2)}
    tx = row.tx()
    if row.kind in ("point", "squares"):
        grads = {"a": jnp.float32(0.5), "b": jnp.ones(2)}
        arrays = jax.tree.map(jnp.asarray, params)
        found, state = tx.update(grads, tx.init(params), params)
        wanted, same = tx.update(grads, tx.init(arrays), arrays)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        q, r = blr.posterior(state, params), blr.posterior(same, arrays)
        jax.tree.map(np.testing.assert_array_equal, (q.mean, q.variance), (r.mean, r.variance))
        return
    with pytest.raises(ValueError, match=r"parameter .*a.* is 1\.5, no array|leading axis"):
        tx.init(params)


@pytest.mark.parametrize("count", [3_000_000_000, np.int64(3_000_000_000)])
@pytest.mark.parametrize(
    "row", [r for r in rows() if {"ess", "examples"} & set(r.values[0].numbers)]
)
def test_whole_numbers_above_two_to_the_31(row, count):
    """As the float of the same size: nothing overflows, nothing wraps."""
    (name,) = {"ess", "examples"} & set(row.numbers)
    params = row.params()

    def variance(number):
        tx = row.tx(**{name: number})
        return jax.jit(lambda p: blr.posterior(tx.init(p), p).variance)(params)

    found, wanted = variance(count), variance(3e9)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)


@pytest.mark.parametrize("row", rows(loss=False))
def test_flatten_is_refused_in_words(row):
    """One flat vector has no leaves; its state is not read as one of the tree."""
    if Contract.MASKED in row.exempt:
        return
    params, tx = row.params(), optax.flatten(row.tx())
    if row.name == "ivon_prior":
        with pytest.raises(ValueError, match="prior: wrong tree structure"):
            tx.init(params)
        return
    state = tx.init(params)
    for read in (blr.sample, blr.posterior):
        with pytest.raises(ValueError, match="params"):
            read(state, params)


MATRIX = np.array([[3.0, -2.0], [1.0, 4.0]], np.float32)
NEWTONS = {
    "newton": lambda f: blr.newton(f, ess=1.0),
    "online_newton": lambda f: blr.online_newton(f, 0.1),
    "kronecker_newton": lambda f: blr.kronecker_newton(f, 0.1),
    "low_rank_newton": lambda f: blr.low_rank_newton(f, 0.1, rank=1, init_precision=10.0),
    "mixture_newton": lambda f: blr.mixture_newton(f, 0.1, components=2),
    "mixture_vi": lambda f: blr.mixture_vi(
        f, 0.1, components=2, estimator=blr.estimators.monte_carlo(2, antithetic=True)
    ),
}


SHAPES = {"2x2": MATRIX, "()": MATRIX[0, 0], "2x1": MATRIX[:, :1], "1x1x2": MATRIX[None, :1]}


@pytest.mark.parametrize("target", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "low_rank_newton" else pytest.mark.slow)
        for name in NEWTONS
    ],
)
def test_one_array_is_a_tree_of_one_leaf(name, target):
    """Of any shape: the step and the posterior are those of a dict with it."""

    def look(wrap, take):
        tx = NEWTONS[name](lambda p: jnp.sum((take(p) - target) ** 2))
        params = wrap(jnp.zeros(target.shape))

        @jax.jit
        def run(params):
            updates, state = tx.update(None, tx.init(params), params)
            q = blr.posterior(state, params)
            return take(updates), take(q.mean), take(q.variance)

        return run(params)

    found = look(lambda x: x, lambda p: p)
    wanted = look(lambda x: {"w": x}, lambda p: p["w"])
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == target.shape
        if name != "mixture_vi":  # whose draws follow the tree
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", rows(loss=True))
def test_rows_with_the_loss_refuse_in_words(row):
    """The placeholder of `map_params` where no field is like params; leaves split over a mesh."""
    params, tx = row.params(), row.tx()
    if Contract.MAP_PARAMS in row.exempt:
        with pytest.raises(ValueError, match="no leaves"):
            optax.tree.map_params(tx, lambda x: x, {})
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    spec = {"w": P(None, "d"), "b": P(), "c": P()}
    split = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, spec)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"Explicit.*Auto"):
        tx.init(split)
