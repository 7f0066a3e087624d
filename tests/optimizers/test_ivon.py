"""What IVON and `estimate` promise beyond the golden trajectories and the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import make_batch, make_params, mean_loss
from tools import built_inside, run_steps

import blr_optax as blr
from blr_optax.state._reader import posterior_states
from blr_optax.state._reading import noise_of


def walk(make, params, steps=4):
    """(mean, state) after some steps on the registry's loss; `make` builds the optimizer."""
    tx = built_inside(make)

    def start():
        mean = jax.tree.map(jnp.asarray, params)
        return mean, tx.init(mean)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(mean_loss)(blr.sample(state, params), *BATCH)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return run_steps(step, start, length=steps)[0]


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


PARAMS, BATCH = jax.tree.map(np.asarray, (make_params(), make_batch()))


def test_trees_of_hyperparameters_are_a_partition():
    """hess_init and weight_decay per leaf, the rescaled rate with them, = one ivon per leaf."""
    hess, decay = {"w": 0.5, "b": 2.0, "c": 1.0}, {"w": 0.01, "b": 0.0, "c": 0.3}
    one = lambda: blr.ivon(0.1, ess=50.0, b2=0.9, hess_init=hess, weight_decay=decay)  # noqa: E731
    many = lambda: optax.partition(  # noqa: E731
        {
            k: blr.ivon(0.1, ess=50.0, b2=0.9, hess_init=hess[k], weight_decay=decay[k])
            for k in hess
        },
        {k: k for k in hess},
    )
    assert_close(walk(one, PARAMS)[0], walk(many, PARAMS)[0], rtol=1e-6)


def test_arrays_as_hyperparameters():
    hess = jax.tree.map(lambda p: np.full(p.shape, 0.5, np.float32), PARAMS)
    array = walk(lambda: blr.ivon(0.1, ess=50.0, hess_init=hess, b2=0.9), PARAMS)[0]
    number = walk(lambda: blr.ivon(0.1, ess=50.0, hess_init=0.5, b2=0.9), PARAMS)[0]
    assert_close(array, number, rtol=1e-6)


def test_a_weight_decay_schedule_moves_the_pull_and_the_rescaled_rate():
    decay = lambda count: 0.1 * (count + 1.0)  # noqa: E731
    tx = blr.ivon(1.0, ess=100.0, b1=0.0, b2=0.0, hess_init=1.0, weight_decay=decay)

    def start():
        params = {"w": jnp.array([2.0])}
        return params, tx.init(params)

    def step(carry, _):
        params, state = carry
        zero = {"w": jnp.zeros(1)}
        updates, state = tx.update(zero, state, params, statistic={"w": jnp.ones(1)})
        params = optax.apply_updates(params, updates)
        return (params, state), params["w"]

    p, m = 1.1, 2.0
    for t, found in enumerate(run_steps(step, start, length=3)[1]):
        d = 0.1 * (t + 1)
        u = (1.0 + d - p) / p
        p *= 1 + u + u * u / 2
        m -= (1.0 + d) * d * m / p
        np.testing.assert_allclose(found, m, rtol=1e-5, err_msg=f"step {t}")


def noise(state, index=0):
    return noise_of(posterior_states(state, "test")[0], index)


def test_an_ess_schedule_tempers_the_posterior_and_keeps_the_curvature_unbiased():
    """The noise and the curvature of a step use one ess: a quadratic's pair gives it exactly."""
    ess = lambda count: 10.0 * 4.0**count  # noqa: E731
    loss = lambda w: 1.5 * jnp.sum(w**2)  # noqa: E731
    tx = blr.ivon(0.1, ess=ess, hess_init=1.0, b2=0.999, weight_decay=0.0)

    def start():
        return jnp.ones(3), tx.init(jnp.ones(3))

    def step(carry, _):
        params, state = carry
        p, variance = optax.tree.get(state, "precision"), blr.posterior(state, params).variance
        est = blr.estimate(loss, state, params, antithetic=True)
        updates, after = tx.update(est.grad, state, params, statistic=est.statistic)
        return (params + updates, after), (p, variance, est.statistic, noise(state))

    _, (p, variance, curvature, eps) = run_steps(step, start, length=4)
    tempered = 10.0 * 4.0 ** np.arange(4)[:, None] * p
    np.testing.assert_allclose(variance, 1 / tempered, rtol=1e-5)
    np.testing.assert_allclose(curvature, 3.0 * np.square(eps), rtol=1e-3)


def test_samples_are_averaged_and_antithetic_pairs_are_one_average():
    e = jax.tree.map(
        lambda p: np.cos(np.arange(2.0 * p.size, dtype=np.float32)).reshape(2, *p.shape), PARAMS
    )

    @jax.jit
    def look(params, e):
        state = blr.ivon(0.1, ess=50.0).init(params)
        of = lambda e, **more: blr.estimate(mean_loss, state, params, *BATCH, noise=e, **more)  # noqa: E731
        single = [of(jax.tree.map(lambda x, i=i: x[i : i + 1], e)) for i in range(2)]
        mirrored = jax.tree.map(lambda x: jnp.concatenate([x, -x]), e)
        return of(e), single, of(e, antithetic=True), of(mirrored)

    both, single, pair, explicit = jax.tree.map(np.asarray, look(PARAMS, e))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *single)
    assert_close(both.grad, mean.grad, rtol=1e-4, atol=1e-6)
    assert_close(both.statistic, mean.statistic, rtol=1e-4, atol=1e-5)
    assert_close(pair.grad, explicit.grad, rtol=1e-4, atol=1e-6)
    assert_close(pair.statistic, explicit.statistic, rtol=1e-3, atol=1e-4)


def test_many_samples_are_scanned_and_equal_the_unrolled_ones():
    state = jax.jit(blr.ivon(0.1, ess=50.0, generator="jax").init)(PARAMS)
    look = lambda state, **more: blr.estimate(mean_loss, state, PARAMS, *BATCH, **more)  # noqa: E731
    lowered = jax.jit(lambda state: look(state, samples=6)).lower(state)
    assert "while" in lowered.as_text()

    @jax.jit
    def one(state, index):
        return look(state, noise=jax.tree.map(lambda x: x[None], noise(state, index)))

    six = lowered.compile()(state)
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *[one(state, s) for s in range(6)])
    assert_close(six.grad, mean.grad, rtol=1e-4, atol=1e-6)
    assert_close(six.statistic, mean.statistic, rtol=1e-3, atol=1e-4)


def test_antithetic_pairs_cancel_the_noise_of_the_curvature():
    """Near an optimum with a steep mean gradient: far less variance than two independent draws."""
    loss = lambda m: jnp.sum(3.0 * m + 0.5 * jnp.cos(m))  # noqa: E731

    @jax.jit
    def variances(w, key):
        state, keys = blr.ivon(0.1, ess=1e4).init(w), jax.random.split(key, 200)

        def variance(**options):
            def one(key):
                return blr.estimate(loss, blr.reseed(state, key), w, **options).statistic

            return jax.vmap(one)(keys).var(axis=0).mean()

        return variance(antithetic=True), variance(samples=2)

    paired, independent = variances(np.linspace(-1, 1, 50, dtype=np.float32), jax.random.key(0))
    assert paired < 1e-3 * independent


@pytest.mark.parametrize("microbatch", [None, 4])
def test_auxiliary_output_is_averaged(microbatch):
    def loss(params, x, y):
        return mean_loss(params, x, y), {"mean": x.mean(0), "n": jnp.int32(x.shape[0])}

    @jax.jit
    def look(params):
        state = blr.ivon(0.1, ess=50.0).init(params)
        return blr.estimate(
            loss, state, params, *BATCH, samples=2, has_aux=True, microbatch=microbatch
        )

    est = look(PARAMS)
    np.testing.assert_allclose(est.aux["mean"], BATCH[0].mean(0), atol=1e-6)
    assert int(est.aux["n"]) == (8 if microbatch is None else 4)


def test_bfloat16_weights_learn_their_precision():
    """float32 statistics: true curvature 18 moves h from 0.5 to about 1.02 in 3000 steps (P8)."""
    tx = blr.ivon(0.0, ess=1e4, hess_init=0.5, b2=0.99999, weight_decay=0.0)

    def step(state, _):
        params = jnp.zeros(4, jnp.bfloat16)
        _, state = tx.update(params, state, params, statistic=jnp.full(4, 18.0))
        return state, optax.tree.get(state, "precision")

    h = run_steps(step, lambda: tx.init(jnp.zeros(4, jnp.bfloat16)), length=3000)[1][-1]
    exact = 18.0 + (0.5 - 18.0) * np.exp(-3000 * 1e-5)
    np.testing.assert_allclose(h, exact, rtol=5e-3)


def test_bfloat16_curvature_uses_the_displacement_actually_made():
    """Rounding the weights to bfloat16 moves them by other amounts than sigma eps."""
    loss = lambda w: jnp.sum(2.0 * jnp.square(w.astype(jnp.float32)))  # noqa: E731

    @jax.jit
    def look(params):
        state = blr.ivon(0.1, ess=1e4, hess_init=4.0, weight_decay=0.0).init(params)
        theta = blr.sample(state, params)
        est = blr.estimate(loss, state, params)
        return theta, jax.grad(loss)(theta), noise(state), est.statistic

    theta, grad, eps, curvature = map(np.asarray, look(np.full(200, 1.0, jnp.bfloat16)))
    assert theta.dtype == grad.dtype == jnp.bfloat16
    made = theta.astype(np.float32) - 1
    # 1 / sqrt(ess p) is 0.005, below 3/4 of the spacing, to which the deviation is widened.
    deviation, spacing = 0.75 * 2.0**-7, 2.0**-7
    assert deviation > 0.005 and np.max(np.abs(made - deviation * eps)) > 1e-3
    # Rounding adds spacing^2 / 12 above 1 and a quarter of it below.
    variance = deviation**2 + 0.625 * spacing**2 / 12
    wanted = made * grad.astype(np.float32) / np.float32(variance)
    np.testing.assert_allclose(curvature, wanted, rtol=1e-6)


def test_resume_keeps_the_bias_correction():
    """The step count is in the state: a saved and restored run takes no long first step."""
    params, state = walk(lambda: blr.ivon(0.1, ess=50.0), PARAMS, steps=3)
    grads = jax.jit(lambda p, s: jax.grad(mean_loss)(blr.sample(s, p), *BATCH))(params, state)
    leaves, treedef = jax.tree.flatten(state)
    restored = treedef.unflatten([jnp.copy(leaf) for leaf in leaves])
    # A transformation of its own for each, as after a restart.
    first, again = (
        jax.jit(blr.ivon(0.1, ess=50.0).update)(grads, s, params)[0] for s in (state, restored)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_a_posterior_is_the_prior_of_the_next_task():
    """Two halves of a linear-Gaussian problem in turn = both at once (diagonal design, exact)."""
    x = np.eye(4, dtype=np.float32).repeat(5, 0)
    y = np.arange(20, dtype=np.float32) / 10
    loss = lambda w, x, y: 0.5 * jnp.mean(jnp.square(x @ w - y))  # noqa: E731
    order = np.argsort(np.arange(20) % 2, stable=True)
    halves = (order[:10], order[10:])

    def learn(index, prior):
        n = float(len(index))
        options = {"weight_decay": 0.1 / n} if prior is None else {"prior": prior}
        tx = blr.ivon(0.3, ess=n, b2=0.9, b1=0.0, **options)
        params = jnp.zeros(4)

        def body(carry, _):
            params, state = carry
            est = blr.estimate(loss, state, params, x[index], y[index], antithetic=True)
            # The exact curvature: its estimate is noisy, and this is about priors.
            curvature = jnp.mean(x[index] ** 2, 0)
            updates, state = tx.update(est.grad, state, params, statistic=curvature)
            return (params + updates, state), None

        (params, state), _ = jax.lax.scan(body, (params, tx.init(params)), length=600)
        return blr.posterior(state, params)

    @jax.jit
    def both():
        sequential = learn(halves[1], learn(halves[0], None))
        return [(q.mean, q.variance) for q in (sequential, learn(np.arange(20), None))]

    (mean, variance), (mean_at_once, variance_at_once) = both()
    np.testing.assert_allclose(variance, variance_at_once, rtol=1e-3)
    np.testing.assert_allclose(mean, mean_at_once, rtol=1e-2, atol=1e-3)


def test_a_tight_prior_does_not_blow_up_the_rescaled_rate():
    """A prior a hundred times as precise as hess_init: the step must not be scaled by it."""
    family, target = blr.families.get("gaussian_diagonal"), np.array([1.0, -2.0, 0.5], np.float32)
    loss = lambda w: 50.0 * jnp.sum(jnp.square(w - target))  # noqa: E731  # curvature 100

    @built_inside
    def tx():
        prior = blr.Distribution(family, family.natural(mean=jnp.asarray(target), precision=2e4))
        return blr.ivon(0.3, ess=200.0, b2=0.99, prior=prior)

    def start():
        params = jnp.asarray(target) + 0.05
        return params, tx.init(params)

    def step(carry, _):
        params, state = carry
        est = blr.estimate(loss, state, params, antithetic=True)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = params + updates
        return (params, state), (params, blr.posterior(state, params).variance)

    params, variance = (x[-1] for x in run_steps(step, start, length=500)[1])
    np.testing.assert_allclose(params, target, atol=1e-2)
    # 200 * 100 from the loss and 2e4 from the prior: 4e4.
    assert np.all(variance < 1 / 3e4)
    assert np.all(variance > 1 / 6e4)


def test_a_prior_of_one_number_holds_for_every_parameter():
    family = blr.families.get("gaussian_diagonal")
    everywhere = {
        name: jax.tree.map(lambda p, x=x: np.full(p.shape, x, np.float32), PARAMS)
        for name, x in {"mean": 0.5, "precision": 30.0}.items()
    }

    @jax.jit
    def look(params):
        states = [
            blr.ivon(0.1, ess=100.0, prior=blr.Distribution(family, family.natural(**given))).init(
                params
            )
            for given in ({"mean": 0.5, "precision": 30.0}, everywhere)
        ]
        return states, [blr.posterior(state, params).variance for state in states]

    states, variances = look(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, *variances)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
