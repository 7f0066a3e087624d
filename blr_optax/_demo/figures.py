"""One figure for every part of the demo: AdamW untuned beside IVON's averaged prediction.

a    intervals of 90 % on the test points of the first seed, sorted by prediction
b    test NLL over training, and reliability diagrams, all seeds pooled
c    entropies of the test images and of their shifted copy, all seeds pooled
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import metrics, plots
from blr_optax._demo.tasks import LEVEL

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from blr_optax._demo.outcome import Prediction
    from blr_optax._demo.tasks import Data

Rows = dict[str, list["Prediction"]]


def _panels(width: float, height: float, columns: int, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def intervals(rows: Rows, data: Data, results: dict[str, Any]) -> Figure:
    """What is inside the intervals, and what falls outside."""
    figure, panels = _panels(9, 3.6, len(rows), sharey=True)
    origin, unit = (float(x[0]) for x in (data.origin, data.unit))
    y = origin + unit * np.asarray(data.test_y[0])
    for (row, (first, *_)), ax in zip(rows.items(), panels, strict=True):
        ends = jax.jit(lambda found: (*found.interval(LEVEL), found.mean))(first.found)
        low, high, mean = (origin + unit * np.asarray(x) for x in ends)
        order = np.argsort(mean)
        inside = (low <= y) & (y <= high)
        at, band = np.arange(len(y)), {"color": plots.BLUE, "alpha": 0.3, "linewidth": 0}
        ax.fill_between(at, low[order], high[order], step="mid", label="90 % interval", **band)
        for which, color, name in (
            (inside, plots.GREY, "inside"),
            (~inside, plots.VERMILION, "outside"),
        ):
            some = which[order]
            ax.plot(at[some], y[order][some], "o", color=color, markersize=3, label=name)
        ax.set(
            xlabel="test points, sorted by prediction",
            title=f"{row}: {100 * inside.mean():.0f} % inside",
        )
        ax.title.set_size("medium")
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("progression of diabetes")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def label_noise(rows: Rows, data: Data, results: dict[str, Any]) -> Figure:
    """How the NLL goes on, and whether confidence is what it says."""
    figure, (left, *others) = _panels(11, 4.2, 1 + len(rows), width_ratios=[1.4, 1, 1])
    curves = results["curves"]
    names = [name for name in curves if name != "steps"]
    plots.training_curves(
        {name: curves[name]["nll"] for name in names}, steps=curves["steps"],
        ylabel="test NLL, mean over seeds", ax=left,
    )  # fmt: skip
    left.set_title("15 % of the labels are random", fontsize="medium")
    for (row, mine), ax in zip(rows.items(), others, strict=True):
        probs = jnp.exp(jnp.concatenate([p.found for p in mine]))
        plots.reliability_diagram(metrics.calibration(probs, data.test_y.ravel()), ax=ax)
        # The panel of counts, on top, is the axes made last.
        figure.axes[-1].set_title(row, fontsize="medium")
    return figure


def shifted(rows: Rows, data: Data, results: dict[str, Any]) -> Figure:
    """How unsure a prediction is where it should be."""
    figure, panels = _panels(9, 3.4, len(rows), sharex=True)
    table = {entry["prediction"]: entry for entry in results["table"]}
    for (row, mine), ax in zip(rows.items(), panels, strict=True):
        both = (jnp.concatenate([getattr(p, name) for p in mine]) for name in ("found", "shifted"))
        entropies = [metrics.entropy(jnp.exp(one)) for one in both]
        plots.entropy_histogram(*entropies, labels=("test", "shifted by two pixels"), ax=ax)
        ax.set_title(f"{row}: AUROC {table[row]['auroc']['mean']:.3f}", fontsize="medium")
    return figure


FIGURES: dict[str, Callable[[Rows, Data, dict[str, Any]], Figure]] = {
    "a": intervals,
    "b": label_noise,
    "c": shifted,
}
