"""Pruning at the mean, without retraining: zero the smallest weights of all matrices together.

Smallest by |m|, and for a posterior also by |m| / deviation.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.payoff import figures, network
from benchmarks.payoff.claims import Claim, unmeasured
from benchmarks.payoff.methods import Numbers, untuned
from benchmarks.payoff.page import cell, markdown
from benchmarks.payoff.records import Job, Records
from benchmarks.payoff.run import trained
from benchmarks.payoff.tasks import SPLITS, TASKS, Arrays, arrays

NAME = "pruning"
PLACES = ("mnist", "letter")  # the second is the study's, of the extra bench-data
SHARES = (0.0, 0.5, 0.7, 0.8)
MATRICES = ("w1", "w2", "w3")
# Label -> method and the numbers that differ from the untuned ones.
CONTESTANTS: dict[str, tuple[str, Numbers]] = {
    "AdamW 1e-3": ("adamw", {}),
    "AdamW 1e-3, weight decay 1": ("adamw", {"wd": 1.0}),
    "IVON recipe": ("ivon", {}),
    "IVON recipe, ess 10 N": ("ivon", {"temperature": 0.1}),
}
_apply = jax.jit(network.apply)


def real(weights: dict[str, np.ndarray], a: Arrays) -> dict[str, np.ndarray]:
    """Which entries of the matrices are not padding."""
    used = {"w1": a.features[:, None] > 0, "w2": True, "w3": a.classes > 0}
    return {k: np.broadcast_to(used[k], weights[k].shape) for k in MATRICES}


def pruned(
    weights: dict[str, np.ndarray], size: dict[str, np.ndarray], share: float, a: Arrays
) -> dict[str, np.ndarray]:
    """The weights without the given share of the matrices' entries, the smallest in size."""
    used = real(weights, a)
    every = np.concatenate([size[k][used[k]] for k in MATRICES])
    bound = np.sort(every)[round(share * len(every))]
    return {**weights, **{k: np.where(size[k] < bound, 0.0, weights[k]) for k in MATRICES}}


def run(task: str, label: str, split: int) -> dict[str, Any]:
    """Accuracy by criterion and share of zeros."""
    method, changed = CONTESTANTS[label]
    a = arrays(task, split)
    (found,), about = trained(TASKS[task].kind, method, changed, lambda member: a)
    weights, used = found["weights"], a.test_y >= 0
    sizes = {"size": {k: np.abs(weights[k]) for k in MATRICES}}
    if found["deviation"]:
        sizes["size over deviation"] = {
            k: np.abs(weights[k]) / found["deviation"][k] for k in MATRICES
        }

    def accuracy(size: dict[str, np.ndarray], share: float) -> float:
        logits = _apply(pruned(weights, size, share, a), a.test_x, a.classes)
        return float(100 * np.mean((np.asarray(logits).argmax(-1) == a.test_y)[used]))

    views = {name: {f"{share:g}": accuracy(size, share) for share in SHARES}
             for name, size in sizes.items()}  # fmt: skip
    return about | {"views": views}


def jobs(records: Records, optional: bool) -> list[Job]:
    """Every contestant on every split."""
    found = []
    for task in PLACES if optional else PLACES[:1]:
        for label, (method, changed) in CONTESTANTS.items():
            hyper = untuned(method, TASKS[task].kind.name) | changed
            for split in SPLITS:
                call = functools.partial(run, task, label, split)
                found.append(Job(f"{NAME}:{task}", method, label, split, call, hyper))
    return found


def values(records: Records, task: str, label: str, view: str) -> np.ndarray:
    """Accuracy, splits by shares."""
    method = CONTESTANTS[label][0]
    found = [records.get(f"{NAME}:{task}", method, label, s) for s in SPLITS]
    if any(r is None or view not in r["views"] for r in found):
        return np.full((1, len(SHARES)), np.nan)
    return np.array([[r["views"][view][f"{x:g}"] for x in SHARES] for r in found])


def _measured(records: Records) -> list[str]:
    ours = ("IVON recipe", "AdamW 1e-3")
    return [t for t in PLACES
            if not any(np.isnan(values(records, t, c, "size")).any() for c in ours)]  # fmt: skip


def claims(records: Records) -> list[Claim]:
    """Accuracy that the recipe loses at 70 % zeros."""
    text, demand = "accuracy lost at 70 % pruned, IVON recipe", "at most 8"
    found = []
    for task in _measured(records):
        lost = {}
        for label in ("IVON recipe", "AdamW 1e-3"):
            x = values(records, task, label, "size")
            lost[label] = float(np.mean(x[:, 0] - x[:, SHARES.index(0.7)]))
        says = f"{lost['IVON recipe']:.1f} (AdamW 1e-3 {lost['AdamW 1e-3']:.1f})"
        found.append(Claim(f"{text} ({task})", demand, says, lost["IVON recipe"] <= 8))
    return found or [unmeasured(text, demand)]


def section(records: Records) -> str:
    """Accuracy over the share of zeros."""
    text = ""
    for task in _measured(records):
        lines = []
        for label in CONTESTANTS:
            for view in ("size", "size over deviation"):
                x = values(records, task, label, view)
                if not np.isnan(x).any():
                    lines.append([f"{label}, by {view}", *(cell(y, 1) for y in x.T)])
        text += markdown([f"accuracy on {task}", *(f"{x:.0%} zeros" for x in SHARES)], lines) + "\n"
    if not text:
        return ""
    picture = "![accuracy of pruned networks](figures/payoff_pruning.png)"
    return f"## Pruning at the mean\n\n{text}\n{picture}\n"


def draw(records: Records, folder: Path) -> None:
    """Accuracy over the share of zeros."""
    tasks = _measured(records)
    if not tasks:
        return
    figure, axes = figures.plt.subplots(
        1, len(tasks), figsize=(4.5 * len(tasks), 3.2), layout="constrained", squeeze=False
    )
    for task, ax in zip(tasks, axes[0], strict=True):
        for label in CONTESTANTS:
            x = values(records, task, label, "size")
            ax.errorbar(SHARES, x.mean(0), x.std(0), marker="o", label=label)
        ax.set(xlabel="share of zeros", ylabel="accuracy (%)", title=task)
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figures.save(figure, folder, NAME)
