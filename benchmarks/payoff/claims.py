"""What is claimed, what was demanded, and what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.payoff import rows
from benchmarks.payoff.records import Records

NOMINAL = 0.9  # coverage of the intervals


@dataclasses.dataclass(frozen=True)
class Claim:
    """One line of the table of claims.

    Attributes:
        text: what is compared.
        demand: in words.
        measured: in words, with the number of pairs.
        met: whether it is; None when nothing was measured.
    """

    text: str
    demand: str
    measured: str
    met: bool | None


def unmeasured(text: str, demand: str) -> Claim:
    """A claim without numbers."""
    return Claim(text, demand, "not measured", None)


def ratio(
    records: Records, tasks: list[str], text: str, a: rows.Row, b: rows.Row, most: float,
    wins: float = 0.0,
) -> Claim:  # fmt: skip
    """NLL of one row over that of another, and its wins as a share of the pairs."""
    found = rows.paired(records, a, b, tasks)
    demand = f"ratio at most {most:g}" + (f", wins in {wins:.0%}" if wins else "")
    if not found.pairs:
        return unmeasured(text, demand)
    measured = f"{found.relative:.3f}, wins {found.wins} of {found.pairs}"
    return Claim(text, demand, measured, found.relative <= most and _enough(found, wins))


def _enough(found: rows.Paired, share: float) -> bool:
    return found.wins >= share * found.pairs - 1e-9


def wins(
    records: Records, tasks: list[str], text: str, a: rows.Row, b: rows.Row, least: float
) -> Claim:
    """How often one row has the lower NLL."""
    found, demand = rows.paired(records, a, b, tasks), f"wins in at least {least:.0%}"
    if not found.pairs:
        return unmeasured(text, demand)
    measured = f"{found.wins} of {found.pairs}, NLL {found.difference:+.3f} ± {found.error:.3f}"
    return Claim(text, demand, measured, _enough(found, least))


def average(
    records: Records, tasks: list[str], text: str, a: rows.Row, b: rows.Row, most: float,
    of: Callable[[Records, rows.Row, list[str]], float],
) -> Claim:  # fmt: skip
    """A number of one row, beside that of another."""
    x, y = of(records, a, tasks), of(records, b, tasks)
    if np.isnan(x):
        return unmeasured(text, f"at most {most:g}")
    return Claim(text, f"at most {most:g}", f"{x:.3f} against {y:.3f}", bool(x <= most))


def mean_ece(records: Records, row: rows.Row, tasks: list[str]) -> float:
    """ECE, averaged over the tasks that have the row."""
    return _mean(rows.table(records, row, tasks, "ece"))


def coverage_error(records: Records, row: rows.Row, tasks: list[str]) -> float:
    """|coverage of a task - 0.9|, averaged over the tasks that have the row."""
    found = rows.table(records, row, tasks, "coverage")
    found = found[~np.isnan(found).all(1)] if len(found) else found
    return float(np.mean(np.abs(np.nanmean(found, 1) - NOMINAL))) if len(found) else np.nan


def _mean(x: np.ndarray) -> float:
    x = x[~np.isnan(x)]
    return float(x.mean()) if len(x) else np.nan


def of_tables(records: Records, tasks: Iterable[str]) -> list[Claim]:
    """The claims that the main tables answer. Demands in wins are shares of the study's pairs."""
    classes = rows.of_kind(tasks, "classification")
    numbers = rows.of_kind(tasks, "regression")
    r = rows
    return [
        ratio(records, classes, "IVON recipe / AdamW 1e-3, both untuned, NLL", r.IVON, r.ADAMW,
              0.80, 33 / 35),
        average(records, classes, "mean ECE of the same", r.IVON, r.ADAMW, 0.070, mean_ece),
        ratio(records, classes, "IVON recipe / AdamW 1e-3 + early stopping, NLL", r.IVON,
              r.ADAMW_STOPPED, 1.02),
        ratio(records, classes, "IVON tuned / AdamW tuned, NLL", r.IVON_TUNED, r.ADAMW_TUNED, 1.02),
        ratio(records, classes, "IVON tuned / 5 AdamW tuned, NLL, at a fifth of the training cost",
              r.IVON_TUNED, r.ENSEMBLE, 1.03),
        wins(records, numbers, "regression, learnt noise: IVON recipe v AdamW 1e-3", r.IVON,
             r.ADAMW, 34 / 40),
        wins(records, numbers, "regression, learnt noise: IVON recipe v AdamW tuned", r.IVON,
             r.ADAMW_TUNED, 30 / 40),
        average(records, numbers, "regression: coverage error of 90 % intervals, the same", r.IVON,
                r.ADAMW, 0.05, coverage_error),
        wins(records, numbers, "regression, noise from validation: IVON tuned v AdamW tuned",
             r.refitted(r.IVON_TUNED, "+noise"), r.refitted(r.ADAMW_TUNED, "+noise"), 23 / 40),
    ]  # fmt: skip
