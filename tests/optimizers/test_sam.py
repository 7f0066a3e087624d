"""SAM and bSAM against recorded trajectories of the official code, and against the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import (
    flatten,
    follow,
    noise_and_batches,
    problem_loss,
    recorded,
    start_of,
    unflatten,
)
from tools import built_inside, load_golden, run_steps

import blr_optax as blr

FILES = ("bsam_logreg", "bsam_mlp")
CASES = [
    pytest.param(file, case, id=f"{file}-{case['name']}")
    for file in FILES
    for case in load_golden(file)["cases"]
]
DIAGONAL = blr.families.get("gaussian_diagonal")


def transformation(case):
    hyper = case["hyper"]
    factors = jnp.array(recorded(case, "lrfactor"))
    rate = lambda count: hyper["learningrate"] * factors[count]  # noqa: E731
    if case["algorithm"] == "sgd":
        return optax.chain(
            optax.add_decayed_weights(hyper["wdecay"]), blr.sgd(rate, momentum=hyper["momentum"])
        )
    if case["algorithm"] == "sam":
        return blr.sam(
            rate, rho=hyper["rho"], momentum=hyper["momentum"], weight_decay=hyper["wdecay"]
        )
    size = hyper["Ndata"]
    return blr.bsam(
        rate,
        ess=size,
        rho=hyper["rho"],
        prior_precision=size * hyper["wdecay"],
        init_precision=size * hyper["s_init"],
        b1=hyper["beta1"],
        b2=hyper["beta2"],
        damping=hyper["damping"],
    )


@pytest.mark.parametrize(("file", "case"), CASES)
def test_bayesian_sam_repository(x64, file, case):
    """Weights, averages of gradients and precisions of every step, to 1e-9."""
    problem = load_golden(file)["problem"]
    names, shapes = problem["leaf_names"], problem["leaf_shapes"]
    tx, loss = transformation(case), problem_loss(problem)
    params = unflatten(case["init_w"], names, shapes)
    if "eps" in case["steps"][0]:
        noise, batch = noise_and_batches(case, names, shapes)
    else:
        noise, batch = None, recorded(case, "batch")
    of_bsam = case["algorithm"] == "bsam"

    def step(carry, given):
        (params, state), (noise, batch) = carry, given
        # The file's sub-batches are rows; `split` deals the examples out one by one.
        found = {"samples": len(batch)} if noise is None else {"noise": noise}
        est = blr.estimate(loss, state, params, batch.T.reshape(-1), split=True, **found)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = optax.apply_updates(params, updates)
        average = optax.tree.get(state, "ema" if of_bsam else "trace")
        variance = blr.posterior(state, params).variance if of_bsam else None
        return (params, state), (est.grad, params, average, variance)

    _, seen = run_steps(step, start_of(tx, params), (noise, batch))
    gradient, mean, average, variance = seen
    wanted = [np.mean(one.get("grad_adv", one["grad"]), 0) for one in case["steps"]]
    follow(flatten(gradient, names), wanted, 1e-9, "g")
    follow(flatten(mean, names), recorded(case, "w"), 1e-9, "weights")
    follow(flatten(average, names), recorded(case, "gm"), 1e-9, "average")
    assert of_bsam == ("s" in case["steps"][0])
    if of_bsam:
        total = 1 / flatten(variance, names) / case["hyper"]["Ndata"]
        follow(total, recorded(case, "s"), 1e-9, "precision")


def test_bsam_without_adversary_is_the_rule(x64):
    """Precisions are `blr_update`'s to 1e-12; the mean is divided by the old one."""
    rho, prior = 0.1, 2.0
    slopes = np.random.default_rng(3).normal(size=(20, 3))
    tx = blr.bsam(
        rho,
        ess=1.0,
        rho=0.0,
        prior_precision=prior,
        init_precision=7.0,
        b1=0.0,
        b2=1 - rho,
        damping=0,
    )

    def posterior(precision):
        return blr.Distribution(
            DIAGONAL, DIAGONAL.natural(mean=jnp.zeros(3), precision=jnp.full(3, precision))
        )

    rule = built_inside(
        lambda: blr.blr_update(
            "gaussian_diagonal",
            lambda w, g: w @ g,
            rho,
            prior=posterior(prior),
            init=posterior(7.0),
            estimator=blr.estimators.delta(blr.estimators.absolute_gradient()),
            step="plain",
        )
    )

    def start():
        params = jnp.zeros(3)
        return params, tx.init(params), params, rule.init(params)

    def step(carry, g):
        a, state, b, state_rule = carry
        before, old = a, 1 / blr.posterior(state, a).variance
        est = blr.estimate(lambda w, g: w @ g, state, a, g)
        move, state = tx.update(est.grad, state, a, statistic=est.statistic)
        move_rule, state_rule = rule.update(None, state_rule, b, batch=(g,))
        a, b = a + move, b + move_rule
        new = 1 / blr.posterior(state, a).variance
        new_rule = 1 / blr.posterior(state_rule, b).variance
        return (a, state, b, state_rule), (before, old, move, new, new_rule)

    _, (before, old, move, new, new_rule) = run_steps(step, start, slopes)
    np.testing.assert_allclose(new, new_rule, rtol=1e-12)
    np.testing.assert_allclose(move, -rho * (slopes + prior * before) / old, rtol=1e-11)


def test_sam_without_radius_is_sgd_and_bsam_with_one_the_worst_point(x64):
    loss = lambda w: jnp.sum(jnp.sin(w) + 0.3 * w**4)  # noqa: E731
    params = np.array([0.3, -0.7])
    angles = np.linspace(0, 2 * np.pi, 1000)

    @jax.jit
    def steps(params):
        grad = jax.grad(loss)(params)
        sgd, sam = blr.sgd(0.1, momentum=0.9), blr.sam(0.1, rho=0.0, momentum=0.9)
        est = blr.estimate(loss, sam.init(params), params)
        by_sam, _ = sam.update(est.grad, sam.init(params), params, statistic=est.statistic)
        by_sgd, _ = sgd.update(grad, sgd.init(params), params)
        # To first order no point of the ellipsoid |p^(1/2) x| <= r |p^(-1/2) g| is worse than
        # r g / p.
        tx = blr.bsam(0.1, ess=10.0, rho=1e-3, init_precision=jnp.array([3.0, 30.0]), damping=0.0)
        state = tx.init(params)
        p = 1 / (10 * blr.posterior(state, params).variance)
        worst = state[0].reader.adversary(state[0], params, grad) - params
        radius = 1e-3 * jnp.linalg.norm(grad / jnp.sqrt(p))
        others = radius * jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1) / jnp.sqrt(p)
        size, losses = jnp.linalg.norm(worst * jnp.sqrt(p)), jax.vmap(loss)(params + others)
        return (est.grad, grad), (by_sam, by_sgd), (size, radius), loss(params + worst), losses

    gradients, updates, (size, radius), worst, others = steps(params)
    np.testing.assert_array_equal(*gradients)
    np.testing.assert_array_equal(*updates)
    np.testing.assert_allclose(size, radius, rtol=1e-9)
    assert worst > np.max(others) - 1e-9


def test_split_samples_see_their_own_examples(x64):
    """Equals the average of estimates over the sub-batches, for any row and with micro-batches."""
    loss = lambda w, x, c: c * jnp.mean(jnp.tanh(x @ w) ** 2)  # noqa: E731
    rng, params = np.random.default_rng(0), np.array([0.3, -0.7, 0.1])
    x, noise = rng.normal(size=(12, 3)), rng.normal(size=(3, 3))
    makers = (
        lambda: blr.ivon(0.1, ess=20.0),
        lambda: blr.bsam(0.1, ess=20.0),
        lambda: blr.sam(0.1),
    )

    @jax.jit
    def estimates(params, x, noise):
        found = []
        for make in makers:
            state, drawn = make().init(params), {}
            if hasattr(state[0], "precision"):
                drawn = {"noise": noise}
            look = lambda x, state=state, **more: blr.estimate(  # noqa: E731
                loss, state, params, x, 2.0, **more
            )
            whole = look(x, samples=3, split=True, **drawn)
            small = look(x, samples=3, split=True, microbatch=2, **drawn)
            each = [
                look(x[i::3], **({"noise": noise[i : i + 1]} if drawn else {})) for i in range(3)
            ]
            found.append((whole, small, each))
        return found

    for whole, small, each in estimates(params, x, noise):
        for name in ("value", "grad", "statistic"):
            mean = np.mean([getattr(e, name) for e in each], 0)
            np.testing.assert_allclose(getattr(whole, name), mean, rtol=1e-12)
        np.testing.assert_allclose(small.value, whole.value, rtol=1e-12)
    state = jax.jit(makers[-1]().init)(params)
    with pytest.raises(ValueError, match="samples=5 must divide the batch size 12"):
        blr.estimate(loss, state, params, x, 2.0, samples=5, split=True)


def test_one_gradient_is_refused():
    params = np.ones(2, np.float32)
    for tx in (blr.sam(0.1), blr.bsam(0.1, ess=10.0)):
        with pytest.raises(ValueError, match="a step takes two gradients"):
            tx.update(params, jax.jit(tx.init)(params), params)
    with pytest.raises(ValueError, match="rho=-1 must be a plain finite number, at least zero"):
        blr.sam(0.1, rho=-1)
    with pytest.raises(ValueError, match="bsam: give init= or init_precision="):
        blr.bsam(0.1, ess=10.0, init=posterior_of_ivon(params), init_precision=2.0)
    with pytest.raises(ValueError, match="absolute_gradient"):
        blr.blr_update(
            "normal",
            jnp.sum,
            0.1,
            ess=2.0,
            estimator=blr.estimators.delta(blr.estimators.absolute_gradient()),
        )


@jax.jit
def posterior_of_ivon(params):
    return blr.posterior(blr.ivon(0.1, ess=10.0).init(params), params)


@jax.jit
def adversary(params, grad):
    state = blr.sam(0.1, rho=0.5).init(params)
    return state.reader.adversary(state, params, grad)


@pytest.mark.parametrize("size", [1e-30, 1e-23, 1.0, 1e20, 1e30])
def test_the_radius_holds_for_gradients_of_any_size(size):
    params = np.zeros(2, np.float32)
    moved = adversary(params, np.float32(size) * np.array([3.0, -4.0], np.float32))
    np.testing.assert_allclose(moved, [0.3, -0.4], rtol=1e-6)
    np.testing.assert_array_equal(adversary(params, params), params)


def test_a_first_precision_beside_a_prior_is_refused():
    q = posterior_of_ivon(np.ones(2, np.float32))
    for make in (blr.bsam, blr.vogn):
        with pytest.raises(ValueError, match="beside prior= give the first posterior"):
            make(0.1, ess=10.0, prior=q, init_precision=50.0)


def test_auxiliary_output_and_other_groups_beside_sam():
    """A partition of SAM and IVON: one pair of gradients serves both."""
    params = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    loss = lambda w: (jnp.sum(w["a"] ** 2 * w["b"]), w["a"])  # noqa: E731

    @jax.jit
    def step(params):
        tx = optax.partition(
            {"sam": blr.sam(0.1, rho=0.5), "ivon": blr.ivon(0.1, ess=1e6)},
            {"a": "sam", "b": "ivon"},
        )
        state = tx.init(params)
        est = blr.estimate(loss, state, params, has_aux=True)
        return est, tx.update(est.grad, state, params, statistic=est.statistic)[0]

    est, updates = jax.tree.map(np.asarray, step(params))
    moved = params["a"] + 0.5 * 2 * params["a"] / np.sqrt(8.0)
    np.testing.assert_allclose(est.grad["a"], 2 * moved, rtol=1e-2)
    np.testing.assert_allclose(est.grad["b"], moved**2, rtol=1e-2)
    np.testing.assert_allclose(est.aux, params["a"])
    assert all(np.all(u < 0) for u in updates.values())
