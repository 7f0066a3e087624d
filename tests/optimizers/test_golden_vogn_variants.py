"""VOGN of two other official codes: replayed to 1e-9 as `vogn` plus the one term that differs.

    log-std form (IVON-experiments)                          `vogn`
    ls    <-  ls - log( 1 + (1 - b2) F ) / 2                 the same, p = exp(-2 ls)
    F      =  (q + d + gamma) / p - T                        N / T, p0 / T, both rates times T
    m     <-  m - lr v / p_old                               p_new
                                                             gap: the factor 1 + (1 - b2) F alone
    KL warm-up (pytorch-sso)
    d_t    =  k_t / (N prior_variance),  k_t grows           ess schedule N / k_t
    p     <-  b2 p + (1 - b2)(q + d_t + gamma)               p then moves on to d_(t+1) at once
    step 1:  no noise, curvature starts at the first q       `init_precision` and noise 0
    step  *=  (1 - b2^t) / (1 - b1^t)                        1 in the record, as b1 = b2

with q the mean of squared per-example gradients. `test_golden_vogn.py` has the cases that
`vogn` and its parts reproduce as they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import flatten, follows, unflatten
from test_golden_vogn import SSO, data_loss, rows_of, start, total_precision
from tools import load_golden

import blr_optax as blr

LOG_STD = load_golden("vogn_ivonexp_mlp")


def precision_of(state):
    return optax.tree.get(state, "precision")


def with_precision(state, precision):
    return optax.tree.set(state, precision=precision)


# --- the log-std form -----------------------------------------------------------------------------


def log_std_transformation(hyper):
    """A temperature on the entropy alone is `vogn` at ess N / T, prior p0 / T and rates times T."""
    t, n = hyper["temperature"], hyper["data_size"]
    return blr.vogn(
        t * hyper["lr"],
        n / t,
        prior_precision=hyper["prior_precision"] / t,
        init_precision=n / hyper["std_init"] ** 2,
        b1=hyper["momentum_grad"],
        b2=1 - t * (1 - hyper["momentum_hess"]),
        damping=hyper["dampening"],
    )


@pytest.mark.parametrize("case", LOG_STD["cases"], ids=lambda case: case["name"])
def test_log_std_form(x64, case):
    """Every step, with the mean's step multiplied by p_new / p_old, which is all that differs."""
    problem, hyper = LOG_STD["problem"], case["hyper"]
    names, shapes = problem["leaf_names"], problem["leaf_shapes"]
    tx, params = log_std_transformation(hyper), start(problem, case)
    state, rho = tx.init(params), 1 - hyper["momentum_hess"]
    d = hyper["prior_precision"] / hyper["data_size"]

    @jax.jit
    def advance(params, state, noise, x, y):
        est = blr.estimate(data_loss(problem), state, params, x, y, noise=noise)
        updates, after = tx.update(est.grad, state, params, curvature=est.curvature)
        ratio = jax.tree.map(lambda new, old: new / old, precision_of(after), precision_of(state))
        return est, updates, ratio, after

    old = np.full(len(case["init_mean"]), -np.log(1 / hyper["std_init"]))
    for step in case["steps"]:
        noise = unflatten(step["eps"], names, shapes)
        est, updates, ratio, state = advance(params, state, noise, *rows_of(problem, step))
        # The factor is the one that the official code has inside its logarithm.
        target = np.mean(step["gsq"], 0) + d + hyper["dampening"]
        inside = 1 + rho * (target * np.exp(2 * old) - hyper["temperature"])
        follows(flatten(ratio, names), inside, 1e-9, "p_new / p_old")
        canonical = optax.apply_updates(params, updates)
        official = jax.tree.map(lambda u, r: u * r, updates, ratio)
        assert np.max(np.abs(flatten(canonical, names) - step["mean"])) > 1e-6
        params = optax.apply_updates(params, official)
        follows(flatten(est.grad, names), np.mean(step["grad"], 0), 1e-9, "gradient")
        follows(flatten(est.curvature, names), np.mean(step["gsq"], 0), 1e-9, "squares")
        follows(flatten(params, names), step["mean"], 1e-9, "mean")
        follows(flatten(optax.tree.get(state, "ema"), names), step["momentum"], 1e-9, "momentum")
        total = hyper["data_size"] * np.exp(-2 * np.asarray(step["log_std"]))
        follows(flatten(total_precision(state, params), names), total, 1e-9, "precision")
        old = np.asarray(step["log_std"])


def test_the_old_precision_is_the_new_one_to_first_order(x64):
    """Ten times smaller 1 - b2: a ten times smaller difference of the first steps."""
    problem, case = LOG_STD["problem"], LOG_STD["cases"][0]
    params, step = start(problem, case), case["steps"][0]
    noise = unflatten(step["eps"], problem["leaf_names"], problem["leaf_shapes"])

    def difference(rho):
        tx = log_std_transformation({**case["hyper"], "momentum_hess": 1 - rho})
        state = tx.init(params)
        batch = rows_of(problem, step)
        est = blr.estimate(data_loss(problem), state, params, *batch, noise=noise)
        updates, after = tx.update(est.grad, state, params, curvature=est.curvature)
        official = jax.tree.map(
            lambda u, new, old: u * new / old, updates, precision_of(after), precision_of(state)
        )
        gap = optax.tree.norm(optax.tree.sub(official, updates))
        return gap / optax.tree.norm(updates)

    first, second, third = difference(1e-2), difference(1e-3), difference(1e-4)
    assert 1e-3 < first < 1e-2  # F is near -1 where the curvature is small
    np.testing.assert_allclose(first / second, 10.0, rtol=0.02)
    np.testing.assert_allclose(second / third, 10.0, rtol=0.002)


# --- the KL warm-up -------------------------------------------------------------------------------

WARM = SSO["kl_warmup_bias_correction"]


def kl_weight(step):
    """k of step 1, 2, ...: linear from its first value to its last."""
    hyper = WARM["hyper"]
    ramp = jnp.minimum(jnp.asarray(step, float) / hyper["warmup_kl_weighting_steps"], 1.0)
    first, last = hyper["warmup_kl_weighting_init"], hyper["kl_weighting"]
    return first + (last - first) * ramp


def warm_decay(step):
    return kl_weight(step) / (WARM["hyper"]["dataset_size"] * WARM["hyper"]["prior_variance"])


def warm_start():
    """`vogn` with the warm-up as an ess schedule, begun at the first batch's own squares."""
    problem, hyper = load_golden("vogn_dlwithbayes_mlp")["problem"], WARM["hyper"]
    n, damping = hyper["dataset_size"], hyper["curv"]["damping"]
    prior, ess = 1 / hyper["prior_variance"], n / float(kl_weight(0))
    squares = np.mean(WARM["steps"][0]["gsq"], 0)
    first = unflatten(prior + ess * (squares + damping), *_leaves(problem))
    tx = blr.vogn(
        hyper["lr"],
        lambda count: n / kl_weight(count),
        prior_precision=prior,
        init_precision=first,
        b1=1 - hyper["grad_ema_decay"],
        b2=1 - hyper["curv"]["ema_decay"],
        damping=damping,
    )
    params = start(problem, WARM)
    return problem, tx, params, tx.init(params)


def _leaves(problem):
    return problem["leaf_names"], problem["leaf_shapes"]


def noise_of(step, problem):
    """The recorded draws; none in the first step, where the official code has no scale yet."""
    eps = step["eps"] or np.zeros((1, len(step["mean"])))
    return unflatten(eps, *_leaves(problem))


def test_kl_warm_up(x64):
    """Every step, with the posterior's prior left where the step's average has put it."""
    problem, tx, params, state = warm_start()
    names, b2 = problem["leaf_names"], 1 - WARM["hyper"]["curv"]["ema_decay"]
    damping = WARM["hyper"]["curv"]["damping"]
    assert WARM["hyper"]["bias_correction"]
    assert WARM["hyper"]["grad_ema_decay"] == WARM["hyper"]["curv"]["ema_decay"]  # quotient 1
    lagging = warm_decay(0)
    for t, step in enumerate(WARM["steps"]):
        np.testing.assert_allclose(warm_decay(t), step["l2_reg"], rtol=1e-12)
        est = blr.estimate(
            data_loss(problem),
            state,
            params,
            *rows_of(problem, step),
            noise=noise_of(step, problem),
        )
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        params = optax.apply_updates(params, updates)
        follows(flatten(params, names), step["mean"], 1e-9, "mean")
        follows(flatten(optax.tree.get(state, "ema"), names), step["grad_ema"], 1e-9, "average")
        # The canonical precision has the coming step's prior; the official one lags behind.
        moved = warm_decay(t + 1) - warm_decay(t)
        precision = jax.tree.map(lambda p, moved=moved: p - moved, precision_of(state))
        follows(flatten(precision, names), 1 / np.square(step["std"]), 1e-9, "precision")
        state = with_precision(state, precision)
        lagging = b2 * lagging + (1 - b2) * warm_decay(t)
        split = np.square(step["std"]) ** -1 - np.asarray(step["ema"]) - damping
        np.testing.assert_allclose(split, lagging, rtol=1e-9)


def test_without_the_lag_the_prior_of_the_posterior_is_the_one_in_force(x64):
    """`vogn` as it is: p - d - gamma is the average of squares alone, at every step."""
    problem, tx, params, state = warm_start()
    hyper, names = WARM["hyper"], problem["leaf_names"]
    b2, damping = 1 - hyper["curv"]["ema_decay"], hyper["curv"]["damping"]
    squares, n = np.mean(WARM["steps"][0]["gsq"], 0), hyper["dataset_size"]
    for t, step in enumerate(WARM["steps"]):
        est = blr.estimate(
            data_loss(problem),
            state,
            params,
            *rows_of(problem, step),
            noise=noise_of(step, problem),
        )
        updates, state = tx.update(est.grad, state, params, curvature=est.curvature)
        params = optax.apply_updates(params, updates)
        squares = b2 * squares + (1 - b2) * flatten(est.curvature, names)
        total = n / kl_weight(t + 1) * (squares + damping) + 1 / hyper["prior_variance"]
        follows(flatten(total_precision(state, params), names), total, 1e-9, "precision")
        gap = np.max(np.abs(flatten(params, names) - step["mean"]))
        # The first step knows no lag; then the official noise is wider, and the steps are longer.
        assert gap < 1e-12 if t == 0 else gap > 1e-4


# --- a first precision without its prior ----------------------------------------------------------


@pytest.mark.parametrize("name", ["grad_ema_init_precision", "heavy_ball_raw"])
def test_a_first_average_of_the_prior_at_zero_is_a_matter_of_bookkeeping(name):
    """The averages' sum is `vogn`'s precision; their split is d (1 - b2^t), where ours has d."""
    hyper, curv = SSO[name]["hyper"], SSO[name]["hyper"]["curv"]
    d, b2 = 1 / (hyper["dataset_size"] * hyper["prior_variance"]), 1 - curv["ema_decay"]
    squares = np.full(len(SSO[name]["init_mean"]), hyper["init_precision"])
    ours = squares - d  # what `vogn` calls the curvature: the prior is in the first precision
    for t, step in enumerate(SSO[name]["steps"], 1):
        new = np.mean(step["gsq"], 0)
        squares, ours = (b2 * s + (1 - b2) * new for s in (squares, ours))
        np.testing.assert_allclose(step["ema"], squares, rtol=1e-9)
        total = np.square(step["std"]) ** -1
        np.testing.assert_allclose(total, squares + curv["damping"] + d * (1 - b2**t), rtol=1e-9)
        np.testing.assert_allclose(total, ours + curv["damping"] + d, rtol=1e-9)
