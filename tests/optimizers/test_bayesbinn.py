"""BayesBiNN and STE against recorded trajectories of the official code, and against the rule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import flatten, follows, problem_loss, unflatten
from tools import load_golden

import blr_optax as blr
from blr_optax.estimators._noise import standard_logistic

FILES = ("bayesbinn_ste_logreg", "bayesbinn_ste_mlp")
CASES = [
    pytest.param(file, case, id=f"{file}-{case['name']}")
    for file in FILES
    for case in load_golden(file)["cases"]
    if case["algorithm"] == "BayesBiNN"
]
STE_CASES = [
    pytest.param(file, case, id=f"{file}-{case['name']}")
    for file in FILES
    for case in load_golden(file)["cases"]
    if case["algorithm"] == "STE"
]
SIGNS = blr.families.get("rademacher")
TREE = blr.families.MeanField("rademacher")


def transformation(case, names, shapes):
    hyper = case["hyper"]
    prior = None
    if hyper["prior_lamda"] is not None:
        linear = unflatten(hyper["prior_lamda"], names, shapes)
        prior = blr.Posterior(TREE, TREE.Natural(linear))
    return blr.bayesbinn(
        hyper["lr"],
        hyper["train_set_size"],
        temperature=hyper["temperature"],
        b1=hyper["betas"],
        kl_weight=hyper["reweight"],
        prior=prior,
        generator="hash" if hyper["num_samples"] else None,
    )


@pytest.mark.parametrize(("file", "case"), CASES)
def test_bayesbinn_repository(x64, file, case):
    """Natural parameters and averages of every step, to 1e-9.

    The official code keeps mu = tanh lambda from before its last update, so its gradient's scale
    divides by 1 - mu^2 + c of the step before. `stale_mu` cases are met by exactly this factor, the
    others, the algorithm as published, without it.
    """
    problem = load_golden(file)["problem"]
    names, shapes = problem["leaf_names"], problem["leaf_shapes"]
    tx, loss = transformation(case, names, shapes), problem_loss(problem)
    params = unflatten(case["init_lambda"], names, shapes)
    old_mu, state = unflatten(case["init_mu"], names, shapes), tx.init(params)
    sampled = case["hyper"]["num_samples"] > 0

    @jax.jit
    def advance(params, state, noise, batch, old_mu):
        noise = {"noise": noise} if sampled else {}
        est = blr.estimate(loss, state, params, batch, **noise)
        curvature = est.curvature
        if case["stale_mu"] and sampled:
            spread = lambda mu: 1 - mu**2 + 1e-10  # noqa: E731
            curvature = jax.tree.map(
                lambda c, x, mu: c * spread(jnp.tanh(x)) / spread(mu), curvature, params, old_mu
            )
        updates, state = tx.update(est.grad, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, est

    for step in case["steps"]:
        noise = None
        if sampled:
            u = np.asarray(step["u"])
            noise = unflatten(0.5 * np.log(u / (1 - u)), names, shapes)
        before = params
        params, state, est = advance(params, state, noise, jnp.array(step["batch"]), old_mu)
        follows(flatten(est.grad, names), np.mean(step["grad"], 0), 1e-9, "gradient")
        follows(flatten(params, names), step["lambda"], 1e-9, "lambda")
        follows(flatten(state[0].momentum.ema, names), step["momentum"], 1e-9, "momentum")
        old_mu = jax.tree.map(jnp.tanh, before)
        if case["stale_mu"]:
            follows(flatten(old_mu, names), step["mu"], 1e-9, "stale mu")


@pytest.mark.parametrize(("file", "case"), STE_CASES)
def test_straight_through_estimator(x64, file, case):
    """Signs, gradients and latent weights of every step, to 1e-9."""
    problem, hyper = load_golden(file)["problem"], case["hyper"]
    names, shapes = problem["leaf_names"], problem["leaf_shapes"]
    b1, b2 = hyper["betas"]
    tx, loss = blr.ste(hyper["lr"], b1=b1, b2=b2, eps=hyper["eps"]), problem_loss(problem)
    params = unflatten(case["init_w"], names, shapes)
    state = tx.init(params)
    for step in case["steps"]:
        signs = blr.sample(state, params)
        np.testing.assert_array_equal(flatten(signs, names), step["w_binary"])
        grads = jax.grad(loss)(signs, jnp.array(step["batch"]))
        follows(flatten(grads, names), step["grad"], 1e-9, "gradient")
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        follows(flatten(params, names), step["latent"], 1e-9, "latent")


def quartic(w, a):
    return jnp.sum(a * w) + 0.3 * (w[0] * w[1] - 0.5 * w[2]) ** 2


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_bayesbinn_is_the_rule_with_the_concrete_relaxation(x64, temperature):
    """The gradient in mu is that of the relaxed loss; the step is `natural_step`'s."""
    a, rho, ess = jnp.array([0.3, -0.8, 0.1]), 0.1, 7.0
    params = jnp.array([0.4, -0.2, 0.9])
    prior = blr.Posterior(TREE, TREE.Natural(jnp.array([0.1, 0.2, -0.3])))
    tx = blr.bayesbinn(rho, ess, temperature=temperature, floor=0.0, prior=prior)
    state = tx.init(params)
    for t in range(5):
        e = 0.5 * jax.random.logistic(jax.random.key(t), (1, 3))
        relaxed = lambda x, e=e: quartic(jnp.tanh((x + e[0]) / temperature), a)  # noqa: E731
        lam = SIGNS.Natural(params)
        in_lambda = SIGNS.Natural(jax.grad(relaxed)(params))
        grad_mu = SIGNS.inverse_fisher_product(lam, in_lambda)
        expected = blr.natural_step(
            SIGNS, lam, grad_mu, rho, blr.Posterior(SIGNS, prior.natural), ess
        )
        est = blr.estimate(quartic, state, params, a, noise=e)
        np.testing.assert_allclose(est.curvature, grad_mu.linear, rtol=1e-10, atol=1e-13)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        params = params + updates
        np.testing.assert_allclose(params, expected.linear, rtol=1e-12)


def test_bayesbinn_at_the_mean_is_the_rule_on_a_loss_of_mu(x64):
    """Without noise a linear loss is treated exactly, as `exact()` does it."""
    a, prior = jnp.array([0.3, -0.8, 0.1]), blr.Posterior(TREE, TREE.Natural(jnp.zeros(3)))
    params = jnp.array([0.4, -0.2, 0.9])
    tx = blr.bayesbinn(0.1, 5.0, generator=None)
    rule = blr.blr_update(
        TREE,
        lambda mu, a: jnp.sum(a * mu.linear),
        0.1,
        ess=5.0,
        prior=prior,
        init=blr.Posterior(TREE, TREE.Natural(params)),
        estimator=blr.estimators.exact(),
    )
    state, mean = tx.init(params), jnp.tanh(params)
    state_rule = rule.init(mean)
    for _ in range(5):
        grads = jax.grad(lambda w: w @ a)(blr.sample(state, params))
        updates, state = tx.update(grads, state, params)
        params = params + updates
        step, state_rule = rule.update(None, state_rule, mean, batch=(a,))
        mean = mean + step
        np.testing.assert_allclose(blr.posterior(state, params).mean, mean, rtol=1e-12)


def test_ste_is_the_rule_without_entropy_at_the_most_likely_signs(x64):
    """A prior that is the posterior itself cancels the entropy: lambda - rho ess grad l(sign)."""
    a, rho, ess = jnp.array([0.3, -0.8, 0.1]), 0.1, 7.0
    params = jnp.array([0.4, -0.2, 0.9])
    tx = blr.ste(0.0, inner=optax.sgd(rho * ess), clip=None)
    state = tx.init(params)
    for _ in range(10):
        lam = SIGNS.Natural(params)
        mode = jnp.where(params < 0, -1.0, 1.0)
        grad_mu = SIGNS.Natural(jax.grad(quartic)(mode, a))
        expected = blr.natural_step(SIGNS, lam, grad_mu, rho, blr.Posterior(SIGNS, lam), ess)
        updates, state = tx.update(jax.grad(quartic)(blr.sample(state, params), a), state, params)
        params = params + updates
        np.testing.assert_allclose(params, expected.linear, rtol=1e-12)


def test_a_cold_relaxation_looks_at_signs(x64):
    """tau -> 0: w = sign(lambda + e); with lambda large it is what STE looks at."""
    params = 40.0 * jnp.array([1.0, -1.0, 1.0])
    cold = blr.bayesbinn(0.1, 1.0, temperature=1e-10).init(params)
    np.testing.assert_array_equal(
        blr.sample(cold, params), blr.sample(blr.ste(0.1).init(params), params)
    )
    even = blr.bayesbinn(0.1, 1.0, temperature=1e-10).init(jnp.zeros(4000))
    drawn = blr.sample(even, jnp.zeros(4000))
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    assert abs(jnp.mean(drawn)) < 0.05


def test_expected_gradient_tends_to_the_exact_one(x64):
    """E[s grad l(w)] is (E[l | +1] - E[l | -1]) / 2 as tau -> 0, by enumeration."""
    a, params = jnp.array([0.3, -0.8, 0.1]), jnp.array([0.4, -0.2, 0.9])
    corners = jnp.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    values = jax.vmap(lambda w: quartic(w, a))(corners)
    odds = jax.vmap(lambda w: blr.Posterior(SIGNS, SIGNS.Natural(params)).log_prob(w))(corners)
    p = jnp.exp(jnp.sum(odds, 1))
    exact = [
        0.5 * sum(s * jnp.sum((p * values)[up := corners[:, j] == s]) / jnp.sum(p[up])
                  for s in (1.0, -1.0))
        for j in range(3)
    ]  # fmt: skip
    tx = blr.bayesbinn(0.1, 1.0, temperature=0.05)
    state = tx.init(params)
    est = blr.estimate(quartic, state, params, a, samples=100_000)
    np.testing.assert_allclose(est.curvature, exact, atol=0.05)


def test_signs_of_a_linear_model_are_found():
    """The posterior settles on the signs that made the labels, and knows which it cannot see."""
    truth = jnp.array([1.0, -1.0, -1.0, 1.0, 1.0])
    x = jax.random.normal(jax.random.key(0), (200, 5)).at[:, 4].set(0.0)
    y = x @ truth
    loss = lambda w, x, y: 0.5 * jnp.mean((x @ w - y) ** 2)  # noqa: E731
    params = blr.random_signs(jax.random.key(1), truth, 0.5)
    tx = blr.bayesbinn(0.01, 200.0, b1=0.9)

    def step(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, x, y)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        return (params + updates, state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, 1000)
    q = blr.posterior(state, params)
    np.testing.assert_allclose(q.mean[:4], truth[:4], atol=1e-3)
    assert abs(q.mean[4]) < 1e-3  # the prior's even odds


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 1e-10])
def test_saturated_signs_keep_their_scale(dtype, temperature):
    """1 - tanh(10)^2 is 8e-9, which rounding loses in 1 - w^2 and in 1 - mu^2 alike."""
    params, e = jnp.full(5, 10.0, dtype), jnp.array([[-9.0, -2.0, 0.0, 1.0, 3.0]])
    state = blr.bayesbinn(1e-4, 1.0, temperature=temperature).init(params)
    found = blr.estimate(lambda w: jnp.sum(w.astype(jnp.float32)), state, params, noise=e)

    def spread(x):
        return 1 / np.cosh(np.minimum(np.abs(x), 300.0)) ** 2 + 1e-10

    x = (10.0 + np.asarray(e[0], float)) / temperature
    np.testing.assert_allclose(found.curvature, spread(x) / (temperature * spread(10.0)), rtol=2e-3)


def test_logistic_noise_has_the_quantiles_of_its_law_and_no_outlier():
    drawn = np.sort(
        np.asarray(standard_logistic(jax.random.key(0), jnp.zeros(2**20), "hash"), float)
    )
    assert np.abs(drawn).max() < 16.7
    levels = np.array([1e-4, 0.01, 0.1, 0.5, 0.9, 0.99, 1 - 1e-4])
    found = drawn[(levels * len(drawn)).astype(int)]
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), levels, atol=2e-3, rtol=0.1)
    bits = np.uint32(2**32 - 1)
    u = (np.float32(bits >> 9) + np.float32(0.5)) * np.float32(2.0**-23)
    assert 0.0 < u < 1.0  # the largest word


@pytest.mark.parametrize("name", ["bayesbinn", "sam", "bsam", "evon"])
def test_injected_hyperparameters_leave_static_ones_alone(name):
    static = {
        "bayesbinn": ("temperature", "floor"),
        "sam": ("rho",),
        "bsam": ("rho",),
        "evon": ("refresh_every", "max_size"),
    }[name]
    make, params = getattr(blr, name), jnp.ones(2)
    numbers = {"learning_rate": 0.1} | ({} if name == "sam" else {"ess": 10.0})
    tx = optax.inject_hyperparams(make, static_args=static)(**numbers)
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(params, state, params, curvature=params)
    assert np.all(np.isfinite(updates))
    with pytest.raises(ValueError, match="static_args"):
        optax.inject_hyperparams(make)(**numbers).init(params)


def test_a_posterior_beside_points_is_the_next_prior():
    params = {"w": jnp.array([0.5, -2.0]), "b": jnp.array([1.0])}
    tx = optax.partition(
        {"signs": blr.bayesbinn(0.1, 10.0), "sgd": optax.sgd(0.1)}, {"w": "signs", "b": "sgd"}
    )
    q = blr.posterior(tx.init(params), params)
    np.testing.assert_allclose(q.mean["w"], np.tanh(params["w"]), rtol=1e-6)
    again = optax.partition(
        {"signs": blr.bayesbinn(0.1, 10.0, prior=q), "sgd": optax.sgd(0.1)},
        {"w": "signs", "b": "sgd"},
    )
    prior = optax.tree.get(again.init(params), "prior")
    np.testing.assert_array_equal(prior["w"], params["w"])


def test_posterior_of_signs_serves_as_the_next_prior(x64):
    params = {"w": jnp.array([0.5, -2.0]), "b": jnp.array([1.0])}
    tx = blr.bayesbinn(0.1, 10.0)
    q = blr.posterior(tx.init(params), params)
    assert set(np.unique(q.sample(jax.random.key(0), (100,))["w"])) == {-1.0, 1.0}
    np.testing.assert_allclose(q.mean["w"], np.tanh(params["w"]))
    again = blr.bayesbinn(1.0, 10.0, prior=q)
    updates, _ = again.update(
        jax.tree.map(jnp.zeros_like, params),
        again.init(params),
        jax.tree.map(jnp.zeros_like, params),
    )
    np.testing.assert_allclose(updates["w"], params["w"])  # the pull of the prior alone
    one = blr.Posterior(SIGNS, SIGNS.Natural(jnp.array(0.3)))
    spread = blr.bayesbinn(0.1, 10.0, prior=one).init(params)[0].prior
    np.testing.assert_allclose(spread["w"], 0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blr.bayesbinn(0.1, 10.0, temperature=0.0), "temperature=0 has no gradient"),
        (lambda: blr.bayesbinn(0.1, 10.0, floor=-1.0), "floor=-1.0 must be a plain finite number"),
        (lambda: blr.bayesbinn(0.1, 10.0, b1=1.0), "b1=1.0 must be in"),
        (lambda: blr.bayesbinn(0.1, 10.0, generator="x"), "generator='x' is unknown"),
        (lambda: blr.bayesbinn(0.1, 0.0), "ess=0.0 must be positive"),
        (
            lambda: blr.bayesbinn(
                0.1, 10.0, prior=blr.posterior(blr.sgd(0.1).init(jnp.ones(2)), jnp.ones(2))
            ).init(jnp.ones(2)),
            "prior must be a mean-field Posterior of rademacher signs",
        ),
        (lambda: blr.ste(0.1, clip=0.0), "clip=0.0 must be positive"),
        (lambda: blr.ste(0.1, b1=2.0), "b1=2.0 must be in"),
        (lambda: blr.bayesbinn(0.1, 10.0, temperature=jnp.ones(())), "must be a plain finite"),
        (lambda: blr.random_signs(jax.random.key(0), jnp.ones(2), 0.0), "scale=0.0 must be"),
        (lambda: blr.random_signs(jax.random.key(0), jnp.ones(2, int)), "random_signs"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
