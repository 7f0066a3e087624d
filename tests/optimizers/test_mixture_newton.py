"""Mixtures of Newton's methods: recorded trajectories, one component, several modes, annealing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import load_golden

import blr_optax as blr

close = np.testing.assert_allclose
MOG = load_golden("mog_iblr")
FULL = blr.families.get("mixture")
DIAGONAL = blr.families.get("mixture", family="normal")
CENTRES = jnp.array([[-2.0, 0.0], [2.0, 1.0], [0.0, -3.0]])


def valleys(x):
    """Three equal modes."""
    return -jax.nn.logsumexp(-2.0 * jnp.sum((x - CENTRES) ** 2, axis=-1))


def train(tx, params, steps, **extra):
    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(None, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, steps)[0]

    params, state = run(params, tx.init(params))
    return params, state, blr.posterior(state, params)


@pytest.mark.parametrize("case", MOG["cases"], ids=lambda case: case["name"])
def test_recorded_trajectories_of_the_improved_rule(x64, case):
    """Means, precisions and weights of every step, to 1e-9, from the recorded draws."""
    problem = {k: jnp.asarray(v) for k, v in MOG["problem"].items() if k != "kind"}
    truth = FULL.natural(
        weights=problem["weights"], mean=problem["means"], precision=problem["precs"]
    )
    start, hyper = case["init"], case["hyper"]
    logits = jnp.append(jnp.asarray(start["logits"], jnp.float64), 0.0)
    init = blr.Posterior(
        FULL,
        FULL.natural(
            weights=jax.nn.softmax(logits),
            mean=jnp.asarray(start["means"]),
            precision=jnp.asarray(start["precs"]),
        ),
    )
    tx = blr.multimodal(
        lambda x: -FULL.log_prob(truth, x),
        hyper["lr"],
        init=init,
        draws="mixture",
        samples=hyper["S"],
        hessian={"hess": "exact", "first": "reparameterized"}[case["option"]],
        weight_rate=hyper["decay_mix"],
        step="improved_old",
    )
    params = init.mean
    state = tx.init(params)
    update = jax.jit(lambda s, p, z: tx.update(None, s, p, points=z))
    for record in case["steps"]:
        updates, state = update(state, params, jnp.asarray(record["z"]))
        params = params + updates
        q = blr.posterior(state, params)
        found = q.standard()
        close(found["mean"], record["means"], rtol=1e-9, atol=1e-9)
        precision = FULL.family.precision(q.natural.components)
        close(precision, record["precs"], rtol=1e-9, atol=1e-9)
        close(q.natural.log_odds, record["logits"], rtol=1e-9, atol=1e-9)
        close(params, q.mean, rtol=1e-9)


def rosenbrock(x, shift):
    return jnp.sum((x[1:] - x[:-1] ** 2) ** 2) + 0.5 * jnp.sum((x - shift) ** 2)


def test_one_component_is_online_newton(x64):
    params, common = jnp.array([0.3, -0.2, 0.5]), {"ess": 4.0}
    prior = blr.Posterior(
        g := blr.families.get("gaussian"), g.natural(mean=jnp.zeros(3), precision=jnp.eye(3))
    )
    mixed = blr.mixture_newton(rosenbrock, 0.4, 1, prior=prior, **common)
    alone = blr.online_newton(rosenbrock, 0.4, prior=prior, **common)
    a, _, q = train(mixed, params, 12, batch=(1.0,))
    b, _, r = train(alone, params, 12, batch=(1.0,))
    close(a, b, rtol=1e-10)
    close(q.standard()["covariance"][0], r.standard()["covariance"], rtol=1e-9)


def test_one_component_with_samples_is_variational_online_newton(x64):
    """Slopes and curvatures of a quadratic are exact under mirrored draws, whichever they are."""
    a = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    loss = lambda x: 0.5 * (x - 1.0) @ a @ (x - 1.0)  # noqa: E731
    params = jnp.array([0.3, -0.2])
    p, _, q = train(blr.multimodal(loss, 0.3, 1, ess=5.0), params, 5)
    r, _, s = train(blr.variational_online_newton(loss, 0.3, ess=5.0), params, 5)
    close(p, r, rtol=1e-9)
    close(q.standard()["covariance"][0], s.standard()["covariance"], rtol=1e-9)


def test_far_components_are_newton_iterations_of_their_own(x64):
    start = jnp.array([[-40.0, 10.0], [30.0, 30.0], [5.0, -50.0]])
    init = FULL.natural(
        weights=jnp.full(3, 1 / 3), mean=start, precision=jnp.stack([jnp.eye(2)] * 3)
    )
    loss = lambda x: jnp.sum(jnp.sqrt(1 + x**2)) + 0.05 * jnp.sum(x**2)  # noqa: E731
    tx = blr.mixture_newton(loss, 0.1, init=blr.Posterior(FULL, init), weight_rate=0.0)
    _, _, q = train(tx, init_mean := jnp.mean(start, 0), 4)
    close(q.standard()["weights"], 1 / 3, rtol=1e-12)
    for k in range(3):
        p, _, r = train(blr.online_newton(loss, 0.1), start[k], 4)
        close(q.standard()["mean"][k], p, rtol=1e-9)
        close(q.standard()["covariance"][k], r.standard()["covariance"], rtol=1e-9)
    assert init_mean.shape == p.shape


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("row", ["mixture_newton", "multimodal"])
def test_components_find_different_modes(x64, covariance, row):
    make = getattr(blr, row)
    tx = make(valleys, 0.2, 8, ess=4.0, scale=2.0, covariance=covariance, weight_rate=0.0, key=2)
    params, _, q = train(tx, jnp.zeros(2), 100)
    means = q.standard()["mean"]
    away = jnp.linalg.norm(means[:, None] - CENTRES, axis=-1)
    assert set(jnp.argmin(away, axis=1).tolist()) == {0, 1, 2}
    assert jnp.max(jnp.min(away, axis=1)) < 0.7
    close(params, q.mean, rtol=1e-8, atol=1e-8)
    # Alone, one component ends in one of them, or between.
    lone = train(make(valleys, 0.2, 1, ess=4.0, covariance=covariance), jnp.zeros(2), 100)[2]
    assert lone.standard()["mean"].shape == (1, 2)


def test_weights_are_learnt_or_kept(x64):
    weights = jnp.array([0.7, 0.3])
    truth = FULL.natural(
        weights=weights,
        mean=jnp.array([[-4.0], [4.0]]),
        precision=jnp.ones((2, 1, 1)),
    )
    start = FULL.natural(
        weights=jnp.full(2, 0.5), mean=jnp.array([[-3.0], [3.0]]), precision=jnp.ones((2, 1, 1))
    )
    start = blr.Posterior(FULL, start)
    found = {}
    for rate in (0.0, 1.0):
        tx = blr.multimodal(
            lambda x: -FULL.log_prob(truth, x), 0.2, init=start, weight_rate=rate, samples=20
        )
        found[rate] = train(tx, start.mean, 60)[2].standard()["weights"]
    close(found[0.0], 0.5, rtol=1e-12)
    close(found[1.0], weights, atol=0.02)


def test_temperature_is_the_weight_of_the_divergence(x64):
    """E_q[ess l] + tau KL(q || prior) of a quadratic: precision (ess a + tau s_0) / tau."""
    loss = lambda x: 1.5 * jnp.sum((x - 1.0) ** 2)  # noqa: E731
    normal = blr.families.get("gaussian_diagonal")
    prior = blr.Posterior(normal, normal.natural(mean=jnp.zeros(1), precision=2.0))
    tx = blr.mixture_newton(loss, 0.3, 1, ess=4.0, temperature=2.5, prior=prior)
    _, _, q = train(tx, jnp.zeros(1), 200)
    close(1 / q.variance, 4.0 * 3.0 / 2.5 + 2.0, rtol=1e-8)
    close(q.mean, 12.0 / (12.0 + 5.0), rtol=1e-8)
    # One step moves as the head of the file says: S <- S + rho (hess E - tau S).
    flat = blr.mixture_newton(loss, 0.3, 1, ess=4.0, temperature=0.5)
    _, _, q = train(flat, jnp.zeros(1), 1)
    close(1 / q.variance, 1.0 + 0.3 * (12.0 - 0.5), rtol=1e-9)
    # Annealing to one ends where no annealing does.
    schedule = optax.linear_schedule(10.0, 1.0, 50)
    hot = train(blr.mixture_newton(loss, 0.1, 1, ess=4.0, temperature=schedule), jnp.zeros(1), 300)
    close(1 / hot[2].variance, 12.0, rtol=1e-6)


def test_a_tree_starts_around_its_parameters():
    params = {"w": jnp.ones((2, 2)), "b": jnp.zeros(1)}
    loss = lambda p: jnp.sum((p["w"] - 2.0) ** 2) + jnp.sum(p["b"] ** 2)  # noqa: E731
    for draws in ("components", "mixture"):
        tx = blr.multimodal(loss, 0.1, 3, scale=0.5, covariance="diagonal", draws=draws)
        state = tx.init(params)
        q = blr.posterior(state, params)
        jax.tree.map(lambda m, p: close(m, p, atol=1e-5), q.mean, params)
        spread = q.standard()["mean"]
        assert spread.shape == (3, 5) and jnp.all(jnp.std(spread, axis=0) > 0.01)
        close(q.standard()["variance"], 0.25, rtol=1e-5)
        p, _, q = train(tx, params, 3)
        jax.tree.map(lambda m, p: close(m, p, rtol=1e-4, atol=1e-5), q.mean, p)
        assert jax.tree.map(jnp.shape, blr.sample(tx.init(p), p)) == jax.tree.map(jnp.shape, p)


def test_what_is_wrong_is_said():
    loss = lambda x: jnp.sum(x**2)  # noqa: E731
    normal = blr.families.get("normal")
    other = blr.Posterior(normal, normal.natural(mean=0.0, precision=1.0))
    for more, match in [
        ({}, "components=K"),
        ({"components": 0}, "at least 1"),
        ({"components": 2, "init": other}, "either components"),
        ({"init": other}, "mixture family"),
        ({"components": 2, "covariance": "low"}, "covariance='low'"),
        ({"components": 2, "temperature": 0.0}, "temperature"),
        ({"components": 2, "weight_rate": -1.0}, "weight_rate"),
        ({"components": 2, "step": "plain"}, "plain"),
        ({"components": 2, "draws": "none"}, "draws='none'"),
        ({"components": 2, "hessian": "none"}, "hessian='none'"),
        ({"components": 2, "samples": 0}, "samples"),
    ]:
        with pytest.raises(ValueError, match=match):
            blr.multimodal(loss, 0.1, **more)
