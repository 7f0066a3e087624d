"""VOGN against recorded trajectories of the official codes, through the public API.

The canonical form (`vogn`) is that of the repository `vadam` without momentum, and that of
pytorch-sso with an average or a sum of gradients. Where pytorch-sso does something else, the test
says what and checks the difference.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import flatten, follow, problem_loss, recorded, start_of, unflatten
from tools import load_golden, run_steps

import blr_optax as blr

FILES = ("vadam_vprop_vogn_logreg", "vadam_vogn_mlp")
CASES = [
    pytest.param(file, case, id=f"{file}-{case['name']}")
    for file in FILES
    for case in load_golden(file)["cases"]
    if case["algorithm"] == "VOGN"
]
SSO = {case["name"]: case for case in load_golden("vogn_dlwithbayes_mlp")["cases"]}


def data_loss(problem):
    """loss(theta, x, y) on the rows themselves, as `per_example` needs them."""
    if "X" not in problem:
        raise AssertionError("a problem with data is needed")
    if problem["leaf_names"] == ["theta"]:

        def logistic(w, x, y):
            z = x @ w["theta"]
            return jnp.mean(jax.nn.softplus(z) - y * z)

        return logistic

    def mlp(w, x, y):
        logits = jnp.tanh(x @ w["W1"].T + w["b1"]) @ w["W2"].T + w["b2"]
        chosen = jnp.take_along_axis(logits, y[:, None].astype(int), axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    return mlp


def given(problem, case):
    """What `estimate` gets at every step: the recorded noise, and the rows of the batch.

    Draws of zero in a first step where the official code has no scale yet.
    """
    names, shapes = problem["leaf_names"], problem["leaf_shapes"]
    none = np.zeros_like(case["steps"][-1]["eps"])
    noise = np.array([step["eps"] or none for step in case["steps"]])
    index = recorded(case, "batch")
    x, y = np.array(problem["X"])[index], np.array(problem["y"])[index]
    return unflatten(noise, names, shapes), x, y


def average(case, name):
    """The mean over the samples of one entry of every step."""
    return [np.mean(step[name], 0) for step in case["steps"]]


def start(problem, case):
    return unflatten(case["init_mean"], problem["leaf_names"], problem["leaf_shapes"])


def total_precision(state, params):
    q = blr.posterior(state, params)
    return jax.tree.map(lambda v: 1 / v, q.variance)


def step_of(tx, loss):
    """One step on recorded noise and rows, and what is compared of it."""

    def step(carry, given):
        (params, state), (noise, x, y) = carry, given
        est = blr.estimate(loss, state, params, x, y, noise=noise)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = optax.apply_updates(params, updates)
        return (params, state), (est, params, total_precision(state, params))

    return step


def test_data_loss_is_the_recorded_loss(x64):
    """The two spellings of the golden losses agree, on rows and on indices."""
    for file in FILES:
        golden = load_golden(file)
        problem, case = golden["problem"], golden["cases"][0]
        params, (_, x, y) = start(problem, case), given(problem, case)
        both = jax.jit(
            lambda p, index, x, y, problem=problem: (
                problem_loss(problem)(p, index),
                data_loss(problem)(p, x, y),
            )
        )
        by_index, by_rows = both(params, recorded(case, "batch")[0], x[0], y[0])
        np.testing.assert_allclose(by_rows, by_index)


@pytest.mark.parametrize(("file", "case"), CASES)
def test_vadam_repository(x64, file, case):
    """P <- b P + (1 - b)(N h + p0);  m <- m - lr (N g + p0 m) / P, to 1e-9."""
    problem, hyper = load_golden(file)["problem"], case["hyper"]
    names = problem["leaf_names"]
    tx = blr.vogn(
        hyper["lr"],
        ess=hyper["train_set_size"],
        prior_precision=hyper["prior_prec"],
        init_precision=hyper["prec_init"],
        b1=0.0,
        b2=hyper["beta"],
    )
    _, (est, mean, precision) = run_steps(
        step_of(tx, data_loss(problem)), start_of(tx, start(problem, case)), given(problem, case)
    )
    follow(flatten(est.statistic, names), average(case, "ggn"), 1e-9, "squares")
    follow(flatten(est.grad, names), average(case, "grad"), 1e-9, "gradient")
    follow(flatten(mean, names), recorded(case, "mean"), 1e-9, "mean")
    follow(flatten(precision, names), recorded(case, "precision"), 1e-9, "precision")


def sso_transformation(case, momentum):
    """Our parts in the order of pytorch-sso: its numbers are weights of the new value."""
    hyper, curv = case["hyper"], case["hyper"]["curv"]
    n = hyper["dataset_size"]
    return optax.chain(
        blr.scale_by_precision(
            ess=n,
            b2=1 - curv["ema_decay"],
            hess_init=hyper["init_precision"] - 1 / (n * hyper["prior_variance"]),
            weight_decay=1 / (n * hyper["prior_variance"]),
            damping=curv["damping"],
            momentum=momentum,
            prior_in_momentum=True,
            step="plain",
            curvature=blr.estimators.per_example_squares(),
        ),
        optax.scale_by_learning_rate(hyper["lr"]),
    )


@pytest.mark.parametrize(
    ("name", "momentum"),
    [
        ("grad_ema_init_precision", lambda h: optax.ema(1 - h["grad_ema_decay"], debias=False)),
        ("heavy_ball_raw", lambda h: optax.trace(h["momentum"])),
    ],
)
def test_pytorch_sso(x64, name, momentum):
    """Both averages of the gradient, the prior inside it, damping: to 1e-9."""
    problem, case = load_golden("vogn_dlwithbayes_mlp")["problem"], SSO[name]
    names, n = problem["leaf_names"], case["hyper"]["dataset_size"]
    tx = sso_transformation(case, momentum(case["hyper"]))
    _, (_, mean, precision) = run_steps(
        step_of(tx, data_loss(problem)), start_of(tx, start(problem, case)), given(problem, case)
    )
    follow(flatten(mean, names), recorded(case, "mean"), 1e-9, "mean")
    follow(flatten(precision, names), n / recorded(case, "std") ** 2, 1e-9, "precision")
