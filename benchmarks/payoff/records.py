"""Jobs and their records: a line of JSON each, written when done; a second run leaves them out."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.payoff.tables import MissingExtraError, need

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of the records.

    Attributes:
        task, method, variant, split: its key.
        run: makes the record, without the key.
        hyper: the numbers it runs with; a record with others is out of date.
    """

    task: str
    method: str
    variant: str
    split: int
    run: Callable[[], Record]
    hyper: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        return f"{self.task}/{self.method}/{self.variant}/{self.split}"


def plain(x: Any) -> Any:
    """Numbers that JSON knows, to six digits: what is not finite is None."""
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, (str, bool, int)) or x is None:
        return x
    return float(f"{float(x):.6g}") if math.isfinite(float(x)) else None


def number(x: float | None) -> float:
    """A score out of a record: infinite where the run diverged, which was written as None."""
    return math.inf if x is None else x


class Records:
    """Records by key, in a file of JSON lines.

    A line that was cut off by an interrupt is left out, and its job runs again.
    """

    def __init__(self, path: Path | None):
        self.path, self.lock = path, threading.Lock()
        self.found: dict[str, Record] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self.found[record["key"]] = record

    def get(self, task: str, method: str, variant: str, split: int) -> Record | None:
        return self.found.get(f"{task}/{method}/{variant}/{split}")

    def of(self, task: str) -> list[Record]:
        """All records of a task, by key."""
        return [r for _, r in sorted(self.found.items()) if r["task"] == task]

    def done(self, job: Job) -> bool:
        """Whether the job has a record, made with the numbers that it would run with."""
        record = self.found.get(job.key)
        return record is not None and (job.hyper is None or record["hyper"] == plain(job.hyper))

    def add(self, job: Job, result: Record) -> None:
        key = {"key": job.key, "task": job.task, "method": job.method, "variant": job.variant,
               "split": job.split}  # fmt: skip
        record = key | plain(result)
        with self.lock:
            self.found[job.key] = record
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps(record) + "\n")

    def compact(self) -> None:
        """Write the file anew, in the order of the keys, without lines that were replaced."""
        if self.path is not None:
            lines = [json.dumps(r) + "\n" for _, r in sorted(self.found.items())]
            self.path.write_text("".join(lines))


def _in_threads(one: Callable[[Job], None], todo: list[Job], workers: int) -> None:
    """Run jobs in threads; after an interrupt only those that have begun are finished."""
    pool = ThreadPoolExecutor(workers)
    try:
        list(pool.map(one, todo))
    finally:
        pool.shutdown(cancel_futures=True)


def run_jobs(
    jobs: Iterable[Job], records: Records, workers: int = 1, progress: str | None = None
) -> list[str]:
    """Run the jobs without a record; return one line for every package that was missing."""
    todo = [job for job in jobs if not records.done(job)]
    bar = None
    if progress is not None:
        bar = need("tqdm").tqdm(total=len(todo), desc=progress, unit="run", dynamic_ncols=True)
    missing: set[str] = set()

    def one(job: Job) -> None:
        try:
            records.add(job, job.run())
        except MissingExtraError as error:
            missing.add(str(error))
        if bar is not None:
            bar.set_postfix_str(job.key, refresh=False)
            bar.update()

    try:
        if workers == 1:
            list(map(one, todo))
        else:
            _in_threads(one, todo, workers)
    finally:
        if bar is not None:
            bar.close()
    return sorted(missing)
