"""IVON for LoRA: the prior that follows the posterior, what it leaves alone, and what it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import run_steps

import blr_optax as blr
from blr_optax.rule import EmpiricalPrior

DIAGONAL = blr.families.get("gaussian_diagonal")


def gaussian(mean, precision):
    return blr.Distribution(DIAGONAL, DIAGONAL.natural(mean=mean, precision=precision))


def two_matrices():
    rng = np.random.default_rng(0)
    mean = {"a": rng.normal(size=(5, 3)), "b": 0.1 * rng.normal(size=(3, 4))}
    return mean, {"a": np.exp(rng.normal(size=(5, 3))), "b": 2.0 * np.ones((3, 4))}


def test_the_prior_of_every_matrix_minimises_the_divergence(x64):
    """The gradient of KL(q || N(0, 1 / S_0)) in S_0 is zero there, and no other S_0 is better."""
    ess = 30.0
    mean, p = two_matrices()

    def divergence(total):
        q = gaussian(mean, jax.tree.map(lambda x: ess * x, p))
        spread = jax.tree.map(lambda s, m: jnp.full(m.shape, s), total, mean)
        return q.kl(gaussian(jax.tree.map(jnp.zeros_like, mean), spread))

    best = jax.jit(lambda m, p: EmpiricalPrior().of(m, p, ess))(mean, p)
    best = jax.tree.map(lambda d: ess * np.asarray(d), best)
    both = jax.jit(jax.value_and_grad(divergence))
    least, slopes = both(best)
    for slope in jax.tree.leaves(slopes):
        np.testing.assert_allclose(slope, 0.0, atol=1e-12)
    for factor in (0.9, 1.1):
        for name in best:
            assert both({**best, name: factor * best[name]})[0] > least, (name, factor)


def test_a_step_is_the_rule_with_the_prior_of_that_step(x64):
    """`natural_step` of the mean field; and the mean's own pull, when it is asked for."""
    ess, rho = 30.0, 0.2

    @jax.jit
    def both(mean, p):
        d0 = EmpiricalPrior().of(mean, p, ess)
        grads = jax.tree.map(jnp.cos, mean)
        curvature = jax.tree.map(lambda m: 3.0 + jnp.sin(m), mean)
        tx = blr.scale_by_precision(
            ess=ess, b2=1 - rho, hess_init=p, weight_decay=EmpiricalPrior(), prior_in_mean=True
        )
        out, state = tx.update(grads, tx.init(mean), mean, statistic=curvature)
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
        stepped = blr.Distribution(
            DIAGONAL, blr.natural_step(DIAGONAL, q.natural, grad_mu, rho, prior, ess, "improved")
        )
        moved = blr.posterior(state, jax.tree.map(lambda m, u: m - rho * u, mean, out))
        return [(r.variance, r.mean) for r in (moved, stepped)]

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), *both(*two_matrices()))


def test_the_mean_is_free_of_the_prior_unless_asked(x64):
    mean, _ = two_matrices()

    @jax.jit
    def lengths(mean):
        zero, length = jax.tree.map(jnp.zeros_like, mean), {}
        for pulled in (False, True):
            tx = blr.ivon_lora(0.1, examples=100, hess_init=0.5, prior_in_mean=pulled)
            updates, _ = tx.update(zero, tx.init(mean), mean, statistic=zero)
            length[pulled] = optax.tree.norm(updates)
        return length

    length = lengths(mean)
    assert length[False] == 0.0 and length[True] > 0.0


def test_ess_is_gamma_times_the_root_of_the_examples():
    gammas = (6.0, lambda count: 6.0 + 0.0 * count)

    @jax.jit
    def variances(params):
        states = [
            blr.ivon_lora(0.1, examples=25.0, gamma=g, hess_init=0.1).init(params) for g in gammas
        ]
        return [blr.posterior(state, params).variance for state in states]

    for variance in variances(np.zeros((2, 2), np.float32)):
        np.testing.assert_allclose(variance, 1 / 3.0, rtol=1e-6)


def test_a_matrix_at_zero_keeps_its_precision(x64):
    """At m = 0 the best prior is q itself: without curvature p stays, it does not feed on itself.

    With the prior taken in at once, p = h + d, it would be d <- h + d, more by h at every step.
    """
    tx = blr.ivon_lora(0.1, examples=100, hess_init=0.5, b2=0.9)

    def step(carry, _):
        state, at_once = carry
        params = jnp.zeros((4, 3))
        _, state = tx.update(params, state, params, statistic=params)
        at_once = 0.5 + EmpiricalPrior().of(params, jnp.full((4, 3), at_once), 100.0)
        return (state, at_once), (optax.tree.get(state, "precision"), at_once)

    start = lambda: (tx.init(jnp.zeros((4, 3))), jnp.asarray(0.5))  # noqa: E731
    _, (precision, at_once) = run_steps(step, start, length=50)
    np.testing.assert_allclose(precision[-1], 0.5, rtol=1e-12)
    np.testing.assert_allclose(at_once[-1], 0.5 * 51, rtol=1e-12)


def test_a_plain_step_is_refused():
    with pytest.raises(ValueError, match="improved step"):
        blr.scale_by_precision(ess=10.0, weight_decay=EmpiricalPrior(), step="plain")
    for bad in ({"examples": 0}, {"gamma": -1.0}, {"hess_init": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            blr.ivon_lora(0.1, **{"examples": 10, **bad})


@functools.cache
def adapted():
    """A frozen dense layer whose task has changed by a matrix of rank two, and its adapters.

    (first parameters, model, its loss on the data, the inputs, parameters and state when trained)
    """
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    w = draw(8, 6)
    change = draw(8, 2) @ draw(2, 6)
    x = draw(256, 8)
    y = x @ (w + change) + np.float32(0.1) * draw(256, 6)
    params = {
        "dense": {"kernel": w, "bias": np.zeros(6, np.float32)},
        "lora": {"a": draw(8, 3) / 3, "b": np.zeros((3, 6), np.float32)},
    }

    def apply(p, x):
        return x @ (p["dense"]["kernel"] + p["lora"]["a"] @ p["lora"]["b"]) + p["dense"]["bias"]

    def loss(p):
        return jnp.mean((apply(p, x) - y) ** 2)

    tx = optax.partition(
        {
            "adapter": blr.ivon_lora(0.1, examples=len(x), gamma=5e2, hess_init=0.05, b2=0.999),
            "frozen": optax.set_to_zero(),
        },
        {"dense": "frozen", "lora": "adapter"},
    )

    def start():
        p = jax.tree.map(jnp.asarray, params)
        return p, tx.init(p)

    def step(carry, _):
        p, state = carry
        grads = jax.grad(loss)(blr.sample(state, p))
        updates, state = tx.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), None

    return params, apply, jax.jit(loss), x, *run_steps(step, start, length=600)[0]


def test_adapters_of_a_frozen_layer():
    """The change is learnt, the layer stays, and only the adapters have a posterior."""
    params, apply, loss, x, found, state = adapted()
    jax.tree.map(np.testing.assert_array_equal, found["dense"], params["dense"])
    assert float(loss(found)) < 0.03 < 1.0 < float(loss(params))

    @jax.jit
    def look(found, state):
        q = blr.posterior(state, found)
        # Prediction at another temperature: the same mean, tau times the precision.
        both = q, q**4.0
        draws = [one.sample(jax.random.key(0), (16,)) for one in both]
        spread = [jax.vmap(lambda p: apply(p, x))(theta).var(0).mean() for theta in draws]
        return [one.mean for one in both], [one.variance for one in both], spread

    means, (variance, colder), spread = jax.tree.map(np.asarray, look(found, state))
    assert not np.any(variance["dense"]["kernel"])
    assert all(np.all(v > 0) for v in jax.tree.leaves(variance["lora"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5), *means)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 4.0, rtol=1e-5), colder, variance)
    assert spread[1] < 0.4 * spread[0]


def test_what_is_pruned_by_its_signal_to_noise_is_what_is_not_missed():
    """Half of the adapters' entries: those of the smallest |m| / sigma, against the largest."""
    _, _, loss, _, found, state = adapted()
    ratio = jax.tree.map(np.asarray, jax.jit(blr.signal_to_noise)(state, found))
    assert np.all(np.isinf(ratio["dense"]["kernel"]))
    middle = np.median(np.concatenate([x.ravel() for x in jax.tree.leaves(ratio["lora"])]))
    losses = [
        float(loss(jax.tree.map(lambda m, s, k=keep: np.where(k(s), m, 0), found, ratio)))
        for keep in (lambda s: s > middle, lambda s: (s <= middle) | np.isinf(s))
    ]
    assert losses[0] < 0.5 * losses[1]
