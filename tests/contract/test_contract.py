"""The contract with optax: every line of `registry.Contract` over every row that it concerns.

A row's `init`, `update`, step and estimate are compiled once (`registry.programs`) and serve all
lines that need no other program; data and comparisons are numpy's.
"""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import (
    ROWS,
    Contract,
    core,
    evidence,
    make_batch,
    make_params,
    mean_loss,
    one_step,
    programs,
    rows,
    train,
    with_core,
)
from tools import FUSED, ROOT, assert_same

import blr_optax as blr
from blr_optax.state._reader import posterior_states
from blr_optax.state._reading import noise_of

TREE_TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}

sample = jax.jit(blr.sample)


@jax.jit
def moments(state, params):
    q = blr.posterior(state, params)
    return {"mean": q.mean, "variance": q.variance, "proper": q.proper}


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


def filled(tree, value):
    """A tree of the same shapes and dtypes, full of one number."""
    return jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), tree)


def statistic_of(row, params, value, dtype=np.float32):
    """A statistic of the row full of one number."""
    return jax.tree.map(lambda p: np.full(row.leading + p.shape, value, dtype), params)


def still(updates):
    return all(not np.any(u) for u in jax.tree.leaves(updates))


def finite(tree):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


def differ(a, b):
    return np.any(np.asarray(a["w"]) != np.asarray(b["w"]))


def skipped(state):
    """Steps that a state has skipped, and the states of optimizers inside, which must not."""
    return sum(int(number) for _, number in optax.tree.get_all_with_path(state, "skipped"))


# --- types, shapes and fields of a state ----------------------------------------------------------


@pytest.mark.parametrize("row", rows(Contract.EXTRA_ARGUMENTS))
def test_ignores_unknown_extra_arguments(row):
    run = programs(row)
    assert isinstance(run.tx, optax.GradientTransformationExtraArgs)
    step = jax.jit(lambda p, s, b: one_step(row, run.tx, p, s, b, foreign=1.0, value=2.0))
    params, state = run.after(0)
    for _ in range(2):
        params, state = step(params, state, make_batch())
    assert_same((params, state), run.after(2))


@pytest.mark.parametrize("row", rows(Contract.INIT_FROM_SHAPES))
def test_init_from_shapes(row):
    params, tx = row.params(), programs(row).tx
    shapes = jax.eval_shape(lambda: params)
    state = jax.eval_shape(tx.init, params)
    assert types(jax.eval_shape(tx.init, shapes)) == types(state)
    if row.loss:
        return
    direct = tx.init(shapes)
    assert jax.tree.map(jnp.shape, direct) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("row", rows(Contract.MAP_PARAMS))
def test_map_params_finds_the_parameter_fields(row):
    run = programs(row)
    params, state = run.after(0)
    tagged = optax.tree.map_params(
        run.tx,
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


@pytest.mark.parametrize("row", rows(Contract.MAP_PARAMS))
def test_a_mapped_state_is_the_state_itself(row):
    """The placeholder that `map_params` gives `init` leaves no trace: all that reads a state works.

    Also in a partition, where coverage decides which posterior is whose.
    """
    run = programs(row)
    params, state = run.after(1)
    mapped = optax.tree.map_params(
        run.tx, lambda leaf, _: leaf, state, params, transform_non_params=lambda x: x
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert_same(sample(mapped, params), sample(state, params))
    assert_same(moments(mapped, params), moments(state, params))
    assert_same(run.step(params, mapped, make_batch()), run.after(2))
    if Contract.MICROBATCHES not in row.exempt:
        est = run.estimate(mapped, params, *make_batch())
        assert_same(est, run.estimate(state, params, *make_batch()))
    if Contract.MASKED not in row.exempt:
        groups = optax.partition({"a": row.tx(), "b": row.tx()}, {"w": "a", "b": "b", "c": "a"})
        state = groups.init(params)
        mapped = optax.tree.map_params(groups, lambda leaf: leaf, state)
        assert jax.tree.structure(mapped) == jax.tree.structure(state)
        parts = [s.reader.part(s, params) for s in posterior_states(mapped, "test")]
        assert sorted(len(jax.tree.leaves(part)) for part in parts) == [1, 2]


@pytest.mark.parametrize("row", rows(Contract.STABLE_TYPES))
def test_state_keeps_its_types(row):
    run = programs(row)
    state = run.tx.init(row.params())  # eager, where a Python number stays one
    for steps in (1, 2):
        after = run.after(steps)[1]
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert types(after) == types(state)


@pytest.mark.parametrize("row", rows(Contract.STABLE_TYPES))
def test_float32_parameters_stay_float32_under_x64(row):
    with jax.enable_x64(True):
        params, tx, batch = row.params(jnp.float32), row.tx(), make_batch()
        state = jax.jit(tx.init)(params)
        _, after = jax.jit(lambda p, s: one_step(row, tx, p, s, batch))(params, state)
        assert types(after) == types(state)
        if row.noisy and not row.loss:
            wide = statistic_of(row, params, 1.0, np.float64)
            _, after = jax.jit(tx.update)(params, state, params, statistic=wide)
            assert types(after) == types(state)


@pytest.mark.parametrize("row", rows(Contract.STABLE_TYPES))
def test_inside_cond_and_wrappers(row):
    tx = optax.apply_if_finite(programs(row).tx, max_consecutive_errors=3)
    params, batch = row.params(), make_batch()

    @jax.jit
    def step(state, params, factor):
        grads, extra = evidence(row, params, state, batch)
        grads = jax.tree.map(jnp.ones_like, params) if grads is None else grads
        return tx.update(jax.tree.map(lambda g: g * factor, grads), state, params, **extra)

    _, state = step(jax.jit(tx.init)(params), params, 1.0)
    updates, after = step(state, params, np.nan)
    assert still(updates)
    assert int(after.total_notfinite) == 1
    assert_same(after.inner_state, state.inner_state)


@pytest.mark.parametrize("row", rows(Contract.MULTI_STEPS))
def test_inside_multi_steps(row):
    params, batch = row.params(), make_batch()
    tx = optax.MultiSteps(programs(row).tx, every_k_schedule=2)
    extra = {"batch": batch} if row.loss else {}

    @jax.jit
    def update(state, params):
        return tx.update(jax.grad(row.objective)(params, *batch), state, params, **extra)

    state, moved = jax.jit(tx.init)(params), []
    for _ in range(4):
        updates, state = update(state, params)
        moved.append(not still(updates))
    assert moved == [False, True, False, True]


@pytest.mark.parametrize("row", rows(Contract.COMPILES_ONCE))
def test_compiles_once(row):
    run = programs(row)
    run.after(3)
    assert len(run.traces) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("row", rows(Contract.UPDATE_DTYPES))
def test_updates_have_the_dtype_of_params(row, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, batch = row.params(dtype), make_batch(dtype=dtype)
        tx = row.tx()

        # A Hessian taken in half precision is not positive definite to working accuracy.
        moves = row.name != "newton" or dtype in ("float32", "float64")

        @jax.jit
        def first(params):
            state = tx.init(params)
            weights = params if row.loss else blr.sample(state, params)
            if not moves:
                return state, weights, params, state
            grads, extra = evidence(row, params, state, batch)
            return state, weights, *tx.update(grads, state, params, **extra)

        state, weights, updates, after = first(params)
        assert dtypes(weights) == dtypes(params)
        assert dtypes(updates) == dtypes(params)
        assert types(after) == types(state)
        for name in ("precision", "natural"):
            for _, field in optax.tree.get_all_with_path(after, name):
                assert all(x.dtype.itemsize >= 4 for x in jax.tree.leaves(field))


@pytest.mark.parametrize("row", rows(Contract.PLAIN_STATES))
def test_states_are_named_tuples_with_plain_fields(row):
    state = programs(row).after(0)[1]
    (found,) = posterior_states(state, "test")
    assert isinstance(found, tuple)
    assert not {"value", "grad", "learning_rate"} & set(found._fields)
    name = type(found).__name__
    assert not hasattr(optax, name)
    assert optax.tree.get(state, name) is not None
    for field in ("value", "grad"):
        assert optax.tree.get(state, field, default=None) is None


# --- wrappers, donation and keys ------------------------------------------------------------------


@pytest.mark.parametrize("row", rows(Contract.MASKED))
def test_masked_and_partitioned(row):
    """A group of a partition moves as if the other leaves were constants, with the same noise."""
    params, batch = row.params(), make_batch()
    labels = {"w": "a", "b": "b", "c": "a"}
    both = optax.partition({"a": row.tx(), "b": row.tx()}, labels)
    alone = optax.partition({"a": row.tx(), "b": optax.set_to_zero()}, labels)
    whole = programs(row).tx

    @jax.jit
    def look(params, batch):
        state, state_alone, state_whole = (tx.init(params) for tx in (both, alone, whole))
        grads, extra = evidence(row, params, state, batch)
        q = blr.posterior(state_alone, params)
        return {
            "samples": [blr.sample(s, params) for s in (state, state_alone, state_whole)],
            "whole": whole.update(grads, state_whole, params, **extra)[0],
            "both": both.update(grads, state, params, **extra)[0],
            "alone": (q.mean, q.variance),
            "variance": blr.posterior(state_whole, params).variance,
        }

    found = look(params, batch)
    drawn, drawn_alone, drawn_whole = found["samples"]
    assert_same(drawn["w"], drawn_alone["w"])
    assert_same(drawn_alone["b"], params["b"])
    assert_same(drawn_whole, drawn)
    assert_same(found["whole"], found["both"], **TREE_TOLERANCE)
    mean, variance = found["alone"]
    np.testing.assert_array_equal(variance["b"], np.zeros(2))
    np.testing.assert_array_equal(mean["b"], params["b"])
    assert_same(variance["w"], found["variance"]["w"])


@pytest.mark.parametrize("row", rows(Contract.DONATION))
def test_arrays_given_as_hyperparameters_survive_donation(row):
    """Shared arrays, twice over: a state that kept them would lose or donate them twice."""
    arrays = {k: jnp.float32(v) for k, v in row.numbers.items()}
    tx, batch = row.tx(**arrays), make_batch()
    step = jax.jit(lambda p, s: one_step(row, tx, p, s, batch), donate_argnums=(0, 1))
    for _ in range(2):
        params = row.params()
        params, state = step(params, tx.init(params))
        q = blr.posterior(state, params)
        params, state = step(params, state)
        assert np.all(np.isfinite(q.mean["w"]))  # a posterior outlives the state it came from


@pytest.mark.parametrize("row", rows(Contract.DONATION))
def test_donation_deletes_nothing_that_is_needed(row):
    key = {"key": jax.random.key(3)} if "ivon" in row.name or row.name == "soba" else {}
    tx = row.tx(**key)
    batch = make_batch()
    step = jax.jit(lambda p, s: one_step(row, tx, p, s, batch), donate_argnums=(0, 1))
    for _ in range(2):  # the second round fails if init handed out something it had kept
        params = row.params()
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
    assert finite(params)


@pytest.mark.parametrize("row", rows(Contract.KEYS, noisy=True))
def test_keys_are_typed_and_steps_follow_from_the_count(row):
    run = programs(row)
    params, state = row.params(), run.after(2)[1]
    assert jnp.issubdtype(core(state).key.dtype, jax.dtypes.prng_key)
    # Resuming needs the count alone: a rebuilt state draws the same noise.
    again = with_core(state, key=core(run.init(params)).key)
    assert_same(sample(again, params), sample(state, params))
    moved = with_core(state, count=core(state).count + 1)
    assert differ(sample(moved, params), sample(state, params))
    other = blr.reseed(state, jax.random.key(99))
    assert differ(sample(other, params), sample(state, params))
    assert types(other) == types(state)


# --- the second statistic -------------------------------------------------------------------------


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("row", rows(Contract.STATISTIC_ARGUMENT, noisy=True))
def test_curvature_is_an_extra_tree(row, masking):
    params, batch = row.params(), make_batch()
    labels = {"w": "a", "b": "b", "c": "a"}
    tx = optax.partition(
        {"a": row.tx(), "b": optax.sgd(0.1)}, labels, mask_compatible_extra_args=masking
    )

    @jax.jit
    def look(params, batch):
        state = tx.init(params)
        est = blr.estimate(row.objective, state, params, *batch)
        given, _ = tx.update(est.grad, state, params, statistic=est.statistic)
        derived, _ = tx.update(est.grad, state, params)
        return est.statistic, given, derived

    statistic, given, derived = look(params, batch)
    assert jax.tree.structure(statistic) == jax.tree.structure(params)
    assert_same(given, derived, **TREE_TOLERANCE)


@pytest.mark.parametrize("row", rows(Contract.MICROBATCHES))
def test_microbatches_and_samples_belong_to_estimate(row):
    params, state = programs(row).after(0)

    @jax.jit
    def look(state, params, batch):
        def estimate(**options):
            return blr.estimate(row.objective, state, params, *batch, samples=3, **options)

        return estimate(), estimate(microbatch=2)

    whole, small = look(state, params, make_batch())
    np.testing.assert_allclose(whole.value, small.value, rtol=1e-5)
    assert_same(whole.grad, small.grad, rtol=1e-4, atol=1e-5)
    if row.name in ("ivon_squared", "vadam", "vprop"):
        # Squares of micro-batch gradients are another statistic.
        assert not np.allclose(whole.statistic["w"], small.statistic["w"])
    elif row.noisy or row.estimated:
        assert_same(whole.statistic, small.statistic, rtol=1e-3, atol=1e-4)
    else:
        assert whole.statistic is None
    multi = jax.eval_shape(optax.MultiSteps(programs(row).tx, 2).init, params)
    with pytest.raises(ValueError, match="MultiSteps"):
        blr.estimate(row.objective, multi, params, *make_batch())


@pytest.mark.parametrize("row", rows(Contract.HYPERPARAMETERS))
def test_hyperparameters_are_numbers_arrays_or_schedules(row):
    plain, batch = programs(row).after(3)[0], make_batch()
    arrays = {k: jnp.float32(v) for k, v in row.numbers.items()}
    assert_same(train(row, row.tx(**arrays), row.params(), batch, 3)[0], plain, **TREE_TOLERANCE)
    for name in {"learning_rate", "ess"} & set(row.numbers):
        constant = {name: optax.constant_schedule(row.numbers[name])}
        found = train(row, row.tx(**constant), row.params(), batch, 3)[0]
        assert_same(found, plain, **TREE_TOLERANCE)


@pytest.mark.parametrize("row", rows(Contract.HYPERPARAMETERS))
def test_inject_hyperparams(row):
    def factory(**numbers):
        return row.tx(**numbers)

    keyword = inspect.Parameter.KEYWORD_ONLY
    factory.__signature__ = inspect.Signature(
        [inspect.Parameter(name, keyword) for name in row.numbers]
    )
    tx = optax.inject_hyperparams(factory)(**row.numbers)
    injected = train(row, tx, row.params(), make_batch(), 3)[0]
    assert_same(injected, programs(row).after(3)[0], **TREE_TOLERANCE)


@pytest.mark.parametrize("poison", ["grad", "statistic"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", rows(Contract.NON_FINITE, noisy=True))
def test_non_finite_statistics_skip_the_step_and_are_counted(row, poison, bad):
    run = programs(row)
    params, state = run.after(2)
    est = run.estimate(state, params, *make_batch())
    grad, curvature = est.grad, est.statistic
    if curvature is None and poison == "statistic":
        return
    poisoned = dict(grad if poison == "grad" else curvature)
    poisoned["b"] = np.array(poisoned["b"])
    poisoned["b"].ravel()[0] = bad
    grad, curvature = (poisoned, curvature) if poison == "grad" else (grad, poisoned)
    updates, after = run.update(grad, state, params, statistic=curvature)
    assert still(updates)
    assert_same(optax.tree.get(after, "precision"), optax.tree.get(state, "precision"))
    assert skipped(after) == 1
    # The next draw differs, and the run goes on.
    assert differ(sample(after, params), sample(state, params))
    params, after = run.step(params, after, make_batch())
    assert finite((params, updates))
    assert skipped(after) == 1
    if poison == "grad" and Contract.DERIVED_STATISTIC not in row.exempt:
        core, later = run.update(grad, state, params)
        assert still(core)
        assert skipped(later) == 1


@pytest.mark.parametrize("row", rows(Contract.DERIVED_STATISTIC, noisy=True))
def test_a_gradient_whose_square_overflows_is_skipped(row):
    run = programs(row)
    params, state = run.after(0)
    updates, after = run.update(filled(params, 3e19), state, params)
    assert still(updates)
    assert_same(optax.tree.get(after, "precision"), optax.tree.get(state, "precision"))
    assert skipped(after) == 1


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e6, 1e15, 1e30])
@pytest.mark.parametrize("row", rows(Contract.DOMAIN, noisy=True))
def test_precision_stays_in_its_domain(row, size):
    run = programs(row)
    params, state = run.after(0)
    grads = filled(params, 1.0)
    for sign in (1.0, -1.0, -1.0, 1.0):
        before = optax.tree.get(state, "precision")
        _, state = run.update(
            grads, state, params, statistic=statistic_of(row, params, sign * size)
        )
        after = optax.tree.get(state, "precision")
        for p, q in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            p, q = np.asarray(p), np.asarray(q)
            assert np.all(np.isfinite(q))
            assert np.all(q > 0)
            assert np.all(q >= 0.49 * np.minimum(p, 1e18))


# --- training loops -------------------------------------------------------------------------------


def learns(row):
    """A long run of the row, whose loss fell and whose posterior is proper."""
    run, batch = programs(row), make_batch()
    params, state = run.after(0)
    loss = jax.jit(row.objective)
    before = loss(params, *batch)
    for _ in range(150):
        params, state = run.step(params, state, batch)
    assert loss(params, *batch) < 0.7 * before
    assert moments(state, params)["proper"]
    return state


@pytest.mark.parametrize("row", rows(Contract.CORE_PATH))
def test_core_path_needs_no_extras_and_learns(row):
    learns(row)


@pytest.mark.parametrize("row", rows(estimated=True))
def test_estimated_rows_learn_and_keep_their_precision_positive(row):
    state, run, params = learns(row), programs(row), row.params()
    with pytest.raises(ValueError, match=r"blr\.estimate"):
        run.tx.update(params, run.after(0)[1], params)
    for size in (0.0, 1e-30, 1.0, 1e30):
        _, state = run.update(params, state, params, statistic=filled(params, size))
        precision = jax.tree.leaves(optax.tree.get(state, "precision"))
        assert all(np.all(np.isfinite(p) & (np.asarray(p) > 0)) for p in precision)


@pytest.mark.parametrize("row", rows(Contract.NNX))
def test_nnx_optimizer(row):
    from flax import nnx

    class Weights(nnx.Module):
        def __init__(self):
            self.w, self.b, self.c = (nnx.Param(row.params()[k]) for k in "wbc")

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
        grads = nnx.grad(lambda m: row.objective(pure(m), *batch))(model)
        nnx.update(model, mean)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    assert_same(pure(model), programs(row).after(3)[0], **TREE_TOLERANCE)


@pytest.mark.parametrize("row", rows(Contract.CHECKPOINT))
def test_orbax_round_trip_resumes_exactly(row, tmp_path):
    import orbax.checkpoint as ocp

    run = programs(row)
    saved = run.after(2)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", saved)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.eval_shape(lambda: saved))
    assert_same(restored, saved)
    assert_same(run.step(*restored, make_batch()), run.after(3))


# --- transformations of functions, devices --------------------------------------------------------


@pytest.mark.parametrize("row", rows(Contract.TRANSFORMS))
def test_jit_vmap_scan_and_grad(row, x64):
    """In float64: a Newton step on an ill-conditioned Hessian magnifies float32's rounding.

    The hash generator's normals are float32 still, and fused arithmetic moves their last bit.
    """
    tx, params = row.tx(), row.params(jnp.float64)
    batch = make_batch(dtype=jnp.float64)
    close = {"rtol": 1e-5, "atol": 1e-6}
    step = functools.partial(one_step, row, tx)
    jitted_step = jax.jit(step)
    eager = jitted = (params, tx.init(params))
    path = []
    for _ in range(2):
        eager, jitted = step(*eager, batch), jitted_step(*jitted, batch)
        path.append(jitted)
    assert_same(eager, jitted, **close)

    @jax.jit
    def scanned(params, state):
        return jax.lax.scan(lambda c, _: (step(*c, batch), None), (params, state), length=2)[0]

    assert_same(scanned(params, tx.init(params)), jitted, **close)

    stacked = jax.tree.map(lambda x: np.stack([x, np.asarray(x) + 0.1]), params)

    @jax.jit
    def both(stacked):
        states = jax.vmap(tx.init)(stacked)
        return jax.vmap(lambda p, s: step(p, s, batch))(stacked, states)[0]

    assert_same(jax.tree.map(lambda x: np.asarray(x)[0], both(stacked)), path[0][0], **close)

    if Contract.DERIVATIVE in row.exempt:
        return

    # The derivative of a step in its data, against a difference quotient.
    @jax.jit
    @jax.value_and_grad
    def meta(x):
        after, _ = step(params, tx.init(params), (x, batch[1]))
        return row.objective(after, x, batch[1])

    x, h = np.asarray(batch[0]), 1e-6
    direction = np.cos(np.arange(1.0 * x.size)).reshape(x.shape)
    slope = np.sum(np.asarray(meta(x)[1]) * direction)
    numeric = (meta(x + h * direction)[0] - meta(x - h * direction)[0]) / (2 * h)
    assert float(slope) == pytest.approx(float(numeric), rel=1e-4, abs=1e-7)


def wide_params():
    """Parameters whose w has eight rows, one per device."""
    return {**make_params(), "w": jnp.asarray(np.arange(16.0, dtype=np.float32).reshape(8, 2) / 10)}


@functools.cache
def on_one_device(row):
    """A row for wide parameters, its step, and what that gives on one device."""
    params, more = wide_params(), {}
    if row.name == "ivon_prior":  # its own prior is made for the small tree
        family = blr.families.get("gaussian_diagonal")
        more["prior"] = blr.Distribution(family, family.natural(mean=params, precision=2.0))
        tx = blr.ivon(**row.numbers, **more)
    else:
        tx = row.tx()
    grads = jax.tree.map(lambda p: np.sin(np.asarray(p)) + np.float32(0.1), params)

    def step(p, s, g):
        weights = blr.sample(s, p)
        extra = {"statistic": jax.tree.map(jnp.square, g)} if row.estimated else {}
        updates, s = tx.update(g, s, p, **extra)
        return optax.apply_updates(p, updates), s, weights

    step = jax.jit(step, compiler_options=FUSED)
    expected = step(params, tx.init(params), grads)
    return tx, step, grads, jax.device_get((expected[0], expected[2]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("row", rows(Contract.MESHES))
def test_meshes_give_the_numbers_and_types_of_one_device(row, kind):
    tx, step, grads, expected = on_one_device(row)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    spec = {"w": P("d"), "b": P(), "c": P()}
    place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))  # noqa: E731
    sharded, placed = (jax.tree.map(place, tree, spec) for tree in (wide_params(), grads))
    with jax.set_mesh(mesh):
        state = tx.init(sharded)
        params, after, weights = step(sharded, state, placed)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            if kind == AxisType.Explicit:
                assert jax.typeof(old) == jax.typeof(new)
            assert old.sharding.is_equivalent_to(new.sharding, old.ndim)
        assert_same(jax.device_get((params, weights)), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("row", rows(Contract.REPLICAS))
def test_pmap_replicas_agree_with_one_device(row):
    run, n = programs(row), 8
    x, y = make_batch(16)
    assert jax.device_count() == n

    def step(params, state, x, y):
        grads, extra = evidence(row, params, state, (x, y))
        if not row.loss:
            grads, extra = jax.lax.pmean((grads, extra), "d")
        updates, state = run.tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    replicate = jax.jit(lambda t: jax.tree.map(lambda a: jnp.stack([a] * n), t))
    if row.loss:  # every replica evaluates the whole batch
        xs, ys = replicate((x, y))
    else:
        xs, ys = np.reshape(x, (n, 2, 3)), np.reshape(y, (n, 2))
    stepped = jax.pmap(step, axis_name="d")
    many, state = replicate(run.after(0))
    for _ in range(2):
        many, state = stepped(many, state, xs, ys)
    one = train(row, run.tx, row.params(), (x, y), 2)[0]
    for i in (0, n - 1):
        assert_same(jax.tree.map(lambda a, i=i: np.asarray(a)[i], many), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", [r for r in rows() if r.values[0].name in ("ivon", "soba")])
def test_devices_draw_differently_and_average_products(row):
    """shard_map over 8 devices = one device with 8 samples on as many batches."""
    params, state = programs(row).after(0)
    x, y = make_batch(16)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def local(params, state, x, y):
        return blr.estimate(mean_loss, state, params, x, y, axis_name="d")

    many = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("d"), P("d")), out_specs=P())
    )(params, state, x, y)
    (found,) = posterior_states(state, "test")
    draw, parts = jax.jit(lambda i: noise_of(found, 0, i)), []
    for i in range(8):
        noise = jax.tree.map(lambda e: np.asarray(e)[None], draw(i))
        piece = (x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2])
        parts.append(programs(row).estimate(state, params, *piece, noise=noise))
    if draw(0) is not None:
        assert differ(draw(0), draw(1))
    one = jax.tree.map(lambda *a: sum(map(np.asarray, a)) / 8, *parts)
    assert_same(many.grad, one.grad, rtol=1e-4, atol=1e-5)
    assert_same(many.statistic, one.statistic, rtol=1e-3, atol=1e-4)


# --- the documents --------------------------------------------------------------------------------


def test_what_does_not_compose_is_documented_and_true():
    text = (ROOT / "docs" / "composition.md").read_text()
    for name in ("lookahead", "sam", "split_real_and_imaginary", "flatten", "MultiSteps"):
        assert name in text, f"docs/composition.md does not mention {name}"
    (ivon,) = [row for row in ROWS if row.name == "ivon"]
    tx, (params, _) = programs(ivon).tx, programs(ivon).after(0)
    # MultiSteps inside a chain drops extra arguments silently: the curvature never arrives.
    inside = optax.chain(optax.MultiSteps(tx, 1).gradient_transformation())
    state, update = jax.jit(inside.init)(params), jax.jit(inside.update)
    grads = jax.jit(jax.grad(mean_loss))(params, *make_batch())
    huge = filled(params, 1e9)
    with_extra, _ = update(grads, state, params, statistic=huge)
    without, _ = update(grads, state, params)
    assert_same(with_extra, without)
    # Lookahead rejects extra arguments.
    ahead = optax.lookahead(tx, 5, 0.5)
    pair = optax.LookaheadParams.init_synced(params)
    with pytest.raises(TypeError):
        ahead.update(grads, ahead.init(pair), pair, statistic=huge)
    # flatten makes one leaf of all: the noise no longer follows the paths of params.
    flat = optax.flatten(tx)
    with pytest.raises(ValueError, match="params"):
        blr.sample(flat.init(params), params)


def test_every_line_has_a_test_and_every_exemption_a_reason():
    source = inspect.getsource(inspect.getmodule(test_compiles_once))
    tested = set(re.findall(r"Contract\.([A-Z_]+)", source))
    assert tested | {"COMPOSITION"} == {line.name for line in Contract}
    assert all(reason for row in ROWS for reason in row.exempt.values())
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_the_page_of_the_contract_is_up_to_date():
    """`python tests/registry.py` writes it."""
    assert (ROOT / "docs" / "contract.md").read_text() == registry.page()
