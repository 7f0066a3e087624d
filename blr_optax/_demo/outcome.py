"""What the runs of one part are worth: predictions on the test part, their scores, the comparison.

rows without validation data    AdamW; IVON at its mean; IVON averaged over samples
rows that look at a tenth       AdamW stopped early, tuned, both; IVON with its width fitted
wins                            seeds for which a row is better than AdamW, seed by seed
spread                          the sample standard deviation over the seeds, None with one seed
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

import blr_optax as blr
from blr_optax._demo import run as experiment
from blr_optax._demo.tasks import LEVEL, PARTS, TASKS, Data, auroc

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array

ADAMW, MEAN, TEMPERED = "AdamW", "IVON at its mean", "IVON, its width fitted"
STOPPED, TUNED, BOTH = (
    "AdamW, stopped early",
    "AdamW, tuned",
    "AdamW, tuned and stopped",
)
# What each score is called, in tables and sentences, and how far from its best a value is.
HEADINGS = {
    "coverage": "inside 90 % (%)",
    "accuracy": "accuracy (%)",
    "nll": "NLL",
    "rmse": "RMSE",
    "ece": "ECE",
    "auroc": "AUROC",
}
WORDS = {
    "coverage": "{} % of the points inside",
    "nll": "NLL {}",
    "auroc": "AUROC {}",
}
LOSS: dict[str, Callable[[float], float]] = {
    "coverage": lambda x: abs(x - LEVEL),
    "accuracy": lambda x: -x,
    "nll": lambda x: x,
    "rmse": lambda x: x,
    "ece": lambda x: x,
    "auroc": lambda x: -x,
}


class Prediction(NamedTuple):
    """One row for one seed: the prediction on the test part, and on its shifted copy."""

    row: str
    seed: int
    found: Any
    shifted: Array | None
    chosen: dict[str, float]


def averaged(samples: int) -> str:
    """The name of the row of averaged predictions."""
    return f"IVON, {samples} sample{'s' if samples > 1 else ''}"


@functools.partial(jax.jit, static_argnums=0)
def _at(task: str, params: Any, x: Array) -> Any:
    return TASKS[task].predict(0, [params], x, 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _average(task: str, samples: int, seed: Any, q: Any, x: Array) -> Any:
    # One key, and so one set of draws, for every width.
    return TASKS[task].predict(experiment.stream(seed, experiment.PREDICT), q, x, samples)


@functools.partial(jax.jit, static_argnums=0)
def _scores(task: str, found: Any, y: Array) -> dict[str, Array]:
    return TASKS[task].scores(found, y)


def predictions(
    part: str, runs: dict[str, experiment.Run], data: Data, settings: experiment.Settings
) -> list[Prediction]:
    """All rows for all seeds."""
    task, samples, found = PARTS[part].task, settings.samples, []
    runs = jax.device_get(runs)  # taken apart without a program

    def predict(row: int, way: Callable[[Array], Any]) -> tuple[Any, Any]:
        shifted = None if data.shifted_x is None else way(data.shifted_x[row])
        return way(data.test_x[row]), shifted

    for row, seed in enumerate(settings.seeds):
        ivon = jax.tree.map(lambda x, row=row: x[row], runs["ivon"])
        points = _adamw(part, settings, runs["adamw"], row)
        points[MEAN] = ivon.params, {}
        for name, (params, chosen) in points.items():
            both = predict(row, functools.partial(_at, task, params))
            found.append(Prediction(name, seed, *both, chosen))

        def score(q: Any, row: int = row, seed: int = seed) -> float:
            given = _average(task, samples, seed, q, data.val_x[row])
            return float(_scores(task, given, data.val_y[row])["nll"])

        q = blr.posterior(ivon.opt_state, ivon.params)
        fitted = blr.recipes.temper(q, score)
        for name, which, chosen in (
            (averaged(samples), q, {}),
            (TEMPERED, fitted.posterior, {"scale": fitted.scale}),
        ):
            both = predict(row, functools.partial(_average, task, samples, seed, which))
            found.append(Prediction(name, seed, *both, chosen))
    order = [ADAMW, MEAN, averaged(samples), STOPPED, TUNED, BOTH, TEMPERED]
    return sorted(found, key=lambda one: order.index(one.row))  # seeds stay in their order


def _adamw(
    part: str, settings: experiment.Settings, runs: experiment.Run, row: int
) -> dict[str, tuple[Any, dict[str, float]]]:
    """The parameters of AdamW's rows for one seed, and what validation chose."""
    mine = jax.tree.map(lambda x: x[row :: len(settings.seeds)], runs)  # a run for every decay
    found = np.asarray(mine.validation)
    tuned, both = int(np.argmin(found[:, -1])), int(np.argmin(found.min(axis=1)))
    decay = [{"weight_decay": one} for one in experiment.DECAYS]
    steps = np.minimum((found.argmin(axis=1) + 1) * experiment.EVERY, settings.of(part))
    stop: list[dict[str, float]] = [{"step": int(one)} for one in steps]

    def of(params: Any, index: int) -> Any:
        return jax.tree.map(lambda x: x[index], params)

    return {
        ADAMW: (of(mine.params, 0), {}),
        STOPPED: (of(mine.best, 0), stop[0]),
        TUNED: (of(mine.params, tuned), decay[tuned]),
        BOTH: (of(mine.best, both), {**decay[both], **stop[both]}),
    }


def scored(part: str, all_rows: list[Prediction], data: Data, seeds: tuple[int, ...]) -> list[Any]:
    """Every row and seed with its scores, as plain JSON values."""
    scored = []
    for p in all_rows:
        scores = dict(_scores(PARTS[part].task, p.found, data.test_y[seeds.index(p.seed)]))
        if p.shifted is not None:
            scores["auroc"] = jax.jit(auroc)(p.found, p.shifted)
        numbers = {name: float(scores[name]) for name in HEADINGS if name in scores}
        scored.append({"prediction": p.row, "seed": p.seed, **numbers, **p.chosen})
    return scored


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, spread and wins over AdamW, in the order of the runs."""
    first = {run["seed"]: run for run in runs if run["prediction"] == ADAMW}
    table = []
    for row in dict.fromkeys(run["prediction"] for run in runs):
        mine = [run for run in runs if run["prediction"] == row]
        entry: dict[str, Any] = {"prediction": row}
        for name in (name for name in HEADINGS if name in mine[0]):
            values = [run[name] for run in mine]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            wins = sum(LOSS[name](run[name]) < LOSS[name](first[run["seed"]][name]) for run in mine)
            entry[name] = {"mean": float(np.mean(values)), "spread": spread, "wins": int(wins)}
        table.append(entry)
    return table


def closing(part: str, results: dict[str, Any], samples: int) -> list[str]:
    """What the data say, in words."""
    runs, rows = results["runs"], {entry["prediction"]: entry for entry in results["table"]}
    ivon, score = averaged(samples), PARTS[part].headline
    seeds = sum(run["prediction"] == ADAMW for run in runs)

    def wins(a: str, b: str) -> int:
        ours, theirs = ([run[score] for run in runs if run["prediction"] == x] for x in (a, b))
        return sum(LOSS[score](x) < LOSS[score](y) for x, y in zip(ours, theirs, strict=True))

    def said(row: str) -> str:
        numbers = {name: format_number(name, rows[row][name]["mean"]) for name in PARTS[part].said}
        return " and ".join(WORDS[name].format(number) for name, number in numbers.items())

    names = [name for name in HEADINGS if name in rows[ivon]]
    worse = [
        HEADINGS[name].partition(" (")[0]
        for name in names
        if LOSS[name](rows[ivon][name]["mean"]) >= LOSS[name](rows[ADAMW][name]["mean"])
    ]
    heading = HEADINGS[score]
    return [
        f"Nothing tuned: IVON has {said(ivon)}, AdamW {said(ADAMW)}; IVON's {heading} is better "
        f"for {wins(ivon, ADAMW)} of {seeds} seeds. Not better: {', '.join(worse) or 'nothing'}.",
        f"With a validation tenth, AdamW reaches {said(STOPPED)} stopped early, {said(TUNED)} "
        f"tuned, {said(BOTH)} with both; IVON without it has the better {heading} for "
        f"{wins(ivon, STOPPED)}, {wins(ivon, TUNED)} and {wins(ivon, BOTH)} of {seeds} seeds.",
        "On that tenth, blr.recipes.temper chooses "
        + ", ".join(f"{run['scale']:g}" for run in runs if run["prediction"] == TEMPERED)
        + f" times IVON's width (0 is its mean) and reaches {said(TEMPERED)}, better than AdamW "
        f"with both for {wins(TEMPERED, BOTH)} of {seeds} seeds.",
    ]


def format_number(name: str, value: float) -> str:
    """A score as it is printed."""
    return f"{100 * value:.1f}" if name in ("accuracy", "coverage") else f"{value:.3f}"
