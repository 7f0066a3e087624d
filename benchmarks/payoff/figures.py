"""Figures of the main tables, one for each claim."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.payoff import rows
from benchmarks.payoff.records import Records
from benchmarks.payoff.tasks import SPLITS

STYLE = {
    "AdamW 1e-3": ("tab:gray", "o"), "AdamW 1e-3 + early stopping": ("tab:gray", "s"),
    "AdamW tuned": ("black", "o"), "MC dropout tuned": ("tab:green", "D"),
    "5 AdamW tuned": ("tab:purple", "P"), "IVON recipe": ("tab:blue", "o"),
    "IVON recipe, at its mean": ("tab:blue", "s"), "IVON tuned": ("tab:red", "o"),
}  # fmt: skip
SHOWN = [rows.ADAMW, rows.ADAMW_STOPPED, rows.ADAMW_TUNED, rows.DROPOUT_TUNED, rows.ENSEMBLE,
         rows.IVON, rows.IVON_MEAN, rows.IVON_TUNED]  # fmt: skip


def save(figure: plt.Figure, folder: Path, name: str) -> None:
    """A PNG of moderate size, without a stamp that changes from run to run."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"payoff_{name}.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def measured(records: Records, tasks: list[str], metric: str) -> list[str]:
    """The tasks that have the two rows that every figure compares."""
    found = []
    for task in tasks:
        both = [
            rows.table(records, r, [task], metric)
            for r in (rows.ADAMW, rows.ADAMW_TUNED, rows.IVON)
        ]
        if not any(np.isnan(x).all() for x in both):
            found.append(task)
    return found


def _dots(ax: plt.Axes, records: Records, tasks: list[str], metric: str, minus: rows.Row | None):
    for i, row in enumerate(SHOWN):
        x = rows.table(records, row, tasks, metric)
        if minus is not None:
            x = x - rows.table(records, minus, tasks, metric)
        x = np.ma.masked_invalid(x)
        if x.mask.all():
            continue
        colour, marker = STYLE[row.label]
        at = np.arange(len(tasks)) + 0.75 * (i / (len(SHOWN) - 1) - 0.5)
        ax.errorbar(at, x.mean(1), x.std(1), fmt=marker, ms=5, lw=1, color=colour, label=row.label)
    ax.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    ax.grid(alpha=0.3, axis="y")


def draw(records: Records, tasks: list[str], folder: Path) -> list[str]:
    """All figures of the main tables; the names of those drawn."""
    drawn = []
    for kind, metric, title, minus in (
        ("classification", "nll", "test NLL, less that of AdamW tuned", rows.ADAMW_TUNED),
        ("classification", "ece", "expected calibration error", None),
        ("regression", "nll", "test NLL, less that of AdamW tuned", rows.ADAMW_TUNED),
        ("regression", "coverage", "coverage of 90 % intervals", None),
    ):
        shown = measured(records, rows.of_kind(tasks, kind), metric)
        if not shown:
            continue
        figure, ax = plt.subplots(figsize=(max(7.5, 1.2 * len(shown)), 4.2), layout="constrained")
        _dots(ax, records, shown, metric, minus)
        ax.set_ylabel(title)
        if minus is not None:
            ax.axhline(0, color="tab:gray", lw=1)
            ax.set_yscale("symlog", linthresh=0.1)
        if metric == "coverage":
            ax.axhline(0.9, color="tab:gray", lw=1)
        figure.legend(fontsize=8, ncols=4, loc="outside lower center")
        save(figure, folder, f"{kind}_{metric}")
        drawn.append(f"{kind}_{metric}")
    return drawn + curves(records, measured(records, tasks, "nll"), folder)


def curves(records: Records, tasks: list[str], folder: Path) -> list[str]:
    """Validation NLL while training, at the mean: who needs early stopping."""
    if not tasks:
        return []
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(2.4 * len(tasks), 2.8), layout="constrained", squeeze=False
    )
    for task, ax in zip(tasks, axes[0], strict=True):
        for row in (rows.ADAMW, rows.IVON):
            found = [records.get(task, row.method, row.variant, s) for s in SPLITS]
            y = np.array([r["curve"] for r in found if r is not None], float)
            x = np.linspace(0, 1, y.shape[1] + 1)[1:]
            colour = STYLE[row.label][0]
            ax.plot(x, np.nanmedian(y, 0), color=colour, label=row.label)
            ax.fill_between(x, np.nanmin(y, 0), np.nanmax(y, 0), color=colour, alpha=0.15)
        ax.set_title(task, fontsize=9)
        ax.set_xlabel("share of the steps", fontsize=8)
        ax.set_ylim(top=min(ax.get_ylim()[1], 3.0))
    axes[0, 0].set_ylabel("validation NLL")
    axes[0, 0].legend(fontsize=7)
    save(figure, folder, "curves")
    return ["curves"]
