"""The mixture of IVONs: against one IVON, quadrature, the rule, and the modes it must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import make_batch, make_params, mean_loss

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


def run(tx, loss, params, steps, learn=False):
    loss = stacked(loss)

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            est = blr.estimate(loss, state, params, has_aux=True)
            extra = {"losses": est.aux} if learn else {}
            updates, state = tx.update(est.grad, state, params, curvature=est.curvature, **extra)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, steps)[0]

    return train(params, tx.init(params))


@pytest.mark.parametrize("more", [{}, {"clip_radius": 0.1, "rescale_lr": False, "b1": 0.5}])
def test_one_component_is_ivon_to_the_bit(more):
    one = jax.tree.map(lambda x: x[None], make_params())
    batch = make_batch()
    found = []
    for make in (blr.mixture_ivon, blr.ivon):
        tx = make(0.1, **COMMON, **more)
        state, params = tx.init(one), one
        for _ in range(4):
            grads = jax.grad(lambda w: stacked(mean_loss)(w, *batch)[0])(blr.sample(state, params))
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        found.append((params, optax.tree.get(state, "precision")))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_distant_components_are_independent(x64):
    """As far apart as initialisations of a network: every component is the IVON of an ensemble."""
    far = jnp.array([[0.0, 1.0], [50.0, -20.0], [-70.0, 3.0]])
    loss = lambda w: jnp.sum(jnp.cos(w) + 0.01 * w**2)  # noqa: E731
    both = [run(blr.mixture_ivon(0.1, **COMMON, repulsion=r), loss, far, 30)[0] for r in (1.0, 0.0)]
    np.testing.assert_array_equal(*both)


def three():
    """(weights, means, precisions) of three overlapping components in two dimensions."""
    pi = jnp.array([0.5, 0.2, 0.3])
    mean = jnp.array([[0.0, 0.3], [1.0, -0.5], [-0.7, 0.1]])
    return pi, mean, jnp.array([[1.0, 2.0], [0.7, 1.5], [2.0, 0.8]])


def test_repulsion_has_the_derivatives_of_the_log_ratio(x64):
    pi, m, s = three()
    lam = MIXTURE.natural(weights=pi, mean=m, precision=s)
    theta = m + jnp.array([[0.5, -1.0], [0.2, 2.0], [-1.5, 0.4]])
    split = lambda x: {"a": x[:, :1], "b": x[:, 1]}  # noqa: E731  # any tree of leaves
    value, slope, bend = repulsion(split(theta), split(m), split(s), jnp.log(pi))
    for k in range(3):

        def ratio(x, k=k):
            return MIXTURE.log_prob(lam, x) - MIXTURE.component_log_prob(lam, x)[k]

        close(value[k], ratio(theta[k]), rtol=1e-12)
        g, h = jax.grad(ratio)(theta[k]), jnp.diag(jax.hessian(ratio)(theta[k]))
        close([slope["a"][k, 0], slope["b"][k]], g, rtol=1e-11)
        close([bend["a"][k, 0], bend["b"][k]], h, rtol=1e-11, atol=1e-12)


def test_expected_repulsion_is_the_derivative_of_the_entropy(x64):
    """E_k[...] and the entropy of the mixture, each by sums over its own grid of the plane."""
    pi, m, s = three()
    grid = jnp.linspace(-9, 9, 361)
    points = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2)

    def negentropy(pi, m, v):
        log_n = -0.5 * jnp.sum((points[:, None] - m) ** 2 / v + jnp.log(2 * jnp.pi * v), axis=-1)
        log_q = jax.nn.logsumexp(log_n + jnp.log(pi), axis=-1)
        return jnp.sum(jnp.exp(log_q) * log_q) * (grid[1] - grid[0]) ** 2

    d_pi, d_m, d_v = jax.jit(jax.grad(negentropy, (0, 1, 2)))(pi, m, 1 / s)
    x, h = np.linspace(-8, 8, 161, retstep=True)
    z = jnp.stack(jnp.meshgrid(x, x), -1).reshape(-1, 2)
    w = h * h * jnp.exp(-0.5 * jnp.sum(z * z, axis=1)) / (2 * np.pi)

    @jax.jit
    def expected(z, w):
        draws = m + z[:, None] / jnp.sqrt(s)
        found = jax.vmap(lambda t: repulsion(t, m, s, jnp.log(pi)))(draws)
        return jax.tree.map(lambda x: jnp.tensordot(w, x, 1), found)

    value, slope, bend = expected(z, w)
    close(slope, d_m / pi[:, None], rtol=1e-6, atol=1e-8)
    close(bend, 2 * d_v / pi[:, None] + s, rtol=1e-6, atol=1e-8)
    own = 0.5 * jnp.sum(jnp.log(s), axis=1)  # E_k[log q_k] up to a constant
    cost = value + own
    close(cost - cost[-1], d_pi - d_pi[-1], rtol=1e-6, atol=1e-8)


def test_a_step_is_the_rules_with_the_control_variates(x64):
    """The mixture family's natural gradient and move, from the same draws."""
    _, m, s = three()
    ess, rho, decay, weight_rate = 5.0, 0.3, 0.05, 0.07
    p = s / ess
    loss = lambda w: jnp.sum(jnp.cosh(w - 0.4)) + 0.5 * jnp.prod(w)  # noqa: E731
    tx = blr.mixture_ivon(
        rho, ess, b1=0.0, b2=1 - rho, weight_decay=decay, hess_init=p - decay, rescale_lr=False,
        weight_rate=weight_rate,
    )  # fmt: skip
    state = tx.init(m)
    theta = blr.sample(state, m)
    lam = blr.posterior(state, m).natural
    close(MIXTURE.standard(lam)["variance"], 1 / s, rtol=1e-12)

    potential = lambda w: ess * (loss(w) + 0.5 * decay * jnp.sum(w**2))  # noqa: E731
    noise = ((theta - m) * jnp.sqrt(s))[None]
    _, gradient = MIXTURE.natural_gradient_at(lam, potential, noise, jnp.ones(1))
    # The family averages grad log q_k = -S (theta - m) and the pull of the prior at the draw; both
    # have their means taken here.
    away = theta - m
    linear = gradient.components.linear + s * away - ess * decay * away
    own = -0.5 * jnp.sum(away**2 * s, axis=1) + 0.5 * m.shape[1]
    v = 1 / s
    drawn = 0.5 * ess * decay * jnp.sum(theta**2 - m**2 - v, axis=1)
    odds = gradient.log_odds - (own - own[-1] + drawn - drawn[-1])[:-1]
    components = type(gradient.components)(linear, gradient.components.quadratic)
    expected = MIXTURE.move(
        lam, type(gradient)(components, odds), rho, "improved",
        weight_learning_rate=weight_rate,
    )  # fmt: skip

    grads = jax.vmap(jax.grad(loss))(theta)
    hess = jax.vmap(lambda w: jnp.diag(jax.hessian(loss)(w)))(theta)
    updates, state = tx.update(grads, state, m, curvature=hess, losses=jax.vmap(loss)(theta))
    found = MIXTURE.standard(blr.posterior(state, m + updates).natural)
    expected = MIXTURE.standard(expected)
    for name in ("mean", "variance", "weights"):
        close(found[name], expected[name], rtol=1e-9, err_msg=name)


def test_both_wells_keep_a_component(x64):
    wells = lambda w: jnp.sum((w**2 - 4.0) ** 2) / 8  # noqa: E731
    tx = blr.mixture_ivon(0.05, ess=100.0, b2=0.95, hess_init=4.0)
    params, state = run(tx, wells, jnp.array([[-0.1], [0.1]]), 600)
    close(jnp.sort(params[:, 0]), [-2.0, 2.0], atol=0.1)
    q = blr.posterior(state, params)
    close(q.mean, [0.0], atol=0.1)
    close(q.variance, [4.0], rtol=0.1)
    close(1 / q.standard()["variance"], 100 * (3 * 4 - 4) / 2 + 0.01, rtol=0.3)  # hess = 4 each


def test_components_share_out_a_flat_bottom(x64):
    """Where the loss has no opinion only the responsibilities keep components apart."""
    box = lambda w: jnp.sum((w / 3) ** 8)  # noqa: E731
    start = jnp.array([[0.2], [-0.2]])
    apart = []
    for r in (1.0, 0.0):
        tx = blr.mixture_ivon(0.02, 3.0, b2=0.98, repulsion=r, rescale_lr=False)
        tail = [run(tx, box, start, n)[0] for n in (500, 700, 900)]
        apart.append(np.mean([jnp.abs(p[0] - p[1]) for p in tail]))
    assert apart[0] > 1.5 > 3 * apart[1]


def test_mixing_weights_are_learnt(x64):
    weights, mean, precision = jnp.array([0.8, 0.2]), jnp.array([[-3.0], [3.0]]), jnp.ones((2, 1))
    target = MIXTURE.natural(weights=weights, mean=mean, precision=precision)
    loss = lambda w: -MIXTURE.log_prob(target, w)  # noqa: E731
    tx = blr.mixture_ivon(0.02, 1.0, b2=0.98, weight_decay=0.0, weight_rate=0.02, rescale_lr=False)
    params, state = run(tx, loss, mean, 1500, learn=True)
    found = blr.posterior(state, params).standard()
    close(found["weights"], weights, atol=0.1)
    close(found["mean"], mean, atol=0.3)
    close(found["variance"], 1.0, rtol=0.4)


def test_posterior_is_over_one_network_and_predicts():
    params = jax.tree.map(lambda x: jnp.stack([x, 1.0 - x, x + 2.0]), make_params())
    tx = blr.mixture_ivon(0.1, ess=1e8)
    state = tx.init(params)
    q = blr.posterior(state, params)
    draws = q.sample(jax.random.key(0), (300,))
    assert {k: v.shape[1:] for k, v in draws.items()} == {
        k: v.shape for k, v in make_params().items()
    }
    nearest = jnp.argmin(jnp.abs(draws["c"][:, None] - params["c"]), axis=1)
    close(jnp.bincount(nearest, length=3) / 300, 1 / 3, atol=0.1)
    assert jnp.max(jnp.abs(draws["w"] - params["w"][nearest])) < 1e-2  # one network each
    close(q.mean["w"], jnp.mean(params["w"], 0), rtol=1e-5)
    x, _ = make_batch()
    apply = lambda w, x: jnp.tanh(x @ w["w"])  # noqa: E731
    p = blr.predict(jax.random.key(1), q, apply, x, samples=16)
    assert p.probabilities.shape == (8, 2) and jnp.all(jnp.isfinite(p.epistemic))


def test_a_prior_is_that_of_one_network(x64):
    one = {"w": jnp.arange(2.0)}
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    family = blr.families.get("gaussian_diagonal")
    prior = blr.Posterior(family, family.natural(mean=one, precision=4.0))
    tx = blr.mixture_ivon(0.5, 2.0, prior=prior, hess_init=1.0, rescale_lr=False)
    state = tx.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    close(optax.tree.get(state, "precision")["w"], jnp.full((3, 2), 3.0))
    updates, _ = tx.update(zero, state, params, curvature=zero)
    # The repulsion of distant components vanishes: the pull of the prior is left, to first order.
    close(updates["w"], -0.5 * 2.0 * (params["w"] - one["w"]) / 3.0, rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="same leading axis"):
        blr.mixture_ivon(0.1, 10.0).init({"a": jnp.ones((2, 3)), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="same leading axis"):
        blr.mixture_ivon(0.1, 10.0).init(make_params())
    params = jnp.ones((2, 3))
    tx = blr.mixture_ivon(0.1, 10.0, weight_rate=0.1)
    with pytest.raises(ValueError, match="losses"):
        tx.update(params, tx.init(params), params)
    for name in ("weight_rate", "repulsion"):
        with pytest.raises(ValueError, match=name):
            blr.mixture_ivon(0.1, 10.0, **{name: -1.0})
