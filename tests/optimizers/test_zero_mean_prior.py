"""A zero-mean prior in its two units, and as a distribution: one prior, whatever it is called."""

import jax
import numpy as np
import pytest
from registry import ROWS, make_batch, make_params, mean_loss
from tools import near

import blr_optax as blr

ESS, TOTAL = 20.0, 4.0
UNIT = blr.distribution("normal", mean=0.0, precision=TOTAL)
BOTH_UNITS = ["ivon", "soba", "evon", "lie_affine", "lie_multiplicative"]
NEWTON = {
    "online_newton": {},
    "variational_online_newton": {"estimator": blr.estimators.monte_carlo(1)},
    "kronecker_newton": {},
    "low_rank_newton": {"rank": 1},
    "mixture_newton": {"components": 2},
}


def after_two_steps(tx):
    step = blr.make_step(tx, mean_loss, donate=False)
    params = make_params()
    state, batch = jax.jit(tx.init)(params), make_batch()
    for _ in range(2):
        params, state, _ = step(params, state, *batch)
    return params


@pytest.mark.parametrize("name", BOTH_UNITS)
def test_the_total_precision_is_the_decay_of_all_examples(name):
    make, numbers = getattr(blr, name), {"learning_rate": 0.05, "ess": ESS}
    total = after_two_steps(make(**numbers, prior_precision=TOTAL))
    near(total, after_two_steps(make(**numbers, weight_decay=TOTAL / ESS)), rtol=1e-6)
    assert not np.allclose(total["w"], after_two_steps(make(**numbers, weight_decay=0.0))["w"])
    with pytest.raises(ValueError, match="one prior in two units"):
        make(**numbers, prior_precision=TOTAL, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"prior_precision=-1\.0"):
        make(**numbers, prior_precision=-1.0)


def test_a_schedule_of_ess_keeps_the_total_precision():
    """The decay per example follows the schedule; the prior does not."""
    tx = blr.ivon(0.1, ess=lambda count: ESS * (1.0 + count), prior_precision=TOTAL, hess_init=1.0)
    params = make_params()
    q = blr.posterior(tx.init(params), params)
    near(q.variance["w"], np.full((3, 2), 1.0 / (ESS + TOTAL)), rtol=1e-6)


@pytest.mark.parametrize("name", ["vadam", "vprop", "ivon"])
def test_a_number_as_distribution_is_the_same_prior(name):
    make, numbers = getattr(blr, name), {"learning_rate": 0.05, "ess": ESS}
    more = {"weight_decay": 0.0} if name == "ivon" else {}
    given = after_two_steps(make(**numbers, prior=UNIT, **more))
    if name == "ivon":  # which is rescaled by its weight decay, not by a prior
        numbers["rescale_lr"], more["rescale_lr"] = False, False
        given = after_two_steps(make(**numbers, prior=UNIT))
    near(given, after_two_steps(make(**numbers, prior_precision=TOTAL)), rtol=1e-5)


@pytest.mark.parametrize("name", list(NEWTON))
def test_newton_rows_take_a_number_for_every_parameter(name):
    def make(**prior):
        return getattr(blr, name)(mean_loss, 0.3, ess=ESS, **NEWTON[name], **prior)

    given = after_two_steps(make(prior=UNIT))
    near(given, after_two_steps(make(prior_precision=TOTAL)), rtol=1e-6)
    assert not np.allclose(given["w"], after_two_steps(make())["w"])
    with pytest.raises(ValueError, match="both a prior"):
        make(prior=UNIT, prior_precision=TOTAL)


def test_a_number_over_a_full_gaussian_is_ridge_regression(x64):
    """One step of Newton at a quadratic loss: (ess X'X / n + S_0)^-1 ess X'y / n."""
    x = np.sin(np.arange(15.0)).reshape(5, 3)
    y = np.cos(np.arange(5.0))
    tx = blr.newton(
        lambda w: 0.5 * jax.numpy.mean((x @ w - y) ** 2), ess=5.0, prior_precision=TOTAL
    )
    params = np.zeros(3)
    updates, _ = jax.jit(tx.update)(None, tx.init(jax.numpy.asarray(params)), params)
    near(updates, np.linalg.solve(x.T @ x + TOTAL * np.eye(3), x.T @ y), rtol=1e-10)


def test_no_row_takes_its_sample_size_or_momentum_by_position():
    """`sgd(1e-3, 1000)` would be a momentum of 1000, where `ivon(1e-3, 1000)` is a sample size."""
    for name in {row.name for row in ROWS} & set(blr.optimizers.__all__):
        if "newton" in name or name in ("dropout", "mixture_vi", "scale_by_precision"):
            continue  # which take the loss, or the inner optimizer, first
        with pytest.raises(TypeError, match="positional"):
            getattr(blr, name)(1e-3, 1000)
