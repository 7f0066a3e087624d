"""IVON for LoRA: the prior that follows the posterior, what it leaves alone, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr
from blr_optax.rule import EmpiricalPrior

DIAGONAL = blr.families.get("gaussian_diagonal")


def gaussian(mean, precision):
    return blr.Posterior(DIAGONAL, DIAGONAL.natural(mean=mean, precision=precision))


def two_matrices():
    keys = jax.random.split(jax.random.key(0), 4)
    mean = {"a": jax.random.normal(keys[0], (5, 3)), "b": 0.1 * jax.random.normal(keys[1], (3, 4))}
    p = {"a": jnp.exp(jax.random.normal(keys[2], (5, 3))), "b": 2.0 * jnp.ones((3, 4))}
    return mean, p


def test_the_prior_of_every_matrix_minimises_the_divergence(x64):
    """The gradient of KL(q || N(0, 1 / S_0)) in S_0 is zero there, and no other S_0 is better."""
    ess = 30.0
    mean, p = two_matrices()
    q = gaussian(mean, jax.tree.map(lambda x: ess * x, p))

    def divergence(total):
        spread = jax.tree.map(lambda s, m: jnp.full(m.shape, s), total, mean)
        return q.kl(gaussian(jax.tree.map(jnp.zeros_like, mean), spread))

    best = jax.tree.map(lambda d: ess * d, EmpiricalPrior().of(mean, p, ess))
    for slope in jax.tree.leaves(jax.grad(divergence)(best)):
        np.testing.assert_allclose(slope, 0.0, atol=1e-12)
    for factor in (0.9, 1.1):
        for name in best:
            assert divergence({**best, name: factor * best[name]}) > divergence(best)


def test_a_step_is_the_rule_with_the_prior_of_that_step(x64):
    """`natural_step` of the mean field; and the mean's own pull, when it is asked for."""
    ess, rho = 30.0, 0.2
    mean, p = two_matrices()
    d0 = EmpiricalPrior().of(mean, p, ess)
    grads = jax.tree.map(jnp.cos, mean)
    curvature = jax.tree.map(lambda m: 3.0 + jnp.sin(m), mean)
    tx = blr.scale_by_precision(
        ess, b2=1 - rho, hess_init=p, weight_decay=EmpiricalPrior(), prior_in_mean=True
    )
    out, state = tx.update(grads, tx.init(mean), mean, curvature=curvature)
    q = gaussian(mean, jax.tree.map(lambda x: ess * x, p))
    prior = gaussian(
        jax.tree.map(jnp.zeros_like, mean),
        jax.tree.map(lambda d, m: jnp.full(m.shape, ess * d), d0, mean),
    )
    # grad_mu of the loss, from its gradient and curvature at the mean of the coordinates.
    grad_mu = type(q.natural)(
        jax.tree.map(lambda g, c, m: g - c * m, grads, curvature, mean),
        jax.tree.map(lambda c: 0.5 * c, curvature),
    )
    stepped = blr.Posterior(
        DIAGONAL, blr.natural_step(DIAGONAL, q.natural, grad_mu, rho, prior, ess, "improved")
    )
    moved = blr.posterior(state, jax.tree.map(lambda m, u: m - rho * u, mean, out))
    for a, b in ((moved.variance, stepped.variance), (moved.mean, stepped.mean)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), a, b)


def test_the_mean_is_free_of_the_prior_unless_asked(x64):
    mean, _ = two_matrices()
    zero, length = jax.tree.map(jnp.zeros_like, mean), {}
    for pulled in (False, True):
        tx = blr.ivon_lora(0.1, 100, hess_init=0.5, prior_in_mean=pulled)
        updates, _ = tx.update(zero, tx.init(mean), mean, curvature=zero)
        length[pulled] = float(optax.tree.norm(updates))
    assert length[False] == 0.0 and length[True] > 0.0


def test_ess_is_gamma_times_the_root_of_the_examples():
    params = jnp.zeros((2, 2))
    for gamma in (6.0, lambda count: 6.0 + 0.0 * count):
        state = blr.ivon_lora(0.1, 25.0, gamma=gamma, hess_init=0.1).init(params)
        np.testing.assert_allclose(blr.posterior(state, params).variance, 1 / 3.0, rtol=1e-6)


def test_a_matrix_at_zero_keeps_its_precision(x64):
    """At m = 0 the best prior is q itself: without curvature p stays, it does not feed on itself.

    With the prior taken in at once, p = h + d, it would be d <- h + d, more by h at every step.
    """
    params = jnp.zeros((4, 3))
    tx = blr.ivon_lora(0.1, 100, hess_init=0.5, b2=0.9)
    state = tx.init(params)
    for _ in range(50):
        _, state = tx.update(params, state, params, curvature=params)
    np.testing.assert_allclose(optax.tree.get(state, "precision"), 0.5, rtol=1e-12)
    at_once = 0.5
    for _ in range(50):
        at_once = 0.5 + float(EmpiricalPrior().of(params, jnp.full((4, 3), at_once), 100.0))
    np.testing.assert_allclose(at_once, 0.5 * 51, rtol=1e-12)


def test_a_plain_step_is_refused():
    with pytest.raises(ValueError, match="improved step"):
        blr.scale_by_precision(10.0, weight_decay=EmpiricalPrior(), step="plain")
    for bad in ({"examples": 0}, {"gamma": -1.0}, {"hess_init": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            blr.ivon_lora(0.1, **{"examples": 10, **bad})


@pytest.fixture(scope="module")
def adapted():
    """A frozen dense layer whose task has changed by a matrix of rank two, and its adapters."""
    keys = jax.random.split(jax.random.key(1), 6)
    w = jax.random.normal(keys[0], (8, 6))
    change = jax.random.normal(keys[1], (8, 2)) @ jax.random.normal(keys[2], (2, 6))
    x = jax.random.normal(keys[3], (256, 8))
    y = x @ (w + change) + 0.1 * jax.random.normal(keys[4], (256, 6))
    params = {
        "dense": {"kernel": w, "bias": jnp.zeros(6)},
        "lora": {"a": jax.random.normal(keys[5], (8, 3)) / 3, "b": jnp.zeros((3, 6))},
    }

    def apply(p, x):
        return x @ (p["dense"]["kernel"] + p["lora"]["a"] @ p["lora"]["b"]) + p["dense"]["bias"]

    def loss(p, x, y):
        return jnp.mean((apply(p, x) - y) ** 2)

    labels = {"dense": "frozen", "lora": "adapter"}
    make = lambda **k: optax.partition(  # noqa: E731
        {
            "adapter": blr.ivon_lora(0.1, len(x), gamma=5e2, hess_init=0.05, b2=0.999, **k),
            "frozen": optax.set_to_zero(),
        },
        labels,
    )

    def train(tx, steps=600):
        def step(carry, _):
            p, state = carry
            grads = jax.grad(loss)(blr.sample(state, p), x, y)
            updates, state = tx.update(grads, state, p)
            return (optax.apply_updates(p, updates), state), None

        return jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps)[0])(
            (params, tx.init(params))
        )

    return params, apply, loss, (x, y), make, train


def test_adapters_of_a_frozen_layer(adapted):
    """The change is learnt, the layer stays, and only the adapters have a posterior."""
    params, apply, loss, batch, make, train = adapted
    found, state = train(make())
    jax.tree.map(np.testing.assert_array_equal, found["dense"], params["dense"])
    assert float(loss(found, *batch)) < 0.03 < 1.0 < float(loss(params, *batch))
    q = blr.posterior(state, found)
    assert not np.any(q.variance["dense"]["kernel"])
    assert all(bool(jnp.all(v > 0)) for v in jax.tree.leaves(q.variance["lora"]))

    # Prediction at another temperature: the same mean, tau times the precision.
    colder = q**4.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), colder.mean, q.mean)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b / 4.0, rtol=1e-5), colder.variance, q.variance
    )
    draws = [one.sample(jax.random.key(0), (16,)) for one in (q, colder)]
    spread = [jax.vmap(lambda p: apply(p, batch[0]))(theta).var(0) for theta in draws]
    assert float(spread[1].mean()) < 0.4 * float(spread[0].mean())


def test_what_is_pruned_by_its_signal_to_noise_is_what_is_not_missed(adapted):
    """Half of the adapters' entries: those of the smallest |m| / sigma, against the largest."""
    _, _, loss, batch, make, train = adapted
    found, state = train(make())
    ratio = blr.signal_to_noise(state, found)
    assert bool(jnp.all(jnp.isinf(ratio["dense"]["kernel"])))
    middle = jnp.median(jnp.concatenate([x.ravel() for x in jax.tree.leaves(ratio["lora"])]))
    losses = [
        float(loss(jax.tree.map(lambda m, s, k=keep: jnp.where(k(s), m, 0), found, ratio), *batch))
        for keep in (lambda s: s > middle, lambda s: (s <= middle) | jnp.isinf(s))
    ]
    assert losses[0] < 0.5 * losses[1]
