"""Natural mistakes of a first day are refused in words, with what to write instead."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr

VECTOR, TREE = (
    np.zeros(3, np.float32),
    {"w": np.ones((3, 2), np.float32), "b": np.zeros(2, np.float32)},
)
X, Y = np.ones((8, 3), np.float32), np.ones(8, np.float32)
TX = blr.ivon(0.1, ess=10.0)
ONE, MANY = jax.eval_shape(lambda: (TX.init(VECTOR), TX.init(TREE)))


def mse(w, x, y):
    return jnp.mean((x @ w - y) ** 2)


def squares(w, x, y):
    return (x @ w - y) ** 2


def pair(w, x, y):
    return mse(w, x, y), w


def traced(f, *args, **kwargs):
    """Call a function on shapes: what is static is checked, and nothing is compiled."""
    return jax.eval_shape(lambda: f(*args, **kwargs))


def update(tx, grads, params=VECTOR, given=None, **extra):
    return jax.eval_shape(
        lambda: tx.update(grads, tx.init(params), params if given is None else given, **extra)
    )


def refused(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert re.search(word, str(error.value)), str(error.value)


READING = {
    "the optimizer for its state": (
        lambda read: read(TX, VECTOR), "got the optimizer itself", r"tx\.init\(params\)",
    ),
    "MultiSteps for its state": (
        lambda read: read(optax.MultiSteps(TX, 2), VECTOR), "got the optimizer itself",
    ),
    "swapped": (
        lambda read: jax.eval_shape(lambda s: read(VECTOR, s), ONE), r"\(opt_state, params\)",
    ),
    "a state of optax": (
        lambda read: jax.eval_shape(lambda: read(optax.adam(0.1).init(VECTOR), VECTOR)),
        "carries no posterior",
    ),
    "a posterior": (
        lambda read: read(blr.distribution("normal", mean=0.0, precision=1.0), VECTOR),
        "is a posterior already", r"q\.sample\(key\)",
    ),
    "a tree for an array": (
        lambda read: jax.eval_shape(lambda s: read(s, TREE), ONE),
        "params: .* it is a dict with leaves at", "state was made for one array",
    ),
    "an array for a tree": (
        lambda read: jax.eval_shape(lambda s: read(s, VECTOR), MANY),
        r"it is one array, of shape \(3,\)", r"parameters with an array at \['b'\]",
    ),
    "None": (lambda read: jax.eval_shape(lambda s: read(s, None), ONE), "it is None"),
    "another shape": (
        lambda read: jax.eval_shape(lambda s: read(s, X), ONE),
        r"params: the array has shape \(8, 3\), expected \(3,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("read", [blr.posterior, blr.sample])
def test_reading_something_else(read, name):
    call, *words = READING[name]
    refused(lambda: call(read), *words)


def test_reading_something_else_by_other_functions():
    refused(lambda: blr.reseed(TX, 0), "reseed: got the optimizer itself")
    refused(lambda: jax.eval_shape(lambda s: blr.reseed(0, s), ONE), "stands where")
    refused(lambda: blr.diagnostics(TX, TX, VECTOR), "diagnostics: got the optimizer itself")
    refused(lambda: blr.estimate(mse, TX, VECTOR, X, Y), "estimate: got the optimizer itself")
    refused(
        lambda: jax.eval_shape(lambda s: blr.estimate(mse, VECTOR, s, X, Y), ONE),
        r"estimate: the state stands where .* \(opt_state, params\)",
    )
    refused(
        lambda: jax.eval_shape(lambda s: blr.estimate(s, mse, VECTOR, X, Y), ONE),
        r"must be a function loss\(params, \*batch\); got tuple",
    )


LOSSES = {
    "one number for each example": (
        squares, {}, r"one number, the mean .* array of shape \(8,\)", r"jnp\.mean",
    ),
    "an auxiliary output": (pair, {}, "a tuple of 2", "has_aux=True"),
    "nothing": (lambda w, x, y: None, {}, "returned None", "`return` missing"),
    "a dict": (lambda w, x, y: {"loss": mse(w, x, y)}, {}, "returned a dict"),
    "an integer": (lambda w, x, y: jnp.sum(x > 0), {}, "floating-point", "dtype int32"),
    "no auxiliary output": (mse, {"has_aux": True}, r"must return \(value, aux\)", "array of"),
    "an auxiliary output of squares": (
        lambda w, x, y: (squares(w, x, y), w), {"has_aux": True}, r"array of shape \(8,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_returns_something_else(name):
    loss, options, *words = LOSSES[name]
    refused(
        lambda: jax.eval_shape(lambda s: blr.estimate(loss, s, VECTOR, X, Y, **options), ONE),
        "estimate: ", *words,
    )  # fmt: skip
    for tx in (TX, optax.adam(0.1)):
        step = blr.make_step(tx, loss, jit=False, **options)
        refused(lambda tx=tx, step=step: traced(step, VECTOR, tx.init(VECTOR), X, Y), *words)
    if not options:
        refused(lambda: blr.check(TX, loss, VECTOR, X, Y), "check: ", *words)


OWN = {
    "newton": lambda loss: blr.newton(loss),
    "variational_online_newton": lambda loss: blr.variational_online_newton(loss, 0.1),
    "mixture_newton": lambda loss: blr.mixture_newton(loss, 0.1, components=2),
    "normal, score function": lambda loss: blr.blr_update(
        "normal", loss, 0.1, estimator=blr.estimators.score_function(4)
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_losses_of_optimizers_that_evaluate_them(name):
    batch = {"batch": (X, Y)}
    refused(lambda: update(OWN[name](squares), None, **batch), r"array of shape \(8,\)")
    refused(lambda: update(OWN[name](pair), None, **batch), "a tuple of 2")
    refused(lambda: update(OWN[name](mse), VECTOR), r"takes \(w, x, y\)", r"batch=\(x, y\)")
    refused(lambda: update(OWN[name](mse), None, batch=[X, Y]), "1 of the batch")
    update(OWN[name](mse), None, **batch)


def test_a_batch_that_does_not_fit_the_loss():
    for batch in ((), ((X, Y),), (X, Y, Y)):
        refused(
            lambda batch=batch: jax.eval_shape(
                lambda s: blr.estimate(mse, s, VECTOR, *batch), ONE
            ),
            r"the loss takes \(w, x, y\)", f"{len(batch)} of the batch",
        )  # fmt: skip
    refused(lambda: blr.make_step(TX, 3.0), "make_step: the loss must be a function", "float")
    refused(
        lambda: jax.eval_shape(
            lambda s: blr.make_step(TX, mse, jit=False)(s, VECTOR, X, Y), ONE
        ),
        r"step\(params, opt_state, \*batch\)",
    )  # fmt: skip


ROWS = {
    "ivon": TX,
    "adam": blr.adam(0.1),
    "evon": blr.evon(0.1, ess=10.0),
    "bayesbinn": blr.bayesbinn(0.1, ess=10.0),
    "lie_affine": blr.lie_affine(0.1, ess=10.0),
    "chain": optax.chain(optax.clip(1.0), blr.sgd(0.1)),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_old_name_of_the_statistic_is_not_ignored(name):
    for mistaken in ("curvature", "hessian"):
        refused(
            lambda mistaken=mistaken: update(ROWS[name], VECTOR, **{mistaken: VECTOR}),
            f"{mistaken}= is no argument", r"statistic=est\.statistic",
        )  # fmt: skip
    # What optimizers of optax may ask for, and what another member of a chain may.
    update(ROWS[name], VECTOR, value=1.0, grad=VECTOR, value_fn=mse, foreign=2.0)


def test_gradients_that_are_none():
    refused(lambda: update(TX, None), "grads: .* it is None")
    refused(lambda: update(blr.sgd(0.1), None), "sgd: update got no gradients")
    refused(lambda: update(TX, (1.0, VECTOR)), r"\(jax\.value_and_grad returns \(value, grads\)\)")
    refused(lambda: update(TX, {"w": TREE["w"]}, TREE), r"nothing at \['b'\]: it has leaves at")
    refused(lambda: update(TX, VECTOR, TREE), r"grads: .* it is one array, of shape \(3,\)")
    est = blr.Estimate(np.float32(1.0), VECTOR, VECTOR, None)
    refused(lambda: update(TX, est), r"grads: got an Estimate; .* est\.grad")
    refused(lambda: update(TX, VECTOR, statistic=est), r"statistic: got an Estimate; .*\.statistic")
    scale = blr.scale_by_precision(ess=1.0)
    refused(lambda: scale.update(VECTOR, VECTOR, ONE), r"update\(grads, opt_state, params\)")
    refused(
        lambda: jax.eval_shape(lambda s: scale.update(VECTOR, s, VECTOR), ONE), "got tuple"
    )  # of a chain


PRIORS = {
    "ivon": lambda **k: blr.ivon(0.1, ess=10.0, **k),
    "vogn": lambda **k: blr.vogn(0.1, ess=10.0, **k),
    "newton": lambda **k: blr.newton(lambda w: jnp.sum(w**2), **k),
    "gamma": lambda **k: blr.blr_update("gamma", lambda w: jnp.sum(w), 0.1, **k),
    "mixture_newton": lambda **k: blr.mixture_newton(
        lambda w: jnp.sum(w**2), 0.1, components=2, **k
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_priors_that_are_no_distributions(name):
    refused(
        lambda: PRIORS[name](prior=1.0), "prior=1.0, of type float, must be a", "prior_precision="
    )
    refused(lambda: PRIORS[name](prior="normal"), "prior='normal', of type str", "no parameters")
    refused(lambda: PRIORS[name](prior=blr.families.get("normal")), "type Normal", "no parameters")
    refused(lambda: PRIORS[name](prior={"mean": 0.0}), "type dict", r"distribution\('normal'")
    if name != "mixture_newton":
        refused(lambda: PRIORS[name](init=1.0), "init=1.0, of type float, must")


@pytest.mark.parametrize("shape", [(3, 3), (2,)])
def test_precisions_of_another_shape(shape):
    more = np.full(shape, 5.0)
    for tx, name in (
        (lambda: blr.ivon(0.1, ess=10.0, prior_precision=more), "weight_decay"),
        (lambda: blr.ivon(0.1, ess=10.0, weight_decay=more), "weight_decay"),
        (lambda: blr.ivon(0.1, ess=10.0, hess_init=more), "hess_init"),
        (lambda: blr.vogn(0.1, ess=10.0, init_precision=more), "hess_init"),
        (lambda: blr.adam(0.1, prior_precision=more), "prior_precision"),
    ):
        refused(
            lambda tx=tx: traced(tx().init, VECTOR),
            f"{name}.* shape {re.escape(str(shape))} does not fit", r"array, \(3,\)",
        )  # fmt: skip
    refused(
        lambda: blr.newton(lambda w: jnp.sum(w**2), prior_precision=more),
        "must be one number here", r"distribution\('gaussian'",
    )  # fmt: skip


def test_precisions_that_fit_are_taken():
    """One number, one per row or column, one per weight."""
    start = np.zeros((3, 2), np.float32)
    for more in (5.0, np.full(2, 5.0), np.full((3, 1), 5.0), np.full((3, 2), 5.0)):
        for tx in (
            blr.ivon(0.1, ess=10.0, prior_precision=more),
            blr.vogn(0.1, ess=10.0, prior_precision=1.0, init_precision=more),
            blr.adam(0.1, prior_precision=more),
        ):
            shapes = traced(lambda tx=tx: blr.posterior(tx.init(start), start).variance)
            assert shapes.shape == start.shape
