"""One row per transformation: what it is, and what it can do. A new one is one more row.

`tests/contract/test_contract.py` holds every row to the contract C1 to C19, except for the lines
that a row is exempt from: rows that evaluate the loss themselves have no core path (C15), cannot
see masked
parameters (C7, C10), take no curvature (C11, C13, C14), and have a loss of the plain tree, not of
an nnx model (C16). Rows whose curvature is that of single examples, or whose second gradient is an
adversary's, need `estimate`: they have no core path either (C15, C16), cannot derive the curvature
from a gradient ("derived", C10), which is all that `MultiSteps` passes on ("multi"), and take
squares or sizes, which are not negative (C14). Of the adversarial ones every micro-batch and every
replica has its own adversary, which is m-sharpness, not the step of the whole batch (C11,
"replicas"). Of bayesbinn the parameters are natural ones, where the loss means nothing (C15;
`tests/optimizers/test_bayesbinn.py` has what it learns).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import blr_optax as blr

SELF = frozenset({"C7", "C10", "C11", "C13", "C14", "C15", "C16", "derived"})
ESTIMATED = frozenset({"C10", "C14", "C15", "C16", "derived", "multi"})
ADVERSARIAL = ESTIMATED | {"C11", "replicas"}
NO_CURVATURE = frozenset({"C10", "C14"})  # noise of a fixed scale: there is none to give


@dataclasses.dataclass(frozen=True)
class Row:
    """A transformation under test.

    Attributes:
        name: of the row.
        make: keyword arguments -> transformation.
        numbers: hyper-parameters that may be floats, arrays or schedules.
        exempt: contract lines that do not apply.
        noisy: whether it looks at samples.
        loss: whether `update` takes the batch and evaluates the loss.
        estimated: whether its curvature, and its gradient, must come from `estimate`.
        leading: axes of its curvature's leaves in front of the parameters' own.
        slow: whether its tests are marked slow: a variant of a row that the fast run has.
    """

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    numbers: dict[str, float]
    exempt: frozenset = frozenset()
    noisy: bool = False
    loss: bool = False
    estimated: bool = False
    leading: tuple[int, ...] = ()
    slow: bool = False

    def tx(self, **more: Any) -> optax.GradientTransformationExtraArgs:
        return self.make(**{**self.numbers, **more})


def mean_loss(params, x, y):
    """A smooth mean loss over a tree with a matrix, a vector and a number."""
    z = jnp.tanh(x @ params["w"]) @ jnp.ones(params["w"].shape[1]) + params["b"][0] * x[:, 0]
    return jnp.mean((z + params["c"] - y) ** 2)


def make_params(dtype=jnp.float32):
    return {
        "w": jnp.arange(6.0).reshape(3, 2).astype(dtype) / 10,
        "b": jnp.ones(2, dtype),
        "c": jnp.zeros((), dtype),
    }


def make_batch(n=8, dtype=jnp.float32):
    x = jnp.sin(jnp.arange(3.0 * n)).reshape(n, 3).astype(dtype)
    return x, jnp.cos(jnp.arange(1.0 * n)).astype(dtype)


def _prior(scale):
    family = blr.families.get("gaussian_diagonal")
    return blr.Posterior(family, family.natural(mean=make_params(), precision=scale))


# Two samples, so that compiling the loss's Hessian is all that these rows cost.
_TWO = blr.estimators.monte_carlo(2)


def _blr(family, **fixed):
    return lambda learning_rate, ess, **more: blr.blr_update(
        family, mean_loss, learning_rate, ess=ess, **{**fixed, **more}
    )


_IVON = {"learning_rate": 0.1, "ess": 50.0, "hess_init": 0.5, "b1": 0.9, "b2": 0.95}
_LORA = {"learning_rate": 0.1, "examples": 50.0, "gamma": 7.0, "hess_init": 0.5, "b2": 0.95}
_VOGN = {"learning_rate": 0.05, "ess": 50.0, "b1": 0.5, "b2": 0.95}
_SIGNS = {"learning_rate": 0.01, "ess": 20.0, "b1": 0.5}
_STE = {"learning_rate": 0.05, "b1": 0.9, "b2": 0.99}
_BSAM = {"learning_rate": 0.05, "ess": 50.0, "b1": 0.5, "b2": 0.95}
_SAM = {"learning_rate": 0.02, "ess": 50.0}
_VADAM = {"learning_rate": 0.05, "ess": 50.0, "b1": 0.5, "b2": 0.95, "init_precision": 10.0}
_VPROP = {"learning_rate": 0.05, "ess": 50.0, "b2": 0.95, "init_precision": 10.0}
_SOBA = {"learning_rate": 0.05, "ess": 50.0, "hess_init": 0.5, "b2": 0.95}
_ADDITIVE = {"learning_rate": 0.1, "noise_scale": 0.05, "momentum": 0.5}
_AFFINE = {
    "learning_rate": 0.1,
    "ess": 50.0,
    "scale_rate": 0.01,
    "noise_scale": 0.1,
    "b1": 0.5,
    "b2": 0.9,
}
_MULTIPLICATIVE = {"learning_rate": 0.1, "ess": 50.0, "momentum": 0.5}
_RULE = {"learning_rate": 0.3, "ess": 20.0}

ROWS = [
    Row("gradient_descent", blr.gradient_descent, {"learning_rate": 0.1, "ess": 20.0}, slow=True),
    Row("sgd", blr.sgd, {"learning_rate": 0.1, "ess": 20.0}),
    Row(
        "sgd_nesterov",
        lambda **k: blr.sgd(momentum=0.9, nesterov=True, **k),
        {"learning_rate": 0.05, "ess": 20.0},
        slow=True,
    ),
    Row(
        "rmsprop",
        blr.rmsprop,
        {"learning_rate": 0.02, "decay": 0.9, "ess": 20.0},
        slow=True,
    ),
    Row(
        "rmsprop_centered",
        lambda **k: blr.rmsprop(centered=True, momentum=0.5, eps=1e-3, **k),
        {"learning_rate": 0.02, "decay": 0.9, "ess": 20.0},
        slow=True,
    ),
    Row("adam", blr.adam, {"learning_rate": 0.05, "b1": 0.9, "b2": 0.99, "ess": 20.0}),
    Row("soba", blr.soba, _SOBA, noisy=True, slow=True),
    Row("ivon", blr.ivon, _IVON, noisy=True),
    Row("ivon_clip", lambda **k: blr.ivon(clip_radius=0.5, **k), _IVON, noisy=True, slow=True),
    Row("ivon_prior", lambda **k: blr.ivon(prior=_prior(2.0), **k), _IVON, noisy=True, slow=True),
    Row(
        "ivon_squared",
        lambda **k: blr.ivon(curvature=blr.estimators.squared_gradient(8), **k),
        _IVON,
        noisy=True,
        slow=True,
    ),
    # The gradient in w is nearly of rank one, so of its rows' eigenvectors two are rounding alone,
    # and two ways to compile a step draw along different ones: w's columns have a basis.
    Row(
        "evon",
        lambda **k: blr.evon(refresh_every=2, max_size=2, **k),
        _IVON,
        noisy=True,
        slow=True,
    ),
    Row(
        "evon_whitened",
        lambda learning_rate, **k: optax.chain(
            blr.evon(1.0, refresh_every=2, max_size=2, **k),
            blr.whiten(),
            optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        ),
        _IVON,
        noisy=True,
        slow=True,
    ),
    Row("vadam", blr.vadam, _VADAM, noisy=True, slow=True),
    Row("ivon_lora", blr.ivon_lora, _LORA, noisy=True, slow=True),
    Row("vprop", blr.vprop, _VPROP, noisy=True, slow=True),
    Row("vogn", blr.vogn, _VOGN, exempt=ESTIMATED, noisy=True, estimated=True),
    Row("ogn", blr.ogn, _VOGN, exempt=ESTIMATED, estimated=True, slow=True),
    Row("bayesbinn", blr.bayesbinn, _SIGNS, exempt=frozenset({"C15"}), noisy=True),
    Row("ste", blr.ste, _STE, slow=True),
    Row("bsam", blr.bsam, _BSAM, exempt=ADVERSARIAL, noisy=True, estimated=True, slow=True),
    Row("sam", blr.sam, _SAM, exempt=ADVERSARIAL, estimated=True, slow=True),
    Row("lie_additive", blr.lie_additive, _ADDITIVE, exempt=NO_CURVATURE, noisy=True, slow=True),
    Row("lie_affine", blr.lie_affine, _AFFINE, noisy=True, slow=True),
    Row(
        "lie_multiplicative",
        blr.lie_multiplicative,
        _MULTIPLICATIVE,
        noisy=True,
        leading=(2,),
        slow=True,
    ),
    # Skips nothing by itself, as the optimizers of optax inside it; no precision that it keeps.
    Row(
        "dropout",
        lambda learning_rate, keep_rate, ess: blr.dropout(
            blr.sgd(learning_rate, ess=ess), keep_rate
        ),
        {"learning_rate": 0.1, "keep_rate": 0.7, "ess": 20.0},
        exempt=frozenset({"C14"}),
        noisy=True,
        slow=True,
    ),
    Row(
        "scale_by_precision",
        lambda learning_rate, **k: optax.chain(
            blr.scale_by_precision(**k), optax.scale_by_learning_rate(learning_rate)
        ),
        _SOBA,
        noisy=True,
        slow=True,
    ),
    Row(
        "blr_gaussian_diagonal",
        _blr("gaussian_diagonal", estimator=_TWO),
        _RULE,
        exempt=SELF,
        noisy=True,
        loss=True,
    ),
    Row(
        "blr_gaussian",
        _blr("gaussian", estimator=_TWO),
        _RULE,
        exempt=SELF | {"C2"},
        noisy=True,
        loss=True,
        slow=True,
    ),
    Row(
        "blr_gaussian_fixed",
        _blr("gaussian_fixed", estimator=blr.estimators.delta()),
        {"learning_rate": 0.1, "ess": 1.0},
        exempt=SELF | {"C2"},
        loss=True,
    ),
    Row(
        "online_newton",
        lambda **k: blr.online_newton(mean_loss, **k),
        _RULE,
        exempt=SELF | {"C2"},
        loss=True,
        slow=True,
    ),
    Row(
        "newton",
        lambda **k: blr.newton(mean_loss, **k),
        {"ess": 20.0},
        exempt=SELF | {"C2"},
        loss=True,
        slow=True,
    ),
    Row(
        "kronecker_newton",
        lambda **k: blr.kronecker_newton(mean_loss, **k),
        _RULE,
        exempt=SELF | {"C2"},
        loss=True,
        slow=True,
    ),
    Row(
        "low_rank_newton",
        lambda **k: blr.low_rank_newton(mean_loss, rank=2, init_precision=20.0, **k),
        {"learning_rate": 0.1, "ess": 20.0},
        exempt=SELF | {"C2", "derivative"},  # singular values of zero have none
        loss=True,
        slow=True,
    ),
    Row(
        "mixture_newton",
        lambda **k: blr.mixture_newton(mean_loss, components=2, covariance="diagonal", **k),
        _RULE,
        exempt=SELF | {"C2"},
        loss=True,
        slow=True,
    ),
    Row(
        "multimodal",
        lambda **k: blr.multimodal(mean_loss, components=2, samples=2, scale=0.3, **k),
        _RULE,
        exempt=SELF | {"C2"},
        noisy=True,
        loss=True,
        slow=True,
    ),
    Row(
        "variational_online_newton",
        lambda **k: blr.variational_online_newton(mean_loss, estimator=_TWO, **k),
        _RULE,
        exempt=SELF | {"C2"},
        noisy=True,
        loss=True,
        slow=True,
    ),
]


def rows(line=None):
    """pytest parameters: all rows that a contract line applies to."""
    import pytest

    return [
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else [])
        for row in ROWS
        if line not in row.exempt
    ]


def evidence(row, params, state, batch):
    """What `update` gets: (gradient at this step's weights, extra arguments)."""
    if row.loss:
        return None, {"batch": batch}
    if row.estimated:
        est = blr.estimate(mean_loss, state, params, *batch)
        return est.grad, {"curvature": est.curvature}
    return jax.grad(mean_loss)(blr.sample(state, params), *batch), {}


def one_step(row, tx, params, state, batch, **extra):
    """The gradient at this step's weights, update, apply."""
    grads, needed = evidence(row, params, state, batch)
    updates, state = tx.update(grads, state, params, **needed, **extra)
    return optax.apply_updates(params, updates), state


def train(row, tx, params, batch, steps, jit=True, **extra):
    step = lambda p, s, b: one_step(row, tx, p, s, b, **extra)  # noqa: E731
    step = jax.jit(step) if jit else step
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, batch)
    return params, state
