"""Scores of one method on one split, as a function to call."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.payoff import scores
from benchmarks.payoff.methods import METHODS, untuned
from benchmarks.payoff.tasks import TASKS, Arrays, Kind, arrays
from benchmarks.payoff.training import program, train


def score_views(kind: Kind, views: dict[str, Any], a: Arrays) -> dict[str, dict[str, float]]:
    """Scores of every view of a run, as "view" and as "view+temperature" or "view+noise"."""
    score = scores.regression if kind.regression else scores.classification
    return {
        view + suffix: found
        for view, predicted in views.items()
        for suffix, found in score(**predicted, a=a).items()
    }


def run_one(
    task: str, method: str, split: int, hyper: dict[str, float] | None = None
) -> dict[str, Any]:
    """Train a method on a split of a task and score it.

    Args:
        task: a name in `TASKS`.
        method: a name in `METHODS`.
        split: its number, the seed too; 100 is for choosing settings.
        hyper: numbers that differ from the method's untuned ones.

    Returns:
        "views": scores at the "mean" (the last weights), "stopped" (best validation NLL), "ema"
        and, of methods that sample, averaged over "samples"; each also "+temperature"
        (classification) or "+noise" (regression), fitted on the validation rows. "curve":
        validation NLL at the mean while training. "hyper", and "seconds" without compiling.
    """
    kind, row = TASKS[task].kind, METHODS[method]
    hyper = untuned(method, kind.name) | (hyper or {})
    found, seconds = [], 0.0
    for member in range(row.members):
        a = arrays(task, split, member)
        program(method, kind, hyper, a)
        start = time.perf_counter()
        out = train(method, kind, hyper, a)
        seconds += time.perf_counter() - start
        found.append(out["views"])
    views = found[0]
    if row.members > 1:
        views = {"samples": {p: scores.averaged([m["mean"][p] for m in found])
                             for p in ("valid", "test")}}  # fmt: skip
    return {
        "hyper": hyper,
        "views": score_views(kind, views, a),
        "curve": out["curve"].tolist(),
        "seconds": seconds,
    }
