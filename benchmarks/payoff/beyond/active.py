"""Active learning on digits: from 20 labelled images to 200, ten at a time.

A network is trained anew after every ten labels; the next ten are drawn at random, or are those of
the pool with the smallest margin between the two most probable classes, or those with the largest
mutual information of label and weights (BALD), which needs samples.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.payoff import figures
from benchmarks.payoff.claims import Claim, unmeasured
from benchmarks.payoff.methods import untuned
from benchmarks.payoff.page import cell, markdown
from benchmarks.payoff.plan import final_view
from benchmarks.payoff.records import Job, Records
from benchmarks.payoff.run import trained
from benchmarks.payoff.tasks import CLASSIFICATION, SPLITS, Task, padded, parts

NAME, TABLE = "active", "digits"
START, MORE, END, STEPS = 20, 10, 200, 500
POOL = 1000
KIND = dataclasses.replace(
    CLASSIFICATION, features=64, classes=10, rows=(END, POOL, 800), steps=STEPS, samples=16
)
CONTESTANTS = (
    ("adamw", "random"), ("adamw", "margin"), ("dropout", "random"), ("dropout", "margin"),
    ("dropout", "BALD"), ("ivon", "random"), ("ivon", "margin"), ("ivon", "BALD"),
)  # fmt: skip
SHOWN = (50, 100, 200)


def worth(rule: str, predicted: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """How much a label of every row of the pool is worth."""
    p = np.exp(predicted["log_probs"].astype(float))
    if rule == "margin":
        top = np.sort(p, -1)
        return top[:, -2] - top[:, -1]
    if rule == "BALD":
        entropy = -np.sum(p * np.log(np.maximum(p, 1e-30)), -1)
        return entropy - predicted["doubt"]
    return rng.random(len(p))


def run(method: str, rule: str, split: int) -> dict[str, Any]:
    """Test accuracy after every ten labels."""
    found = parts(Task(TABLE, KIND, POOL, 0), split)
    x, y = found["train"]
    rng = np.random.default_rng([split, 3])
    labelled = rng.permutation(POOL)[:START]
    accuracy, seconds, about = [], 0.0, {}
    while True:
        known = {"train": (x[labelled], y[labelled]), "valid": (x, y), "test": found["test"]}
        a = padded(KIND, known, split)
        (out,), about = trained(KIND, method, None, lambda member, a=a: a)
        seconds += about["seconds"]
        view = out["views"][final_view(method)]
        used = a.test_y >= 0
        hit = view["test"]["log_probs"].argmax(-1) == a.test_y
        accuracy.append(float(100 * hit[used].mean()))
        if len(labelled) == END:
            break
        value = worth(rule, view["valid"], rng)
        value[labelled] = -np.inf
        labelled = np.concatenate([labelled, np.argsort(-value)[:MORE]])
    at = np.arange(START, END + 1, MORE)
    shown = {str(k): accuracy[int(np.searchsorted(at, k))] for k in SHOWN}
    return about | {
        "seconds": seconds,
        "views": {"accuracy": {**shown, "mean": float(np.mean(accuracy))}},
        "curve": accuracy,
    }


def jobs(records: Records, optional: bool) -> list[Job]:
    """Every method with every rule."""
    return [
        Job(f"{NAME}:{TABLE}", method, rule, split, functools.partial(run, method, rule, split),
            untuned(method, "classification"))
        for method, rule in CONTESTANTS
        for split in SPLITS
    ]  # fmt: skip


def values(records: Records, method: str, rule: str, at: str) -> np.ndarray:
    """Accuracy by split, after a number of labels or as the mean over all."""
    found = [records.get(f"{NAME}:{TABLE}", method, rule, s) for s in SPLITS]
    return np.array([np.nan if r is None else r["views"]["accuracy"][at] for r in found])


def claims(records: Records) -> list[Claim]:
    """BALD with the recipe against the best that needs no posterior."""
    text = "active learning, mean accuracy: IVON with BALD less AdamW with margins"
    demand = "above 0"
    d = values(records, "ivon", "BALD", "mean") - values(records, "adamw", "margin", "mean")
    if np.isnan(d).any():
        return [unmeasured(text, demand)]
    margin = values(records, "ivon", "margin", "mean").mean()
    error = d.std(ddof=1) / np.sqrt(len(d))
    bald = values(records, "ivon", "BALD", "mean").mean()
    says = f"{d.mean():+.2f} ± {error:.2f}, wins {np.sum(d > 0)} of {len(d)}"
    says += f" (IVON: BALD {bald:.1f}, margins {margin:.1f})"
    return [Claim(text, demand, says, bool(d.mean() > 0))]


def section(records: Records) -> str:
    """Accuracy after some labels."""
    lines = []
    for method, rule in CONTESTANTS:
        line = [cell(values(records, method, rule, at), 1)
                for at in (*map(str, SHOWN), "mean")]  # fmt: skip
        if any(line):
            lines.append([f"{method}, {rule}", *line])
    if not lines:
        return ""
    table = markdown(["accuracy with", *(f"{k} labels" for k in SHOWN), "mean"], lines)
    return (
        f"## Active learning on digits\n\nFrom {START} to {END} labels, {MORE} at a time out of "
        f"{POOL:,} images.\n\n{table}\n![accuracy over labels](figures/payoff_active.png)\n"
    )


def draw(records: Records, folder: Path) -> None:
    """Accuracy over the number of labels."""
    figure, ax = figures.plt.subplots(figsize=(5, 3.2), layout="constrained")
    style = {"random": ":", "margin": "--", "BALD": "-"}
    colours = {"adamw": "tab:gray", "dropout": "tab:green", "ivon": "tab:blue"}
    for method, rule in CONTESTANTS:
        found = [records.get(f"{NAME}:{TABLE}", method, rule, s) for s in SPLITS]
        curves = np.array([r["curve"] for r in found if r is not None])
        if len(curves):
            ax.plot(np.arange(START, END + 1, MORE), curves.mean(0), style[rule],
                    color=colours[method], label=f"{method}, {rule}")  # fmt: skip
    if ax.lines:
        ax.set(xlabel="labels", ylabel="test accuracy (%)")
        ax.legend(fontsize=7)
        figures.save(figure, folder, NAME)
    figures.plt.close(figure)
