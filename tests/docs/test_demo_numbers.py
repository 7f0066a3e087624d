"""The tables of the demo in README and docs are those of the stored run."""

import json

import pytest
from tools import ROOT

STORED = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["table"]
COLUMNS = {
    "README.md": ("accuracy", "nll", "ece", "auroc"),
    "docs/benchmarks.md": ("accuracy", "nll", "ece", "brier", "auroc"),
}


def cell(name: str, mean: float, spread: float) -> str:
    if name == "accuracy":
        return f"{100 * mean:.2f} ± {100 * spread:.2f}"
    return f"{mean:.4f} ± {spread:.4f}"


@pytest.mark.parametrize("page", COLUMNS)
def test_tables_of_the_demo(page: str):
    text = (ROOT / page).read_text()
    found = 0
    for row in STORED:
        cells = (cell(name, **row[name]) for name in COLUMNS[page])
        line = " | ".join((f"| {row['prediction']}", *cells)) + " |"
        if f"| {row['prediction']} | 9" in text:
            assert line in text
            found += 1
    assert found == {"README.md": 2, "docs/benchmarks.md": len(STORED)}[page]
