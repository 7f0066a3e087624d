"""Shifted digits: does a moved image look less certain than one of the training kind?

The test images moved two pixels down and two to the right, before they are standardised. Score: the
entropy of the prediction; AUROC: how often the moved image of a pair is the less certain one.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.payoff import figures
from benchmarks.payoff.claims import Claim, unmeasured
from benchmarks.payoff.methods import Numbers, untuned
from benchmarks.payoff.page import cell, markdown
from benchmarks.payoff.plan import chosen, final_view
from benchmarks.payoff.records import Job, Records
from benchmarks.payoff.run import trained, views_of
from benchmarks.payoff.tasks import SPLITS, TASKS, Arrays, padded, parts
from blr_optax import metrics

NAME, TASK, SHIFT = "shifted", "digits", 2
METHODS = ("adamw", "dropout", "ensemble", "sam", "ivon", "vogn", "evon", "bsam")


def moved(x: np.ndarray) -> np.ndarray:
    """Images of 8 x 8 moved down and to the right, zeros behind them."""
    images, found = x.reshape(-1, 8, 8), np.zeros((len(x), 8, 8))
    found[:, SHIFT:, SHIFT:] = images[:, :-SHIFT, :-SHIFT]
    return found.reshape(len(x), -1)


def run(method: str, split: int, hyper: Numbers) -> dict[str, Any]:
    """AUROC of every view."""
    kind = TASKS[TASK].kind

    def make(member: int) -> Arrays:
        return padded(kind, parts(TASKS[TASK], split, moved), split, member)

    found, about = trained(kind, method, hyper, make)
    used = int(make(0).test_mask.sum())
    views = {view: {"auroc": auroc(p["test"]["log_probs"][:used])}
             for view, p in views_of(found).items()}  # fmt: skip
    return about | {"views": views}


def auroc(log_probs: np.ndarray) -> float:
    """Of the entropy of the second half of the rows, against the first."""
    p = np.exp(log_probs.astype(float))
    doubt = metrics.entropy(p / p.sum(-1, keepdims=True))
    return float(metrics.auroc(doubt, np.arange(len(p)) >= len(p) // 2))


def jobs(records: Records, optional: bool) -> list[Job]:
    """Untuned, and tuned where the search of the tables is done."""
    found = []
    for method in METHODS:
        settings = {"untuned": untuned(method, "classification")}
        view = "mean" if method == "ensemble" else final_view(method)
        if tuned := chosen(TASK, method, view, records):
            settings["tuned"] = tuned
        for variant, hyper in settings.items():
            for split in SPLITS:
                call = functools.partial(run, method, split, hyper)
                found.append(Job(f"{NAME}:{TASK}", method, variant, split, call, hyper))
    return found


def values(records: Records, method: str, variant: str, view: str) -> np.ndarray:
    """AUROC by split."""
    found = [records.get(f"{NAME}:{TASK}", method, variant, s) for s in SPLITS]
    return np.array([np.nan if r is None else r["views"][view]["auroc"] for r in found], float)


def claims(records: Records) -> list[Claim]:
    """The recipe's samples over AdamW, both untuned."""
    text, demand = "shifted digits, AUROC: IVON recipe less AdamW 1e-3", "at least +0.02"
    ours = values(records, "ivon", "untuned", "samples")
    d = ours - values(records, "adamw", "untuned", "mean")
    if np.isnan(d).any():
        return [unmeasured(text, demand)]
    error = d.std(ddof=1) / np.sqrt(len(d))
    ensemble = values(records, "ensemble", "untuned", "samples").mean()
    says = f"{d.mean():+.3f} ± {error:.3f}, wins {np.sum(d > 0)} of {len(d)}"
    says += f" (IVON {ours.mean():.3f}, 5 AdamW {ensemble:.3f})"
    return [Claim(text, demand, says, bool(d.mean() >= 0.02))]


def lines(records: Records) -> list[tuple[str, np.ndarray]]:
    """Every method, variant and view that was measured."""
    found = []
    for method in METHODS:
        for variant in ("untuned", "tuned"):
            views = dict.fromkeys([final_view(method), "mean"])
            for view in views if method not in ("ensemble", "dropout") else ["samples"]:
                x = values(records, method, variant, view)
                if not np.isnan(x).all():
                    found.append((f"{method}, {variant}, {view}", x))
    return found


def section(records: Records) -> str:
    """A table."""
    found = lines(records)
    if not found:
        return ""
    table = markdown(["AUROC", TASK], [[label, cell(x)] for label, x in found])
    return (
        "## Shifted digits\n\nTest images moved by two pixels: how often the moved one of a pair "
        f"is predicted with more entropy.\n\n{table}\n![AUROC of shifted digits]"
        "(figures/payoff_shifted.png)\n"
    )


def draw(records: Records, folder: Path) -> None:
    """Dots with deviations."""
    found = lines(records)
    if not found:
        return
    size = (6, 1 + 0.22 * len(found))
    figure, ax = figures.plt.subplots(figsize=size, layout="constrained")
    for i, (label, x) in enumerate(found):
        ax.errorbar(x.mean(), -i, xerr=x.std(ddof=1), fmt="o", label=label,
                    color="tab:blue" if label.startswith("ivon") else "tab:gray")  # fmt: skip
    ax.set_yticks(-np.arange(len(found)), [label for label, _ in found], fontsize=7)
    ax.set_xlabel("AUROC of the entropy, shifted against test")
    ax.grid(alpha=0.3)
    figures.save(figure, folder, NAME)
