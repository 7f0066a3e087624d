"""What a user of the package meets before any mathematics: names, docstrings, imports, versions."""

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tools import ROOT

import blr_optax

PACKAGE = ROOT / "blr_optax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# The flow of the library, which is also the order in which its parts may know of each other.
LAYERS = [
    {"families"},
    {"_posterior"},
    {"estimators"},
    {"rule"},
    {"optimizers", "inference"},
    {"predict", "metrics", "memory", "continual", "merge", "plots"},
    {"__init__"},
    {"cli", "__main__", "_demo", "_demo_report"},
]
OPTIONAL = ("flax", "matplotlib", "orbax", "sklearn", "jaxtyping", "chex", "rich")


# --- names and docstrings -------------------------------------------------------------------------


def public_modules(module: ModuleType = blr_optax) -> Iterator[ModuleType]:
    """The package and every public module that can be reached through `__all__`."""
    yield module
    for name in module.__all__:
        value = getattr(module, name, None)
        if isinstance(value, ModuleType) and hasattr(value, "__all__"):
            yield from public_modules(value)


MODULES = {module.__name__: module for module in public_modules()}
PUBLIC = [
    f"{path}.{name}"
    for path, module in MODULES.items()
    for name in module.__all__
    if hasattr(module, name) and name != "__version__"
]


def resolve(qualified: str) -> object:
    path, _, name = qualified.rpartition(".")
    return getattr(MODULES[path], name)


@pytest.mark.parametrize("path", MODULES)
def test_all_is_the_public_surface(path):
    module = MODULES[path]
    names = [name for name in module.__all__ if name != "__version__"]
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.startswith("_")]
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing, "names in __all__ that do not exist"
    things = [id(value) for name in names if callable(value := getattr(module, name))]
    assert len(set(things)) == len(things), "two names for one thing"
    if hasattr(module, "__path__"):  # the __init__.py of a package imports only to publish
        ours = {
            name
            for name, value in vars(module).items()
            if (getattr(value, "__module__", None) or "").startswith("blr_optax")
        }
        unlisted = sorted(name for name in ours - set(names) if not name.startswith("_"))
        assert not unlisted, "public names that __all__ does not list"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name):
    value = resolve(name)
    if not (isinstance(value, ModuleType) or callable(value)):
        return  # a constant cannot carry one
    doc = value.__doc__  # not inspect.getdoc, which accepts the docstring of a parent class
    assert doc, "no docstring"
    # dataclass and NamedTuple write their signature where no docstring was given.
    assert not doc.startswith(f"{name.rpartition('.')[2]}("), "an automatic docstring"


@pytest.mark.parametrize("name", [n for n in PUBLIC if inspect.isroutine(resolve(n))])
def test_public_function_has_a_doctest(name):
    doc = resolve(name).__doc__ or ""
    assert ">>>" in doc, doc


# --- files and layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_go(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 400


def layer(part: str) -> int:
    """Where a top-level part of the package stands; an unlisted private file stands before all."""
    for index, parts in enumerate(LAYERS):
        if part in parts:
            return index
    assert part.startswith("_"), f"blr_optax/{part} has no place in LAYERS"
    return -1


def imported_parts(path: Path) -> set[str]:
    """The top-level parts of the package that a file imports, at whatever depth of its code."""
    # ("blr_optax", "rule", "_step"), or ("blr_optax", "rule") for an __init__.py:
    here = path.relative_to(ROOT).with_suffix("").parts
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            modules |= {(*base, alias.name) for alias in node.names}
    return {part_of(module) for module in modules if module[0] == "blr_optax"}


def part_of(module: tuple[str, ...]) -> str:
    """("blr_optax", "rule", ...) belongs to rule, ("blr_optax", "ivon") to __init__."""
    part = module[1] if len(module) > 1 else "__init__"
    is_module = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()
    return part if is_module else "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    here = layer(path.relative_to(PACKAGE).with_suffix("").parts[0])
    wrong = sorted(part for part in imported_parts(path) if layer(part) > here)
    assert not wrong, f"imports from the right of its own layer: {wrong}"


# --- the import itself ----------------------------------------------------------------------------


def fresh(code: str) -> str:
    """The output of `code` in a fresh interpreter that keeps its bytecode, as installed ones do."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=env, check=True, capture_output=True, text=True
    ).stdout


def test_import_is_cheap():
    code = """
import time, optax
start = time.thread_time()
import blr_optax
print(time.thread_time() - start)
"""
    # Processor time, as waiting for a busy machine is not ours. What a machine adds to it (and the
    # first run, which compiles) only ever makes it longer: one quick run is proof.
    seconds = []
    while len(seconds) < 7 and min(seconds, default=1.0) >= 0.1:
        seconds.append(float(fresh(code)))
    assert min(seconds) < 0.1, seconds


# With every name that is imported on first use.
EVERYTHING = "import blr_optax; [getattr(blr_optax, name) for name in blr_optax.__all__]"


def test_import_needs_no_extra():
    code = f"import sys; {EVERYTHING}; print(*(set({OPTIONAL}) & set(sys.modules)))"
    assert fresh(code).split() == []


def test_import_starts_no_backend():
    # An array built at import fixes the devices before the user could choose them;
    # jax refuses to change their number from then on.
    code = f"import jax; {EVERYTHING}; jax.config.update('jax_num_cpu_devices', 1); print('free')"
    assert fresh(code).strip() == "free"


# --- packaging ------------------------------------------------------------------------------------


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = re.search(r"^version: *(\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert blr_optax.__version__ == project["version"]
    assert citation.group(1) == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_public_part_is_in_the_api_page():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in SOURCES} - {"cli"}
    api = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"automodule:: blr_optax\.(\w+)", api))
    assert documented == {part for part in parts if not part.startswith("_")}
