"""Habits of the project: floors that are tested, workflows, hooks, the benchmarks' history."""

import datetime
import importlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from tools import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.stem: path.read_text() for path in (ROOT / ".github" / "workflows").iterdir()}
HERE = {"machine": "x86_64", "cpus": 2, "device": "cpu", "backend": "cpu", "x64": False}


# --- versions -------------------------------------------------------------------------------------


def pins(lines: list[str], sign: str) -> dict[str, str]:
    """Package -> version of the lines `package sign version`."""
    return dict(line.split(f" {sign} ") for line in lines)


def test_the_oldest_versions_that_are_tested_are_the_floors():
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    tested = pins([line for line in lines if not line.startswith("#")], "==")
    assert tested == pins(PROJECT["dependencies"], ">=")
    assert tested["jax"] == tested["jaxlib"]
    for name in ("test", "nightly"):
        oldest, newest = jobs(name)["test" if name == "test" else "slow"]["strategy"]["matrix"][
            "include"
        ]
        assert oldest["constraint"] == "tests/oldest.txt" and not newest["constraint"]
        assert f">= {oldest['python']}" == PROJECT["requires-python"]
        assert f"Programming Language :: Python :: {newest['python']}" in PROJECT["classifiers"]


def test_the_hooks_have_the_version_of_the_lint():
    (bounds,) = (x for x in PROJECT["optional-dependencies"]["lint"] if x.startswith("ruff"))
    low, high = re.findall(r"\d+\.\d+", bounds)
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = (repo for repo in repos if "ruff" in repo["repo"])
    numbers = [tuple(map(int, v.split("."))) for v in (low, ruff["rev"].lstrip("v"), high)]
    assert numbers == sorted(numbers) and numbers[1] < numbers[2]


def test_the_changelog_is_dated():
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    date = heads[1].removeprefix(f"[{PROJECT['version']}] - ")
    assert datetime.date.fromisoformat(date)


# --- workflows ------------------------------------------------------------------------------------


def jobs(name: str) -> dict[str, Any]:
    return yaml.safe_load(WORKFLOWS[name])["jobs"]


def test_workflows_may_read_and_end():
    for name, text in WORKFLOWS.items():
        assert yaml.safe_load(text)["permissions"] == {"contents": "read"}, name
        assert "cancel-in-progress:" in text, name
        assert all("timeout-minutes" in job for job in jobs(name).values()), name
        pinned = re.findall(r"uses: \S+@(\S+)", text)
        assert pinned and all(re.fullmatch(r"v\d+|release/v\d+", pin) for pin in pinned), name
    (writing,) = (job for job in jobs("release").values() if "permissions" in job)
    assert writing["permissions"] == {"id-token": "write"} and writing["environment"]


def test_workflows_and_templates_call_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    template = (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text()
    called = re.findall(r"(?:`|run: )make ([a-z]+)", template + "".join(WORKFLOWS.values()))
    assert {"test", "slow", "lint", "docs"} <= set(called) <= targets


# --- the history of the benchmarks ----------------------------------------------------------------


@pytest.fixture
def history(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.history")


def test_rows_above_their_last_entry_are_named(history, tmp_path: Path):
    path = tmp_path / "history.jsonl"
    assert history.read(path) == [] and history.compare("step", HERE, {"ivon": 9.0}, path) == []

    history.append("step", HERE, {"ivon": 1.0, "adam": 2.0}, path, date="2026-01-01")
    history.append("step", HERE, {"ivon": 1.2}, path, date="2026-01-02")
    history.append("step", HERE | {"cpus": 8}, {"ivon": 0.1, "adam": 0.1}, path)
    history.append("families", HERE, {"ivon": 0.1, "adam": 0.1}, path)
    assert len(path.read_text().splitlines()) == len(history.read(path)) == 4

    # 1.3 times the last comparable entry is not above it, and versions do not matter:
    newer = HERE | {"jax": "9.9"}
    assert history.compare("step", newer, {"ivon": 1.3 * 1.2, "adam": 2.6, "new": 9.0}, path) == []
    assert history.compare("step", newer, {"ivon": 1.57, "adam": 3.0}, path) == [
        "step, adam: 3.00 is 1.50 times the 2.00 of 2026-01-01",
        "step, ivon: 1.57 is 1.31 times the 1.20 of 2026-01-02",
    ]
    assert history.compare("step", newer, {"ivon": 1.57}, path, limit=1.5) == []


def test_a_run_is_compared_with_those_before_it(history, tmp_path: Path, capsys):
    path = tmp_path / "history.jsonl"
    for ratio in (1.0, 1.5, 1.6):
        history.record("step", HERE, {"ivon": ratio}, path)
    today = datetime.date.today().isoformat()
    assert capsys.readouterr().out == (
        f"warning: step, ivon: 1.50 is 1.50 times the 1.00 of {today}\n"
    )
    assert [entry["ratios"]["ivon"] for entry in history.read(path)] == [1.0, 1.5, 1.6]


@pytest.mark.parametrize("name", ["step", "per_example", "families"])
def test_every_committed_ratio_is_in_the_history(history, name: str):
    result = json.loads((ROOT / "benchmarks" / "results" / f"bench_{name}_cpu.json").read_text())
    rows = importlib.import_module(f"benchmarks.bench_{name}").rows
    found = {
        row: round(x, 3) for row, x in rows(result.get("models", result.get("ratios"))).items()
    }
    entries = [entry for entry in history.read() if entry["benchmark"] == name]
    assert found and not [
        row for row, x in found.items() if x not in [e["ratios"].get(row) for e in entries]
    ]
