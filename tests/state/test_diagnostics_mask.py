"""`diagnostics` under a weight decay of some leaves: its fields are those of the step made.

What numpy makes of the curvature that the step was given is the truth.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr
from blr_optax.rule import EmpiricalPrior

P = {"w": np.array([[3.0, 2.0, 1.5]]), "b": np.array([1.5, 3.0])}
C = {"w": np.array([[9.0, 0.1, 0.4]]), "b": np.array([0.7, -0.2])}
RHO, DECAY = 0.3, 0.8


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


MASKS = {
    "none": (None, {"w": 1.0, "b": 1.0}),
    "tree": ({"w": True, "b": False}, {"w": 1.0, "b": 0.0}),
    "function": (matrices, {"w": 1.0, "b": 0.0}),
    "nothing": (False, {"w": 0.0, "b": 0.0}),
    "the other": ({"w": False, "b": True}, {"w": 0.0, "b": 1.0}),
}


def flat(tree):
    return np.concatenate([np.ravel(tree[k]) for k in sorted(tree)])


def diagnosed(make, params, statistic, **given):
    @jax.jit
    def found(params, statistic):
        tx = make()
        before = tx.init(params)
        updates, after = tx.update(params, before, params, statistic=statistic)
        return blr.diagnostics(before, after, params, updates, statistic=statistic, **given)[0]

    return found(params, statistic)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("decay", [DECAY, lambda t: DECAY / (1.0 + t)], ids=["number", "schedule"])
def test_the_fields_are_those_of_the_masked_step(x64, name, decay):
    mask, kept = MASKS[name]
    options = {"weight_decay": decay, "mask": mask}
    d = flat({k: DECAY * kept[k] * np.ones_like(P[k]) for k in P})
    p, c = flat(P), flat(C)
    hess = {k: P[k] - DECAY * kept[k] for k in P}  # so that the first precision is P
    found = diagnosed(
        lambda: blr.ivon(0.1, ess=10.0, b2=1 - RHO, hess_init=hess, **options),
        P, C, b2=1 - RHO, **options,
    )  # fmt: skip
    u = RHO * (c + d - p) / p
    second = np.sum(p * u**2) / 2
    close = {"rtol": 1e-9}
    np.testing.assert_allclose(found.statistic_over_precision, np.sum(c + d) / p.sum(), **close)
    ratio = c / p
    np.testing.assert_allclose(
        found.statistic_score, ratio.sum() / np.sqrt(np.sum(ratio**2)), **close
    )
    np.testing.assert_allclose(found.correction_of_precision, second / RHO / p.sum(), **close)
    np.testing.assert_allclose(
        found.correction_of_move, second / (second + np.sum(p * np.abs(u))), **close
    )


@pytest.mark.slow
def test_a_group_of_a_partition_has_its_mask(x64):
    mask = {"w": True, "b": False}
    options = {"weight_decay": DECAY, "mask": mask}
    rule = blr.soba(0.1, ess=10.0, b2=1 - RHO, hess_init=1.0, weight_decay=DECAY, mask=matrices)
    tx = optax.partition({"a": rule, "z": optax.sgd(0.1)}, {"w": "a", "b": "a", "x": "z"})
    params, statistic = {**P, "x": np.ones(2)}, {**C, "x": np.zeros(2)}
    found = diagnosed(lambda: tx, params, statistic, b2=1 - RHO, **options | {"mask": matrices})
    p = np.concatenate([np.ones(2), 1.0 + DECAY * np.ones(3)])
    d = np.concatenate([np.zeros(2), DECAY * np.ones(3)])
    wanted = np.sum(flat(C) + d) / p.sum()
    np.testing.assert_allclose(found.statistic_over_precision, wanted, rtol=1e-9)


@pytest.mark.slow
def test_evon_and_mixtures_pass_the_mask_on(x64):
    options = {"weight_decay": DECAY, "mask": {"w": True, "b": False}}
    stacked, statistic = (jax.tree.map(lambda x: np.stack([x, x]), tree) for tree in (P, C))
    rows = [
        (lambda: blr.evon(0.1, ess=10.0, b2=1 - RHO, **options), P, C),
        (lambda: blr.mixture_ivon(0.1, ess=10.0, b2=1 - RHO, **options), stacked, statistic),
    ]
    for make, params, c in rows:
        found = diagnosed(make, params, c, b2=1 - RHO, **options)
        d = {"w": DECAY, "b": 0.0}
        above = sum(np.sum(c[k] + d[k]) for k in c)
        below = sum(np.sum((1.0 + d[k]) * np.ones_like(c[k])) for k in c)
        np.testing.assert_allclose(found.statistic_over_precision, above / below, rtol=1e-9)


@pytest.mark.slow
def test_a_decay_that_follows_the_posterior_is_that_of_the_step(x64):
    """`EmpiricalPrior` of ivon_lora: one number per leaf, from the posterior before the step."""
    ess = 7.0 * np.sqrt(50.0)
    found = diagnosed(
        lambda: blr.ivon_lora(0.1, examples=50.0, gamma=7.0, hess_init=0.5, b2=1 - RHO),
        P, C, b2=1 - RHO, weight_decay=EmpiricalPrior(),
    )  # fmt: skip
    p = np.full(5, 0.5)
    d = {k: m.size / np.sum(ess * m**2 + 1 / 0.5) * np.ones_like(m) for k, m in P.items()}
    np.testing.assert_allclose(
        found.statistic_over_precision, np.sum(flat(C) + flat(d)) / p.sum(), rtol=1e-9
    )
    ratio = flat(C) / p
    np.testing.assert_allclose(
        found.statistic_score, ratio.sum() / np.sqrt(np.sum(ratio**2)), rtol=1e-6
    )


def test_a_mask_that_is_none_is_refused():
    tx, params = blr.ivon(0.1, ess=10.0), jnp.ones(3)
    state = tx.init(params)
    with pytest.raises(ValueError, match="mask"):
        blr.diagnostics(
            state, state, params, statistic=params, b2=0.5, weight_decay=0.1, mask="kernel"
        )
