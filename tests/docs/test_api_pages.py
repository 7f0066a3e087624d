"""Every public name is on an API page: in a table at its top, and documented below it."""

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_surface import MODULES
from tools import ROOT

PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
DIRECTIVE = re.compile(r"^\.\. (\w+):: *(\S*)$|^ {3}(\w\S*)$", re.MULTILINE)


def names_of(module: ModuleType) -> list[str]:
    """`__all__`, or the public classes and functions that a module defines."""
    return getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        if callable(value) and isinstance(getattr(value, "__doc__", None), str)
    ]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a page lists in its tables, and what it documents."""
    listed, documented, module, table = {}, {}, None, False
    for directive, argument, entry in DIRECTIVE.findall(path.read_text()):
        if directive == "currentmodule":
            module = importlib.import_module(argument)
        elif directive == "automodule":
            of = importlib.import_module(argument)
            documented |= {name: getattr(of, name) for name in names_of(of)}
        elif directive in ("autoclass", "autofunction"):
            documented[argument] = getattr(module, argument)
        elif entry and table:
            assert entry not in listed, f"{path.name} lists {entry} twice"
            listed[entry] = getattr(module, entry)
        if directive:
            table = directive == "autosummary"
    return listed, documented


def test_there_is_a_page_for_every_theme():
    index = (ROOT / "docs" / "api" / "index.md").read_text()
    for path in PAGES:
        if path.stem != "index":
            assert f"({path.name})" in index and f"\n{path.stem}\n" in index, path.name


@pytest.mark.parametrize("path", [p for p in PAGES if p.stem != "index"], ids=lambda p: p.stem)
def test_the_tables_list_what_the_page_documents(path: Path):
    listed, documented = read(path)
    assert sorted(listed) == sorted(documented)
    assert all(listed[name] is documented[name] for name in listed)


def test_every_public_name_has_its_page():
    documented = {id(thing) for path in PAGES for thing in read(path)[1].values()}
    missing = [
        f"{path}.{name}"
        for path, module in MODULES.items()
        for name in names_of(module)
        if not isinstance(thing := getattr(module, name), ModuleType)
        and id(thing) not in documented
    ]
    assert not missing, "public names without an entry in docs/api/"
    parts = {path.split(".")[1] for path in MODULES if "." in path}
    assert parts <= {path.stem for path in PAGES}, "public parts without a page in docs/api/"
