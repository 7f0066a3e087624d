"""Noise below the spacing of the weights is counted by `diagnostics`, and named by `check`.

The truth are draws of the posterior by numpy, rounded to the dtype of the weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import ROWS

import blr_optax as blr

ROW = {row.name: row for row in ROWS}


def unmoved(tx, params):
    state = tx.init(params)
    return blr.diagnostics(state, state, params)[0].unmoved


def share_of_draws(mean, deviation, dtype, draws=4000):
    """Of numpy's normals around the mean, those that are rounded to it."""
    eps = np.random.default_rng(0).normal(size=(draws, *mean.shape))
    mean = np.asarray(mean, np.float64)
    return np.mean((mean + deviation * eps).astype(dtype) == mean.astype(dtype))


MEANS = np.array([1e4, -1e4, 1.5, 0.3, 3e-3, 0.0])
CASES = [
    # (dtype, means, ess): deviation 1 / sqrt(ess)
    (jnp.float32, np.array([1e4, -1e4]), 1e10),  # deviation 1e-5, spacing 1e-3
    (jnp.float32, MEANS, 1e6),
    (jnp.float32, MEANS, 1e12),
    (jnp.bfloat16, MEANS, 1e3),
    (jnp.bfloat16, MEANS, 1e6),
    (jnp.float16, MEANS, 1e8),
    (jnp.float16, np.array([1000.0, 0.3]), 1e3),
]


@pytest.mark.parametrize(("dtype", "means", "ess"), CASES)
def test_the_share_is_that_of_the_draws(dtype, means, ess):
    params = jnp.asarray(means, dtype)
    found = unmoved(blr.ivon(0.1, ess=ess, hess_init=1.0, weight_decay=0.0), params)
    wanted = share_of_draws(np.asarray(params, np.float64), ess**-0.5, jnp.dtype(dtype).type)
    assert abs(float(found) - wanted) < 0.02


def test_the_share_of_rotated_and_of_fixed_noise():
    """EVON's deviations are those in the weights' own axes; SGD's that of its step size."""
    mean = np.full((6, 4), 1e4)
    for tx, deviation in (
        (blr.evon(0.1, ess=1e7, hess_init=1.0, weight_decay=0.0), 1e7**-0.5),
        (blr.lie_additive(0.1, noise_scale=4e-4), 4e-4),
        (blr.sgd(0.1, ess=1e6), 1e7**-0.5),
    ):
        found = unmoved(tx, jnp.asarray(mean, jnp.float32))
        assert abs(float(found) - share_of_draws(mean, deviation, np.float32)) < 0.02


def test_components_of_a_mixture_are_counted_one_by_one():
    """Not by the variance of the mixture, which is that between its means."""
    params = jnp.stack([jnp.full(8, 1e4), jnp.full(8, 0.1)])
    found = unmoved(blr.mixture_ivon(0.1, ess=1e10, hess_init=1.0, weight_decay=0.0), params)
    assert abs(float(found) - 0.5) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ROW)
def test_every_row_has_a_share_or_none(name):
    row = ROW[name]
    params = row.params()
    share = unmoved(row.tx(), params)
    assert (share is None) == (row.kind == "signs")
    assert share is None or 0.0 <= float(share) < 0.01


def test_float64_weights_are_measured_by_their_own_spacing(x64):
    params = np.array([1e4, 1e4])
    assert float(unmoved(blr.ivon(0.1, ess=1e10, hess_init=1.0), jnp.asarray(params))) < 1e-3
    assert float(unmoved(blr.ivon(0.1, ess=1e26, hess_init=1.0), jnp.asarray(params))) > 0.8


# --- check ----------------------------------------------------------------------------------------


def report(tx, dtype, mean, **more):
    params = jnp.full(16, mean, dtype)
    loss = lambda w, x: jnp.mean(x) * jnp.sum(jnp.square(w.astype(jnp.float32) - mean - 0.1))  # noqa: E731
    return blr.check(tx, loss, params, jnp.ones(8), **more)


def named(found):
    return [(one.name, one.severity) for one in found.findings if one.name == "noise_below_spacing"]


def test_check_names_float32_weights_that_no_noise_moves():
    options = {"num_examples": 10**10, "num_steps": 10**6}
    found = report(blr.ivon(0.1, ess=1e10, hess_init=1.0), jnp.float32, 1e4, **options)
    assert named(found) == [("noise_below_spacing", "warning")]
    assert found.numbers["unmoved"] > 0.99
    right = report(blr.ivon(0.1, ess=1e10, hess_init=1.0), jnp.float32, 1.0, **options)
    assert right.ok and not named(right)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "dtype", "mean", "severity"),
    [
        (lambda: blr.evon(0.1, ess=1e10, hess_init=1.0), jnp.float32, 1e4, "warning"),
        (lambda: blr.vadam(0.1, ess=1e10, init_precision=1e10), jnp.float32, 1e4, "warning"),
        (lambda: blr.lie_affine(1e-9, ess=1e10, noise_scale=1e-5), jnp.float32, 1e4, "warning"),
        (lambda: blr.lie_additive(1e-9, noise_scale=1e-5), jnp.float32, 1e4, "warning"),
        (lambda: blr.ivon(0.1, ess=1e8, hess_init=1.0), jnp.bfloat16, 1.0, "note"),
        (lambda: blr.ivon(0.1, ess=1e4, hess_init=1.0), jnp.bfloat16, 0.1, None),
        (lambda: blr.sgd(1e-9, ess=1e10), jnp.float32, 1e4, None),  # no step draws
    ],
)
def test_check_names_it_for_rows_that_draw(make, dtype, mean, severity):
    found = named(report(make(), dtype, mean))
    assert found == ([("noise_below_spacing", severity)] if severity else [])


def test_check_looks_at_the_state_of_a_run():
    """The first posterior is wide, the one that was learnt is not."""
    tx, params = blr.ivon(0.1, ess=1e4, hess_init=1.0, weight_decay=0.0), jnp.full(16, 1e3)
    state = tx.init(params)
    narrow = (state[0]._replace(precision=jnp.full(16, 1e10)), *state[1:])
    assert not named(report(tx, jnp.float32, 1e3))
    assert named(report(tx, jnp.float32, 1e3, opt_state=narrow))


def test_no_gradient_at_the_parameters_is_no_clip():
    """All samples equal the mean, a minimum: nothing stands in front of the rule."""
    tx = blr.ivon(0.1, ess=1e10, hess_init=1.0)
    loss = lambda w, x: jnp.mean(x) * jnp.sum(jnp.square(w - 1e4))  # noqa: E731
    found = blr.check(tx, loss, jnp.full(8, 1e4), jnp.ones(8))
    assert [one.name for one in found.warnings] == ["noise_below_spacing"]


def test_check_notes_steps_that_rounding_takes_away():
    """Adam's first step is the rate: 1e-3 of weights whose spacing is 8e-3."""

    def notes(tx, dtype, mean=1.5):
        return {one.name for one in report(tx, dtype, mean).findings} & {"steps_below_spacing"}

    assert notes(blr.adam(1e-3), jnp.bfloat16)
    assert not notes(blr.adam(1e-3), jnp.float32)
    assert not notes(blr.adam(1e-2), jnp.bfloat16)
    rounded = optax.chain(blr.adam(1e-3), blr.round_stochastically())
    assert not notes(rounded, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "mean", "lost"),
    [
        (lambda: blr.ivon(1e-6, ess=1e4), 1.5, True),
        (lambda: blr.evon(1e-6, ess=1e4), 1.5, True),
        (lambda: blr.sgd(0.1), 1.5, False),
        (lambda: blr.sgd(0.0), 1.5, False),  # asks for nothing
        (lambda: blr.sgd(lambda t: 1e-5), 100.0, True),
    ],
)
def test_steps_of_other_rows(make, mean, lost):
    assert ("steps_below_spacing" in report(make(), jnp.bfloat16, mean)) == lost


def test_it_is_compiled_with_the_step():
    params = jnp.full(4, 1e4)
    tx = blr.ivon(0.1, ess=1e10)
    found = jax.jit(lambda s: blr.diagnostics(s, s, params)[0].unmoved)(tx.init(params))
    assert float(found) > 0.99
