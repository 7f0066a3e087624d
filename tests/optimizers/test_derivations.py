"""Every optimizer equals `blr_update` with its stated choices, on small random problems, 20 steps.

Where the docstring states an approximation (the root of RMSprop and Adam, bias correction), the
test states what is equal: the statistic, and the step up to that root.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize
from tools import built_inside, run_steps

import blr_optax as blr

STEPS = 20
N = 40
DIAGONAL = blr.families.get("gaussian_diagonal")


def loss(w, x, y):
    z = x @ w
    return jnp.mean(jax.nn.softplus(z) - y * z) + 0.05 * jnp.sum(jnp.cos(w))


def convex(w, x, y):
    return loss(w, x, y) + jnp.sum(w**2)


def problem(seed=0, dim=4):
    """(loss, first parameters, all examples), in numpy."""

    @jax.jit
    def draw(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        x = jax.random.normal(keys[0], (N, dim))
        y = (x @ jax.random.normal(keys[1], (dim,)) > 0.3).astype(x.dtype)
        return jax.random.normal(keys[2], (dim,)), (x, y)

    return loss, *jax.tree.map(np.asarray, draw(seed))


def minibatches(batch, size=8):
    """A batch for every step, stacked."""
    index = (np.arange(size) * 7 + 3 * np.arange(STEPS)[:, None]) % N
    return tuple(a[index] for a in batch)


def repeated(batch, steps=STEPS):
    return tuple(np.stack([a] * steps) for a in batch)


def variance_of(q):
    return q.variance


def by_rule(tx):
    """(transformation, update) of the rule, which evaluates the loss itself."""

    def update(params, state, batch):
        updates, state = tx.update(None, state, params, batch=batch)
        return params + updates, state

    return tx, update


def by_gradient(tx, loss):
    """(transformation, update) with the gradient at the step's weights."""

    def update(params, state, batch):
        grads = jax.grad(loss)(blr.sample(state, params), *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, update


def paths(ways, params, batches, look=variance_of, fused=False):
    """For every way: means, and what is looked at of the posterior, after every step."""

    def step(carry, batch):
        carry = [update(*one, batch) for (_, update), one in zip(ways, carry, strict=True)]
        return carry, [(m, look(blr.posterior(state, m))) for m, state in carry]

    def start():
        mean = jnp.asarray(params)
        return [(mean, tx.init(mean)) for tx, _ in ways]

    return run_steps(step, start, batches, fused=fused)[1]


def assert_same_paths(first, second, params, batches, tolerance, variance=True, fused=False):
    assert_paths(*paths((first, second), params, batches, fused=fused), tolerance, variance)


def assert_paths(first, second, tolerance, variance=True):
    (m, v), (n, w) = first, second
    for t in range(len(m)):
        np.testing.assert_allclose(
            m[t], n[t], rtol=tolerance, atol=tolerance, err_msg=f"mean, step {t}"
        )
        if variance:
            np.testing.assert_allclose(v[t], w[t], rtol=tolerance, err_msg=f"step {t}")


def diagonal(mean, precision):
    return blr.Distribution(DIAGONAL, DIAGONAL.natural(mean=mean, precision=precision))


def test_gradient_descent_is_a_known_unit_covariance(x64):
    loss, params, batch = problem()
    full = repeated(batch)
    rule = blr.blr_update("gaussian_fixed", loss, 0.3, estimator=blr.estimators.delta())
    row = blr.gradient_descent(0.3)
    assert_same_paths(by_gradient(row, loss), by_rule(rule), params, full, 1e-10, variance=False)


def test_sgd_is_the_known_covariance_step_size_over_ess(x64):
    loss, params, batch = problem(1)
    alpha, ess = 0.2, 30.0
    fixed = blr.families.get("gaussian_fixed")

    def rule():
        init = blr.Distribution(
            fixed, fixed.natural(mean=params, precision=jnp.eye(params.size) * ess / alpha)
        )
        return blr.blr_update(
            "gaussian_fixed", loss, 1.0, ess=ess, init=init, estimator=blr.estimators.delta()
        )

    ways = by_gradient(blr.sgd(alpha, ess=ess), loss), by_rule(built_inside(rule))
    assert_same_paths(*ways, params, minibatches(batch), 1e-10)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_follows_optax_to_the_bit(momentum, nesterov):
    same_steps(
        blr.sgd(0.1, momentum=momentum, nesterov=nesterov, ess=7.0),
        optax.sgd(0.1, momentum, nesterov),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eps": 1e-3, "eps_in_sqrt": False, "initial_scale": 0.5},
        {"centered": True, "eps": 1e-3, "momentum": 0.9, "nesterov": True},
        {"bias_correction": True, "decay": 0.99},
    ],
)
def test_rmsprop_follows_optax_to_the_bit(options):
    same_steps(blr.rmsprop(0.01, **options), optax.rmsprop(0.01, **options))


@pytest.mark.parametrize(
    "options", [{}, {"b1": 0.5, "b2": 0.9, "eps": 1e-4, "eps_root": 1e-5}, {"nesterov": True}]
)
def test_adam_follows_optax_to_the_bit(options):
    same_steps(blr.adam(0.01, **options), optax.adam(0.01, **options))


def same_steps(ours, theirs):
    """Eager: inside one program equal operations may be rounded differently."""
    loss, params, batch = problem(2)
    grad = jax.jit(jax.grad(loss))
    a = b = jnp.asarray(params)
    state_a, state_b = ours.init(a), theirs.init(b)
    for piece in zip(*minibatches(batch), strict=True):
        grads = grad(a, *piece)
        updates_a, state_a = ours.update(grads, state_a, a)
        updates_b, state_b = theirs.update(grads, state_b, b)
        np.testing.assert_array_equal(updates_a, updates_b)
        a, b = a + updates_a, b + updates_b


def test_defaults_are_optax_defaults():
    for ours, theirs in (
        (blr.sgd, optax.sgd),
        (blr.rmsprop, optax.rmsprop),
        (blr.adam, optax.adam),
    ):
        mine = inspect.signature(ours).parameters
        for name, parameter in inspect.signature(theirs).parameters.items():
            assert name in mine, f"{ours.__name__} lacks optax's {name}"
            assert mine[name].default == parameter.default


def test_rmsprop_is_the_rule_with_squares_up_to_the_root(x64):
    """On linear losses (gradients that do not depend on the mean) v is the rule's precision."""
    rho, alpha, ess = 0.1, 0.01, 5.0
    gradients = np.random.default_rng(3).normal(size=(STEPS, 3))
    rms = blr.rmsprop(alpha, decay=1 - rho, eps=0.0, initial_scale=1.0, ess=ess)
    rule = built_inside(
        lambda: blr.blr_update(
            "gaussian_diagonal",
            lambda w, g: w @ g,
            rho,
            ess=ess,
            init=diagonal(jnp.zeros(3), jnp.full(3, ess)),
            estimator=blr.estimators.delta(blr.estimators.squared_gradient(1)),
            step="plain",
        )
    )

    def start():
        params = jnp.zeros(3)
        return params, rms.init(params), params, rule.init(params)

    def step(carry, g):
        a, state, b, state_rule = carry
        move, state = rms.update(g, state, a)
        move_rule, state_rule = rule.update(None, state_rule, b, batch=(g,))
        a, b = a + move, b + move_rule
        variances = [blr.posterior(s, m).variance for s, m in ((state, a), (state_rule, b))]
        return (a, state, b, state_rule), (move, move_rule, optax.tree.get(state, "nu"), *variances)

    _, (move, move_rule, nu, variance, of_rule) = run_steps(step, start, gradients)
    v = 1.0 / of_rule / ess
    np.testing.assert_allclose(nu, v, rtol=1e-12)
    np.testing.assert_allclose(move_rule, -rho * gradients / v, rtol=1e-9)
    np.testing.assert_allclose(move, -alpha * gradients / np.sqrt(v), rtol=1e-9)
    np.testing.assert_allclose(1.0 / variance, ess * np.sqrt(v), rtol=1e-12)


def gradients_and_posteriors(tx, seed):
    """Of every step: the gradient, the update, the parameters after it, and q's two moments."""
    loss, params, batch = problem(seed)

    def start():
        return jnp.asarray(params), tx.init(jnp.asarray(params))

    def step(carry, piece):
        params, state = carry
        grads = jax.grad(loss)(params, *piece)
        updates, state = tx.update(grads, state, params)
        params = params + updates
        q = blr.posterior(state, params)
        return (params, state), (grads, updates, params, q.mean, q.variance)

    return run_steps(step, start, minibatches(batch))[1]


@pytest.mark.parametrize("prior_precision", [0.0, 3.0])
def test_adam_posterior_is_the_preconditioner(prior_precision, x64):
    ess, eps, b2 = 50.0, 1e-4, 0.9
    tx = blr.adam(0.01, b2=b2, eps=eps, ess=ess, prior_precision=prior_precision)
    v = np.zeros(4)
    steps = zip(*gradients_and_posteriors(tx, 4), strict=True)
    for t, (grads, _, params, mean, variance) in enumerate(steps, 1):
        v = b2 * v + (1 - b2) * np.square(grads)
        wanted = ess * (np.sqrt(v / (1 - b2**t)) + eps) + prior_precision
        np.testing.assert_allclose(1.0 / variance, wanted, rtol=1e-10, err_msg=f"step {t}")
        np.testing.assert_array_equal(mean.round(12), params.round(12))


def test_rmsprop_posterior_is_its_own_denominator(x64):
    """For every variant, ess times what optax divides by: lr * g / step."""
    for options in (
        {"eps": 1e-3},
        {"eps": 1e-3, "eps_in_sqrt": False},
        {"eps": 1e-2, "centered": True},
        {"eps": 1e-3, "bias_correction": True},
        {"eps": 1e-2, "centered": True, "bias_correction": True},
    ):
        tx = blr.rmsprop(0.1, ess=9.0, **options)
        grads, updates, _, _, variance = gradients_and_posteriors(tx, 5)
        denominator = -0.1 * grads / updates
        np.testing.assert_allclose(1.0 / variance, 9.0 * denominator, rtol=1e-9, err_msg=options)


def derivatives(loss):
    """(gradient, Hessian) as one program, in numpy."""
    both = jax.jit(lambda *args: (jax.grad(loss)(*args), jax.hessian(loss)(*args)))
    return lambda *args: tuple(map(np.asarray, both(*args)))


def test_newton_is_newton(x64):
    _, params, batch = problem(6)
    look = lambda q: q.standard()["covariance"]  # noqa: E731
    way = by_rule(blr.newton(convex, ess=N))
    ((means, covariances),) = paths([way], params, repeated(batch, 8), look)
    m, at = params, derivatives(convex)
    for found, covariance in zip(means, covariances, strict=True):
        gradient, hessian = at(m, *batch)
        m = m - np.linalg.solve(hessian, gradient)
        np.testing.assert_allclose(found, m, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(covariance @ (N * hessian), np.eye(4), atol=1e-9)


def precision_of(q):
    return q.family.precision(q.natural)


def test_online_newton_formula(x64):
    loss, params, batch = problem(7)
    rho, ess, prior_precision = 0.2, 30.0, 2.0
    family = blr.families.get("gaussian")
    s0, m0 = prior_precision * np.eye(4), np.full(4, 0.1)

    def make():
        prior = blr.Distribution(family, family.natural(mean=m0, precision=s0))
        return blr.online_newton(loss, rho, ess=ess, prior=prior, step="plain")

    batches = minibatches(batch)
    ((means, precisions),) = paths([by_rule(built_inside(make))], params, batches, precision_of)
    m, s, at = params, s0, derivatives(loss)
    for found, precision, *piece in zip(means, precisions, *batches, strict=True):
        gradient, hessian = at(m, *piece)
        g = ess * gradient + s0 @ (m - m0)
        s = (1 - rho) * s + rho * (ess * hessian + s0)
        m = m - rho * np.linalg.solve(s, g)
        np.testing.assert_allclose(found, m, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(precision, s, rtol=1e-8, atol=1e-8)


def test_variational_online_newton_formula(x64):
    """E_q[grad l] and E_q[hess l] by an independent quadrature in two dimensions."""
    loss, params, batch = problem(8, dim=2)
    rho, ess = 0.3, 30.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    w = np.outer(weights, weights).ravel() / (2 * np.pi)
    estimator = blr.estimators.gauss_hermite(60)
    tx = blr.variational_online_newton(loss, rho, ess=ess, estimator=estimator, step="plain")
    ((means, precisions),) = paths([by_rule(tx)], params, repeated(batch, 4), precision_of)
    at_points = jax.jit(
        jax.vmap(lambda p: (jax.grad(loss)(p, *batch), jax.hessian(loss)(p, *batch)))
    )
    m, s = params, np.eye(2)
    for found, precision in zip(means, precisions, strict=True):
        root = np.linalg.cholesky(np.linalg.inv(s))
        gradients, hessians = map(np.asarray, at_points(m + z @ root.T))
        s = (1 - rho) * s + rho * ess * np.tensordot(w, hessians, 1)
        m = m - rho * ess * np.linalg.solve(s, w @ gradients)
        np.testing.assert_allclose(found, m, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(precision, s, rtol=1e-8)


def priors(params):
    return {
        "weight_decay": ({"weight_decay": 0.02}, DIAGONAL.natural(mean=0 * params, precision=0.02)),
        "prior": (None, DIAGONAL.natural(mean=0.3 + 0 * params, precision=0.05 + 0 * params)),
        "flat": ({"weight_decay": 0.0}, None),
    }


@functools.cache
def second_order(which, generator):
    """The paths of soba, of ivon, and of the rule: for tests under float64."""
    loss, params, batch = problem(9)
    b2, ess, hess_init = 0.9, 30.0, 0.4

    def make(row):
        keywords, prior = priors(params)[which]
        if prior is not None:  # the rule wants the total prior, ess times the per-example one
            prior = blr.Distribution(DIAGONAL, DIAGONAL.combine((ess, prior)))
        if keywords is None:
            keywords = {"prior": prior}
        init_precision = ess * hess_init + (0.0 if prior is None else 1.0 / prior.variance)
        common = {"b2": b2, "hess_init": hess_init, "key": 5, "generator": generator, **keywords}
        if row == "soba":
            return blr.soba(1 - b2, ess=ess, **common)
        if row == "ivon":
            return blr.ivon(1 - b2, ess=ess, b1=0.0, rescale_lr=False, **common)
        return blr.blr_update(
            "gaussian_diagonal",
            loss,
            1 - b2,
            ess=ess,
            prior=prior,
            init=diagonal(params, init_precision + 0 * params),
            estimator=blr.estimators.monte_carlo(
                1, curvature=blr.estimators.reparameterized(), generator=generator
            ),
            step="improved",
            key=5,
        )

    soba, ivon, rule = (built_inside(lambda row=row: make(row)) for row in ("soba", "ivon", "rule"))
    ways = by_gradient(soba, loss), by_gradient(ivon, loss), by_rule(rule)
    found = paths(ways, params, minibatches(batch), fused=generator == "hash")
    return dict(zip(("soba", "ivon", "rule"), found, strict=True))


@pytest.mark.parametrize("generator", ["hash", "jax"])
@pytest.mark.parametrize("which", ["weight_decay", "prior", "flat"])
@pytest.mark.parametrize("row", ["soba", "ivon"])
def test_ivon_and_soba_are_the_second_order_natural_step(row, which, generator, x64):
    found = second_order(which, generator)
    assert_paths(found[row], found["rule"], 1e-9)


@pytest.mark.parametrize("step", ["plain", "improved", "improved_old"])
def test_scale_by_precision_steps(step, x64):
    _, params, batch = problem(10)
    b2, ess = 0.995, 200.0  # small steps, so that the plain one stays inside too
    tx = optax.chain(
        blr.scale_by_precision(ess=ess, b2=b2, hess_init=2.0, step=step, generator="jax"),
        optax.scale_by_learning_rate(1 - b2),
    )
    rule = built_inside(
        lambda: blr.blr_update(
            "gaussian_diagonal",
            convex,
            1 - b2,
            ess=ess,
            init=diagonal(params, 2.0 * ess),
            step=step,
            estimator=blr.estimators.monte_carlo(1, curvature=blr.estimators.reparameterized()),
        )
    )
    ways = by_gradient(tx, convex), by_rule(rule)
    assert_same_paths(*ways, params, minibatches(batch), 1e-9)


def test_precision_halves_at_most_and_a_quadratic_takes_one_closed_form_step(x64):
    """rho = 1 on exact curvature a: p = p0 (1 + u + u^2 / 2) with u = (a + d - p0) / p0."""
    a, delta, h0 = np.array([0.5, 2.0, 30.0]), 0.1, 1.0
    tx = blr.ivon(1.0, ess=1e4, b2=0.0, b1=0.0, hess_init=h0, weight_decay=delta)

    def step(state, _):
        _, state = tx.update(jnp.zeros(3), state, jnp.zeros(3), statistic=a)
        return state, optax.tree.get(state, "precision") - delta

    _, h = run_steps(step, lambda: tx.init(jnp.zeros(3)), length=101)
    np.testing.assert_allclose(h[0], a + 0.5 * (h0 - a) ** 2 / (h0 + delta), rtol=1e-12)
    np.testing.assert_allclose(h[-1], a, rtol=1e-6)


def test_retraction_adds_the_noise_floor_of_the_paper():
    """Flat loss with gradient noise: h settles at (1 - b2) ess E[g^2] / 2."""
    ess, rho, sd, size = 1e6, 1e-3, 0.3, 400
    tx = blr.ivon(0.0, ess=ess, b2=1 - rho, hess_init=1.0, weight_decay=0.0)

    def step(state, key):
        grads = sd * jax.random.normal(key, (size,))
        _, state = tx.update(grads, state, jnp.zeros(size))
        return state, optax.tree.get(state, "precision").mean()

    keys = jax.jit(lambda key: jax.random.split(key, 12_000))(jax.random.key(0))
    _, mean = run_steps(step, lambda: tx.init(jnp.zeros(size)), keys)
    assert float(mean[6000:].mean()) == pytest.approx(0.5 * rho * ess * sd**2, rel=0.05)


def test_ivon_mean_is_the_variational_optimum():
    """One-dimensional logistic loss: it settles at the argmin of ess E_q[l] + KL."""
    x = np.array([[-2.0], [-1.0], [0.5], [1.0], [3.0]], np.float32)
    y = np.array([0.0, 0.0, 1.0, 0.0, 1.0], np.float32)
    delta, ess = 0.1, 5.0
    loss = lambda w: jnp.mean(jax.nn.softplus(x @ w) - y * (x @ w))  # noqa: E731
    tx = blr.ivon(optax.exponential_decay(0.3, 1000, 0.3), ess=ess, b2=0.999, weight_decay=delta)

    def start():
        return jnp.zeros(1), tx.init(jnp.zeros(1))

    def step(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, samples=8, antithetic=True)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = params + updates
        return (params, state), (params, optax.tree.get(state, "precision"))

    _, (path, precision) = run_steps(step, start, length=8000)
    mean, variance = path[4000:].mean(0), 1.0 / (ess * precision[-1])
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / np.sqrt(2 * np.pi)

    vloss = jax.jit(jax.vmap(lambda w: loss(w[None])))

    def free_energy(p):
        m, v = p[0], np.exp(p[1])
        expected = float(weights @ np.asarray(vloss(np.float32(m + np.sqrt(v) * nodes))))
        prior = 0.5 * ess * delta * (m * m + v) - 0.5 * np.log(v)
        return ess * expected + prior

    best = minimize(free_energy, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-5}).x
    assert float(mean[0]) == pytest.approx(best[0], abs=0.05)
    assert float(variance[0]) == pytest.approx(np.exp(best[1]), rel=0.1)
