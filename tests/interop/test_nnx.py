"""`blr.nnx` walks the trajectory of the plain loop; every draw has its own mask.

About eight seconds, nearly all of it compiling.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tools import assert_same, near

import blr_optax as blr

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 3)).astype(np.float32)
Y = np.sin(X[:, :1]) + X[:, 1:2] * X[:, 2:]
STEPS = 4


def ivon():
    return blr.ivon(0.05, ess=16.0, b2=0.9, hess_init=0.5, key=3)


class Net(nnx.Module):
    """A network whose dropout masks are seen, and which has running averages."""

    def __init__(self, seen=None, normed=True):
        rngs = nnx.Rngs(params=0, dropout=1)
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs) if normed else None
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)
        self.seen = nnx.static(seen)

    def __call__(self, x):
        mask = self.drop(jnp.ones((1, 8)))
        if self.seen is not None:
            jax.debug.callback(lambda m: self.seen.append(tuple(np.ravel(m) > 0)), mask)
        hidden = self.first(x) if self.norm is None else self.norm(self.first(x))
        return self.last(jnp.tanh(hidden) * mask)


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


class Seen(list):
    """A list that is hashable, as static parts of a model have to be."""

    __hash__ = object.__hash__


def trained(tx, steps=STEPS, normed=True, **options):
    """A model after some steps, its optimizer, the masks that it drew, and the last info."""
    seen = Seen()
    model = Net(seen, normed)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = blr.nnx.make_step(model, optimizer, loss, **options)
    for _ in range(steps):
        info = step(X, Y)
    jax.effects_barrier()
    return model, optimizer, seen, info


def by_hand(steps=STEPS):
    """The same loop, with the sample put in and taken out by `sampled`."""
    model = Net()
    optimizer = nnx.Optimizer(model, ivon(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        with blr.nnx.sampled(model, optimizer):
            value, grads = nnx.value_and_grad(loss)(model, X, Y)
        optimizer.update(model, grads)
        return value

    for _ in range(steps):
        value = step(model, optimizer)
    return model, optimizer, value


def test_a_step_of_one_draw_is_the_loop_with_sampled():
    model, optimizer, _, info = trained(ivon())
    wanted, wanted_optimizer, value = by_hand()
    near(info.value, value, rtol=1e-5)
    for kind in (nnx.Param, nnx.BatchStat, nnx.RngCount):
        near(nnx.as_pure(nnx.state(model, kind)), nnx.as_pure(nnx.state(wanted, kind)), rtol=1e-5)
    assert int(optimizer.step[...]) == int(wanted_optimizer.step[...]) == STEPS


def test_sampled_is_the_plain_loop_of_arrays():
    """Independent of nnx: the gradient at `blr.sample` of the same tree."""
    model = Net(normed=False)
    model.eval()
    optimizer = nnx.Optimizer(model, ivon(), wrt=nnx.Param)
    graphdef, params, rest = nnx.as_pure(nnx.split(model, nnx.Param, ...))
    tx, opt_state = ivon(), ivon().init(params)
    for _ in range(2):
        with blr.nnx.sampled(model, optimizer):
            grads = nnx.grad(loss)(model, X, Y)
        optimizer.update(model, grads)
        theta = blr.sample(opt_state, params)
        plain = jax.grad(lambda t: loss(nnx.merge(graphdef, t, rest), X, Y))(theta)
        updates, opt_state = tx.update(plain, opt_state, params)
        params = optax.apply_updates(params, updates)
    near(nnx.as_pure(nnx.state(model, nnx.Param)), params, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "evaluations", "masks"),
    [
        ({}, 1, 1),
        ({"samples": 2}, 2, 2),
        ({"samples": 6}, 6, 6),  # a scan
        ({"samples": 2, "antithetic": True, "microbatch": 8}, 8, 4),  # a pair shares its mask
    ],
    ids=["one", "unrolled", "scanned", "pairs"],
)
def test_every_draw_and_step_has_its_own_mask(options, evaluations, masks):
    model, _, seen, info = trained(ivon(), **options)
    assert len(seen) == STEPS * evaluations and len(set(seen)) > 0.9 * STEPS * masks
    assert np.all(np.asarray(model.norm.mean[...]) != 0) and np.isfinite(info.value)
    assert int(model.drop.rngs.count[...]) == STEPS  # the streams go on


@pytest.mark.parametrize(
    "tx",
    [optax.adam(0.1), blr.vogn(0.1, ess=16.0), blr.bsam(0.1, ess=16.0)],
    ids=["adam", "vogn", "bsam"],
)
def test_other_optimizers_draw_new_masks_too(tx):
    model, _, seen, _ = trained(tx, normed=False)
    assert len(set(seen)) == STEPS
    assert np.all(np.isfinite(np.asarray(model.last.kernel[...])))


def test_the_mean_is_back_after_an_error_too():
    model = Net()
    optimizer = nnx.Optimizer(model, ivon(), wrt=nnx.Param)
    before = jax.device_get(nnx.as_pure(nnx.state(model, nnx.Param)))
    with pytest.raises(RuntimeError, match="inside"), blr.nnx.sampled(model, optimizer):
        assert np.any(np.asarray(model.last.kernel[...]) != before["last"]["kernel"])
        raise RuntimeError("inside")
    assert_same(nnx.as_pure(nnx.state(model, nnx.Param)), before)


def test_predictions_are_those_of_the_model_in_evaluation():
    model, optimizer, _, _ = trained(ivon(), steps=2)
    q, apply = blr.nnx.posterior(model, optimizer)
    first, again = apply(q.mean, X), apply(q.mean, X)
    model.eval()
    near(first, model(X), rtol=1e-5)
    assert_same(first, again)
    found = blr.predict_regression(0, q, apply, X, noise_variance=0.1, samples=4)
    assert found.mean.shape == Y.shape and np.all(np.asarray(found.epistemic) > 0)
    assert jax.tree.structure(q.variance) == jax.tree.structure(q.mean)


def test_a_loss_may_return_more():
    model = Net(normed=False)
    optimizer = nnx.Optimizer(model, ivon(), wrt=nnx.Param)

    def with_error(model, x, y):
        error = model(x) - y
        return jnp.mean(error**2), {"error": jnp.mean(jnp.abs(error))}

    info = blr.nnx.make_step(model, optimizer, with_error, samples=2, has_aux=True)(X, Y)
    assert 0 < float(info.aux["error"]) ** 2 <= float(info.value) * (1 + 1e-5)


def test_wrong_calls_are_told_what_to_give():
    model = Net(normed=False)
    optimizer = nnx.Optimizer(model, ivon(), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"nnx\.posterior: give the model and its nnx\.Optimizer"):
        blr.nnx.posterior(optimizer, model)
    with pytest.raises(ValueError, match=r"nnx\.sampled: .* got Net and tuple"):
        blr.nnx.sampled(model, ()).__enter__()
    own = blr.newton(lambda w: 0.0, ess=1.0)
    with pytest.raises(ValueError, match="evaluates the loss itself, at plain arrays"):
        blr.nnx.make_step(model, nnx.Optimizer(model, own, wrt=nnx.Param), loss)
