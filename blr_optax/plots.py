"""Figures from arrays: calibration, uncertainty, regression bands, training curves.

Each function takes arrays (of jax or numpy), draws on `ax` or on a new figure, and returns the
figure: nothing is shown and no global state of matplotlib is touched; no display is needed.
Matplotlib is imported when a figure is made: ``pip install 'blr_optax[plot]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import ArrayLike, Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from blr_optax.metrics import Calibration

__all__ = [
    "entropy_histogram",
    "regression_band",
    "reliability_diagram",
    "training_curves",
]

# Okabe & Ito (2008): told apart under every common colour blindness.
BLUE, ORANGE, GREEN, PINK, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
GREY = "#555555"
BOX = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}


def reliability_diagram(calibration: Calibration, *, ax: Axes | None = None) -> Figure:
    """Accuracy against confidence by bin, the gaps between them, and how many examples each holds.

    Args:
        calibration: From `metrics.calibration`, `metrics.adaptive_calibration`, or one class of
            `metrics.classwise_calibration` (``jax.tree.map(lambda x: x[k], ...)``).
        ax: Where to draw; its upper fifth becomes the panel of counts.

    Returns:
        The figure.

    Raises:
        ValueError: if `calibration` holds several classes.
        ImportError: without matplotlib.

    >>> from blr_optax import metrics
    >>> probs, labels = np.array([[0.8, 0.2], [0.3, 0.7]], np.float32), np.array([0, 0])
    >>> figure = reliability_diagram(metrics.calibration(probs, labels))
    >>> figure.axes[0].get_legend_handles_labels()[1]
    ['calibrated', 'accuracy', 'gap']
    """
    if not hasattr(calibration, "ece"):
        raise ValueError(
            f"calibration is a {type(calibration).__name__}; give "
            "metrics.calibration(probs, labels)."
        )
    if np.ndim(calibration.ece) != 0:
        raise ValueError(
            f"calibration has ece of shape {np.shape(calibration.ece)}; give one class of it, "
            "jax.tree.map(lambda x: x[k], calibration)."
        )
    ax = _axes(ax, figsize=(4.2, 5.2))
    above = _panel_above(ax)
    edges, count, confidence, accuracy = (np.asarray(x) for x in calibration[3:])
    filled = count > 0
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    count, confidence, accuracy = count[filled], confidence[filled], accuracy[filled]
    bars = {"x": left, "width": width, "align": "edge", "linewidth": 0.8}
    # Not filled: where accuracy is above confidence, its bar is seen behind the gap.
    # Orange, as light beside the white as it is beside the blue: one colour in both cases.
    gap = {"facecolor": "none", "hatch": "//", "edgecolor": ORANGE}

    ax.bar(height=accuracy, color=BLUE, edgecolor="white", label="accuracy", **bars)
    ax.bar(height=confidence - accuracy, bottom=accuracy, label="gap", **gap, **bars)
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    errors = f"ECE {float(calibration.ece):.3f}\nMCE {float(calibration.mce):.3f}"
    ax.text(0.97, 0.04, errors, transform=ax.transAxes, ha="right", va="bottom", bbox=BOX)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    ax.legend(loc="upper left", frameon=False)

    above.bar(height=count, color=GREY, edgecolor="white", **bars)
    above.set(ylabel="examples")
    above.tick_params(labelbottom=False)
    above.spines[["top", "right"]].set_visible(False)
    return cast("Figure", ax.figure)


def entropy_histogram(
    inside: Float[ArrayLike, "*n"],
    outside: Float[ArrayLike, "*m"],
    *,
    bins: int = 30,
    labels: tuple[str, str] = ("in distribution", "out of distribution"),
    ax: Axes | None = None,
) -> Figure:
    """Densities of the predictive entropy on two sets, over common bins.

    Args:
        inside: Entropies in nats where the model should be sure, such as `Predictive.total`.
        outside: Entropies where it should not be.
        bins: Number of bins from 0 to the largest entropy.
        labels: Names of the two sets.
        ax: Where to draw.

    Returns:
        The figure.

    Raises:
        ValueError: for entropies that are missing, negative or not finite.
        ImportError: without matplotlib.

    >>> (ax,) = entropy_histogram(np.array([0.1, 0.2]), np.array([0.4, 0.5]), bins=5).axes
    >>> print(ax.get_xlim()[1])
    0.5
    """
    ax = _axes(ax)
    sets = [np.ravel(_numbers(name, x)) for name, x in (("inside", inside), ("outside", outside))]
    for name, x in zip(("inside", "outside"), sets, strict=True):
        if not x.size or not np.all(np.isfinite(x)) or x.min() < -1e-3:
            found = f"between {x.min():.3g} and {x.max():.3g}" if x.size else "of no example"
            raise ValueError(f"{name}: entropies are finite and positive; got numbers {found}.")
    highest = max(float(x.max()) for x in sets) or 1.0
    edges = np.linspace(0, highest, bins + 1).tolist()
    for x, label, color in zip(sets, labels, (BLUE, VERMILION), strict=True):
        face = {"facecolor": (color, 0.3), "edgecolor": color, "linewidth": 1.5}
        ax.hist(x, edges, density=True, histtype="stepfilled", label=label, **face)
    ax.set(xlabel="predictive entropy (nats)", ylabel="density", xlim=(0, edges[-1]))
    ax.legend(frameon=False)
    return cast("Figure", ax.figure)


def regression_band(
    x: Float[ArrayLike, " n"],
    mean: Float[ArrayLike, " n"],
    epistemic: Float[ArrayLike, " n"],
    aleatoric: Float[ArrayLike, " n"] | float = 0.0,
    *,
    data: tuple[Float[ArrayLike, " m"], Float[ArrayLike, " m"]] | None = None,
    deviations: float = 2.0,
    ax: Axes | None = None,
) -> Figure:
    """Predicted mean with a band for the weights and a wider one for weights and noise.

    The bands are ``mean +- deviations sqrt(variance)`` with the variance ``epistemic``, and
    ``epistemic + aleatoric`` where that is wider.

    Args:
        x: Inputs, in any order; like the others, one number each, or a column of them.
        mean: Predicted means.
        epistemic: Variance over weights, as in `RegressionPredictive`.
        aleatoric: Variance of the noise.
        data: Observations ``(x, y)`` to show as points.
        deviations: Half-width of the bands in standard deviations.
        ax: Where to draw.

    Returns:
        The figure.

    Raises:
        ValueError: for a whole prediction, several outputs, other sizes, a negative variance.
        ImportError: without matplotlib.

    >>> x = np.array([0.0, 1.0])
    >>> (ax,) = regression_band(x, x, np.array([0.5, 2.0])).axes  # two deviations: 1 + 2 sqrt(2)
    >>> print(ax.collections[0].get_paths()[0].vertices[:, 1].max().round(2))
    3.83
    """
    ax = _axes(ax)
    given = {"x": x, "mean": mean, "epistemic": epistemic, "aleatoric": aleatoric}
    columns = {name: _column(name, value) for name, value in given.items()}
    sizes = {name: value.size for name, value in columns.items()}
    if set(sizes.values()) - {1, sizes["x"]}:
        raise ValueError(f"regression_band draws a curve over x; got sizes {sizes}.")
    for name in ("epistemic", "aleatoric"):
        if np.any(columns[name] < 0):
            raise ValueError(f"{name} is a variance; got {columns[name].min():.3g}.")
    arrays = np.broadcast_arrays(*columns.values())
    order = np.argsort(arrays[0])
    x, mean, epistemic, aleatoric = (v[order] for v in arrays)
    bands = [("epistemic", epistemic, 0.45)]
    if np.any(aleatoric > 0):
        bands.insert(0, ("epistemic + aleatoric", epistemic + aleatoric, 0.18))
    for label, variance, alpha in bands:
        half = deviations * np.sqrt(variance)
        name = f"{label} ({deviations:g} sd)"
        ax.fill_between(x, mean - half, mean + half, color=BLUE, alpha=alpha, lw=0, label=name)
    ax.plot(x, mean, color=BLUE, linewidth=1.8, label="mean")
    if data is not None:
        points = [_column(name, v) for name, v in zip(("data x", "data y"), data, strict=True)]
        ax.plot(*points, "o", color="black", markersize=3, label="data", zorder=3)
    ax.set(xlabel="x", ylabel="y")
    # Above the axes: inside, it would hide part of a band that fills them.
    ax.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return cast("Figure", ax.figure)


def training_curves(
    curves: Mapping[str, Float[ArrayLike, " t"]],
    *,
    steps: Float[ArrayLike, " t"] | None = None,
    xlabel: str = "step",
    ylabel: str = "loss",
    yscale: str = "linear",
    ax: Axes | None = None,
) -> Figure:
    """One line per named curve.

    Args:
        curves: Values by name, such as ``{"IVON": losses, "AdamW": losses}``.
        steps: Their common horizontal positions, by default ``0, 1, 2, ...`` for each.
        xlabel: Title of the horizontal axis.
        ylabel: Title of the vertical axis.
        yscale: "linear" or "log".
        ax: Where to draw.

    Returns:
        The figure.

    Raises:
        ValueError: for curves without names, and steps of another number.
        ImportError: without matplotlib.

    >>> (ax,) = training_curves({"IVON": [1.0, 0.5], "AdamW": [1.0, 0.6]}).axes
    >>> print(*(line.get_ydata()[-1] for line in ax.lines))
    0.5 0.6
    """
    ax = _axes(ax)
    ax.set_prop_cycle(color=[BLUE, VERMILION, GREEN, ORANGE, PINK])
    if not hasattr(curves, "items") or not curves:
        raise ValueError('curves: give values by name, such as {"IVON": losses}.')
    for name, values in curves.items():
        values = _column(f"curves[{name!r}]", values)
        if steps is not None and np.shape(steps) != values.shape:
            raise ValueError(
                f"curves[{name!r}] has {values.size} values, and steps {np.size(steps)}."
            )
        ax.plot(np.arange(len(values)) if steps is None else steps, values, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    ax.legend(frameon=False)
    return cast("Figure", ax.figure)


def _numbers(name: str, given: ArrayLike) -> np.ndarray:
    """Return an array of numbers.

    Raises:
        ValueError: for a whole prediction, or what is no array.
    """
    fields = getattr(given, "_fields", ())
    if fields:
        arrays = ", ".join(f".{field}" for field in fields)
        raise ValueError(f"{name} is a {type(given).__name__}; give one of its arrays, {arrays}.")
    array = np.asarray(given)
    if array.dtype.kind not in "biufV":  # V: bfloat16
        raise ValueError(f"{name}: give an array of numbers; got {type(given).__name__}.")
    return array.astype(np.float64)


def _column(name: str, given: ArrayLike) -> np.ndarray:
    """Return numbers along one axis, which an axis of size one may follow.

    Raises:
        ValueError: for several numbers each.
    """
    array = _numbers(name, given)
    if array.ndim > 1 and array.size != array.shape[0]:
        raise ValueError(f"{name} has shape {array.shape}; draw one output at a time, [:, 0].")
    return array.ravel()


def _panel_above(ax: Axes) -> Axes:
    """Cut a panel off the top of axes: a fifth of their cell, which layouts then know of."""
    cell = ax.get_subplotspec()
    if cell is None:  # placed by hand
        from mpl_toolkits.axes_grid1 import make_axes_locatable

        return make_axes_locatable(ax).append_axes("top", size="25%", pad=0.18, sharex=ax)
    upper, lower = cell.subgridspec(2, 1, height_ratios=(1, 4), hspace=0.08)
    ax.set_subplotspec(lower)
    return cast("Figure", ax.figure).add_subplot(upper, sharex=ax)


def _axes(ax: Axes | None, figsize: tuple[float, float] = (5.2, 3.6)) -> Axes:
    """Return the given axes, or new ones, without the top and right sides of the frame."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'blr_optax[plot]'") from error
    if ax is None:
        ax = Figure(figsize=figsize, layout="constrained").add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return ax
