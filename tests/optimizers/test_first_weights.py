"""Noise, prior and steps relative to the first weights, against the numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import make_batch, make_params, mean_loss
from tools import assert_same

import blr_optax as blr

ESS, STEPS = 40.0, 25


def network():
    """Two layers, a gain that starts at one, and a number."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "first": {"kernel": 0.5 * draw(30, 20), "bias": jnp.zeros(20)},
        "gain": jnp.ones(20),
        "last": {"kernel": 0.1 * draw(20, 3), "bias": jnp.zeros(3)},
        "log_noise": jnp.zeros(()),
    }


def by_hand(params):
    """The scales of `network`, in numpy."""
    rms = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))  # noqa: E731
    first, last = rms(params["first"]["kernel"]), rms(params["last"]["kernel"])
    assert last < first
    return {
        "first": {"kernel": first, "bias": last},
        "gain": 0.3,
        "last": {"kernel": last, "bias": last},
        "log_noise": last,
    }


ROWS = {
    "ivon": lambda **k: blr.ivon(0.1, hess_init=blr.relative_noise(0.2), **k),
    "evon": lambda **k: blr.evon(0.1, hess_init=blr.relative_noise(0.2), **k),
    "vogn": lambda **k: blr.vogn(0.1, init_precision=blr.relative_noise(0.2), **k),
    "bsam": lambda **k: blr.bsam(0.1, init_precision=blr.relative_noise(0.2), damping=1e-6, **k),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("ess", [ESS, 1e6, optax.linear_schedule(ESS, 2 * ESS, 10)])
def test_the_first_deviation_is_a_share_of_the_first_weights(row, ess):
    params = network()
    tx = ROWS[row](ess=ess, prior=blr.relative_prior(3.0))
    q = blr.posterior(tx.init(params), params)
    for path, s in jax.tree_util.tree_leaves_with_path(by_hand(params)):
        variance = dict(jax.tree_util.tree_leaves_with_path(q.variance))[path]
        np.testing.assert_allclose(variance, np.full(variance.shape, (0.2 * s) ** 2), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((3, 3, 4, 8), 1 / 6), ((2, 5), 0.3), ((7,), 0.3), ((), 0.3), ((0, 3), 0.3)],
)
def test_a_network_that_starts_at_zero_has_the_size_with_which_layers_are_drawn(shape, wanted):
    params = jnp.zeros(shape)
    state = blr.ivon(0.1, ess=ESS, hess_init=blr.relative_noise(0.5)).init(params)
    np.testing.assert_allclose(state.scales, [wanted], rtol=1e-6)


def test_a_run_of_known_length_is_ivon_with_these_numbers():
    params, batch = make_params(), make_batch()
    s = {"w": float(np.sqrt(np.mean(np.arange(6.0) ** 2)) / 10), "b": 0.3}
    s["c"] = s["w"] if s["w"] < 0.3 else 0.3
    decay = {k: 1 / (ESS * (3.2 * x) ** 2) for k, x in s.items()}
    h = {k: 1 / (ESS * (0.2 * x) ** 2) - decay[k] for k, x in s.items()}
    peak, rise = 5.0, max(1, round(0.05 * STEPS))

    def rate(t):
        t = jnp.asarray(t, jnp.float32)
        up = peak * (1 + t * (rise + 1 - 1) / rise) / (rise + 1)
        down = peak * 0.5 * (1 + jnp.cos(math.pi * (t - rise) / (STEPS - rise)))
        return jnp.where(t < rise, up, down)

    def bounded(updates, _):
        return {k: jnp.clip(u, -0.1 * 0.2 * s[k], 0.1 * 0.2 * s[k]) for k, u in updates.items()}

    wanted = optax.chain(
        blr.ivon(rate, ess=ESS, hess_init=h, weight_decay=decay, b2=1 - 1 / STEPS),
        optax.stateless(bounded),
    )
    found = blr.ivon(ess=ESS, num_steps=STEPS)

    def train(tx):
        step = blr.make_step(tx, mean_loss, jit=False, donate=False)

        def body(carry, _):
            return step(*carry, *batch)[:2], None

        run = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), None, STEPS)[0])
        after, state = run(params)
        return after, blr.posterior(state, after).variance

    assert_same(train(found), train(wanted), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("row", ["ivon", "evon", "vogn", "bsam"])
def test_no_weight_moves_by_more_than_the_bound(row):
    params, batch = make_params(), make_batch()
    tx = getattr(blr, row)(1e4, ess=ESS, num_steps=STEPS, clip_step=0.25)
    state = tx.init(params)
    est = blr.estimate(mean_loss, state, params, *batch)
    updates, _ = jax.jit(tx.update)(est.grad, state, params, statistic=est.statistic)
    deviation = jax.tree.map(np.sqrt, blr.posterior(state, params).variance)
    largest = [
        float(np.max(np.abs(u) / d))
        for u, d in zip(jax.tree.leaves(updates), jax.tree.leaves(deviation), strict=True)
    ]
    np.testing.assert_allclose(max(largest), 0.25, rtol=1e-5)
    assert max(largest) <= 0.25 * (1 + 1e-5)


def test_ten_and_a_thousand_times_the_rate_stay_finite():
    """Without the bound the same rates end in numbers of 1e10, or none."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)
    y = jnp.asarray(np.sign(x[:, 0] * x[:, 1]), jnp.float32)
    params = {
        "a": jnp.asarray(rng.normal(size=(5, 16)) / 5**0.5, jnp.float32),
        "b": jnp.asarray(rng.normal(size=16) / 4, jnp.float32),
    }

    def loss(p, x, y):
        return jnp.mean(jnp.logaddexp(0.0, -y * (jax.nn.relu(x @ p["a"]) @ p["b"])))

    @jax.jit
    def final(rate):
        def schedule(count):
            return rate * (1 - count / 300)

        tx = blr.ivon(schedule, ess=64.0, num_steps=300)
        step = blr.make_step(tx, loss, jit=False, donate=False)
        carry = (params, tx.init(params))
        (after, _), _ = jax.lax.scan(lambda c, _: (step(*c, x, y)[:2], None), carry, None, 300)
        return loss(after, x, y)

    ordinary, ten, thousand = (float(final(jnp.float32(5.0 * f))) for f in (1, 10, 1000))
    assert ordinary < 0.6
    assert ten < 1.5 * ordinary
    assert math.isfinite(thousand) and thousand < 1.5 * ordinary


@pytest.mark.parametrize("name", ["ivon", "evon", "vogn", "bsam", "mixture_ivon"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "num_steps="),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 10.5}, "whole number"),
        ({"num_steps": 10, "prior": 0.1}, "prior"),
        ({"learning_rate": 0.1, "clip_step": -1.0}, "clip_step"),
        (
            {"num_steps": 10, "prior": blr.relative_prior(0.1)},
            r"relative_noise\(0.2\) must be below relative_prior\(0.1\)",
        ),
        ({"num_steps": 10, "prior": blr.relative_prior(3.0), "prior_precision": 1.0}, "leave"),
    ],
)
def test_mistakes_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        getattr(blr, name)(ess=ESS, **options)


@pytest.mark.parametrize("share", [0.0, -1.0, np.inf, "much", [0.1, 0.2]])
def test_a_share_is_one_positive_number(share):
    for make in (blr.relative_noise, blr.relative_prior):
        with pytest.raises(ValueError, match="share"):
            make(share)


def test_a_start_that_is_given_asks_for_a_rate():
    q = blr.distribution("normal", mean=jnp.ones(2), precision=jnp.full(2, 9.0))
    with pytest.raises(ValueError, match="beside init= the rate does not"):
        blr.ivon(ess=ESS, num_steps=10, init=q)
    with pytest.raises(ValueError, match="init= gives another one"):
        blr.ivon(0.1, ess=ESS, hess_init=blr.relative_noise(), init=q)
    tx = blr.ivon(0.1, ess=ESS, num_steps=10, init=q)
    assert_same(blr.posterior(tx.init(q.mean), q.mean).variance, np.full(2, 1 / 9.0), rtol=1e-6)


def test_components_of_a_mixture_have_the_sizes_of_one_network():
    """The leading axis makes no matrix of a bias, and no larger layer of a matrix."""
    one = network()
    two = jax.tree.map(lambda x: jnp.stack([x, x]), one)
    options = {"hess_init": blr.relative_noise(0.2), "prior": blr.relative_prior(3.0), "ess": ESS}
    alone = blr.ivon(0.1, **options).init(one).scales
    together = blr.mixture_ivon(0.1, **options).init(two).scales
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    zeros = jnp.zeros((4, 100, 10))
    found = blr.mixture_ivon(0.1, **options).init(zeros).scales
    np.testing.assert_allclose(found, [0.1], rtol=1e-6)


def test_a_leaf_without_prior_has_the_same_noise():
    params = {"w": jnp.full((2, 2), 0.5), "v": jnp.full((2, 2), 0.5)}
    mask = {"w": True, "v": False}
    prior = blr.relative_prior(0.25)
    for given in (mask, lambda p: {k: k == "w" for k in p}):
        tx = blr.ivon(ess=ESS, num_steps=10, mask=given, prior=prior)
        variance = blr.posterior(tx.init(params), params).variance
        for leaf in variance.values():
            np.testing.assert_allclose(leaf, np.full((2, 2), 0.1**2), rtol=1e-5)


def test_noise_that_is_wider_than_the_prior_is_named():
    tx = blr.ivon(0.1, ess=1e6, hess_init=blr.relative_noise())  # 1e-4 per example
    with pytest.raises(ValueError, match="wider than the prior"):
        tx.init({"w": jnp.ones((3, 3))})


def test_shares_may_be_arrays_also_inside_a_program():
    params, share = make_params(), blr.relative_prior(jnp.float32(3.2))
    make = lambda p: blr.ivon(ess=ESS, num_steps=10, prior=share).init(p).scales  # noqa: E731
    np.testing.assert_allclose(jax.jit(make)(params), make(params), rtol=1e-6)


def test_wrong_objects_are_named():
    params = make_params()
    tx = blr.ivon(ess=ESS, num_steps=10)
    with pytest.raises(ValueError, match="must be the optimizer state"):
        tx.update(params, params, params)
    with pytest.raises(ValueError, match="no array"):
        tx.init({**params, "f": jnp.tanh})
    q = blr.distribution("normal", mean=0.0, precision=1.0)
    for row in (blr.vogn, blr.bsam):
        with pytest.raises(ValueError, match="needs the first posterior, init="):
            row(ess=ESS, num_steps=10, prior=q)
    with pytest.raises(ValueError, match="hess_init=RelativeNoise"):
        blr.scale_by_precision(ess=ESS, hess_init=blr.relative_noise())
