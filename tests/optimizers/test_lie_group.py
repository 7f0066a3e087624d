"""The Lie-group rules against recorded trajectories, quadrature, and the rule itself."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from replay import follow, follows, problem_loss, recorded
from tools import load_golden, run_steps

import blr_optax as blr
from blr_optax.optimizers._posteriors.moved_noise import POSITIVE, SYMMETRIC, as_law

GOLDEN = load_golden("liegroup_logreg")
CASES = {case["algorithm"]: case for case in GOLDEN["cases"]}


def run(case, tx, start, normals, look):
    """Follows a recorded trajectory: the noise to `estimate`, its statistic to `update`."""
    loss = problem_loss(GOLDEN["problem"])

    def step(carry, given):
        (params, state), (noise, batch) = carry, given
        est = blr.estimate(lambda w: loss(w, batch), state, params, noise={"theta": noise})
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = optax.apply_updates(params, updates)
        return (params, state), {"loss": est.value, "mean": params["theta"], **look(params, state)}

    assert len(case["steps"]) == 10
    noise = np.array([normals(one["noise"]) for one in case["steps"]])
    _, seen = run_steps(step, start, (noise, recorded(case, "batch")))
    follow(seen["loss"], recorded(case, "loss"), 1e-9, "loss")
    return seen


def test_golden_additive(x64):
    case = CASES["additive"]
    tx = blr.lie_additive(
        case["hyper"]["learningrate"], noise_scale=1.0, momentum=case["hyper"]["momentum"]
    )

    def start():
        params = {"theta": jnp.array(case["init"]["w"])}
        return params, tx.init(params)

    def look(params, state):
        return {"momentum": optax.tree.get(state, "ema")["theta"]}

    seen = run(case, tx, start, np.array, look)
    follow(seen["mean"], recorded(case, "w"), 1e-9, "w")
    follow(seen["momentum"], recorded(case, "gm"), 1e-9, "momentum")


def test_golden_affine(x64):
    case = CASES["affine"]
    hyper = case["hyper"]
    ess = 1.0 / hyper["temperature"]
    tx = blr.lie_affine(
        hyper["alpha1"],
        ess=ess,
        scale_rate=2.0 * hyper["alpha2"] / ess,
        noise_scale=1.0,
        b1=hyper["beta1"],
        b2=hyper["beta2"],
        weight_decay=0.0,
    )

    def start():
        params = {"theta": jnp.array(case["init"]["b"])}
        return params, tx.init(params)

    def look(params, state):
        return {
            "A": state.spread["theta"],
            "MU": state.scale_momentum.ema["theta"],
            "MV": state.mean_momentum.ema["theta"],
            "variance": blr.posterior(state, params).variance["theta"],
        }

    assert hyper["initA"] == 1.0
    seen = run(case, tx, start, np.array, look)
    follow(seen["mean"], recorded(case, "b"), 1e-9, "b")
    for name in ("A", "MU", "MV"):
        follow(seen[name], recorded(case, name), 1e-9, name)
    follow(seen["variance"], np.square(recorded(case, "A")), 1e-9, "variance")


def test_golden_multiplicative(x64):
    case = CASES["multiplicative"]
    hyper, begin = case["hyper"], case["init"]
    tx = blr.lie_multiplicative(
        hyper["learningrate"],
        ess=1.0 / hyper["temperature"],
        momentum=hyper["momentum"],
        init_offset=hyper["init_offset"],
        weight_decay=0.0,
    )
    mean = np.sqrt(np.pi / 2)
    # The recorded gains start at two independent draws, ours at what the parameters say.
    plus, minus = np.array(begin["gp"]), np.array(begin["gm_"])
    params = {"theta": mean * (plus - minus)}
    state = jax.jit(tx.init)(params)
    own = mean * (np.asarray(state.plus["theta"]) - np.asarray(state.minus["theta"]))
    follows(own, params["theta"], 1e-12, "mean")
    state = state._replace(plus={"theta": jnp.array(plus)}, minus={"theta": jnp.array(minus)})

    def normals(noise):
        n = np.stack([noise["plus"], noise["minus"]], axis=1)
        return -scipy.special.ndtri_exp(-0.5 * n**2)

    def look(params, state):
        names = ("plus", "minus")
        average_p, average_m = (x["theta"] for x in state.momentum.ema)
        averages = {"mom_p": average_p, "mom_m": average_m}
        return {name: getattr(state, name)["theta"] for name in names} | averages

    seen = run(case, tx, lambda: (jax.tree.map(jnp.asarray, params), state), normals, look)
    plus, minus = recorded(case, "gp"), recorded(case, "gm_")
    follow(seen["plus"], plus, 1e-9, "g+")
    follow(seen["minus"], minus, 1e-9, "g-")
    follow(seen["mom_p"], recorded(case, "mom_p"), 1e-9, "M+")
    follow(seen["mom_m"], recorded(case, "mom_m"), 1e-9, "M-")
    follow(seen["mean"], mean * (plus - minus), 1e-9, "mean")


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
    x = np.array([-0.9, 0.1, 0.7])
    density = law.log_density or (lambda x: x)
    of_normal, log_density = jax.jit(lambda z, x: (law.of_normal(z), density(x)))(z, x)
    np.testing.assert_allclose(of_normal, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(law.mean, truth.mean(), atol=1e-12)
    np.testing.assert_allclose(law.variance, truth.var(), rtol=1e-12)
    found = as_law(jax.jit(law.of_normal), positive=name in POSITIVE)
    np.testing.assert_allclose(
        [found.mean, found.variance], [law.mean, law.variance], rtol=1e-4, atol=1e-6
    )
    if law.log_density:
        np.testing.assert_allclose(log_density, truth.logpdf(x), rtol=1e-12)
        np.testing.assert_allclose(law.entropy, truth.entropy(), rtol=1e-12)


# --- the statistics are the gradients that they stand for -----------------------------------------


def curved(w):
    """A loss whose Hessian varies and whose coordinates do not interact."""
    return jnp.sum(jnp.cos(w) + 0.3 * w**2 + 0.1 * jnp.sin(2.0 * w))


def test_affine_statistic_is_the_variance_times_the_mean_hessian(x64):
    """E[A s n grad] = (A s)^2 E[hess] for normal noise, by quadrature."""
    params, spread = np.array([0.3, -1.2]), np.array([0.7, 1.9])

    @jax.jit
    def look(params, spread, nodes):
        state = blr.lie_affine(0.1, ess=10.0, noise_scale=0.5).init(params)._replace(spread=spread)

        def at_node(z):
            theta = state.reader.weights(state, params, jnp.full(2, z))
            statistic = state.reader.curvature(state, params, theta, jax.grad(curved)(theta))
            return theta, statistic, jnp.diag(jax.hessian(curved)(theta))

        return jax.vmap(at_node)(nodes)

    theta, statistic, hessian = look(params, spread, NODES)
    np.testing.assert_allclose(theta, params + np.outer(NODES, 0.5 * spread), rtol=1e-12)
    found, hessian = WEIGHTS @ np.asarray(statistic), WEIGHTS @ np.asarray(hessian)
    np.testing.assert_allclose(found, (0.5 * spread) ** 2 * hessian, rtol=1e-10)


@pytest.mark.parametrize("name", POSITIVE)
def test_multiplicative_statistic_is_the_slope_in_log_gains(x64, name):
    """E[(g+ n+ grad, -g- n- grad)] = d E[l] / d (log g+, log g-), by quadrature in both noises."""
    pairs = np.array([[[a], [b]] for a in NODES for b in NODES])
    weight = np.array([a * b for a in WEIGHTS for b in WEIGHTS])

    @jax.jit
    def both(params, pairs):
        state = blr.lie_multiplicative(0.1, ess=10.0, noise=name, init_offset=0.3).init(params)

        def mean_loss(log_gains):
            moved = state._replace(plus=jnp.exp(log_gains[0]), minus=jnp.exp(log_gains[1]))
            theta = jax.vmap(lambda z: state.reader.weights(moved, params, z))(pairs)
            return weight @ jax.vmap(curved)(theta)

        def at_draw(z):
            theta = state.reader.weights(state, params, z)
            return state.reader.statistic(state, params, theta, jax.grad(curved)(theta), z)

        found = jnp.einsum("s,s...->...", weight, jax.vmap(at_draw)(pairs))
        logs = jnp.log(jnp.stack([state.plus, state.minus]))
        return found, jax.grad(mean_loss)(logs)

    np.testing.assert_allclose(*both(np.array([0.4]), pairs), rtol=1e-10)


def test_the_estimate_averages_the_products(x64):
    params = {"w": np.array([0.4, -0.2])}
    noise = {"w": np.random.default_rng(0).normal(size=(3, 2, 2))}
    loss = lambda w: curved(w["w"])  # noqa: E731
    state = jax.jit(blr.lie_multiplicative(0.1, ess=10.0).init)(params)

    @jax.jit
    def look(state, noise):
        est = blr.estimate(loss, state, params, noise=noise, antithetic=True)
        n = LAWS["rayleigh"].of_normal(jnp.concatenate([noise["w"], -noise["w"]]))
        theta = state.plus["w"] * n[:, 0] - state.minus["w"] * n[:, 1]
        return est.statistic["w"], n, jax.vmap(jax.grad(curved))(theta)

    found, n, g = map(np.asarray, look(state, noise))
    gains = np.stack([state.plus["w"], -np.asarray(state.minus["w"])])
    np.testing.assert_allclose(found, np.mean(gains * n * g[:, None], axis=0), rtol=1e-12)
    with pytest.raises(ValueError, match="noise"):
        blr.estimate(loss, state, params, noise={"w": noise["w"][0]})


# --- the rule -------------------------------------------------------------------------------------


def test_affine_is_the_natural_step_to_first_order(x64):
    """Mean and precision differ from `natural_step` by O(rho^2): halving rho quarters it."""
    ess, s = 20.0, 0.3
    g, h = np.array([0.7, -0.4]), np.array([2.0, 0.5])
    normal = blr.families.get("normal")

    @jax.jit
    def errors(params, rho):
        lam = normal.natural(mean=params, precision=jnp.full(2, s**-2))
        gradient = type(lam)(g - h * params, 0.5 * h)  # in mu = (E[w], E[w^2])
        tx = blr.lie_affine(
            rho * ess * s**2,
            ess=ess,
            scale_rate=rho,
            noise_scale=s,
            b1=0.0,
            b2=0.0,
            weight_decay=0.0,
        )
        updates, state = tx.update(g, tx.init(params), params, statistic=s**2 * h)
        q = blr.posterior(state, params + updates)
        new = blr.natural_step("normal", lam, gradient, rho, ess=ess, step="plain")
        return jnp.concatenate(
            [
                (q.mean - normal.mean(new)) / jnp.abs(normal.mean(new) - params),
                (1 / q.variance - normal.precision(new)) / normal.precision(lam) / rho,
            ]
        )

    large, small = (np.asarray(errors(np.array([0.3, -1.2]), rho)) for rho in (1e-3, 5e-4))
    assert np.all(np.abs(large) < 0.01)
    np.testing.assert_allclose(large / small, 2.0, rtol=1e-2)


def test_multiplicative_rayleigh_is_the_natural_step_to_first_order(x64):
    """For one gain: Rayleigh is the Weibull family of shape 2, whose Fisher in log g is 4."""
    ess, gain, slope = 20.0, 0.8, 0.9  # slope: E[theta grad] = d E[l] / d log g
    family = blr.families.get("weibull")

    @jax.jit
    def error(gain, rho):
        lam = family.natural(scale=gain * np.sqrt(2.0), shape=2.0)
        mu = family.expectation(lam)[0]
        gradient = type(lam)(slope / (2.0 * mu), jnp.zeros(()))
        tx = blr.lie_multiplicative(rho * ess / 4, ess=ess, momentum=0.0, weight_decay=0.0)
        params = jnp.array(0.0)
        state = tx.init(params)._replace(plus=gain)
        _, state = tx.update(params, state, params, statistic=jnp.array([slope, 0.0]))
        new = family.standard(blr.natural_step("weibull", lam, gradient, rho, ess=ess))["scale"]
        return (state.plus - new / np.sqrt(2.0)) / (gain - state.plus)

    large, small = (float(error(gain, rho)) for rho in (1e-3, 5e-4))
    assert abs(large) < 0.05
    assert large / small == pytest.approx(2.0, rel=1e-2)


def test_additive_is_the_rule_for_a_known_covariance(x64):
    """On a quadratic, whose smoothed gradient is that of the mean, step for step."""
    ess, s, rho = 30.0, 0.2, 0.3
    a = np.array([[2.0, 0.5], [0.5, 1.0]])
    loss = lambda w: 0.5 * (w - 1.0) @ a @ (w - 1.0)  # noqa: E731
    tx = blr.lie_additive(rho * ess * s**2, noise_scale=s, momentum=0.0)
    family = blr.families.get("gaussian_fixed")

    def rule(mean):
        init = blr.Distribution(family, family.natural(mean=mean, precision=jnp.eye(2) / s**2))
        return blr.blr_update(
            "gaussian_fixed", loss, rho, ess=ess, init=init, estimator=blr.estimators.delta()
        )

    def start():
        params = jnp.array([0.3, -0.7])
        return params, tx.init(params), params, rule(params).init(params)

    def step(carry, _):
        params, state, other, state_rule = carry
        est = blr.estimate(loss, state, params, samples=2, antithetic=True)
        updates, state = tx.update(est.grad, state, params)
        params = params + updates
        moved, state_rule = rule(other).update(None, state_rule, other, batch=())
        other = other + moved
        both = blr.posterior(state, params), blr.posterior(state_rule, other)
        return (params, state, other, state_rule), (params, other, *(q.variance for q in both))

    _, (params, other, variance, of_rule) = run_steps(step, start, length=5)
    np.testing.assert_allclose(params, other, rtol=1e-12)
    np.testing.assert_allclose(variance, of_rule, rtol=1e-12)


def test_additive_without_noise_is_sgd(x64):
    tx = blr.lie_additive(0.1, momentum=0.8, weight_decay=0.3)
    sgd = optax.chain(optax.add_decayed_weights(0.3), optax.ema(0.8, debias=False), optax.sgd(0.1))

    def start():
        params = jnp.array([0.4, -2.0])
        return params, tx.init(params), params, sgd.init(params)

    def step(carry, _):
        a, state, b, other = carry
        est = blr.estimate(curved, state, a, noise=jnp.zeros((1, 2)))
        updates, state = tx.update(est.grad, state, a)
        a = a + updates
        updates, other = sgd.update(jax.grad(curved)(b), other, b)
        b = b + updates
        return (a, state, b, other), (a, b)

    np.testing.assert_allclose(*run_steps(step, start, length=4)[1], rtol=1e-13)


@pytest.mark.parametrize("noise", ["gaussian", "laplace", "uniform"])
def test_affine_rests_at_the_exact_variance_of_a_quadratic(x64, noise):
    """Variance 1 / (ess (h + d)) for any law, and the mean of the regularised quadratic."""
    h, d, ess, optimum = np.array([0.5, 4.0, 20.0]), 0.7, 50.0, np.array([1.0, -2.0, 0.3])
    loss = lambda w: 0.5 * jnp.sum(h * (w - optimum) ** 2)  # noqa: E731
    tx = blr.lie_affine(
        0.02, ess=ess, scale_rate=0.2, noise_scale=0.1, noise=noise, b1=0.5, b2=0.0, weight_decay=d
    )
    # One mirrored pair whose draws have the law's variance is exact for a quadratic.
    one = brentq_normal(LAWS[noise])

    def start():
        params = jnp.zeros(3)
        return params, tx.init(params)

    def step(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, noise=jnp.full((1, 3), one), antithetic=True)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = params + updates
        return (params, state), (params, blr.posterior(state, params).variance)

    mean, variance = (x[-1] for x in run_steps(step, start, length=3000)[1])
    np.testing.assert_allclose(variance, 1 / (ess * (h + d)), rtol=1e-9)
    np.testing.assert_allclose(mean, h * optimum / (h + d), rtol=1e-9)


def brentq_normal(law):
    """The z whose draw is one standard deviation of the law."""
    draw = jax.jit(law.of_normal)
    return scipy.optimize.brentq(lambda z: float(draw(z)) ** 2 - law.variance, 0.1, 3.0, xtol=1e-15)


def test_multiplicative_rests_where_slopes_equal_the_temperature(x64):
    """With the prior alone, E[+-g n d theta] = 1 / ess in both gains, checked by sampling."""
    ess, d = 40.0, 0.5
    tx = blr.lie_multiplicative(0.5, ess=ess, momentum=0.5, weight_decay=d)

    def start():
        params = jnp.array([0.5, -0.1])
        return params, tx.init(params)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params * 0, state, params, statistic=jnp.zeros((2, 2)))
        return (params + updates, state), None

    (params, state), _ = run_steps(step, start, length=3000)
    np.testing.assert_allclose(params, 0.0, atol=1e-9)  # symmetric, as the prior is
    z = np.random.default_rng(1).normal(size=(2, 400_000))
    n = np.asarray(jax.jit(LAWS["rayleigh"].of_normal)(z))
    plus, minus = float(state.plus[0]), float(state.minus[0])
    theta = plus * n[0] - minus * n[1]
    assert ess * d * np.mean(plus * n[0] * theta) == pytest.approx(1.0, abs=0.02)
    assert ess * d * np.mean(-minus * n[1] * theta) == pytest.approx(1.0, abs=0.02)


# --- what the exponentials and the keys give ------------------------------------------------------


@functools.cache
def one_step_of_both():
    """Updates, group elements and whether both posteriors are proper, after one step of each."""
    affine, multiplicative = blr.lie_affine(1.0, ess=50.0), blr.lie_multiplicative(1.0, ess=50.0)

    @jax.jit
    def step(params, state, gains, c):
        updates, state = affine.update(jnp.ones(2), state, params, statistic=c[0])
        moved, gains = multiplicative.update(jnp.ones(2), gains, params, statistic=c)
        proper = [blr.posterior(s, params).proper for s in (state, gains)]
        return state, gains, (updates, moved), (state.spread, gains.plus, gains.minus), proper

    return jax.jit(lambda p: (affine.init(p), multiplicative.init(p))), step


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e6, 1e15, 1e25, 1e30, np.inf, np.nan])
def test_group_elements_stay_positive_for_any_statistic(size):
    params = np.array([0.5, -0.5], np.float32)
    init, step = one_step_of_both()
    state, gains = init(params)
    for sign in (1.0, -1.0, -1.0, 1.0):
        c = np.full((2, 2), sign * size, np.float32)
        state, gains, updates, elements, proper = step(params, state, gains, c)
        for x in map(np.asarray, elements):
            assert np.all(np.isfinite(x) & (x > 0))
        assert all(np.all(np.isfinite(x)) for x in updates)
        assert all(proper)
    assert int(state.skipped) == int(gains.skipped) == (0 if size < 1e26 else 4)


def test_signs_of_multiplicative_weights_change():
    tx = blr.lie_multiplicative(0.05, ess=1000.0, init_offset=0.1)
    loss = lambda w: jnp.sum((w + jnp.array([1.0, -1.0])) ** 2)  # noqa: E731

    def start():
        params = jnp.array([0.5, -0.5])
        return params, tx.init(params)

    def step(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, samples=4)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = params + updates
        return (params, state), (params, blr.posterior(state, params).mean)

    params, mean = (x[-1] for x in run_steps(step, start, length=600)[1])
    assert params[0] < -0.5 and params[1] > 0.5
    np.testing.assert_allclose(params, mean, rtol=1e-5)


MAKERS = {
    "additive": lambda **k: blr.lie_additive(0.1, **k),
    "affine": lambda **k: blr.lie_affine(0.1, ess=50.0, **k),
    "multiplicative": lambda **k: blr.lie_multiplicative(0.1, ess=50.0, **k),
}


@pytest.mark.parametrize("name", MAKERS)
def test_noise_is_fresh_at_each_step_of_one_compiled_loop(name):
    """Drawn inside jit, it must not be frozen when the step is traced."""
    tx, params = MAKERS[name](), np.array([0.5, -0.5], np.float32)

    def step(state, _):
        draw = blr.sample(state, params) - params
        return tx.update(jnp.zeros(2), state, params)[1], draw

    _, draws = run_steps(step, lambda: tx.init(jnp.asarray(params)), length=40)
    assert len(np.unique(draws, axis=0)) == 40
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.5


def test_additive_skips_what_is_not_finite_and_counts_it():
    tx = blr.lie_additive(0.1)

    def start():
        params = jnp.ones(2)
        return params, tx.init(params)

    def step(carry, grads):
        params, state = carry  # as they are: the step is looked at, not made
        updates, state = tx.update(grads, state, params)
        skipped = optax.tree.get(state, "skipped")
        return (params, state), (updates, blr.sample(state, params), skipped)

    grads = np.array([[1.0, 1.0], [np.nan, 1.0], [1.0, 1.0]], np.float32)
    _, (updates, weights, skipped) = run_steps(step, start, grads)
    assert not np.any(updates[1])
    assert skipped.tolist() == [0, 1, 1]
    assert np.any(weights[1] != weights[0])
    assert np.all(np.isfinite(updates[2])) and np.any(updates[2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_multiplicative_parameters_are_the_rounded_mean(dtype):
    """Steps too small for half precision add up in the gains, and the parameters follow."""
    tx, c = (
        blr.lie_multiplicative(1e-4, ess=1e6, momentum=0.0),
        np.array([[1.0], [-1.0]], np.float32),
    )

    def start():
        params = jnp.ones(1, dtype)
        return params, tx.init(params)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params, statistic=c)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, blr.posterior(state, params).mean)

    params, mean = (x[-1] for x in run_steps(step, start, length=300)[1])
    assert float(mean[0]) < 0.98
    np.testing.assert_allclose(np.float32(params), mean, rtol=0.6 * float(jnp.finfo(dtype).eps))


# --- the posteriors -------------------------------------------------------------------------------


def student(z):
    """A law of the user's own: heavy tails, mean zero."""
    return jnp.sinh(z)


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("additive", "gaussian"),
        ("additive", "laplace"),
        ("additive", student),
        ("affine", "uniform"),
        ("multiplicative", "rayleigh"),
        ("multiplicative", "log_normal"),
    ],
)
def test_posteriors_draw_with_their_moments_and_predict(name, noise):
    tx = MAKERS[name](noise=noise)
    params = {"w": np.array([[0.5], [-1.0]], np.float32), "b": np.zeros(1, np.float32)}
    x = np.array([[1.0, 2.0]], np.float32)

    @jax.jit
    def look(params):
        state = tx.init(params)
        q = blr.posterior(state, params)
        f = blr.predict_regression(
            jax.random.key(1), q, lambda w, x: x @ w["w"] + w["b"], x, samples=4096, chunk=1024
        )
        # This step's weights are draws of the same law.
        weights = jax.vmap(lambda key: blr.sample(blr.reseed(state, key), params)["w"])
        weights = weights(jax.random.split(jax.random.key(2), 20_000))
        return q, q.mean, q.variance, q.sample(jax.random.key(0), (40_000,)), f.epistemic, weights

    q, *found = look(params)
    mean, variance, draws, epistemic, weights = jax.tree.map(np.asarray, found)
    jax.tree.map(lambda m, p: np.testing.assert_allclose(m, p, atol=1e-7), mean, params)
    for leaf in ("w", "b"):
        spread = np.sqrt(variance[leaf])
        assert draws[leaf].shape == (40_000, *params[leaf].shape)
        assert np.all(np.abs(draws[leaf].mean(0) - params[leaf]) < 5 * spread / 200)
        np.testing.assert_allclose(draws[leaf].std(0), spread, rtol=0.06)
    assert not np.array_equal(draws["w"][:, 1, 0], draws["b"][:, 0])
    expected = np.square(x) @ variance["w"] + variance["b"]
    np.testing.assert_allclose(epistemic, expected, rtol=0.15)
    np.testing.assert_allclose(weights.std(0), np.sqrt(variance["w"]), rtol=0.06)
    copy = pickle.loads(pickle.dumps(q))
    assert copy.family == q.family


def test_laplace_posteriors_have_densities(x64):
    params = {"w": np.array([0.5, -1.0])}
    theta = {"w": np.array([[0.4, -1.3], [0.7, 0.0]])}
    tx = blr.lie_additive(0.1, noise_scale=0.3, noise="laplace")

    @jax.jit
    def look(params, theta):
        q = blr.posterior(tx.init(params), params)
        signed = blr.posterior(blr.lie_multiplicative(0.1, ess=10.0).init(params), params)
        return q, signed, q.log_prob(theta), q.entropy()

    q, signed, log_prob, entropy = look(params, theta)
    truth = scipy.stats.laplace(params["w"], 0.3)
    np.testing.assert_allclose(log_prob, truth.logpdf(theta["w"]).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(entropy, truth.entropy().sum(), rtol=1e-12)
    with pytest.raises(ValueError, match="no exponential family"):
        q * q
    with pytest.raises(ValueError, match="no closed form"):
        signed.log_prob(params)


def test_posteriors_of_one_law_merge_and_others_stand_side_by_side():
    params = {"a": np.ones(2, np.float32), "b": np.zeros(3, np.float32)}
    labels = {"a": "x", "b": "y"}

    @jax.jit
    def look(params):
        first, second = MAKERS["multiplicative"](), MAKERS["multiplicative"](init_offset=0.5)
        other, found = MAKERS["affine"](), []
        for two in (second, other):
            tx = optax.partition({"x": first, "y": two}, labels)
            both, alone = (blr.posterior(t.init(params), params) for t in (tx, two))
            found.append((both, both.variance["b"], alone.variance["b"]))
        return found

    (_, *merged), (beside, *variances) = look(params)
    np.testing.assert_array_equal(*merged)
    assert isinstance(beside.family, blr.families.SideBySide)
    np.testing.assert_array_equal(*variances)


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
    ones = np.ones(2, np.float32)
    for make in MAKERS.values():
        with pytest.raises(ValueError, match="needs params"):
            make().update(ones, jax.jit(make().init)(ones))
        with pytest.raises(ValueError, match="floating-point"):
            make().init(np.ones(2, np.int32))
