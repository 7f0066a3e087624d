"""Seeded faults: every mutant of mutants.toml must fail the tests that it names.

    python tests/mutants.py [--check] [--only WORDS] [--jobs N] [--old CHECKOUT]

A mutant is a copy of the package with one fault, in a temporary folder; the working tree is not
touched. It is killed when pytest says that tests failed. Whatever else goes wrong (a test that
does not exist, a copy that does not import, a time-out) is an error, and proves nothing.

pytest starts once for each job. Before it collects anything it makes a process for each mutant,
so that jax is imported once, and the package and the tests are imported by each mutant.
"""

import argparse
import ast
import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple, TextIO

import pytest

ROOT = Path(__file__).parents[1]
MUTANTS = Path(__file__).with_suffix(".toml")
SECONDS = 240  # for the tests of one mutant
NO_MUTANT = 9  # pytest's exit status where the package is not the copy, or does not import
# What tests/conftest.py sets, for older suites.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


class Mutant(NamedTuple):
    """A fault and the tests that notice it.

    Attributes:
        file: under blr_optax.
        old: text that occurs once in the file.
        new: what stands there instead.
        tests: pytest's names of tests, under tests/.
        about: what the fault is.
    """

    file: str
    old: str
    new: str
    tests: list[str]
    about: str

    def fault(self, source: str) -> str:
        if source.count(self.old) != 1:
            raise ValueError(f"{self.old!r} occurs {source.count(self.old)} times in {self.file}")
        return source.replace(self.old, self.new)

    @property
    def module(self) -> str:
        parts = Path("blr_optax", self.file).with_suffix("").parts
        return ".".join(part for part in parts if part != "__init__")


class Suite(NamedTuple):
    """Where the tests are.

    Attributes:
        root: a checkout.
        old: whether tests may lie in other files, and be named after a line of the contract.
    """

    root: Path
    old: bool = False

    def find(self, name: str) -> str | None:
        """The name of a test as this suite has it, None if it has no such function."""
        path, rest = name.split("::")
        function, parameters = re.fullmatch(r"(\w+)(.*)", rest).groups()
        place = self.root / "tests" / path
        places = [place, place.with_stem(f"{place.stem}_long")]
        if self.old:
            places = sorted(
                self.root.glob("tests/**/test_*.py"), key=lambda p: p.stem != place.stem
            )
        for place in places:
            for known in functions(place):
                if known == function or (self.old and bare(known) == function):
                    return f"{place.relative_to(self.root)}::{known}{parameters}"
        return None


class Verdict(NamedTuple):
    """killed, survived or error, and why."""

    word: str
    why: str = ""


def load() -> list[Mutant]:
    return [Mutant(**entry) for entry in tomllib.loads(MUTANTS.read_text())["mutant"]]


@functools.cache
def functions(path: Path) -> list[str]:
    """The functions that a file has, none if there is no such file."""
    body = ast.parse(path.read_text()).body if path.exists() else []
    return [node.name for node in body if isinstance(node, ast.FunctionDef)]


def bare(function: str) -> str:
    """The name of a test without the line of the contract."""
    return re.sub(r"^test_c\d+_", "test_", function)


def copy_with(mutant: Mutant, folder: Path) -> None:
    """The package with its fault; compiled files of the original could pass for the copy's."""
    package = folder / "blr_optax"
    shutil.copytree(ROOT / "blr_optax", package, ignore=shutil.ignore_patterns("__pycache__"))
    source = (package / mutant.file).read_text()
    (package / mutant.file).write_text(mutant.fault(source))


class Forks:
    """A plugin that runs pytest for each mutant, in a process of its own."""

    def __init__(self, suite: Suite, mutants: list[Mutant], out: TextIO):
        self.suite, self.mutants, self.out = suite, mutants, out
        self.verdicts: list[str] = []
        self.folder: Path | None = None  # in a mutant's own process
        self.mutant: Mutant | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> None:
        import optax  # noqa: F401  # with jax: once for all

        assert "blr_optax" not in sys.modules, "tests/conftest.py imported the package"
        for mutant in self.mutants:
            start = time.monotonic()
            folder = Path(tempfile.mkdtemp()).resolve()
            verdict = self._judge(session, mutant, folder)
            if verdict is None:
                return  # this is the mutant's process, where pytest goes on
            shutil.rmtree(folder)
            self.verdicts.append(verdict.word)
            seconds = time.monotonic() - start
            print(
                f"{verdict.word:9} {seconds:4.0f} s  {mutant.file}: {mutant.about} {verdict.why}",
                file=self.out,
                flush=True,
            )
        pytest.exit("that was the last mutant", returncode=0)

    def _judge(self, session: pytest.Session, mutant: Mutant, folder: Path) -> Verdict | None:
        tests = [self.suite.find(name) for name in mutant.tests]
        if None in tests:
            return Verdict("error", f"(not all of these tests exist: {mutant.tests})")
        try:
            copy_with(mutant, folder)
        except (OSError, ValueError) as error:
            return Verdict("error", f"({error})")
        log = folder / "log"
        process = os.fork()
        if not process:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
            sys.path.insert(0, str(folder))
            os.environ["PYTHONPATH"] = str(folder)
            self.folder, self.mutant, session.config.args = folder, mutant, tests
            return None
        status = wait(process)
        if status in (0, 1):
            return Verdict("survived" if status == 0 else "killed")
        return Verdict("error", f"(status {status})\n{log.read_text()[-1500:]}")

    def pytest_collection_finish(self) -> None:
        try:
            found = Path(importlib.import_module(self.mutant.module).__file__)
        except Exception as error:
            pytest.exit(f"the mutant does not import: {error!r}", returncode=NO_MUTANT)
        if self.folder not in found.parents:
            pytest.exit(f"{found} is not the mutant", returncode=NO_MUTANT)


def wait(process: int) -> int | None:
    """The exit status of a process, None if it takes too long."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def settings(suite: Suite, cache: Path) -> dict[str, str]:
    """Environment variables: what is compiled is kept, nothing is written into the suite."""
    return {
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **({"XLA_FLAGS": QUICK} if suite.old else {}),
    }


def serve(suite: Suite, mutants: list[Mutant], cache: Path) -> list[str]:
    """The verdicts on some mutants, one after the other."""
    os.environ.update(settings(suite, cache))
    os.chdir(suite.root)
    sys.path[:] = [path for path in sys.path if path != str(ROOT / "tests")]
    sys.dont_write_bytecode = True
    forks = Forks(suite, mutants, os.fdopen(os.dup(1), "w"))
    with tempfile.TemporaryFile("w+") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(1, 2)
        options = ["-p", "no:cacheprovider", "-q", "-x", "-s", "tests"]
        status = pytest.main(options, plugins=[forks])
        if forks.mutant:
            sys.stdout.flush()
            os._exit(status)
        if len(forks.verdicts) < len(mutants):
            sys.stdout.flush()
            log.seek(0)
            print(f"pytest ended with {status}:\n{log.read()[-3000:]}", file=forks.out, flush=True)
    return forks.verdicts


def run(suite: Suite, mutants: list[Mutant], jobs: int) -> int:
    """Every mutant; one line for each, and the sum of it."""
    shares = [share for i in range(jobs) if (share := mutants[i::jobs])]
    fork = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as caches,
        concurrent.futures.ProcessPoolExecutor(jobs, fork) as pool,
    ):
        # A folder for each job, as jax does not write its files at once.
        pending = [
            pool.submit(serve, suite, share, Path(caches, str(i))) for i, share in enumerate(shares)
        ]
        verdicts = [word for one in pending for word in one.result()]
    killed, survived = verdicts.count("killed"), verdicts.count("survived")
    errors = len(mutants) - killed - survived
    print(f"{len(mutants)} mutants: {killed} killed, {survived} survived, {errors} errors")
    return 0 if killed == len(mutants) > 0 else 1


def check(suite: Suite, mutants: list[Mutant]) -> int:
    """Without a fault all named tests must pass."""
    found = {name: suite.find(name) for mutant in mutants for name in mutant.tests}
    missing = [name for name, test in found.items() if test is None]
    for name in missing:
        print(f"no such test: {name}")
    tests = sorted({test for test in found.values() if test})
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, **settings(suite, Path(cache)), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q", *tests]
        status = subprocess.run(command, cwd=suite.root, env=env).returncode
    return 1 if missing or status else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests that each seeded fault must fail.")
    parser.add_argument("--check", action="store_true", help="the same tests, without the faults")
    parser.add_argument("--only", default="", help="mutants with these words in file or about")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--old", type=Path, help="a checkout whose tests have their old names")
    given = parser.parse_args()
    mutants = [m for m in load() if given.only in f"{m.file}: {m.about}"]
    suite = Suite(given.old.resolve(), old=True) if given.old else Suite(ROOT)
    return check(suite, mutants) if given.check else run(suite, mutants, given.jobs)


if __name__ == "__main__":
    sys.exit(main())
