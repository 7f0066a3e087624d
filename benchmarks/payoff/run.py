"""Scores of one method on one split, as a function to call."""

from __future__ import annotations

import time
from collections.abc import Callable
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


def trained(
    kind: Kind, method: str, hyper: dict[str, float] | None, make: Callable[[int], Arrays]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train every member of a method.

    Args:
        kind: of the tasks that share the program.
        method: a name in `METHODS`.
        hyper: numbers that differ from the untuned ones.
        make: member -> its arrays.

    Returns:
        What `train` returns for every member, and {"hyper", "seconds"}.
    """
    hyper = untuned(method, kind.name) | (hyper or {})
    found, seconds = [], 0.0
    for member in range(METHODS[method].members):
        a = make(member)
        program(method, kind, hyper, a)
        start = time.perf_counter()
        found.append(train(method, kind, hyper, a))
        seconds += time.perf_counter() - start
    return found, {"hyper": hyper, "seconds": seconds}


def views_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The views of a run; of several runs the average of their means, as "samples"."""
    if len(found) == 1:
        return found[0]["views"]
    means = [member["views"]["mean"] for member in found]
    return {"samples": {p: scores.averaged([m[p] for m in means]) for p in ("valid", "test")}}


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
    kind = TASKS[task].kind
    found, about = trained(kind, method, hyper, lambda member: arrays(task, split, member))
    return about | {
        "views": score_views(kind, views_of(found), arrays(task, split)),
        "curve": found[0]["curve"].tolist(),
    }
