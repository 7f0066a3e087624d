"""What `diagnostics` says about steps whose numbers are known, and what the correction sustains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import ROWS, evidence, make_batch, make_params

import blr_optax as blr

ROW = {row.name: row for row in ROWS}


def step_of(row, tx, params, state, batch):
    grads, extra = evidence(row, params, state, batch)
    return tx.update(grads, state, params, **extra)


def test_shares_are_those_of_the_step_that_was_made(x64):
    """u from the curvature given, and the two sums by hand."""
    rho, p, c = 0.3, np.array([2.0, 1.0, 0.5]), np.array([9.0, 0.1, -1.0])
    u = rho * (c - p) / p
    tx = blr.soba(0.1, ess=10.0, b2=1 - rho, hess_init=jnp.array(p), weight_decay=0.0)
    before, grads = tx.init(jnp.ones(3)), jnp.ones(3)
    updates, after = tx.update(grads, before, jnp.ones(3), curvature=jnp.array(c))
    (found,) = blr.diagnostics(before, after, jnp.ones(3), updates, b2=1 - rho)
    second = np.sum(p * u**2) / 2
    np.testing.assert_allclose(
        found.correction_of_move, second / (second + np.sum(p * np.abs(u))), rtol=1e-12
    )
    np.testing.assert_allclose(found.correction_of_precision, second / rho / p.sum(), rtol=1e-12)
    smallest = np.min(p * (1 + u + u**2 / 2))
    np.testing.assert_allclose(found.smallest_per_example, smallest, rtol=1e-12)
    np.testing.assert_allclose(found.smallest_precision, 10 * smallest, rtol=1e-12)
    assert int(found.skipped) == 0
    assert found.clipped is None and found.signal_to_noise is None and found.retracted is None


def test_a_fold_counts_as_its_mirror_image(x64):
    """u and -2 - u lead to one precision; only the curvature tells them apart."""
    tx = blr.soba(0.1, ess=1.0, b2=0.0, hess_init=1.0, weight_decay=0.0)
    before, params = tx.init(jnp.ones(1)), jnp.ones(1)
    for c, share in ((2.0, 0.5 / 1.5), (-2.0, 4.5 / 7.5)):  # u = 1 and -3
        curvature = jnp.array([c])
        _, after = tx.update(params, before, params, curvature=curvature)
        (blind,) = blr.diagnostics(before, after, params)
        (seeing,) = blr.diagnostics(before, after, params, curvature=curvature, b2=0.0)
        np.testing.assert_allclose(blind.correction_of_move, 1 / 3, rtol=1e-12)
        np.testing.assert_allclose(seeing.correction_of_move, share, rtol=1e-12)


def test_small_moves_of_float32_are_seen():
    """At the usual 1 - b2 = 1e-5 the share is read off p' / p = 1 + 1e-4 without cancellation."""
    p, rho = jnp.linspace(0.5, 2.0, 1000), 1e-5
    tx = blr.soba(0.1, ess=1.0, b2=1 - rho, hess_init=p, weight_decay=0.0)
    before, params = tx.init(p), p
    _, after = tx.update(p, before, params, curvature=11.0 * p)  # u = 1e-4
    (found,) = blr.diagnostics(before, after, params, b2=1 - rho)
    np.testing.assert_allclose(found.correction_of_move, 0.5e-4, rtol=0.01)
    np.testing.assert_allclose(found.correction_of_precision, 0.5e-3, rtol=0.01)


@pytest.mark.parametrize(
    ("rho", "ess"),
    [(1e-2, 1e10), pytest.param(3e-3, 1e5, marks=pytest.mark.slow)],
)
def test_without_curvature_the_correction_sustains_the_precision(rho, ess):
    """p settles at rho ess E[g^2] / 2, all of it correction, though the moves hardly are."""
    size, steps = 100_000, int(6 / rho)
    params, scale = jnp.zeros(size), 0.3
    floor = 0.5 * rho * ess * scale**2
    tx = blr.soba(0.0, ess, b2=1 - rho, hess_init=floor / 3, weight_decay=0.0)

    def step(state, key):
        grads = scale * jax.random.normal(key, (size,))  # knows nothing of the sampled weights
        p = optax.tree.get(state, "precision")
        curvature = grads * (blr.sample(state, params) - params) * ess * p
        _, after = tx.update(grads, state, params, curvature=curvature)
        (found,) = blr.diagnostics(state, after, params, curvature=curvature, b2=1 - rho)
        return after, (
            jnp.mean(optax.tree.get(after, "precision")),
            found.correction_of_precision,
            found.correction_of_move,
        )

    keys = jax.random.split(jax.random.key(0), steps)
    last, trace = jax.jit(lambda s: jax.lax.scan(step, s, keys))(tx.init(params))
    precision, of_precision, of_move = (float(x[-steps // 8 :].mean()) for x in trace)
    np.testing.assert_allclose(precision, floor / (1 - rho / 2), rtol=0.01)
    np.testing.assert_allclose(of_precision, 1.0, rtol=0.01)
    # p u is rho sqrt(ess p) eps g, and p exponential: E|eps g| = 2 / pi, E sqrt(p) = sqrt(pi) / 2.
    first = 2 / np.pi * np.sqrt(np.pi) / 2 * np.sqrt(2 * rho)
    np.testing.assert_allclose(of_move, rho / (rho + first), rtol=0.03)
    p = np.asarray(optax.tree.get(last, "precision"))
    np.testing.assert_allclose(np.median(p), np.log(2) * p.mean(), rtol=0.03)


@pytest.mark.parametrize("name", ["ivon", "soba", "vadam", "vprop", "vogn", "ogn", "sgd", "adam"])
def test_every_optimizer_masked_partitioned_and_jitted(name):
    row, params, batch = ROW[name], make_params(), make_batch()
    mask = {"w": True, "b": False, "c": True}

    def found(tx):
        def step(params, state):
            updates, after = step_of(row, tx, params, state, batch)
            return blr.diagnostics(state, after, params, updates, b2=0.95, bound=1e-3)

        return jax.jit(step)(params, tx.init(params))

    (whole,) = found(optax.chain(row.tx(), optax.scale(1.0)))
    (masked,) = found(optax.masked(row.tx(), mask))
    both = found(optax.partition({True: row.tx(), False: row.tx()}, mask))
    assert len(both) == 2
    for one in (whole, masked, *both):
        assert all(x.shape == () and bool(jnp.isfinite(x)) for x in jax.tree.leaves(one))
        assert float(one.smallest_precision) > 0.0
        if name in ("ivon", "soba"):
            assert 0.0 < float(one.correction_of_move) < 1.0
        elif name in ("sgd", "adam"):
            assert one.correction_of_move is None and int(one.skipped) == 0
        else:
            assert float(one.correction_of_move) == 0.0
    smallest = min(float(one.smallest_precision) for one in both)
    np.testing.assert_allclose(whole.smallest_precision, smallest, rtol=1e-5)
    counts = [float(one.clipped) * n for one, n in zip(both, (2, 7), strict=True)]
    np.testing.assert_allclose(float(whole.clipped) * 9, sum(counts), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.01)])
def test_clipped_coordinates_are_counted(dtype, tolerance):
    """The updates' share at the bound, and that of a snapshot in front of the clip.

    In bfloat16 what is a rounding error below the bound cannot be told from what was clipped.
    """
    radius, lr, h = 0.05, 0.3, 0.5
    parts = [
        blr.scale_by_precision(50.0, hess_init=h, momentum=optax.ema(0.9, debias=True)),
        optax.snapshot("clipped", lambda x: jnp.mean(jnp.abs(x) > radius)),
        optax.clip(radius),
        optax.scale(h),
        optax.scale_by_learning_rate(lr),
    ]
    chain, params = optax.chain(*parts), jnp.zeros(1000, dtype)
    ivon = blr.ivon(lr, 50.0, hess_init=h, weight_decay=0.0, clip_radius=radius)
    grads = (0.05 * jax.random.normal(jax.random.key(0), (1000,))).astype(dtype)
    for tx in (chain, ivon):
        state = tx.init(params)
        updates, after = tx.update(grads, state, params)
        (found,) = blr.diagnostics(state, after, params, updates, bound=lr * h * radius)
        assert 0.4 < float(found.clipped) < 0.9
        if tx is chain:
            expected = float(optax.tree.get(after, "clipped"))
        np.testing.assert_allclose(found.clipped, expected, atol=tolerance)


def test_signal_to_noise_of_the_curvature(x64):
    """Draws around a known mean; around none the estimate is near zero, not near 1 / sqrt(S)."""
    tx, params = blr.ivon(0.1, 10.0, hess_init=2.0, weight_decay=0.0), jnp.zeros(5000)
    state = tx.init(params)
    _, after = tx.update(params, state, params)
    noise = jax.random.normal(jax.random.key(0), (2, 5000))

    def ratio(mean):
        return blr.diagnostics(state, after, params, draws=mean + 3.0 * noise)[0]

    np.testing.assert_allclose(ratio(1.5).signal_to_noise, 0.5, rtol=0.05)
    assert float(ratio(0.0).signal_to_noise) < 0.15
    with pytest.raises(ValueError, match="two or more draws"):
        blr.diagnostics(state, after, params, draws=params[None])


def test_signal_to_noise_of_antithetic_pairs_is_the_better_one():
    """Separate draws of one batch, by `reseed`: the mirrored noise is the smaller one."""
    w = jnp.linspace(-1.0, 1.0, 50)
    loss = lambda m: jnp.sum(3.0 * m + 0.5 * jnp.cos(m) + m**2)  # noqa: E731
    tx = blr.ivon(0.1, 1e4)
    state = tx.init(w)
    keys = jax.random.split(jax.random.key(0), 100)

    def ratio(**options):
        draws = jax.vmap(
            lambda key: blr.estimate(loss, blr.reseed(state, key), w, **options).curvature
        )(keys)
        _, after = tx.update(w, state, w)
        return float(blr.diagnostics(state, after, w, draws=draws)[0].signal_to_noise)

    assert ratio(antithetic=True) > 10 * ratio(samples=2)


def test_skipped_and_retracted_steps_are_told():
    params = jnp.zeros(2)
    tx = blr.ivon(0.1, 10.0)
    state = tx.init(params)
    _, after = tx.update(jnp.array([jnp.nan, 0.0]), state, params)
    (found,) = blr.diagnostics(state, after, params, b2=0.99999)
    assert int(found.skipped) == 1 and float(found.correction_of_move) == 0.0
    rule = blr.blr_update(
        "gaussian_diagonal", lambda w: -jnp.sum(w**2), 1.0, estimator=blr.estimators.delta()
    )
    state = rule.init(params)
    _, after = rule.update(None, state, params, batch=())
    (found,) = blr.diagnostics(state, after, params)
    assert int(found.retracted) > 0 and int(found.skipped) == 0
    assert float(found.smallest_precision) > 0.0


def test_an_improper_posterior_is_shown_not_refused():
    tx, params = blr.scale_by_precision(1.0, b2=0.0, step="plain"), jnp.zeros(2)
    state = tx.init(params)
    _, after = tx.update(params, state, params, curvature=jnp.array([1.0, -4.0]))
    (found,) = blr.diagnostics(state, after, params)
    assert float(found.smallest_precision) < 0.0


def test_states_of_two_makes_are_refused():
    params = jnp.zeros(2)
    a, b = blr.ivon(0.1, 10.0).init(params), blr.vadam(0.1, 10.0).init(params)
    with pytest.raises(ValueError, match="different posteriors"):
        blr.diagnostics(a, b, params)
    with pytest.raises(ValueError, match="carries no posterior"):
        blr.diagnostics(optax.adam(0.1).init(params), a, params)


def test_a_prior_counts_when_folds_are_told(x64):
    """u = rho (c + d0 - p) / p: a strong prior keeps a step from folding."""
    params = jnp.ones(1)
    family = blr.families.get("gaussian_diagonal")
    prior = blr.Posterior(family, family.natural(mean=jnp.zeros(1), precision=jnp.full(1, 50.0)))
    for more, given in (
        ({"weight_decay": 5.0}, {"weight_decay": 5.0}),
        ({"prior": prior, "weight_decay": 0.0}, {}),
    ):
        tx = blr.soba(0.1, ess=10.0, b2=0.0, hess_init=1.0, **more)
        before, curvature = tx.init(params), jnp.array([-3.0])
        _, after = tx.update(params, before, params, curvature=curvature)
        (found,) = blr.diagnostics(before, after, params, curvature=curvature, b2=0.0, **given)
        u = -2.0 / 3.0  # (-3 + 5 - 6) / 6
        np.testing.assert_allclose(found.correction_of_move, u**2 / 2 / (-u + u**2 / 2), rtol=1e-9)
        np.testing.assert_allclose(found.correction_of_precision, u**2 / 2, rtol=1e-9)
    with pytest.raises(ValueError, match="curvature= needs b2="):
        blr.diagnostics(before, after, params, curvature=curvature)
