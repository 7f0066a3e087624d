"""Tasks and their splits: standardised by the training rows, padded to one shape per kind.

Split k is a re-draw of the same rows: training, validation and test rows by a permutation of seed
k. Split 100 is for choosing settings only. Labels of a "+noise" task are redrawn uniformly with the
given probability in training, validation and test rows: the noise cannot be learnt.

Padding: features and classes that no task has are zeros and never the label; rows beyond the last
carry the label -1 and do not count. One program then serves every task of a kind.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.payoff.tables import TABLES

SEARCH_SPLIT = 100
SPLITS = (0, 1, 2, 3, 4)
BOUND = 5.0  # of a standardised feature: rare pixels would be 30 deviations out


@dataclasses.dataclass(frozen=True)
class Kind:
    """What all tasks of a kind share.

    Attributes:
        features, classes: of the padded network; one output for regression.
        rows: of the padded training, validation and test parts.
        hidden: widths of the two hidden layers.
        steps, batch: of every run.
        samples: of the posterior, or dropout masks, that a prediction averages.
    """

    name: str
    features: int
    classes: int
    rows: tuple[int, int, int]
    hidden: int
    steps: int
    batch: int = 50
    samples: int = 64

    @property
    def regression(self) -> bool:
        return self.name == "regression"


CLASSIFICATION = Kind("classification", 196, 26, (2000, 500, 2000), 100, 2000)
REGRESSION = Kind("regression", 96, 1, (2400, 500, 2000), 50, 3000)


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, how much of it trains, and its label noise.

    Attributes:
        table: its name in `TABLES`.
        train: training rows, a number or a share of all rows.
        valid: validation rows, the same.
        noise: probability that a label is redrawn.
        study: whether the settings of the recipe were chosen on its split 100.
    """

    table: str
    kind: Kind
    train: float
    valid: float
    noise: float = 0.0
    study: bool = False


TASKS: dict[str, Task] = {
    "digits": Task("digits", CLASSIFICATION, 800, 200),
    "digits+noise": Task("digits", CLASSIFICATION, 800, 200, 0.15),
    "mnist": Task("mnist", CLASSIFICATION, 1000, 250),
    "mnist+noise": Task("mnist", CLASSIFICATION, 1000, 250, 0.2, study=True),
    "satimage": Task("satimage", CLASSIFICATION, 1000, 250, study=True),
    "contraceptive": Task("contraceptive", CLASSIFICATION, 500, 125, study=True),
    "spambase": Task("spambase", CLASSIFICATION, 1000, 250),
    "letter": Task("letter", CLASSIFICATION, 2000, 500, study=True),
    "diabetes": Task("diabetes", REGRESSION, 0.7, 0.1),
    "autompg": Task("autompg", REGRESSION, 0.7, 0.1),
    "boston": Task("boston", REGRESSION, 0.7, 0.1),
    "concrete": Task("concrete", REGRESSION, 0.7, 0.1),
    "ames": Task("ames", REGRESSION, 0.7, 0.1),
    "sacramento": Task("sacramento", REGRESSION, 0.7, 0.1),
    "diamonds": Task("diamonds", REGRESSION, 2000, 250),
    "biomass": Task("biomass", REGRESSION, 0.7, 0.1),
}
CORE = ("digits", "digits+noise", "mnist", "mnist+noise", "diabetes", "autompg", "boston")
OPTIONAL = tuple(name for name in TASKS if name not in CORE)


class Arrays(NamedTuple):
    """A padded split: what a compiled program takes.

    Attributes:
        x, y: training rows; labels, or standardised targets.
        valid_x, valid_y, test_x, test_y: the other parts.
        valid_mask, test_mask: 1 for rows that count.
        features, classes: 1 for those that the task has.
        n: number of training rows.
        batches: (steps, batch) rows of every step, whole passes in random order.
        seed: of the first weights and of the method's noise.
    """

    x: np.ndarray
    y: np.ndarray
    valid_x: np.ndarray
    valid_y: np.ndarray
    valid_mask: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    test_mask: np.ndarray
    features: np.ndarray
    classes: np.ndarray
    n: np.ndarray
    batches: np.ndarray
    seed: np.ndarray


@functools.cache
def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The raw table, read once."""
    return TABLES[name]()


def passes(seed: int, rows: int, steps: int, batch: int) -> np.ndarray:
    """Row numbers of every step: whole passes, shuffled; what does not fill a batch goes on."""
    rng = np.random.default_rng([seed, 1])
    count = -(-steps * batch // rows)
    order = np.concatenate([rng.permutation(rows) for _ in range(count)])
    return order[: steps * batch].reshape(steps, batch).astype(np.int32)


def parts(
    task: Task, split: int, change: Callable[[np.ndarray], np.ndarray] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Standardised "train", "valid" and "test" rows of a split, not padded.

    `change` of the raw test rows is appended to the test part.
    """
    x, y = table(task.table)
    rng = np.random.default_rng([split, 0])
    order = rng.permutation(len(x))
    x, y = x[order], y[order]
    size = [int(k * len(x)) if k < 1 else int(k) for k in (task.train, task.valid)]
    size.append(task.kind.rows[2])
    if task.noise:
        redrawn = rng.random(len(y)) < task.noise
        y = np.where(redrawn, rng.integers(0, y.max() + 1, len(y)), y)
    center, deviation = x[: size[0]].mean(0), x[: size[0]].std(0)
    deviation = np.where(deviation > 1e-6 * (1 + np.abs(center)), deviation, np.inf)
    if task.kind.regression:
        y = ((y - y[: size[0]].mean()) / y[: size[0]].std()).astype(np.float32)
    edges = np.cumsum([0, *size])
    names = ("train", "valid", "test")
    found = {k: (x[a:b], y[a:b]) for k, a, b in zip(names, edges, edges[1:], strict=False)}
    if change is not None:
        test, labels = found["test"]
        found["test"] = np.concatenate([test, change(test)]), np.concatenate([labels, labels])
    return {
        k: (np.clip((x - center) / deviation, -BOUND, BOUND).astype(np.float32), y)
        for k, (x, y) in found.items()
    }


def padded(kind: Kind, found: dict, split: int, member: int = 0) -> Arrays:
    """The parts of a split, padded; `member` re-seeds weights, batches and noise of an ensemble."""
    widths = found["train"][0].shape[1]
    classes = 1 if kind.regression else int(max(y.max() for _, y in found.values())) + 1

    def pad(part: str, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, y = found[part]
        if len(x) > rows or widths > kind.features or classes > kind.classes:
            raise ValueError(
                f"the {part} part has {x.shape} and {classes} classes, more than {kind}"
            )
        full = np.zeros((rows, kind.features), np.float32)
        full[: len(x), :widths] = x
        labels = np.full(rows, 0.0 if kind.regression else -1, y.dtype)
        labels[: len(x)] = y
        return full, labels.astype(np.float32 if kind.regression else np.int32), (
            np.arange(rows) < len(x)
        ).astype(np.float32)  # fmt: skip

    x, y, mask = pad("train", kind.rows[0])
    valid, test = pad("valid", kind.rows[1]), pad("test", kind.rows[2])
    n, seed = int(mask.sum()), 1000 * member + split
    return Arrays(
        x, y, *valid, *test,
        (np.arange(kind.features) < widths).astype(np.float32),
        (np.arange(kind.classes) < classes).astype(np.float32),
        np.float32(n), passes(seed, n, kind.steps, kind.batch), np.int32(seed),
    )  # fmt: skip


def arrays(name: str, split: int, member: int = 0) -> Arrays:
    """A padded split of a task, by name."""
    task = TASKS[name]
    return padded(task.kind, parts(task, split), split, member)
