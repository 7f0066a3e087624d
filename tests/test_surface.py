"""What a user of the package meets before any mathematics: names, docstrings, imports, versions."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tools import ROOT

import blr_optax

PACKAGE = ROOT / "blr_optax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# The flow of the library, which is also the order in which its parts may know of each other. A part
# is a folder or file; what stands in a part without being listed itself belongs to the part.
LAYERS = [
    {
        "_decay",
        "_loops",
        "_random",
        "_rounding",
        "_transformation",
        "_tree",
        "_typing",
        "_validate",
    },
    {"families/_numerics"},
    {"families/_base"},
    {
        "families/_continuous",
        "families/_discrete",
        "families/_matrix",
        "families/_conditional",
    },
    {"families/_lifts"},
    {"families"},
    {"_distribution"},
    {"per_example"},
    {"estimators"},
    {"state"},
    {"rule"},
    {"optimizers", "inference", "interop"},
    {
        "_averages",
        "_ensemble",
        "_predict",
        "_predict_distribution",
        "_scoring",
        "_table",
        "metrics",
        "models",
        "memory",
        "continual",
        "plots",
    },
    {"recipes"},
    {"__init__"},
    {"_demo"},
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
# `blr_optax.per_example` is the function, as the name that users want.
for hidden in ("blr_optax.optimizers", "blr_optax.interop", "blr_optax.per_example"):
    MODULES[hidden] = sys.modules[hidden]
PUBLIC = [
    f"{path}.{name}"
    for path, module in MODULES.items()
    for name in module.__all__
    if hasattr(module, name) and name != "__version__"
]


def resolve(qualified: str) -> object:
    path, _, name = qualified.rpartition(".")
    return getattr(MODULES[path], name)


def own_doc(name: str) -> str:
    """The docstring a name has of its own, not that of a parent class or one made for it."""
    doc = resolve(name).__doc__ or ""
    # dataclass and NamedTuple write their signature where no docstring was given.
    return "" if doc.startswith(f"{name.rpartition('.')[2]}(") else doc


def test_all_is_the_public_surface():
    for path, module in MODULES.items():
        names = [name for name in module.__all__ if name != "__version__"]
        assert len(set(names)) == len(names), path
        assert not [name for name in names if name.startswith("_")], path
        missing = [name for name in names if not hasattr(module, name)]
        assert not missing, f"names in {path}.__all__ that do not exist"
        things = [id(value) for name in names if callable(value := getattr(module, name))]
        assert len(set(things)) == len(things), f"two names for one thing in {path}"
        if hasattr(module, "__path__"):  # the __init__.py of a package imports only to publish
            ours = {
                name
                for name, value in vars(module).items()
                if (getattr(value, "__module__", None) or "").startswith("blr_optax")
            }
            unlisted = sorted(name for name in ours - set(names) if not name.startswith("_"))
            assert not unlisted, f"public names that {path}.__all__ does not list"


def test_public_names_have_docstrings_and_functions_have_doctests():
    def documented(name: str) -> bool:  # a constant cannot carry a docstring
        return isinstance(resolve(name), ModuleType) or callable(resolve(name))

    assert len(PUBLIC) > 100
    assert not [name for name in PUBLIC if documented(name) and not own_doc(name)]
    functions = [name for name in PUBLIC if inspect.isroutine(resolve(name))]
    assert not [name for name in functions if ">>>" not in own_doc(name)]


# --- files and layers -----------------------------------------------------------------------------


def test_files_can_be_read_in_one_go():
    """Aim at 100 to 300 lines; the docstring of a file above 500 says why."""
    texts = {str(path.relative_to(PACKAGE)): path.read_text() for path in SOURCES}
    long = {path for path, text in texts.items() if len(text.splitlines()) > 500}
    assert not {path for path in long if "Above 500 lines" not in texts[path]}


def part_of(parts: tuple[str, ...]) -> str:
    """("rule", "_blr_update") belongs to rule, ("ivon",), a name of the package, to __init__."""
    listed = set().union(*LAYERS)
    for length in (2, 1):
        if (part := "/".join(parts[:length])) in listed:
            return part
    return "__init__"


def layer(part: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a file imports, at whatever depth of its code."""
    # ("blr_optax", "rule", "_natural_step"), or ("blr_optax", "rule") for an __init__.py:
    here = path.relative_to(ROOT).with_suffix("").parts
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            modules |= {(*base, alias.name) for alias in node.names}
    return {part_of(module[1:]) for module in modules if module[0] == "blr_optax"}


def test_imports_run_one_way():
    wrong = {}
    for path in SOURCES:
        here = layer(part_of(path.relative_to(PACKAGE).with_suffix("").parts))
        if up := sorted(part for part in imported_parts(path) if layer(part) > here):
            wrong[str(path.relative_to(PACKAGE))] = up
    assert not wrong, "imports from the right of a file's own layer"


def test_every_part_has_its_place():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in SOURCES}
    assert parts <= {part for parts in LAYERS for part in parts}


# --- the import itself ----------------------------------------------------------------------------


def fresh(code: str) -> str:
    """The output of `code` in a fresh interpreter."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_import_needs_no_extra_and_starts_no_backend():
    # An array built at import fixes the devices before the user could choose them;
    # jax refuses to change their number from then on.
    code = f"""
import jax, optax, sys
theirs = set(sys.modules)
import blr_optax
jax.config.update("jax_num_cpu_devices", 1)
print("free", *(set({OPTIONAL}) & (set(sys.modules) - theirs)))
"""
    assert fresh(code).split() == ["free"]


# --- packaging ------------------------------------------------------------------------------------


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = re.search(r"^version: *(\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert blr_optax.__version__ == project["version"]
    assert citation.group(1) == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
