"""Shapes are as annotated in everything that the tests of families and predictions do."""

import os
import subprocess
import sys

import pytest
from tools import ROOT

FILES = ("families", "test_distribution.py", "test_metrics.py", "test_predict.py")
# Calls that are errors: those that check annotations would come first.
ERRORS = ("bad", "refus", "error", "options_are_checked")


@pytest.mark.timeout(1200)  # what it runs has tests with timeouts of their own
def test_shapes_are_as_annotated():
    options = ["-q", "-m", "not slow", "-k", " and ".join(f"not {name}" for name in ERRORS)]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{file}" for file in FILES)]
    environment = {**os.environ, "BLR_SHAPES": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]
