"""What the demo shows: progress, a table for every part, `results.json` and the figures.

Nothing in `results.json` depends on when, where or in how many attempts the demo ran.
"""

from __future__ import annotations

import contextlib
import functools
import json
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from blr_optax._demo import figures, folder, outcome
from blr_optax._demo import run as experiment
from blr_optax._demo.run import METHODS, Program, Run, Settings
from blr_optax._demo.tasks import PARTS, TASKS, Data

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console


def demo(settings: Settings, out: Path, resume: bool = False) -> dict[str, Any]:
    """Trains, prints the tables, and writes `results.json` and the figures into `out`.

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
    state, console = folder.open_state(out, settings.record(), resume), _console()
    results: dict[str, Any] = {**settings.record(), "parts": {}}
    new: dict[Path, Callable[[Path], object]] = {}
    total = sum(program(settings, part, "adamw").times for part in settings.parts) * len(METHODS)
    with progress(console, total) as (advance, finished):
        for part in settings.parts:
            data = TASKS[PARTS[part].task].load(settings.seeds, PARTS[part].noisy)
            runs = trained(part, settings, data, state, advance, finished)
            rows = outcome.predictions(part, runs, data, settings)
            results["parts"][part] = result(part, settings, data, runs, rows)
            new[out / PARTS[part].figure] = drawing(part, settings, data, rows, results)
    for part in settings.parts:
        show(console, part, results)
    text = json.dumps(results, indent=2) + "\n"
    new[out / "results.json"] = lambda path: path.write_text(text)
    folder.replace(new)
    for part in PARTS.values():  # of an earlier run with other parts
        if out / part.figure not in new:
            (out / part.figure).unlink(missing_ok=True)
    console.print(f"\nwritten: {', '.join(path.name for path in new)} in {out}", soft_wrap=True)
    return results


def program(settings: Settings, part: str, method: str) -> Program:
    """What a method runs in a part."""
    steps = settings.of(part)
    return Program(method, PARTS[part].task, steps, settings.samples, experiment.EVERY)


def trained(
    part: str,
    settings: Settings,
    data: Data,
    state: Path,
    advance: Callable[[str, int], None],
    finished: Callable[[str], None],
) -> dict[str, Run]:
    """The finished runs of a part, by method."""
    runs = {}
    for method, label in METHODS.items():
        title = f"part {part}, {label}"
        cases = experiment.cases(method, settings.seeds)
        done = functools.partial(advance, title)
        runs[method] = experiment.train(
            program(settings, part, method), cases, data, state / f"{part}-{method}", done
        )
        finished(f"{title}: {len(cases.seed)} runs of {settings.of(part)} steps")
    return runs


def result(
    part: str, settings: Settings, data: Data, runs: dict[str, Run], rows: list[outcome.Prediction]
) -> dict[str, Any]:
    """All numbers of a part, as plain JSON values."""
    made = program(settings, part, "ivon")
    first = experiment.start(made, data.train_x.shape[1], experiment.cases("ivon", settings.seeds))
    learnt, growth = experiment.learnt_and_growth(made, first, runs["ivon"])
    one = jax.tree.map(lambda x: x[0], first.params)
    recipe = experiment.recipe(made.task, one, data.train_x.shape[1], made.steps)
    chosen = ("ess", "b2", "peak", "clip_step", "noise", "prior")
    scored = outcome.scored(part, rows, data, settings.seeds)
    results: dict[str, Any] = {
        "title": PARTS[part].title,
        "examples": {
            name: int(getattr(data, f"{name}_y").shape[1]) for name in ("train", "val", "test")
        },
        "recipe": {name: float(getattr(recipe, name)) for name in chosen},
        "learnt": np.asarray(learnt).tolist(),
        "growth": np.asarray(growth).tolist(),
        "runs": scored,
        "table": outcome.summary(scored),
        "curves": curves(part, settings, runs),
    }
    results["closing"] = outcome.closing(part, results, settings.samples)
    results["warnings"] = experiment.warnings_of(float(np.min(learnt)), float(np.max(growth)))
    return results


def curves(part: str, settings: Settings, runs: dict[str, Run]) -> dict[str, Any]:
    """Scores on the test part over training, means over the seeds."""
    made, names = program(settings, part, "ivon"), TASKS[PARTS[part].task].names
    untuned = np.asarray(runs["adamw"].scores)[: len(settings.seeds), :, 0]
    mean, average = np.moveaxis(np.asarray(runs["ivon"].scores), 2, 0)
    ways = {
        outcome.ADAMW: untuned,
        outcome.MEAN: mean,
        outcome.averaged(settings.samples): average,
    }
    steps = [min((time + 1) * made.every, made.steps) for time in range(made.times)]
    means = {
        row: dict(zip(names, scores.mean(axis=0).T.tolist(), strict=True))
        for row, scores in ways.items()
    }
    return {"steps": steps, **means}


def drawing(
    part: str,
    settings: Settings,
    data: Data,
    rows: list[outcome.Prediction],
    results: dict[str, Any],
) -> Callable[[Path], object]:
    """What writes the figure of a part."""
    shown = [outcome.ADAMW, outcome.averaged(settings.samples)]
    mine = {row: [p for p in rows if p.row == row] for row in shown}
    figure = figures.FIGURES[part](mine, data, results["parts"][part])
    # No version of matplotlib in the file: the same figure is the same bytes.
    how = {"format": "png", "dpi": 100, "metadata": {"Software": None}}
    return functools.partial(figure.savefig, **how)


def show(console: Console, part: str, results: dict[str, Any]) -> None:
    """Prints the table of a part, and what it says in words."""
    from rich import box
    from rich.table import Table

    mine, score = results["parts"][part], PARTS[part].headline
    names = [name for name in outcome.HEADINGS if name in mine["table"][0]]
    n, seeds = mine["examples"], results["settings"]["seeds"]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{part}: {mine['title']}; {n['train']} train, {n['val']} validate, {n['test']} test",
        title_justify="left",
    )
    table.add_column("prediction", no_wrap=True)
    for name in names:
        table.add_column(outcome.HEADINGS[name], justify="right", no_wrap=True)
    table.add_column(f"wins ({outcome.HEADINGS[score]})", justify="right", no_wrap=True)
    for index, entry in enumerate(mine["table"]):
        wins = (
            "" if entry["prediction"] == outcome.ADAMW else f"{entry[score]['wins']}/{len(seeds)}"
        )
        cells = [_cell(name, entry[name]) for name in names]
        table.add_row(entry["prediction"], *cells, wins, end_section=index == 2)
    console.print(table)
    how = "mean ± sample standard deviation over seeds" if len(seeds) > 1 else "seed"
    console.print(
        f"{how} {', '.join(map(str, seeds))}; the lower rows use the validation tenth",
        soft_wrap=True,
    )
    for line in mine["closing"]:
        console.print(line, highlight=False, soft_wrap=True)
    for line in mine["warnings"]:
        console.print(f"warning: {line}", style="bold", highlight=False, soft_wrap=True)


def _cell(name: str, number: dict[str, Any]) -> str:
    values = [number[key] for key in ("mean", "spread") if number[key] is not None]
    return " ± ".join(outcome.format_number(name, value) for value in values)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    # A file or a pipe has no width of its own, and the table should not be cut for it.
    return console if console.is_terminal else Console(width=110)


@contextlib.contextmanager
def progress(
    console: Console, total: int
) -> Iterator[tuple[Callable[[str, int], None], Callable[[str], None]]]:
    """A progress bar on a terminal, elsewhere one line for every method of a part.

    Yields:
        `advance(title, times)` and `finished(line)`.
    """
    if not console.is_terminal:
        yield lambda title, times: None, functools.partial(print, flush=True)
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
        task = bar.add_task("compiling", total=total)
        yield (
            lambda title, times: bar.update(task, advance=times, description=title),
            lambda line: None,
        )
