"""What the demo shows: progress, the table, `results.json` and the figures.

    AUROC   of the predictive entropy, test images against their shifted copy: the probability
            that a shifted image is the less certain one of a pair
    ECE     15 bins of equal width, as in `metrics.calibration`
    spread  the sample standard deviation over the seeds, absent with one seed

Nothing in `results.json` depends on when, where or in how many attempts the demo ran.
"""

from __future__ import annotations

import contextlib
import functools
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from blr_optax import metrics, plots
from blr_optax._demo import folder
from blr_optax._demo import run as experiment
from blr_optax._demo.run import LABELS, Data, Run, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from jaxtyping import Array, Float
    from rich.console import Console

FIGURES = ("reliability.png", "entropy.png", "training.png")
HEADINGS = {
    "accuracy": "accuracy (%)",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
    "auroc": "shifted AUROC",
}


class Prediction(NamedTuple):
    """One way to predict with one run, on the test half and on its shifted copy."""

    row: str
    optimizer: str
    seed: int
    log_probs: Float[Array, "m 10"]
    shifted: Float[Array, "m 10"]


def demo(settings: Settings, out: Path, resume: bool = False) -> dict[str, Any]:
    """Trains, prints the table, and writes `results.json` and the figures into `out`.

    Args:
        settings: What to train.
        out: The output folder, made if need be.
        resume: Go on from the checkpoints in `out` instead of starting afresh.

    Returns:
        What was written into `results.json`.

    Raises:
        DemoError: when an extra is missing, another run writes into `out`, a file cannot be
            written, or `resume` meets other settings or checkpoints that it cannot read.
    """
    experiment.require_extras()
    with folder.alone(out):
        return _demo(settings, out, resume)


def _demo(settings: Settings, out: Path, resume: bool) -> dict[str, Any]:
    state = folder.open_state(out, settings.record(), resume)
    data, console = experiment.load_data(), _console()
    runs: dict[tuple[str, int], Run] = {}
    pairs = [(name, seed) for name in settings.optimizers for seed in settings.seeds]
    with progress(console, len(pairs) * settings.epochs) as (advance, finished):
        for name, seed in pairs:
            title = f"{LABELS[name]} seed {seed}"
            run = experiment.train(
                name,
                seed,
                settings,
                data,
                state / f"{name}-{seed}",
                functools.partial(advance, title),
            )
            runs[name, seed] = run
            finished(
                f"{title}: {settings.epochs} epochs, training loss {float(run.losses[-1]):.4f}"
            )
    predictions = [p for pair, run in runs.items() for p in predict(*pair, run, data, settings)]
    results = {
        **settings.record(),
        "spread": "sample standard deviation over seeds",
        "runs": [
            {
                "prediction": p.row,
                "optimizer": p.optimizer,
                "seed": p.seed,
                **scores(p, data),
                "training_loss": np.asarray(runs[p.optimizer, p.seed].losses).tolist(),
            }
            for p in predictions
        ],
    }
    results["table"] = summary(results["runs"])
    results["comparison"] = comparison(results["table"])
    show(console, results)
    text = json.dumps(results, indent=2) + "\n"
    new: dict[Path, Callable[[Path], object]] = {
        out / name: save for name, save in draw(runs, predictions, data).items()
    }
    new[out / "results.json"] = lambda path: path.write_text(text)
    folder.replace(new)
    console.print(f"\nwritten: {', '.join(('results.json', *FIGURES))} in {out}", soft_wrap=True)
    return results


def predict(name: str, seed: int, run: Run, data: Data, settings: Settings) -> list[Prediction]:
    """At the parameters, and for IVON averaged over its posterior."""
    both = jnp.concatenate([data.test_x, data.shifted_x])
    ways = {LABELS[name]: experiment.log_probabilities(run, both)}
    if name == "ivon":
        ways = {"IVON at its mean": ways["IVON"]}
        samples = settings.samples
        ways[averaged(samples)] = experiment.averaged_log_probabilities(run, both, seed, samples)
    return [Prediction(row, name, seed, *jnp.split(ways[row], 2)) for row in ways]


def averaged(samples: int) -> str:
    """The name of the row of averaged predictions."""
    return f"IVON, {samples} sample{'s' if samples > 1 else ''}"


def scores(p: Prediction, data: Data) -> dict[str, float]:
    """The numbers of one row for one seed."""
    probs, labels = jnp.exp(p.log_probs), data.test_y
    doubt = metrics.in_vs_out(metrics.entropy(jnp.exp(p.shifted)), metrics.entropy(probs))
    values = {
        "accuracy": metrics.accuracy(probs, labels),
        "nll": metrics.nll(p.log_probs, labels, log=True).mean(),
        "ece": metrics.calibration(probs, labels).ece,
        "brier": metrics.brier(probs, labels).mean(),
        "auroc": metrics.auroc(*doubt),
    }
    return {name: float(value) for name, value in values.items()}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, in the order of the runs."""
    table = []
    for row in dict.fromkeys(run["prediction"] for run in runs):
        mine = [run for run in runs if run["prediction"] == row]
        entry: dict[str, Any] = {"prediction": row, "optimizer": mine[0]["optimizer"]}
        for name in HEADINGS:
            values = [run[name] for run in mine]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            entry[name] = {"mean": float(np.mean(values)), "spread": spread}
        table.append(entry)
    return table


def comparison(table: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the data says about IVON's averaged prediction, or None without both to compare."""
    rows = {entry["optimizer"]: entry for entry in table}  # of IVON the last: the averaged one
    if not {"adamw", "ivon"} <= set(rows):
        return None
    ivon, adamw = rows["ivon"], rows["adamw"]
    best = max(entry["accuracy"]["mean"] for entry in table)
    behind = 100 * (best - ivon["accuracy"]["mean"])
    return {
        "lower_nll_than_adamw": ivon["nll"]["mean"] < adamw["nll"]["mean"],
        "lower_ece_than_adamw": ivon["ece"]["mean"] < adamw["ece"]["mean"],
        "accuracy_points_behind_best": behind,
        "accuracy_within_half_a_point": behind <= 0.5,
    }


def show(console: Console, results: dict[str, Any]) -> None:
    """Prints the table, and the comparison in words."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("prediction", no_wrap=True)
    for heading in HEADINGS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in results["table"]:
        table.add_row(entry["prediction"], *(_cell(name, entry[name]) for name in HEADINGS))
    console.print(table)
    seeds = results["settings"]["seeds"]
    how = "mean ± sample standard deviation over seeds" if len(seeds) > 1 else "seed"
    console.print(f"{how} {', '.join(map(str, seeds))}; test half of the digits", highlight=False)
    if said := results["comparison"]:
        lines = [
            f"NLL {_than(said['lower_nll_than_adamw'])} than AdamW",
            f"ECE {_than(said['lower_ece_than_adamw'])} than AdamW",
            f"accuracy {said['accuracy_points_behind_best']:.2f} points behind the best",
        ]
        console.print(
            f"IVON's averaged prediction: {', '.join(lines)}", highlight=False, soft_wrap=True
        )


def _cell(name: str, number: dict[str, float | None]) -> str:
    scale, digits = (100, 2) if name == "accuracy" else (1, 4)
    values = [value * scale for value in number.values() if value is not None]
    return " ± ".join(f"{value:.{digits}f}" for value in values)


def _than(lower: bool) -> str:
    return "lower" if lower else "NOT lower"


def draw(
    runs: dict[tuple[str, int], Run], predictions: list[Prediction], data: Data
) -> dict[str, Callable[[Path], object]]:
    """The figures, by name what writes them: all seeds pooled, curves averaged."""
    from matplotlib.figure import Figure

    pooled: dict[str, list[Prediction]] = {}
    for p in predictions:
        pooled.setdefault(p.row, []).append(p)
    rows = [row for row in pooled if row not in ("SGD", "IVON at its mean")] or ["SGD"]
    figures = [Figure(figsize=(4.4 * len(rows), size), layout="constrained") for size in (5.4, 3.6)]
    panels = [figure.subplots(1, len(rows), squeeze=False)[0] for figure in figures]
    for row, upper, lower in zip(rows, *panels, strict=True):
        inside, outside = (
            jnp.exp(jnp.concatenate([getattr(p, part) for p in pooled[row]]))
            for part in ("log_probs", "shifted")
        )
        labels = jnp.tile(data.test_y, len(pooled[row]))
        plots.reliability_diagram(metrics.calibration(inside, labels), ax=upper)
        plots.entropy_histogram(
            metrics.entropy(inside), metrics.entropy(outside), labels=("test", "shifted"), ax=lower
        )
        pool = f" ({len(pooled[row])} seeds pooled)" if len(pooled[row]) > 1 else ""
        # The diagram's panel of counts, on top, is the axes made last.
        for ax in (upper.figure.axes[-1], lower):
            ax.set_title(f"{row}{pool}", fontsize="medium")
    names = dict.fromkeys(name for name, _ in runs)
    curves = {
        LABELS[name]: np.mean([run.losses for (n, _), run in runs.items() if n == name], axis=0)
        for name in names
    }
    epochs = np.arange(1, 1 + max(map(len, curves.values())))
    curve = plots.training_curves(
        curves, steps=epochs, xlabel="epoch", ylabel="training loss, mean over seeds", yscale="log"
    )
    how = {"format": "png", "dpi": 150, "bbox_inches": "tight"}
    return {
        name: functools.partial(figure.savefig, **how)
        for name, figure in zip(FIGURES, (*figures, curve), strict=True)
    }


def _console() -> Console:
    from rich.console import Console

    console = Console()
    # A file or a pipe has no width of its own, and the table should not be cut for it.
    return console if console.is_terminal else Console(width=110)


@contextlib.contextmanager
def progress(
    console: Console, epochs: int
) -> Iterator[tuple[Callable[[str, int], None], Callable[[str], None]]]:
    """A progress bar on a terminal, elsewhere one line for every finished run.

    Yields:
        `advance(title, epochs)` and `finished(line)`.
    """
    if not console.is_terminal:
        yield lambda title, epochs: None, functools.partial(print, flush=True)
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description:14}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
    )
    with bars.Progress(
        *columns, bars.TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("compiling", total=epochs)
        yield (
            lambda title, epochs: bar.update(task, advance=epochs, description=title),
            lambda line: None,
        )
