"""What runs: the search on split 100, then every method, untuned and tuned, on the fresh splits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from benchmarks.payoff.methods import METHODS, Numbers, configurations, untuned
from benchmarks.payoff.records import Job, Record, Records
from benchmarks.payoff.run import run_one
from benchmarks.payoff.tasks import SEARCH_SPLIT, SPLITS, TASKS

# A variant and the view whose validation NLL chose its numbers.
TUNED, TUNED_STOPPED = "tuned", "tuned, stopped"


def final_view(method: str) -> str:
    """The view in which a method is to be used."""
    row = METHODS[method]
    return "samples" if row.sampled or row.members > 1 else "mean"


def variants(method: str) -> dict[str, str]:
    """Tuned variants of a method: name -> the view that the search looks at."""
    found = {TUNED: "mean" if METHODS[method].members > 1 else final_view(method)}
    return {**found, TUNED_STOPPED: "stopped"} if method == "adamw" else found


def job(task: str, method: str, variant: str, split: int, hyper: Numbers) -> Job:
    """One run of one method."""
    run = functools.partial(run_one, task, method, split, hyper)
    return Job(task, method, variant, split, run, hyper)


def _searched(task: str, method: str, split: int, hyper: Numbers) -> Record:
    """A run of which only the scores are kept: there are many, and the file stays small."""
    return {k: v for k, v in run_one(task, method, split, hyper).items() if k != "curve"}


def search_jobs(tasks: Iterable[str], methods: Iterable[str]) -> list[Job]:
    """Every configuration of every method on split 100."""
    return [
        dataclasses.replace(
            job(task, method, f"search {i}", SEARCH_SPLIT, hyper),
            run=functools.partial(_searched, task, method, SEARCH_SPLIT, hyper),
        )
        for method in dict.fromkeys(METHODS[m].search or m for m in methods)
        for task in tasks
        for i, hyper in enumerate(configurations(method, TASKS[task].kind.name))
    ]


def chosen(task: str, method: str, view: str, records: Records) -> Numbers | None:
    """The configuration of the lowest validation NLL in a view; None before the search is done."""
    search = METHODS[method].search or method
    best, least = None, float("inf")
    for i, hyper in enumerate(configurations(search, TASKS[task].kind.name)):
        record = records.get(task, search, f"search {i}", SEARCH_SPLIT)
        if record is None:
            return None
        found = record["views"][view]["valid_nll"]
        if found is not None and found < least:
            best, least = hyper, found
    return best


def final_jobs(tasks: Iterable[str], methods: Iterable[str], records: Records) -> list[Job]:
    """Untuned and tuned runs on the fresh splits."""
    found = []
    for method in methods:
        for task in tasks:
            settings = {"untuned": untuned(method, TASKS[task].kind.name)}
            for variant, view in variants(method).items():
                numbers = chosen(task, method, view, records)
                if numbers is not None:
                    settings[variant] = numbers
            found += [
                job(task, method, variant, split, hyper)
                for variant, hyper in settings.items()
                for split in SPLITS
            ]
    return found
