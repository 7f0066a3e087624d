"""VOGN and OGN: the rule with squares of single examples, schedules, and arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_derivations import DIAGONAL, STEPS, assert_paths, minibatches, problem, run_blr

import blr_optax as blr

ESS, B2, PRIOR, INIT = 40.0, 0.9, 0.8, 12.0


def run_estimate(tx, loss, params, batches):
    """The loop that VOGN's docstring shows."""

    @jax.jit
    def step(state, params, batch):
        est = blr.estimate(loss, state, params, *batch)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        return optax.apply_updates(params, updates), state

    state, path = tx.init(params), []
    for batch in batches:
        params, state = step(state, params, batch)
        path.append((params, blr.posterior(state, params)))
    return path


def rule_of(loss, params, looks):
    """`blr_update` with the stated choices."""
    posterior = lambda precision: blr.Posterior(  # noqa: E731
        DIAGONAL, DIAGONAL.natural(mean=params, precision=precision)
    )
    prior = blr.Posterior(DIAGONAL, DIAGONAL.natural(mean=0 * params, precision=PRIOR))
    return blr.blr_update(
        "gaussian_diagonal", loss, 1 - B2, ess=ESS, prior=prior, init=posterior(INIT),
        estimator=looks, step="plain", key=5,
    )  # fmt: skip


def keywords():
    return {"prior_precision": PRIOR, "init_precision": INIT, "b1": 0.0, "b2": B2}


@pytest.mark.parametrize("generator", ["hash", "threefry"])
def test_vogn_is_the_rule_with_squares_of_examples(x64, generator):
    loss, params, batch = problem(11)
    looks = blr.estimators.monte_carlo(
        1, curvature=blr.estimators.per_example_squares(), generator=generator
    )
    tx = blr.vogn(1 - B2, ESS, **keywords(), key=5, generator=generator)
    batches = list(minibatches(batch))
    found = run_estimate(tx, loss, params, batches)
    assert_paths(found, run_blr(rule_of(loss, params, looks), params, batches), 1e-9)


def test_ogn_is_the_rule_with_the_delta_method(x64):
    loss, params, batch = problem(12)
    looks = blr.estimators.delta(blr.estimators.per_example_squares())
    tx = blr.ogn(1 - B2, ESS, **keywords())
    batches = list(minibatches(batch))
    found = run_estimate(tx, loss, params, batches)
    assert_paths(found, run_blr(rule_of(loss, params, looks), params, batches), 1e-9)


def test_full_gaussian_squares_are_the_mean_outer_product(x64):
    """The rule's matrix form, against per-example gradients one by one."""
    loss, params, (x, y) = problem(13)
    rule = blr.estimators.natural_gradient(
        "gaussian", loss, blr.estimators.delta(blr.estimators.per_example_squares())
    )
    lam = blr.families.get("gaussian").natural(mean=params, precision=jnp.eye(len(params)))
    _, found = rule(None, lam, x, y)
    g = jax.vmap(lambda x, y: jax.grad(loss)(params, x[None], y[None]))(x, y)
    np.testing.assert_allclose(found.quadratic, g.T @ g / len(x) / 2, rtol=1e-10)


def test_fixed_point_is_the_curvature_and_the_prior(x64):
    """At a fixed point the precision is ess * mean g_i^2 + prior_precision, at any temperature."""
    loss, params, batch = problem(14)
    for temperature in (1.0, 0.1):
        ess = len(batch[0]) / temperature
        tx = blr.ogn(0.1, ess, prior_precision=PRIOR, b2=0.9)
        (params, q) = run_estimate(tx, loss, params, [batch] * 600)[-1]
        g = jax.vmap(lambda x, y, p=params: jax.grad(loss)(p, x[None], y[None]))(*batch)
        np.testing.assert_allclose(1 / q.variance, ess * jnp.mean(g**2, 0) + PRIOR, rtol=1e-3)
        pull = jax.grad(loss)(params, *batch) + PRIOR / ess * params
        np.testing.assert_allclose(pull, 0, atol=1e-3)


def test_prior_stays_outside_the_average_under_a_schedule(x64):
    """s averages the squares alone: p = s + prior_precision / ess at the ess of the moment."""
    loss, params, batch = problem(15)
    ess = lambda count: 20.0 + 5.0 * count  # noqa: E731
    tx = blr.ogn(0.05, ess, prior_precision=PRIOR, init_precision=INIT, b2=B2, damping=0.01)
    state, s = tx.init(params), (INIT - PRIOR) / ess(0) - 0.01
    for t in range(STEPS):
        est = blr.estimate(loss, state, params, *batch)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        params = params + updates
        s = B2 * s + (1 - B2) * est.curvature
        precision = 1 / blr.posterior(state, params).variance
        expected = ess(t + 1) * (s + 0.01) + PRIOR
        np.testing.assert_allclose(precision, expected, rtol=1e-10)


def test_ogn_looks_at_its_mean():
    params, tx = jnp.ones(3), blr.ogn(0.1, 10.0)
    np.testing.assert_array_equal(blr.sample(tx.init(params), params), params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: blr.vogn(0.1, -1.0), "ess=-1.0"),
        (lambda: blr.vogn(0.1, 10.0, b1=1.0), "b1=1.0"),
        (lambda: blr.vogn(0.1, 10.0, b2=-0.1), "b2=-0.1"),
        (lambda: blr.vogn(0.1, 10.0, damping=-1.0), "damping=-1.0"),
        (lambda: blr.vogn(0.1, 10.0, prior_precision=-1.0), "prior_precision=-1.0"),
        (lambda: blr.vogn(0.1, 10.0, init_precision=0.5), "init_precision=0.5 must be at least"),
        (lambda: blr.vogn(0.1, 10.0, init_precision=0.0), "init_precision=0.0"),
        (lambda: blr.ogn(-0.1, 10.0), "learning_rate=-0.1"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_auxiliary_output_is_refused():
    params, tx = jnp.ones(2), blr.vogn(0.1, 10.0)
    loss = lambda w, x: (jnp.mean(x @ w), 1.0)  # noqa: E731
    with pytest.raises(ValueError, match="has_aux"):
        blr.estimate(loss, tx.init(params), params, jnp.ones((4, 2)), has_aux=True)


def test_partition_takes_squares_of_examples_where_they_are_asked_for(x64):
    """VOGN on one leaf, IVON on the other: each gets its own curvature."""
    loss = lambda w, x, y: jnp.mean((jnp.tanh(x @ w["a"]) * w["b"] - y) ** 2)  # noqa: E731
    params = {"a": jnp.ones(3), "b": jnp.ones(())}
    x, y = jax.random.normal(jax.random.key(0), (8, 3)), jnp.linspace(-1, 1, 8)
    tx = optax.partition({"v": blr.vogn(0.1, 8.0), "i": blr.ivon(0.1, 8.0)}, {"a": "v", "b": "i"})
    state = tx.init(params)
    est, weights = blr.estimate(loss, state, params, x, y), blr.sample(state, params)
    squares = blr.per_example(loss, weights, x, y).sum_squares
    np.testing.assert_allclose(est.curvature["a"], squares["a"] / 8, rtol=1e-12)
    alone = optax.partition({"v": optax.sgd(0.1), "i": blr.ivon(0.1, 8.0)}, {"a": "v", "b": "i"})
    fixed = {"a": weights["a"], "b": params["b"]}
    other = blr.estimate(loss, alone.init(fixed), fixed, x, y)
    np.testing.assert_allclose(est.curvature["b"], other.curvature["b"], rtol=1e-9)
