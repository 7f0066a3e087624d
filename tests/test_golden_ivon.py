"""IVON against recorded trajectories of the official code, through the public API.

Every file's noise is fed to `estimate`, its gradient and curvature to `update`; parameters, h and
momentum must follow the recorded ones after every step. See each file's `readme`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_golden

import blr_optax as blr

RELATIVE = {"float64": 1e-9, "float32": 1e-3}


def problem_loss(problem):
    """loss(theta, batch indices) of a golden problem; theta is a dict of the named leaves."""
    kind = problem["kind"]
    if kind == "quadratic":
        a, b = jnp.array(problem["A"]), jnp.array(problem["b"])
        return lambda w, _: 0.5 * (w["theta"] - b) @ a @ (w["theta"] - b)
    if kind == "doublewell":
        a, c = jnp.array(problem["a"]), jnp.array(problem["c"])
        return lambda w, _: (
            jnp.sum(0.25 * w["theta"] ** 4 - 0.5 * a * w["theta"] ** 2 + c * w["theta"])
            + 0.1 * jnp.sum(w["theta"]) ** 2
        )
    x, y = jnp.array(problem["X"]), jnp.array(problem["y"])
    if kind == "logreg":

        def logistic(w, index):
            z = x[index] @ w["theta"]
            return jnp.mean(jax.nn.softplus(z) - y[index] * z)

        return logistic

    def mlp(w, index):
        hidden = jnp.tanh(x[index] @ w["W1"].T + w["b1"])
        logits = hidden @ w["W2"].T + w["b2"]
        chosen = jnp.take_along_axis(logits, y[index][:, None].astype(int), axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    return mlp


def unflatten(flat, names, shapes):
    """A dict of leaves from the file's flat vector(s); leading axes stay."""
    flat, leaves, start = np.asarray(flat), {}, 0
    for name, shape in zip(names, shapes, strict=True):
        size = int(np.prod(shape))
        leaves[name] = jnp.array(flat[..., start : start + size].reshape(*flat.shape[:-1], *shape))
        start += size
    assert start == flat.shape[-1]
    return leaves


def flatten(tree, names):
    return np.concatenate([np.ravel(tree[name]) for name in names])


def close(actual, expected, relative, what):
    """Relative to the largest entry of the recorded vector."""
    expected = np.asarray(expected)
    error = np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-300)
    assert error <= relative, f"{what}: relative error {error:.2e}"


def keywords(hyper, **more):
    """Our names for the official constructor arguments."""
    price = hyper.get("hess_approx", "price") == "price"
    return {
        "ess": hyper["ess"],
        "hess_init": hyper["hess_init"],
        "b1": hyper["beta1"],
        "b2": hyper["beta2"],
        "weight_decay": hyper.get("weight_decay", 0.0),
        "clip_radius": hyper["clip_radius"],
        "rescale_lr": hyper["rescale_lr"],
        "debias": hyper["debias"],
        "curvature": "reparameterized" if price else blr.estimators.squared_gradient(official=True),
        **more,
    }


def recorded_rates(case):
    """The recorded learning rates as a schedule."""
    rates = jnp.array([step["lr"] for step in case["steps"]])
    return lambda count: rates[count]


def averaged(loss, state, params, noise, batches):
    """One estimate per recorded sample, each on its own batch, averaged."""
    estimates = []
    for s, batch in enumerate(batches):
        one = jax.tree.map(lambda x, s=s: x[s : s + 1], noise)
        estimates.append(blr.estimate(loss, state, params, batch, noise=one))
    return jax.tree.map(lambda *x: sum(x) / len(x), *estimates)


def batches_of(step):
    samples = len(step["eps"])
    return [None] * samples if step["batch"] is None else [jnp.array(b) for b in step["batch"]]


def check_step(state, params, step, names, relative, weight_decay):
    inner = optax.tree.get_all_with_path(state, "precision")
    precision = {k: v for _, tree in inner for k, v in tree.items() if isinstance(v, jax.Array)}
    momentum = {
        k: v
        for _, tree in optax.tree.get_all_with_path(state, "ema")
        for k, v in tree.items()
        if isinstance(v, jax.Array)
    }
    close(flatten(params, names), step["mean"], relative, "mean")
    # h may pass through zero; its natural scale is the precision h + delta.
    hess = flatten(precision, names) - weight_decay
    scale = np.max(np.abs(np.asarray(step["hess"]) + weight_decay))
    assert np.max(np.abs(hess - np.asarray(step["hess"]))) <= relative * scale
    close(flatten(momentum, names), step["momentum"], relative, "momentum")


CASES = [
    (file, case["name"])
    for file in ("ivon_quadratic", "ivon_nonconvex", "ivon_logreg", "ivon_mlp")
    for case in load_golden(file)["cases"]
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("file", "name"), CASES)
def test_official_trajectory(file, name, dtype):
    with jax.enable_x64(dtype == "float64"):
        data = load_golden(file)
        case = next(c for c in data["cases"] if c["name"] == name)
        problem, hyper = data["problem"], case["hyper"]
        names, shapes = problem["leaf_names"], problem["leaf_shapes"]
        loss = problem_loss(problem)
        tx = blr.ivon(recorded_rates(case), **keywords(hyper))
        params = unflatten(case["init_mean"], names, shapes)
        state = tx.init(params)

        @jax.jit
        def advance(params, state, est):
            updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
            return optax.apply_updates(params, updates), state

        for step in case["steps"]:
            noise = unflatten(step["eps"], names, shapes)
            est = averaged(loss, state, params, noise, batches_of(step))
            close(flatten(est.grad, names), step["avg_grad"], RELATIVE[dtype], "gradient")
            params, state = advance(params, state, est)
            check_step(state, params, step, names, RELATIVE[dtype], hyper["weight_decay"])
        smallest = min(float(p.min()) for p in optax.tree.get(state, "precision").values())
        assert smallest == pytest.approx(step["pd_after"], rel=RELATIVE[dtype])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [c["name"] for c in load_golden("ivon_groups")["cases"]])
def test_parameter_groups_are_a_partition(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        data = load_golden("ivon_groups")
        case = next(c for c in data["cases"] if c["name"] == name)
        shape_of = dict(
            zip(data["problem"]["leaf_names"], data["problem"]["leaf_shapes"], strict=True)
        )
        names = [leaf for group in case["groups"] for leaf in group["leaves"]]
        shapes = [shape_of[leaf] for leaf in names]
        labels = {leaf: str(i) for i, g in enumerate(case["groups"]) for leaf in g["leaves"]}
        tx = optax.partition(
            {
                str(i): blr.ivon(g["hyper"]["lr"], **keywords({**case["hyper"], **g["hyper"]}))
                for i, g in enumerate(case["groups"])
            },
            labels,
        )
        decay = np.concatenate(
            [np.full(g["size"], g["hyper"]["weight_decay"]) for g in case["groups"]]
        )
        loss = problem_loss(data["problem"])
        params = unflatten(case["init_mean"], names, shapes)
        state = tx.init(params)
        advance = jax.jit(
            lambda params, state, est: tx.update(est.grad, state, params, curvature=est.curvature)
        )
        for step in case["steps"]:
            noise = unflatten(step["eps"], names, shapes)
            est = averaged(loss, state, params, noise, batches_of(step))
            updates, state = advance(params, state, est)
            params = optax.apply_updates(params, updates)
            check_step(state, params, step, names, RELATIVE[dtype], decay)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [c["name"] for c in load_golden("ivon_sync")["cases"]])
def test_workers_average_curvature_not_averages(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        data = load_golden("ivon_sync")
        case = next(c for c in data["cases"] if c["name"] == name)
        problem, hyper = data["problem"], case["hyper"]
        names, shapes = problem["leaf_names"], problem["leaf_shapes"]
        loss = problem_loss(problem)
        tx = blr.ivon(recorded_rates(case), **keywords(hyper))
        params = unflatten(case["init_mean"], names, shapes)
        state = tx.init(params)
        assert case["world_size"] == 2

        def worker(params, state, noise, batch):
            parts = []
            for s in range(len(case["steps"][0]["eps"][0])):
                one = jax.tree.map(lambda x, s=s: x[s : s + 1], noise)
                parts.append(
                    blr.estimate(loss, state, params, batch[s], noise=one, axis_name="workers")
                )
            est = jax.tree.map(lambda *x: sum(x) / len(x), *parts)
            updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
            return optax.apply_updates(params, updates), state

        mesh = jax.make_mesh((2,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec

        def sharded(params, state, noise, batch):
            noise, batch = jax.tree.map(lambda x: x[0], (noise, batch))
            return worker(params, state, noise, batch)

        advance = jax.jit(
            jax.shard_map(
                sharded,
                mesh=mesh,
                in_specs=(spec(), spec(), spec("workers"), spec("workers")),
                out_specs=(spec(), spec()),
            )
        )
        for step in case["steps"]:
            noise = unflatten(step["eps"], names, shapes)
            params, state = advance(params, state, noise, jnp.array(step["batch"]))
            check_step(state, params, step, names, RELATIVE[dtype], hyper["weight_decay"])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [c["name"] for c in load_golden("ivon_prior")["cases"]])
def test_prior_and_dual_terms(name, dtype):
    """The prior times a (possibly improper) site, as one `prior=` Posterior."""
    with jax.enable_x64(dtype == "float64"):
        data = load_golden("ivon_prior")
        case = next(c for c in data["cases"] if c["name"] == name)
        hyper = case["hyper"]
        ess, vector = hyper["ess"], lambda x: {"theta": jnp.array(x)}
        family = blr.families.get("gaussian_diagonal")
        mean0 = hyper["prior_mean"] or [0.0] * 3
        prior = blr.Posterior(
            family, family.natural(mean=vector(mean0), precision=vector(hyper["prior_prec"]))
        )
        # The dual terms of the mean loss, v . theta and V, as a site: ess times their naturals.
        site = blr.families.GaussianNatural(
            vector(ess * np.array(hyper["dual_mean"])),
            vector(-0.5 * ess * np.array(hyper["dual_prec"])),
        )
        delta = np.array(hyper["prior_prec"]) / ess
        kappa = hyper["local_wd"] / ess
        init = family.natural(
            mean=vector(case["init_mean"]),
            precision=vector(ess * (np.array(case["init_hess"]) + delta + kappa)),
        )
        options = {"weight_decay": kappa, "prior": prior * blr.Posterior(family, site)}
        if hyper["rescale_lr"]:
            # The official rate is rescaled by h_0 plus the prior's own precision, which is what
            # ours does when that precision is the weight decay and the rest an improper prior.
            linear = ess * (delta * np.array(mean0) + np.array(hyper["dual_mean"]))
            rest = ess * (kappa + np.array(hyper["dual_prec"]))
            natural = blr.families.GaussianNatural(vector(linear), vector(-0.5 * rest))
            options = {"weight_decay": vector(delta), "prior": blr.Posterior(family, natural)}
        tx = blr.ivon(hyper["lr"], **keywords(hyper, **options), init=blr.Posterior(family, init))
        params = vector(case["init_mean"])
        state, loss = tx.init(params), problem_loss(data["problem"])
        for step in case["steps"]:
            noise = {"theta": jnp.array(step["eps"])}
            est = averaged(loss, state, params, noise, batches_of(step))
            updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
            params = optax.apply_updates(params, updates)
            q = blr.posterior(state, params)
            close(params["theta"], step["mean"], RELATIVE[dtype], "mean")
            close(1.0 / q.variance["theta"], step["precision"], RELATIVE[dtype], "precision")
            momentum = optax.tree.get(state, "ema")["theta"]
            close(momentum, step["momentum"], RELATIVE[dtype], "momentum")
