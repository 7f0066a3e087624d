"""The demo's output folder: every mishap is one line, and nothing that was there is lost."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blr_optax._demo import cli, folder, report, tasks
from blr_optax._demo import run as experiment

QUICK = ["--part", "b", "--seed", "0", "--steps", "4", "--samples", "2"]
RESULTS = ("results.json", tasks.PARTS["b"].figure)


def small_figure(*_):
    """Instead of a figure, which takes seconds."""
    return lambda path: path.write_text("figure")


@pytest.fixture(autouse=True, scope="module")
def often():
    """Scores and checkpoints after every second step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "EVERY", 2)
        patch.setattr(experiment, "CHECKPOINT_EVERY", 2)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, often):
    """A finished demo with two checkpoints."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "drawing", small_figure)
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main(["demo", "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture
def out(finished, tmp_path, monkeypatch):
    """A copy of it."""
    monkeypatch.setattr(report, "drawing", small_figure)
    return Path(shutil.copytree(finished, tmp_path / "out"))


def contents(out):
    return {name: (out / name).read_bytes() for name in RESULTS}


def checkpoint(out, step):
    return out / folder.STATE / "b-adamw" / str(step)


def spoil(path):
    """What a checkpoint's files hold is cut off, as by a full disk."""
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:3])


def fails(capfd, out, *arguments, code=2):
    """The one line with which the demo ends; nothing else is on stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *QUICK, *arguments, "--out", str(out)])
    error = capfd.readouterr().err
    assert stop.value.code == code
    assert error.count("\n") == 1, error
    return error


# --- checkpoints that cannot be read --------------------------------------------------------------


def test_a_damaged_checkpoint_is_given_up_for_the_one_before(out, capfd):
    before = contents(out)
    spoil(checkpoint(out, 4))
    assert cli.main(["demo", *QUICK, "--resume", "--out", str(out)]) == 0
    captured = capfd.readouterr()
    assert "checkpoint 4 is damaged; going on from 2" in captured.out
    assert captured.err == ""
    assert contents(out) == before
    assert checkpoint(out, 4).exists()


def test_damaged_checkpoints_are_an_error(out, capfd):
    before = contents(out)
    spoil(checkpoint(out, 2)), spoil(checkpoint(out, 4))
    error = fails(capfd, out, "--resume")
    assert "holds no checkpoint of this run that can be read" in error
    assert "leave --resume out" in error
    assert contents(out) == before


def test_a_checkpoint_of_another_run_is_an_error(out, capfd):
    """Of more steps, in the place of this one's."""
    other = checkpoint(out, 2).parents[1] / "b-adamw" / "7"
    shutil.rmtree(checkpoint(out, 2))
    checkpoint(out, 4).rename(other)
    assert "it is of another run" in fails(capfd, out, "--resume")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"settings": 3, "versions": {}}', "\xff"])
def test_damaged_settings_are_an_error(text, out, capfd):
    (out / folder.STATE / "settings.json").write_text(text, encoding="latin-1")
    assert "settings.json is damaged or no demo's" in fails(capfd, out, "--resume")
    assert checkpoint(out, 4).exists()


def test_missing_settings_are_an_error_where_there_are_checkpoints(out, capfd):
    (out / folder.STATE / "settings.json").unlink()
    assert "settings.json is damaged" in fails(capfd, out, "--resume")
    assert checkpoint(out, 4).exists()


# --- a full disk ----------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_a_checkpoint(out, capfd, monkeypatch):
    import orbax.checkpoint as ocp

    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        error = fails(capfd, out)
    assert "cannot write checkpoint 2" in error and "No space left on device" in error
    assert contents(out) == before
    assert cli.main(["demo", *QUICK, "--resume", "--out", str(out)]) == 0
    assert contents(out) == before


def test_a_full_disk_at_the_results(out, capfd, monkeypatch):
    """One of the new files does not fit: all old ones stay, and no half of a new one."""
    before = contents(out)
    monkeypatch.setattr(report, "drawing", lambda *_: full)
    assert "No space left on device" in fails(capfd, out, "--resume")
    assert contents(out) == before
    assert not list(out.rglob("*.partial"))


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from blr_optax._demo import cli, report
report.drawing = lambda *_: None
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(out):
    """Files of at most 20 kB: whatever orbax raises then, it is one line."""
    before = contents(out)
    command = [sys.executable, "-c", LIMITED, "demo", *QUICK, "--out", str(out)]
    # Programs that are kept for the next run would be too large as well.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write checkpoint 4" in done.stderr and done.stderr.count("\n") == 1
    assert contents(out) == before


# --- two at once, and stopping --------------------------------------------------------------------


def test_a_second_run_in_one_folder_is_refused(out, capfd):
    before = contents(out)
    with folder.alone(out):
        for arguments in ([], ["--resume"]):
            assert f"in use by another demo (process {os.getpid()})" in fails(
                capfd, out, *arguments
            )
    assert contents(out) == before
    assert checkpoint(out, 4).exists()


def test_the_lock_of_a_dead_run_is_taken_over(out):
    (out / f"{folder.STATE}.lock").write_text("999999999\n")
    with folder.alone(out):
        assert (out / f"{folder.STATE}.lock").read_text() == f"{os.getpid()}\n"


def test_a_run_that_is_stopped_keeps_the_old_results(out, capfd, monkeypatch):
    before = contents(out)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "advance", stop)
        error = fails(capfd, out, "--steps", "2", code=130)
    assert error == "interrupted; --resume goes on from the last checkpoint\n"
    assert contents(out) == before
    arguments = ["demo", *QUICK, "--steps", "2", "--resume", "--out", str(out)]
    assert cli.main(arguments) == 0
    assert json.loads((out / "results.json").read_text())["settings"]["steps"] == {"b": 2}


def test_stopping_waits_for_a_checkpoint():
    before, written = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), folder.uninterrupted():
        signal.raise_signal(signal.SIGINT)
        written.append(True)
    assert written
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("where", ["build", "run_demo"])
def test_stopping_is_one_line_wherever_it_comes(where, tmp_path, capfd, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, where, stop)
    fails(capfd, tmp_path, code=130)


def test_a_reader_that_leaves_is_no_error():
    """`blr-optax table | head -1` ends like other programs: the signal's status, and no word."""
    command = [sys.executable, "-m", "blr_optax._demo.cli", "table"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
