"""A demo that is killed, whenever it is, ends as an uninterrupted one; stopped, it says so."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tools import ROOT

from blr_optax._demo.folder import STATE

PROGRAM = """
import sys
from blr_optax._demo import cli, run
run.EVERY = run.CHECKPOINT_EVERY = 10
sys.exit(cli.main(sys.argv[1:]))
"""


def launch(
    out: Path, *arguments: str, steps: int = 400, stderr: int | None = None
) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Eight devices would only make it slower; what compiles cheaply stays (tests/conftest.py).
    flags = environment.get("XLA_FLAGS", "")
    environment["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    command = [sys.executable, "-c", PROGRAM, "demo", "--out", str(out), *arguments]
    command += ["--part", "b", "--seed", "0", "--samples", "4", "--steps", str(steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": stderr}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def tens_behind(out: Path) -> int:
    """Of the steps of both methods, by the numbers of their finished checkpoints."""
    folders = (out / STATE).glob("*/*")
    steps = {(f.parent.name, int(f.name)) for f in folders if f.name.isdigit()}
    return sum(max(n for run, n in steps if run == name) // 10 for name in dict(steps))


@pytest.mark.timeout(1500)
def test_killed_at_any_moment_it_ends_with_the_same_numbers(tmp_path):
    out, chance, kills = tmp_path / "killed", random.Random(0), 0
    for share in (5, 15, 15, 15, 15, 10):  # of the 80 checkpoints
        goal = tens_behind(out) + chance.randint(1, share)
        process = launch(out, "--resume")
        while process.poll() is None and tens_behind(out) < goal:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.2)  # ten steps and their checkpoint take less
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 4
    for arguments in (["--resume"], []):
        with launch(out if arguments else tmp_path / "whole", *arguments) as process:
            process.communicate()
        assert process.returncode == 0
    killed, whole = ((tmp_path / name / "results.json").read_text() for name in ("killed", "whole"))
    assert killed == whole


@pytest.mark.timeout(600)
def test_stopped_from_the_keyboard_it_says_so_in_one_line(tmp_path):
    with launch(
        tmp_path, steps=100_000, stderr=subprocess.PIPE
    ) as process:  # it is not done before
        while process.poll() is None and tens_behind(tmp_path) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130
    assert error == "interrupted; --resume goes on from the last checkpoint\n"
