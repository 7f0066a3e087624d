"""SAM and bSAM against recorded trajectories of the official code, and against the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import flatten, follows, problem_loss, unflatten
from tools import load_golden

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
    factors = jnp.array([step["lrfactor"] for step in case["steps"]])
    rate = lambda count: hyper["learningrate"] * factors[count]  # noqa: E731
    if case["algorithm"] == "sgd":
        return optax.chain(
            optax.add_decayed_weights(hyper["wdecay"]), blr.sgd(rate, hyper["momentum"])
        )
    if case["algorithm"] == "sam":
        return blr.sam(
            rate, rho=hyper["rho"], momentum=hyper["momentum"], weight_decay=hyper["wdecay"]
        )
    size = hyper["Ndata"]
    return blr.bsam(
        rate,
        size,
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
    state = tx.init(params)

    @jax.jit
    def advance(params, state, noise, batch):
        # The file's sub-batches are rows; `split` deals the examples out one by one.
        found = {"samples": len(batch)} if noise is None else {"noise": noise}
        est = blr.estimate(loss, state, params, batch.T.reshape(-1), split=True, **found)
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        return optax.apply_updates(params, updates), state, est

    for step in case["steps"]:
        noise = unflatten(step["eps"], names, shapes) if "eps" in step else None
        params, state, est = advance(params, state, noise, jnp.array(step["batch"]))
        follows(flatten(est.grad, names), np.mean(step.get("grad_adv", step["grad"]), 0), 1e-9, "g")
        follows(flatten(params, names), step["w"], 1e-9, "weights")
        average = optax.tree.get(state, "trace" if case["algorithm"] != "bsam" else "ema")
        follows(flatten(average, names), step["gm"], 1e-9, "average")
        if "s" in step:
            total = jax.tree.map(lambda v: 1 / v, blr.posterior(state, params).variance)
            follows(flatten(total, names) / case["hyper"]["Ndata"], step["s"], 1e-9, "precision")


def test_bsam_without_adversary_is_the_rule(x64):
    """Precisions are `blr_update`'s to 1e-12; the mean is divided by the old one."""
    rho, prior = 0.1, 2.0
    slopes = jax.random.normal(jax.random.key(3), (20, 3))
    params = jnp.zeros(3)
    first = {"mean": params, "precision": jnp.full(3, 7.0)}
    tx = blr.bsam(
        rho, 1.0, rho=0.0, prior_precision=prior, init_precision=7.0, b1=0.0, b2=1 - rho, damping=0
    )
    rule = blr.blr_update(
        "gaussian_diagonal",
        lambda w, g: w @ g,
        rho,
        prior=blr.Posterior(DIAGONAL, DIAGONAL.natural(mean=params, precision=jnp.full(3, prior))),
        init=blr.Posterior(DIAGONAL, DIAGONAL.natural(**first)),
        estimator=blr.estimators.delta(blr.estimators.absolute_gradient()),
        step="plain",
    )
    state, state_rule = tx.init(params), rule.init(params)
    a = b = params
    for g in slopes:
        before, old = a, 1 / blr.posterior(state, a).variance
        est = blr.estimate(lambda w, g: w @ g, state, a, g)
        step, state = tx.update(est.grad, state, a, curvature=est.curvature)
        step_rule, state_rule = rule.update(None, state_rule, b, batch=(g,))
        a, b = a + step, b + step_rule
        new = 1 / blr.posterior(state, a).variance
        np.testing.assert_allclose(new, 1 / blr.posterior(state_rule, b).variance, rtol=1e-12)
        np.testing.assert_allclose(step, -rho * (g + prior * before) / old, rtol=1e-11)


def test_sam_without_radius_is_sgd_and_bsam_with_one_the_worst_point(x64):
    loss = lambda w: jnp.sum(jnp.sin(w) + 0.3 * w**4)  # noqa: E731
    params = jnp.array([0.3, -0.7])
    grad = jax.grad(loss)(params)
    sgd, sam = blr.sgd(0.1, 0.9), blr.sam(0.1, rho=0.0, momentum=0.9)
    est = blr.estimate(loss, sam.init(params), params)
    np.testing.assert_array_equal(est.grad, grad)
    np.testing.assert_array_equal(
        sam.update(est.grad, sam.init(params), params, curvature=est.curvature)[0],
        sgd.update(grad, sgd.init(params), params)[0],
    )
    # To first order no point of the ellipsoid |p^(1/2) x| <= r |p^(-1/2) g| is worse than r g / p.
    tx = blr.bsam(0.1, 10.0, rho=1e-3, init_precision=jnp.array([3.0, 30.0]), damping=0.0)
    state = tx.init(params)
    p = 1 / (10 * blr.posterior(state, params).variance)
    worst = state[0].rule.adversary(state[0], params, grad) - params
    radius = 1e-3 * jnp.linalg.norm(grad / jnp.sqrt(p))
    angles = jnp.linspace(0, 2 * jnp.pi, 1000)
    others = radius * jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1) / jnp.sqrt(p)
    np.testing.assert_allclose(jnp.linalg.norm(worst * jnp.sqrt(p)), radius, rtol=1e-9)
    assert loss(params + worst) > jnp.max(jax.vmap(loss)(params + others)) - 1e-9


def test_split_samples_see_their_own_examples(x64):
    """Equals the average of estimates over the sub-batches, for any row and with micro-batches."""
    loss = lambda w, x, c: c * jnp.mean(jnp.tanh(x @ w) ** 2)  # noqa: E731
    x, params = jax.random.normal(jax.random.key(0), (12, 3)), jnp.array([0.3, -0.7, 0.1])
    noise = jax.random.normal(jax.random.key(1), (3, 3))
    for tx in (blr.ivon(0.1, 20.0), blr.bsam(0.1, 20.0), blr.sam(0.1)):
        state, drawn = tx.init(params), {}
        if hasattr(state[0], "precision"):
            drawn = {"noise": noise}
        whole = blr.estimate(loss, state, params, x, 2.0, samples=3, split=True, **drawn)
        small = blr.estimate(
            loss, state, params, x, 2.0, samples=3, split=True, microbatch=2, **drawn
        )
        each = [
            blr.estimate(
                loss, state, params, x[i::3], 2.0, **({"noise": noise[i : i + 1]} if drawn else {})
            )
            for i in range(3)
        ]
        for name in ("value", "grad", "curvature"):
            mean = np.mean([getattr(e, name) for e in each], 0)
            np.testing.assert_allclose(getattr(whole, name), mean, rtol=1e-12)
        np.testing.assert_allclose(small.value, whole.value, rtol=1e-12)
    with pytest.raises(ValueError, match="samples=5 must divide the batch size 12"):
        blr.estimate(loss, state, params, x, 2.0, samples=5, split=True)


def test_one_gradient_is_refused():
    params = jnp.ones(2)
    for tx in (blr.sam(0.1), blr.bsam(0.1, 10.0)):
        with pytest.raises(ValueError, match="a step takes two gradients"):
            tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="rho=-1 must be a plain finite number, at least zero"):
        blr.sam(0.1, rho=-1)
    with pytest.raises(ValueError, match="bsam: give init= or init_precision="):
        q = blr.posterior(blr.ivon(0.1, 10.0).init(params), params)
        blr.bsam(0.1, 10.0, init=q, init_precision=2.0)
    with pytest.raises(ValueError, match="absolute_gradient"):
        blr.blr_update(
            "normal",
            jnp.sum,
            0.1,
            ess=2.0,
            estimator=blr.estimators.delta(blr.estimators.absolute_gradient()),
        )


@pytest.mark.parametrize("size", [1e-30, 1e-23, 1.0, 1e20, 1e30])
def test_the_radius_holds_for_gradients_of_any_size(size):
    params = jnp.zeros(2)
    state = blr.sam(0.1, rho=0.5).init(params)
    moved = state.rule.adversary(state, params, size * jnp.array([3.0, -4.0]))
    np.testing.assert_allclose(moved, [0.3, -0.4], rtol=1e-6)
    np.testing.assert_array_equal(state.rule.adversary(state, params, params), params)


def test_a_first_precision_beside_a_prior_is_refused():
    params = jnp.ones(2)
    q = blr.posterior(blr.ivon(0.1, 10.0).init(params), params)
    for make in (blr.bsam, blr.vogn):
        with pytest.raises(ValueError, match="beside prior= give the first posterior"):
            make(0.1, 10.0, prior=q, init_precision=50.0)


def test_auxiliary_output_and_other_groups_beside_sam():
    """A partition of SAM and IVON: one pair of gradients serves both."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.partition(
        {"sam": blr.sam(0.1, rho=0.5), "ivon": blr.ivon(0.1, 1e6)}, {"a": "sam", "b": "ivon"}
    )
    state = tx.init(params)
    loss = lambda w: (jnp.sum(w["a"] ** 2 * w["b"]), w["a"])  # noqa: E731
    est = blr.estimate(loss, state, params, has_aux=True)
    updates, _ = tx.update(est.grad, state, params, curvature=est.curvature)
    moved = params["a"] + 0.5 * 2 * params["a"] / np.sqrt(8.0)
    np.testing.assert_allclose(est.grad["a"], 2 * moved, rtol=1e-2)
    np.testing.assert_allclose(est.grad["b"], moved**2, rtol=1e-2)
    np.testing.assert_allclose(est.aux, params["a"])
    assert jax.tree.all(jax.tree.map(lambda u: bool(jnp.all(u < 0)), updates))
