"""How much the learning rate matters: a 30-fold range of it, and ten times the recipe's."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from benchmarks.payoff import figures
from benchmarks.payoff.claims import Claim, unmeasured
from benchmarks.payoff.methods import untuned
from benchmarks.payoff.page import cell, markdown
from benchmarks.payoff.records import Job, Records, number
from benchmarks.payoff.run import run_one
from benchmarks.payoff.tasks import CORE, OPTIONAL, SPLITS, TASKS

NAME = "rates"
PLACES = ("mnist", "satimage")  # the second is the study's, of the extra bench-data
# Of the range of 30 and, last, beyond it.
RATES = {"ivon": (1.0, 3.0, 10.0, 30.0, 50.0), "adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
VIEW = {"ivon": "samples", "adamw": "mean"}
TIMES, WORSE = 10.0, 1.5


def _job(task: str, method: str, rate: float, split: int) -> Job:
    hyper = untuned(method, TASKS[task].kind.name) | {"lr": rate}
    run = functools.partial(run_one, task, method, split, hyper)
    return Job(f"{NAME}:{task}", method, f"lr {rate:g}", split, run, hyper)


def _recipe_rate(task: str) -> float:
    return untuned("ivon", TASKS[task].kind.name)["lr"]


def jobs(records: Records, optional: bool) -> list[Job]:
    """Every rate on one task; ten times the recipe's on all."""
    places = PLACES if optional else PLACES[:1]
    found = [
        _job(task, method, rate, split)
        for method, rates in RATES.items()
        for task in places
        for rate in rates
        for split in SPLITS
    ]
    for task in (*CORE, *(OPTIONAL if optional else ())):
        for factor in (1.0, TIMES):
            found += [_job(task, "ivon", factor * _recipe_rate(task), s) for s in SPLITS]
    return list({job.key: job for job in found}.values())


def nll(records: Records, task: str, method: str, rate: float) -> np.ndarray:
    """Test NLL by split; infinite where it diverged."""
    found = []
    for split in SPLITS:
        record = records.get(f"{NAME}:{task}", method, f"lr {rate:g}", split)
        if record is None:
            return np.full(len(SPLITS), np.nan)
        found.append(number(record["views"][VIEW[method]]["nll"]))
    return np.array(found)


def spread(records: Records, task: str, method: str) -> float:
    """Largest over smallest mean NLL of the rates within a range of 30."""
    means = [nll(records, task, method, rate).mean() for rate in RATES[method][:-1]]
    return float(max(means) / min(means))


def _measured(records: Records) -> list[str]:
    return [t for t in PLACES if not np.isnan(spread(records, t, "ivon"))]


def _tens(records: Records) -> list[tuple[str, float, float]]:
    """(task, mean NLL at the recipe's rate, at ten times it) of those that have both."""
    found = []
    for task in TASKS:
        rate = _recipe_rate(task)
        once, tens = (nll(records, task, "ivon", r).mean() for r in (rate, TIMES * rate))
        if not np.isnan(once + tens):
            found.append((task, float(once), float(tens)))
    return found


def _holds(once: float, tens: float) -> bool:
    """At most 1.5 times the NLL; of one near or below zero, as a likelihood per row."""
    return tens <= WORSE * once if once > 0.3 else tens <= once + 0.15


def claims(records: Records) -> list[Claim]:
    """The range over rates, and what ten times the rate does."""
    text, demand = "NLL, largest over smallest, learning rates within a factor 30", "at most 1.10"
    found = [
        Claim(f"{text} ({task})", demand,
              f"{spread(records, task, 'ivon'):.2f} (AdamW {spread(records, task, 'adamw'):.2f})",
              spread(records, task, "ivon") <= 1.10)
        for task in _measured(records)
    ] or [unmeasured(text, demand)]  # fmt: skip
    text, demand = "ten times the recipe's rate, NLL", "finite, at most 1.5 times, or a warning"
    tens = _tens(records)
    if not tens:
        return [*found, unmeasured(text, demand)]
    failed = [f"{task} {a:.3g} -> {b:.3g}" for task, a, b in tens if not _holds(a, b)]
    says = f"{len(tens) - len(failed)} of {len(tens)} tasks"
    says += "; not on " + ", ".join(failed) if failed else ""
    return [*found, Claim(text, demand, says, not failed)]


def section(records: Records) -> str:
    """A table of the rates, and of ten times the recipe's."""
    text = ""
    for task in _measured(records):
        for method, rates in RATES.items():
            head = [f"{method} on {task}, learning rate", *(f"{r:g}" for r in rates)]
            line = ["NLL", *(cell(nll(records, task, method, r)) for r in rates)]
            text += markdown(head, [line]) + "\n"
    if tens := _tens(records):
        lines = [[t, f"{a:.3f}", cell(np.array([b]))] for t, a, b in tens]
        text += markdown(["", "recipe's rate", "ten times"], lines)
    if not text:
        return ""
    picture = "![NLL over learning rates](figures/payoff_rates.png)\n" if _measured(records) else ""
    return f"## Learning rates\n\n{text}\n{picture}"


def draw(records: Records, folder: Path) -> None:
    """NLL over rates in units of the default."""
    tasks = _measured(records)
    if not tasks:
        return
    figure, axes = figures.plt.subplots(
        1, len(tasks), figsize=(4 * len(tasks), 3), layout="constrained", squeeze=False
    )
    for task, ax in zip(tasks, axes[0], strict=True):
        for method, rates in RATES.items():
            default = untuned(method, TASKS[task].kind.name)["lr"]
            y = np.array([nll(records, task, method, r) for r in rates])
            y = np.where(np.isfinite(y), y, np.nan)
            ax.errorbar(np.array(rates) / default, y.mean(1), y.std(1), marker="o", label=method)
        ax.set_xscale("log")
        ax.set_ylim(top=min(ax.get_ylim()[1], 3 * np.nanmin(y)))
        ax.set_xlabel("learning rate over the default")
        ax.set_ylabel("test NLL")
        ax.set_title(task, fontsize=9)
        ax.legend()
    figures.save(figure, folder, NAME)
