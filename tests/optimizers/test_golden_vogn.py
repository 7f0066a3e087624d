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
from replay import flatten, follows, problem_loss, unflatten
from tools import load_golden

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


def rows_of(problem, step):
    index = np.asarray(step["batch"])
    return jnp.array(problem["X"])[index], jnp.array(problem["y"])[index]


def start(problem, case):
    return unflatten(case["init_mean"], problem["leaf_names"], problem["leaf_shapes"])


def total_precision(state, params):
    q = blr.posterior(state, params)
    return jax.tree.map(lambda v: 1 / v, q.variance)


def test_data_loss_is_the_recorded_loss(x64):
    """The two spellings of the golden losses agree, on rows and on indices."""
    for file in FILES:
        golden = load_golden(file)
        problem, case = golden["problem"], golden["cases"][0]
        params, step = start(problem, case), case["steps"][0]
        by_index = problem_loss(problem)(params, jnp.array(step["batch"]))
        np.testing.assert_allclose(data_loss(problem)(params, *rows_of(problem, step)), by_index)


@pytest.mark.parametrize(("file", "case"), CASES)
def test_vadam_repository(x64, file, case):
    """P <- b P + (1 - b)(N h + p0);  m <- m - lr (N g + p0 m) / P, to 1e-9."""
    problem, hyper = load_golden(file)["problem"], case["hyper"]
    names, shapes = problem["leaf_names"], problem["leaf_shapes"]
    tx = blr.vogn(
        hyper["lr"],
        ess=hyper["train_set_size"],
        prior_precision=hyper["prior_prec"],
        init_precision=hyper["prec_init"],
        b1=0.0,
        b2=hyper["beta"],
    )
    params, loss = start(problem, case), data_loss(problem)
    state = tx.init(params)

    @jax.jit
    def advance(params, state, noise, x, y):
        est = blr.estimate(loss, state, params, x, y, noise=noise)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        return optax.apply_updates(params, updates), state, est

    for step in case["steps"]:
        noise = unflatten(step["eps"], names, shapes)
        params, state, est = advance(params, state, noise, *rows_of(problem, step))
        follows(flatten(est.curvature, names), np.mean(step["ggn"], 0), 1e-9, "squares")
        follows(flatten(est.grad, names), np.mean(step["grad"], 0), 1e-9, "gradient")
        follows(flatten(params, names), step["mean"], 1e-9, "mean")
        follows(
            flatten(total_precision(state, params), names), step["precision"], 1e-9, "precision"
        )


def sso_transformation(case, momentum):
    """Our parts in the order of pytorch-sso: its numbers are weights of the new value."""
    hyper, curv = case["hyper"], case["hyper"]["curv"]
    n = hyper["dataset_size"]
    return optax.chain(
        blr.scale_by_precision(
            n,
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
    names, shapes = problem["leaf_names"], problem["leaf_shapes"]
    tx, params = sso_transformation(case, momentum(case["hyper"])), start(problem, case)
    state, n = tx.init(params), case["hyper"]["dataset_size"]
    for step in case["steps"]:
        est = blr.estimate(
            data_loss(problem), state, params, *rows_of(problem, step),
            noise=unflatten(step["eps"], names, shapes),
        )  # fmt: skip
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        params = optax.apply_updates(params, updates)
        follows(flatten(params, names), step["mean"], 1e-9, "mean")
        precision = flatten(total_precision(state, params), names)
        follows(precision, n / np.asarray(step["std"]) ** 2, 1e-9, "precision")
