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
POINTS = blr.families.MeanField(blr.families.Point())
HOLE = optax.MaskedNode()

PARAMS = {"w": np.array([0.5, -1.0], np.float32), "b": np.array([3.0], np.float32)}


def holes(tree, kept):
    """The tree with holes for all leaves but one."""
    return {name: leaf if name == kept else HOLE for name, leaf in tree.items()}


def started(tx, params):
    """The first state of a transformation and its posterior, in one program."""

    def start(params):
        state = tx.init(params)
        return state, blr.posterior(state, params)

    return jax.jit(start)(params)


def said(ask, *posteriors):
    """What posteriors say, in one program and in numpy."""
    return jax.tree.map(np.asarray, jax.jit(ask)(*posteriors))


def mixed(**others):
    """Signs for the weights, normals for the biases, and what `others` give to other leaves."""
    signs, normals = blr.bayesbinn(0.1, ess=10.0), blr.ivon(0.1, ess=4.0, hess_init=1.0)
    labels = {"w": "signs", "b": "normals", **{name: name for name in others}}
    return optax.partition({"signs": signs, "normals": normals, **others}, labels)


def test_signs_beside_normals(x64):
    params = jax.tree.map(lambda x: x.astype(float), PARAMS)
    state, q = started(mixed(), params)
    assert q.family == blr.families.SideBySide((NORMALS, SIGNS))
    biases = blr.posterior(optax.tree.get(state, "inner_states")["normals"], params)

    def ask(q, biases):
        draw = q.sample(jax.random.key(0), (4, 3))
        return q.mean, q.variance, q.entropy(), draw, q.log_prob(draw), biases.variance["b"]

    mean, variance, found, draw, log_q, spread = said(ask, q, biases)
    normal = stats.norm(3.0, np.sqrt(spread))
    np.testing.assert_allclose(mean["w"], np.tanh(params["w"]), rtol=1e-12)
    np.testing.assert_allclose(mean["b"], 3.0, rtol=1e-12)
    np.testing.assert_allclose(variance["w"], 1 - np.tanh(params["w"]) ** 2, rtol=1e-12)
    np.testing.assert_array_equal(variance["b"], spread)
    up = 0.5 * (1 + np.tanh(params["w"]))
    entropy = stats.bernoulli(up).entropy().sum() + normal.entropy().sum()
    np.testing.assert_allclose(found, entropy, rtol=1e-12)
    assert jax.tree.map(np.shape, draw) == {"w": (4, 3, 2), "b": (4, 3, 1)}
    log_w = stats.bernoulli(up).logpmf(0.5 * (1 + draw["w"])).sum(-1)
    log_b = normal.logpdf(draw["b"]).sum(-1)
    np.testing.assert_allclose(log_q, log_w + log_b, rtol=1e-12)


def test_algebra_is_that_of_the_parts(x64):
    state, q = started(mixed(), PARAMS)
    half = jax.tree.map(lambda x: 0.5 * x, PARAMS)
    other = jax.jit(blr.posterior)(state, half)

    def parts_of(q):
        parts = zip(q.family.families, q.natural.parts, strict=True)
        return [blr.Distribution(f, lam) for f, lam in parts]

    def ask(q, other):
        parts = parts_of(q)
        kl = sum(a.kl(b) for a, b in zip(parts, parts_of(other), strict=True))
        twice = (q * other / other) ** 2.0
        proper = q.proper, (q / twice).proper
        mus = q.expectation(), [part.expectation() for part in parts]
        return (
            (q.kl(other), kl),
            (q.variance, twice.mean, twice.variance),
            proper,
            mus,
            q.standard(),
        )

    kls, (variance, mean, halved), proper, (mu, mus), standard = said(ask, q, other)
    np.testing.assert_allclose(*kls, rtol=1e-12)
    assert kls[1] > 0.1
    np.testing.assert_allclose(mean["w"], np.tanh(2 * PARAMS["w"]), rtol=1e-6)
    np.testing.assert_allclose(halved["b"], variance["b"] / 2, rtol=1e-12)
    assert bool(proper[0]) and not bool(proper[1])
    for one, part in zip(mu.parts, mus, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, part)
    assert len(standard["parts"]) == 2


def test_order_of_the_groups_does_not_matter():
    a, b = blr.bayesbinn(0.1, ess=10.0), blr.ivon(0.1, ess=4.0)
    found = [
        started(optax.partition({"x": a, "y": b}, {"w": "x", "b": "y"}), PARAMS)[1],
        started(optax.partition({"x": b, "y": a}, {"w": "y", "b": "x"}), PARAMS)[1],
    ]
    assert found[0].family == found[1].family
    jax.tree.map(np.testing.assert_array_equal, found[0].natural, found[1].natural)


def test_points_beside_both():
    params = {**PARAMS, "scale": np.float32(7.0)}
    _, q = started(mixed(scale=optax.sgd(0.1)), params)
    assert q.family == blr.families.SideBySide((NORMALS, SIGNS, POINTS))

    def ask(q):
        draw = q.sample(jax.random.key(1), (5,))
        normals, signs = (
            blr.Distribution(*pair)
            for pair in zip(q.family.families[:2], q.natural.parts[:2], strict=True)
        )
        log_w, log_b = signs.log_prob(holes(draw, "w")), normals.log_prob(holes(draw, "b"))
        log_q = q.log_prob(draw), log_w + log_b
        return q.mean, q.variance, draw, log_q

    mean, variance, draw, log_q = said(ask, q)
    assert float(mean["scale"]) == 7.0 and float(variance["scale"]) == 0.0
    assert draw["scale"].shape == (5,) and set(np.abs(draw["w"]).ravel()) == {1.0}
    np.testing.assert_allclose(*log_q, rtol=1e-6)


@pytest.mark.parametrize(
    ("rest", "family", "signs"),
    [
        (blr.bayesbinn(0.1, ess=10.0), SIGNS, 2 * np.log(0.5)),
        (optax.sgd(0.1), POINTS, 0.0),
    ],
)
def test_a_mixture_beside_signs_and_beside_points(rest, family, signs):
    """A family whose log-density does not factorise over leaves or components."""
    b, ones = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), np.ones((2, 1), np.float32)
    params = {"w": np.zeros(2, np.float32), "b": b, "c": ones}
    labels = {"w": "rest", "b": "mixture", "c": "mixture"}
    mixture = blr.mixture_ivon(0.1, ess=10.0)
    _, q = started(optax.partition({"rest": rest, "mixture": mixture}, labels), params)
    _, alone = started(mixture, {"b": b, "c": ones})

    def ask(q, alone):
        draw = q.sample(jax.random.key(0), (3,))
        log_q = q.log_prob(draw), alone.log_prob({"b": draw["b"], "c": draw["c"]})
        return (q.mean, alone.mean), (q.variance, alone.variance), draw, log_q

    means, variances, draw, log_q = said(ask, q, alone)
    for name in ("b", "c"):
        np.testing.assert_array_equal(means[0][name], means[1][name])
        np.testing.assert_array_equal(variances[0][name], variances[1][name])
    assert jax.tree.map(np.shape, draw) == {"w": (3, 2), "b": (3, 2), "c": (3, 1)}
    assert family in q.family.families and len(q.family.families) == 2
    np.testing.assert_allclose(log_q[0], log_q[1] + signs, rtol=1e-5)


def test_parts_of_one_kind_are_merged_however_the_groups_are_cut():
    params = {**PARAMS, "c": np.zeros(2, np.float32), "d": np.ones((2, 3), np.float32)}
    signs, ivon, adam = blr.bayesbinn(0.1, ess=10.0), blr.ivon(0.1, ess=4.0), blr.adam(0.1)
    groups = {"s": signs, "i": ivon, "a": adam, "e": blr.evon(0.1, ess=4.0)}
    posteriors = []
    for labels in ("siia", "siie"):
        tx = optax.partition(groups, dict(zip("wbcd", labels, strict=True)))  # one without leaves
        posteriors.append(started(tx, params)[1])
    normals, merged = (q.family.families[0] for q in posteriors)
    assert [q.family.families[1] for q in posteriors] == [SIGNS, SIGNS]
    assert normals == NORMALS and type(merged).__name__ == "Rotated"
    _, alone = started(ivon, {"c": params["c"]})
    whole = optax.partition(groups, {"w": "s", "b": "i", "c": "i", "d": "i"})
    _, whole = started(whole, params)

    def ask(posteriors, alone, whole):
        each = [(q.mean, q.variance["c"]) for q in posteriors]
        return each, alone.variance["c"], posteriors[0].kl(whole)

    each, variance, kl = said(ask, posteriors, alone, whole)
    for mean, spread in each:
        assert jax.tree.map(np.shape, mean) == jax.tree.map(np.shape, params)
        np.testing.assert_array_equal(spread, variance)
    assert kl >= 0.0


def test_two_posteriors_with_bases_keep_both():
    """Each turns in the basis of its own matrix, as it does alone."""
    params = {"a": np.ones((2, 2), np.float32), "b": np.ones((3, 3), np.float32)}
    grads = {"a": np.eye(2, dtype=np.float32) + 1.0, "b": np.diag([1.0, 2.0, 3.0]) + 1.0}
    grads = jax.tree.map(lambda g: g.astype(np.float32), grads)

    def after_a_step(tx, params, grads):
        _, state = tx.update(grads, tx.init(params), params)
        return blr.posterior(state, params)

    @jax.jit
    def look(params, grads):
        x, y = (blr.evon(0.1, ess=4.0, b2=0.5, refresh_every=1, key=k) for k in (0, 1))
        tx = optax.partition({"x": x, "y": y}, {"a": "x", "b": "y"})
        q = after_a_step(tx, params, grads)
        return q, q.variance, q.kl(q)

    q, variance, kl = look(params, grads)
    assert type(q.family).__name__ == "Rotated" and set(q.natural.bases) == {"['a']", "['b']"}
    for name in "ab":
        left, right = q.natural.bases[name.join(["['", "']"])]
        precision = np.asarray(q.natural.precision[name])
        wanted = np.square(left) @ (1 / precision) @ np.square(right).T
        np.testing.assert_allclose(variance[name], wanted, rtol=1e-5)
        assert not np.allclose(np.abs(left), np.eye(len(left)), atol=0.01)
    assert abs(float(kl)) < 1e-4


def test_a_joint_posterior_is_the_prior_of_the_next_task():
    params = {**PARAMS, "scale": np.float32(7.0)}
    _, first = started(mixed(scale=optax.sgd(0.1)), params)
    again = optax.partition(
        {
            "signs": blr.bayesbinn(0.1, ess=10.0, prior=first),
            "normals": blr.ivon(0.1, ess=4.0, prior=first, weight_decay=0.0),
            "scale": optax.sgd(0.1),
        },
        {"w": "signs", "b": "normals", "scale": "scale"},
    )
    state, q = started(again, params)
    np.testing.assert_array_equal(
        optax.tree.get(state, "inner_states")["signs"].inner_state[0].prior["w"], params["w"]
    )
    np.testing.assert_array_equal(*said(lambda *qs: [q.mean["w"] for q in qs], q, first))
    with pytest.raises(ValueError, match="mean-field Gaussian"):
        blr.ivon(
            0.1, ess=4.0, prior=blr.posterior(blr.bayesbinn(0.1, ess=1.0).init(PARAMS), PARAMS)
        ).init(PARAMS)


def test_points_and_conditional_parts_in_the_algebra():
    """Sums over the parts where these have them, the sentence of conditional families elsewhere."""
    tx = optax.partition({"n": blr.ivon(0.1, ess=5.0), "p": optax.sgd(0.1)}, {"w": "n", "b": "p"})
    square, spread, mean, kl = said(
        lambda q: ((q * q).variance["w"], q.variance["w"], (q * q).mean["b"], q.kl(q)),
        started(tx, PARAMS)[1],
    )
    np.testing.assert_allclose(square, spread / 2, rtol=1e-6)
    assert float(mean[0]) == 3.0 and abs(float(kl)) < 1e-6
    params = {"w": np.ones((3, 2), np.float32), "b": np.zeros(2, np.float32)}
    tx = optax.partition(
        {"d": blr.dropout(blr.sgd(0.1), 0.5), "n": blr.ivon(0.1, ess=5.0)}, {"w": "d", "b": "n"}
    )
    _, q = started(tx, params)
    for call in (lambda: q * q, lambda: q.kl(q), q.entropy):
        with pytest.raises((ValueError, NotImplementedError), match=r"onditional|UnitMixture"):
            call()


def test_training_and_predicting():
    """A network of signs with Gaussian biases learns, and its predictions average over both."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (64, 2)))
    y = x @ np.array([1.0, -1.0], np.float32) + np.float32(0.5)

    def loss(p, x, y):
        return 0.5 * jnp.mean((x @ p["w"] + p["b"] - y) ** 2)

    tx = optax.partition(
        {"signs": blr.bayesbinn(0.1, ess=64.0), "normals": blr.ivon(0.1, ess=64.0)},
        {"w": "signs", "b": "normals"},
    )

    def step(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, x, y)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=150)
        q = blr.posterior(state, params)
        predictive = blr.predict_regression(
            jax.random.key(2), q, lambda p, x: x @ p["w"] + p["b"], x, samples=16
        )
        return q.mean, q.sample(jax.random.key(1), (32,)), predictive

    params = {"w": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}
    mean, draws, predictive = jax.tree.map(np.asarray, train(params))
    assert set(np.abs(draws["w"]).ravel()) == {1.0}
    np.testing.assert_array_equal(np.sign(mean["w"]), [1.0, -1.0])
    assert abs(float(mean["b"][0]) - 0.5) < 0.1
    assert np.abs(predictive.mean - y).max() < 0.2 and np.all(predictive.epistemic > 0)
