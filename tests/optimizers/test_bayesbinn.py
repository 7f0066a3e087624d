"""BayesBiNN and STE against recorded trajectories of the official code, and against the rule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import flatten, follow, problem_loss, recorded, start_of, unflatten
from tools import built_inside, load_golden, run_steps

import blr_optax as blr
from blr_optax._random import standard_logistic

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
        prior = blr.Distribution(TREE, TREE.Natural(linear))
    return blr.bayesbinn(
        hyper["lr"],
        ess=hyper["train_set_size"],
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
    tx = built_inside(lambda: transformation(case, names, shapes))
    loss, noise = problem_loss(problem), None
    params = unflatten(case["init_lambda"], names, shapes)
    sampled = case["hyper"]["num_samples"] > 0
    if sampled:
        u = recorded(case, "u")
        noise = unflatten(0.5 * np.log(u / (1 - u)), names, shapes)

    def start():
        old_mu = jax.tree.map(jnp.asarray, unflatten(case["init_mu"], names, shapes))
        return *start_of(tx, params)(), old_mu

    def step(carry, given):
        (params, state, old_mu), (noise, batch) = carry, given
        noise = {"noise": noise} if sampled else {}
        est = blr.estimate(loss, state, params, batch, **noise)
        curvature = est.statistic
        if case["stale_mu"] and sampled:
            spread = lambda mu: 1 - mu**2 + 1e-10  # noqa: E731
            curvature = jax.tree.map(
                lambda c, x, mu: c * spread(jnp.tanh(x)) / spread(mu), curvature, params, old_mu
            )
        updates, state = tx.update(est.grad, state, params, statistic=curvature)
        mu, params = jax.tree.map(jnp.tanh, params), optax.apply_updates(params, updates)
        return (params, state, mu), (est.grad, params, state[0].momentum.ema, mu)

    _, seen = run_steps(step, start, (noise, recorded(case, "batch")))
    gradient, mean, average, mu = (flatten(tree, names) for tree in seen)
    follow(gradient, [np.mean(one["grad"], 0) for one in case["steps"]], 1e-9, "gradient")
    follow(mean, recorded(case, "lambda"), 1e-9, "lambda")
    follow(average, recorded(case, "momentum"), 1e-9, "momentum")
    if case["stale_mu"]:
        follow(mu, recorded(case, "mu"), 1e-9, "stale mu")


@pytest.mark.parametrize(("file", "case"), STE_CASES)
def test_straight_through_estimator(x64, file, case):
    """Signs, gradients and latent weights of every step, to 1e-9."""
    problem, hyper = load_golden(file)["problem"], case["hyper"]
    names, shapes = problem["leaf_names"], problem["leaf_shapes"]
    b1, b2 = hyper["betas"]
    tx, loss = blr.ste(hyper["lr"], b1=b1, b2=b2, eps=hyper["eps"]), problem_loss(problem)

    def step(carry, batch):
        params, state = carry
        binary = blr.sample(state, params)
        grads = jax.grad(loss)(binary, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (binary, grads, params)

    start = start_of(tx, unflatten(case["init_w"], names, shapes))
    _, seen = run_steps(step, start, recorded(case, "batch"))
    binary, grads, latent = (flatten(tree, names) for tree in seen)
    np.testing.assert_array_equal(binary, recorded(case, "w_binary"))
    follow(grads, recorded(case, "grad"), 1e-9, "gradient")
    follow(latent, recorded(case, "latent"), 1e-9, "latent")


ONES = np.ones(2, np.float32)
A, START = np.array([0.3, -0.8, 0.1]), np.array([0.4, -0.2, 0.9])


def quartic(w, a):
    return jnp.sum(a * w) + 0.3 * (w[0] * w[1] - 0.5 * w[2]) ** 2


def signs(family, linear):
    return blr.Distribution(family, family.Natural(jnp.asarray(linear)))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_bayesbinn_is_the_rule_with_the_concrete_relaxation(x64, temperature):
    """The gradient in mu is that of the relaxed loss; the step is `natural_step`'s."""
    rho, ess, linear = 0.1, 7.0, np.array([0.1, 0.2, -0.3])
    noise = 0.5 * np.random.default_rng(0).logistic(size=(5, 1, 3))
    tx = built_inside(
        lambda: blr.bayesbinn(
            rho, ess=ess, temperature=temperature, floor=0.0, prior=signs(TREE, linear)
        )
    )

    def step(carry, e):
        params, state = carry
        relaxed = lambda x: quartic(jnp.tanh((x + e[0]) / temperature), A)  # noqa: E731
        lam = SIGNS.Natural(params)
        in_lambda = SIGNS.Natural(jax.grad(relaxed)(params))
        grad_mu = SIGNS.inverse_fisher_product(lam, in_lambda)
        expected = blr.natural_step(SIGNS, lam, grad_mu, rho, signs(SIGNS, linear), ess)
        est = blr.estimate(quartic, state, params, A, noise=e)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = params + updates
        return (params, state), (est.statistic, grad_mu.linear, params, expected.linear)

    _, (curvature, grad_mu, found, expected) = run_steps(step, start_of(tx, START), noise)
    np.testing.assert_allclose(curvature, grad_mu, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_bayesbinn_at_the_mean_is_the_rule_on_a_loss_of_mu(x64):
    """Without noise a linear loss is treated exactly, as `closed_form()` does it."""
    tx = blr.bayesbinn(0.1, ess=5.0, generator=None)
    rule = built_inside(
        lambda: blr.blr_update(
            TREE,
            lambda mu, a: jnp.sum(a * mu.linear),
            0.1,
            ess=5.0,
            prior=signs(TREE, np.zeros(3)),
            init=signs(TREE, START),
            estimator=blr.estimators.closed_form(),
        )
    )

    def start():
        mean = jnp.tanh(START)
        return *start_of(tx, START)(), mean, rule.init(mean)

    def step(carry, _):
        params, state, mean, state_rule = carry
        grads = jax.grad(lambda w: w @ A)(blr.sample(state, params))
        updates, state = tx.update(grads, state, params)
        params = params + updates
        moved, state_rule = rule.update(None, state_rule, mean, batch=(A,))
        mean = mean + moved
        return (params, state, mean, state_rule), (blr.posterior(state, params).mean, mean)

    np.testing.assert_allclose(*run_steps(step, start, length=5)[1], rtol=1e-12)


def test_ste_is_the_rule_without_entropy_at_the_most_likely_signs(x64):
    """A prior that is the posterior itself cancels the entropy: lambda - rho ess grad l(sign)."""
    rho, ess = 0.1, 7.0
    tx = blr.ste(0.0, inner=optax.sgd(rho * ess), clip=None)

    def step(carry, _):
        params, state = carry
        lam = SIGNS.Natural(params)
        mode = jnp.where(params < 0, -1.0, 1.0)
        grad_mu = SIGNS.Natural(jax.grad(quartic)(mode, A))
        expected = blr.natural_step(SIGNS, lam, grad_mu, rho, blr.Distribution(SIGNS, lam), ess)
        updates, state = tx.update(jax.grad(quartic)(blr.sample(state, params), A), state, params)
        params = params + updates
        return (params, state), (params, expected.linear)

    np.testing.assert_allclose(*run_steps(step, start_of(tx, START), length=10)[1], rtol=1e-12)


@jax.jit
def cold_draw(params):
    return blr.sample(blr.bayesbinn(0.1, ess=1.0, temperature=1e-10).init(params), params)


def test_a_cold_relaxation_looks_at_signs(x64):
    """tau -> 0: w = sign(lambda + e); with lambda large it is what STE looks at."""
    params = 40.0 * np.array([1.0, -1.0, 1.0])
    straight = jax.jit(lambda p: blr.sample(blr.ste(0.1).init(p), p))(params)
    np.testing.assert_array_equal(cold_draw(params), straight)
    drawn = np.asarray(cold_draw(np.zeros(4000)))
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    assert abs(np.mean(drawn)) < 0.05


def test_expected_gradient_tends_to_the_exact_one(x64):
    """E[s grad l(w)] is (E[l | +1] - E[l | -1]) / 2 as tau -> 0, by enumeration."""
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    tx = blr.bayesbinn(0.1, ess=1.0, temperature=0.05)

    @jax.jit
    def look(params):
        values = jax.vmap(lambda w: quartic(w, A))(corners)
        odds = jax.vmap(lambda w: blr.Distribution(SIGNS, SIGNS.Natural(params)).log_prob(w))(
            corners
        )
        est = blr.estimate(quartic, tx.init(params), params, A, samples=100_000)
        return values, odds, est.statistic

    values, odds, curvature = map(np.asarray, look(START))
    p = np.exp(np.sum(odds, 1))
    exact = [
        0.5 * sum(s * np.sum((p * values)[up := corners[:, j] == s]) / np.sum(p[up])
                  for s in (1.0, -1.0))
        for j in range(3)
    ]  # fmt: skip
    np.testing.assert_allclose(curvature, exact, atol=0.05)


def test_signs_of_a_linear_model_are_found():
    """The posterior settles on the signs that made the labels, and knows which it cannot see."""
    truth = np.array([1.0, -1.0, -1.0, 1.0, 1.0], np.float32)
    x = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    x[:, 4] = 0.0
    y = x @ truth
    loss = lambda w, x, y: 0.5 * jnp.mean((x @ w - y) ** 2)  # noqa: E731
    tx = blr.bayesbinn(0.01, ess=200.0, b1=0.9)

    def start():
        return start_of(tx, blr.random_signs(jax.random.key(1), truth, 0.5))()

    def step(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, x, y)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = params + updates
        return (params, state), blr.posterior(state, params).mean

    mean = run_steps(step, start, length=1000)[1][-1]
    np.testing.assert_allclose(mean[:4], truth[:4], atol=1e-3)
    assert abs(mean[4]) < 1e-3  # the prior's even odds


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 1e-10])
def test_saturated_signs_keep_their_scale(dtype, temperature):
    """1 - tanh(10)^2 is 8e-9, which rounding loses in 1 - w^2 and in 1 - mu^2 alike."""
    params, e = np.full(5, 10.0, dtype), np.array([[-9.0, -2.0, 0.0, 1.0, 3.0]], np.float32)

    @jax.jit
    def look(params, e):
        state = blr.bayesbinn(1e-4, ess=1.0, temperature=temperature).init(params)
        return blr.estimate(lambda w: jnp.sum(w.astype(jnp.float32)), state, params, noise=e)

    def spread(x):
        return 1 / np.cosh(np.minimum(np.abs(x), 300.0)) ** 2 + 1e-10

    x = (10.0 + np.asarray(e[0], float)) / temperature
    wanted = spread(x) / (temperature * spread(10.0))
    np.testing.assert_allclose(look(params, e).statistic, wanted, rtol=2e-3)


def test_logistic_noise_has_the_quantiles_of_its_law_and_no_outlier():
    draw = jax.jit(lambda key: standard_logistic(key, jnp.zeros(2**20), "hash"))
    drawn = np.sort(np.asarray(draw(jax.random.key(0)), float))
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
    make, params = getattr(blr, name), np.ones(2, np.float32)
    numbers = {"learning_rate": 0.1} | ({} if name == "sam" else {"ess": 10.0})
    tx = optax.inject_hyperparams(make, static_args=static)(**numbers)
    updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p, statistic=p))(params)
    assert np.all(np.isfinite(updates))
    with pytest.raises(ValueError, match="static_args"):
        optax.inject_hyperparams(make)(**numbers).init(params)


W_AND_B = {"w": np.array([0.5, -2.0], np.float32), "b": np.array([1.0], np.float32)}


def test_a_posterior_beside_points_is_the_next_prior():
    def beside(**more):
        return optax.partition(
            {"signs": blr.bayesbinn(0.1, ess=10.0, **more), "sgd": optax.sgd(0.1)},
            {"w": "signs", "b": "sgd"},
        )

    @jax.jit
    def twice(params):
        q = blr.posterior(beside().init(params), params)
        return q.mean, optax.tree.get(beside(prior=q).init(params), "prior")

    mean, prior = twice(W_AND_B)
    np.testing.assert_allclose(mean["w"], np.tanh(W_AND_B["w"]), rtol=1e-6)
    np.testing.assert_array_equal(prior["w"], W_AND_B["w"])


def test_posterior_of_signs_serves_as_the_next_prior(x64):
    params = {name: x.astype(float) for name, x in W_AND_B.items()}

    @jax.jit
    def found(params):
        q = blr.posterior(blr.bayesbinn(0.1, ess=10.0).init(params), params)
        again = blr.bayesbinn(1.0, ess=10.0, prior=q)
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = again.update(zero, again.init(params), zero)
        one = blr.Distribution(SIGNS, SIGNS.Natural(jnp.array(0.3)))
        spread = blr.bayesbinn(0.1, ess=10.0, prior=one).init(params)[0].prior
        return q.sample(jax.random.key(0), (100,)), q.mean, updates, spread

    draws, mean, updates, spread = found(params)
    assert set(np.unique(draws["w"])) == {-1.0, 1.0}
    np.testing.assert_allclose(mean["w"], np.tanh(params["w"]))
    np.testing.assert_allclose(updates["w"], params["w"])  # the pull of the prior alone
    np.testing.assert_allclose(spread["w"], 0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blr.bayesbinn(0.1, ess=10.0, temperature=0.0), "temperature=0 has no gradient"),
        (
            lambda: blr.bayesbinn(0.1, ess=10.0, floor=-1.0),
            "floor=-1.0 must be a plain finite number",
        ),
        (lambda: blr.bayesbinn(0.1, ess=10.0, b1=1.0), "b1=1.0 must be in"),
        (lambda: blr.bayesbinn(0.1, ess=10.0, generator="x"), "generator='x' is unknown"),
        (lambda: blr.bayesbinn(0.1, ess=0.0), "ess=0.0 must be positive"),
        (
            lambda: blr.bayesbinn(
                0.1,
                ess=10.0,
                prior=jax.jit(lambda p: blr.posterior(blr.sgd(0.1).init(p), p))(ONES),
            ).init(ONES),
            "prior must be a mean-field Distribution of rademacher signs",
        ),
        (lambda: blr.ste(0.1, clip=0.0), "clip=0.0 must be positive"),
        (lambda: blr.ste(0.1, b1=2.0), "b1=2.0 must be in"),
        (
            lambda: blr.bayesbinn(0.1, ess=10.0, temperature=jnp.array(1.0)),
            "must be a plain finite",
        ),
        (lambda: blr.random_signs(jax.random.key(0), ONES, 0.0), "scale=0.0 must be"),
        (lambda: blr.random_signs(jax.random.key(0), np.ones(2, int)), "random_signs"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_random_signs_are_plus_or_minus_their_scale():
    params = {"w": np.zeros(400, np.float32), "b": np.zeros((), np.float32)}
    signs = blr.random_signs(jax.random.key(0), params, 2.5)
    assert set(np.unique(signs["w"])) == {-2.5, 2.5}
    assert abs(np.sum(np.sign(signs["w"]))) < 5 * np.sqrt(400)
    assert np.shape(signs["b"]) == ()
