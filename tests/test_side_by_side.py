"""Posteriors of different families over parts of one network: signs, normals, a joint Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import blr_optax as blr

SIGNS = blr.families.MeanField(blr.families.get("rademacher"))
NORMALS = blr.families.get("gaussian_diagonal")
HOLE = optax.MaskedNode()

PARAMS = {"w": jnp.array([0.5, -1.0]), "b": jnp.array([3.0])}


def mixed(**others):
    """Signs for the weights, normals for the biases, and what `others` give to other leaves."""
    signs, normals = blr.bayesbinn(0.1, ess=10.0), blr.ivon(0.1, ess=4.0, hess_init=1.0)
    labels = {"w": "signs", "b": "normals", **{name: name for name in others}}
    return optax.partition({"signs": signs, "normals": normals, **others}, labels)


def test_signs_beside_normals(x64):
    params = jax.tree.map(lambda x: x.astype(float), PARAMS)
    tx = mixed()
    state = tx.init(params)
    q = blr.posterior(state, params)
    assert q.family == blr.families.SideBySide((NORMALS, SIGNS))
    biases = blr.posterior(optax.tree.get(state, "inner_states")["normals"], params)
    normal = stats.norm(3.0, np.sqrt(biases.variance["b"]))
    np.testing.assert_allclose(q.mean["w"], np.tanh(params["w"]), rtol=1e-12)
    np.testing.assert_allclose(q.mean["b"], 3.0, rtol=1e-12)
    np.testing.assert_allclose(q.variance["w"], 1 - np.tanh(params["w"]) ** 2, rtol=1e-12)
    np.testing.assert_array_equal(q.variance["b"], biases.variance["b"])
    up = 0.5 * (1 + np.tanh(np.asarray(params["w"])))
    entropy = stats.bernoulli(up).entropy().sum() + normal.entropy().sum()
    np.testing.assert_allclose(q.entropy(), entropy, rtol=1e-12)
    draw = q.sample(jax.random.key(0), (4, 3))
    assert jax.tree.map(jnp.shape, draw) == {"w": (4, 3, 2), "b": (4, 3, 1)}
    log_w = stats.bernoulli(up).logpmf(0.5 * (1 + np.asarray(draw["w"]))).sum(-1)
    log_b = normal.logpdf(draw["b"]).sum(-1)
    np.testing.assert_allclose(q.log_prob(draw), log_w + log_b, rtol=1e-12)


def test_algebra_is_that_of_the_parts(x64):
    state = mixed().init(PARAMS)
    q = blr.posterior(state, PARAMS)
    other = blr.posterior(state, jax.tree.map(lambda x: 0.5 * x, PARAMS))
    parts = [
        blr.Posterior(f, lam) for f, lam in zip(q.family.families, q.natural.parts, strict=True)
    ]
    others = [
        blr.Posterior(f, lam)
        for f, lam in zip(other.family.families, other.natural.parts, strict=True)
    ]
    kl = sum(a.kl(b) for a, b in zip(parts, others, strict=True))
    np.testing.assert_allclose(q.kl(other), kl, rtol=1e-12)
    assert kl > 0.1
    twice = (q * other / other) ** 2.0
    np.testing.assert_allclose(twice.mean["w"], np.tanh(2 * PARAMS["w"]), rtol=1e-6)
    np.testing.assert_allclose(twice.variance["b"], q.variance["b"] / 2, rtol=1e-12)
    assert bool(q.proper) and not bool((q / twice).proper)
    for one, part in zip(q.expectation(), parts, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, part.expectation())
    assert len(q.standard()["parts"]) == 2


def test_order_of_the_groups_does_not_matter():
    a, b = blr.bayesbinn(0.1, ess=10.0), blr.ivon(0.1, ess=4.0)
    found = [
        blr.posterior(optax.partition({"x": a, "y": b}, {"w": "x", "b": "y"}).init(PARAMS), PARAMS),
        blr.posterior(optax.partition({"x": b, "y": a}, {"w": "y", "b": "x"}).init(PARAMS), PARAMS),
    ]
    assert found[0].family == found[1].family
    jax.tree.map(np.testing.assert_array_equal, found[0].natural, found[1].natural)


def test_points_beside_both():
    params = {**PARAMS, "scale": jnp.array(7.0)}
    state = mixed(scale=optax.sgd(0.1)).init(params)
    q = blr.posterior(state, params)
    assert isinstance(q.family, blr.families.Pinned)
    assert float(q.mean["scale"]) == 7.0 and float(q.variance["scale"]) == 0.0
    draw = q.sample(jax.random.key(1), (5,))
    assert draw["scale"].shape == (5,) and set(np.abs(draw["w"]).ravel()) == {1.0}
    np.testing.assert_allclose(q.log_prob(draw), blr.Posterior(
        q.family.family, q.natural.free).log_prob({**draw, "scale": HOLE}), rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("rest", [blr.bayesbinn(0.1, ess=10.0), optax.sgd(0.1)])
def test_a_mixture_beside_signs_and_beside_points(rest):
    """A family whose log-density does not factorise over leaves or components."""
    params = {"w": jnp.zeros(2), "b": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "c": jnp.ones((2, 1))}
    labels = {"w": "rest", "b": "mixture", "c": "mixture"}
    mixture = blr.mixture_ivon(0.1, ess=10.0)
    tx = optax.partition({"rest": rest, "mixture": mixture}, labels)
    state = tx.init(params)
    q = blr.posterior(state, params)
    alone = mixture.init({"b": params["b"], "c": params["c"]})
    alone = blr.posterior(alone, {"b": params["b"], "c": params["c"]})
    for name in ("b", "c"):
        np.testing.assert_array_equal(q.mean[name], alone.mean[name])
        np.testing.assert_array_equal(q.variance[name], alone.variance[name])
    draw = q.sample(jax.random.key(0), (3,))
    assert jax.tree.map(jnp.shape, draw) == {"w": (3, 2), "b": (3, 2), "c": (3, 1)}
    signs = 2 * np.log(0.5) if "SideBySide" in type(q.family).__name__ else 0.0
    np.testing.assert_allclose(
        q.log_prob(draw), alone.log_prob({"b": draw["b"], "c": draw["c"]}) + signs, rtol=1e-5
    )


@pytest.mark.parametrize("jit", [False, True])
def test_training_and_predicting(jit):
    """A network of signs with Gaussian biases learns, and its predictions average over both."""
    x = jax.random.normal(jax.random.key(0), (64, 2))
    y = x @ jnp.array([1.0, -1.0]) + 0.5

    def loss(p, x, y):
        return 0.5 * jnp.mean((x @ p["w"] + p["b"] - y) ** 2)

    tx = optax.partition(
        {"signs": blr.bayesbinn(0.1, ess=64.0), "normals": blr.ivon(0.1, ess=64.0)},
        {"w": "signs", "b": "normals"},
    )
    params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
    state = tx.init(params)

    def step(params, state):
        est = blr.estimate(loss, state, params, x, y)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    for _ in range(150 if jit else 3):
        params, state = step(params, state)
    q = blr.posterior(state, params)
    draws = jax.jit(lambda q: q.sample(jax.random.key(1), (32,)))(q)
    assert set(np.abs(draws["w"]).ravel()) == {1.0}
    if jit:
        np.testing.assert_array_equal(np.sign(q.mean["w"]), [1.0, -1.0])
        assert abs(float(q.mean["b"][0]) - 0.5) < 0.1
        predictive = blr.predict_regression(
            jax.random.key(2), q, lambda p, x: x @ p["w"] + p["b"], x, samples=16
        )
        assert np.abs(predictive.mean - y).max() < 0.2 and np.all(predictive.epistemic > 0)
