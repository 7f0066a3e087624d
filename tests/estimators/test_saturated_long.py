"""Estimators at the ends: signs, bits and labels that are certain to their last digit.

There a draw says nothing, F(lambda) has no inverse in floating point, and only the prior moves
lambda; members that are not certain learn as if the others were not there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr
from blr_optax import estimators, families

TARGET = np.array([1.0, 0.0, 1.0, 0.0])
WEIGHT = np.array([1.0, 0.05, 0.05, 0.05])
# From values of the loss alone, and from its gradient.
DRAWN = {
    "score_function": estimators.score_function(100),
    "least_squares": estimators.least_squares(100),
    "concrete": estimators.concrete(0.5),
}


def bits_loss(z):
    """Exact logits under a flat prior: ess * weight * (2 target - 1)."""
    return jnp.sum(WEIGHT * (z - TARGET) ** 2)


def learn(tx, params, steps):
    """Params, state, and the share of the last steps in which each number was on the right side."""

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(None, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)

    (params, state), path = run(params)
    return np.asarray(params), state, jax.tree.map(np.asarray, path)


def test_enumeration_finds_the_exact_logits():
    prior = blr.distribution("bernoulli", logit=0.0)
    tx = blr.blr_update(
        "bernoulli", bits_loss, 0.1, ess=1000.0, prior=prior, estimator=estimators.enumeration()
    )
    _, state, _ = learn(tx, jnp.full(4, 0.5), 200)
    np.testing.assert_allclose(state.natural.linear, 1000 * WEIGHT * (2 * TARGET - 1), rtol=1e-6)


@pytest.mark.parametrize("estimator", DRAWN)
@pytest.mark.parametrize("name", ["bernoulli", "rademacher"])
def test_a_certain_bit_does_not_hold_the_others(name, estimator):
    low = 0.0 if name == "bernoulli" else -1.0
    prior = blr.distribution(name, logit=0.0)
    tx = blr.blr_update(
        name,
        lambda z: bits_loss((z - low) / (1.0 - low)),
        0.1,
        ess=1000.0,
        prior=prior,
        estimator=DRAWN[estimator],
    )
    _, state, path = learn(tx, jnp.full(4, (1.0 + low) / 2), 200)
    right = (path > (1.0 + low) / 2) == (TARGET > 0.5)
    assert state.skipped == 0 and right[20:].mean(axis=0).min() > 0.95
    # Logits are of the size of the exact ones, never of that of rounding.
    assert np.abs(state.natural.linear).max() < 1e4


@pytest.mark.parametrize("estimator", DRAWN)
@pytest.mark.parametrize("logit", [40.0, 120.0, 1e4, -1e4])
def test_a_bit_that_starts_certain_moves_by_its_prior_and_the_others_learn(estimator, logit):
    family = families.MeanField("bernoulli")
    first = blr.Distribution(family, family.natural(logit=jnp.array([logit, 0.3])))
    prior = blr.distribution("bernoulli", logit=0.0)
    tx = blr.blr_update(
        "bernoulli",
        lambda z: 2.0 * z[0] - z[1],
        0.25,
        prior=prior,
        init=first,
        estimator=DRAWN[estimator],
    )
    _, state, _ = learn(tx, first.mean, 1)
    assert state.skipped == 0
    # (1 - rho) lambda: the draws are all equal.
    np.testing.assert_allclose(state.natural.linear[0], 0.75 * logit, rtol=1e-5)
    assert state.natural.linear[1] > 0.225  # and this one's natural gradient is -1, about


@pytest.mark.parametrize("estimator", ["score_function", "least_squares", "concrete"])
def test_a_certain_label_does_not_hold_the_others(estimator):
    family = families.get("categorical")
    logits = np.array([[200.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    first = blr.Distribution(family, family.natural(logits=logits))
    prior = blr.Distribution(family, family.natural(logits=np.zeros((2, 3))))

    def loss(theta):  # labels, or points of the simplex
        hot = theta if theta.ndim == 2 else jax.nn.one_hot(theta, 3)
        return jnp.sum(hot[:, 2]) - jnp.sum(hot[:, 0])

    tx = blr.blr_update(family, loss, 0.25, prior=prior, init=first, estimator=DRAWN[estimator])
    _, state, _ = learn(tx, jnp.asarray(first.mean), 1)
    assert state.skipped == 0 and np.isfinite(state.natural.linear).all()
    np.testing.assert_allclose(state.natural.linear[0], [150.0, 0.0], atol=2.0)
    assert (np.asarray(state.natural.linear[1]) != [0.5, 0.0]).any()


@pytest.mark.parametrize("estimator", ["score_function", "least_squares"])
def test_certain_counts_move_by_their_prior(estimator):
    family = families.get("multinomial")
    lam = family.natural(logits=np.array([150.0, 0.0, 0.0]), total=np.array(5.0))
    prior = family.natural(logits=np.zeros(3), total=np.array(5.0))
    tx = blr.blr_update(
        family,
        lambda x: x[1],
        0.25,
        prior=blr.Distribution(family, prior),
        init=blr.Distribution(family, lam),
        estimator=DRAWN[estimator],
    )
    _, state, _ = learn(tx, family.mean(lam), 1)
    assert state.skipped == 0
    np.testing.assert_allclose(state.natural.linear[0], 0.75 * 150.0, rtol=0.05)


def test_a_certain_factor_of_a_product_does_not_hold_the_others():
    family = families.Product({"bit": "bernoulli", "rate": "gamma"})
    lam = family.natural(bit={"logit": 300.0}, rate={"concentration": 3.0, "rate": 2.0})
    q = blr.Distribution(family, lam)
    tx = blr.blr_update(
        family,
        lambda t: t["bit"] + t["rate"],
        0.25,
        prior=q,
        estimator=estimators.score_function(50),
    )
    params = jax.tree.map(jnp.asarray, q.mean)
    updates, state = jax.jit(lambda s, p: tx.update(None, s, p))(tx.init(params), params)
    assert state.skipped == 0 and updates["bit"] == 0.0
    assert updates["rate"] < 0.0  # E[loss] falls with the rate's mean


@pytest.mark.parametrize("floor", [1e-10, 0.0])
def test_bayesbinn_learns_beside_a_sign_that_is_certain(floor):
    tx = blr.bayesbinn(0.1, ess=10.0, floor=floor)
    params = jnp.array([60.0, 0.1])
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda w: jnp.sum(w))(blr.sample(state, params))
        return tx.update(grads, state, params)

    updates, state = step(params, state)
    assert sum(getattr(s, "skipped", 0) for s in state) == 0 and np.isfinite(updates).all()
    assert updates[1] < 0.0
