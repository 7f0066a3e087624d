"""`blr.table()`: every row names a function and a family that exist, and a test that runs."""

import ast
from pathlib import Path

import pytest

import blr_optax as blr
from blr_optax import cli

HERE = Path(__file__).parent


@pytest.mark.parametrize("row", blr.table(), ids=lambda row: f"{row.algorithm}")
def test_rows_name_what_exists(row):
    assert callable(getattr(blr, row.function))
    assert blr.families.get(row.family) is not None
    file, name = row.test.split("::")
    functions = {
        node.name: node
        for node in ast.parse((HERE / file).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert name in functions, f"{file} has no {name}"
    assert row.group in ("optimisation", "deep learning", "approximate inference")


def test_every_optimizer_has_a_row():
    """A new optimizer is one more row."""
    helpers = {
        "TorchIvon", "from_torch_ivon", "random_signs", "signal_to_noise", "to_torch_ivon", "whiten"
    }  # fmt: skip
    assert set(blr.optimizers.__all__) - helpers <= {row.function for row in blr.table()}


def test_the_command_prints_it(capsys):
    assert cli.main(["table"]) == 0
    printed = capsys.readouterr().out
    for row in blr.table():
        assert row.algorithm in printed
        assert row.approximation in printed
        assert row.test in printed
    lines = printed.splitlines()
    assert lines[0].split() == ["algorithm", "family", "approximation", "function", "test"]
    assert [line for line in lines if line.startswith("[")] == [
        "[optimisation]",
        "[deep learning]",
        "[approximate inference]",
    ]


def test_the_readme_shows_every_function():
    root = HERE.parent
    readme = (root / "README.md").read_text()
    for row in blr.table():
        assert f"`{row.function}`" in readme or f"`blr.{row.function}`" in readme, row.function
