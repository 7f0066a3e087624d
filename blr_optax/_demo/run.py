"""The runs of the demo: AdamW untuned and IVON by its recipe, on the same network and batches.

Every choice, each the same for both methods unless it says otherwise:

    steps       3,000 on diabetes, 2,000 on digits, of 50 examples drawn anew for every step
    AdamW       optax.adamw, rate 1e-3, weight decay 1e-4, 5 % warm-up and a cosine to zero
    IVON        blr.recipes.ivon(params, num_examples, num_steps), task="regression" for diabetes:
                nothing else is given but the seed of its noise
    prediction  at the parameters; for IVON also averaged over 64 samples of its posterior
    validation  a tenth of the data, which neither uses; for the rows that say so, AdamW's step of
                the lowest NLL there (stopped early), its weight decay out of 1e-4, 0.1 and 1
                (tuned), or both, and the width of IVON's posterior (`blr.recipes.temper`)

The test part only ever scores. Initialisation, batches and noise are functions of (seed, purpose,
step) alone and nothing else is random, so a run that goes on from a checkpoint makes the very steps
of one that never stopped. All seeds and weight decays of a method are one program. A checkpoint
holds the whole state of them; the last one is their result. Where they live is in `folder`, data
and networks are in `tasks`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import blr_optax as blr
from blr_optax._demo import folder as files
from blr_optax._demo.folder import DemoError
from blr_optax._demo.tasks import PARTS, TASKS, Data
from blr_optax.optimizers._first_weights import warm_cosine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jaxtyping import Array, Float, Int, Key

METHODS = {"adamw": "AdamW", "ivon": "IVON"}
RATE, DECAYS = 1e-3, (1e-4, 0.1, 1.0)  # of AdamW; the first decay is the untuned one
BATCH, SAMPLES, SEEDS = 50, 64, (0, 1, 2)
EVERY, CHECKPOINT_EVERY = 50, 500  # steps between scores, and between checkpoints
LEAST_LEARNT, MOST_GROWTH = 0.05, 10.0
EXTRAS = ("flax", "matplotlib", "orbax.checkpoint", "rich", "sklearn")

# Purposes of randomness: each has its own stream of keys.
INITIALISE, SHUFFLE, NOISE, PREDICT = range(4)


class Cases(NamedTuple):
    """What differs between the runs of one program: one entry for every run."""

    seed: Int[Array, " runs"]
    row: Int[Array, " runs"]  # of the seed in the data
    decay: Float[Array, " runs"]


class Run(NamedTuple):
    """All of a run between two scores, which have a place for every time that they are taken.

    Attributes:
        best: the parameters with the lowest NLL on the validation part so far.
        validation: NLL there, at the parameters.
        scores: on the test part, at the parameters and for IVON averaged over samples.
    """

    params: Any
    opt_state: Any
    best: Any
    validation: Float[Array, " times"]
    scores: Float[Array, "times ways 3"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines the numbers of a demo, together with the versions of the libraries."""

    parts: tuple[str, ...] = tuple(PARTS)
    seeds: tuple[int, ...] = SEEDS
    steps: int | None = None
    samples: int = SAMPLES

    def of(self, part: str) -> int:
        """The number of steps of a part."""
        return self.steps or PARTS[part].steps

    def record(self) -> dict[str, Any]:
        """All settings and versions, as plain JSON values."""
        return {
            "settings": {
                "parts": list(self.parts),
                "seeds": list(self.seeds),
                "steps": {part: self.of(part) for part in self.parts},
                "samples": self.samples,
                "batch": BATCH,
                "every": EVERY,
                "adamw": {"learning_rate": RATE, "weight_decay": list(DECAYS)},
            },
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on."""
    modules = ("jax", "optax", "flax", "sklearn", "blr_optax")
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


def stream(seed: Any, purpose: int, index: Any = 0) -> Key[Array, ""]:
    """The key of a purpose: a function of nothing but its arguments."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), index)


def cases(method: str, seeds: tuple[int, ...]) -> Cases:
    """All runs of a method: AdamW with every weight decay, the untuned one first."""
    decays = DECAYS if method == "adamw" else (0.0,)
    every = [(seed, row, decay) for decay in decays for row, seed in enumerate(seeds)]
    seed, row, decay = (jnp.asarray(column) for column in zip(*every, strict=True))
    return Cases(seed, row, decay)


def recipe(task: str, params: Any, examples: int, steps: int, key: Any = 0) -> blr.recipes.Recipe:
    """IVON's; the task is what it may not guess."""
    return blr.recipes.ivon(params, examples, steps, task=task, key=key)


def optimizer(
    method: str, task: str, params: Any, examples: int, steps: int, decay: Any, key: Any = 0
) -> optax.GradientTransformation:
    """One of the two; `decay` may be traced."""
    if method == "ivon":
        return recipe(task, params, examples, steps, key).optimizer
    return optax.adamw(warm_cosine(RATE, steps), weight_decay=decay)


class Program(NamedTuple):
    """What a compiled program is made for."""

    method: str
    task: str
    steps: int
    samples: int
    every: int

    @property
    def times(self) -> int:
        """How often scores are taken."""
        return -(-self.steps // self.every)


@functools.partial(jax.jit, static_argnums=0)
def first_params(task: str, seed: Any) -> Any:
    """Of a seed, for both methods."""
    return TASKS[task].start(stream(seed, INITIALISE))


def start(program: Program, examples: int, cases: Cases) -> Run:
    """All runs before their first step."""
    drawn = {int(seed): first_params(program.task, int(seed)) for seed in cases.seed}
    rows = [jax.device_get(drawn[int(seed)]) for seed in cases.seed]
    return _start(program, examples, cases, jax.tree.map(lambda *x: np.stack(x), *rows))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(program: Program, examples: int, cases: Cases, params: Any) -> Run:
    def one(case: Cases, params: Any) -> Run:
        key = stream(case.seed, NOISE)
        tx = optimizer(
            program.method, program.task, params, examples, program.steps, case.decay, key
        )
        ways = 2 if program.method == "ivon" else 1
        validation = jnp.full(program.times, jnp.inf)
        return Run(params, tx.init(params), params, validation, jnp.zeros((program.times, ways, 3)))

    return jax.vmap(one)(cases, params)


@functools.partial(jax.jit, static_argnums=0)
def advance(program: Program, runs: Run, cases: Cases, time: Any, data: Data) -> Run:
    """Steps up to the next time at which scores are taken, and these."""
    task = TASKS[program.task]

    def one(pair: tuple[Run, Cases]) -> Run:
        run, case = pair
        train_x, train_y, val_x, val_y, test_x, test_y = (x[case.row] for x in data[:6])
        tx = optimizer(
            program.method, program.task, run.params, len(train_x), program.steps, case.decay
        )
        train_step = blr.make_step(tx, task.loss, jit=False)

        def step(index: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            key = stream(case.seed, SHUFFLE, index)
            rows = jax.random.randint(key, (BATCH,), 0, len(train_x))
            params, opt_state, _ = train_step(*carry, train_x[rows], train_y[rows])
            return params, opt_state

        first, last = time * program.every, jnp.minimum((time + 1) * program.every, program.steps)
        params, opt_state = jax.lax.fori_loop(first, last, step, (run.params, run.opt_state))
        key = stream(case.seed, PREDICT)
        found = task.scores(task.predict(key, [params], val_x, 1), val_y)["nll"]
        found = jnp.where(jnp.isfinite(found), found, jnp.inf)
        better = found < jnp.min(run.validation)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, run.best)
        ways: list[tuple[Any, int]] = [([params], 1)]
        if program.method == "ivon":
            ways.append((blr.posterior(opt_state, params), program.samples))
        scores = [task.scores(task.predict(key, q, test_x, n), test_y) for q, n in ways]
        return Run(
            params,
            opt_state,
            best,
            run.validation.at[time].set(found),
            run.scores.at[time].set(
                jnp.array([[way[name] for name in task.names] for way in scores])
            ),
        )

    # One after another: as fast as all at once here, and none depends on how many there are.
    return jax.lax.map(one, (runs, cases))


def train(
    program: Program,
    cases: Cases,
    data: Data,
    folder: Path,
    done: Callable[[int], Any],
) -> Run:
    """Trains from the last checkpoint in `folder`, or from the start, to the last step.

    Args:
        program: The method and its task, the number of steps.
        cases: The runs.
        data: The parts of all seeds.
        folder: Where checkpoints lie and are written.
        done: Called with the number of scores that are behind us since the last call.

    Returns:
        The finished runs.
    """
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    manage = functools.partial(ocp.CheckpointManager, folder.absolute(), options=options)
    with files.quiet(), manage() as manager:
        runs = start(program, data.train_x.shape[1], cases)
        steps, runs = files.restored(manager, runs, program.steps, folder)
        first = -(-steps // program.every)
        done(first)
        for time in range(first, program.times):
            runs = advance(program, runs, cases, time, data._replace(shifted_x=None))
            steps = min((time + 1) * program.every, program.steps)
            if steps % CHECKPOINT_EVERY == 0 or steps == program.steps:
                files.save(manager, steps, runs, folder)
            done(1)
    return runs


@functools.partial(jax.jit, static_argnums=0)
def learnt_and_growth(program: Program, first: Run, last: Run) -> tuple[Any, Any]:
    """Of every run of IVON: how much of its precision the data have moved, and how far."""
    b2 = 1.0 - 1.0 / program.steps

    def one(first: Run, last: Run) -> tuple[Any, Any]:
        (found,) = blr.diagnostics(first.opt_state, last.opt_state, last.params, b2=b2)
        return found.learnt, found.growth

    return jax.vmap(one)(first, last)


def warnings_of(learnt: float, growth: float) -> list[str]:
    """In words, what makes a posterior less than it seems."""
    said = []
    if learnt < LEAST_LEARNT:
        said.append(
            f"the data have moved {100 * learnt:.1f} % of IVON's deviations, less than "
            f"{100 * LEAST_LEARNT:.0f} %: they are those that the recipe started from, one for all "
            "weights of a layer. More examples, or a temperature below 1, let the data tell."
        )
    if growth > MOST_GROWTH:
        said.append(
            f"IVON's steps have become {growth:.0f} times as long, more than {MOST_GROWTH:.0f}, as "
            "its precision fell, and it may diverge: lower the learning rate, or raise b2."
        )
    return said
