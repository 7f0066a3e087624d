"""Posteriors that drift far from the origin are told, before float32 has lost their digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_rows import rows
from family_tools import member, stacked

import blr_optax as blr
from blr_optax import families
from blr_optax.families import Centered, MeanField, MeanPrecision

N = 200
Z = np.random.default_rng(0).normal(size=N)
NORMAL_GAMMA = families.get("normal_gamma")


def posterior_of(family, offset):
    """The conjugate posterior of N numbers around an offset, from the prior (offset, 1, 1, 1)."""
    rate = 1 + 0.5 * np.sum((Z - Z.mean()) ** 2) + 0.5 * N * Z.mean() ** 2 / (N + 1)
    mean = offset + N * Z.mean() / (N + 1)
    return {"mean": mean, "kappa": N + 1.0, "concentration": 1 + N / 2, "rate": rate}


def beside(lam, end):
    return [np.nextafter(np.float32(x), np.float32(end)).astype(float) for x in lam]


def moments_of_normal_gamma(linear, quadratic, log, precision):
    """Mean, variance of x and of tau, in float64, from the textbook."""
    kappa, a = -2 * quadratic, log + 0.5
    m = linear / kappa
    b = -precision - 0.5 * kappa * m * m
    return np.array([m, a / b]), np.array([b / (kappa * (a - 1)), a / b**2])


@pytest.mark.parametrize("offset", [0.0, 30.0, 100.0])
def test_the_rounding_of_lambda_is_that_of_its_neighbours_in_float64(offset):
    """Half a spacing: a quarter of what is between the neighbours on both sides."""
    m, s = offset, posterior_of(NORMAL_GAMMA, offset)
    kappa, a, b = s["kappa"], s["concentration"], s["rate"]
    lam = NORMAL_GAMMA.Natural(kappa * m, -kappa / 2, a - 0.5, -(b + 0.5 * kappa * m * m))
    lam = jax.tree.map(np.float32, lam)
    (up, v_up), (down, v_down) = (
        moments_of_normal_gamma(*beside(lam, end)) for end in (np.inf, -np.inf)
    )
    _, v = moments_of_normal_gamma(*map(float, lam))
    want = 0.25 * max(np.max(abs(up - down) / np.sqrt(v)), np.max(abs(v_up - v_down) / v))
    found = float(jax.jit(NORMAL_GAMMA.rounding)(lam))
    # Mean and variance are themselves float32 numbers.
    np.testing.assert_allclose(found, want, rtol=0.2 if offset else 1.0, atol=1e-6)
    assert (found > 0.01) == (offset == 100.0)


@pytest.mark.parametrize("row", rows())
def test_members_near_the_origin_have_their_digits(row):
    lam = jax.tree.map(lambda x: np.asarray(x, np.float32), member(stacked(row), 0))
    found = float(jax.jit(row.family.rounding)(lam))
    assert 0 < found < 1e-5


def test_members_of_a_field_and_of_a_product_are_asked_one_by_one():
    """By hand: of N(m, 1) it is m 2^-23 up to a factor of 2, the spacing of m / 2."""
    field = MeanField("normal")
    lam = field.natural(mean={"a": jnp.array([1.0, 2.0**20]), "b": jnp.zeros(2)}, precision=1.0)
    assert 0.0625 <= float(field.rounding(lam)) <= 0.25
    far = Centered("normal", at=2.0**20)
    pair = families.Product({"near": field, "far": far})
    near = field.natural(mean={"a": jnp.ones(2)}, precision=1.0)
    both = pair.natural(near=near, far=far.natural(mean=2.0**20 + 1, precision=1.0))
    assert float(pair.rounding(both)) < 1e-6
    nobody = NORMAL_GAMMA.Natural(*jnp.array([1e6, -0.5, 0.5, -0.5e12]))
    assert float(NORMAL_GAMMA.rounding(nobody)) == np.inf


def energy(mu, y):
    """-sum log N(y | x, 1 / tau), in expectation."""
    return jnp.sum(0.5 * (y * y * mu.precision + mu.quadratic - mu.log) - mu.linear * y)


def learn(family, offset, at):
    """One conjugate step on data around an offset, in float32."""
    prior = blr.Distribution(
        family, family.natural(mean=offset, kappa=1.0, concentration=1.0, rate=1.0)
    )
    tx = blr.blr_update(family, energy, 1.0, prior=prior, estimator=blr.estimators.closed_form())
    params = MeanPrecision(jnp.float32(offset), jnp.float32(1.0))
    before, y = tx.init(params), np.asarray(offset - at + Z, np.float32)
    updates, after = jax.jit(tx.update)(None, before, params, batch=(y,))
    return tx, before, after, optax.apply_updates(params, updates), y


@pytest.mark.parametrize(("offset", "centered", "told"), [
    (0.0, False, False), (100.0, False, True), (100.0, True, False),
])  # fmt: skip
def test_a_posterior_that_drifts_is_told_by_diagnostics_and_check(offset, centered, told):
    family = Centered("normal_gamma", at=offset) if centered else NORMAL_GAMMA
    tx, before, after, params, y = learn(family, offset, offset if centered else 0.0)
    (found,) = blr.diagnostics(before, after, params)
    assert (float(found.rounding) > 0.01) == told
    report = blr.check(tx, energy, params, y, opt_state=after)
    assert ("lost_digits" in report) == told
    np.testing.assert_allclose(
        report.numbers["rounding"], float(found.rounding), rtol=0.1, atol=1e-6
    )
    rate = float(blr.posterior(after, params).standard()["rate"])
    exact = posterior_of(family, offset)["rate"]
    assert told or abs(rate / exact - 1) < 1e-5
    if told:
        (warning,) = (one for one in report.warnings if one.name == "lost_digits")
        assert "Centered" in warning.fix and "float64" in warning.fix and not report.ok
        # In deviations of tau the rate is off by no more than what is told.
        assert abs(rate / exact - 1) * np.sqrt(1 + N / 2) < 4 * float(found.rounding)


def test_a_mean_field_that_drifts_and_rows_that_keep_no_lambda():
    """A loss whose minimum is 1e7 deviations away, and IVON, whose mean is not in lambda."""
    params = jnp.zeros(2)
    tx = blr.blr_update("normal", lambda w: 0.5 * jnp.sum((w - 1e7) ** 2), 1.0)
    before = tx.init(params)
    updates, after = jax.jit(tx.update)(None, before, params)
    (found,) = blr.diagnostics(before, after, params + updates)
    assert float(found.rounding) > 0.01
    assert float(blr.diagnostics(before, before, params)[0].rounding) < 1e-6
    ivon = blr.ivon(0.1, ess=1e12)
    state = ivon.init(params + 1e5)
    assert blr.diagnostics(state, state, params)[0].rounding is None
