"""PyTorch's IVON: a real checkpoint goes on here as it went on there, and comes back the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import check_steps, follows, noise_and_batches, problem_loss, step_of, unflatten
from tools import load_golden, run_steps

import blr_optax as blr

REAL = load_golden("ivon_checkpoint")
ORDER = [f"Dense_{i}/{leaf}" for i in range(3) for leaf in ("kernel", "bias")]


def flax(arrays):
    """Arrays in the order and the axes of torch, as a Flax tree: by hand, layer by layer."""
    w = [np.asarray(x, jnp.result_type(float)) for x in arrays]
    return {f"Dense_{i}": {"kernel": w[2 * i].T, "bias": w[2 * i + 1]} for i in range(3)}


def torch_like(arrays, groups):
    """The file's flat vectors of each group as one Flax tree."""
    shapes = [np.shape(x) for x in REAL["checkpoint"]["parameters"]]
    flat = np.concatenate([np.asarray(arrays[i]) for i in range(groups)])
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    parts = np.split(flat, ends[:-1])
    return flax([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])


def from_torch_ivon(*args, **options):
    """`blr.from_torch_ivon` as one program: it reads numpy, and computes leaf by leaf."""
    found = []

    @jax.jit
    def arrays():
        found.append(blr.from_torch_ivon(*args, **options))
        return found[0][:2]

    params, state = arrays()
    return found[0]._replace(params=params, opt_state=state)


def load(dtype=None, **options):
    checkpoint = REAL["checkpoint"]
    params = flax(checkpoint["parameters"])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), params)
    return from_torch_ivon(
        checkpoint["optimizer"],
        [np.asarray(x) for x in checkpoint["parameters"]],
        shapes,
        order=ORDER,
        step=checkpoint["step"],
        **options,
    )


def merged(state, field):
    """One tree out of the states of two groups."""
    found = {}
    for _, tree in optax.tree.get_all_with_path(state, field):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            found[jax.tree_util.keystr(path)] = x
    return found


def tree_close(found, tree, what, relative=1e-9):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        follows(found[jax.tree_util.keystr(path)], x, relative, what)


def test_a_real_checkpoint_goes_on_as_without_a_restart(x64):
    """Two groups, a square layer, the noise and gradients recorded there; to 1e-9."""
    params, state, tx = load()

    def step(carry, given):
        (params, state), (theta, grads) = carry, given
        variance = blr.posterior(state, params).variance
        curvature = jax.tree.map(lambda t, m, g, v: (t - m) * g / v, theta, params, grads, variance)
        updates, state = tx.update(grads, state, params, statistic=curvature)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, merged(state, "ema"), merged(state, "precision"))

    trees = [(flax(one["theta"]), flax(one["grad"])) for one in REAL["steps"]]
    given = jax.tree.map(lambda *x: np.stack(x), *trees)
    (_, state), seen = run_steps(step, lambda: (params, state), given)
    decay = flax([np.full(np.shape(x), 1e-2 if i < 4 else 1e-3) for i, x in enumerate(
        REAL["checkpoint"]["parameters"])])  # fmt: skip
    for t, recorded in enumerate(REAL["steps"]):
        mean, momentum, precision = jax.tree.map(lambda x, t=t: x[t], seen)
        jax.tree.map(lambda x, y: follows(x, y, 1e-9, "mean"), mean, flax(recorded["parameters"]))
        tree_close(momentum, torch_like(recorded["momentum"], 2), "momentum")
        wanted = jax.tree.map(np.add, torch_like(recorded["hess"], 2), decay)
        tree_close(precision, wanted, "precision")
    assert int(optax.tree.get_all_with_path(state, "count")[0][1]) == 5


@pytest.mark.parametrize("weights", [np.float64, jnp.bfloat16])
def test_back_and_forth(x64, weights):
    """Mean and momentum to the bit, the precision up to the rounding of p - delta + delta."""
    first = load(weights)
    checkpoint = REAL["checkpoint"]["optimizer"]
    groups = [
        {**{k: v for k, v in group.items() if k not in ("params", "hess", "momentum")},
         "params": [ORDER[i] for i in group["params"]]}
        for group in checkpoint["param_groups"]
    ]  # fmt: skip
    saved, arrays = blr.to_torch_ivon(first.opt_state, first.params, order=ORDER, groups=groups)
    for group, original in zip(saved["param_groups"], checkpoint["param_groups"], strict=True):
        assert {**group, "hess": 0, "momentum": 0} == {**original, "hess": 0, "momentum": 0}
        if weights is np.float64:
            np.testing.assert_array_equal(group["momentum"], original["momentum"])
            np.testing.assert_allclose(group["hess"], original["hess"], rtol=1e-15)
    assert saved["state"] == checkpoint["state"]
    for x, original in zip(arrays, REAL["checkpoint"]["parameters"], strict=True):
        assert x.shape == np.shape(original) and x.dtype != jnp.bfloat16
    again = from_torch_ivon(saved, arrays, first.params, order=ORDER, step=2)
    for a, b in zip(jax.tree.leaves(first[:2]), jax.tree.leaves(again[:2]), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            continue
        assert a.dtype == b.dtype
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=1e-15 if
                                   weights is np.float64 else 1e-7)  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    for field in ("ema", "count"):
        jax.tree.map(
            np.testing.assert_array_equal,
            merged(first.opt_state, field),
            merged(again.opt_state, field),
        )


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case["name"]) for case in load_golden("ivon_mlp")["cases"]],
)
def test_a_recorded_trajectory_goes_on(x64, case):
    """Every case, taken up in the middle, makes the remaining steps to 1e-9."""
    problem, hyper = load_golden("ivon_mlp")["problem"], case["hyper"]
    names, shapes = problem["leaf_names"], problem["leaf_shapes"]
    stop, at = 3, case["steps"][2]
    group = dict(hyper)
    group |= {"hess": at["hess"], "momentum": at["momentum"], "params": list(range(len(names)))}
    price = hyper["hess_approx"] == "price"
    like = unflatten(case["init_mean"], names, shapes)
    params, state, tx = from_torch_ivon(
        {"param_groups": [group]},
        list(unflatten(at["mean"], names, shapes).values()),
        like,
        order=names,
        step=stop,
        debias=hyper["debias"],
        rescale_lr=hyper["rescale_lr"],
        curvature="reparameterized" if price else blr.estimators.squared_gradient(official=True),
    )
    rest = {**case, "steps": case["steps"][stop:]}
    given = noise_and_batches(rest, names, shapes)
    _, seen = run_steps(step_of(tx, problem_loss(problem)), lambda: (params, state), given)
    check_steps(seen, rest, names, 1e-9, hyper["weight_decay"])


def test_a_step_forgotten_is_a_first_step_too_long(x64):
    """Debiasing the loaded average again multiplies it by 1 / (1 - b1)."""
    params, state, tx = load()

    @jax.jit
    def length(params, state, count):
        state = optax.tree.set(state, count=count)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, state, zeros, statistic=zeros)  # at zero no decay
        return optax.tree.norm(updates["Dense_0"])

    lengths = [float(length(params, state, np.int32(count))) for count in (0, 1000)]
    np.testing.assert_allclose(lengths[0] / lengths[1], 10.0, rtol=1e-9)
    with pytest.raises(TypeError, match="step"):
        blr.from_torch_ivon(REAL["checkpoint"]["optimizer"], [], {}, order=[])


def test_a_transformation_of_ones_own_and_schedules():
    """The state that is filled may be any around `ivon`; schedules go on where they were."""
    rate = optax.linear_schedule(0.1, 0.0, 10)
    ess = lambda count: 50.0 + count  # noqa: E731
    tx = optax.chain(blr.ivon(rate, ess=ess, key=7), optax.scale(1.0))
    params, state, same = load(jnp.float32, tx=tx)
    assert same is tx
    assert float(optax.tree.get(state, "ess")) == 52.0
    built = load(jnp.float32, learning_rate=rate, key=7)
    for tx_, state_ in ((tx, state), (built.tx, built.opt_state)):
        counts = [int(x) for _, x in optax.tree.get_all_with_path(state_, "count")]
        assert set(counts) == {2}
        go_on = jax.jit(lambda s, p, tx=tx_: tx.update(blr.sample(s, p), s, p)[0])
        assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(go_on(state_, params)))
    with pytest.raises(ValueError, match="no use beside tx="):
        load(tx=tx, learning_rate=rate)
    with pytest.raises(ValueError, match="needs the state of ivon"):
        load(jnp.float32, tx=blr.vprop(0.1, ess=10.0))


def test_kernels_of_convolutions_and_a_transpose_of_ones_own():
    """OIHW becomes HWIO; an embedding stays; anything else is said by name."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(5, 2, 3, 4)), rng.normal(size=(7, 3)), rng.normal(size=(2, 3, 4))]
    arrays = [x.astype(np.float32) for x in arrays]
    params = {
        "conv": {"kernel": np.zeros((3, 4, 2, 5), np.float32)},
        "embed": {"embedding": np.zeros((7, 3), np.float32)},
        "other": np.zeros((4, 2, 3), np.float32),
    }
    order, size = ["conv/kernel", "embed/embedding", "other"], sum(x.size for x in arrays)
    flat = np.concatenate([x.ravel() for x in arrays])
    group = {"lr": 0.1, "ess": 4.0, "hess_init": 1.0, "beta1": 0.9, "beta2": 0.9}
    group |= {"weight_decay": 0.0, "clip_radius": None, "params": [0, 1, 2]}
    group |= {"hess": np.arange(size) + 1.0, "momentum": flat}
    options = {"order": order, "step": 3, "transpose": {"other": (2, 0, 1)}}
    found, state, _ = from_torch_ivon({"param_groups": [group]}, arrays, params, **options)
    np.testing.assert_array_equal(found["conv"]["kernel"], np.einsum("oihw->hwio", arrays[0]))
    np.testing.assert_array_equal(found["embed"]["embedding"], arrays[1])
    np.testing.assert_array_equal(found["other"], np.einsum("abc->cab", arrays[2]))
    ema = optax.tree.get(state, "ema")
    jax.tree.map(np.testing.assert_array_equal, ema, found)
    options = {"order": order, "transpose": {"other": (2, 0, 1)}}
    back, weights = blr.to_torch_ivon(
        state, found, groups=[{"lr": 0.1, "weight_decay": 0.0}], **options
    )
    for x, y in zip(weights, arrays, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(back["param_groups"][0]["hess"], group["hess"])
    np.testing.assert_array_equal(back["param_groups"][0]["momentum"], flat)


def test_what_does_not_fit_is_said():
    checkpoint, params = REAL["checkpoint"], flax(REAL["checkpoint"]["parameters"])
    give = lambda **k: blr.from_torch_ivon(  # noqa: E731
        **{
            "optimizer_state": checkpoint["optimizer"],
            "weights": checkpoint["parameters"],
            "params": params,
            "order": ORDER,
            "step": 2,
            **k,
        },
    )
    with pytest.raises(ValueError, match=r"missing.*Dense_2/bias"):
        give(order=ORDER[:-1])
    with pytest.raises(ValueError, match="have 32 entries"):
        give(order=[ORDER[4], *ORDER[1:4], ORDER[0], ORDER[5]])
    with pytest.raises(ValueError, match=r"Dense_0/kernel has shape .* but gets"):
        give(weights=[np.ones((3, 4)), *checkpoint["parameters"][1:]])
    with pytest.raises(ValueError, match="5 weights"):
        give(weights=checkpoint["parameters"][:-1])
    with pytest.raises(ValueError, match="step=-1"):
        give(step=-1)
    state = state_of(blr.ivon(0.1, ess=10.0), params)
    with pytest.raises(ValueError, match=r"lacks \['lr', 'weight_decay'\]"):
        blr.to_torch_ivon(state, params, order=ORDER, groups=[{}])
    with pytest.raises(ValueError, match="carries no posterior"):
        blr.to_torch_ivon((), params, order=ORDER, groups=[{"lr": 0.1}])
    with pytest.raises(ValueError, match="needs the state of ivon"):
        adam = state_of(blr.adam(0.1, ess=1.0), params)
        blr.to_torch_ivon(adam, params, order=ORDER, groups=[{"lr": 0.1}])
    with pytest.raises(ValueError, match=r"needs the state of ivon without a prior="):
        q = jax.jit(blr.posterior)(state, params)
        beside = state_of(blr.ivon(0.1, ess=10.0, prior=q), params)
        blr.to_torch_ivon(beside, params, order=ORDER, groups=[{"lr": 0.1}])
    with pytest.raises(ValueError, match=r"needs the state of ivon"):
        bsam = state_of(blr.bsam(0.1, ess=10.0), params)
        blr.to_torch_ivon(bsam, params, order=ORDER, groups=[{"lr": 0.1}])
    with pytest.raises(ValueError, match="must be order=, cut into pieces"):
        twice = [{"lr": 0.1, "params": ORDER[:1]}, {"lr": 0.1, "params": ORDER[:1]}]
        blr.to_torch_ivon(state, params, order=ORDER, groups=twice)
    with pytest.raises(ValueError, match=r"lacks \['weight_decay'\]; it has \['lr', 'wd'\]"):
        blr.to_torch_ivon(state, params, order=ORDER, groups=[{"lr": 0.1, "wd": 0.5}])
    for key, entry in (("hess", -1.0), ("hess", np.inf), ("hess", np.nan), ("momentum", np.nan)):
        group, *others = checkpoint["optimizer"]["param_groups"]
        broken = {**group, key: np.r_[np.asarray(group[key])[:-1], entry]}
        with pytest.raises(ValueError, match=f"{key} of group 0 is not finite"):
            give(optimizer_state={"state": {}, "param_groups": [broken, *others]})
    with pytest.raises(ValueError, match="state_dict"):
        give(optimizer_state={"0.weight": np.ones(3)})
    with pytest.raises(ValueError, match=r"step=5\.5 must be a plain whole number"):
        give(step=5.5)
    foreign = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    with pytest.raises(ValueError, match=r"have no .*'hess'"):
        give(optimizer_state=foreign, **{})


def state_of(tx, params):
    return jax.jit(tx.init)(params)


def test_groups_in_another_order_than_the_model():
    """PyTorch numbers parameters through the groups, not through the model."""
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    numbers = {"lr": 0.1, "ess": 9.0, "hess_init": 1.0, "beta1": 0.9, "beta2": 0.99}
    numbers |= {"weight_decay": 0.0, "clip_radius": float("inf")}
    groups = [
        {**numbers, "params": [0], "momentum": np.zeros(2), "hess": np.full(2, 100.0)},  # of b
        {**numbers, "params": [1], "momentum": np.zeros(2), "hess": np.full(2, 1.0)},  # of a
    ]
    found = blr.from_torch_ivon(
        {"state": {}, "param_groups": groups},
        [np.array([3.0, 4.0]), np.array([1.0, 2.0])],
        params,
        order=["b", "a"],
        step=jnp.array(10),
    )
    counts = optax.tree.get_all_with_path(found.opt_state, "count")
    assert counts and all(int(count) == 10 for _, count in counts)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    variance = jax.jit(lambda s, p: blr.posterior(s, p).variance)(found.opt_state, found.params)
    np.testing.assert_allclose(variance["a"], 1 / 9, rtol=1e-6)
    np.testing.assert_allclose(variance["b"], 1 / 900, rtol=1e-6)
    names = [
        {**numbers, "params": ["b"]},
        {**numbers, "params": ["a"]},
    ]
    saved, weights = blr.to_torch_ivon(
        found.opt_state, found.params, order=["b", "a"], groups=names
    )
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1]]
    np.testing.assert_allclose(saved["param_groups"][0]["hess"], 100.0, rtol=1e-6)
    np.testing.assert_array_equal(weights[0], [3.0, 4.0])
