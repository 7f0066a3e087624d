"""What `diagnostics` says about steps whose numbers are known, and what the correction sustains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import ROWS, evidence, make_batch, make_params
from tools import USERS

import blr_optax as blr

ROW = {row.name: row for row in ROWS}


def step_of(row, tx, params, state, batch):
    grads, extra = evidence(row, params, state, batch)
    return tx.update(grads, state, params, **extra)


def diagnosed(tx, params, grads, curvature=None, **given):
    """`diagnostics` of one step, as one program; `curvature` is what `update` gets."""

    @jax.jit
    def found(params, grads, curvature):
        before = tx.init(params)
        more = {} if curvature is None else {"statistic": curvature}
        updates, after = tx.update(grads, before, params, **more)
        (one,) = blr.diagnostics(before, after, params, updates, **given)
        return one

    return found(params, grads, curvature)


def test_shares_are_those_of_the_step_that_was_made(x64):
    """u from the curvature given, and the two sums by hand."""
    rho, p, c = 0.3, np.array([2.0, 1.0, 0.5]), np.array([9.0, 0.1, -1.0])
    u = rho * (c - p) / p
    tx = blr.soba(0.1, ess=10.0, b2=1 - rho, hess_init=p, weight_decay=0.0)
    found = diagnosed(tx, np.ones(3), np.ones(3), c, b2=1 - rho)
    second = np.sum(p * u**2) / 2
    np.testing.assert_allclose(
        found.correction_of_move, second / (second + np.sum(p * np.abs(u))), rtol=1e-12
    )
    np.testing.assert_allclose(found.correction_of_precision, second / rho / p.sum(), rtol=1e-12)
    smallest = np.min(p * (1 + u + u**2 / 2))
    np.testing.assert_allclose(found.smallest_per_example, smallest, rtol=1e-12)
    np.testing.assert_allclose(found.smallest_precision, 10 * smallest, rtol=1e-12)
    assert int(found.skipped) == 0
    assert (
        found.clipped is None
        and found.curvature_signal_to_noise is None
        and found.retracted is None
    )


def test_a_fold_counts_as_its_mirror_image(x64):
    """u and -2 - u lead to one precision; only the curvature tells them apart."""
    tx = blr.soba(0.1, ess=1.0, b2=0.0, hess_init=1.0, weight_decay=0.0)

    @jax.jit
    def both(params, curvature):
        before = tx.init(params)
        _, after = tx.update(params, before, params, statistic=curvature)
        (blind,) = blr.diagnostics(before, after, params)
        (seeing,) = blr.diagnostics(before, after, params, statistic=curvature, b2=0.0)
        return blind.correction_of_move, seeing.correction_of_move

    for c, share in ((2.0, 0.5 / 1.5), (-2.0, 4.5 / 7.5)):  # u = 1 and -3
        blind, seeing = both(np.ones(1), np.array([c]))
        np.testing.assert_allclose(blind, 1 / 3, rtol=1e-12)
        np.testing.assert_allclose(seeing, share, rtol=1e-12)


def test_small_moves_of_float32_are_seen():
    """At the usual 1 - b2 = 1e-5 the share is read off p' / p = 1 + 1e-4 without cancellation."""
    p, rho = np.linspace(0.5, 2.0, 1000, dtype=np.float32), 1e-5
    tx = blr.soba(0.1, ess=1.0, b2=1 - rho, hess_init=p, weight_decay=0.0)
    found = diagnosed(tx, p, p, 11 * p, b2=1 - rho)  # u = 1e-4
    np.testing.assert_allclose(found.correction_of_move, 0.5e-4, rtol=0.01)
    np.testing.assert_allclose(found.correction_of_precision, 0.5e-3, rtol=0.01)


def sustained(rho, ess):
    """p settles at rho ess E[g^2] / 2, all of it correction, though the moves hardly are."""
    size, steps = 100_000, int(6 / rho)
    scale = 0.3
    floor = 0.5 * rho * ess * scale**2
    tx = blr.soba(0.0, ess=ess, b2=1 - rho, hess_init=floor / 3, weight_decay=0.0)

    def step(state, key):
        params = jnp.zeros(size)
        grads = scale * jax.random.normal(key, (size,))  # knows nothing of the sampled weights
        p = optax.tree.get(state, "precision")
        curvature = grads * (blr.sample(state, params) - params) * ess * p
        _, after = tx.update(grads, state, params, statistic=curvature)
        (found,) = blr.diagnostics(state, after, params, statistic=curvature, b2=1 - rho)
        return after, (
            jnp.mean(optax.tree.get(after, "precision")),
            found.correction_of_precision,
            found.correction_of_move,
        )

    def loop(key):
        keys = jax.random.split(key, steps)
        last, trace = jax.lax.scan(step, tx.init(jnp.zeros(size)), keys)
        return optax.tree.get(last, "precision"), trace

    p, trace = jax.jit(loop, compiler_options=USERS)(jax.random.key(0, impl="unsafe_rbg"))
    p = np.asarray(p)
    precision, of_precision, of_move = (np.asarray(x)[-steps // 8 :].mean() for x in trace)
    np.testing.assert_allclose(precision, floor / (1 - rho / 2), rtol=0.01)
    np.testing.assert_allclose(of_precision, 1.0, rtol=0.01)
    # p u is rho sqrt(ess p) eps g, and p exponential: E|eps g| = 2 / pi, E sqrt(p) = sqrt(pi) / 2.
    first = 2 / np.pi * np.sqrt(np.pi) / 2 * np.sqrt(2 * rho)
    np.testing.assert_allclose(of_move, rho / (rho + first), rtol=0.03)
    np.testing.assert_allclose(np.median(p), np.log(2) * p.mean(), rtol=0.03)


@pytest.mark.parametrize(("rho", "ess"), [(1e-2, 1e10)])
def test_without_curvature_the_correction_sustains_the_precision(rho, ess):
    sustained(rho, ess)


@pytest.mark.parametrize("name", ["ivon", "soba", "vadam", "vprop", "vogn", "ogn", "sgd", "adam"])
def test_every_optimizer_masked_partitioned_and_jitted(name):
    row, params, batch = ROW[name], *jax.tree.map(np.asarray, (make_params(), make_batch()))
    mask = {"w": True, "b": False, "c": True}
    ways = (
        optax.chain(row.tx(), optax.scale(1.0)),
        optax.masked(row.tx(), mask),
        optax.partition({True: row.tx(), False: row.tx()}, mask),
    )

    @jax.jit
    def found(params):
        def one(tx):
            state = tx.init(params)
            updates, after = step_of(row, tx, params, state, batch)
            return blr.diagnostics(state, after, params, updates, b2=0.95, bound=1e-3)

        return [one(tx) for tx in ways]

    (whole,), (masked,), both = jax.tree.map(np.asarray, found(params))
    assert len(both) == 2
    for one in (whole, masked, *both):
        assert all(x.shape == () and np.isfinite(x) for x in jax.tree.leaves(one))
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


@pytest.mark.parametrize("name", ["evon", "mixture_ivon"])
def test_the_gaussians_inside_a_posterior_are_read(name):
    row, batch = ROW[name], jax.tree.map(np.asarray, make_batch())

    @jax.jit
    def found(params):
        before = row.tx().init(params)
        grads, _ = evidence(row, params, before, batch)
        poisoned = {**grads, "b": grads["b"] * np.nan}
        one, other = (row.tx().update(g, before, params)[1] for g in (grads, poisoned))
        return blr.diagnostics(before, one, params)[0], blr.diagnostics(before, other, params)[0]

    one, other = jax.tree.map(np.asarray, found(row.params()))
    assert int(one.skipped) == 0 and int(other.skipped) == 1
    assert 0.0 < float(one.correction_of_move) < 1.0 and float(other.correction_of_move) == 0.0
    ess = row.numbers["ess"]
    np.testing.assert_allclose(one.smallest_precision, ess * one.smallest_per_example, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.01)])
def test_clipped_coordinates_are_counted(dtype, tolerance):
    """The updates' share at the bound, and that of a snapshot in front of the clip.

    In bfloat16 what is a rounding error below the bound cannot be told from what was clipped.
    """
    radius, lr, h = 0.05, 0.3, 0.5
    parts = [
        blr.scale_by_precision(ess=50.0, hess_init=h, momentum=optax.ema(0.9, debias=True)),
        optax.snapshot("clipped", lambda x: jnp.mean(jnp.abs(x) > radius)),
        optax.clip(radius),
        optax.scale(h),
        optax.scale_by_learning_rate(lr),
    ]
    chain = optax.chain(*parts)
    ivon = blr.ivon(lr, ess=50.0, hess_init=h, weight_decay=0.0, clip_radius=radius)
    grads = (0.05 * np.random.default_rng(0).normal(size=1000)).astype(dtype)

    @jax.jit
    def found(params, grads):
        shares = []
        for tx in (chain, ivon):
            state = tx.init(params)
            updates, after = tx.update(grads, state, params)
            (one,) = blr.diagnostics(state, after, params, updates, bound=lr * h * radius)
            shares.append(one.clipped)
            if tx is chain:
                expected = optax.tree.get(after, "clipped")
        return shares, expected

    shares, expected = found(np.zeros(1000, dtype), grads)
    for share in shares:
        assert 0.4 < float(share) < 0.9
        np.testing.assert_allclose(share, float(expected), atol=tolerance)


def test_signal_to_noise_of_the_curvature(x64):
    """Draws around a known mean; around none the estimate is near zero, not near 1 / sqrt(S)."""
    tx, params = blr.ivon(0.1, ess=10.0, hess_init=2.0, weight_decay=0.0), np.zeros(5000)
    noise = np.random.default_rng(0).normal(size=(2, 5000))

    @jax.jit
    def step(params):
        state = tx.init(params)
        return state, tx.update(params, state, params)[1]

    state, after = step(params)

    @jax.jit
    def ratio(draws):
        return blr.diagnostics(state, after, params, draws=draws)[0].curvature_signal_to_noise

    np.testing.assert_allclose(ratio(1.5 + 3.0 * noise), 0.5, rtol=0.05)
    assert float(ratio(3.0 * noise)) < 0.15
    with pytest.raises(ValueError, match="two or more draws"):
        ratio(params[None])


def test_signal_to_noise_of_antithetic_pairs_is_the_better_one():
    """Separate draws of one batch, by `reseed`: the mirrored noise is the smaller one."""
    loss = lambda m: jnp.sum(3.0 * m + 0.5 * jnp.cos(m) + m**2)  # noqa: E731
    tx = blr.ivon(0.1, ess=1e4)

    @jax.jit
    def ratios(w, key):
        state, keys = tx.init(w), jax.random.split(key, 100)
        _, after = tx.update(w, state, w)

        def ratio(**options):
            draws = jax.vmap(
                lambda key: blr.estimate(loss, blr.reseed(state, key), w, **options).statistic
            )(keys)
            return blr.diagnostics(state, after, w, draws=draws)[0].curvature_signal_to_noise

        return ratio(antithetic=True), ratio(samples=2)

    mirrored, separate = ratios(np.linspace(-1.0, 1.0, 50, dtype=np.float32), jax.random.key(0))
    assert float(mirrored) > 10 * float(separate)


def test_skipped_and_retracted_steps_are_told():
    zero = np.zeros(2, np.float32)
    found = diagnosed(
        blr.ivon(0.1, ess=10.0), zero, np.array([np.nan, 0.0], np.float32), b2=0.99999
    )
    assert int(found.skipped) == 1 and float(found.correction_of_move) == 0.0
    rule = blr.blr_update(
        "gaussian_diagonal", lambda w: -jnp.sum(w**2), 1.0, estimator=blr.estimators.delta()
    )

    @jax.jit
    def of_rule(params):
        state = rule.init(params)
        _, after = rule.update(None, state, params, batch=())
        return blr.diagnostics(state, after, params)[0]

    found = of_rule(zero)
    assert int(found.retracted) > 0 and int(found.skipped) == 0
    assert float(found.smallest_precision) > 0.0


def test_an_improper_posterior_is_shown_not_refused():
    tx, zero = blr.scale_by_precision(ess=1.0, b2=0.0, step="plain"), np.zeros(2, np.float32)
    found = diagnosed(tx, zero, zero, np.array([1.0, -4.0], np.float32))
    assert float(found.smallest_precision) < 0.0


def test_states_of_two_makes_are_refused():
    params = np.zeros(2, np.float32)
    makers = (blr.ivon(0.1, ess=10.0), blr.vadam(0.1, ess=10.0), optax.adam(0.1))
    a, b, plain = jax.jit(lambda p: [tx.init(p) for tx in makers])(params)
    with pytest.raises(ValueError, match="different posteriors"):
        blr.diagnostics(a, b, params)
    with pytest.raises(ValueError, match="carries no posterior"):
        blr.diagnostics(plain, a, params)


def test_a_prior_counts_when_folds_are_told(x64):
    """u = rho (c + d0 - p) / p: a strong prior keeps a step from folding."""
    params, curvature = np.ones(1), np.array([-3.0])
    family = blr.families.get("gaussian_diagonal")

    @jax.jit
    def both(params, curvature):
        natural = family.natural(mean=jnp.zeros(1), precision=jnp.full(1, 50.0))
        found = []
        for more, given in (
            ({"weight_decay": 5.0}, {"weight_decay": 5.0}),
            ({"prior": blr.Distribution(family, natural), "weight_decay": 0.0}, {}),
        ):
            tx = blr.soba(0.1, ess=10.0, b2=0.0, hess_init=1.0, **more)
            before = tx.init(params)
            _, after = tx.update(params, before, params, statistic=curvature)
            (one,) = blr.diagnostics(before, after, params, statistic=curvature, b2=0.0, **given)
            found.append(one)
        return found, before, after

    found, before, after = both(params, curvature)
    for one in found:
        u = -2.0 / 3.0  # (-3 + 5 - 6) / 6
        np.testing.assert_allclose(one.correction_of_move, u**2 / 2 / (-u + u**2 / 2), rtol=1e-9)
        np.testing.assert_allclose(one.correction_of_precision, u**2 / 2, rtol=1e-9)
    with pytest.raises(ValueError, match="statistic= needs b2="):
        blr.diagnostics(before, after, params, statistic=curvature)


def scored(right, b2, steps):
    """The score of some steps on a network, with the gradient at the sample or at params."""
    x = np.sin(np.arange(600.0)).reshape(200, 3).astype(np.float32)
    y = np.cos(np.arange(200.0)).astype(np.float32)
    tx = blr.ivon(0.1, ess=200.0, hess_init=0.5, b2=b2)
    w = 0.5 * np.cos(np.arange(96.0)).reshape(3, 32).astype(np.float32)
    params = {"w": w, "v": np.sin(np.arange(32.0)).astype(np.float32) / 8}

    def loss(p):
        return 0.5 * jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2)

    def step(carry, _):
        params, before = carry
        grads = jax.grad(loss)(blr.sample(before, params) if right else params)
        updates, after = tx.update(grads, before, params)
        (found,) = blr.diagnostics(before, after, params, b2=b2, weight_decay=1e-4)
        return (optax.apply_updates(params, updates), after), found.statistic_score

    scan = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=steps)[1])
    return float(np.sum(np.asarray(scan(params))) / np.sqrt(steps))


@pytest.mark.parametrize("b2", [0.99, 0.99999])
def test_a_gradient_at_the_parameters_is_seen_by_its_statistic(b2):
    """Its statistic knows nothing of the noise: the score stays of size one, and else it grows."""
    assert scored(True, b2, 100) > 6.0
    assert abs(scored(False, b2, 100)) < 3.0


def test_the_score_is_that_of_the_statistic(x64):
    """Recovered from the move of the precision, against the statistic that was given."""
    c, p = np.array([3.0, -1.0, 0.5]), np.array([1.0, 2.0, 4.0])
    for wrap in (lambda tx: tx, lambda tx: optax.chain(tx, optax.scale(0.5))):
        tx = wrap(blr.soba(0.1, ess=10.0, b2=0.9, hess_init=p - 0.5, weight_decay=0.5))
        found = diagnosed(tx, np.ones(3), np.ones(3), c, b2=0.9, weight_decay=0.5)
        wanted = np.sum(c / p) / np.sqrt(np.sum((c / p) ** 2))
        np.testing.assert_allclose(found.statistic_score, wanted, rtol=1e-10)
    squares = blr.soba(0.1, ess=10.0, b2=0.9, curvature=blr.estimators.squared_gradient(1))
    assert diagnosed(squares, np.ones(3), np.ones(3), b2=0.9).statistic_score is None
    assert diagnosed(blr.adam(0.1), np.ones(3), np.ones(3), b2=0.9).statistic_score is None


def test_the_statistic_over_the_precision_is_that_of_the_draws(x64):
    """Sum (c + d0) / sum p by hand, of the mean of draws, of one statistic, within any wrapper."""
    c, p = np.array([3.0, -1.0, 0.5]), np.array([1.0, 2.0, 4.0])
    for wrap in (lambda tx: tx, lambda tx: optax.chain(tx, optax.scale(0.5))):
        tx = wrap(blr.soba(0.1, ess=10.0, b2=0.9, hess_init=p - 0.5, weight_decay=0.5))
        given = {"b2": 0.9, "weight_decay": 0.5}
        draws = np.stack([c - 1.0, c + 3.0])
        one = diagnosed(tx, np.ones(3), np.ones(3), c, statistic=c, **given)
        many = diagnosed(tx, np.ones(3), np.ones(3), c, statistic=c, draws=draws, **given)
        np.testing.assert_allclose(one.statistic_over_precision, (2.5 + 1.5) / 7.0, rtol=1e-12)
        np.testing.assert_allclose(many.statistic_over_precision, (5.5 + 1.5) / 7.0, rtol=1e-12)
        assert diagnosed(tx, np.ones(3), np.ones(3), c, **given).statistic_over_precision is None
    assert diagnosed(blr.adam(0.1), np.ones(3), np.ones(3)).statistic_over_precision is None


TRIAL = {
    "right": (0.99, True, 0.6, 1.3),
    "sampling forgotten": (0.99, False, 20.0, np.inf),
    "b2 too slow": (0.99999, True, None, None),
}


@pytest.mark.parametrize("name", TRIAL)
def test_the_statistic_over_the_precision_tells_three_runs_apart(name):
    """About 1 where all is right; 87 and 3 were seen in a trial of the two mistakes."""
    b2, right, low, high = TRIAL[name]
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 3)) * [3.0, 1.0, 0.3]).astype(np.float32)
    y = (x @ [1.0, -2.0, 0.5] + rng.normal(size=200)).astype(np.float32)
    tx = blr.ivon(0.1, ess=200, b2=b2)

    def loss(w, x, y):
        return 0.5 * jnp.mean((x @ w - y) ** 2)

    def step(_, carry):
        params, _, before = carry
        grads = jax.grad(loss)(blr.sample(before, params) if right else params, x, y)
        updates, after = tx.update(grads, before, params)
        return optax.apply_updates(params, updates), before, after

    @jax.jit
    def ratio(params, key):
        first = params, tx.init(params), tx.init(params)
        params, before, after = jax.lax.fori_loop(0, 800, step, first)
        draws = jax.vmap(
            lambda key: (
                blr.estimate(loss, blr.reseed(before, key), params, x, y, antithetic=True).statistic
            )
        )(jax.random.split(key, 1000))
        (found,) = blr.diagnostics(before, after, params, draws=draws, weight_decay=1e-4)
        return found.statistic_over_precision

    found = float(ratio(np.zeros(3, np.float32), jax.random.key(0)))
    if low is None:  # the precision is still hess_init's, 1, and the Hessian is that of the data
        np.testing.assert_allclose(found, np.mean(x**2), rtol=0.15)
    else:
        assert low < found < high


def test_learnt_and_growth_tell_a_posterior_of_data_from_one_of_its_start():
    """A loss with curvature 3 in one half of the weights, and none in the other."""
    params = jnp.zeros(8)
    tx = blr.ivon(0.0, ess=100.0, hess_init=1.0, b2=0.99, weight_decay=0.0)
    first = tx.init(params)
    none, curved = jnp.zeros(8), jnp.where(jnp.arange(8) < 4, 3.0, 0.0)

    @jax.jit
    def run(state, statistic):
        def body(state, _):
            return tx.update(none, state, params, statistic=statistic)[1], None

        return jax.lax.scan(body, state, None, 50)[0]

    for statistic, learnt in ((curved, 0.5), (none, 0.0)):
        (found,) = blr.diagnostics(first, run(first, statistic), params, b2=0.99)
        assert float(found.learnt) == learnt
        # Where nothing is known p decays as (1 - rho + rho^2 / 2)^50.
        np.testing.assert_allclose(found.growth, (1 - 0.01 + 0.5e-4) ** -50, rtol=1e-4)
    (point,) = blr.diagnostics(*[blr.sgd(0.1, ess=10.0).init(params)] * 2, params, b2=0.9)
    assert point.learnt is None and point.growth is None
