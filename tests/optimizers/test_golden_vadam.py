"""Vadam and Vprop against recorded trajectories of the official code, and against the rule."""

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
    if case["algorithm"] in ("Vadam", "Vprop")
]
DIAGONAL = blr.families.get("gaussian_diagonal")


def transformation(case):
    hyper = case["hyper"]
    common = {"prior_precision": hyper["prior_prec"], "init_precision": hyper["prec_init"]}
    if case["algorithm"] == "Vprop":
        return blr.vprop(hyper["lr"], hyper["train_set_size"], b2=hyper["beta"], **common)
    b1, b2 = hyper["betas"]
    return blr.vadam(hyper["lr"], hyper["train_set_size"], b1=b1, b2=b2, **common)


@pytest.mark.parametrize(("file", "case"), CASES)
def test_vadam_repository(x64, file, case):
    """Means, gradients' averages and precisions of every step, to 1e-9."""
    problem = load_golden(file)["problem"]
    names, shapes = problem["leaf_names"], problem["leaf_shapes"]
    tx, loss = transformation(case), problem_loss(problem)
    params = unflatten(case["init_mean"], names, shapes)
    state = tx.init(params)

    @jax.jit
    def advance(params, state, noise, batch):
        est = blr.estimate(
            lambda w: loss(w, batch),
            state,
            params,
            noise=noise,
            samples=len(case["steps"][0]["eps"]),
        )
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        return optax.apply_updates(params, updates), state, est

    for step in case["steps"]:
        noise = unflatten(step["eps"], names, shapes)
        params, state, est = advance(params, state, noise, jnp.array(step["batch"]))
        follows(flatten(est.grad, names), np.mean(step["grad"], 0), 1e-9, "gradient")
        follows(flatten(params, names), step["mean"], 1e-9, "mean")
        q = blr.posterior(state, params)
        precision = flatten(jax.tree.map(lambda v: 1 / v, q.variance), names)
        follows(precision, step["precision"], 1e-9, "precision")


def test_vprop_is_the_rule_with_squares_up_to_the_root(x64):
    """On linear losses the precision is that of `blr_update`, and the steps differ by the root."""
    rho, alpha, ess, prior = 0.1, 0.01, 5.0, 2.0
    gradients = jax.random.normal(jax.random.key(3), (20, 3))
    params = jnp.zeros(3)
    tx = blr.vprop(alpha, ess, prior_precision=prior, init_precision=7.0, b2=1 - rho)
    rule = blr.blr_update(
        "gaussian_diagonal",
        lambda w, g: w @ g,
        rho,
        ess=ess,
        prior=blr.Posterior(DIAGONAL, DIAGONAL.natural(mean=params, precision=jnp.full(3, prior))),
        init=blr.Posterior(DIAGONAL, DIAGONAL.natural(mean=params, precision=jnp.full(3, 7.0))),
        estimator=blr.estimators.monte_carlo(1, curvature=blr.estimators.squared_gradient(1)),
        step="plain",
    )
    state, state_rule = tx.init(params), rule.init(params)
    a = b = params
    for g in gradients:
        before = a
        step, state = tx.update(g, state, a)
        step_rule, state_rule = rule.update(None, state_rule, b, batch=(g,))
        a, b = a + step, b + step_rule
        total = 1 / blr.posterior(state_rule, b).variance
        np.testing.assert_allclose(1 / blr.posterior(state, a).variance, total, rtol=1e-12)
        root = np.sqrt((total - prior) / ess) + prior / ess
        np.testing.assert_allclose(step, -alpha * (g + prior / ess * before) / root, rtol=1e-9)


def test_batch_size_undoes_the_shrinkage(x64):
    """Near an optimum B g^2 has the mean of the squares of single examples."""
    x = jax.random.normal(jax.random.key(0), (400, 8, 3))
    loss = lambda w, x: jnp.mean(x @ w)  # noqa: E731  # its gradients have mean zero
    params = jnp.zeros(3)

    def curvature(batch_size):
        tx = blr.vadam(0.0, 1.0, b2=0.0, prior_precision=1e-9, init_precision=1.0,
                       batch_size=batch_size)  # fmt: skip
        state = tx.init(params)
        step = lambda batch: tx.update(jax.grad(loss)(params, batch), state, params)[1]  # noqa: E731
        return jnp.mean(jax.vmap(lambda b: 1 / blr.posterior(step(b), params).variance)(x), 0)

    np.testing.assert_allclose(curvature(8), 1.0, atol=0.3)
    np.testing.assert_allclose(curvature(8), 8 * curvature(1), rtol=1e-5)


def test_a_first_precision_below_the_priors_is_refused():
    for make in (blr.vadam, blr.vprop):
        with pytest.raises(ValueError, match="must be at least prior_precision"):
            make(0.1, 10.0, prior_precision=2.0, init_precision=1.0)
        with pytest.raises(ValueError, match="prior_precision"):
            make(0.1, 10.0, prior_precision=0.0)
