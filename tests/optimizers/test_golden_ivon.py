"""IVON against recorded trajectories of the official code, through the public API.

Every file's noise is fed to `estimate`, its gradient and curvature to `update`; parameters, h and
momentum must follow the recorded ones after every step. See each file's `readme`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import (
    RELATIVE,
    averaged,
    batches_of,
    check_step,
    flatten,
    follows,
    keywords,
    problem_loss,
    recorded_rates,
    unflatten,
)
from tools import load_golden

import blr_optax as blr

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
            follows(flatten(est.grad, names), step["avg_grad"], RELATIVE[dtype], "gradient")
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
            follows(params["theta"], step["mean"], RELATIVE[dtype], "mean")
            follows(1.0 / q.variance["theta"], step["precision"], RELATIVE[dtype], "precision")
            momentum = optax.tree.get(state, "ema")["theta"]
            follows(momentum, step["momentum"], RELATIVE[dtype], "momentum")
