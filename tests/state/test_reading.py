"""Posteriors that states carry, as values: each goes on in `blr_update`, or says why it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import ROWS, make_batch, make_params, mean_loss, rows
from tools import near

import blr_optax as blr

# Families that are read and joined; what learns them is their own optimizer.
READ_ONLY = {"Rotated", "UnitMixture", "LocationScale", "SignedScale"}


def learn(q, loss=mean_loss):
    """One step of the rule from q; the first and the last posterior, in one program."""
    tx = blr.blr_update(q.family, loss, 0.1, ess=20.0, init=q)

    @jax.jit
    def step(params, batch):
        state = tx.init(params)
        _, state = tx.update(None, state, params, batch=batch)
        return blr.posterior(state, params).natural, state.skipped

    return step(q.mean, make_batch())


@pytest.mark.parametrize("row", rows())
def test_a_posterior_goes_on_in_the_rule_or_says_why_not(row):
    params = row.params()
    q = jax.jit(lambda p: blr.posterior(row.tx().init(p), p))(params)
    name = type(q.family).__name__
    if name in READ_ONLY:
        with pytest.raises(ValueError, match=f"{name}.*its own optimizer"):
            learn(q)
        return
    natural, skipped = learn(q)
    assert int(skipped) == 0
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(natural), jax.tree.leaves(q.natural), strict=True)
    ]
    assert any(moved) and bool(blr.Distribution(q.family, natural).proper)


def partitioned(**groups):
    """The posterior of a partition: a group for every leaf of the registry's parameters."""
    tx = optax.partition(groups, {name: name for name in groups})
    return jax.jit(lambda p: blr.posterior(tx.init(p), p))(make_params())


def test_points_stay_where_they_are_while_the_rest_learns():
    q = partitioned(w=optax.sgd(0.1), b=blr.ivon(0.1, ess=20.0), c=blr.bayesbinn(0.1, ess=20.0))
    natural, skipped = learn(q)
    normals, signs, points = natural.parts
    assert int(skipped) == 0
    np.testing.assert_array_equal(points.value["w"], make_params()["w"])
    assert not np.array_equal(normals.linear["b"], q.natural.parts[0].linear["b"])
    assert not np.array_equal(signs[0]["c"], q.natural.parts[1][0]["c"])


def test_normals_beside_points_learn_as_normals_alone(x64):
    """One step of the rule with an exact loss: the points are constants of it."""
    hole = optax.MaskedNode()
    params = {**make_params(jnp.float64), "w": hole}
    normals = blr.families.get("gaussian_diagonal")
    beside = blr.families.SideBySide((normals, blr.families.MeanField(blr.families.Point())))

    def energy(mu):  # E_q[ sum (theta - 1)^2 ]
        return sum(jnp.sum(mu.quadratic[k] - 2.0 * mu.linear[k] + 1.0) for k in ("b", "c"))

    def step(family, lam, loss):
        gradient = blr.estimators.natural_gradient(family, loss, blr.estimators.closed_form())
        value, d = gradient(None, lam)
        return value, blr.natural_step(family, lam, d, 0.1, ess=5.0)

    @jax.jit
    def both(params, w):
        free = normals.natural(mean=params, precision=4.0)
        point = blr.families.PointNatural({"w": w, "b": hole, "c": hole})
        joint = step(beside, beside.natural(free, point), lambda mu: energy(mu.parts[0]))
        return joint, step(normals, free, energy), free

    w = make_params(jnp.float64)["w"]
    (value, new), (alone, wanted), free = both(params, w)
    near(value, alone, rtol=1e-12)
    near(new.parts[0], wanted, rtol=1e-12)
    assert not np.array_equal(wanted.linear["b"], free.linear["b"])
    np.testing.assert_array_equal(new.parts[1].value["w"], w)


def test_a_mixture_beside_normals_has_no_common_step():
    params = {"w": np.zeros(2, np.float32), "b": np.ones((2, 1), np.float32)}
    groups = {"w": blr.ivon(0.1, ess=9.0), "b": blr.mixture_ivon(0.1, ess=9.0)}
    tx = optax.partition(groups, {"w": "w", "b": "b"})
    q = jax.jit(lambda p: blr.posterior(tx.init(p), p))(params)
    with pytest.raises(ValueError, match=r"SideBySide.*its own optimizer"):
        learn(q, lambda theta: jnp.sum(theta["w"] ** 2))


def test_every_family_answers_the_questions_of_the_root():
    """No posterior that a row of the registry returns lacks a method of `Family`."""
    asked = [name for name in vars(blr.families.Family) if not name.startswith("_")]
    for row in ROWS:
        q = jax.eval_shape(lambda p, row=row: blr.posterior(row.tx().init(p), p), row.params())
        assert isinstance(q.family, blr.families.Family), row.name
        assert not [name for name in asked if not hasattr(q.family, name)], row.name
