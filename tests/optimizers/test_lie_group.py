"""The Lie-group rules against recorded trajectories, quadrature, and the rule itself."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from replay import follows, problem_loss
from tools import load_golden

import blr_optax as blr
from blr_optax.families._noise_law import POSITIVE, SYMMETRIC, as_law

GOLDEN = load_golden("liegroup_logreg")
CASES = {case["algorithm"]: case for case in GOLDEN["cases"]}


def run(case, tx, params, state, normals, compare):
    """Follows a recorded trajectory: the noise to `estimate`, its statistic to `update`."""
    loss = problem_loss(GOLDEN["problem"])

    @jax.jit
    def advance(params, state, noise, batch):
        est = blr.estimate(lambda w: loss(w, batch), state, params, noise={"theta": noise})
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        return optax.apply_updates(params, updates), state, est.value

    assert len(case["steps"]) == 10
    for step in case["steps"]:
        noise = jnp.array(normals(step["noise"]))
        params, state, value = advance(params, state, noise, jnp.array(step["batch"]))
        follows(value, step["loss"], 1e-9, "loss")
        compare(step, params["theta"], state)


def test_golden_additive(x64):
    case = CASES["additive"]
    tx = blr.lie_additive(
        case["hyper"]["learningrate"], noise_scale=1.0, momentum=case["hyper"]["momentum"]
    )
    params = {"theta": jnp.array(case["init"]["w"])}

    def compare(step, mean, state):
        follows(mean, step["w"], 1e-9, "w")
        follows(optax.tree.get(state, "ema")["theta"], step["gm"], 1e-9, "momentum")

    run(case, tx, params, tx.init(params), lambda noise: noise, compare)


def test_golden_affine(x64):
    case = CASES["affine"]
    hyper = case["hyper"]
    ess = 1.0 / hyper["temperature"]
    tx = blr.lie_affine(
        hyper["alpha1"],
        ess,
        scale_rate=2.0 * hyper["alpha2"] / ess,
        noise_scale=1.0,
        b1=hyper["beta1"],
        b2=hyper["beta2"],
        weight_decay=0.0,
    )
    params = {"theta": jnp.array(case["init"]["b"])}

    def compare(step, mean, state):
        follows(mean, step["b"], 1e-9, "b")
        follows(state.spread["theta"], step["A"], 1e-9, "A")
        follows(state.scale_momentum.ema["theta"], step["MU"], 1e-9, "MU")
        follows(state.mean_momentum.ema["theta"], step["MV"], 1e-9, "MV")
        q = blr.posterior(state, {"theta": mean})
        follows(q.variance["theta"], np.square(step["A"]), 1e-9, "variance")

    assert hyper["initA"] == 1.0
    run(case, tx, params, tx.init(params), lambda noise: noise, compare)


def test_golden_multiplicative(x64):
    case = CASES["multiplicative"]
    hyper, start = case["hyper"], case["init"]
    tx = blr.lie_multiplicative(
        hyper["learningrate"],
        1.0 / hyper["temperature"],
        momentum=hyper["momentum"],
        init_offset=hyper["init_offset"],
        weight_decay=0.0,
    )
    mean = np.sqrt(np.pi / 2)
    # The recorded gains start at two independent draws, ours at what the parameters say.
    plus, minus = np.array(start["gp"]), np.array(start["gm_"])
    params = {"theta": jnp.array(mean * (plus - minus))}
    state = tx.init(params)
    follows(mean * (state.plus["theta"] - state.minus["theta"]), params["theta"], 1e-12, "mean")
    state = state._replace(plus={"theta": jnp.array(plus)}, minus={"theta": jnp.array(minus)})

    def normals(noise):
        n = np.stack([noise["plus"], noise["minus"]], axis=1)
        return -scipy.special.ndtri_exp(-0.5 * n**2)

    def compare(step, theta, state):
        plus, minus = np.array(step["gp"]), np.array(step["gm_"])
        follows(state.plus["theta"], plus, 1e-9, "g+")
        follows(state.minus["theta"], minus, 1e-9, "g-")
        follows(state.momentum.ema[0]["theta"], step["mom_p"], 1e-9, "M+")
        follows(state.momentum.ema[1]["theta"], step["mom_m"], 1e-9, "M-")
        follows(theta, mean * (plus - minus), 1e-9, "mean")

    run(case, tx, params, state, normals, compare)


# --- the laws of noise ----------------------------------------------------------------------------

SCIPY = {
    "gaussian": scipy.stats.norm,
    "laplace": scipy.stats.laplace,
    "uniform": scipy.stats.uniform(-1, 2),
    "rayleigh": scipy.stats.rayleigh,
    "log_normal": scipy.stats.lognorm(0.5),
}
LAWS = {**SYMMETRIC, **POSITIVE}
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@pytest.mark.parametrize("name", LAWS)
def test_a_law_has_the_quantiles_and_moments_of_its_name(x64, name):
    law, truth = LAWS[name], SCIPY[name]
    z = np.linspace(-5, 5, 41)
    expected = np.where(
        z < 0, truth.ppf(scipy.stats.norm.cdf(z)), truth.isf(scipy.stats.norm.sf(z))
    )
    np.testing.assert_allclose(law.of_normal(jnp.array(z)), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(law.mean, truth.mean(), atol=1e-12)
    np.testing.assert_allclose(law.variance, truth.var(), rtol=1e-12)
    found = as_law(law.of_normal, positive=name in POSITIVE)
    np.testing.assert_allclose(
        [found.mean, found.variance], [law.mean, law.variance], rtol=1e-4, atol=1e-6
    )
    if law.log_density:
        x = np.array([-0.9, 0.1, 0.7])
        np.testing.assert_allclose(law.log_density(jnp.array(x)), truth.logpdf(x), rtol=1e-12)
        np.testing.assert_allclose(law.entropy, truth.entropy(), rtol=1e-12)


# --- the statistics are the gradients that they stand for -----------------------------------------


def curved(w):
    """A loss whose Hessian varies and whose coordinates do not interact."""
    return jnp.sum(jnp.cos(w) + 0.3 * w**2 + 0.1 * jnp.sin(2.0 * w))


def test_affine_statistic_is_the_variance_times_the_mean_hessian(x64):
    """E[A s n grad] = (A s)^2 E[hess] for normal noise, by quadrature."""
    params = jnp.array([0.3, -1.2])
    state = blr.lie_affine(0.1, 10.0, noise_scale=0.5).init(params)
    state = state._replace(spread=jnp.array([0.7, 1.9]))
    scale = 0.5 * state.spread

    def at_node(z):
        theta = state.rule.weights(state, params, jnp.full(2, z))
        statistic = state.rule.curvature(state, params, theta, jax.grad(curved)(theta))
        return theta, statistic, jnp.diag(jax.hessian(curved)(theta))

    theta, statistic, hessian = jax.vmap(at_node)(jnp.array(NODES))
    np.testing.assert_allclose(theta, params + np.outer(NODES, scale), rtol=1e-12)
    found, hessian = WEIGHTS @ statistic, WEIGHTS @ hessian
    np.testing.assert_allclose(found, scale**2 * hessian, rtol=1e-10)


@pytest.mark.parametrize("name", POSITIVE)
def test_multiplicative_statistic_is_the_slope_in_log_gains(x64, name):
    """E[(g+ n+ grad, -g- n- grad)] = d E[l] / d (log g+, log g-), by quadrature in both noises."""
    params = jnp.array([0.4])
    state = blr.lie_multiplicative(0.1, 10.0, noise=name, init_offset=0.3).init(params)
    pairs = jnp.array([[[a], [b]] for a in NODES for b in NODES])
    weight = jnp.array([a * b for a in WEIGHTS for b in WEIGHTS])

    def mean_loss(log_gains):
        moved = state._replace(plus=jnp.exp(log_gains[0]), minus=jnp.exp(log_gains[1]))
        theta = jax.vmap(lambda z: state.rule.weights(moved, params, z))(pairs)
        return weight @ jax.vmap(curved)(theta)

    def at_draw(z):
        theta = state.rule.weights(state, params, z)
        return state.rule.statistic(state, params, theta, jax.grad(curved)(theta), z)

    found = jnp.einsum("s,s...->...", weight, jax.vmap(at_draw)(pairs))
    logs = jnp.log(jnp.stack([state.plus, state.minus]))
    np.testing.assert_allclose(found, jax.grad(mean_loss)(logs), rtol=1e-10)


def test_the_estimate_averages_the_products(x64):
    params = {"w": jnp.array([0.4, -0.2])}
    noise = {"w": jax.random.normal(jax.random.key(0), (3, 2, 2))}
    state = blr.lie_multiplicative(0.1, 10.0).init(params)
    est = blr.estimate(lambda w: curved(w["w"]), state, params, noise=noise, antithetic=True)
    total = 0.0
    for z in jnp.concatenate([noise["w"], -noise["w"]]):
        n = LAWS["rayleigh"].of_normal(z)
        g = jax.grad(curved)(state.plus["w"] * n[0] - state.minus["w"] * n[1])
        total += jnp.stack([state.plus["w"] * n[0] * g, -state.minus["w"] * n[1] * g]) / 6
    np.testing.assert_allclose(est.curvature["w"], total, rtol=1e-12)
    with pytest.raises(ValueError, match="noise"):
        blr.estimate(lambda w: curved(w["w"]), state, params, noise={"w": noise["w"][0]})


# --- the rule -------------------------------------------------------------------------------------


def test_affine_is_the_natural_step_to_first_order(x64):
    """Mean and precision differ from `natural_step` by O(rho^2): halving rho quarters it."""
    ess, s = 20.0, 0.3
    params, g, h = jnp.array([0.3, -1.2]), jnp.array([0.7, -0.4]), jnp.array([2.0, 0.5])
    normal = blr.families.get("normal")
    lam = normal.natural(mean=params, precision=jnp.full(2, s**-2))
    gradient = type(lam)(g - h * params, 0.5 * h)  # in mu = (E[w], E[w^2])

    def errors(rho):
        tx = blr.lie_affine(
            rho * ess * s**2, ess, scale_rate=rho, noise_scale=s, b1=0.0, b2=0.0, weight_decay=0.0
        )
        updates, state = tx.update(g, tx.init(params), params, curvature=s**2 * h)
        q = blr.posterior(state, params + updates)
        new = blr.natural_step("normal", lam, gradient, rho, ess=ess, step="plain")
        return np.concatenate(
            [
                (q.mean - normal.mean(new)) / jnp.abs(normal.mean(new) - params),
                (1 / q.variance - normal.precision(new)) / normal.precision(lam) / rho,
            ]
        )

    large, small = errors(1e-3), errors(5e-4)
    assert np.all(np.abs(large) < 0.01)
    np.testing.assert_allclose(large / small, 2.0, rtol=1e-2)


def test_multiplicative_rayleigh_is_the_natural_step_to_first_order(x64):
    """For one gain: Rayleigh is the Weibull family of shape 2, whose Fisher in log g is 4."""
    ess, gain, slope = 20.0, 0.8, 0.9  # slope: E[theta grad] = d E[l] / d log g
    family = blr.families.get("weibull")
    lam = family.natural(scale=jnp.array(gain * np.sqrt(2.0)), shape=2.0)
    mu = family.expectation(lam)[0]
    gradient = type(lam)(slope / (2.0 * mu), jnp.zeros(()))

    def error(rho):
        tx = blr.lie_multiplicative(rho * ess / 4, ess, momentum=0.0, weight_decay=0.0)
        params = jnp.array(0.0)
        state = tx.init(params)._replace(plus=jnp.array(gain))
        _, state = tx.update(params, state, params, curvature=jnp.array([slope, 0.0]))
        new = family.standard(blr.natural_step("weibull", lam, gradient, rho, ess=ess))["scale"]
        return (state.plus - new / np.sqrt(2.0)) / (gain - state.plus)

    large, small = error(1e-3), error(5e-4)
    assert abs(large) < 0.05
    assert large / small == pytest.approx(2.0, rel=1e-2)


def test_additive_is_the_rule_for_a_known_covariance(x64):
    """On a quadratic, whose smoothed gradient is that of the mean, step for step."""
    ess, s, rho = 30.0, 0.2, 0.3
    a = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    loss = lambda w: 0.5 * (w - 1.0) @ a @ (w - 1.0)  # noqa: E731
    start = jnp.array([0.3, -0.7])
    tx = blr.lie_additive(rho * ess * s**2, noise_scale=s, momentum=0.0)
    family = blr.families.get("gaussian_fixed")
    init = blr.Posterior(family, family.natural(mean=start, precision=jnp.eye(2) / s**2))
    rule = blr.blr_update(
        "gaussian_fixed", loss, rho, ess=ess, init=init, estimator=blr.estimators.delta()
    )
    params = other = start
    state, state_rule = tx.init(params), rule.init(other)
    for _ in range(5):
        est = blr.estimate(loss, state, params, samples=2, antithetic=True)
        updates, state = tx.update(est.grad, state, params)
        params = params + updates
        step, state_rule = rule.update(None, state_rule, other, batch=())
        other = other + step
        np.testing.assert_allclose(params, other, rtol=1e-12)
        q, q_rule = blr.posterior(state, params), blr.posterior(state_rule, other)
        np.testing.assert_allclose(q.variance, q_rule.variance, rtol=1e-12)


def test_additive_without_noise_is_sgd(x64):
    tx = blr.lie_additive(0.1, momentum=0.8, weight_decay=0.3)
    sgd = optax.chain(optax.add_decayed_weights(0.3), optax.ema(0.8, debias=False), optax.sgd(0.1))
    a = b = jnp.array([0.4, -2.0])
    state, other = tx.init(a), sgd.init(b)
    for _ in range(4):
        est = blr.estimate(curved, state, a, noise=jnp.zeros((1, 2)))
        updates, state = tx.update(est.grad, state, a)
        a = a + updates
        updates, other = sgd.update(jax.grad(curved)(b), other, b)
        b = b + updates
        np.testing.assert_allclose(a, b, rtol=1e-13)


@pytest.mark.parametrize("noise", ["gaussian", "laplace", "uniform"])
def test_affine_rests_at_the_exact_variance_of_a_quadratic(x64, noise):
    """Variance 1 / (ess (h + d)) for any law, and the mean of the regularised quadratic."""
    h, d, ess, optimum = jnp.array([0.5, 4.0, 20.0]), 0.7, 50.0, jnp.array([1.0, -2.0, 0.3])
    loss = lambda w: 0.5 * jnp.sum(h * (w - optimum) ** 2)  # noqa: E731
    tx = blr.lie_affine(
        0.02, ess, scale_rate=0.2, noise_scale=0.1, noise=noise, b1=0.5, b2=0.0, weight_decay=d
    )
    # One mirrored pair whose draws have the law's variance is exact for a quadratic.
    one = brentq_normal(LAWS[noise])

    @jax.jit
    def step(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, noise=jnp.full((1, 3), one), antithetic=True)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        return (params + updates, state), None

    params = jnp.zeros(3)
    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=3000)
    np.testing.assert_allclose(
        blr.posterior(state, params).variance, 1 / (ess * (h + d)), rtol=1e-9
    )
    np.testing.assert_allclose(params, h * optimum / (h + d), rtol=1e-9)


def brentq_normal(law):
    """The z whose draw is one standard deviation of the law."""
    return scipy.optimize.brentq(lambda z: float(law.of_normal(jnp.array(z))) ** 2 - law.variance,
                                 0.1, 3.0, xtol=1e-15)  # fmt: skip


def test_multiplicative_rests_where_slopes_equal_the_temperature(x64):
    """With the prior alone, E[+-g n d theta] = 1 / ess in both gains, checked by sampling."""
    ess, d = 40.0, 0.5
    tx = blr.lie_multiplicative(0.5, ess, momentum=0.5, weight_decay=d)
    params = jnp.array([0.5, -0.1])
    state = tx.init(params)

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params * 0, state, params, curvature=jnp.zeros((2, 2)))
        return (params + updates, state), None

    (params, state), _ = jax.lax.scan(step, (params, state), length=3000)
    np.testing.assert_allclose(params, 0.0, atol=1e-9)  # symmetric, as the prior is
    n = LAWS["rayleigh"].of_normal(jax.random.normal(jax.random.key(1), (2, 400_000)))
    theta = state.plus[0] * n[0] - state.minus[0] * n[1]
    assert ess * d * jnp.mean(state.plus[0] * n[0] * theta) == pytest.approx(1.0, abs=0.02)
    assert ess * d * jnp.mean(-state.minus[0] * n[1] * theta) == pytest.approx(1.0, abs=0.02)


# --- what the exponentials and the keys give ------------------------------------------------------


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e6, 1e15, 1e25, 1e30, np.inf, np.nan])
def test_group_elements_stay_positive_for_any_statistic(size):
    params = jnp.array([0.5, -0.5])
    affine, multiplicative = blr.lie_affine(1.0, 50.0), blr.lie_multiplicative(1.0, 50.0)
    state, gains = affine.init(params), multiplicative.init(params)
    for sign in (1.0, -1.0, -1.0, 1.0):
        c = jnp.full((2, 2), sign * size)
        updates, state = affine.update(jnp.ones(2), state, params, curvature=c[0])
        moved, gains = multiplicative.update(jnp.ones(2), gains, params, curvature=c)
        for x in (state.spread, gains.plus, gains.minus):
            assert np.all(np.isfinite(x) & (x > 0))
        assert np.all(np.isfinite(updates)) and np.all(np.isfinite(moved))
        assert blr.posterior(state, params).proper and blr.posterior(gains, params).proper
    assert int(state.skipped) == int(gains.skipped) == (0 if size < 1e26 else 4)


def test_signs_of_multiplicative_weights_change():
    tx, params = blr.lie_multiplicative(0.05, 1000.0, init_offset=0.1), jnp.array([0.5, -0.5])
    loss = lambda w: jnp.sum((w + jnp.array([1.0, -1.0])) ** 2)  # noqa: E731

    @jax.jit
    def step(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, samples=4)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        return (params + updates, state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=600)
    assert params[0] < -0.5 and params[1] > 0.5
    np.testing.assert_allclose(params, blr.posterior(state, params).mean, rtol=1e-5)


MAKERS = {
    "additive": lambda **k: blr.lie_additive(0.1, **k),
    "affine": lambda **k: blr.lie_affine(0.1, 50.0, **k),
    "multiplicative": lambda **k: blr.lie_multiplicative(0.1, 50.0, **k),
}


@pytest.mark.parametrize("name", MAKERS)
def test_noise_is_fresh_at_each_step_of_one_compiled_loop(name):
    """Drawn inside jit, it must not be frozen when the step is traced."""
    tx, params = MAKERS[name](), jnp.array([0.5, -0.5])

    @jax.jit
    def step(params, state):
        weights = blr.sample(state, params)
        _, state = tx.update(jnp.zeros(2), state, params)
        return weights - params, state

    state, draws = tx.init(params), []
    for _ in range(40):
        draw, state = step(params, state)
        draws.append(np.asarray(draw))
    assert len(np.unique(np.array(draws), axis=0)) == 40
    assert abs(np.corrcoef(np.array(draws[1:])[:, 0], np.array(draws[:-1])[:, 0])[0, 1]) < 0.5


def test_additive_skips_what_is_not_finite_and_counts_it():
    tx, params = blr.lie_additive(0.1), jnp.ones(2)
    _, state = tx.update(jnp.ones(2), tx.init(params), params)
    updates, after = tx.update(jnp.array([np.nan, 1.0]), state, params)
    assert not np.any(updates)
    assert int(optax.tree.get(after, "skipped")) == 1
    assert np.any(blr.sample(after, params) != blr.sample(state, params))
    updates, after = tx.update(jnp.ones(2), after, params)
    assert np.all(np.isfinite(updates)) and np.any(updates)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_multiplicative_parameters_are_the_rounded_mean(dtype):
    """Steps too small for half precision add up in the gains, and the parameters follow."""
    tx, params = blr.lie_multiplicative(1e-4, 1e6, momentum=0.0), jnp.ones(1, dtype)
    state, c = tx.init(params), jnp.array([[1.0], [-1.0]])
    for _ in range(300):
        updates, state = tx.update(params, state, params, curvature=c)
        params = optax.apply_updates(params, updates)
    mean = blr.posterior(state, params).mean
    assert float(mean[0]) < 0.98
    np.testing.assert_allclose(np.float32(params), mean, rtol=0.6 * float(jnp.finfo(dtype).eps))


# --- the posteriors -------------------------------------------------------------------------------


def student(z):
    """A law of the user's own: heavy tails, mean zero."""
    return jnp.sinh(z)


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        pytest.param("additive", "gaussian", marks=pytest.mark.slow),
        pytest.param("additive", "laplace", marks=pytest.mark.slow),
        ("additive", student),
        pytest.param("affine", "uniform", marks=pytest.mark.slow),
        ("multiplicative", "rayleigh"),
        pytest.param("multiplicative", "log_normal", marks=pytest.mark.slow),
    ],
)
def test_posteriors_draw_with_their_moments_and_predict(name, noise):
    tx = MAKERS[name](noise=noise)
    params = {"w": jnp.array([[0.5], [-1.0]]), "b": jnp.zeros(1)}
    q = blr.posterior(tx.init(params), params)
    jax.tree.map(lambda m, p: np.testing.assert_allclose(m, p, atol=1e-7), q.mean, params)
    draws = jax.jit(lambda key: q.sample(key, (40_000,)))(jax.random.key(0))
    for leaf in ("w", "b"):
        spread = np.sqrt(q.variance[leaf])
        assert draws[leaf].shape == (40_000, *params[leaf].shape)
        assert np.all(np.abs(draws[leaf].mean(0) - params[leaf]) < 5 * spread / 200)
        np.testing.assert_allclose(draws[leaf].std(0), spread, rtol=0.06)
    assert not np.array_equal(draws["w"][:, 1, 0], draws["b"][:, 0])
    x = jnp.array([[1.0, 2.0]])
    f = blr.predict_regression(
        jax.random.key(1), q, lambda w, x: x @ w["w"] + w["b"], x, samples=4096, chunk=1024
    )
    expected = jnp.square(x) @ q.variance["w"] + q.variance["b"]
    np.testing.assert_allclose(f.epistemic, expected, rtol=0.15)
    # This step's weights are draws of the same law.
    steps = jax.vmap(lambda key: blr.sample(blr.reseed(tx.init(params), key), params)["w"])
    drawn = jax.jit(steps)(jax.random.split(jax.random.key(2), 20_000))
    np.testing.assert_allclose(drawn.std(0), np.sqrt(q.variance["w"]), rtol=0.06)
    copy = pickle.loads(pickle.dumps(q))
    assert copy.family == q.family


def test_laplace_posteriors_have_densities(x64):
    params = {"w": jnp.array([0.5, -1.0])}
    q = blr.posterior(blr.lie_additive(0.1, noise_scale=0.3, noise="laplace").init(params), params)
    theta = {"w": jnp.array([[0.4, -1.3], [0.7, 0.0]])}
    truth = scipy.stats.laplace(params["w"], 0.3)
    np.testing.assert_allclose(q.log_prob(theta), truth.logpdf(theta["w"]).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(q.entropy(), truth.entropy().sum(), rtol=1e-12)
    with pytest.raises(ValueError, match="no exponential family"):
        q * q
    signed = blr.posterior(blr.lie_multiplicative(0.1, 10.0).init(params), params)
    with pytest.raises(ValueError, match="no closed form"):
        signed.log_prob(params)


def test_posteriors_of_one_law_merge_and_others_stand_side_by_side():
    params, labels = {"a": jnp.ones(2), "b": jnp.zeros(3)}, {"a": "x", "b": "y"}
    both = lambda one, two: optax.partition({"x": one, "y": two}, labels).init(params)  # noqa: E731
    first, second = MAKERS["multiplicative"](), MAKERS["multiplicative"](init_offset=0.5)
    q = blr.posterior(both(first, second), params)
    alone = blr.posterior(second.init(params), params)
    np.testing.assert_array_equal(q.variance["b"], alone.variance["b"])
    other = MAKERS["affine"]()
    q = blr.posterior(both(first, other), params)
    assert isinstance(q.family, blr.families.SideBySide)
    np.testing.assert_array_equal(
        q.variance["b"], blr.posterior(other.init(params), params).variance["b"]
    )


def test_errors_name_the_argument():
    for bad, words in (
        ({"noise": "cauchy"}, "known: gaussian, laplace, uniform"),
        ({"noise": lambda z: z + 1.0}, "mean"),
        ({"noise": lambda z: 0.0 * z}, "spread"),
        ({"noise_scale": 0.0}, "noise_scale"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"generator": "dice"}, "generator"),
    ):
        with pytest.raises(ValueError, match=words):
            blr.lie_additive(0.1, **bad)
    for bad, words in (
        ({"noise": "gaussian"}, "known: rayleigh, log_normal"),
        ({"noise": jnp.sin}, "positive"),
        ({"init_offset": 0.0}, "init_offset"),
        ({"ess": 0.0}, "ess"),
    ):
        with pytest.raises(ValueError, match=words):
            blr.lie_multiplicative(0.1, **{"ess": 10.0, **bad})
    for bad in ({"scale_rate": -1.0}, {"b1": 1.0}, {"b2": -0.1}, {"ess": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            blr.lie_affine(0.1, **{"ess": 10.0, **bad})
    for make in MAKERS.values():
        with pytest.raises(ValueError, match="needs params"):
            make().update(jnp.ones(2), make().init(jnp.ones(2)))
        with pytest.raises(ValueError, match="floating-point"):
            make().init(jnp.ones(2, jnp.int32))
