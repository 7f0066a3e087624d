"""The output folder of the demo: one run at a time, and nothing lost whatever ends it.

    DIR/results.json, *.png     replaced when a run has written all of its own, never before
    DIR/.blr_optax_demo         settings and checkpoints, with which `--resume` goes on
    DIR/.blr_optax_demo.lock    held by the run that writes here; its process number is in it

The system lets go of a lock when its process ends, however it ends, so the file of a run that was
killed is in nobody's way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STATE = ".blr_optax_demo"


class DemoError(Exception):
    """What the user can put right; the message says how."""


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the output folder for this run; it is made if need be.

    Raises:
        DemoError: when another run holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows, where nothing is locked
        yield
        return
    with open(out / f"{STATE}.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            who = file.read().strip() or "unknown"
            raise DemoError(
                f"{out} is in use by another demo (process {who}); wait for it, or give another "
                "--out"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def open_state(out: Path, record: dict[str, Any], resume: bool) -> Path:
    """The folder of checkpoints: emptied, or the one to go on from.

    Args:
        out: The output folder.
        record: What determines the numbers, as plain JSON values.
        resume: Go on.

    Raises:
        DemoError: when `resume` is asked for with other settings or versions than the saved ones,
            or these cannot be read.
    """
    state = out / STATE
    saved = state / "settings.json"
    if resume and (saved.exists() or _checkpoints(state)):
        _compare(_read(saved), record, out)
        return state
    if state.exists() and not resume:
        print(f"{out}: starting afresh, this run replaces an earlier demo's results", flush=True)
    # Without this file nothing is ever resumed, so it goes first and comes last.
    saved.unlink(missing_ok=True)
    if state.exists():
        shutil.rmtree(state)
    state.mkdir(parents=True)
    write_json(saved, record)
    return state


def _checkpoints(state: Path) -> bool:
    return any(state.glob("*/[0-9]*"))


def _read(saved: Path) -> dict[str, Any]:
    try:
        found = json.loads(saved.read_text())
        if all(isinstance(found[part], dict) for part in ("settings", "versions")):
            return found
        raise TypeError("it holds something else")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoError(
            f"--resume: {saved} is damaged or no demo's ({line(error)}); leave --resume out to "
            "start afresh"
        ) from error


def _compare(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    for part in new:
        for name, value in new[part].items():
            if (before := old.get(part, {}).get(name)) != value:
                raise DemoError(
                    f"--resume: {out} was made with {name} = {before}, this is {name} = {value}; "
                    "give the same options, or leave --resume out to start afresh"
                )


def line(error: BaseException) -> str:
    """The first line of what an exception says, or its name."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def restored(manager: Any, like: Any, steps: int, folder: Path) -> tuple[int, Any]:
    """The step and the runs of the last checkpoint that can be read; 0 and `like` without any.

    One that cannot be read is given up for the one before it, whose steps lead there again.

    Raises:
        DemoError: when there are checkpoints, but none that is of this run and whole.
    """
    import orbax.checkpoint as ocp

    shapes, broken, why = jax.tree.map(lambda x: (x.shape, x.dtype), like), [], ""
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            with uninterrupted():
                run = manager.restore(step, args=ocp.args.StandardRestore(like))
            if step > steps or jax.tree.map(lambda x: (x.shape, x.dtype), run) != shapes:
                raise ValueError("it is of another run")
        except Exception as error:  # of orbax, tensorstore, zarr, json, the file system
            broken.append(step)
            why = why or line(error)
            continue
        for step_lost in broken:
            print(f"{folder}: checkpoint {step_lost} is damaged; going on from {step}", flush=True)
            manager.delete(step_lost)
        return step, run
    if broken:
        raise DemoError(
            f"--resume: {folder} holds no checkpoint of this run that can be read ({why}); leave "
            "--resume out to start afresh"
        )
    return 0, like


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without orbax's own pages of errors, on the way to the one line that says what to do."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until this is over: orbax's threads would answer it with pages of errors."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def save(manager: Any, step: int, run: Any, folder: Path) -> None:
    """Write a checkpoint.

    Raises:
        DemoError: when it cannot be written.
    """
    import orbax.checkpoint as ocp

    try:
        _try_room(folder / "room.partial", 16 * sum(x.size for x in jax.tree.leaves(run)))
        with uninterrupted():
            manager.save(step, args=ocp.args.StandardSave(run))
    except Exception as error:  # of orbax, tensorstore, the file system
        raise DemoError(
            f"cannot write checkpoint {step} into {folder} ({line(error)}); make room, then "
            "--resume goes on from the last one"
        ) from error


def _try_room(path: Path, size: int) -> None:
    """Write and remove a file: a full disk is an OSError here, and noise from threads in orbax."""
    try:
        with open(path, "wb") as file:
            file.write(bytes(size))
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


def replace(files: dict[Path, Callable[[Path], Any]]) -> None:
    """Write files beside those that they replace; only when all are whole, they take their places.

    Args:
        files: For every path, what writes its content to another path.
    """
    partial = {path: path.with_name(path.name + ".partial") for path in files}
    try:
        for path, write in files.items():
            write(partial[path])
        for path in files:
            os.replace(partial[path], path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes all of the file or nothing of it, whenever the process is killed."""
    replace({path: lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n")})
