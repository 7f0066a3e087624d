"""What `check` returns: findings in words, and the numbers behind them."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

SEVERITIES = ("warning", "note")


class Finding(NamedTuple):
    """One thing that `check` found.

    Attributes:
        name: what it is called, the same in every version; the list is in `check`.
        severity: "warning" for what makes the posterior wrong, "note" for what is good to know.
        what: what was found, with its numbers.
        fix: what to write instead.
    """

    name: str
    severity: str
    what: str
    fix: str


class CheckReport(NamedTuple):
    """What `check` returns; true when nothing is wrong, and printed as text.

    Attributes:
        findings: warnings first.
        numbers: what was measured, by name.
        evaluations: how often the loss was evaluated, gradients included.
        unchecked: what could not be looked at, and how it could.
    """

    findings: tuple[Finding, ...]
    numbers: dict[str, float]
    evaluations: int
    unchecked: tuple[str, ...]

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that make the posterior wrong."""
        return tuple(found for found in self.findings if found.severity == "warning")

    @property
    def ok(self) -> bool:
        """Whether there is no warning; notes may remain."""
        return not self.warnings

    def __bool__(self) -> bool:
        return self.ok

    def __contains__(self, name: object) -> bool:
        """Whether there is a finding of this name: `"sum_loss" in report`."""
        return any(found.name == name for found in self.findings)

    def __str__(self) -> str:
        count = len(self.warnings)
        head = "nothing wrong found" if not count else f"{count} warning{'s' * (count > 1)}"
        lines = [f"check: {head}, {self.evaluations} evaluations of the loss"]
        for found in self.findings:
            lines.append(f"{found.severity} [{found.name}]")
            lines += textwrap.wrap(found.what, 96, initial_indent="  ", subsequent_indent="  ")
            lines += textwrap.wrap(found.fix, 96, initial_indent="  -> ", subsequent_indent="     ")
        for text in self.unchecked:
            lines += textwrap.wrap(text, 96, initial_indent="not checked: ", subsequent_indent="  ")
        if self.numbers:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in self.numbers.items())
            lines += textwrap.wrap(f"numbers: {shown}", 98, subsequent_indent="  ")
        return "\n".join(lines)


def short(value: float) -> str:
    """Return a number as text, as short as it can be read: 200, 0.05, 1.3e+06."""
    whole = abs(value) < 1e15 and value == round(value)  # not for infinities and what is no number
    return f"{value:.0f}" if whole else f"{value:.3g}"
