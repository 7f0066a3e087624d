"""Inside training frameworks: the recipes of the documentation, and the facts they rest on."""

import functools
import re
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
from tools import ROOT, assert_same

import blr_optax as blr
from blr_optax import families

RECIPES = ROOT / "docs" / "recipes.md"


def assert_close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


# --- the recipes ----------------------------------------------------------------------------------


def recipes() -> dict[str, tuple[int, str]]:
    """The code of each section of recipes.md that has some, and the line it begins at."""
    found, title = {}, ""
    text = RECIPES.read_text()
    for match in re.finditer(
        r"^## ([^\n]+)$|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        if match[1]:
            title = match[1]
        else:
            assert title not in found, f"{title} has two blocks; a recipe is one complete block"
            found[title] = (text.count("\n", 0, match.start(2)), match[2])
    return found


def learnt(names: dict[str, Any]) -> None:
    """The loss fell to less than half, and the posterior moved from where it began."""
    assert np.mean(names["losses"][-5:]) < 0.5 * np.mean(names["losses"][:5])
    assert bool(names["q"].proper)
    deviations = jax.tree.leaves(names["q"].variance)
    assert all(bool(jnp.all(jnp.isfinite(v))) for v in deviations)
    assert len({float(v) for v in deviations[-1].ravel()}) > 1


def classifies(names: dict[str, Any]) -> None:
    learnt(names)
    probabilities, epistemic = names["prediction"].probabilities, names["prediction"].epistemic
    assert blr.metrics.accuracy(probabilities, names["y"]) > 0.9
    assert bool(jnp.all(epistemic >= 0)) and float(epistemic.max()) > 0.01


def linen(names: dict[str, Any]) -> None:
    classifies(names)
    assert int(names["state"].step) == len(names["losses"])


def linen_batch_norm(names: dict[str, Any]) -> None:
    linen(names)
    stats = names["state"].batch_stats["BatchNorm_0"]
    assert float(jnp.abs(stats["mean"]).max()) > 0.1
    assert stats["mean"].shape == (32,)


def nnx_batch_norm(names: dict[str, Any]) -> None:
    classifies(names)
    assert float(jnp.abs(names["model"].norm.mean[...]).max()) > 0.1
    assert int(names["optimizer"].step[...]) == len(names["losses"])


def nnx_samples(names: dict[str, Any]) -> None:
    learnt(names)
    assert float(jnp.abs(names["model"].norm.mean[...]).max()) > 0.01


def accumulation(names: dict[str, Any]) -> None:
    learnt(names)
    drawn = jnp.stack(names["drawn"]).reshape(-1, 4, 4)  # optimizer step, micro-step, weight
    assert bool(jnp.all(drawn == drawn[:, :1]))
    assert len(np.unique(drawn[:, 0, 0])) == len(drawn)
    assert_close(names["params"], jnp.array([1.0, -2.0, 0.5, 0.0]), atol=0.1)


def partitioned(names: dict[str, Any]) -> None:
    assert np.mean(names["losses"][-5:]) < 0.2 * names["losses"][0]
    q, theta = names["q"], names["theta"]
    assert float(jnp.abs(q.variance["body"]["w"]).max()) == 0.0
    assert float(q.variance["head"].min()) > 0.0
    np.testing.assert_array_equal(
        theta["body"]["w"], jnp.broadcast_to(names["params"]["body"]["w"], (8, 1, 32))
    )
    assert float(jnp.std(theta["head"], axis=0).min()) > 0.0


def orbax(names: dict[str, Any]) -> None:
    assert names["latest"] == 9
    assert_same(names["resumed"], names["params"])
    assert_same(names["resumed_state"], names["opt_state"])


def msgpack(names: dict[str, Any]) -> None:
    assert_same(names["restored"], names["opt_state"])


def watched(names: dict[str, Any]) -> None:
    learnt(names)
    reports = names["reports"]
    assert len(reports) == 4 and all(int(report.skipped) == 0 for report in reports)
    assert all(0.0 <= float(report.correction_of_precision) < 0.2 for report in reports)
    assert float(reports[-1].signal_to_noise) > 0.5
    assert names["clipped"][0] > 0.2 and names["clipped"][-1] == 0.0


FACTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "Raw JAX": classifies,
    "Linen TrainState": linen,
    "Linen with BatchNorm and several samples": linen_batch_norm,
    "nnx Optimizer with BatchNorm": nnx_batch_norm,
    "nnx with several samples": nnx_samples,
    "VOGN: squares of the gradients of single examples": classifies,
    "Gradient accumulation with optax.MultiSteps": accumulation,
    "A posterior over a part of the model with optax.partition": partitioned,
    "Checkpoints with orbax": orbax,
    "Checkpoints with flax msgpack": msgpack,
    "Diagnostics of a training step": watched,
}
SLOW = {title for title in FACTS if title.startswith(("Raw", "Linen", "nnx", "VOGN"))}


def test_every_recipe_has_its_facts():
    assert list(recipes()) == list(FACTS)


@pytest.mark.parametrize(
    "title", [pytest.param(t, marks=[pytest.mark.slow] if t in SLOW else []) for t in FACTS]
)
def test_recipe(title: str, capsys: pytest.CaptureFixture[str]):
    line, code = recipes()[title]
    names: dict[str, Any] = {"__name__": "recipe"}
    # Empty lines in front, so that a traceback names the line of the document.
    exec(compile("\n" * line + code, str(RECIPES), "exec"), names)
    FACTS[title](names)
    assert "import blr_optax as blr" in code
    assert capsys.readouterr().out or "print" not in code


# --- one small problem for all frameworks ---------------------------------------------------------

X = jax.random.normal(jax.random.key(0), (16, 3))
Y = jnp.sin(X[:, :1]) + X[:, 1:2] * X[:, 2:]
STEPS = 6


def weights() -> dict[str, dict[str, jax.Array]]:
    first, last = jax.random.split(jax.random.key(1))
    return {
        "first": {"kernel": jax.random.normal(first, (3, 5)), "bias": jnp.zeros(5)},
        "last": {"kernel": jax.random.normal(last, (5, 1)), "bias": jnp.zeros(1)},
    }


def forward(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"]


def loss(params, x, y):
    return jnp.mean((forward(params, x) - y) ** 2)


def optimizer(**changes: Any) -> optax.GradientTransformationExtraArgs:
    settings = {"ess": 16.0, "b2": 0.9, "hess_init": 0.5, "weight_decay": 1e-2, "key": 3}
    return blr.ivon(0.05, **{**settings, **changes})


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
    opt_state = tx.init(params)
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
        return state.apply_gradients(grads=jax.grad(loss)(theta, X, Y))

    params, opt_state, raw = weights(), tx.init(weights()), step_of(tx)
    for _ in range(STEPS):
        params, opt_state = raw(params, opt_state)
        state = step(state)
        assert_same(state.params, params)
    assert_same(state.opt_state, opt_state)


def test_the_estimate_of_one_sample_is_what_a_train_state_does_without_extras():
    tx = optimizer()
    params, opt_state = run(tx, 2)
    est = blr.estimate(loss, opt_state, params, X, Y)
    with_curvature = tx.update(est.grad, opt_state, params, curvature=est.curvature)
    assert_close(with_curvature[0], tx.update(est.grad, opt_state, params)[0])


def test_estimate_averages_the_statistics_of_batch_norm_over_the_draws():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.BatchNorm(False, momentum=0.5)(nn.Dense(4)(x)))

    model = Net()
    variables = model.init(jax.random.key(0), X)
    params, stats = variables["params"], variables["batch_stats"]

    def loss(theta, x, y):
        out, new = model.apply({"params": theta, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), new["batch_stats"]

    opt_state = optimizer().init(params)
    noise = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), (3, *p.shape)), params)
    est = blr.estimate(loss, opt_state, params, X, Y, noise=noise, has_aux=True)
    deviation = jax.tree.map(jnp.sqrt, blr.posterior(opt_state, params).variance)
    each = [
        loss(jax.tree.map(lambda m, s, e: m + s * e[i], params, deviation, noise), X, Y)  # noqa: B023
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
    params, opt_state, raw = weights(), tx.init(weights()), step_of(tx)
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
    drawn = blr.sample(nnx.as_pure(opt.opt_state), pure(model))
    assert_same(dicts(drawn), blr.sample(tx.init(weights()), weights()))


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
        opt.update(model, jax.tree.map(nnx.Param, est.grad), curvature=est.curvature)
        nnx.update(model, est.aux)
        return est, opt_state, mean

    model, tx = Normed(nnx.Rngs(0)), optimizer()
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    est, opt_state, mean = step(model, opt)
    updates, state = tx.update(est.grad, opt_state, mean, curvature=est.curvature)
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
    expected = blr.posterior(tx.init(weights()), weights())
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
    state, plain_state = tx.init(params), inner.init(plain)
    step = step_of(tx)
    for _ in range(2):
        theta, kept = blr.sample(plain_state, plain), params
        assert_close(drawn := blr.sample(state, params), theta, rtol=1e-4, atol=1e-5)
        for i in range(4):
            assert_same(blr.sample(state, params), drawn)
            assert_same(params, kept)  # nothing moves before the fourth micro-batch
            params, state = step(params, state, X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4])
        updates, plain_state = inner.update(jax.grad(loss)(theta, X, Y), plain_state, plain)
        plain = optax.apply_updates(plain, updates)
        assert_close(params, plain, rtol=1e-4, atol=1e-5)
    assert_close(
        blr.posterior(state, params).variance, blr.posterior(plain_state, plain).variance, 1e-3
    )


def test_microbatch_is_the_accumulation_that_also_takes_several_samples():
    tx = optimizer()
    params, state = run(tx, 1)
    whole = blr.estimate(loss, state, params, X, Y, samples=2)
    pieces = blr.estimate(loss, state, params, X, Y, samples=2, microbatch=4)
    assert_close(pieces.grad, whole.grad, rtol=1e-4, atol=1e-5)
    assert_close(pieces.curvature, whole.curvature, rtol=1e-3, atol=1e-3)


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
    theta = blr.sample(state, params)
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
    grads = jax.grad(loss)(theta, X, Y)
    updates, _ = tx.update(grads, state, params)
    alone = {"last": params["last"]}
    expected, _ = groups["bayes"].update(
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
    q = blr.posterior(tx.init(params), params)
    a, b = (blr.posterior(tx.init(params), params).variance for tx in groups.values())
    assert q.family == families.MeanField(families.Normal())
    assert_same(q.variance, {"first": a["first"], "last": b["last"]})
    assert_close(q.variance["first"]["bias"], jnp.full(5, 1 / (16.0 * 4.01)))
    assert_close(q.variance["last"]["bias"], jnp.full(1, 1 / (64.0 * 0.51)))

    params, state = run(tx, 3)
    est = blr.estimate(loss, state, params, X, Y, samples=2)
    assert jax.tree.structure(est.curvature) == jax.tree.structure(params)
    updates, _ = tx.update(est.grad, state, params, curvature=est.curvature)
    assert jax.tree.all(jax.tree.map(lambda u: bool(jnp.all(u != 0)), updates))


def test_masked_leaves_are_points_and_draw_the_same_noise_elsewhere():
    tx = optax.masked(optimizer(), {"first": True, "last": False})
    params = weights()
    state, full = tx.init(params), optimizer().init(params)
    theta = blr.sample(state, params)
    assert_same(theta["first"], blr.sample(full, params)["first"])
    assert_same(theta["last"], params["last"])
    variance = blr.posterior(state, params).variance
    assert float(jnp.abs(variance["last"]["kernel"]).max()) == 0.0


def test_clip_after_the_chain_bounds_the_step_and_not_the_posterior():
    free, clipped = optimizer(), optax.chain(optimizer(), optax.clip(1e-3))
    params = weights()
    grads = jax.grad(loss)(blr.sample(free.init(params), params), X, Y)
    updates, state = free.update(grads, free.init(params), params)
    short, short_state = clipped.update(grads, clipped.init(params), params)
    assert_same(short, jax.tree.map(lambda u: jnp.clip(u, -1e-3, 1e-3), updates))
    assert_same(blr.posterior(short_state, params).variance, blr.posterior(state, params).variance)
    assert_same(blr.sample(short_state, params), blr.sample(state, params))


def test_inject_hyperparams_changes_the_rate_in_the_middle_of_a_run():
    settings = {"ess": 16.0, "hess_init": 0.5, "key": 3}
    tx = optax.inject_hyperparams(blr.ivon)(learning_rate=0.05, **settings)
    params = weights()
    state = tx.init(params)
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
    updates, after = tx.update(bad, state, params)
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
    assert_same(blr.sample(*reversed(resumed)), blr.sample(*reversed(saved)))


def test_orbax_checkpoint_manager_resumes_exactly(tmp_path):
    tx = optimizer()
    step, now = step_of(tx), (weights(), tx.init(weights()))
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for i in range(4):
            now = step(*now)
            if i < 2:
                manager.save(i, args=ocp.args.StandardSave(now))
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [1]
        like = (weights(), tx.init(weights()))  # a concrete target will do too
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
