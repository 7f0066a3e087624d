"""The demo: what IVON's posterior is worth on real data, beside SGD and AdamW.

Every choice, each the same for all optimizers unless it says otherwise:

    data        scikit-learn's bundled digits, 1797 images of 8 x 8 pixels divided by 16, shuffled
                once (`SPLIT_SEED`); the first half trains, the second half only ever scores; the
                mean image of the training half is subtracted from all
    network     64-128-128-10 with ReLU, flax.linen, flax's default initialisation
    loss        mean cross-entropy of batches of 32; an epoch leaves out the few examples of its
                last, incomplete batch, other ones each time
    optimizers  optax SGD with momentum 0.9 and decay added to the gradient; optax AdamW; IVON with
                ess = number of training examples, so that its posterior is not tempered
    schedule    cosine from the learning rate to zero over the run
    epochs      100 for everyone
    rates, decays, IVON's first curvature: `DEFAULTS`, chosen by `benchmarks/search_demo.py` from
                as many configurations for every optimizer, by the NLL of validation parts of the
                training half
    prediction  at the parameters; for IVON also averaged over 64 samples of its posterior
    shifted     the test images moved two pixels down and two to the right before the mean is
                subtracted, zeros coming in

Initialisation, shuffling and noise are functions of (seed, purpose, epoch) alone and nothing else
is random, so a run that goes on from a checkpoint makes the very steps of one that never stopped.
A checkpoint holds the whole state of a run; the last one of a run is its result. Where they live is
in `folder`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import blr_optax as blr
from blr_optax._demo import folder as files
from blr_optax._demo.folder import DemoError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from jaxtyping import Array, Float, Int, Key

# The choices of benchmarks/results/search_demo.json.
DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"learning_rate": 0.3, "weight_decay": 0.0003},
    "adamw": {"learning_rate": 0.03, "weight_decay": 0.3},
    "ivon": {"learning_rate": 2.0, "hess_init": 0.1, "weight_decay": 0.0003},
}
LABELS = {"sgd": "SGD", "adamw": "AdamW", "ivon": "IVON"}
EPOCHS, BATCH, SAMPLES, SEEDS = 100, 32, 64, (0, 1, 2)
MOMENTUM = 0.9  # of SGD and IVON, and AdamW's b1
IVON_B2 = 0.9999
SMALLEST_SCORE = 3.0  # of a run; of size one when the statistic knows nothing of the noise
SPLIT_SEED = 0
SHIFT = 2

CHECKPOINT_EVERY = 10
EXTRAS = ("flax", "matplotlib", "orbax.checkpoint", "rich", "sklearn")

# Purposes of randomness: each has its own stream of keys.
INITIALISE, SHUFFLE, NOISE, PREDICT = range(4)


class Data(NamedTuple):
    """The two halves, the test half moved, and the mean image subtracted from all three."""

    train_x: Float[Array, "n 64"]
    train_y: Int[Array, " n"]
    test_x: Float[Array, "m 64"]
    test_y: Int[Array, " m"]
    shifted_x: Float[Array, "m 64"]
    mean: Float[Array, " 64"]


class Run(NamedTuple):
    """All of a run between two epochs; `losses` and `scores` have a place for every epoch.

    Attributes:
        scores: of IVON, whether its statistic correlates with its noise, see `blr.diagnostics`.
    """

    params: Any
    opt_state: Any
    losses: Float[Array, " epochs"]
    scores: Float[Array, " epochs"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines the numbers of a demo, together with the versions of the libraries."""

    optimizers: tuple[str, ...] = tuple(DEFAULTS)
    seeds: tuple[int, ...] = SEEDS
    epochs: int = EPOCHS
    samples: int = SAMPLES

    def record(self) -> dict[str, Any]:
        """All settings and versions, as plain JSON values."""
        given = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}
        hyper = {name: DEFAULTS[name] for name in self.optimizers}
        return {
            "settings": {**given, "batch": BATCH, "hyperparameters": hyper},
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on."""
    modules = ("jax", "optax", "flax", "blr_optax")
    return {name: importlib.import_module(name).__version__ for name in modules}


def require_extras() -> None:
    """Raises DemoError when a library that only the demo needs is missing."""
    for name in EXTRAS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DemoError(
                f"the demo needs {name.partition('.')[0]}: pip install 'blr_optax[demo]'"
            ) from error


def load_data() -> Data:
    """The digits, split in half."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.RandomState(SPLIT_SEED).permutation(len(digits.target))
    images, labels = digits.images[order].astype(np.float32) / 16, digits.target[order]
    half = len(order) // 2
    shifted = np.zeros_like(images[half:])
    shifted[:, SHIFT:, SHIFT:] = images[half:, :-SHIFT, :-SHIFT]
    parts = [part.reshape(-1, 64) for part in (images[:half], images[half:], shifted)]
    mean = parts[0].mean(axis=0)
    train_x, test_x, shifted_x = (jnp.asarray(part - mean) for part in parts)
    train_y, test_y = jnp.asarray(labels[:half]), jnp.asarray(labels[half:])
    return Data(train_x, train_y, test_x, test_y, shifted_x, jnp.asarray(mean))


@functools.cache
def network() -> Any:
    """The flax module."""
    from flax import linen

    return linen.Sequential(
        [linen.Dense(128), linen.relu, linen.Dense(128), linen.relu, linen.Dense(10)]
    )


def stream(seed: Any, purpose: int, index: Any = 0) -> Key[Array, ""]:
    """The key of a purpose: a function of nothing but its arguments."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), index)


def optimizer(
    name: str, hyper: Mapping[str, Any], examples: int, steps: int, key: Any = 0
) -> optax.GradientTransformation:
    """One of the three, with a cosine schedule over `steps`; `hyper` may be traced."""
    rate = optax.cosine_decay_schedule(hyper["learning_rate"], steps)
    decay = hyper["weight_decay"]
    if name == "sgd":
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=MOMENTUM))
    if name == "adamw":
        return optax.adamw(rate, b1=MOMENTUM, weight_decay=decay)
    return blr.ivon(
        rate, ess=examples, hess_init=hyper["hess_init"], b1=MOMENTUM, b2=IVON_B2,
        weight_decay=decay, key=key,
    )  # fmt: skip


def start(name: str, hyper: Mapping[str, Any], seed: Any, epochs: int, examples: int) -> Run:
    """A run before its first epoch."""
    params = network().init(stream(seed, INITIALISE), jnp.zeros((1, 64)))
    steps = epochs * (examples // BATCH)
    tx = optimizer(name, hyper, examples, steps, stream(seed, NOISE))
    return Run(params, tx.init(params), jnp.zeros(epochs), jnp.zeros(epochs))


def train_epoch(
    name: str, hyper: Mapping[str, Any], run: Run, seed: Any, epoch: Any, x: Array, y: Array
) -> Run:
    """One epoch; AdamW and IVON differ in nothing but their name."""
    batches, epochs = len(x) // BATCH, len(run.losses)
    tx = optimizer(name, hyper, len(x), epochs * batches)
    order = jax.random.permutation(stream(seed, SHUFFLE, epoch), len(x))

    def loss(params: Any, rows: Array) -> Array:
        logits = network().apply(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    train_step = blr.make_step(tx, loss, jit=False)

    def step(carry: tuple[Any, Any], rows: Array) -> tuple[tuple[Any, Any], tuple[Array, Array]]:
        params, opt_state, info = train_step(*carry, rows)
        return (params, opt_state), (info.value, _score(name, hyper, carry[1], opt_state, params))

    rows = order[: batches * BATCH].reshape(batches, BATCH)
    carry, (values, scores) = jax.lax.scan(step, (run.params, run.opt_state), rows)
    return Run(
        *carry,
        run.losses.at[epoch].set(values.mean()),
        run.scores.at[epoch].set(scores.sum() / jnp.sqrt(batches)),
    )


def _score(name: str, hyper: Mapping[str, Any], before: Any, after: Any, params: Any) -> Array:
    """Return IVON's `statistic_score` of a step, 0 for the others."""
    if name != "ivon":
        return jnp.zeros(())
    (step,) = blr.diagnostics(before, after, params, b2=IVON_B2, weight_decay=hyper["weight_decay"])
    return step.statistic_score


def warn_of_scores(scores: Array) -> None:
    """Warn when the statistic of a whole run of IVON did not correlate with its noise."""
    score = float(jnp.sum(scores) / jnp.sqrt(len(scores)))
    if score < SMALLEST_SCORE:
        warnings.warn(
            f"IVON's curvature does not correlate with its noise (score {score:.1f}, below "
            f"{SMALLEST_SCORE}): the posterior is not learnt. Take the gradient at "
            "blr.sample(opt_state, params), as blr.make_step does.",
            stacklevel=2,
        )


def log_probabilities(run: Run, x: Array) -> Float[Array, "n 10"]:
    """The prediction at the parameters."""
    return jax.nn.log_softmax(network().apply(run.params, x))


@functools.partial(jax.jit, static_argnums=3)
def averaged_log_probabilities(run: Run, x: Array, seed: Any, samples: int) -> Float[Array, "n 10"]:
    """The prediction averaged over samples of the run's posterior."""
    q = blr.posterior(run.opt_state, run.params)
    return jnp.log(
        blr.predict(stream(seed, PREDICT), q, network().apply, x, samples=samples).probabilities
    )


def train(
    name: str,
    seed: int,
    settings: Settings,
    data: Data,
    folder: Path,
    advance: Callable[[int], Any],
) -> Run:
    """Trains from the last checkpoint in `folder`, or from the start, to the last epoch.

    Args:
        name: The optimizer.
        seed: Of initialisation, shuffling and noise.
        settings: The number of epochs is used.
        data: The training half is used.
        folder: Where checkpoints lie and are written.
        advance: Called with the number of epochs that are behind us since the last call.

    Returns:
        The finished run.
    """
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    manage = functools.partial(ocp.CheckpointManager, folder.absolute(), options=options)
    with files.quiet(), manage() as manager:
        run = _start(name, seed, settings.epochs, len(data.train_x))
        first, run = files.restored(manager, run, settings.epochs, folder)
        advance(first)
        for epoch in range(first, settings.epochs):
            run = _train_epoch(name, run, seed, epoch, data.train_x, data.train_y)
            done = epoch + 1
            if done % CHECKPOINT_EVERY == 0 or done == settings.epochs:
                files.save(manager, done, run, folder)
            advance(1)
    if name == "ivon":
        warn_of_scores(run.scores)
    return run


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _start(name: str, seed: Any, epochs: int, examples: int) -> Run:
    return start(name, DEFAULTS[name], seed, epochs, examples)


@functools.partial(jax.jit, static_argnums=0)
def _train_epoch(name: str, run: Run, seed: Any, epoch: Any, x: Array, y: Array) -> Run:
    return train_epoch(name, DEFAULTS[name], run, seed, epoch, x, y)
