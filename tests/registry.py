"""One row per transformation: what it is, and what it can do. A new one is one more row.

`tests/contract/test_contract.py` holds every row to every line of `Contract` that it is not exempt
from; `docs/contract.md` prints both. The first row of every kind runs in `make test`, the others in
`make slow`.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import ROOT

import blr_optax as blr
from blr_optax.state._reader import map_posterior_states, posterior_states


class Contract(enum.Enum):
    """What a transformation of this library promises to the user of optax."""

    EXTRA_ARGUMENTS = "`update` accepts extra arguments that it does not know, and ignores them."
    INIT_FROM_SHAPES = "`init` takes shapes in place of arrays, as `jax.eval_shape` does."
    MAP_PARAMS = (
        "`optax.tree.map_params` finds every field that has the structure of `params`, and what it "
        "returns is read like the state itself."
    )
    STABLE_TYPES = (
        "`update` returns a state of the same structure, shapes, dtypes and weak types, in float32 "
        "also where float64 is allowed, and inside `cond`."
    )
    MULTI_STEPS = "It works inside `optax.MultiSteps`: every k-th call moves, the others do not."
    COMPILES_ONCE = "A second call of the jitted step does not trace again."
    UPDATE_DTYPES = (
        "Updates and samples have the dtype of `params`, statistics are float32 or wider."
    )
    PLAIN_STATES = (
        "A state is a NamedTuple with a class name of its own, without fields called `value`, "
        "`grad` or `learning_rate`, which optax gives a meaning."
    )
    MASKED = (
        "Under `optax.masked` and `optax.partition` the leaves of a group move as if the others "
        "were constants, with the same noise; leaves without a posterior are points."
    )
    DONATION = "`params` and state can be donated: `init` and `update` keep no array of the caller."
    KEYS = (
        "The key in the state is typed and never changes: the noise of a step follows from the "
        "key, the count of steps and the path of the leaf."
    )
    STATISTIC_ARGUMENT = (
        "The second statistic may be given as an extra argument with the structure of `params`."
    )
    DERIVED_STATISTIC = (
        "Without that argument the statistic is derived from the gradient and the noise."
    )
    MICROBATCHES = "`estimate` averages over samples and micro-batches as over one whole batch."
    HYPERPARAMETERS = (
        "Numbers may be given as floats, arrays or schedules, and by `optax.inject_hyperparams`."
    )
    NON_FINITE = (
        "A gradient or statistic that is not finite skips the step: updates are zero, the "
        "precision stays, the step is counted as skipped, and the next draw differs."
    )
    DOMAIN = "The precision stays positive and finite for every finite statistic."
    CORE_PATH = (
        "A loop without extra arguments learns: `sample`, gradient, `update(grads, state, params)`."
    )
    NNX = "It works inside `flax.nnx.Optimizer`, and takes the steps of the plain loop."
    CHECKPOINT = "Orbax saves and restores params and state, and the run goes on exactly."
    TRANSFORMS = "Steps run eagerly and under `jit`, `scan`, `vmap`, with the same numbers."
    DERIVATIVE = "A step can be differentiated in its data."
    MESHES = (
        "On a mesh of eight devices, with Auto and with Explicit axes, states keep their "
        "shardings, and the numbers are those of one device."
    )
    REPLICAS = "Replicas that average gradients and statistics agree with one device."
    COMPOSITION = "What does not compose is documented in docs/composition.md, and true."


SELF = "evaluates the loss itself, on the plain tree of parameters"
SINGLE = "its statistic is that of single examples, or of a second gradient: only `estimate` has it"
FLAT = "the state holds the raveled parameters, or a matrix over them"
NO_STATISTIC = "its noise has a fixed scale, so that there is no precision"
MICRO_ADVERSARY = "every micro-batch and every replica has an adversary of its own (m-sharpness)"
SIGNS = "its parameters are natural ones, at which the loss means nothing"
MIXED = "its responsibilities are those of all leaves: a group is another mixture"
DEGENERATE = "singular values of zero have no derivative"

_SELF = dict.fromkeys(
    (
        Contract.MASKED,
        Contract.STATISTIC_ARGUMENT,
        Contract.DERIVED_STATISTIC,
        Contract.MICROBATCHES,
        Contract.NON_FINITE,
        Contract.DOMAIN,
        Contract.CORE_PATH,
        Contract.NNX,
        Contract.MESHES,
    ),
    SELF,
)
_RAVELED = {**_SELF, Contract.MAP_PARAMS: FLAT}
_SINGLE = dict.fromkeys(
    (
        Contract.STATISTIC_ARGUMENT,
        Contract.DERIVED_STATISTIC,
        Contract.DOMAIN,
        Contract.CORE_PATH,
        Contract.NNX,
        Contract.MULTI_STEPS,
    ),
    SINGLE,
)
_ADVERSARIAL = {
    **_SINGLE,
    Contract.MICROBATCHES: MICRO_ADVERSARY,
    Contract.REPLICAS: MICRO_ADVERSARY,
}
_FIXED_NOISE = dict.fromkeys((Contract.STATISTIC_ARGUMENT, Contract.DOMAIN), NO_STATISTIC)


def mean_loss(params, x, y):
    """A smooth mean loss over a tree with a matrix, a vector and a number."""
    z = jnp.tanh(x @ params["w"]) @ jnp.ones(params["w"].shape[1]) + params["b"][0] * x[:, 0]
    return jnp.mean((z + params["c"] - y) ** 2)


def make_params(dtype=jnp.float32):
    return {
        "w": jnp.asarray(np.arange(6.0).reshape(3, 2).astype(dtype) / np.asarray(10, dtype)),
        "b": jnp.asarray(np.ones(2, dtype)),
        "c": jnp.asarray(np.zeros((), dtype)),
    }


def make_batch(n=8, dtype=jnp.float32):
    x = np.sin(np.arange(3.0 * n)).reshape(n, 3).astype(dtype)
    return jnp.asarray(x), jnp.asarray(np.cos(np.arange(1.0 * n)).astype(dtype))


def make_stacked(dtype=jnp.float32):
    """Two components of a mixture: the parameters, and others far from them."""
    return jax.tree.map(lambda x: jnp.asarray(np.stack([x, 1 - x])), make_params(dtype))


def stacked_loss(params, x, y):
    """The sum of the components' losses."""
    return jnp.sum(jax.vmap(mean_loss, (0, None, None))(params, x, y))


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A transformation under test.

    Attributes:
        name: of the row.
        kind: what it is a variant of; the first row of a kind is in the fast run.
        make: keyword arguments -> transformation.
        numbers: hyper-parameters that may be floats, arrays or schedules.
        exempt: lines of the contract that do not apply, and why.
        noisy: whether it draws samples.
        loss: whether `update` takes the batch and evaluates the loss.
        estimated: whether its statistic, and its gradient, must come from `estimate`.
        leading: axes of its statistic's leaves in front of the parameters' own.
        params: dtype -> where it starts.
        objective: its mean loss.
    """

    name: str
    kind: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    numbers: dict[str, float]
    exempt: dict[Contract, str] = dataclasses.field(default_factory=dict)
    noisy: bool = False
    loss: bool = False
    estimated: bool = False
    leading: tuple[int, ...] = ()
    params: Callable[..., Any] = make_params
    objective: Callable[..., jax.Array] = mean_loss

    def tx(self, **more: Any) -> optax.GradientTransformationExtraArgs:
        return self.make(**{**self.numbers, **more})


def _prior(scale):
    family = blr.families.get("gaussian_diagonal")
    return blr.Distribution(family, family.natural(mean=make_params(), precision=scale))


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
    Row("sgd", "point", blr.sgd, {"learning_rate": 0.1, "ess": 20.0}),
    Row("gradient_descent", "point", blr.gradient_descent, {"learning_rate": 0.1, "ess": 20.0}),
    Row(
        "sgd_nesterov",
        "point",
        lambda **k: blr.sgd(momentum=0.9, nesterov=True, **k),
        {"learning_rate": 0.05, "ess": 20.0},
    ),
    Row("adam", "squares", blr.adam, {"learning_rate": 0.05, "b1": 0.9, "b2": 0.99, "ess": 20.0}),
    Row(
        "rmsprop",
        "squares",
        blr.rmsprop,
        {"learning_rate": 0.02, "decay": 0.9, "ess": 20.0},
    ),
    Row(
        "rmsprop_centered",
        "squares",
        lambda **k: blr.rmsprop(centered=True, momentum=0.5, eps=1e-3, **k),
        {"learning_rate": 0.02, "decay": 0.9, "ess": 20.0},
    ),
    Row("ivon", "precision", blr.ivon, _IVON, noisy=True),
    Row("soba", "precision", blr.soba, _SOBA, noisy=True),
    Row("ivon_clip", "precision", lambda **k: blr.ivon(clip_radius=0.5, **k), _IVON, noisy=True),
    Row("ivon_prior", "precision", lambda **k: blr.ivon(prior=_prior(2.0), **k), _IVON, noisy=True),
    Row(
        "ivon_run",
        "precision",
        lambda **k: blr.ivon(num_steps=50, **k),
        {"learning_rate": 0.1, "ess": 50.0, "b1": 0.9, "b2": 0.95},
        noisy=True,
    ),
    Row(
        "ivon_squared",
        "precision",
        lambda **k: blr.ivon(curvature=blr.estimators.squared_gradient(8), **k),
        _IVON,
        noisy=True,
    ),
    # The gradient in w is nearly of rank one, so of its rows' eigenvectors two are rounding alone,
    # and two ways to compile a step draw along different ones: w's columns have a basis.
    Row(
        "evon",
        "precision",
        lambda **k: blr.evon(refresh_every=2, max_size=2, **k),
        _IVON,
        noisy=True,
    ),
    Row(
        "evon_whitened",
        "precision",
        lambda learning_rate, **k: optax.chain(
            blr.evon(1.0, refresh_every=2, max_size=2, **k),
            blr.orthogonalize(),
            optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        ),
        _IVON,
        noisy=True,
    ),
    Row(
        "mixture_ivon",
        "precision",
        blr.mixture_ivon,
        {"learning_rate": 0.1, "ess": 30.0, "hess_init": 0.5, "b2": 0.9, "weight_decay": 0.1},
        exempt={Contract.MASKED: MIXED, Contract.MESHES: MIXED},
        noisy=True,
        params=make_stacked,
        objective=stacked_loss,
    ),
    Row("vadam", "precision", blr.vadam, _VADAM, noisy=True),
    Row("ivon_lora", "precision", blr.ivon_lora, _LORA, noisy=True),
    Row("vprop", "precision", blr.vprop, _VPROP, noisy=True),
    Row("vogn", "examples", blr.vogn, _VOGN, exempt=_SINGLE, noisy=True, estimated=True),
    Row("ogn", "examples", blr.ogn, _VOGN, exempt=_SINGLE, estimated=True),
    Row(
        "vogn_run",
        "examples",
        lambda **k: blr.vogn(num_steps=50, **k),
        _VOGN,
        exempt=_SINGLE,
        noisy=True,
        estimated=True,
    ),
    Row(
        "bayesbinn", "signs", blr.bayesbinn, _SIGNS, exempt={Contract.CORE_PATH: SIGNS}, noisy=True
    ),
    Row("ste", "signs", blr.ste, _STE),
    Row("bsam", "adversary", blr.bsam, _BSAM, exempt=_ADVERSARIAL, noisy=True, estimated=True),
    Row("sam", "adversary", blr.sam, _SAM, exempt=_ADVERSARIAL, estimated=True),
    Row("lie_additive", "group", blr.lie_additive, _ADDITIVE, exempt=_FIXED_NOISE, noisy=True),
    Row("lie_affine", "group", blr.lie_affine, _AFFINE, noisy=True),
    Row(
        "lie_multiplicative",
        "group",
        blr.lie_multiplicative,
        _MULTIPLICATIVE,
        noisy=True,
        leading=(2,),
    ),
    # Skips nothing by itself, as the optimizers of optax inside it; no precision that it keeps.
    Row(
        "dropout",
        "dropout",
        lambda learning_rate, keep_rate, ess: blr.dropout(
            blr.sgd(learning_rate, ess=ess), keep_rate
        ),
        {"learning_rate": 0.1, "keep_rate": 0.7, "ess": 20.0},
        exempt={Contract.DOMAIN: NO_STATISTIC},
        noisy=True,
    ),
    Row(
        "scale_by_precision",
        "precision",
        lambda learning_rate, **k: optax.chain(
            blr.scale_by_precision(**k), optax.scale_by_learning_rate(learning_rate)
        ),
        _SOBA,
        noisy=True,
    ),
    Row(
        "blr_gaussian_diagonal",
        "rule",
        _blr("gaussian_diagonal", estimator=_TWO),
        _RULE,
        exempt=_SELF,
        noisy=True,
        loss=True,
    ),
    Row(
        "blr_gaussian",
        "rule",
        _blr("gaussian", estimator=_TWO),
        _RULE,
        exempt=_RAVELED,
        noisy=True,
        loss=True,
    ),
    Row(
        "blr_gaussian_fixed",
        "rule",
        _blr("gaussian_fixed", estimator=blr.estimators.delta()),
        {"learning_rate": 0.1, "ess": 1.0},
        exempt=_RAVELED,
        loss=True,
    ),
    Row(
        "online_newton",
        "rule",
        lambda **k: blr.online_newton(mean_loss, **k),
        _RULE,
        exempt=_RAVELED,
        loss=True,
    ),
    Row(
        "newton",
        "rule",
        lambda **k: blr.newton(mean_loss, **k),
        {"ess": 20.0},
        exempt=_RAVELED,
        loss=True,
    ),
    Row(
        "kronecker_newton",
        "rule",
        lambda **k: blr.kronecker_newton(mean_loss, **k),
        _RULE,
        exempt=_RAVELED,
        loss=True,
    ),
    Row(
        "low_rank_newton",
        "rule",
        lambda **k: blr.low_rank_newton(mean_loss, rank=2, init_precision=20.0, **k),
        {"learning_rate": 0.1, "ess": 20.0},
        exempt={**_RAVELED, Contract.DERIVATIVE: DEGENERATE},
        loss=True,
    ),
    Row(
        "mixture_newton",
        "rule",
        lambda **k: blr.mixture_newton(mean_loss, components=2, covariance="diagonal", **k),
        _RULE,
        exempt=_RAVELED,
        loss=True,
    ),
    Row(
        "mixture_vi",
        "rule",
        lambda **k: blr.mixture_vi(
            mean_loss,
            components=2,
            estimator=blr.estimators.monte_carlo(2, antithetic=True),
            scale=0.3,
            **k,
        ),
        _RULE,
        exempt=_RAVELED,
        noisy=True,
        loss=True,
    ),
    Row(
        "variational_online_newton",
        "rule",
        lambda **k: blr.variational_online_newton(mean_loss, estimator=_TWO, **k),
        _RULE,
        exempt=_RAVELED,
        noisy=True,
        loss=True,
    ),
]


def first_of_kind(row):
    return next(other for other in ROWS if other.kind == row.kind) is row


def rows(line=None, **wanted):
    """pytest parameters: the rows that a line applies to and whose attributes are as wanted."""
    return [
        pytest.param(row, id=row.name, marks=() if first_of_kind(row) else (pytest.mark.slow,))
        for row in ROWS
        if line not in row.exempt and all(getattr(row, k) == v for k, v in wanted.items())
    ]


# --- steps ----------------------------------------------------------------------------------------


def evidence(row, params, state, batch):
    """What `update` gets: (gradient at this step's weights, extra arguments)."""
    if row.loss:
        return None, {"batch": batch}
    if row.estimated:
        est = blr.estimate(row.objective, state, params, *batch)
        return est.grad, {"statistic": est.statistic}
    return jax.grad(row.objective)(blr.sample(state, params), *batch), {}


def one_step(row, tx, params, state, batch, **extra):
    """The gradient at this step's weights, update, apply."""
    grads, needed = evidence(row, params, state, batch)
    updates, state = tx.update(grads, state, params, **needed, **extra)
    return optax.apply_updates(params, updates), state


def core(state):
    """The state with key, count and precision, of the only posterior in an optimizer state."""
    (found,) = posterior_states(state, "test")
    return found.reader.core(found)


def with_core(state, **fields):
    """An optimizer state whose posterior states have other fields in their core."""
    return map_posterior_states(
        lambda s: s.reader.with_core(s, s.reader.core(s)._replace(**fields)), state
    )


def train(row, tx, params, batch, steps):
    """Params and state after some jitted steps."""
    state, step = jax.jit(tx.init)(params), jax.jit(functools.partial(one_step, row, tx))
    for _ in range(steps):
        params, state = step(params, state, batch)
    return params, state


class Programs:
    """The functions of a row, each compiled once for all lines of the contract.

    Attributes:
        row, tx: the row and its transformation.
        traces: one entry each time that `step` was traced.
        init, update: those of the transformation.
        step: (params, state, batch) -> the next params and state.
        estimate: (state, params, *batch) -> the estimate of the objective.
    """

    def __init__(self, row: Row):
        self.row, self.tx, self.traces = row, row.tx(), []
        self.init = jax.jit(self.tx.init)
        self.update = jax.jit(self.tx.update)
        self.estimate = jax.jit(functools.partial(blr.estimate, row.objective))
        self._path = None

        def step(params, state, batch):
            self.traces.append(1)
            return one_step(row, self.tx, params, state, batch)

        self.step = jax.jit(step)

    def after(self, steps: int) -> tuple[Any, Any]:
        """Params and state after some steps on the first batch."""
        if self._path is None:
            params = self.row.params()
            self._path = [(params, self.init(params))]
        while len(self._path) <= steps:
            self._path.append(self.step(*self._path[-1], make_batch()))
        return self._path[steps]


programs = functools.cache(Programs)


# --- the page -------------------------------------------------------------------------------------


def page() -> str:
    """The text of docs/contract.md."""
    lines = [
        "# Contract",
        "",
        "What every transformation of the library promises to a user of optax. The tests hold",
        "every row of their registry to every line, except where the second table says why not.",
        "",
        "| line | promise |",
        "|---|---|",
        *(f"| {title(line)} | {line.value} |" for line in Contract),
        "",
        "## Exemptions",
        "",
        "| rows | lines | because |",
        "|---|---|---|",
    ]
    reasons: dict[str, dict[Contract, list[str]]] = {}
    for row in ROWS:
        for line, reason in row.exempt.items():
            reasons.setdefault(reason, {}).setdefault(line, []).append(row.name)
    for reason, exempt in reasons.items():
        groups: dict[tuple[str, ...], list[str]] = {}
        for line, names in exempt.items():
            groups.setdefault(tuple(names), []).append(title(line))
        for names, titles in groups.items():
            rows_ = ", ".join(f"`{name}`" for name in names)
            lines.append(f"| {rows_} | {', '.join(titles)} | {reason} |")
    return "\n".join(lines) + "\n"


def title(line: Contract) -> str:
    return line.name.capitalize().replace("_", " ")


if __name__ == "__main__":
    (ROOT / "docs" / "contract.md").write_text(page())
