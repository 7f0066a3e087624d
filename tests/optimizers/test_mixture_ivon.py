"""The mixture of IVONs: against one IVON, quadrature, the rule, and the modes it must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import make_batch, make_params
from tools import run_steps

import blr_optax as blr
from blr_optax.optimizers.mixture_ivon import repulsion

MIXTURE = blr.families.get("mixture", family="normal")
COMMON = {"ess": 30.0, "hess_init": 0.5, "b2": 0.9, "weight_decay": 0.1}
close = np.testing.assert_allclose


def stacked(loss):
    """The sum over components of a mean loss, and the losses."""

    def total(theta, *batch):
        losses = jax.vmap(lambda w: loss(w, *batch))(theta)
        return jnp.sum(losses), losses

    return total


def run(tx, loss, params, steps, learn=False, look=lambda params, state: None):
    """(mean, state) after some steps, and what is looked at after every one."""
    loss = stacked(loss)

    def start():
        mean = jax.tree.map(jnp.asarray, params)
        return mean, tx.init(mean)

    def step(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, has_aux=True)
        extra = {"losses": est.aux} if learn else {}
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), look(params, state)

    return run_steps(step, start, length=steps)


def test_distant_components_are_independent(x64):
    """As far apart as initialisations of a network: every component is the IVON of an ensemble."""
    far = np.array([[0.0, 1.0], [50.0, -20.0], [-70.0, 3.0]])
    loss = lambda w: jnp.sum(jnp.cos(w) + 0.01 * w**2)  # noqa: E731
    repelled, alone = (
        run(blr.mixture_ivon(0.1, **COMMON, repulsion=r), loss, far, 30)[0][0] for r in (1.0, 0.0)
    )
    np.testing.assert_array_equal(repelled, alone)


def three():
    """(weights, means, precisions) of three overlapping components in two dimensions."""
    pi = np.array([0.5, 0.2, 0.3])
    mean = np.array([[0.0, 0.3], [1.0, -0.5], [-0.7, 0.1]])
    return pi, mean, np.array([[1.0, 2.0], [0.7, 1.5], [2.0, 0.8]])


def test_repulsion_has_the_derivatives_of_the_log_ratio(x64):
    pi, m, s = three()
    theta = m + np.array([[0.5, -1.0], [0.2, 2.0], [-1.5, 0.4]])
    split = lambda x: {"a": x[:, :1], "b": x[:, 1]}  # noqa: E731  # any tree of leaves

    @jax.jit
    def look(theta, m, s):
        lam = MIXTURE.natural(weights=pi, mean=m, precision=s)

        def ratios(k, x):
            """The ratio of component k, and its derivatives."""
            ratio = lambda x: MIXTURE.log_prob(lam, x) - MIXTURE.component_log_prob(lam, x)[k]  # noqa: E731
            return ratio(x), jax.grad(ratio)(x), jnp.diag(jax.hessian(ratio)(x))

        found = repulsion(split(theta), split(m), split(s), jnp.log(pi))
        return found, jax.vmap(ratios)(jnp.arange(3), theta)

    (value, slope, bend), (ratio, g, h) = jax.tree.map(np.asarray, look(theta, m, s))
    joined = lambda x: np.column_stack([x["a"], x["b"]])  # noqa: E731
    close(value, ratio, rtol=1e-12)
    close(joined(slope), g, rtol=1e-11)
    close(joined(bend), h, rtol=1e-11, atol=1e-12)


def test_expected_repulsion_is_the_derivative_of_the_entropy(x64):
    """E_k[...] and the entropy of the mixture, each by sums over its own grid of the plane."""
    pi, m, s = three()
    grid = np.linspace(-9, 9, 361)
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)

    def negentropy(pi, m, v):
        log_n = -0.5 * jnp.sum((points[:, None] - m) ** 2 / v + jnp.log(2 * jnp.pi * v), axis=-1)
        log_q = jax.nn.logsumexp(log_n + jnp.log(pi), axis=-1)
        return jnp.sum(jnp.exp(log_q) * log_q) * (grid[1] - grid[0]) ** 2

    x, h = np.linspace(-8, 8, 161, retstep=True)
    z = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    w = h * h * np.exp(-0.5 * np.sum(z * z, axis=1)) / (2 * np.pi)

    @jax.jit
    def expected(z, w):
        draws, parts = m + z[:, None] / jnp.sqrt(s), (jnp.asarray(m), jnp.asarray(s))
        found = jax.vmap(lambda t: repulsion(t, *parts, jnp.log(pi)))(draws)
        return jax.tree.map(lambda x: jnp.tensordot(w, x, 1), found)

    derivatives = jax.jit(jax.grad(negentropy, (0, 1, 2)))(pi, m, 1 / s)
    d_pi, d_m, d_v = map(np.asarray, derivatives)
    value, slope, bend = map(np.asarray, expected(z, w))
    close(slope, d_m / pi[:, None], rtol=1e-6, atol=1e-8)
    close(bend, 2 * d_v / pi[:, None] + s, rtol=1e-6, atol=1e-8)
    own = 0.5 * np.sum(np.log(s), axis=1)  # E_k[log q_k] up to a constant
    cost = value + own
    close(cost - cost[-1], d_pi - d_pi[-1], rtol=1e-6, atol=1e-8)


def test_a_step_is_the_rules_with_the_control_variates(x64):
    """The mixture family's natural gradient and move, from the same draws."""
    _, m, s = three()
    ess, rho, decay, weight_rate = 5.0, 0.3, 0.05, 0.07
    loss = lambda w: jnp.sum(jnp.cosh(w - 0.4)) + 0.5 * jnp.prod(w)  # noqa: E731
    potential = lambda w: ess * (loss(w) + 0.5 * decay * jnp.sum(w**2))  # noqa: E731

    @jax.jit
    def both(m, s):
        tx = blr.mixture_ivon(
            rho, ess=ess, b1=0.0, b2=1 - rho, weight_decay=decay, hess_init=s / ess - decay,
            rescale_lr=False, weight_rate=weight_rate,
        )  # fmt: skip
        state = tx.init(m)
        theta = blr.sample(state, m)
        lam = blr.posterior(state, m).natural
        noise = ((theta - m) * jnp.sqrt(s))[None]
        _, gradient = MIXTURE.natural_gradient_at(lam, potential, noise, jnp.ones(1))
        # The family averages grad log q_k = -S (theta - m) and the pull of the prior at the draw;
        # both have their means taken here.
        away = theta - m
        linear = gradient.components.linear + s * away - ess * decay * away
        own = -0.5 * jnp.sum(away**2 * s, axis=1) + 0.5 * m.shape[1]
        drawn = 0.5 * ess * decay * jnp.sum(theta**2 - m**2 - 1 / s, axis=1)
        odds = gradient.log_odds - (own - own[-1] + drawn - drawn[-1])[:-1]
        components = type(gradient.components)(linear, gradient.components.quadratic)
        expected = MIXTURE.move(
            lam, type(gradient)(components, odds), rho, "improved",
            weight_learning_rate=weight_rate,
        )  # fmt: skip
        grads = jax.vmap(jax.grad(loss))(theta)
        hess = jax.vmap(lambda w: jnp.diag(jax.hessian(loss)(w)))(theta)
        updates, state = tx.update(grads, state, m, statistic=hess, losses=jax.vmap(loss)(theta))
        found = blr.posterior(state, m + updates).natural
        return [MIXTURE.standard(x) for x in (lam, found, expected)]

    first, found, expected = jax.tree.map(np.asarray, both(m, s))
    close(first["variance"], 1 / s, rtol=1e-12)
    for name in ("mean", "variance", "weights"):
        close(found[name], expected[name], rtol=1e-9, err_msg=name)


def moments(params, state):
    """(marginal mean, marginal variance, standard parameters)"""
    q = blr.posterior(state, params)
    return q.mean, q.variance, q.standard()


def test_both_wells_keep_a_component(x64):
    wells = lambda w: jnp.sum((w**2 - 4.0) ** 2) / 8  # noqa: E731
    tx = blr.mixture_ivon(0.05, ess=100.0, b2=0.95, hess_init=4.0)
    (params, _), seen = run(tx, wells, np.array([[-0.1], [0.1]]), 600, look=moments)
    mean, variance, standard = jax.tree.map(lambda x: x[-1], seen)
    close(np.sort(np.asarray(params)[:, 0]), [-2.0, 2.0], atol=0.1)
    close(mean, [0.0], atol=0.1)
    close(variance, [4.0], rtol=0.1)
    close(1 / standard["variance"], 100 * (3 * 4 - 4) / 2 + 0.01, rtol=0.3)  # hess = 4 each


def test_components_share_out_a_flat_bottom(x64):
    """Where the loss has no opinion only the responsibilities keep components apart."""
    box = lambda w: jnp.sum((w / 3) ** 8)  # noqa: E731
    start = np.array([[0.2], [-0.2]])
    apart = []
    for r in (1.0, 0.0):
        tx = blr.mixture_ivon(0.02, ess=3.0, b2=0.98, repulsion=r, rescale_lr=False)
        _, path = run(tx, box, start, 900, look=lambda params, state: params)
        apart.append(np.mean([np.abs(path[n - 1][0] - path[n - 1][1]) for n in (500, 700, 900)]))
    assert apart[0] > 1.5 > 3 * apart[1]


def test_mixing_weights_are_learnt(x64):
    weights, mean = np.array([0.8, 0.2]), np.array([[-3.0], [3.0]])

    def loss(w):
        target = MIXTURE.natural(weights=weights, mean=mean, precision=jnp.ones((2, 1)))
        return -MIXTURE.log_prob(target, w)

    tx = blr.mixture_ivon(
        0.02, ess=1.0, b2=0.98, weight_decay=0.0, weight_rate=0.02, rescale_lr=False
    )
    look = lambda *args: moments(*args)[2]  # noqa: E731
    _, seen = run(tx, loss, mean, 1500, learn=True, look=look)
    found = jax.tree.map(lambda x: x[-1], seen)
    close(found["weights"], weights, atol=0.1)
    close(found["mean"], mean, atol=0.3)
    close(found["variance"], 1.0, rtol=0.4)


def test_posterior_is_over_one_network_and_predicts():
    one, (x, _) = jax.tree.map(np.asarray, (make_params(), make_batch()))
    params = jax.tree.map(lambda x: np.stack([x, 1 - x, x + 2]), one)
    tx = blr.mixture_ivon(0.1, ess=1e8)
    apply = lambda w, x: jnp.tanh(x @ w["w"])  # noqa: E731

    @jax.jit
    def look(params):
        q = blr.posterior(tx.init(params), params)
        p = blr.predict(jax.random.key(1), q, apply, x, samples=16)
        return q.sample(jax.random.key(0), (300,)), q.mean, p.probabilities, p.epistemic

    draws, mean, probabilities, epistemic = jax.tree.map(np.asarray, look(params))
    assert {k: v.shape[1:] for k, v in draws.items()} == {k: v.shape for k, v in one.items()}
    nearest = np.argmin(np.abs(draws["c"][:, None] - params["c"]), axis=1)
    close(np.bincount(nearest, minlength=3) / 300, 1 / 3, atol=0.1)
    assert np.max(np.abs(draws["w"] - params["w"][nearest])) < 1e-2  # one network each
    close(mean["w"], np.mean(params["w"], 0), rtol=1e-5)
    assert probabilities.shape == (8, 2) and np.all(np.isfinite(epistemic))


def test_a_prior_is_that_of_one_network(x64):
    one = {"w": np.arange(2.0)}
    params = {"w": np.arange(6.0).reshape(3, 2)}
    family = blr.families.get("gaussian_diagonal")

    @jax.jit
    def look(params):
        prior = blr.Distribution(family, family.natural(mean=one, precision=4.0))
        tx = blr.mixture_ivon(0.5, ess=2.0, prior=prior, hess_init=1.0, rescale_lr=False)
        state = tx.init(params)
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zero, state, params, statistic=zero)
        return optax.tree.get(state, "precision")["w"], updates["w"]

    precision, updates = look(params)
    close(precision, np.full((3, 2), 3.0))
    # The repulsion of distant components vanishes: the pull of the prior is left, to first order.
    close(updates, -0.5 * 2.0 * (params["w"] - one["w"]) / 3.0, rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="same leading axis"):
        blr.mixture_ivon(0.1, ess=10.0).init(
            {"a": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
        )
    with pytest.raises(ValueError, match="same leading axis"):
        blr.mixture_ivon(0.1, ess=10.0).init(make_params())
    params = np.ones((2, 3), np.float32)
    tx = blr.mixture_ivon(0.1, ess=10.0, weight_rate=0.1)
    with pytest.raises(ValueError, match="losses"):
        tx.update(params, jax.jit(tx.init)(params), params)
    for name in ("weight_rate", "repulsion"):
        with pytest.raises(ValueError, match=name):
            blr.mixture_ivon(0.1, ess=10.0, **{name: -1.0})
