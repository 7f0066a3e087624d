"""The optax contract C1 to C19: every line over every row of the registry that it concerns."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import ROWS, evidence, make_batch, make_params, mean_loss, one_step, rows, train
from tools import ROOT, assert_same

import blr_optax as blr
from blr_optax.rule._protocol import map_posterior_states, posterior_states
from blr_optax.rule._read import noise_of

TREE_TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


@pytest.mark.parametrize("row", rows("C1"))
def test_c1_ignores_unknown_extra_arguments(row):
    tx = row.tx()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    plain = train(row, tx, make_params(), make_batch(), 2)
    extra = train(row, tx, make_params(), make_batch(), 2, foreign=1.0, value=2.0)
    assert_same(plain, extra)


@pytest.mark.parametrize("row", rows())
def test_c2_init_from_shapes(row):
    params, tx = make_params(), row.tx()
    shapes = jax.eval_shape(lambda: params)
    assert types(jax.eval_shape(tx.init, shapes)) == types(jax.eval_shape(tx.init, params))
    if "C2" in row.exempt or row.loss:
        return
    direct = tx.init(shapes)
    assert jax.tree.map(jnp.shape, direct) == jax.tree.map(jnp.shape, tx.init(params))


@pytest.mark.parametrize("row", rows("C2"))
def test_c2_map_params_finds_the_parameter_fields(row):
    params, tx = make_params(), row.tx()
    state = tx.init(params)
    tagged = optax.tree.map_params(
        tx,
        lambda leaf, p: jnp.shape(leaf) == jnp.shape(p),
        state,
        params,
        transform_non_params=lambda _: None,
    )
    found = jax.tree.leaves(tagged)
    assert all(found), "a field with the structure of params has leaves of another shape"
    expected = sum(
        isinstance(x, jax.Array) and x.shape == params["w"].shape for x in jax.tree.leaves(state)
    )  # nothing else has the shape of w
    assert len(found) == 3 * expected


@pytest.mark.parametrize("row", rows("C3"))
def test_c3_state_keeps_its_types(row):
    params, tx = make_params(), row.tx()
    state = tx.init(params)
    step = jax.jit(lambda p, s, b: one_step(row, tx, p, s, b))
    for _ in range(2):
        params, after = step(params, state, make_batch())
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert types(after) == types(state)
        state = after


@pytest.mark.parametrize("row", rows("C3"))
def test_c3_float32_parameters_stay_float32_under_x64(row):
    with jax.enable_x64(True):
        params, tx, batch = make_params(jnp.float32), row.tx(), make_batch()
        state = tx.init(params)
        _, after = jax.jit(lambda p, s: one_step(row, tx, p, s, batch))(params, state)
        assert types(after) == types(state)
        if row.noisy and not row.loss:
            wide = jax.tree.map(lambda p: jnp.ones(row.leading + p.shape, jnp.float64), params)
            _, after = tx.update(params, state, params, curvature=wide)
            assert types(after) == types(state)


@pytest.mark.parametrize("row", rows("C3"))
def test_c3_inside_cond_and_wrappers(row):
    params, tx = make_params(), row.tx()
    wrapped = optax.apply_if_finite(tx, max_consecutive_errors=3)
    batch = make_batch()
    state = wrapped.init(params)
    grads, extra = evidence(row, params, state, batch)
    grads = jax.tree.map(jnp.ones_like, params) if grads is None else grads
    _, state = jax.jit(lambda g, s, p: wrapped.update(g, s, p, **extra))(grads, state, params)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, after = jax.jit(lambda g, s, p: wrapped.update(g, s, p, **extra))(bad, state, params)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert int(after.total_notfinite) == 1
    assert_same(after.inner_state, state.inner_state)


@pytest.mark.parametrize("row", rows("multi"))
def test_c3_inside_multi_steps(row):
    params, tx = make_params(), optax.MultiSteps(row.tx(), every_k_schedule=2)
    batch = make_batch()
    extra = {"batch": batch} if row.loss else {}
    state = tx.init(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra))
    moved = []
    for _ in range(4):
        grads = jax.grad(mean_loss)(params, *batch)
        updates, state = update(grads, state, params)
        moved.append(any(np.any(u) for u in jax.tree.leaves(updates)))
    assert moved == [False, True, False, True]


@pytest.mark.parametrize("row", rows("C4"))
def test_c4_compiles_once(row):
    tx, traces = row.tx(), []

    def step(params, state, batch):
        traces.append(1)
        return one_step(row, tx, params, state, batch)

    step = jax.jit(step)
    params = make_params()
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state, make_batch())
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("row", rows("C5"))
def test_c5_updates_have_the_dtype_of_params(row, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, batch = make_params(dtype), make_batch(dtype=dtype)
        tx = row.tx()
        state = tx.init(params)
        weights = params if row.loss else blr.sample(state, params)
        assert jax.tree.map(lambda x: x.dtype, weights) == jax.tree.map(lambda x: x.dtype, params)
        if row.name == "newton" and dtype in ("float16", "bfloat16"):
            # A Hessian taken in half precision is not positive definite to working accuracy.
            return
        grads, extra = evidence(row, params, state, batch)
        updates, after = tx.update(grads, state, params, **extra)
        assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
        assert types(after) == types(state)
        for name in ("precision", "natural"):
            for _, field in optax.tree.get_all_with_path(after, name):
                assert all(x.dtype.itemsize >= 4 for x in jax.tree.leaves(field))


@pytest.mark.parametrize("row", rows("C6"))
def test_c6_states_are_named_tuples_with_plain_fields(row):
    state = row.tx().init(make_params())
    (found,) = posterior_states(state, "test")
    assert isinstance(found, tuple)
    assert not {"value", "grad", "learning_rate"} & set(found._fields)
    name = type(found).__name__
    assert not hasattr(optax, name)
    assert optax.tree.get(state, name) is not None
    for field in ("value", "grad"):
        assert optax.tree.get(state, field, default=None) is None


@pytest.mark.parametrize("row", rows("C7"))
def test_c7_masked_and_partitioned(row):
    """A group of a partition moves as if the other leaves were constants, with the same noise."""
    params, batch = make_params(), make_batch()
    labels = {"w": "a", "b": "b", "c": "a"}
    if row.name == "ivon_prior":
        make = lambda: row.tx()  # noqa: E731  # the whole prior serves every group
    else:
        make = row.tx
    both = optax.partition({"a": make(), "b": make()}, labels)
    alone = optax.partition({"a": make(), "b": optax.set_to_zero()}, labels)
    state, state_alone = both.init(params), alone.init(params)
    assert_same(blr.sample(state, params)["w"], blr.sample(state_alone, params)["w"])
    assert_same(blr.sample(state_alone, params)["b"], params["b"])
    whole = make()
    assert_same(blr.sample(whole.init(params), params), blr.sample(state, params))
    grads, extra = evidence(row, params, state, batch)
    one, _ = whole.update(grads, whole.init(params), params, **extra)
    two, _ = both.update(grads, state, params, **extra)
    assert_same(one, two, **TREE_TOLERANCE)
    q = blr.posterior(state_alone, params)
    np.testing.assert_array_equal(q.variance["b"], np.zeros(2))
    np.testing.assert_array_equal(q.mean["b"], params["b"])
    assert_same(q.variance["w"], blr.posterior(whole.init(params), params).variance["w"])


@pytest.mark.parametrize("row", rows("C8"))
def test_c8_arrays_given_as_hyperparameters_survive_donation(row):
    """Shared arrays, twice over: a state that kept them would lose or donate them twice."""
    arrays = {k: jnp.float32(v) for k, v in row.numbers.items()}
    tx, batch = row.tx(**arrays), make_batch()
    step = jax.jit(lambda p, s: one_step(row, tx, p, s, batch), donate_argnums=(0, 1))
    for _ in range(2):
        params = make_params()
        params, state = step(params, tx.init(params))
        q = blr.posterior(state, params)
        params, state = step(params, state)
        assert np.all(np.isfinite(q.mean["w"]))  # a posterior outlives the state it came from


@pytest.mark.parametrize("row", rows("C8"))
def test_c8_donation_deletes_nothing_that_is_needed(row):
    key = {"key": jax.random.key(3)} if "ivon" in row.name or row.name == "soba" else {}
    tx = row.tx(**key)
    batch = make_batch()
    step = jax.jit(lambda p, s: one_step(row, tx, p, s, batch), donate_argnums=(0, 1))
    for _ in range(2):  # the second round fails if init handed out something it had kept
        params = make_params()
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("row", [r for r in rows("C9") if r.values[0].noisy])
def test_c9_keys_are_typed_and_steps_follow_from_the_count(row):
    params, tx = make_params(), row.tx()
    _, state = train(row, tx, params, make_batch(), 2)
    (found,) = posterior_states(state, "test")
    assert jnp.issubdtype(found.key.dtype, jax.dtypes.prng_key)
    # Resuming needs the count alone: a rebuilt state draws the same noise.
    fresh = tx.init(params)
    again = map_posterior_states(lambda s: found._replace(key=s.key), fresh)
    assert_same(blr.sample(again, params), blr.sample(state, params))
    moved = map_posterior_states(lambda s: s._replace(count=s.count + 1), state)
    assert np.any(blr.sample(moved, params)["w"] != blr.sample(state, params)["w"])
    other = blr.reseed(state, jax.random.key(99))
    assert np.any(blr.sample(other, params)["w"] != blr.sample(state, params)["w"])
    assert types(other) == types(state)


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("row", [r for r in rows("C10") if r.values[0].noisy])
def test_c10_curvature_is_an_extra_tree(row, masking):
    params, batch = make_params(), make_batch()
    labels = {"w": "a", "b": "b", "c": "a"}
    tx = optax.partition(
        {"a": row.tx(), "b": optax.sgd(0.1)}, labels, mask_compatible_extra_args=masking
    )
    state = tx.init(params)
    est = blr.estimate(mean_loss, state, params, *batch)
    assert jax.tree.structure(est.curvature) == jax.tree.structure(params)
    given, _ = tx.update(est.grad, state, params, curvature=est.curvature)
    derived, _ = tx.update(est.grad, state, params)
    assert_same(given, derived, **TREE_TOLERANCE)


@pytest.mark.parametrize("row", rows("C11"))
def test_c11_microbatches_and_samples_belong_to_estimate(row):
    params, batch = make_params(), make_batch()
    tx = row.tx()
    state = tx.init(params)
    whole = blr.estimate(mean_loss, state, params, *batch, samples=3)
    small = blr.estimate(mean_loss, state, params, *batch, samples=3, microbatch=2)
    np.testing.assert_allclose(whole.value, small.value, rtol=1e-5)
    assert_same(whole.grad, small.grad, rtol=1e-4, atol=1e-5)
    if row.name in (
        "ivon_squared",
        "vadam",
        "vprop",
    ):  # squares of micro-batch gradients are another statistic
        assert not np.allclose(whole.curvature["w"], small.curvature["w"])
    elif row.noisy or row.estimated:
        assert_same(whole.curvature, small.curvature, rtol=1e-3, atol=1e-4)
    else:
        assert whole.curvature is None
    multi = optax.MultiSteps(tx, 2).init(params)
    with pytest.raises(ValueError, match="MultiSteps"):
        blr.estimate(mean_loss, multi, params, *batch)


@pytest.mark.parametrize("row", rows("C12"))
def test_c12_hyperparameters_are_numbers_arrays_or_schedules(row):
    batch = make_batch()
    plain = train(row, row.tx(), make_params(), batch, 3)[0]
    arrays = {k: jnp.float32(v) for k, v in row.numbers.items()}
    assert_same(train(row, row.tx(**arrays), make_params(), batch, 3)[0], plain, **TREE_TOLERANCE)
    for name in {"learning_rate", "ess"} & set(row.numbers):
        constant = {name: optax.constant_schedule(row.numbers[name])}
        found = train(row, row.tx(**constant), make_params(), batch, 3)[0]
        assert_same(found, plain, **TREE_TOLERANCE)


@pytest.mark.parametrize("row", rows("C12"))
def test_c12_inject_hyperparams(row):
    def factory(**numbers):
        return row.tx(**numbers)

    factory.__signature__ = __import__("inspect").Signature(
        [
            __import__("inspect").Parameter(n, __import__("inspect").Parameter.KEYWORD_ONLY)
            for n in row.numbers
        ]
    )
    tx = optax.inject_hyperparams(factory)(**row.numbers)
    injected = train(row, tx, make_params(), make_batch(), 3)[0]
    plain = train(row, row.tx(), make_params(), make_batch(), 3)[0]
    assert_same(injected, plain, **TREE_TOLERANCE)


def skipped(state):
    """Steps that a state has skipped, and the states of optimizers inside, which must not."""
    return sum(int(number) for _, number in optax.tree.get_all_with_path(state, "skipped"))


@pytest.mark.parametrize("poison", ["grad", "curvature"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [r for r in rows("C13") if r.values[0].noisy])
def test_c13_non_finite_statistics_skip_the_step_and_are_counted(row, poison, bad):
    params, batch = make_params(), make_batch()
    tx = row.tx()
    params, state = train(row, tx, params, batch, 2)
    est = blr.estimate(mean_loss, state, params, *batch)
    grad, curvature = est.grad, est.curvature
    if curvature is None and poison == "curvature":
        return
    if poison == "grad":
        grad = {**grad, "b": grad["b"].at[0].set(bad)}
    else:
        curvature = {**curvature, "b": curvature["b"].at[0].set(bad)}
    updates, after = tx.update(grad, state, params, curvature=curvature)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert_same(optax.tree.get(after, "precision"), optax.tree.get(state, "precision"))
    assert skipped(after) == 1
    # The next draw differs, and the run goes on.
    assert np.any(blr.sample(after, params)["w"] != blr.sample(state, params)["w"])
    params, after = one_step(row, tx, params, after, batch)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((params, updates)))
    assert skipped(after) == 1
    if poison == "grad" and "derived" not in row.exempt:
        core, later = tx.update(grad, state, params)
        assert all(not np.any(u) for u in jax.tree.leaves(core))
        assert skipped(later) == 1


@pytest.mark.parametrize("row", [r for r in rows("derived") if r.values[0].noisy])
def test_c13_a_gradient_whose_square_overflows_is_skipped(row):
    params, tx = make_params(), row.tx()
    state = tx.init(params)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 3e19), params)
    updates, after = tx.update(grads, state, params)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert_same(optax.tree.get(after, "precision"), optax.tree.get(state, "precision"))
    assert skipped(after) == 1


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e6, 1e15, 1e30])
@pytest.mark.parametrize("row", [r for r in rows("C14") if r.values[0].noisy])
def test_c14_precision_stays_in_its_domain(row, size):
    tx, params = row.tx(), make_params()
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    for sign in (1.0, -1.0, -1.0, 1.0):
        before = optax.tree.get(state, "precision")
        curvature = jax.tree.map(
            lambda p, s=sign: jnp.full(row.leading + p.shape, s * size), params
        )
        _, state = tx.update(grads, state, params, curvature=curvature)
        after = optax.tree.get(state, "precision")
        for p, q in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert np.all(np.isfinite(q))
            assert np.all(q > 0)
            assert np.all(q >= 0.49 * np.minimum(p, 1e18))


@pytest.mark.parametrize("row", rows("C15"))
def test_c15_core_path_needs_no_extras_and_learns(row):
    params, batch = make_params(), make_batch()
    after, state = train(row, row.tx(), params, batch, 150)
    assert mean_loss(after, *batch) < 0.7 * mean_loss(params, *batch)
    assert blr.posterior(state, after).proper


@pytest.mark.parametrize("row", [row for row in ROWS if row.estimated])
def test_c15_estimated_rows_learn_and_keep_their_precision_positive(row):
    params, batch = make_params(), make_batch()
    after, state = train(row, row.tx(), params, batch, 150)
    assert mean_loss(after, *batch) < 0.7 * mean_loss(params, *batch)
    assert blr.posterior(state, after).proper
    with pytest.raises(ValueError, match=r"blr\.estimate"):
        row.tx().update(params, row.tx().init(params), params)
    for size in (0.0, 1e-30, 1.0, 1e30):
        curvature = jax.tree.map(lambda p, c=size: jnp.full(p.shape, c), params)
        _, state = row.tx().update(params, state, params, curvature=curvature)
        precision = jax.tree.leaves(optax.tree.get(state, "precision"))
        assert all(np.all(np.isfinite(p) & (p > 0)) for p in precision)


@pytest.mark.parametrize("row", rows("C16"))
def test_c16_nnx_optimizer(row):
    from flax import nnx

    class Weights(nnx.Module):
        def __init__(self):
            self.w, self.b, self.c = (nnx.Param(make_params()[k]) for k in "wbc")

    def pure(model):
        return {k: getattr(model, k)[...] for k in "wbc"}

    model = Weights()
    optimizer = nnx.Optimizer(model, row.tx(), wrt=nnx.Param)
    batch = make_batch()

    @nnx.jit
    def step(model, optimizer):
        mean = nnx.as_pure(nnx.state(model, nnx.Param))
        weights = blr.sample(nnx.as_pure(optimizer.opt_state), mean)
        nnx.update(model, weights)
        grads = nnx.grad(lambda m: mean_loss(pure(m), *batch))(model)
        nnx.update(model, mean)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    plain = train(row, row.tx(), make_params(), batch, 3)[0]
    assert_same(pure(model), plain, **TREE_TOLERANCE)


@pytest.mark.parametrize("row", rows("C17"))
def test_c17_orbax_round_trip_resumes_exactly(row, tmp_path):
    import orbax.checkpoint as ocp

    tx, batch = row.tx(), make_batch()
    params, state = train(row, tx, make_params(), batch, 2)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", (params, state))
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.eval_shape(lambda: (params, state)))
    assert_same(restored, (params, state))
    step = jax.jit(lambda p, s: one_step(row, tx, p, s, batch))
    assert_same(step(*restored), step(params, state))


@pytest.mark.parametrize("row", rows("C18"))
def test_c18_jit_vmap_scan_and_grad(row, x64):
    """In float64: a Newton step on an ill-conditioned Hessian magnifies float32's rounding.

    The hash generator's normals are float32 still, and fused arithmetic moves their last bit.
    """
    tx, params = row.tx(), make_params(jnp.float64)
    batch = make_batch(dtype=jnp.float64)
    close = {"rtol": 1e-5, "atol": 1e-6}
    eager = train(row, tx, params, batch, 2, jit=False)
    jitted = train(row, tx, params, batch, 2)
    assert_same(eager, jitted, **close)

    def body(carry, _):
        return one_step(row, tx, *carry, batch), None

    scanned, _ = jax.lax.scan(body, (params, tx.init(params)), length=2)
    assert_same(scanned, jitted, **close)

    stacked = jax.tree.map(lambda x: jnp.stack([x, x + 0.1]), params)
    states = jax.vmap(tx.init)(stacked)
    both, _ = jax.vmap(lambda p, s: one_step(row, tx, p, s, batch))(stacked, states)
    first, _ = one_step(row, tx, params, tx.init(params), batch)
    assert_same(jax.tree.map(lambda x: x[0], both), first, **close)

    if "derivative" in row.exempt:
        return
    # The derivative of a step in its data, against a difference quotient.
    x, y = batch

    def meta(x):
        after, _ = one_step(row, tx, params, tx.init(params), (x, y))
        return mean_loss(after, x, y)

    direction, h = jnp.cos(jnp.arange(1.0 * x.size)).reshape(x.shape), 1e-6
    slope = jnp.sum(jax.jit(jax.grad(meta))(x) * direction)
    numeric = jax.jit(lambda h: meta(x + h * direction) - meta(x - h * direction))(h) / (2 * h)
    assert float(slope) == pytest.approx(float(numeric), rel=1e-4, abs=1e-7)


def sharded_params(mesh):
    """w sharded over its rows, the rest replicated; eight rows, one per device."""
    params = {**make_params(), "w": jnp.arange(16.0).reshape(8, 2) / 10}
    spec = {"w": P("d"), "b": P(), "c": P()}
    return params, jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, spec
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("row", rows("C7"))
def test_c18_meshes_give_the_numbers_and_types_of_one_device(row, kind):
    if row.name == "ivon_prior":
        # Its prior is made for the small tree; the wide tree's prior is drawn here.
        family = blr.families.get("gaussian_diagonal")
        like = {**make_params(), "w": jnp.arange(16.0).reshape(8, 2) / 10}
        prior = blr.Posterior(family, family.natural(mean=like, precision=2.0))
        tx = blr.ivon(**row.numbers, prior=prior)
    else:
        tx = row.tx()
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    params, sharded = sharded_params(mesh)
    grads = jax.tree.map(lambda p: jnp.sin(p) + 0.1, params)

    def step(p, s, g):
        weights = blr.sample(s, p)
        extra = {"curvature": jax.tree.map(jnp.square, g)} if row.estimated else {}
        updates, s = tx.update(g, s, p, **extra)
        return optax.apply_updates(p, updates), s, weights

    expected = jax.jit(step)(params, tx.init(params), grads)
    with jax.set_mesh(mesh):
        state = tx.init(sharded)
        placed = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, sharded)
        found = jax.jit(step)(sharded, state, placed)
        for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(found[1]), strict=True):
            if kind == AxisType.Explicit:
                assert jax.typeof(before) == jax.typeof(after)
            assert before.sharding.is_equivalent_to(after.sharding, before.ndim)
        assert_same(jax.device_get(found[0]), jax.device_get(expected[0]), rtol=1e-6, atol=1e-7)
        assert_same(jax.device_get(found[2]), jax.device_get(expected[2]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("row", rows("replicas"))
def test_c18_pmap_replicas_agree_with_one_device(row):
    tx, params = row.tx(), make_params()
    x, y = make_batch(16)
    n = 8
    assert jax.device_count() == n

    def step(params, state, x, y):
        grads, extra = evidence(row, params, state, (x, y))
        if not row.loss:
            grads, extra = jax.lax.pmean((grads, extra), "d")
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    replicate = lambda t: jax.tree.map(lambda a: jnp.stack([a] * n), t)  # noqa: E731
    if row.loss:  # every replica evaluates the whole batch
        xs, ys = replicate((x, y))
    else:
        xs, ys = x.reshape(n, 2, 3), y.reshape(n, 2)
    stepped = jax.pmap(step, axis_name="d")
    many, state = replicate(params), replicate(tx.init(params))
    for _ in range(2):
        many, state = stepped(many, state, xs, ys)
    one = train(row, tx, params, (x, y), 2)[0]
    for i in (0, n - 1):
        assert_same(jax.tree.map(lambda a, i=i: a[i], many), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", [r for r in rows("C15") if r.values[0].name in ("ivon", "soba")])
def test_c18_devices_draw_differently_and_average_products(row):
    """shard_map over 8 devices = one device with 8 samples on as many batches."""
    tx, params = row.tx(), make_params()
    state = tx.init(params)
    x, y = make_batch(16)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def local(params, state, x, y):
        est = blr.estimate(mean_loss, state, params, x, y, axis_name="d")
        return est, jax.tree.map(lambda a: a[None], est.value)

    many, _ = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P(), P("d"), P("d")), out_specs=(P(), P("d"))
        )
    )(params, state, x, y)
    (found,) = posterior_states(state, "test")
    parts = []
    for i in range(8):
        noise = noise_of(found, 0, i)
        noise = jax.tree.map(lambda e: e[None], noise)
        piece = (x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2])
        parts.append(blr.estimate(mean_loss, state, params, *piece, noise=noise))
    one = jax.tree.map(lambda *a: sum(a) / 8, *parts)
    assert_same(many.grad, one.grad, rtol=1e-4, atol=1e-5)
    assert_same(many.curvature, one.curvature, rtol=1e-3, atol=1e-4)


TWO_PROCESSES = """
import sys, os
rank, port = int(sys.argv[1]), sys.argv[2]
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, sys.argv[3])
import jax, jax.numpy as jnp, numpy as np, optax
jax.distributed.initialize(f"localhost:{port}", 2, rank)
import blr_optax as blr
from registry import make_batch, make_params, mean_loss
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
x, y = map(np.asarray, make_batch(8))
put = lambda a, s: jax.make_array_from_callback(a.shape, NamedSharding(mesh, s), lambda i: a[i])
batch = put(x, P("d")), put(y, P("d"))
params = jax.tree.map(lambda p: put(np.asarray(p), P()), make_params())
tx = blr.ivon(0.1, 50.0, b2=0.95)
state = jax.jit(tx.init, out_shardings=NamedSharding(mesh, P()))(params)
@jax.jit
def step(params, state, x, y):
    grads = jax.grad(mean_loss)(blr.sample(state, params), x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state
for _ in range(3):
    params, state = step(params, state, *batch)
print("RESULT", np.asarray(params["w"].addressable_data(0)).ravel().tolist(), flush=True)
"""


@pytest.mark.slow
def test_c18_two_processes_agree_with_one():
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    here = str(ROOT / "tests")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), port, here],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [run.communicate(timeout=240) for run in runs]
    assert all(run.returncode == 0 for run in runs), outputs
    lines = [re.search(r"RESULT \[(.*)\]", out).group(1) for out, _ in outputs]
    assert lines[0] == lines[1]
    (row,) = [r for r in ROWS if r.name == "ivon"]
    alone = train(row, blr.ivon(0.1, 50.0, b2=0.95), make_params(), make_batch(8), 3)[0]["w"]
    found = np.array([float(v) for v in lines[0].split(",")])
    np.testing.assert_allclose(found, np.ravel(alone), rtol=1e-5, atol=1e-6)


def test_c19_what_does_not_compose_is_documented_and_true():
    text = (ROOT / "docs" / "composition.md").read_text()
    for name in ("lookahead", "sam", "split_real_and_imaginary", "flatten", "MultiSteps"):
        assert name in text, f"docs/composition.md does not mention {name}"
    params, batch = make_params(), make_batch()
    tx = blr.ivon(0.1, 50.0)
    # MultiSteps inside a chain drops extra arguments silently: the curvature never arrives.
    inside = optax.chain(optax.MultiSteps(tx, 1).gradient_transformation())
    state = inside.init(params)
    grads = jax.grad(mean_loss)(params, *batch)
    huge = jax.tree.map(lambda p: jnp.full(p.shape, 1e9), params)
    with_extra, _ = inside.update(grads, state, params, curvature=huge)
    without, _ = inside.update(grads, state, params)
    assert_same(with_extra, without)
    # Lookahead rejects extra arguments.
    ahead = optax.lookahead(tx, 5, 0.5)
    pair = optax.LookaheadParams.init_synced(params)
    with pytest.raises(TypeError):
        ahead.update(grads, ahead.init(pair), pair, curvature=huge)
    # flatten makes one leaf of all: the noise no longer follows the paths of params.
    flat = optax.flatten(tx)
    with pytest.raises(ValueError, match="params"):
        blr.sample(flat.init(params), params)
