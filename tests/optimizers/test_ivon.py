"""What IVON and `estimate` promise beyond the golden trajectories and the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import make_batch, make_params, mean_loss

import blr_optax as blr


def walk(tx, params, steps=4, loss=mean_loss, batch=None):
    batch = make_batch() if batch is None else batch

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(blr.sample(state, params), *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_trees_of_hyperparameters_are_a_partition():
    """hess_init and weight_decay per leaf, the rescaled rate with them, = one ivon per leaf."""
    hess, decay = {"w": 0.5, "b": 2.0, "c": 1.0}, {"w": 0.01, "b": 0.0, "c": 0.3}
    one = blr.ivon(0.1, 50.0, b2=0.9, hess_init=hess, weight_decay=decay)
    many = optax.partition(
        {k: blr.ivon(0.1, 50.0, b2=0.9, hess_init=hess[k], weight_decay=decay[k]) for k in hess},
        {k: k for k in hess},
    )
    assert_close(walk(one, make_params())[0], walk(many, make_params())[0], rtol=1e-6)


def test_arrays_as_hyperparameters():
    params = make_params()
    hess = jax.tree.map(lambda p: jnp.full(p.shape, 0.5), params)
    a = walk(blr.ivon(0.1, 50.0, hess_init=hess, b2=0.9), params)[0]
    assert_close(a, walk(blr.ivon(0.1, 50.0, hess_init=0.5, b2=0.9), params)[0], rtol=1e-6)


def test_a_weight_decay_schedule_moves_the_pull_and_the_rescaled_rate():
    decay = lambda count: 0.1 * (count + 1.0)  # noqa: E731
    params, zero = {"w": jnp.array([2.0])}, {"w": jnp.zeros(1)}
    tx = blr.ivon(1.0, 100.0, b1=0.0, b2=0.0, hess_init=1.0, weight_decay=decay)
    state = tx.init(params)
    p, m = 1.1, 2.0
    for t in range(3):
        updates, state = tx.update(zero, state, params, curvature={"w": jnp.ones(1)})
        d = 0.1 * (t + 1)
        u = (1.0 + d - p) / p
        p *= 1 + u + u * u / 2
        m -= (1.0 + d) * d * m / p
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], m, rtol=1e-5)


def test_an_ess_schedule_tempers_the_posterior_and_keeps_the_curvature_unbiased():
    """The noise and the curvature of a step use one ess: a quadratic's pair gives it exactly."""
    ess = lambda count: 10.0 * 4.0**count  # noqa: E731
    params, loss = jnp.ones(3), lambda w: 1.5 * jnp.sum(w**2)
    tx = blr.ivon(0.1, ess, hess_init=1.0, b2=0.999, weight_decay=0.0)
    state = tx.init(params)
    for t in range(4):
        q = blr.posterior(state, params)
        p = optax.tree.get(state, "precision")
        np.testing.assert_allclose(q.variance, 1 / (10.0 * 4.0**t * p), rtol=1e-5)
        est = blr.estimate(loss, state, params, antithetic=True)
        np.testing.assert_allclose(est.curvature, 3.0 * jnp.square(noise(state)), rtol=1e-3)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        params = params + updates


def noise(state):
    from blr_optax.rule._protocol import posterior_states
    from blr_optax.rule._read import noise_of

    return noise_of(posterior_states(state, "test")[0])


def test_samples_are_averaged_and_antithetic_pairs_are_one_average():
    params, batch = make_params(), make_batch()
    state = blr.ivon(0.1, 50.0).init(params)
    e = jax.tree.map(lambda p: jnp.cos(jnp.arange(2.0 * p.size)).reshape(2, *p.shape), params)
    both = blr.estimate(mean_loss, state, params, *batch, noise=e)
    single = [
        blr.estimate(
            mean_loss, state, params, *batch, noise=jax.tree.map(lambda x, i=i: x[i : i + 1], e)
        )
        for i in range(2)
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *single)
    assert_close(both.grad, mean.grad, rtol=1e-4, atol=1e-6)
    assert_close(both.curvature, mean.curvature, rtol=1e-4, atol=1e-5)
    pair = blr.estimate(mean_loss, state, params, *batch, noise=e, antithetic=True)
    mirrored = jax.tree.map(lambda x: jnp.concatenate([x, -x]), e)
    explicit = blr.estimate(mean_loss, state, params, *batch, noise=mirrored)
    assert_close(pair.grad, explicit.grad, rtol=1e-4, atol=1e-6)
    assert_close(pair.curvature, explicit.curvature, rtol=1e-3, atol=1e-4)


def test_many_samples_are_scanned_and_equal_the_unrolled_ones():
    params, batch = make_params(), make_batch()
    state = blr.ivon(0.1, 50.0, generator="threefry").init(params)
    six = jax.jit(lambda: blr.estimate(mean_loss, state, params, *batch, samples=6))
    assert "while" in six.lower().as_text()
    draws = [
        blr.estimate(
            mean_loss,
            state,
            params,
            *batch,
            noise=jax.tree.map(lambda x: x[None], noise_at(state, s)),
        )
        for s in range(6)
    ]
    mean = jax.tree.map(lambda *x: sum(x) / 6, *draws)
    assert_close(six().grad, mean.grad, rtol=1e-4, atol=1e-6)
    assert_close(six().curvature, mean.curvature, rtol=1e-3, atol=1e-4)


def noise_at(state, index):
    from blr_optax.rule._protocol import posterior_states
    from blr_optax.rule._read import noise_of

    return noise_of(posterior_states(state, "test")[0], index)


def test_antithetic_pairs_cancel_the_noise_of_the_curvature():
    """Near an optimum with a steep mean gradient: far less variance than two independent draws."""
    w = jnp.linspace(-1.0, 1.0, 50)
    loss = lambda m: jnp.sum(3.0 * m + 0.5 * jnp.cos(m))  # noqa: E731
    state = blr.ivon(0.1, 1e4).init(w)
    keys = jax.random.split(jax.random.key(0), 200)

    def variance(**options):
        def one(key):
            return blr.estimate(loss, blr.reseed(state, key), w, **options).curvature

        return jax.vmap(one)(keys).var(axis=0).mean()

    assert variance(antithetic=True) < 1e-3 * variance(samples=2)


@pytest.mark.parametrize("microbatch", [None, 4])
def test_auxiliary_output_is_averaged(microbatch):
    params, (x, y) = make_params(), make_batch()

    def loss(params, x, y):
        return mean_loss(params, x, y), {"mean": x.mean(0), "n": jnp.int32(x.shape[0])}

    state = blr.ivon(0.1, 50.0).init(params)
    est = blr.estimate(loss, state, params, x, y, samples=2, has_aux=True, microbatch=microbatch)
    np.testing.assert_allclose(est.aux["mean"], x.mean(0), atol=1e-6)
    assert int(est.aux["n"]) == (8 if microbatch is None else 4)


def test_bfloat16_weights_learn_their_precision():
    """float32 statistics: true curvature 18 moves h from 0.5 to about 1.02 in 3000 steps (P8)."""
    params = jnp.zeros(4, jnp.bfloat16)
    tx = blr.ivon(0.0, 1e4, hess_init=0.5, b2=0.99999, weight_decay=0.0)

    def body(state, _):
        curvature = jnp.full(4, 18.0)
        return tx.update(jnp.zeros_like(params), state, params, curvature=curvature)[1], None

    state, _ = jax.lax.scan(body, tx.init(params), length=3000)
    h = optax.tree.get(state, "precision")
    exact = 18.0 + (0.5 - 18.0) * np.exp(-3000 * 1e-5)
    np.testing.assert_allclose(h, exact, rtol=5e-3)


def test_bfloat16_curvature_uses_the_displacement_actually_made():
    """Rounding the weights to bfloat16 moves them by other amounts than sigma eps."""
    params = jnp.full(200, 1.0, jnp.bfloat16)
    loss = lambda w: jnp.sum(2.0 * jnp.square(w.astype(jnp.float32)))  # noqa: E731
    state = blr.ivon(0.1, 1e4, hess_init=4.0, weight_decay=0.0).init(params)
    est = blr.estimate(loss, state, params)
    theta = blr.sample(state, params)
    made = theta.astype(jnp.float32) - 1.0
    intended = noise(state) / 200.0  # 1 / sqrt(ess p)
    assert np.max(np.abs(made - intended)) > 1e-3
    wanted = 4e4 * made * jax.grad(loss)(theta).astype(jnp.float32)
    np.testing.assert_allclose(est.curvature, wanted, rtol=1e-6)


def test_resume_keeps_the_bias_correction():
    """The step count is in the state: a saved and restored run takes no long first step."""
    params, state = walk(blr.ivon(0.1, 50.0), make_params(), steps=3)
    grads = jax.grad(mean_loss)(blr.sample(state, params), *make_batch())
    leaves, treedef = jax.tree.flatten(state)
    restored = treedef.unflatten([jnp.copy(leaf) for leaf in leaves])
    for a, b in zip(
        jax.tree.leaves(blr.ivon(0.1, 50.0).update(grads, state, params)[0]),
        jax.tree.leaves(blr.ivon(0.1, 50.0).update(grads, restored, params)[0]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_posterior_is_the_prior_of_the_next_task():
    """Two halves of a linear-Gaussian problem in turn = both at once (diagonal design, exact)."""
    x = jnp.eye(4).repeat(5, 0)
    y = jnp.arange(20.0) / 10
    loss = lambda w, x, y: 0.5 * jnp.mean(jnp.square(x @ w - y))  # noqa: E731
    order = jnp.argsort(jnp.arange(20) % 2, stable=True)
    halves = (order[:10], order[10:])

    def learn(index, prior):
        n = float(len(index))
        options = {"weight_decay": 0.1 / n} if prior is None else {"prior": prior}
        tx = blr.ivon(0.3, n, b2=0.9, b1=0.0, **options)
        params = jnp.zeros(4)

        def body(carry, _):
            params, state = carry
            est = blr.estimate(loss, state, params, x[index], y[index], antithetic=True)
            # The exact curvature: its estimate is noisy, and this is about priors.
            curvature = jnp.mean(x[index] ** 2, 0)
            updates, state = tx.update(est.grad, state, params, curvature=curvature)
            return (params + updates, state), None

        (params, state), _ = jax.lax.scan(body, (params, tx.init(params)), length=600)
        return blr.posterior(state, params)

    sequential = learn(halves[1], learn(halves[0], None))
    at_once = learn(jnp.arange(20), None)
    np.testing.assert_allclose(sequential.variance, at_once.variance, rtol=1e-3)
    np.testing.assert_allclose(sequential.mean, at_once.mean, rtol=1e-2, atol=1e-3)


def test_a_tight_prior_does_not_blow_up_the_rescaled_rate():
    """A prior a hundred times as precise as hess_init: the step must not be scaled by it."""
    family, target = blr.families.get("gaussian_diagonal"), jnp.array([1.0, -2.0, 0.5])
    prior = blr.Posterior(family, family.natural(mean=target, precision=2e4))
    loss = lambda w: 50.0 * jnp.sum(jnp.square(w - target))  # noqa: E731  # curvature 100
    tx = blr.ivon(0.3, 200.0, b2=0.99, prior=prior)

    def body(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, antithetic=True)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        return (params + updates, state), None

    params = target + 0.05
    (params, state), _ = jax.lax.scan(body, (params, tx.init(params)), length=500)
    q = blr.posterior(state, params)
    np.testing.assert_allclose(params, target, atol=1e-2)
    # 200 * 100 from the loss and 2e4 from the prior: 4e4.
    assert jnp.all(q.variance < 1 / 3e4)
    assert jnp.all(q.variance > 1 / 6e4)


def test_a_prior_of_one_number_holds_for_every_parameter():
    family, params = blr.families.get("gaussian_diagonal"), make_params()
    everywhere = {
        name: jax.tree.map(lambda p, x=x: jnp.full(p.shape, x), params)
        for name, x in {"mean": 0.5, "precision": 30.0}.items()
    }
    states = [
        blr.ivon(0.1, 100.0, prior=blr.Posterior(family, family.natural(**given))).init(params)
        for given in ({"mean": 0.5, "precision": 30.0}, everywhere)
    ]
    found, expected = (blr.posterior(state, params).variance for state in states)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
