"""Vadam and Vprop against recorded trajectories of the official code, and against the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import (
    flatten,
    follow,
    noise_and_batches,
    problem_loss,
    recorded,
    start_of,
    unflatten,
)
from tools import load_golden, run_steps

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
        return blr.vprop(hyper["lr"], ess=hyper["train_set_size"], b2=hyper["beta"], **common)
    b1, b2 = hyper["betas"]
    return blr.vadam(hyper["lr"], ess=hyper["train_set_size"], b1=b1, b2=b2, **common)


@pytest.mark.parametrize(("file", "case"), CASES)
def test_vadam_repository(x64, file, case):
    """Means, gradients' averages and precisions of every step, to 1e-9."""
    problem = load_golden(file)["problem"]
    names, shapes = problem["leaf_names"], problem["leaf_shapes"]
    tx, loss = transformation(case), problem_loss(problem)

    def step(carry, given):
        (params, state), (noise, batch) = carry, given
        est = blr.estimate(
            lambda w: loss(w, batch),
            state,
            params,
            noise=noise,
            samples=len(case["steps"][0]["eps"]),
        )
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = optax.apply_updates(params, updates)
        return (params, state), (est.grad, params, blr.posterior(state, params).variance)

    params = unflatten(case["init_mean"], names, shapes)
    given = noise_and_batches(case, names, shapes)
    _, (gradient, mean, variance) = run_steps(step, start_of(tx, params), given)
    wanted = [np.mean(one["grad"], 0) for one in case["steps"]]
    follow(flatten(gradient, names), wanted, 1e-9, "gradient")
    follow(flatten(mean, names), recorded(case, "mean"), 1e-9, "mean")
    follow(1 / flatten(variance, names), recorded(case, "precision"), 1e-9, "precision")


def test_vprop_is_the_rule_with_squares_up_to_the_root(x64):
    """On linear losses the precision is that of `blr_update`, and the steps differ by the root."""
    rho, alpha, ess, prior = 0.1, 0.01, 5.0, 2.0
    gradients = np.random.default_rng(3).normal(size=(20, 3))

    def both(params):
        tx = blr.vprop(alpha, ess=ess, prior_precision=prior, init_precision=7.0, b2=1 - rho)
        flat = lambda x: DIAGONAL.natural(mean=params, precision=jnp.full(3, x))  # noqa: E731
        rule = blr.blr_update(
            "gaussian_diagonal",
            lambda w, g: w @ g,
            rho,
            ess=ess,
            prior=blr.Distribution(DIAGONAL, flat(prior)),
            init=blr.Distribution(DIAGONAL, flat(7.0)),
            estimator=blr.estimators.monte_carlo(1, curvature=blr.estimators.squared_gradient(1)),
            step="plain",
        )
        return tx, rule

    def start():
        params = jnp.zeros(3)
        tx, rule = both(params)
        return params, tx.init(params), params, rule.init(params)

    def step(carry, g):
        a, state, b, state_rule = carry
        tx, rule = both(jnp.zeros(3))
        step, state = tx.update(g, state, a)
        step_rule, state_rule = rule.update(None, state_rule, b, batch=(g,))
        before, a, b = a, a + step, b + step_rule
        variances = [blr.posterior(s, m).variance for s, m in ((state, a), (state_rule, b))]
        return (a, state, b, state_rule), (before, step, *variances)

    _, (before, made, variance, variance_rule) = run_steps(step, start, gradients)
    total = 1 / variance_rule
    np.testing.assert_allclose(1 / variance, total, rtol=1e-12)
    root = np.sqrt((total - prior) / ess) + prior / ess
    wanted = -alpha * (gradients + prior / ess * before) / root
    np.testing.assert_allclose(made, wanted, rtol=1e-9)


def test_batch_size_undoes_the_shrinkage(x64):
    """Near an optimum B g^2 has the mean of the squares of single examples."""
    x = np.random.default_rng(0).normal(size=(400, 8, 3))
    loss = lambda w, x: jnp.mean(x @ w)  # noqa: E731  # its gradients have mean zero

    @jax.jit
    def curvature(x):
        params, found = jnp.zeros(3), []
        for batch_size in (8, 1):
            tx = blr.vadam(0.0, ess=1.0, b2=0.0, prior_precision=1e-9, init_precision=1.0,
                           batch_size=batch_size)  # fmt: skip
            state = tx.init(params)
            step = lambda b, tx=tx, s=state: tx.update(jax.grad(loss)(params, b), s, params)[1]  # noqa: E731
            precision = jax.vmap(lambda b, step=step: 1 / blr.posterior(step(b), params).variance)
            found.append(jnp.mean(precision(x), 0))
        return found

    of_eight, of_one = map(np.asarray, curvature(x))
    np.testing.assert_allclose(of_eight, 1.0, atol=0.3)
    np.testing.assert_allclose(of_eight, 8 * of_one, rtol=1e-5)


def test_a_first_precision_below_the_priors_is_refused():
    for make in (blr.vadam, blr.vprop):
        with pytest.raises(ValueError, match="must be at least prior_precision"):
            make(0.1, ess=10.0, prior_precision=2.0, init_precision=1.0)
        with pytest.raises(ValueError, match="prior_precision"):
            make(0.1, ess=10.0, prior_precision=0.0)
