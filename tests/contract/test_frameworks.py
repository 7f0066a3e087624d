"""Inside training frameworks: the facts that the recipes of the documentation rest on."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training import train_state
from tools import assert_same, near

import blr_optax as blr
from blr_optax import families

assert_close = functools.partial(near, rtol=1e-5, atol=1e-7)


# --- one small problem for all frameworks ---------------------------------------------------------

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 3)).astype(np.float32)
Y = np.sin(X[:, :1]) + X[:, 1:2] * X[:, 2:]
FIRST, LAST = (RNG.normal(size=shape).astype(np.float32) for shape in ((3, 5), (5, 1)))
STEPS = 6


def weights() -> dict[str, dict[str, jax.Array]]:
    zero = np.zeros(5, np.float32)
    tree = {
        "first": {"kernel": FIRST, "bias": zero},
        "last": {"kernel": LAST, "bias": zero[:1]},
    }
    return jax.tree.map(jnp.asarray, tree)


def forward(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"]


def loss(params, x, y):
    return jnp.mean((forward(params, x) - y) ** 2)


SETTINGS = {"ess": 16.0, "b2": 0.9, "hess_init": 0.5, "weight_decay": 1e-2, "key": 3}
PLAIN = blr.ivon(0.05, **SETTINGS)


def optimizer(**changes: Any) -> optax.GradientTransformationExtraArgs:
    """IVON; the same object for all tests that change nothing, so that its step compiles once."""
    return blr.ivon(0.05, **{**SETTINGS, **changes}) if changes else PLAIN


sample = jax.jit(blr.sample)


grad = jax.jit(jax.grad(loss))
estimate = jax.jit(
    lambda state, params, *batch, **options: blr.estimate(loss, state, params, *batch, **options),
    static_argnames=("samples", "microbatch"),
)


@functools.cache
def init_of(tx: optax.GradientTransformation) -> Callable:
    return jax.jit(tx.init)


@functools.cache
def update_of(tx: optax.GradientTransformation) -> Callable:
    return jax.jit(tx.update)


@functools.cache
def step_of(tx: optax.GradientTransformation, loss: Callable = loss) -> Callable:
    """One step of a plain loop, jitted."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, opt_state, x=X, y=Y):
        grads = jax.grad(loss)(blr.sample(opt_state, params), x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def run(tx: optax.GradientTransformation, steps: int = STEPS) -> tuple[Any, Any]:
    """A plain loop."""
    params, step = weights(), step_of(tx)
    opt_state = init_of(tx)(params)
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return params, opt_state


# --- Linen ----------------------------------------------------------------------------------------


def test_train_state_walks_the_raw_trajectory():
    tx = optimizer()
    state = train_state.TrainState.create(apply_fn=forward, params=weights(), tx=tx)

    @jax.jit
    def step(state):
        theta = blr.sample(state.opt_state, state.params)
        return state.apply_gradients(grads=grad(theta, X, Y))

    params, opt_state, raw = weights(), init_of(tx)(weights()), step_of(tx)
    for _ in range(STEPS):
        params, opt_state = raw(params, opt_state)
        state = step(state)
        assert_same(state.params, params)
    assert_same(state.opt_state, opt_state)


def test_the_estimate_of_one_sample_is_what_a_train_state_does_without_extras():
    tx = optimizer()
    params, opt_state = run(tx, 2)
    est = estimate(opt_state, params, X, Y)
    with_curvature = update_of(tx)(est.grad, opt_state, params, statistic=est.statistic)
    assert_close(with_curvature[0], update_of(tx)(est.grad, opt_state, params)[0])


def test_estimate_averages_the_statistics_of_batch_norm_over_the_draws():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.BatchNorm(False, momentum=0.5)(nn.Dense(4)(x)))

    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    params, stats = variables["params"], variables["batch_stats"]

    @jax.jit
    def loss(theta, x, y):
        out, new = model.apply({"params": theta, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), new["batch_stats"]

    opt_state = init_of(optimizer())(params)
    noise = jax.tree.map(lambda p: RNG.normal(size=(3, *p.shape)).astype(np.float32), params)
    est = jax.jit(
        lambda state, noise: blr.estimate(loss, state, params, X, Y, noise=noise, has_aux=True)
    )(opt_state, noise)
    variance = jax.tree.map(np.asarray, blr.posterior(opt_state, params).variance)
    each = [
        loss(jax.tree.map(lambda m, v, e: m + np.sqrt(v) * e[i], params, variance, noise), X, Y)  # noqa: B023
        for i in range(3)
    ]
    assert_close(est.value, sum(value for value, _ in each) / 3)
    assert_close(est.aux, jax.tree.map(lambda *s: sum(s) / 3, *(s for _, s in each)), atol=1e-6)
    assert jax.tree.structure(est.aux) == jax.tree.structure(stats)


# --- nnx ------------------------------------------------------------------------------------------


class Plain(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.last = nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


class Normed(Plain):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


def nnx_loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def pure(model: nnx.Module) -> Any:
    """The parameters of a model as plain arrays."""
    return nnx.as_pure(nnx.state(model, nnx.Param))


def dicts(state: Any) -> Any:
    """A pure `nnx.State` as nested dicts, the tree of the raw loop."""
    return {k: dicts(v) for k, v in state.items()} if hasattr(state, "items") else state


@nnx.jit
def nnx_step(model, opt):
    mean = pure(model)
    theta = blr.sample(nnx.as_pure(opt.opt_state), mean)
    nnx.update(model, theta)
    grads = nnx.grad(nnx_loss)(model, X, Y)
    inside = pure(model)
    nnx.update(model, mean)
    restored = pure(model)
    opt.update(model, grads)
    return mean, theta, inside, restored


def test_nnx_optimizer_walks_the_raw_trajectory():
    model, tx = Plain(nnx.Rngs(0)), optimizer()
    nnx.update(model, weights())
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params, opt_state, raw = weights(), init_of(tx)(weights()), step_of(tx)
    for _ in range(STEPS):
        params, opt_state = raw(params, opt_state)
        nnx_step(model, opt)
        # The same arithmetic, traced through other layers: XLA may round its last bit otherwise.
        assert_close(dicts(pure(model)), params, rtol=1e-5, atol=1e-6)
    precision = nnx.as_pure(opt.opt_state)[0].precision
    assert_close(dicts(precision), opt_state[0].precision, rtol=1e-5)


def test_nnx_draws_the_noise_of_the_raw_loop():
    model, tx = Plain(nnx.Rngs(0)), optimizer()
    nnx.update(model, weights())
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    drawn = sample(nnx.as_pure(opt.opt_state), pure(model))
    assert_same(dicts(drawn), sample(init_of(tx)(weights()), weights()))


def test_nnx_with_batch_norm_samples_restores_and_keeps_the_running_statistics():
    model = Normed(nnx.Rngs(0))
    opt = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    expected, seen = jnp.zeros(5), []
    for step in range(3):
        mean, theta, inside, restored = nnx_step(model, opt)
        assert_same(inside, theta)
        assert_same(restored, mean)
        assert all(
            bool(jnp.any(a != b))
            for a, b in zip(jax.tree.leaves(theta), jax.tree.leaves(mean), strict=True)
        )
        # BatchNorm has averaged the batch as the *sampled* first layer saw it.
        hidden = X @ theta["first"]["kernel"] + theta["first"]["bias"]
        expected = 0.5 * expected + 0.5 * hidden.mean(0)
        assert_close(model.norm.mean[...], expected, atol=1e-6)
        seen.append(float(theta["last"]["bias"][0]))
        assert int(opt.step[...]) == step + 1
    assert len(set(seen)) == 3
    q = blr.posterior(nnx.as_pure(opt.opt_state), pure(model))
    assert_close(q.mean, pure(model))
    assert bool(q.proper)


def test_nnx_with_an_estimate_and_batch_norm():
    @nnx.jit
    def step(model, opt):
        graphdef, mean, rest = nnx.as_pure(nnx.split(model, nnx.Param, ...))

        def loss(theta, x, y):
            net = nnx.merge(graphdef, theta, rest)
            return nnx_loss(net, x, y), nnx.as_pure(nnx.state(net, nnx.BatchStat))

        opt_state = nnx.as_pure(opt.opt_state)
        est = blr.estimate(loss, opt_state, mean, X, Y, samples=2, has_aux=True)
        opt.update(model, jax.tree.map(nnx.Param, est.grad), statistic=est.statistic)
        nnx.update(model, est.aux)
        return est, opt_state, mean

    model, tx = Normed(nnx.Rngs(0)), optimizer()
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    est, opt_state, mean = step(model, opt)
    updates, state = update_of(tx)(est.grad, opt_state, mean, statistic=est.statistic)
    assert_close(pure(model), optax.apply_updates(mean, updates), atol=1e-6)
    assert_close(nnx.as_pure(opt.opt_state)[0].precision, state[0].precision)
    assert_same(nnx.as_pure(nnx.state(model, nnx.BatchStat)), est.aux)
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0.0


@pytest.mark.parametrize("make", [blr.sgd, blr.adam, blr.rmsprop], ids=lambda f: f.__name__)
def test_nnx_with_an_optimizer_that_carries_a_posterior(make):
    """`init` gets variables, whose paths are longer by `.value`, and `update` gets arrays."""
    model, tx = Plain(nnx.Rngs(0)), make(0.1, ess=10.0)
    nnx.update(model, weights())
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    q = blr.posterior(nnx.as_pure(opt.opt_state), pure(model))
    expected = blr.posterior(init_of(tx)(weights()), weights())
    assert q.family == expected.family
    assert_same(dicts(q.variance), expected.variance)


def test_nnx_takes_the_posterior_of_one_task_as_the_prior_of_the_next():
    model = Plain(nnx.Rngs(0))
    opt = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    nnx_step(model, opt)
    q = blr.posterior(nnx.as_pure(opt.opt_state), pure(model))
    opt = nnx.Optimizer(model, optimizer(prior=q, weight_decay=0.0), wrt=nnx.Param)
    nnx_step(model, opt)
    assert bool(blr.posterior(nnx.as_pure(opt.opt_state), pure(model)).proper)


def test_nnx_with_partition_labelled_by_path():
    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "bayes" if path[0].key == "last" else "point", params
        )

    model = Plain(nnx.Rngs(0))
    tx = optax.partition({"bayes": optimizer(), "point": optax.adamw(1e-2)}, labels)
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx_step(model, opt)
    variance = blr.posterior(nnx.as_pure(opt.opt_state), pure(model)).variance
    assert float(jnp.abs(variance["first"]["kernel"]).max()) == 0.0
    assert float(variance["last"]["kernel"].min()) > 0.0


# --- optax's wrappers -----------------------------------------------------------------------------


def test_multi_steps_makes_the_step_of_the_averaged_gradient():
    inner = optimizer()
    tx = optax.MultiSteps(inner, every_k_schedule=4)
    params, plain = weights(), weights()
    state, plain_state = init_of(tx)(params), init_of(inner)(plain)
    step = step_of(tx)
    for _ in range(2):
        theta, kept = sample(plain_state, plain), params
        assert_close(drawn := sample(state, params), theta, rtol=1e-4, atol=1e-5)
        for i in range(4):
            assert_same(sample(state, params), drawn)
            assert_same(params, kept)  # nothing moves before the fourth micro-batch
            params, state = step(params, state, X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4])
        updates, plain_state = update_of(inner)(grad(theta, X, Y), plain_state, plain)
        plain = optax.apply_updates(plain, updates)
        assert_close(params, plain, rtol=1e-4, atol=1e-5)
    assert_close(
        blr.posterior(state, params).variance, blr.posterior(plain_state, plain).variance, rtol=1e-3
    )


def test_microbatch_is_the_accumulation_that_also_takes_several_samples():
    tx = optimizer()
    params, state = run(tx, 1)
    whole = estimate(state, params, X, Y, samples=2)
    pieces = estimate(state, params, X, Y, samples=2, microbatch=4)
    assert_close(pieces.grad, whole.grad, rtol=1e-4, atol=1e-5)
    assert_close(pieces.statistic, whole.statistic, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: (optax.EmptyState(), s)])
def test_estimate_refuses_multi_steps(wrap):
    params = weights()
    state = wrap(optax.MultiSteps(optimizer(), 4).init(params))
    with pytest.raises(ValueError, match=r"MultiSteps.*last\s+micro-batch.*microbatch="):
        blr.estimate(loss, state, params, X, Y)


def test_partition_into_a_posterior_and_points():
    groups = {"bayes": optimizer(), "point": optax.adamw(1e-2)}
    tx = optax.partition(groups, {"first": "point", "last": "bayes"})
    params, state = run(tx, 3)
    theta = sample(state, params)
    assert_same(theta["first"], params["first"])
    assert bool(jnp.all(theta["last"]["kernel"] != params["last"]["kernel"]))
    q = blr.posterior(state, params)
    assert_close(q.mean, params)
    assert float(jnp.abs(q.variance["first"]["kernel"]).max()) == 0.0
    own = blr.posterior(state.inner_states["bayes"], {"last": params["last"]})
    assert_same(q.variance["last"], own.variance["last"])
    draws = q.sample(jax.random.key(0), (3,))
    assert_same(draws["first"]["bias"], jnp.stack([params["first"]["bias"]] * 3))

    # The groups are independent: each moves as it would alone, given the whole gradient.
    grads = grad(theta, X, Y)
    updates, _ = update_of(tx)(grads, state, params)
    alone = {"last": params["last"]}
    expected, _ = update_of(groups["bayes"])(
        {"last": grads["last"]}, blr_state(state.inner_states["bayes"], alone), alone
    )
    assert_close(updates["last"], expected["last"])


def blr_state(masked: Any, params: Any) -> Any:
    """The state of a masked group with the masked leaves left out."""
    return jax.tree.map(
        lambda node: {k: v for k, v in node.items() if k in params} if holds(node) else node,
        masked.inner_state,
        is_leaf=holds,
    )


def holds(node: Any) -> bool:
    """Whether a node is a tree like `weights()`."""
    return isinstance(node, dict) and set(node) == {"first", "last"}


def test_partition_into_two_posteriors_with_settings_of_their_own():
    groups = {"a": optimizer(hess_init=4.0, b2=0.5), "b": optimizer(ess=64.0)}
    tx = optax.partition(groups, {"first": "a", "last": "b"})
    params = weights()
    q = blr.posterior(init_of(tx)(params), params)
    a, b = (blr.posterior(init_of(tx)(params), params).variance for tx in groups.values())
    assert q.family == families.MeanField(families.Normal())
    assert_same(q.variance, {"first": a["first"], "last": b["last"]})
    assert_close(q.variance["first"]["bias"], jnp.full(5, 1 / (16.0 * 4.01)))
    assert_close(q.variance["last"]["bias"], jnp.full(1, 1 / (64.0 * 0.51)))

    params, state = run(tx, 3)
    est = estimate(state, params, X, Y, samples=2)
    assert jax.tree.structure(est.statistic) == jax.tree.structure(params)
    updates, _ = update_of(tx)(est.grad, state, params, statistic=est.statistic)
    assert jax.tree.all(jax.tree.map(lambda u: bool(jnp.all(u != 0)), updates))


def test_masked_leaves_are_points_and_draw_the_same_noise_elsewhere():
    tx = optax.masked(optimizer(), {"first": True, "last": False})
    params = weights()
    state, full = init_of(tx)(params), init_of(optimizer())(params)
    theta = sample(state, params)
    assert_same(theta["first"], sample(full, params)["first"])
    assert_same(theta["last"], params["last"])
    variance = blr.posterior(state, params).variance
    assert float(jnp.abs(variance["last"]["kernel"]).max()) == 0.0


def test_clip_after_the_chain_bounds_the_step_and_not_the_posterior():
    free, clipped = optimizer(), optax.chain(optimizer(), optax.clip(1e-3))
    params = weights()
    grads = grad(sample(init_of(free)(params), params), X, Y)
    updates, state = update_of(free)(grads, init_of(free)(params), params)
    short, short_state = update_of(clipped)(grads, init_of(clipped)(params), params)
    assert_same(short, jax.tree.map(lambda u: jnp.clip(u, -1e-3, 1e-3), updates))
    assert_same(blr.posterior(short_state, params).variance, blr.posterior(state, params).variance)
    assert_same(sample(short_state, params), sample(state, params))


def test_inject_hyperparams_changes_the_rate_in_the_middle_of_a_run():
    settings = {"ess": 16.0, "hess_init": 0.5, "key": 3}
    tx = optax.inject_hyperparams(blr.ivon)(learning_rate=0.05, **settings)
    params = weights()
    state = init_of(tx)(params)
    step = step_of(tx)
    plain, plain_state = params, (raw := blr.ivon(0.05, **settings)).init(params)
    for _ in range(2):
        params, state = step(params, state)
        plain, plain_state = step_of(raw)(plain, plain_state)
        assert_close(params, plain, rtol=1e-4, atol=1e-6)
    assert_close(blr.posterior(state, params).variance, blr.posterior(plain_state, plain).variance)
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    still, _ = step(params, state)
    assert_same(still, params)
    assert step._cache_size() == 1


def test_apply_if_finite_rejects_a_step_and_keeps_the_posterior():
    tx = optax.apply_if_finite(optimizer(), max_consecutive_errors=3)
    params, state = run(tx, 2)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    updates, after = update_of(tx)(bad, state, params)
    assert_same(updates, jax.tree.map(jnp.zeros_like, params))
    assert_same(blr.posterior(after, params), blr.posterior(state, params))
    params, after = step_of(tx)(params, after)
    assert jax.tree.all(jax.tree.map(lambda p: bool(jnp.all(jnp.isfinite(p))), params))
    assert int(after.total_notfinite) == 1


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        optimizer(),
        optax.named_chain(("posterior", optimizer()), ("clip", optax.clip(1.0))),
        optax.partition({"b": optimizer(), "p": optax.adamw(1e-2)}, {"first": "p", "last": "b"}),
    ],
    ids=["ivon", "named_chain", "partition"],
)
def test_orbax_standard_checkpointer_resumes_exactly(tx, tmp_path):
    step = step_of(tx)
    saved = run(tx, 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step3", saved)
    like = jax.eval_shape(lambda p: (p, tx.init(p)), weights())
    with ocp.StandardCheckpointer() as checkpointer:
        resumed = checkpointer.restore(tmp_path / "step3", like)
    assert_same(resumed, saved)
    for _ in range(3):
        resumed, saved = step(*resumed), step(*saved)
    assert_same(resumed, saved)
    assert_same(sample(*reversed(resumed)), sample(*reversed(saved)))


def test_orbax_checkpoint_manager_resumes_exactly(tmp_path):
    tx = optimizer()
    step, now = step_of(tx), (weights(), init_of(tx)(weights()))
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for i in range(4):
            now = step(*now)
            if i < 2:
                manager.save(i, args=ocp.args.StandardSave(now))
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [1]
        like = (weights(), init_of(tx)(weights()))  # a concrete target will do too
        resumed = manager.restore(1, args=ocp.args.StandardRestore(like))
    for _ in range(2):
        resumed = step(*resumed)
    assert_same(resumed, now)


def test_orbax_resumes_an_nnx_run_exactly(tmp_path):
    def fresh():
        model = Normed(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    pair = fresh()
    for _ in range(2):
        nnx_step(*pair)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step2", nnx.as_pure(nnx.state(pair)))
    again = fresh()
    with ocp.StandardCheckpointer() as checkpointer:
        like = nnx.as_pure(nnx.state(again))
        nnx.update(again, checkpointer.restore(tmp_path / "step2", like))
    for _ in range(2):
        nnx_step(*pair)
        nnx_step(*again)
    assert_same(nnx.as_pure(nnx.state(again)), nnx.as_pure(nnx.state(pair)))
    assert int(again[1].step[...]) == 4


def test_flax_msgpack_takes_the_leaves_with_the_key_as_numbers():
    params, state = run(optimizer(), 2)
    with pytest.raises(TypeError):
        serialization.to_bytes(state)  # the boundary that the recipe is about
    leaves, structure = jax.tree.flatten(state)
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    assert sum(keys) == 1
    numbers = [jax.random.key_data(x) if key else x for x, key in zip(leaves, keys, strict=True)]
    back = serialization.from_bytes(numbers, serialization.to_bytes(numbers))
    restored = structure.unflatten(
        jax.random.wrap_key_data(x) if key else jnp.asarray(x)
        for x, key in zip(back, keys, strict=True)
    )
    assert_same(restored, state)
    step = step_of(optimizer())
    assert_same(step(params, restored), step(params, state))
