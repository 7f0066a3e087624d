"""Weights of examples and tokens in `estimate` and `make_step`: as if rows were repeated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3)).astype(np.float32)
Y = RNG.normal(size=8).astype(np.float32)
COUNTS = np.array([1, 0, 3, 2, 0, 1, 1, 2])
AGAIN = np.repeat(np.arange(8), COUNTS)
PARAMS = {"w": np.float32([0.5, -1.0, 2.0]), "b": np.float32(0.1)}
NOISE = {"w": RNG.normal(size=(2, 3)).astype(np.float32), "b": np.float32([0.3, -0.2])}


def values(params, x, y):
    return (x @ params["w"] + params["b"] - y) ** 2


def mean_loss(params, x, y):
    return jnp.mean(values(params, x, y))


ROWS = {"ivon": blr.ivon(0.1, ess=8.0), "vogn": blr.vogn(0.1, ess=8.0)}


def run(name, loss, *batch, **options):
    state = ROWS[name].init(PARAMS)

    @jax.jit
    def found(batch, weights):
        return blr.estimate(loss, state, PARAMS, *batch, weights=weights, noise=NOISE, **options)

    return jax.device_get(found(batch, options.pop("weights", None)))


def close(a, b, rtol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5), a, b)


@functools.cache
def repeated(name):
    return run(name, mean_loss, X[AGAIN], Y[AGAIN])


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("loss", [mean_loss, values])
@pytest.mark.parametrize("microbatch", [None, 2])
def test_weights_are_how_often_an_example_counts(name, loss, microbatch):
    """Value, gradient and statistic, of a mean loss and of one value per example."""
    found = run(name, loss, X, Y, weights=0.5 * COUNTS, microbatch=microbatch)
    if name == "ivon" or microbatch is None:
        close(found, repeated(name))
    else:
        close(found[:3], repeated(name)[:3])


def test_a_padded_row_may_hold_anything_finite():
    x, y = X.copy(), Y.copy()
    x[COUNTS == 0], y[COUNTS == 0] = 1e6, -1e6
    close(run("ivon", values, x, y, weights=COUNTS), repeated("ivon"))


TOKENS = RNG.normal(size=(4, 5, 3)).astype(np.float32)
TARGETS = RNG.normal(size=(4, 5)).astype(np.float32)
VALID = RNG.random((4, 5)) < 0.5
VALID[0] = False  # a sequence of padding only


def normalised(params, x, y, valid):
    """The usual loss of a language model."""
    return jnp.sum(values(params, x, y) * valid) / jnp.sum(valid)


@pytest.mark.parametrize("microbatch", [None, 1, 2])
def test_tokens_have_weights_whatever_piece_they_fall_into(microbatch):
    found = run("ivon", values, TOKENS, TARGETS, weights=VALID, microbatch=microbatch)
    close(found, run("ivon", normalised, TOKENS, TARGETS, VALID))


@pytest.mark.parametrize("part", [{"microbatch": 2}, {"split": True}])
def test_losses_that_are_no_means_over_examples_are_refused_in_parts(part):
    flat = (X, Y, VALID.ravel()[:8])
    losses = [
        (normalised, "divides by its number of valid tokens.*weights="),
        (lambda p, x, y, v: jnp.mean(values(p, x, y), where=v), "weights="),
        (
            lambda p, x, y, v: jnp.sum(values(p, x, y) * v) / jnp.maximum(jnp.sum(v), 1),
            "weights=",
        ),
        (lambda p, x, y, v: jnp.sqrt(jnp.mean(values(p, x, y))), "no mean over its examples"),
        (lambda p, x, y, v: jnp.sum(values(p, x, y)), "a sum over its examples.*jnp.mean"),
    ]
    for loss, message in losses:
        run("ivon", loss, *flat)  # of the whole batch it is what it is
        with pytest.raises(ValueError, match=message):
            run("ivon", loss, *flat, **part)


def test_what_averages_to_the_whole_passes():
    """A prior term, a mean per sequence, batch normalisation, an auxiliary output."""
    state = ROWS["ivon"].init(PARAMS)
    losses = [
        lambda p, x, y, v: mean_loss(p, x, y) + jnp.sum(p["w"] ** 2),
        lambda p, x, y, v: jnp.mean(jnp.sum(values(p, x, y) * v, -1) / jnp.sum(v, -1)),
        lambda p, x, y, v: mean_loss(p, (x - x.mean(0)) / (x.std(0) + 0.1), y),
    ]
    batch = TOKENS, TARGETS, np.maximum(VALID, np.arange(5) == 0)
    for loss in losses:
        est = jax.eval_shape(lambda: blr.estimate(loss, state, PARAMS, *batch, microbatch=2))  # noqa: B023
        assert est.value.shape == ()
    aux = lambda p, x, y, v: (mean_loss(p, x, y), jnp.max(y))  # noqa: E731
    jax.eval_shape(lambda: blr.estimate(aux, state, PARAMS, *batch, microbatch=2, has_aux=True))


def test_devices_average_to_the_whole():
    """Two devices with unequal shares of what counts."""
    tx = ROWS["ivon"]

    def on_device(x, y, c):
        # Of one noise on all devices, so that the parts make up the whole.
        return blr.estimate(
            values, tx.init(PARAMS), PARAMS, x, y, weights=c, noise=NOISE, axis_name="device"
        )

    parts = [a.reshape(2, 4, *a.shape[1:]) for a in (X, Y, COUNTS.astype(np.float32))]
    found = jax.jit(jax.vmap(on_device, axis_name="device"))(*parts)
    close(jax.tree.map(lambda x: x[1], found), repeated("ivon"))
    with pytest.raises(ValueError, match=r"axis_name='device' averages.*weights="):
        jax.vmap(
            lambda x, y, c: blr.estimate(
                normalised, tx.init(PARAMS), PARAMS, x, y, c, axis_name="device"
            ),
            axis_name="device",
        )(*parts)


@pytest.mark.parametrize("loss", [mean_loss, values])
def test_a_step_takes_weights_for_any_optimizer(loss):
    for tx in (optax.sgd(0.1), blr.ivon(0.1, ess=8.0, key=3)):
        options = {"donate": False}
        with_weights = blr.make_step(tx, loss, **options)
        plain = blr.make_step(tx, mean_loss, **options)
        params = jax.tree.map(jnp.asarray, PARAMS)
        a = with_weights(params, tx.init(params), X, Y, weights=COUNTS)
        b = plain(params, tx.init(params), X[AGAIN], Y[AGAIN])
        close(a[0], b[0])
        close(a[2].value, b[2].value)


def test_aux_comes_beside_the_values():
    loss = lambda p, x, y: (values(p, x, y), jnp.mean(x))  # noqa: E731
    found = run("ivon", loss, X, Y, weights=COUNTS, has_aux=True)
    close(found.grad, repeated("ivon").grad)
    np.testing.assert_allclose(found.aux, X.mean(), rtol=1e-4)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (mean_loss, {"weights": np.ones(3)}, r"weights have shape \(3,\); give one per example"),
        (values, {"weights": np.ones((8, 2))}, r"returns values of shape \(8,\)"),
        (mean_loss, {"weights": -np.ones(8)}, r"must not be negative"),
        (
            lambda p, x, y: (mean_loss(p, x, y), 1.0),
            {"weights": np.ones(8), "has_aux": True},
            r"one value per example beside",
        ),
        (
            lambda p, x, y: mean_loss(p, x - x.mean(0), y),
            {"weights": np.ones(8)},
            r"weights: the loss couples its examples",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(loss, options, message):
    state = ROWS["ivon"].init(PARAMS)
    with pytest.raises(ValueError, match=message):
        blr.estimate(loss, state, PARAMS, X, Y, **options)


def test_an_optimizer_that_evaluates_the_loss_itself_says_so():
    tx = blr.newton(mean_loss, ess=8.0)
    step = blr.make_step(tx, mean_loss, jit=False)
    with pytest.raises(ValueError, match="weights: this optimizer evaluates the loss itself"):
        step(PARAMS, tx.init(PARAMS), X, Y, weights=COUNTS)
