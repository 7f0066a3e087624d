"""The notebooks run as plain scripts, keep their promises, and are notebooks to jupytext."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from tools import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
SECONDS = 280  # generous, for a loaded machine; pytest's own limit is 300

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert "01_quickstart" in {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
@each
def test_runs_as_a_script(path: Path, tmp_path: Path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment.pop("XLA_FLAGS", None)  # a reader has no eight devices
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(path)],
        cwd=tmp_path,  # it must not depend on where it is started
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout


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
