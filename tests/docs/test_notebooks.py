"""The notebooks are notebooks to jupytext; `test_notebooks_long.py` runs them."""

from pathlib import Path

import jupytext
import pytest
from tools import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert "01_quickstart" in {path.stem for path in NOTEBOOKS}


@each
def test_is_a_notebook(path: Path):
    notebook = jupytext.read(path)
    assert notebook.metadata["jupytext"]["text_representation"]["format_name"] == "percent"
    first, *rest = notebook.cells
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    code = [cell.source for cell in rest if cell.cell_type == "code"]
    assert len(code) >= 3
    assert any("assert " in source for source in code), "what the text claims is asserted"
    for number, source in enumerate(code):
        compile(source, f"{path.name} cell {number}", "exec")
