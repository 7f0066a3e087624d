"""VOGN and OGN: the rule with squares of single examples, schedules, and arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_derivations import (
    assert_same_paths,
    by_rule,
    diagonal,
    minibatches,
    problem,
)
from tools import built_inside, run_steps

import blr_optax as blr

ESS, B2, PRIOR, INIT = 40.0, 0.9, 0.8, 12.0
STEPS = 20


def by_estimate(tx, loss):
    """(transformation, update) of the loop that VOGN's docstring shows."""

    def update(params, state, batch):
        est = blr.estimate(loss, state, params, *batch)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        return optax.apply_updates(params, updates), state

    return tx, update


def rule_of(loss, params, looks):
    """`blr_update` with the stated choices."""
    return by_rule(
        built_inside(
            lambda: blr.blr_update(
                "gaussian_diagonal",
                loss,
                1 - B2,
                ess=ESS,
                prior=diagonal(0 * params, PRIOR),
                init=diagonal(params, INIT),
                estimator=looks,
                step="plain",
                key=5,
            )
        )
    )


def keywords():
    return {"prior_precision": PRIOR, "init_precision": INIT, "b1": 0.0, "b2": B2}


@pytest.mark.parametrize("generator", ["hash", "jax"])
def test_vogn_is_the_rule_with_squares_of_examples(x64, generator):
    loss, params, batch = problem(11)
    looks = blr.estimators.monte_carlo(
        1, curvature=blr.estimators.per_example_squares(), generator=generator
    )
    tx = blr.vogn(1 - B2, ess=ESS, **keywords(), key=5, generator=generator)
    ways = by_estimate(tx, loss), rule_of(loss, params, looks)
    assert_same_paths(*ways, params, minibatches(batch), 1e-9, fused=generator == "hash")


def test_ogn_is_the_rule_with_the_delta_method(x64):
    loss, params, batch = problem(12)
    looks = blr.estimators.delta(blr.estimators.per_example_squares())
    tx = blr.ogn(1 - B2, ess=ESS, **keywords())
    ways = by_estimate(tx, loss), rule_of(loss, params, looks)
    assert_same_paths(*ways, params, minibatches(batch), 1e-9)


def test_full_gaussian_squares_are_the_mean_outer_product(x64):
    """The rule's matrix form, against per-example gradients one by one."""
    loss, params, (x, y) = problem(13)
    rule = blr.estimators.natural_gradient(
        "gaussian", loss, blr.estimators.delta(blr.estimators.per_example_squares())
    )

    @jax.jit
    def look(params, x, y):
        lam = blr.families.get("gaussian").natural(mean=params, precision=jnp.eye(len(params)))
        g = jax.vmap(lambda x, y: jax.grad(loss)(params, x[None], y[None]))(x, y)
        return rule(None, lam, x, y)[1].quadratic, g

    found, g = map(np.asarray, look(params, x, y))
    np.testing.assert_allclose(found, g.T @ g / len(x) / 2, rtol=1e-10)


def test_fixed_point_is_the_curvature_and_the_prior(x64):
    """At a fixed point the precision is ess * mean g_i^2 + prior_precision, at any temperature."""
    loss, params, batch = problem(14)

    @jax.jit
    def gradients(p):
        each = jax.vmap(lambda x, y: jax.grad(loss)(p, x[None], y[None]))(*batch)
        return each, jax.grad(loss)(p, *batch)

    for temperature in (1.0, 0.1):
        ess = len(batch[0]) / temperature
        tx = blr.ogn(0.1, ess=ess, prior_precision=PRIOR, b2=0.9)

        def step(carry, _, tx=tx):
            params, state = carry = by_estimate(tx, loss)[1](*carry, batch)
            return carry, (params, blr.posterior(state, params).variance)

        def start(params=params, tx=tx):
            return jnp.asarray(params), tx.init(jnp.asarray(params))

        params, variance = (x[-1] for x in run_steps(step, start, length=600)[1])
        each, mean = map(np.asarray, gradients(params))
        np.testing.assert_allclose(1 / variance, ess * np.mean(each**2, 0) + PRIOR, rtol=1e-3)
        np.testing.assert_allclose(mean + PRIOR / ess * params, 0, atol=1e-3)


def test_prior_stays_outside_the_average_under_a_schedule(x64):
    """s averages the squares alone: p = s + prior_precision / ess at the ess of the moment."""
    loss, params, batch = problem(15)
    ess = lambda count: 20.0 + 5.0 * count  # noqa: E731
    tx = blr.ogn(0.05, ess=ess, prior_precision=PRIOR, init_precision=INIT, b2=B2, damping=0.01)

    def start():
        return jnp.asarray(params), tx.init(jnp.asarray(params))

    def step(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, *batch)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = params + updates
        return (params, state), (est.statistic, blr.posterior(state, params).variance)

    s = (INIT - PRIOR) / ess(0) - 0.01
    _, seen = run_steps(step, start, length=STEPS)
    for t, (curvature, variance) in enumerate(zip(*seen, strict=True)):
        s = B2 * s + (1 - B2) * curvature
        expected = ess(t + 1) * (s + 0.01) + PRIOR
        np.testing.assert_allclose(1 / variance, expected, rtol=1e-10, err_msg=f"step {t}")


def test_ogn_looks_at_its_mean():
    params, tx = np.ones(3, np.float32), blr.ogn(0.1, ess=10.0)
    np.testing.assert_array_equal(jax.jit(lambda p: blr.sample(tx.init(p), p))(params), params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: blr.vogn(0.1, ess=-1.0), "ess=-1.0"),
        (lambda: blr.vogn(0.1, ess=10.0, b1=1.0), "b1=1.0"),
        (lambda: blr.vogn(0.1, ess=10.0, b2=-0.1), "b2=-0.1"),
        (lambda: blr.vogn(0.1, ess=10.0, damping=-1.0), "damping=-1.0"),
        (lambda: blr.vogn(0.1, ess=10.0, prior_precision=-1.0), "prior_precision=-1.0"),
        (
            lambda: blr.vogn(0.1, ess=10.0, init_precision=0.5),
            "init_precision=0.5 must be at least",
        ),
        (lambda: blr.vogn(0.1, ess=10.0, init_precision=0.0), "init_precision=0.0"),
        (lambda: blr.ogn(-0.1, ess=10.0), "learning_rate=-0.1"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_auxiliary_output_is_refused():
    params, tx = np.ones(2, np.float32), blr.vogn(0.1, ess=10.0)
    loss = lambda w, x: (jnp.mean(x @ w), 1.0)  # noqa: E731
    with pytest.raises(ValueError, match="has_aux"):
        state = jax.jit(tx.init)(params)
        blr.estimate(loss, state, params, np.ones((4, 2), np.float32), has_aux=True)


def test_partition_takes_squares_of_examples_where_they_are_asked_for(x64):
    """VOGN on one leaf, IVON on the other: each gets its own curvature."""
    loss = lambda w, x, y: jnp.mean((jnp.tanh(x @ w["a"]) * w["b"] - y) ** 2)  # noqa: E731
    x, y = np.random.default_rng(0).normal(size=(8, 3)), np.linspace(-1, 1, 8)
    tx = optax.partition(
        {"v": blr.vogn(0.1, ess=8.0), "i": blr.ivon(0.1, ess=8.0)}, {"a": "v", "b": "i"}
    )
    alone = optax.partition(
        {"v": optax.sgd(0.1), "i": blr.ivon(0.1, ess=8.0)}, {"a": "v", "b": "i"}
    )

    @jax.jit
    def look(params):
        state = tx.init(params)
        est, weights = blr.estimate(loss, state, params, x, y), blr.sample(state, params)
        squares = blr.per_example(loss, weights, x, y).sum_squares
        fixed = {"a": weights["a"], "b": params["b"]}
        other = blr.estimate(loss, alone.init(fixed), fixed, x, y)
        return est.statistic, squares["a"] / 8, other.statistic["b"]

    found, squares, other = look({"a": np.ones(3), "b": np.ones(())})
    np.testing.assert_allclose(found["a"], squares, rtol=1e-12)
    np.testing.assert_allclose(found["b"], other, rtol=1e-9)
