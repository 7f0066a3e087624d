"""IVON against recorded trajectories of the official code, through the public API.

Every file's noise is fed to `estimate`, its gradient and curvature to `update`; parameters, h and
momentum must follow the recorded ones after every step. See each file's `readme`.
"""

import jax
import numpy as np
import optax
import pytest
from replay import (
    RELATIVE,
    check_steps,
    flatten,
    follow,
    keywords,
    noise_and_batches,
    problem_loss,
    recorded,
    recorded_rates,
    start_of,
    step_of,
    unflatten,
)
from tools import built_inside, load_golden, run_steps

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
        tx = blr.ivon(recorded_rates(case), **keywords(hyper))
        _, seen = run_steps(
            step_of(tx, problem_loss(problem)),
            start_of(tx, unflatten(case["init_mean"], names, shapes)),
            noise_and_batches(case, names, shapes),
        )
        gradient = flatten(seen["gradient"], names)
        follow(gradient, recorded(case, "avg_grad"), RELATIVE[dtype], "gradient")
        check_steps(seen, case, names, RELATIVE[dtype], hyper["weight_decay"])
        smallest = min(float(p[-1].min()) for p in seen["precision"].values())
        last = case["steps"][-1]
        assert smallest == pytest.approx(last["pd_after"], rel=RELATIVE[dtype])


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
        _, seen = run_steps(
            step_of(tx, problem_loss(data["problem"])),
            start_of(tx, unflatten(case["init_mean"], names, shapes)),
            noise_and_batches(case, names, shapes),
        )
        check_steps(seen, case, names, RELATIVE[dtype], decay)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [c["name"] for c in load_golden("ivon_sync")["cases"]])
def test_workers_average_curvature_not_averages(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        data = load_golden("ivon_sync")
        case = next(c for c in data["cases"] if c["name"] == name)
        problem, hyper = data["problem"], case["hyper"]
        names, shapes = problem["leaf_names"], problem["leaf_shapes"]
        tx = blr.ivon(recorded_rates(case), **keywords(hyper))
        assert case["world_size"] == 2
        step = step_of(tx, problem_loss(problem), axis_name="workers")

        def worker(carry, given):
            return step(carry, jax.tree.map(lambda x: x[0], given))

        mesh = jax.make_mesh((2,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec
        sharded = jax.shard_map(
            worker, mesh=mesh, in_specs=(spec(), spec("workers")), out_specs=spec()
        )
        _, seen = run_steps(
            sharded,
            start_of(tx, unflatten(case["init_mean"], names, shapes)),
            noise_and_batches(case, names, shapes),
        )
        check_steps(seen, case, names, RELATIVE[dtype], hyper["weight_decay"])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [c["name"] for c in load_golden("ivon_prior")["cases"]])
def test_prior_and_dual_terms(name, dtype):
    """The prior times a (possibly improper) site, as one `prior=` Distribution."""
    with jax.enable_x64(dtype == "float64"):
        data = load_golden("ivon_prior")
        case = next(c for c in data["cases"] if c["name"] == name)
        tx = built_inside(lambda: prior_and_site(case))
        step = step_of(tx, problem_loss(data["problem"]))

        def with_variance(carry, given):
            (params, state), seen = step(carry, given)
            return (params, state), {**seen, "variance": blr.posterior(state, params).variance}

        _, seen = run_steps(
            with_variance,
            start_of(tx, {"theta": np.array(case["init_mean"])}),
            noise_and_batches(case, ["theta"], [[3]]),
        )
        for actual, field in (
            (seen["mean"]["theta"], "mean"),
            (1.0 / seen["variance"]["theta"], "precision"),
            (seen["momentum"]["theta"], "momentum"),
        ):
            follow(actual, recorded(case, field), RELATIVE[dtype], field)


def prior_and_site(case):
    """IVON with the case's prior and dual terms."""
    hyper = case["hyper"]
    ess, vector = hyper["ess"], lambda x: {"theta": np.array(x)}
    family = blr.families.get("gaussian_diagonal")
    mean0 = hyper["prior_mean"] or [0.0] * 3
    prior = blr.Distribution(
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
    options = {"weight_decay": kappa, "prior": prior * blr.Distribution(family, site)}
    if hyper["rescale_lr"]:
        # The official rate is rescaled by h_0 plus the prior's own precision, which is what
        # ours does when that precision is the weight decay and the rest an improper prior.
        linear = ess * (delta * np.array(mean0) + np.array(hyper["dual_mean"]))
        rest = ess * (kappa + np.array(hyper["dual_prec"]))
        natural = blr.families.GaussianNatural(vector(linear), vector(-0.5 * rest))
        options = {"weight_decay": vector(delta), "prior": blr.Distribution(family, natural)}
    return blr.ivon(hyper["lr"], **keywords(hyper, **options), init=blr.Distribution(family, init))
