"""Weights in bfloat16 and float16 whose posterior is narrower than their spacing, row by row.

The curvature of the loss is known, and what a step measures at weights that are rounded has to be
that. The first case of a kind of noise is fast.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import ROWS

import blr_optax as blr

ESS = 1e8
SAMPLES = 4
BFLOAT16, FLOAT16 = jnp.bfloat16, jnp.float16


def constant(value, shape=(4096,)):
    return lambda dtype: jnp.full(shape, value, dtype)


def of_all_sizes(dtype):
    """Weights from 1e-3 to 10, and so of very different spacings."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(64, 64)) * 10.0 ** rng.uniform(-3, 1, (64, 64)), dtype)


def two_networks(dtype):
    return jnp.stack([jnp.full(2048, 1.5, dtype), jnp.full(2048, -70.0, dtype)])


def turned(tx, params):
    """EVON's state with a basis that is none of the weights' own axes."""
    state = tx.init(params)
    rng = np.random.default_rng(1)
    q = [np.linalg.qr(rng.normal(size=(n, n)))[0].astype(np.float32) for n in params.shape]
    eigen = state[0]
    bases = {"": type(eigen.bases[""])(*map(jnp.asarray, q))}
    return (eigen._replace(bases=bases), *state[1:])


def per_variance(law):
    """The statistic A s n g of lie_affine is the curvature times the variance asked for."""
    return lambda c, state: c / (float(state.noise_scale) ** 2 * law)


def per_gain(c, state):
    return c[0] / np.square(np.asarray(state.plus) * SPREAD)


@dataclasses.dataclass(frozen=True)
class Case:
    """A row whose noise measures the curvature.

    Attributes:
        make: the optimizer.
        params: dtype -> its weights.
        start: its first state.
        read: the curvature, from what it measures.
        accuracy: what rounding leaves of noise that is not normal, see `_rounding`.
    """

    make: Callable[[], Any]
    params: Callable[[Any], jax.Array] = lambda dtype: jnp.full(4096, 1.5, dtype)
    start: Callable[[Any, Any], Any] = lambda tx, params: tx.init(params)
    read: Callable[[Any, Any], Any] = lambda c, state: c
    accuracy: float = 0.0


def affine(noise):
    return lambda: blr.lie_affine(0.0, ess=ESS, noise_scale=1e-4, noise=noise, weight_decay=0.0)


SPREAD = 2e-3  # relative; that of the laws with a name is a half
IVON = {"ess": ESS, "hess_init": 1.0, "weight_decay": 0.0}
CASES = {
    "evon": Case(lambda: blr.evon(0.0, **IVON), of_all_sizes, turned),
    "lie_affine": Case(affine("gaussian"), read=per_variance(1.0)),
    "ivon": Case(lambda: blr.ivon(0.0, **IVON), of_all_sizes),
    "soba": Case(lambda: blr.soba(0.0, **IVON), constant(-3.0)),
    "scale_by_precision": Case(lambda: blr.scale_by_precision(**IVON), constant(1.0)),
    "mixture_ivon": Case(lambda: blr.mixture_ivon(0.0, **IVON), two_networks),
    "ivon_lora": Case(lambda: blr.ivon_lora(0.0, examples=1e8, gamma=1e4, hess_init=1.0)),
    "evon, first basis": Case(lambda: blr.evon(0.0, **IVON), constant(1.5, (64, 64))),
    "evon, vector": Case(lambda: blr.evon(0.0, **IVON), constant(0.05)),
    "evon, long sides": Case(lambda: blr.evon(0.0, max_size=1, **IVON), of_all_sizes),
    "lie_affine, laplace": Case(affine("laplace"), read=per_variance(2.0), accuracy=0.02),
    "lie_affine, uniform": Case(affine("uniform"), read=per_variance(1 / 3), accuracy=0.02),
    "lie_multiplicative": Case(
        lambda: blr.lie_multiplicative(
            0.0, ess=ESS, noise=lambda z: 1.0 + SPREAD * z, weight_decay=0.0
        ),
        read=per_gain,
    ),
}
FAST = ("evon", "lie_affine")
EACH = [
    pytest.param(name, dtype, marks=() if name in FAST and dtype == BFLOAT16 else pytest.mark.slow)
    for name in CASES
    for dtype in (BFLOAT16, FLOAT16)
]


def away(theta, m):
    return theta.astype(jnp.float32) - m.astype(jnp.float32)


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_the_curvature_is_that_of_the_loss(name, dtype):
    case = CASES[name]
    params, tx = case.params(dtype), case.make()
    state = case.start(tx, params)
    loss = lambda w: 0.5 * jnp.sum(jnp.square(away(w, params)))  # noqa: E731
    est = jax.jit(
        lambda s: blr.estimate(loss, s, params, samples=SAMPLES, antithetic=True)
    )(state)  # fmt: skip
    c = np.asarray(case.read(est.statistic, state))
    assert abs(c.mean() - 1.0) < 3 * c.std() / np.sqrt(c.size) + case.accuracy
    assert c.std() / np.sqrt(c.size) < 0.06  # so that the line above says something


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_a_gradient_alone_gives_what_estimate_gives(name, dtype):
    case = CASES[name]
    params, tx = case.params(dtype), case.make()
    state = case.start(tx, params)
    loss = lambda w: 0.5 * jnp.sum(jnp.square(away(w, params)))  # noqa: E731

    @jax.jit
    def both(state):
        est = blr.estimate(loss, state, params)
        given = tx.update(est.grad, state, params, statistic=est.statistic)[1]
        return given, tx.update(jax.grad(loss)(blr.sample(state, params)), state, params)[1]

    given, derived = map(jax.tree.leaves, both(state))
    for x, y in zip(given, derived, strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def learnt(dtype, m):
    """The precision per example that EVON holds after a run, whose loss has curvatures 1 and 4."""
    tx = blr.evon(0.0, ess=1e6, b2=0.98, hess_init=0.5, weight_decay=0.0)
    params = jnp.full((16, 8), m, dtype)
    rng = np.random.default_rng(2)
    q = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    hessian = jnp.asarray(q @ np.diag(np.repeat([1.0, 4.0], 8)) @ q.T, jnp.float32)

    def step(state, _):
        g = hessian @ away(blr.sample(state, params), params)
        return tx.update(g, state, params)[1], None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, length=1500))(tx.init(params))
    return np.asarray(state[0].gaussian.precision)


def test_evon_learns_the_curvatures_along_its_axes():
    found, right = learnt(BFLOAT16, 100.0), learnt(jnp.float32, 1.0)
    assert abs(found.sum() / right.sum() - 1.0) < 0.1
    assert abs(right.mean() - 2.5) < 0.2


# --- rows whose curvature does not come from the noise --------------------------------------------

SQUARES = {
    "vadam": lambda: blr.vadam(0.0, ess=ESS, init_precision=ESS),
    "vprop": lambda: blr.vprop(0.0, ess=ESS, init_precision=ESS),
    "vogn": lambda: blr.vogn(0.0, ess=ESS),
    "ogn": lambda: blr.ogn(0.0, ess=ESS),
    "bsam": lambda: blr.bsam(0.0, ess=ESS),
    "ivon_squared": lambda: blr.ivon(0.0, curvature=blr.estimators.squared_gradient(1), **IVON),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SQUARES)
def test_sizes_of_gradients_are_those_of_float32(name):
    """Wider noise would add its variance to the squares: 0.14 at a spacing of 0.5."""

    def measured(dtype):
        params, tx = jnp.full(512, 100.0, dtype), SQUARES[name]()
        loss = lambda w, x: jnp.mean(x) * jnp.sum(away(w, params) * (1.0 + away(w, params)))  # noqa: E731
        state = tx.init(params)
        return jax.jit(lambda s: blr.estimate(loss, s, params, jnp.ones(4)).statistic)(state)

    np.testing.assert_allclose(measured(BFLOAT16), measured(jnp.float32), rtol=1e-2)


# --- rows that keep no precision, or hold it in float32 -------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["gaussian", "laplace", "uniform"])
def test_lie_additive_still_perturbs_its_weights(noise):
    tx, params = (
        blr.lie_additive(0.0, noise_scale=1e-5, noise=noise),
        jnp.full(65536, 1.5, BFLOAT16),
    )
    theta = np.asarray(away(blr.sample(tx.init(params), params), params), np.float64)
    spacing = 2.0**-7
    wanted = spacing**2 * (0.75**2 + 1 / 12)
    assert abs(np.mean(theta**2) / wanted - 1.0) < 0.06
    assert abs(np.mean(theta)) < 4 * np.sqrt(wanted / theta.size)


@pytest.mark.slow
def test_signs_do_not_depend_on_the_spacing():
    """A latent weight of bfloat16 is exact in float32: so are its relaxed sign's chances."""
    tx = blr.bayesbinn(0.0, ess=10.0)

    def measured(dtype):
        params = jnp.asarray(np.repeat([-2.5, 0.0625, 3.0], 64), dtype)
        loss = lambda w: jnp.sum(w.astype(jnp.float32))  # noqa: E731
        return blr.estimate(loss, tx.init(params), params).statistic

    np.testing.assert_allclose(measured(BFLOAT16), measured(jnp.float32), rtol=1e-5)


@pytest.mark.slow
def test_units_are_kept_whole():
    tx = blr.dropout(blr.sgd(0.1, ess=1e12), 0.5)
    params = jnp.full((64, 32), 100.0, BFLOAT16)
    theta = np.asarray(blr.sample(tx.init(params), params), np.float32)
    assert set(np.unique(theta)) == {0.0, 100.0}


POINTS = {
    "sgd": lambda: blr.sgd(0.1, ess=ESS),
    "adam": lambda: blr.adam(0.1, ess=ESS),
    "rmsprop": lambda: blr.rmsprop(0.1, ess=ESS),
    "sam": lambda: blr.sam(0.1, ess=ESS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTS)
def test_points_are_evaluated_where_they_are(name):
    params = jnp.full(8, 1.5, BFLOAT16)
    np.testing.assert_array_equal(blr.sample(POINTS[name]().init(params), params), params)


RULES = {
    "gaussian_diagonal": blr.estimators.monte_carlo(64, curvature="reparameterized"),
    "gaussian": blr.estimators.monte_carlo(64, curvature="reparameterized"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", RULES)
def test_the_rule_draws_in_float32(family):
    """blr_update and the rows made of it evaluate the loss at weights that are not rounded."""
    params = jnp.full(16, 100.0, BFLOAT16)
    loss = lambda w: 0.5 * jnp.sum(jnp.square(w.astype(jnp.float32) - 100.0))  # noqa: E731
    tx = blr.blr_update(family, loss, 0.1, ess=1e4, estimator=RULES[family])
    state = tx.init(params)

    def step(state, _):
        return tx.update(None, state, params)[1], None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, length=60))(state)
    precision = 1.0 / np.asarray(blr.posterior(state, params).variance) / 1e4
    assert abs(precision.mean() - 1.0) < 0.1


def test_every_row_has_its_case():
    """Variants of a row begin with its name; rows of `blr_update` draw in float32."""
    others = ("lie_additive", "bayesbinn", "dropout", "gradient_descent", "ste")
    names = (*CASES, *SQUARES, *POINTS, *others)
    assert not [r.name for r in ROWS if r.kind != "rule" and not r.name.startswith(names)]
