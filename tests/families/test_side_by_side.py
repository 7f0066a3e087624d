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


@pytest.mark.parametrize(
    ("rest", "family", "signs"),
    [
        (blr.bayesbinn(0.1, ess=10.0), blr.families.SideBySide, 2 * np.log(0.5)),
        (optax.sgd(0.1), blr.families.Pinned, 0.0),
    ],
)
def test_a_mixture_beside_signs_and_beside_points(rest, family, signs):
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
    assert isinstance(q.family, family)
    np.testing.assert_allclose(
        q.log_prob(draw), alone.log_prob({"b": draw["b"], "c": draw["c"]}) + signs, rtol=1e-5
    )


def test_parts_of_one_kind_are_merged_however_the_groups_are_cut():
    params = {**PARAMS, "c": jnp.zeros(2), "d": jnp.ones((2, 3))}
    signs, ivon, adam = blr.bayesbinn(0.1, ess=10.0), blr.ivon(0.1, ess=4.0), blr.adam(0.1)
    groups = {"s": signs, "i": ivon, "a": adam, "e": blr.evon(0.1, ess=4.0)}
    posteriors = []
    for labels in ("siia", "siie"):
        tx = optax.partition(groups, dict(zip("wbcd", labels, strict=True)))  # one without leaves
        posteriors.append(blr.posterior(tx.init(params), params))
    normals, merged = (q.family.families[0] for q in posteriors)
    assert [q.family.families[1] for q in posteriors] == [SIGNS, SIGNS]
    assert normals == NORMALS and isinstance(merged, blr.families.Rotated)
    for q in posteriors:
        assert jax.tree.map(jnp.shape, q.mean) == jax.tree.map(jnp.shape, params)
        alone = blr.posterior(ivon.init({"c": params["c"]}), {"c": params["c"]})
        np.testing.assert_array_equal(q.variance["c"], alone.variance["c"])
    whole = optax.partition(groups, {"w": "s", "b": "i", "c": "i", "d": "i"})
    assert posteriors[0].kl(blr.posterior(whole.init(params), params)) >= 0.0


def test_a_joint_posterior_is_the_prior_of_the_next_task():
    params = {**PARAMS, "scale": jnp.array(7.0)}
    tx = mixed(scale=optax.sgd(0.1))
    first = blr.posterior(tx.init(params), params)
    again = optax.partition(
        {
            "signs": blr.bayesbinn(0.1, ess=10.0, prior=first),
            "normals": blr.ivon(0.1, ess=4.0, prior=first, weight_decay=0.0),
            "scale": optax.sgd(0.1),
        },
        {"w": "signs", "b": "normals", "scale": "scale"},
    )
    state = again.init(params)
    np.testing.assert_array_equal(
        optax.tree.get(state, "inner_states")["signs"].inner_state[0].prior["w"], params["w"]
    )
    q = blr.posterior(state, params)
    np.testing.assert_array_equal(q.mean["w"], first.mean["w"])
    with pytest.raises(ValueError, match="mean-field Gaussian"):
        blr.ivon(
            0.1, ess=4.0, prior=blr.posterior(blr.bayesbinn(0.1, 1.0).init(PARAMS), PARAMS)
        ).init(PARAMS)


def test_points_and_conditional_parts_in_the_algebra():
    """Sums over the parts where these have them, the sentence of conditional families elsewhere."""
    state = optax.partition({"n": blr.ivon(0.1, 5.0), "p": optax.sgd(0.1)}, {"w": "n", "b": "p"})
    q = blr.posterior(state.init(PARAMS), PARAMS)
    np.testing.assert_allclose((q * q).variance["w"], q.variance["w"] / 2, rtol=1e-6)
    assert float((q * q).mean["b"][0]) == 3.0 and abs(float(q.kl(q))) < 1e-6
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    tx = optax.partition(
        {"d": blr.dropout(blr.sgd(0.1), 0.5), "n": blr.ivon(0.1, 5.0)}, {"w": "d", "b": "n"}
    )
    q = blr.posterior(tx.init(params), params)
    for call in (lambda: q * q, lambda: q.kl(q), q.entropy):
        with pytest.raises((ValueError, NotImplementedError), match=r"onditional|UnitMixture"):
            call()


def test_training_and_predicting():
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

    step = jax.jit(step)
    for _ in range(150):
        params, state = step(params, state)
    q = blr.posterior(state, params)
    draws = jax.jit(lambda q: q.sample(jax.random.key(1), (32,)))(q)
    assert set(np.abs(draws["w"]).ravel()) == {1.0}
    np.testing.assert_array_equal(np.sign(q.mean["w"]), [1.0, -1.0])
    assert abs(float(q.mean["b"][0]) - 0.5) < 0.1
    predictive = blr.predict_regression(
        jax.random.key(2), q, lambda p, x: x @ p["w"] + p["b"], x, samples=16
    )
    assert np.abs(predictive.mean - y).max() < 0.2 and np.all(predictive.epistemic > 0)
