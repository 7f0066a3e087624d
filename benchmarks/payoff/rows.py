"""Rows of the tables: a method, a variant and a view, and what is compared between two of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from benchmarks.payoff.records import Records, number
from benchmarks.payoff.tasks import SPLITS, TASKS

CHOSEN = "chosen"  # mean or samples, by validation NLL of the split


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        label: as printed.
        method, variant, view: where its numbers stand in the records.
        cost: training runs that it takes on a new split.
    """

    label: str
    method: str
    variant: str
    view: str
    cost: int = 1


def _of(name: str, method: str) -> list[Row]:
    return [
        Row(f"{name} recipe", method, "untuned", "samples"),
        Row(f"{name} recipe, at its mean", method, "untuned", "mean"),
        Row(f"{name} tuned", method, "tuned", "samples"),
        Row(f"{name} tuned, at its mean", method, "tuned", "mean"),
    ]


ADAMW = Row("AdamW 1e-3", "adamw", "untuned", "mean")
ADAMW_STOPPED = Row("AdamW 1e-3 + early stopping", "adamw", "untuned", "stopped")
ADAMW_TUNED = Row("AdamW tuned", "adamw", "tuned", "mean")
ADAMW_TUNED_STOPPED = Row("AdamW tuned + early stopping", "adamw", "tuned, stopped", "stopped")
DROPOUT_TUNED = Row("MC dropout tuned", "dropout", "tuned", "samples")
ENSEMBLE = Row("5 AdamW tuned", "ensemble", "tuned", "samples", cost=5)
IVON, IVON_MEAN, IVON_TUNED, IVON_TUNED_MEAN = _of("IVON", "ivon")
IVON_CHOSEN = Row("IVON recipe, mean or samples by validation", "ivon", "untuned", CHOSEN)
POINTS = [
    ADAMW, ADAMW_STOPPED,
    Row("AdamW 1e-3, averaged weights", "adamw", "untuned", "ema"),
    ADAMW_TUNED, ADAMW_TUNED_STOPPED,
    Row("AdamW tuned, averaged weights", "adamw", "tuned", "ema"),
    Row("SAM", "sam", "untuned", "mean"), Row("SAM tuned", "sam", "tuned", "mean"),
    Row("MC dropout 0.1", "dropout", "untuned", "samples"), DROPOUT_TUNED, ENSEMBLE,
]  # fmt: skip
BAYES = [IVON, IVON_MEAN, IVON_TUNED, IVON_TUNED_MEAN, IVON_CHOSEN,
         *_of("VOGN", "vogn"), *_of("EVON", "evon"), *_of("bSAM", "bsam")]  # fmt: skip


def refitted(row: Row, how: str) -> Row:
    """A row with its temperature or its noise fitted on the validation rows."""
    label = {"+temperature": "temperature scaled", "+noise": "noise from validation"}[how]
    return dataclasses.replace(row, label=f"{row.label}, {label}", view=row.view + how)


CLASSES = [
    ADAMW, refitted(ADAMW, "+temperature"), *POINTS[1:4], refitted(ADAMW_TUNED, "+temperature"),
    *POINTS[4:], *BAYES[:1], refitted(IVON, "+temperature"), *BAYES[1:],
]  # fmt: skip
NUMBERS = [
    *POINTS, refitted(ADAMW_TUNED, "+noise"), refitted(ENSEMBLE, "+noise"),
    refitted(DROPOUT_TUNED, "+noise"), *BAYES, refitted(IVON_TUNED, "+noise"),
]  # fmt: skip


def score(records: Records, row: Row, task: str, split: int, metric: str) -> float:
    """A score; infinite where a run diverged, NaN where there is none yet."""
    record = records.get(task, row.method, row.variant, split)
    if record is None:
        return np.nan
    view = row.view
    if view == CHOSEN:
        nll = {v: record["views"][v]["valid_nll"] for v in ("mean", "samples")}
        view = min(nll, key=lambda v: number(nll[v]))
    return number(record["views"][view][metric])


def table(records: Records, row: Row, tasks: Iterable[str], metric: str) -> np.ndarray:
    """Scores by task and split."""
    return np.array([[score(records, row, t, s, metric) for s in SPLITS] for t in tasks])


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two rows on the same splits.

    Attributes:
        relative: geometric mean of the quotients; NaN where a score is not positive.
        difference: mean difference.
        error: its standard error over pairs.
        wins, pairs: how often the first row is the better one.
    """

    relative: float
    difference: float
    error: float
    wins: int
    pairs: int


def paired(records: Records, a: Row, b: Row, tasks: Iterable[str], metric: str = "nll") -> Paired:
    """Differences a - b over all tasks and splits that have both; lower is better."""
    tasks = list(tasks)
    x, y = (table(records, row, tasks, metric).ravel() for row in (a, b))
    both = ~np.isnan(x) & ~np.isnan(y)
    x, y = x[both], y[both]
    if not len(x):
        return Paired(np.nan, np.nan, np.nan, 0, 0)
    positive = bool(np.all((x > 0) & (y > 0)))
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = float(np.exp(np.mean(np.log(x) - np.log(y)))) if positive else np.nan
        d = x - y
        error = float(d.std(ddof=1) / np.sqrt(len(d))) if len(d) > 1 else np.nan
        return Paired(relative, float(d.mean()), error, int(np.sum(x < y)), len(d))


def of_kind(tasks: Iterable[str], kind: str) -> list[str]:
    """Tasks of a kind, in the order given."""
    return [t for t in tasks if TASKS[t].kind.name == kind]
