"""Mixtures of Newton's methods: recorded trajectories, one component, several modes, annealing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import built_inside, load_golden, run_steps

import blr_optax as blr

close = np.testing.assert_allclose
MOG = load_golden("mog_iblr")
FULL = blr.families.get("mixture")
CENTRES = np.array([[-2.0, 0.0], [2.0, 1.0], [0.0, -3.0]])


def valleys(x):
    """Three equal modes."""
    return -jax.nn.logsumexp(-2.0 * jnp.sum((x - CENTRES) ** 2, axis=-1))


def train(tx, params, steps, **extra):
    """The last mean, and the moments and standard parameters of the last posterior."""

    def start():
        mean = jax.tree.map(jnp.asarray, params)
        return mean, tx.init(mean)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, **extra)
        params = optax.apply_updates(params, updates)
        q = blr.posterior(state, params)
        return (params, state), (params, {"posterior mean": q.mean, "marginal": q.variance}, q)

    _, (params, moments, q) = run_steps(step, start, length=steps)
    last = jax.tree.map(lambda x: x[-1], (params, moments, q))
    return *last[:2], jax.tree.map(np.asarray, standard(last[2]))


@jax.jit
def standard(q):
    return q.standard()


@pytest.mark.parametrize("case", MOG["cases"], ids=lambda case: case["name"])
def test_recorded_trajectories_of_the_improved_rule(x64, case):
    """Means, precisions and weights of every step, to 1e-9, from the recorded draws."""
    problem = {k: np.asarray(v) for k, v in MOG["problem"].items() if k != "kind"}
    start, hyper = case["init"], case["hyper"]

    def begin():
        logits = jnp.append(jnp.asarray(start["logits"], jnp.float64), 0.0)
        return blr.Distribution(
            FULL,
            FULL.natural(
                weights=jax.nn.softmax(logits),
                mean=jnp.asarray(start["means"]),
                precision=jnp.asarray(start["precs"]),
            ),
        )

    def make():
        truth = FULL.natural(
            weights=problem["weights"], mean=problem["means"], precision=problem["precs"]
        )
        return blr.mixture_vi(
            lambda x: -FULL.log_prob(truth, x),
            hyper["lr"],
            init=begin(),
            estimator=blr.estimators.shared_draws(
                hyper["S"], {"hess": "exact", "first": "reparameterized"}[case["option"]]
            ),
            weight_rate=hyper["decay_mix"],
            step="improved_old",
        )

    def step(carry, z):
        params, state = carry
        updates, state = make().update(None, state, params, points=z)
        params = params + updates
        q = blr.posterior(state, params)
        precision = FULL.family.precision(q.natural.components)
        seen = q.standard()["mean"], precision, q.natural.log_odds, params, q.mean
        return (params, state), seen

    def first():
        return begin().mean, make().init(begin().mean)

    _, seen = run_steps(step, first, np.array([one["z"] for one in case["steps"]]))
    for t, (record, found) in enumerate(zip(case["steps"], zip(*seen, strict=True), strict=True)):
        mean, precision, log_odds, params, q_mean = found
        close(mean, record["means"], rtol=1e-9, atol=1e-9, err_msg=f"step {t}")
        close(precision, record["precs"], rtol=1e-9, atol=1e-9, err_msg=f"step {t}")
        close(log_odds, record["logits"], rtol=1e-9, atol=1e-9, err_msg=f"step {t}")
        close(params, q_mean, rtol=1e-9, err_msg=f"step {t}")


def rosenbrock(x, shift):
    return jnp.sum((x[1:] - x[:-1] ** 2) ** 2) + 0.5 * jnp.sum((x - shift) ** 2)


def test_one_component_is_online_newton(x64):
    params, common = np.array([0.3, -0.2, 0.5]), {"ess": 4.0}
    g = blr.families.get("gaussian")

    def prior():
        return blr.Distribution(g, g.natural(mean=jnp.zeros(3), precision=jnp.eye(3)))

    mixed = lambda: blr.mixture_newton(rosenbrock, 0.4, 1, prior=prior(), **common)  # noqa: E731
    alone = lambda: blr.online_newton(rosenbrock, 0.4, prior=prior(), **common)  # noqa: E731
    a, _, q = train(built_inside(mixed), params, 12, batch=(1.0,))
    b, _, r = train(built_inside(alone), params, 12, batch=(1.0,))
    close(a, b, rtol=1e-10)
    close(q["covariance"][0], r["covariance"], rtol=1e-9)


def test_one_component_with_samples_is_variational_online_newton(x64):
    """Slopes and curvatures of a quadratic are exact under mirrored draws, whichever they are."""
    a = np.array([[2.0, 0.5], [0.5, 1.0]])
    loss = lambda x: 0.5 * (x - 1.0) @ a @ (x - 1.0)  # noqa: E731
    params = np.array([0.3, -0.2])
    p, _, q = train(blr.mixture_vi(loss, 0.3, 1, ess=5.0), params, 5)
    r, _, s = train(blr.variational_online_newton(loss, 0.3, ess=5.0), params, 5)
    close(p, r, rtol=1e-9)
    close(q["covariance"][0], s["covariance"], rtol=1e-9)


def test_far_components_are_newton_iterations_of_their_own(x64):
    begin = np.array([[-40.0, 10.0], [30.0, 30.0], [5.0, -50.0]])
    loss = lambda x: jnp.sum(jnp.sqrt(1 + x**2)) + 0.05 * jnp.sum(x**2)  # noqa: E731

    def make():
        init = FULL.natural(
            weights=jnp.full(3, 1 / 3), mean=begin, precision=jnp.stack([jnp.eye(2)] * 3)
        )
        return blr.mixture_newton(loss, 0.1, init=blr.Distribution(FULL, init), weight_rate=0.0)

    found, _, q = train(built_inside(make), np.mean(begin, 0), 4)
    close(q["weights"], 1 / 3, rtol=1e-12)
    alone = blr.online_newton(loss, 0.1)

    def start():
        return jnp.asarray(begin), jax.vmap(alone.init)(jnp.asarray(begin))

    def one(params, state):
        updates, state = alone.update(None, state, params)
        params = params + updates
        return (params, state), (params, blr.posterior(state, params).standard()["covariance"])

    _, (means, covariances) = run_steps(lambda c, _: jax.vmap(one)(*c), start, length=4)
    close(q["mean"], means[-1], rtol=1e-9)
    close(q["covariance"], covariances[-1], rtol=1e-9)
    assert found.shape == means[-1][0].shape


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("row", ["mixture_newton", "mixture_vi"])
def test_components_find_different_modes(x64, covariance, row):
    make = getattr(blr, row)
    tx = make(valleys, 0.2, 8, ess=4.0, scale=2.0, covariance=covariance, weight_rate=0.0, key=2)
    params, moments, q = train(tx, np.zeros(2), 100)
    away = np.linalg.norm(q["mean"][:, None] - CENTRES, axis=-1)
    assert set(np.argmin(away, axis=1).tolist()) == {0, 1, 2}
    assert np.max(np.min(away, axis=1)) < 0.7
    close(params, moments["posterior mean"], rtol=1e-8, atol=1e-8)
    # Alone, one component ends in one of them, or between.
    lone = train(make(valleys, 0.2, 1, ess=4.0, covariance=covariance), np.zeros(2), 100)[2]
    assert lone["mean"].shape == (1, 2)


def test_weights_are_learnt_or_kept(x64):
    weights = np.array([0.7, 0.3])

    def two(weights, mean):
        return FULL.natural(weights=weights, mean=mean, precision=jnp.ones((2, 1, 1)))

    def make(rate):
        truth = two(weights, jnp.array([[-4.0], [4.0]]))
        return blr.mixture_vi(
            lambda x: -FULL.log_prob(truth, x),
            0.2,
            init=blr.Distribution(FULL, two(jnp.full(2, 0.5), jnp.array([[-3.0], [3.0]]))),
            weight_rate=rate,
            estimator=blr.estimators.monte_carlo(20, antithetic=True),
        )

    kept, learnt = (
        train(built_inside(lambda rate=rate: make(rate)), np.zeros(1), 60)[2]["weights"]
        for rate in (0.0, 1.0)
    )
    close(kept, 0.5, rtol=1e-12)
    close(learnt, weights, atol=0.02)


def test_temperature_is_the_weight_of_the_divergence(x64):
    """E_q[ess l] + tau KL(q || prior) of a quadratic: precision (ess a + tau s_0) / tau."""
    loss = lambda x: 1.5 * jnp.sum((x - 1.0) ** 2)  # noqa: E731
    normal = blr.families.get("gaussian_diagonal")

    def make():
        prior = blr.Distribution(normal, normal.natural(mean=jnp.zeros(1), precision=2.0))
        return blr.mixture_newton(loss, 0.3, 1, ess=4.0, temperature=2.5, prior=prior)

    _, moments, _ = train(built_inside(make), np.zeros(1), 200)
    close(1 / moments["marginal"], 4.0 * 3.0 / 2.5 + 2.0, rtol=1e-8)
    close(moments["posterior mean"], 12.0 / (12.0 + 5.0), rtol=1e-8)
    # One step moves as the head of the file says: S <- S + rho (hess E - tau S).
    flat = blr.mixture_newton(loss, 0.3, 1, ess=4.0, temperature=0.5)
    _, moments, _ = train(flat, np.zeros(1), 1)
    close(1 / moments["marginal"], 1.0 + 0.3 * (12.0 - 0.5), rtol=1e-9)
    # Annealing to one ends where no annealing does.
    schedule = optax.linear_schedule(10.0, 1.0, 50)
    hot = train(blr.mixture_newton(loss, 0.1, 1, ess=4.0, temperature=schedule), np.zeros(1), 300)
    close(1 / hot[1]["marginal"], 12.0, rtol=1e-6)


def test_a_tree_starts_around_its_parameters():
    params = {"w": np.ones((2, 2), np.float32), "b": np.zeros(1, np.float32)}
    loss = lambda p: jnp.sum((p["w"] - 2.0) ** 2) + jnp.sum(p["b"] ** 2)  # noqa: E731
    for estimator in (None, blr.estimators.shared_draws(10)):
        tx = blr.mixture_vi(loss, 0.1, 3, scale=0.5, covariance="diagonal", estimator=estimator)

        @jax.jit
        def begin(params, tx=tx):
            q = blr.posterior(tx.init(params), params)
            return q.mean, q.standard()

        mean, start = jax.tree.map(np.asarray, begin(params))
        jax.tree.map(lambda m, p: close(m, p, atol=1e-5), mean, params)
        spread = start["mean"]
        assert spread.shape == (3, 5) and np.all(np.std(spread, axis=0) > 0.01)
        close(start["variance"], 0.25, rtol=1e-5)
        p, moments, _ = train(tx, params, 3)
        jax.tree.map(lambda m, p: close(m, p, rtol=1e-4, atol=1e-5), moments["posterior mean"], p)
        drawn = jax.eval_shape(lambda p, tx=tx: blr.sample(tx.init(p), p), p)
        assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, p)


def test_what_is_wrong_is_said():
    loss = lambda x: jnp.sum(x**2)  # noqa: E731
    normal = blr.families.get("normal")
    natural = jax.jit(lambda: normal.natural(mean=0.0, precision=1.0))()
    other = blr.Distribution(normal, natural)
    for more, match in [
        ({}, "components=K"),
        ({"components": 0}, "at least 1"),
        ({"components": 2, "init": other}, "either components"),
        ({"init": other}, "mixture family"),
        ({"components": 2, "covariance": "low"}, "covariance='low'"),
        ({"components": 2, "temperature": 0.0}, "temperature"),
        ({"components": 2, "weight_rate": -1.0}, "weight_rate"),
        ({"components": 2, "step": "plain"}, "plain"),
        ({"components": 2, "estimator": blr.estimators.pathwise(3)}, "takes monte_carlo"),
    ]:
        with pytest.raises(ValueError, match=match):
            blr.mixture_vi(loss, 0.1, **more)
