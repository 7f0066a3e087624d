"""Every optimizer equals `blr_update` with its stated choices, on small random problems, 20 steps.

Where the docstring states an approximation (the root of RMSprop and Adam, bias correction), the
test states what is equal: the statistic, and the step up to that root.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

import blr_optax as blr

STEPS = 20
N = 40
DIAGONAL = blr.families.get("gaussian_diagonal")


def problem(seed=0, dim=4):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (N, dim))
    y = (x @ jax.random.normal(keys[1], (dim,)) > 0.3).astype(x.dtype)

    def loss(w, x, y):
        z = x @ w
        return jnp.mean(jax.nn.softplus(z) - y * z) + 0.05 * jnp.sum(jnp.cos(w))

    return loss, jax.random.normal(keys[2], (dim,)), (x, y)


def minibatches(batch, size=8):
    for t in range(STEPS):
        index = (jnp.arange(size) * 7 + 3 * t) % N
        yield tuple(a[index] for a in batch)


def run_blr(tx, params, batches):
    state, path = tx.init(params), []
    update = jax.jit(lambda s, p, b: tx.update(None, s, p, batch=b))
    for batch in batches:
        updates, state = update(state, params, batch)
        params = params + updates
        path.append((params, blr.posterior(state, params)))
    return path


def run_row(tx, loss, params, batches):
    @jax.jit
    def step(state, params, batch):
        grads = jax.grad(loss)(blr.sample(state, params), *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, path = tx.init(params), []
    for batch in batches:
        params, state = step(state, params, batch)
        path.append((params, blr.posterior(state, params)))
    return path


def assert_paths(a, b, tolerance, variance=True):
    for t, ((m, q), (n, r)) in enumerate(zip(a, b, strict=True)):
        np.testing.assert_allclose(m, n, rtol=tolerance, atol=tolerance, err_msg=f"mean, step {t}")
        if variance:
            np.testing.assert_allclose(q.variance, r.variance, rtol=tolerance, err_msg=f"step {t}")


def test_gradient_descent_is_a_known_unit_covariance(x64):
    loss, params, batch = problem()
    full = [batch] * STEPS
    rule = blr.blr_update("gaussian_fixed", loss, 0.3, estimator=blr.estimators.delta())
    row = blr.gradient_descent(0.3)
    assert_paths(run_row(row, loss, params, full), run_blr(rule, params, full), 1e-10, False)


def test_sgd_is_the_known_covariance_step_size_over_ess(x64):
    loss, params, batch = problem(1)
    alpha, ess = 0.2, 30.0
    fixed = blr.families.get("gaussian_fixed")
    init = blr.Posterior(
        fixed, fixed.natural(mean=params, precision=jnp.eye(params.size) * ess / alpha)
    )
    rule = blr.blr_update(
        "gaussian_fixed", loss, 1.0, ess=ess, init=init, estimator=blr.estimators.delta()
    )
    row = blr.sgd(alpha, ess=ess)
    batches = list(minibatches(batch))
    assert_paths(run_row(row, loss, params, batches), run_blr(rule, params, batches), 1e-10)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_follows_optax_to_the_bit(momentum, nesterov):
    same_steps(blr.sgd(0.1, momentum, nesterov, ess=7.0), optax.sgd(0.1, momentum, nesterov))


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
    loss, params, batch = problem(2)
    a = b = params
    state_a, state_b = ours.init(a), theirs.init(b)
    for piece in minibatches(batch):
        grads = jax.grad(loss)(a, *piece)
        updates_a, state_a = ours.update(grads, state_a, a)
        updates_b, state_b = theirs.update(grads, state_b, b)
        np.testing.assert_array_equal(updates_a, updates_b)
        a, b = a + updates_a, b + updates_b


def test_defaults_are_optax_defaults():
    import inspect

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
    gradients = jax.random.normal(jax.random.key(3), (STEPS, 3), jnp.float64)
    params = jnp.zeros(3)
    rms = blr.rmsprop(alpha, decay=1 - rho, eps=0.0, initial_scale=1.0, ess=ess)
    init = blr.Posterior(DIAGONAL, DIAGONAL.natural(mean=params, precision=jnp.full(3, ess)))
    rule = blr.blr_update(
        "gaussian_diagonal",
        lambda w, g: w @ g,
        rho,
        ess=ess,
        init=init,
        estimator=blr.estimators.delta(blr.estimators.squared_gradient(1)),
        step="plain",
    )
    state, state_rule = rms.init(params), rule.init(params)
    a = b = params
    for g in gradients:
        step, state = rms.update(g, state, a)
        step_rule, state_rule = rule.update(None, state_rule, b, batch=(g,))
        a, b = a + step, b + step_rule
        v = 1.0 / blr.posterior(state_rule, b).variance / ess
        np.testing.assert_allclose(optax.tree.get(state, "nu"), v, rtol=1e-12)
        np.testing.assert_allclose(step_rule, -rho * g / v, rtol=1e-9)
        np.testing.assert_allclose(step, -alpha * g / np.sqrt(v), rtol=1e-9)
        precision = 1.0 / blr.posterior(state, a).variance
        np.testing.assert_allclose(precision, ess * np.sqrt(v), rtol=1e-12)


@pytest.mark.parametrize("prior_precision", [0.0, 3.0])
def test_adam_posterior_is_the_preconditioner(prior_precision, x64):
    loss, params, batch = problem(4)
    ess, eps, b2 = 50.0, 1e-4, 0.9
    tx = blr.adam(0.01, b2=b2, eps=eps, ess=ess, prior_precision=prior_precision)
    state, v = tx.init(params), np.zeros(4)
    for t, piece in enumerate(minibatches(batch), 1):
        grads = jax.grad(loss)(params, *piece)
        updates, state = tx.update(grads, state, params)
        params = params + updates
        v = b2 * v + (1 - b2) * np.square(grads)
        wanted = ess * (np.sqrt(v / (1 - b2**t)) + eps) + prior_precision
        q = blr.posterior(state, params)
        np.testing.assert_allclose(1.0 / q.variance, wanted, rtol=1e-10)
        np.testing.assert_array_equal(q.mean.round(12), params.round(12))


def test_rmsprop_posterior_is_its_own_denominator(x64):
    """For every variant, ess times what optax divides by: lr * g / step."""
    loss, params, batch = problem(5)
    for options in (
        {"eps": 1e-3},
        {"eps": 1e-3, "eps_in_sqrt": False},
        {"eps": 1e-2, "centered": True},
        {"eps": 1e-3, "bias_correction": True},
        {"eps": 1e-2, "centered": True, "bias_correction": True},
    ):
        tx = blr.rmsprop(0.1, ess=9.0, **options)
        state = tx.init(params)
        for piece in minibatches(batch):
            grads = jax.grad(loss)(params, *piece)
            updates, state = tx.update(grads, state, params)
            denominator = -0.1 * grads / updates
            precision = 1.0 / blr.posterior(state, params).variance
            np.testing.assert_allclose(precision, 9.0 * denominator, rtol=1e-9)


def test_newton_is_newton(x64):
    loss, params, batch = problem(6)
    ridge = lambda w, x, y: loss(w, x, y) + jnp.sum(w**2)  # noqa: E731  # convex
    path = run_blr(blr.newton(ridge, ess=N), params, [batch] * 8)
    m = params
    for found, q in path:
        hessian = jax.hessian(ridge)(m, *batch)
        m = m - jnp.linalg.solve(hessian, jax.grad(ridge)(m, *batch))
        np.testing.assert_allclose(found, m, rtol=1e-9, atol=1e-12)
        covariance = q.standard()["covariance"]
        np.testing.assert_allclose(covariance @ (N * hessian), np.eye(4), atol=1e-9)


def test_online_newton_formula(x64):
    loss, params, batch = problem(7)
    rho, ess, prior_precision = 0.2, 30.0, 2.0
    family = blr.families.get("gaussian")
    s0, m0 = prior_precision * jnp.eye(4), jnp.full(4, 0.1)
    prior = blr.Posterior(family, family.natural(mean=m0, precision=s0))
    tx = blr.online_newton(loss, rho, ess=ess, prior=prior, step="plain")
    batches = list(minibatches(batch))
    path = run_blr(tx, params, batches)
    m, s = params, s0
    for (found, q), piece in zip(path, batches, strict=True):
        g = ess * jax.grad(loss)(m, *piece) + s0 @ (m - m0)
        s = (1 - rho) * s + rho * (ess * jax.hessian(loss)(m, *piece) + s0)
        m = m - rho * jnp.linalg.solve(s, g)
        np.testing.assert_allclose(found, m, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(q.family.precision(q.natural), s, rtol=1e-8, atol=1e-8)


def test_variational_online_newton_formula(x64):
    """E_q[grad l] and E_q[hess l] by an independent quadrature in two dimensions."""
    loss, params, batch = problem(8, dim=2)
    rho, ess = 0.3, 30.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = jnp.array(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2))
    w = jnp.array(np.outer(weights, weights).ravel() / (2 * np.pi))
    estimator = blr.estimators.gauss_hermite(60)
    tx = blr.variational_online_newton(loss, rho, ess=ess, estimator=estimator, step="plain")
    path = run_blr(tx, params, [batch] * 4)
    m, s = params, jnp.eye(2)
    for found, q in path:
        root = jnp.linalg.cholesky(jnp.linalg.inv(s))
        points = m + z @ root.T
        g = w @ jax.vmap(lambda p: jax.grad(loss)(p, *batch))(points)
        h = jnp.tensordot(w, jax.vmap(lambda p: jax.hessian(loss)(p, *batch))(points), 1)
        s = (1 - rho) * s + rho * ess * h
        m = m - rho * ess * jnp.linalg.solve(s, g)
        np.testing.assert_allclose(found, m, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(q.family.precision(q.natural), s, rtol=1e-8)


def priors(params):
    return {
        "weight_decay": ({"weight_decay": 0.02}, DIAGONAL.natural(mean=0 * params, precision=0.02)),
        "prior": (None, DIAGONAL.natural(mean=0.3 + 0 * params, precision=0.05 + 0 * params)),
        "flat": ({"weight_decay": 0.0}, None),
    }


@pytest.mark.parametrize("generator", ["hash", "threefry"])
@pytest.mark.parametrize("which", ["weight_decay", "prior", "flat"])
@pytest.mark.parametrize("row", ["soba", "ivon"])
def test_ivon_and_soba_are_the_second_order_natural_step(row, which, generator, x64):
    loss, params, batch = problem(9)
    b2, ess, hess_init = 0.9, 30.0, 0.4
    keywords, prior = priors(params)[which]
    if prior is not None:  # the rule wants the total prior, ess times the per-example one
        prior = blr.Posterior(DIAGONAL, DIAGONAL.combine((ess, prior)))
    if keywords is None:
        keywords = {"prior": prior}
    init_precision = ess * hess_init + (0.0 if prior is None else 1.0 / prior.variance)
    init = blr.Posterior(
        DIAGONAL, DIAGONAL.natural(mean=params, precision=init_precision + 0 * params)
    )
    common = {"b2": b2, "hess_init": hess_init, "key": 5, "generator": generator, **keywords}
    if row == "soba":
        tx = blr.soba(1 - b2, ess, **common)
    else:
        tx = blr.ivon(1 - b2, ess, b1=0.0, rescale_lr=False, **common)
    estimator = blr.estimators.monte_carlo(
        1, curvature=blr.estimators.reparameterized(), generator=generator
    )
    rule = blr.blr_update(
        "gaussian_diagonal",
        loss,
        1 - b2,
        ess=ess,
        prior=prior,
        init=init,
        estimator=estimator,
        step="improved",
        key=5,
    )
    batches = list(minibatches(batch))
    assert_paths(run_row(tx, loss, params, batches), run_blr(rule, params, batches), 1e-9)


@pytest.mark.parametrize("step", ["plain", "improved", "improved_old"])
def test_scale_by_precision_steps(step, x64):
    loss, params, batch = problem(10)
    convex = lambda w, x, y: loss(w, x, y) + jnp.sum(w**2)  # noqa: E731
    b2, ess = 0.995, 200.0  # small steps, so that the plain one stays inside too
    tx = optax.chain(
        blr.scale_by_precision(ess, b2=b2, hess_init=2.0, step=step, generator="threefry"),
        optax.scale_by_learning_rate(1 - b2),
    )
    init = blr.Posterior(DIAGONAL, DIAGONAL.natural(mean=params, precision=2.0 * ess))
    rule = blr.blr_update(
        "gaussian_diagonal",
        convex,
        1 - b2,
        ess=ess,
        init=init,
        step=step,
        estimator=blr.estimators.monte_carlo(1, curvature=blr.estimators.reparameterized()),
    )
    batches = list(minibatches(batch))
    assert_paths(run_row(tx, convex, params, batches), run_blr(rule, params, batches), 1e-9)


def test_precision_halves_at_most_and_a_quadratic_takes_one_closed_form_step(x64):
    """rho = 1 on exact curvature a: p = p0 (1 + u + u^2 / 2) with u = (a + d - p0) / p0."""
    a, delta, h0 = jnp.array([0.5, 2.0, 30.0]), 0.1, 1.0
    tx = blr.ivon(1.0, 1e4, b2=0.0, b1=0.0, hess_init=h0, weight_decay=delta)
    params = jnp.zeros(3)
    _, state = tx.update(0 * params, tx.init(params), params, curvature=a)
    h = optax.tree.get(state, "precision") - delta
    np.testing.assert_allclose(h, a + 0.5 * (h0 - a) ** 2 / (h0 + delta), rtol=1e-12)
    for _ in range(100):
        _, state = tx.update(0 * params, state, params, curvature=a)
    np.testing.assert_allclose(optax.tree.get(state, "precision") - delta, a, rtol=1e-6)


def test_retraction_adds_the_noise_floor_of_the_paper():
    """Flat loss with gradient noise: h settles at (1 - b2) ess E[g^2] / 2."""
    ess, rho, sd = 1e6, 1e-3, 0.3
    tx = blr.ivon(0.0, ess, b2=1 - rho, hess_init=1.0, weight_decay=0.0)
    params = jnp.zeros(400)

    def body(carry, key):
        state, total = carry
        grads = sd * jax.random.normal(key, params.shape)
        _, state = tx.update(grads, state, params)
        return (state, total + optax.tree.get(state, "precision").mean()), None

    keys = jax.random.split(jax.random.key(0), 12_000)
    state, _ = jax.lax.scan(body, (tx.init(params), 0.0), keys[:6000])[0]
    (_, total), _ = jax.lax.scan(body, (state, 0.0), keys[6000:])
    assert float(total / 6000) == pytest.approx(0.5 * rho * ess * sd**2, rel=0.05)


def test_ivon_mean_is_the_variational_optimum():
    """One-dimensional logistic loss: it settles at the argmin of ess E_q[l] + KL."""
    x = jnp.array([[-2.0], [-1.0], [0.5], [1.0], [3.0]])
    y = jnp.array([0.0, 0.0, 1.0, 0.0, 1.0])
    delta, ess = 0.1, 5.0
    loss = lambda w: jnp.mean(jax.nn.softplus(x @ w) - y * (x @ w))  # noqa: E731
    tx = blr.ivon(optax.exponential_decay(0.3, 1000, 0.3), ess, b2=0.999, weight_decay=delta)
    params = jnp.zeros(1)

    def body(carry, _):
        params, state, total = carry
        est = blr.estimate(loss, state, params, samples=8, antithetic=True)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        params = params + updates
        return (params, state, total + params), None

    start = (params, tx.init(params), jnp.zeros(1))
    (params, state, _), _ = jax.lax.scan(body, start, length=4000)
    (_, state, total), _ = jax.lax.scan(body, (params, state, jnp.zeros(1)), length=4000)
    mean, variance = total / 4000, 1.0 / (ess * optax.tree.get(state, "precision"))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / np.sqrt(2 * np.pi)

    vloss = jax.jit(jax.vmap(lambda w: loss(w[None])))

    def free_energy(p):
        m, v = p[0], np.exp(p[1])
        expected = float(weights @ np.asarray(vloss(jnp.asarray(m + np.sqrt(v) * nodes))))
        prior = 0.5 * ess * delta * (m * m + v) - 0.5 * np.log(v)
        return ess * expected + prior

    best = minimize(free_energy, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-5}).x
    assert float(mean[0]) == pytest.approx(best[0], abs=0.05)
    assert float(variance[0]) == pytest.approx(np.exp(best[1]), rel=0.1)
