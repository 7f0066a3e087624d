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

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import flatten, follow, recorded, start_of, unflatten
from test_golden_vogn import SSO, average, data_loss, given, start, step_of, total_precision
from tools import built_inside, load_golden, run_steps

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
        ess=n / t,
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
    names, tx = problem["leaf_names"], log_std_transformation(hyper)

    def step(carry, given):
        (params, state), (noise, x, y) = carry, given
        est = blr.estimate(data_loss(problem), state, params, x, y, noise=noise)
        updates, after = tx.update(est.grad, state, params, statistic=est.statistic)
        ratio = jax.tree.map(lambda new, old: new / old, precision_of(after), precision_of(state))
        canonical = optax.apply_updates(params, updates)
        params = optax.apply_updates(params, jax.tree.map(lambda u, r: u * r, updates, ratio))
        return (params, after), {
            "estimate": est,
            "ratio": ratio,
            "canonical": canonical,
            "mean": params,
            "momentum": optax.tree.get(after, "ema"),
            "precision": total_precision(after, params),
        }

    _, seen = run_steps(step, start_of(tx, start(problem, case)), given(problem, case))
    # The factor is the one that the official code has inside its logarithm.
    rho, n = 1 - hyper["momentum_hess"], hyper["data_size"]
    log_std = recorded(case, "log_std")
    old = np.vstack([np.full(log_std.shape[1], -np.log(1 / hyper["std_init"])), log_std[:-1]])
    target = np.array(average(case, "gsq")) + hyper["prior_precision"] / n + hyper["dampening"]
    inside = 1 + rho * (target * np.exp(2 * old) - hyper["temperature"])
    follow(flatten(seen["ratio"], names), inside, 1e-9, "p_new / p_old")
    gap = np.abs(flatten(seen["canonical"], names) - recorded(case, "mean"))
    assert np.all(np.max(gap, axis=1) > 1e-6)
    est = seen["estimate"]
    for found, wanted, what in (
        (est.grad, average(case, "grad"), "gradient"),
        (est.statistic, average(case, "gsq"), "squares"),
        (seen["mean"], recorded(case, "mean"), "mean"),
        (seen["momentum"], recorded(case, "momentum"), "momentum"),
        (seen["precision"], n * np.exp(-2 * log_std), "precision"),
    ):
        follow(flatten(found, names), wanted, 1e-9, what)


def test_the_old_precision_is_the_new_one_to_first_order(x64):
    """Ten times smaller 1 - b2: a ten times smaller difference of the first steps."""
    problem, case = LOG_STD["problem"], LOG_STD["cases"][0]
    params = start(problem, case)
    noise, x, y = jax.tree.map(lambda a: a[0], given(problem, case))

    @jax.jit
    def difference(params, rho):
        tx = log_std_transformation({**case["hyper"], "momentum_hess": 1 - rho})
        state = tx.init(params)
        est = blr.estimate(data_loss(problem), state, params, x, y, noise=noise)
        updates, after = tx.update(est.grad, state, params, statistic=est.statistic)
        official = jax.tree.map(
            lambda u, new, old: u * new / old, updates, precision_of(after), precision_of(state)
        )
        gap = optax.tree.norm(optax.tree.sub(official, updates))
        return gap / optax.tree.norm(updates)

    first, second, third = (float(difference(params, rho)) for rho in (1e-2, 1e-3, 1e-4))
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


@functools.cache
def kl_weights():
    """k of every step of the record and of the one after it."""
    return np.asarray(jax.jit(jax.vmap(kl_weight))(np.arange(len(WARM["steps"]) + 1.0)))


def warm_decay(weight):
    return weight / (WARM["hyper"]["dataset_size"] * WARM["hyper"]["prior_variance"])


def warm_start():
    """`vogn` with the warm-up as an ess schedule, begun at the first batch's own squares."""
    problem, hyper = load_golden("vogn_dlwithbayes_mlp")["problem"], WARM["hyper"]
    n, damping = hyper["dataset_size"], hyper["curv"]["damping"]
    prior, ess = 1 / hyper["prior_variance"], n / float(kl_weights()[0])
    squares = average(WARM, "gsq")[0]
    first = unflatten(
        prior + ess * (squares + damping), problem["leaf_names"], problem["leaf_shapes"]
    )
    tx = built_inside(
        lambda: blr.vogn(
            hyper["lr"],
            ess=lambda count: n / kl_weight(count),
            prior_precision=prior,
            init_precision=first,
            b1=1 - hyper["grad_ema_decay"],
            b2=1 - hyper["curv"]["ema_decay"],
            damping=damping,
        )
    )
    return problem, tx, start_of(tx, start(problem, WARM))


def test_kl_warm_up(x64):
    """Every step, with the posterior's prior left where the step's average has put it."""
    problem, tx, begin = warm_start()
    names, b2 = problem["leaf_names"], 1 - WARM["hyper"]["curv"]["ema_decay"]
    damping = WARM["hyper"]["curv"]["damping"]
    assert WARM["hyper"]["bias_correction"]
    assert WARM["hyper"]["grad_ema_decay"] == WARM["hyper"]["curv"]["ema_decay"]  # quotient 1
    decay = warm_decay(kl_weights())
    np.testing.assert_allclose(decay[:-1], recorded(WARM, "l2_reg"), rtol=1e-12)
    step = step_of(tx, data_loss(problem))

    def lagging(carry, given):
        # The canonical precision has the coming step's prior; the official one lags behind.
        *given, moved = given
        (params, state), _ = step(carry, given)
        precision = jax.tree.map(lambda p: p - moved, precision_of(state))
        seen = params, optax.tree.get(state, "ema"), precision
        return (params, with_precision(state, precision)), seen

    given_and_moved = (*given(problem, WARM), np.diff(decay))
    _, (mean, average_, precision) = run_steps(lagging, begin, given_and_moved)
    follow(flatten(mean, names), recorded(WARM, "mean"), 1e-9, "mean")
    follow(flatten(average_, names), recorded(WARM, "grad_ema"), 1e-9, "average")
    std = recorded(WARM, "std")
    follow(flatten(precision, names), 1 / np.square(std), 1e-9, "precision")
    lag = decay[0]
    for t, split in enumerate(np.square(std) ** -1 - recorded(WARM, "ema") - damping):
        lag = b2 * lag + (1 - b2) * decay[t]
        np.testing.assert_allclose(split, lag, rtol=1e-9, err_msg=f"step {t}")


def test_without_the_lag_the_prior_of_the_posterior_is_the_one_in_force(x64):
    """`vogn` as it is: p - d - gamma is the average of squares alone, at every step."""
    problem, tx, begin = warm_start()
    hyper, names = WARM["hyper"], problem["leaf_names"]
    b2, damping = 1 - hyper["curv"]["ema_decay"], hyper["curv"]["damping"]
    _, (est, mean, precision) = run_steps(
        step_of(tx, data_loss(problem)), begin, given(problem, WARM)
    )
    squares, n, totals = average(WARM, "gsq")[0], hyper["dataset_size"], []
    for weight, curvature in zip(kl_weights()[1:], flatten(est.statistic, names), strict=True):
        squares = b2 * squares + (1 - b2) * curvature
        totals.append(n / weight * (squares + damping) + 1 / hyper["prior_variance"])
    follow(flatten(precision, names), totals, 1e-9, "precision")
    gap = np.max(np.abs(flatten(mean, names) - recorded(WARM, "mean")), axis=1)
    # The first step knows no lag; then the official noise is wider, and the steps are longer.
    assert gap[0] < 1e-12
    assert np.all(gap[1:] > 1e-4)


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
