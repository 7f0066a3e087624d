"""`blr_update` after any gradient: lambda stays a member, what happened is counted, and it goes on.

For every family and estimator: two ordinary steps, one whose loss is scaled by an absurd number,
then ordinary ones. The loss is bounded, so that an ordinary gradient is one wherever q may be.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_rows import CONDITIONAL, ROWS, rows
from family_tools import member, stacked

import blr_optax as blr
from blr_optax import estimators, families

ABSURD = np.array(
    [s * 10.0**k for k in (5, 10, 15, 20, 25, 30, 37) for s in (1, -1)] + [np.inf, np.nan],
    np.float32,
)


def numbers(theta):
    return jnp.concatenate([jnp.ravel(jnp.asarray(x, float)) for x in jax.tree.leaves(theta)])


def bounded(theta, scale):
    """A loss in (-scale, scale), of theta or of mu."""
    x = numbers(theta)
    return scale * jnp.mean(x / (1.0 + jnp.abs(x)))


def survives(q, estimator, prior):
    """Run all sequences at once; return what held before, at and after the absurd step."""
    tx = blr.blr_update(q.family, bounded, 0.3, ess=5.0, init=q, prior=prior, estimator=estimator)
    start = jax.tree.map(lambda x: jnp.asarray(x, float), q.mean)

    def one(scale):
        def step(carry, scale):
            params, state = carry
            updates, new = tx.update(None, state, params, batch=(scale,))
            params = optax.apply_updates(params, updates)
            lam, family = new.natural, new.reader.family
            mean = numbers(family.mean(lam))
            fine = (
                jnp.all(jnp.isfinite(numbers(lam))),
                jnp.all(family.in_domain(lam)),
                jnp.all(jnp.isfinite(mean)) | ~jnp.all(family.has_mean(lam)),
                jnp.all(jnp.isfinite(numbers(params))),
            )
            moved = jnp.any(numbers(lam) != numbers(state.natural))
            return (params, new), (jnp.array(fine), moved, new.skipped)

        scales = jnp.concatenate([jnp.ones(2), scale[None], jnp.ones(4)])
        return jax.lax.scan(step, (start, tx.init(start)), scales)[1]

    return [np.asarray(x) for x in jax.jit(jax.vmap(one))(jnp.asarray(ABSURD))]


def check(q, estimator, prior=None):
    fine, moved, skipped = survives(q, estimator, prior)
    assert fine.all(), [(ABSURD[i], step, what) for i, step, what in np.argwhere(~fine)]
    assert moved[:, :2].all() and (skipped[:, 1] == 0).all()
    # A step is taken or counted, and the next ordinary gradient is no fault.
    assert (moved[:, 2] | (skipped[:, 2] > 0)).all()
    assert (skipped[-2:, 2] == 1).all() and not moved[-2:, 2].any()  # infinite, not a number
    assert moved[:, 3].all(), ABSURD[~moved[:, 3]]
    assert (skipped[:, -1] == skipped[:, 2]).all()


def first_of(row):
    lam = jax.tree.map(lambda x: np.asarray(x, np.float32), member(stacked(row), 0))
    return blr.Distribution(row.family, lam)


def estimators_of(name, row):
    """Which estimators a row takes: all kinds for the first of a kind."""
    family = row.family
    found = ["closed_form", "score_function", "least_squares"]
    found += ["pathwise"] * family.reparameterized + ["concrete"] * family.relaxable
    if getattr(family, "curvature", None) is not None:
        found += ["monte_carlo", "delta"]
    return found


MADE = {
    "closed_form": estimators.closed_form(),
    "score_function": estimators.score_function(20),
    "least_squares": estimators.least_squares(20),
    "pathwise": estimators.pathwise(2),
    "concrete": estimators.concrete(0.5, 2),
    "monte_carlo": estimators.monte_carlo(2),
    "delta": estimators.delta(),
}


@pytest.mark.parametrize(("row", "estimator"), rows(variants=estimators_of))
def test_any_gradient_leaves_a_member_that_goes_on(row, estimator):
    q = first_of(row)
    check(q, MADE[estimator], q)


def conditional_member(name):
    z, eye = np.zeros(2, np.float32), np.eye(2, dtype=np.float32)
    return {
        "skew_gaussian": {"mean": z, "skew": z + 0.1, "precision": eye},
        "student_t": {"mean": z, "degrees": 5.0, "scale": eye},
        "gaussian_low_rank": {"mean": z, "diagonal": z + 1, "factor": np.full((2, 1), 0.1)},
        "mixture": {
            "weights": np.ones(2) / 2,
            "mean": np.array([[-1.0, 0.0], [1.0, 0.5]]),
            "precision": np.stack([eye, eye]),
        },
        "matrix_gaussian": {
            "mean": np.zeros((2, 3)),
            "row_precision": eye,
            "column_precision": np.eye(3),
        },
    }[name]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "mixture" else pytest.mark.slow) for n in CONDITIONAL]
)
@pytest.mark.parametrize(
    "curvature", ["exact", pytest.param("reparameterized", marks=pytest.mark.slow)]
)
def test_any_gradient_leaves_a_conditional_member_that_goes_on(name, curvature):
    family = families.get(name)
    q = blr.Distribution(family, family.natural(**conditional_member(name)))
    prior = blr.distribution("normal", mean=0.0, precision=1.0)
    check(q, estimators.monte_carlo(2, curvature=curvature), prior)


# --- members that are independent do not hold each other ------------------------------------------


def linear(mu, slope):
    """E_q[loss] of a mean field, one slope for every number."""
    return jnp.sum(slope * mu.linear)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -3e38, 1e30])
def test_one_number_of_a_mean_field_stays_alone(bad):
    prior = blr.distribution("normal", mean=0.0, precision=1.0)
    tx = blr.blr_update(
        "normal", linear, 0.5, ess=4.0, prior=prior, estimator=estimators.closed_form()
    )
    params = jnp.zeros(3)
    updates, state = jax.jit(lambda s, p, g: tx.update(None, s, p, batch=(g,)))(
        tx.init(params), params, jnp.array([1.0, bad, -2.0])
    )
    # S m <- (S m)/2 - (4/2) slope
    np.testing.assert_allclose(updates, [-2.0, 0.0, 4.0], rtol=1e-6)
    assert state.skipped == 1


def test_one_factor_of_a_product_stays_alone():
    family = families.Product({"a": "normal", "b": "gamma"})
    prior = blr.Distribution(
        family,
        family.natural(a={"mean": 0.0, "precision": 1.0}, b={"concentration": 2.0, "rate": 1.0}),
    )
    loss = lambda mu, s: s * mu.parts["a"].linear + mu.parts["b"].linear  # noqa: E731
    tx = blr.blr_update(family, loss, 0.5, prior=prior, estimator=estimators.closed_form())
    params = jax.tree.map(jnp.asarray, prior.mean)
    updates, state = jax.jit(lambda s, p: tx.update(None, s, p, batch=(jnp.nan,)))(
        tx.init(params), params
    )
    assert updates["a"] == 0.0 and state.skipped == 1
    np.testing.assert_allclose(updates["b"], 2.0 / 1.5 - 2.0, rtol=1e-6)


def test_one_leaf_of_a_tree_of_matrices_stays_alone():
    tx = blr.blr_update(
        "matrix_gaussian",
        lambda p, c: jnp.sum(p["w"] ** 2) + c * jnp.sum(p["b"]),
        0.3,
        estimator=estimators.monte_carlo(2),
    )
    params = {"b": jnp.ones(2), "w": jnp.ones((2, 3))}
    updates, state = jax.jit(lambda s, p: tx.update(None, s, p, batch=(jnp.nan,)))(
        tx.init(params), params
    )
    assert state.skipped == 1 and not updates["b"].any() and (updates["w"] != 0.0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.natural))


# --- a mean that does not exist -------------------------------------------------------------------

SPREAD = np.random.default_rng(0).normal(size=50) * 2.0


def variance_energy(mu, y):
    """-E log N(y | 0, v) under an inverse gamma."""
    return 0.5 * jnp.sum(mu.log + y * y * mu.reciprocal)


def joint_energy(mu, y):
    """-E log N(y | x, v) under a normal-inverse-gamma."""
    return 0.5 * jnp.sum(mu.log + y * y * mu.reciprocal - 2.0 * y * mu.linear + mu.quadratic)


def matrix_energy(mu, y):
    """-E log N(y | 0, V) under an inverse Wishart of size one."""
    return 0.5 * jnp.sum(mu.log_det + y * y * mu.inverse[0, 0])


def vague(name):
    """A vague prior without a mean, its energy, a first params, and the exact posterior mean."""
    n, total, square = len(SPREAD), SPREAD.sum(), np.sum(SPREAD**2)
    if name == "inverse_gamma":
        prior = blr.distribution(name, concentration=0.01, scale=0.01)
        return prior, variance_energy, jnp.ones(()), (0.01 + 0.5 * square) / (0.01 + n / 2 - 1)
    if name == "inverse_wishart":
        prior = blr.distribution(name, scale=np.full((1, 1), 0.02), degrees=0.02)
        return prior, matrix_energy, jnp.ones((1, 1)), (0.02 + square) / (0.02 + n - 2)
    prior = blr.distribution(name, mean=0.0, kappa=0.01, concentration=0.01, scale=0.01)
    scale = 0.01 + 0.5 * (square - total**2 / (0.01 + n))
    mean = total / (0.01 + n), scale / (0.01 + n / 2 - 1)
    return prior, joint_energy, jax.tree.map(jnp.ones_like, prior.mean), mean


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        ("inverse_gamma", "none"),
        ("inverse_gamma", "multi_steps"),
        ("inverse_gamma", "apply_if_finite"),
        ("inverse_wishart", "none"),
        ("normal_inverse_gamma", "none"),
    ],
)
def test_params_wait_where_the_mean_is_infinite_and_follow_it_afterwards(name, wrapper):
    prior, energy, params, exact = vague(name)
    tx = blr.blr_update(name, energy, 0.5, prior=prior, estimator=estimators.closed_form())
    if wrapper == "multi_steps":
        tx = optax.MultiSteps(tx, 2)
    if wrapper == "apply_if_finite":
        tx = optax.apply_if_finite(tx, 3)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def learn(params):
        def step(carry, y):
            params, state = carry
            updates, state = tx.update(zeros, state, params, batch=(y,))
            params = optax.apply_updates(params, updates)
            return (params, state), params

        # At first there are no data, and nothing to say about the mean.
        y = jnp.concatenate([jnp.zeros((4, len(SPREAD))), jnp.tile(jnp.asarray(SPREAD), (80, 1))])
        return jax.lax.scan(step, (params, tx.init(params)), y)

    (params, _), path = learn(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(path))
    np.testing.assert_allclose(numbers(params), np.ravel(exact), rtol=2e-3)


def test_params_stay_while_the_posterior_has_no_mean():
    prior = blr.distribution("inverse_gamma", concentration=0.5, scale=1.0)
    tx = blr.blr_update(
        "inverse_gamma",
        lambda mu: 0.1 * mu.reciprocal,
        0.5,
        prior=prior,
        estimator=estimators.closed_form(),
    )
    params = jnp.asarray(3.0)
    updates, state = jax.jit(tx.update)(None, tx.init(params), params)
    assert updates == 0.0 and state.skipped == 0
    np.testing.assert_allclose(-state.natural.reciprocal, 1.05, rtol=1e-6)


def test_params_that_are_not_finite_are_refused_with_what_to_write():
    prior = blr.distribution("inverse_gamma", concentration=0.5, scale=1.0)
    tx = blr.blr_update("inverse_gamma", variance_energy, 0.5, prior=prior)
    with pytest.raises(ValueError, match=r"params=inf.*infinite mean.*any finite"):
        tx.init(prior.mean)


def test_rows_without_a_mean_say_so():
    """By scipy: the mean of an inverse gamma is infinite up to concentration one."""
    family = ROWS["inverse_gamma"].family
    lam = family.natural(concentration=np.array([0.5, 1.0, 1.5]), scale=np.ones(3))
    np.testing.assert_array_equal(family.has_mean(lam), [False, False, True])
    q = blr.distribution("normal", mean=np.zeros(3), precision=1.0)
    assert q.family.has_mean(q.natural).all()


def test_accumulated_gradients_recover_from_one_that_is_not_finite():
    """What docs/composition.md tells: the accumulator of `MultiSteps` keeps it for ever else."""
    tx = optax.MultiSteps(blr.ivon(0.1, ess=10.0), 2, should_skip_update_fn=optax.skip_not_finite)
    start = jnp.ones(2)

    @jax.jit
    def run(values):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(jnp.full(2, g), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (start, tx.init(start)), values)[1]

    with_nan = run(jnp.array([1.0, jnp.nan, 1.0, 1.0, 1.0]))
    without = run(jnp.ones(4))
    np.testing.assert_allclose(with_nan[-1], without[-1], rtol=1e-3)
    assert (with_nan[-1] < 0.85).all()
