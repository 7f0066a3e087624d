"""The history of the benchmarks: one line per run, and a comparison with the runs before.

`history.jsonl` has one JSON object per line: the date, the benchmark, the environment and the ratio
of every row. Ratios are to a plain contestant of the same process (optax's AdamW, a gradient,
another library), so that runs of different days can be compared; those of two platforms cannot.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

HISTORY = Path(__file__).parent / "history.jsonl"
# What two environments must share for their ratios to be comparable; versions may differ.
PLATFORM = ("machine", "cpus", "device", "backend", "x64")
LIMIT = 1.3


def read(path: Path = HISTORY) -> list[dict[str, Any]]:
    """All entries, oldest first; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(
    benchmark: str,
    environment: dict[str, Any],
    ratios: dict[str, float],
    path: Path = HISTORY,
    date: str | None = None,
) -> None:
    """Write one line at the end; `date` is today's unless it is given."""
    entry = {
        "date": datetime.date.today().isoformat() if date is None else date,
        "benchmark": benchmark,
        "environment": environment,
        "ratios": {row: round(ratio, 3) for row, ratio in ratios.items()},
    }
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def compare(
    benchmark: str,
    environment: dict[str, Any],
    ratios: dict[str, float],
    path: Path = HISTORY,
    limit: float = LIMIT,
) -> list[str]:
    """Return a warning for every row above `limit` times its last comparable entry.

    Comparable is an entry of the same benchmark on the same platform. It is looked up row by row,
    as a run may measure some rows only; a row without one gives no warning.
    """
    last = {}  # row -> (date, ratio); later lines replace earlier ones
    for entry in read(path):
        there = entry["environment"]
        if entry["benchmark"] == benchmark and all(there[k] == environment[k] for k in PLATFORM):
            last |= {row: (entry["date"], ratio) for row, ratio in entry["ratios"].items()}
    warnings = []
    for row in ratios.keys() & last.keys():
        now, (date, before) = ratios[row], last[row]
        if now > limit * before:
            times = f"{now:.2f} is {now / before:.2f} times the {before:.2f} of {date}"
            warnings.append(f"{benchmark}, {row}: {times}")
    return sorted(warnings)


def record(
    benchmark: str, environment: dict[str, Any], ratios: dict[str, float], path: Path = HISTORY
) -> None:
    """Print what became slower, and append the run to the history."""
    for warning in compare(benchmark, environment, ratios, path):
        print(f"warning: {warning}")
    append(benchmark, environment, ratios, path)
