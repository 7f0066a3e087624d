"""What the continuous integration runs: some tests need a Python that only one of its jobs has."""

import re

from tools import ROOT


def test_the_fast_tests_run_on_old_and_new_python():
    """efax, one of the peers of the families, needs 3.12; the floor of pyproject.toml is below."""
    job = (ROOT / ".github" / "workflows" / "test.yml").read_text().partition("  lint:")[0]
    assert "run: make test\n" in job and "python-version: ${{ matrix.python }}" in job
    pythons = [tuple(map(int, v.split("."))) for v in re.findall(r'python: "([\d.]+)"', job)]
    project = (ROOT / "pyproject.toml").read_text()
    floor = re.search(r'requires-python = ">=\s*3\.(\d+)"', project)
    assert min(pythons) == (3, int(floor[1])) and max(pythons) >= (3, 12)
    assert re.search(r"\"efax >= [\d.]+; python_version >= '3\.12'\"", project)
