"""Every public name is on an API page, formulas are typeset, and links lead somewhere."""

import importlib
import inspect
import re
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_surface import MODULES
from tools import ROOT

import blr_optax as blr

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


# --- formulas -------------------------------------------------------------------------------------


def test_formulas_of_docstrings_are_literal_blocks():
    typeset = runpy.run_path(str(ROOT / "docs" / "conf.py"))["mathematics_is_not_markup"]

    def blocks(thing: Any) -> str:
        lines = inspect.getdoc(thing).splitlines()
        typeset(None, "function", "", thing, None, lines)
        return "\n".join(lines)

    ivon = blocks(blr.ivon)
    assert "\n::\n\n    p <- p (1 + u + u^2 / 2), u = (1 - b2)(c + delta - p) / p" in ivon
    assert "\n    q = N(m, 1 / (ess p)).\n\n" in ivon
    assert "\nA training loop changes in one line" in ivon
    gamma = blocks(blr.families.Gamma)
    assert (
        "\n    lambda: log = a - 1, linear = -b.\n    mu: log = E[log x], linear = E[x].\n" in gamma
    )
    # Signs outside of formulas stand for themselves, and a block of the author's stays one.
    assert r"\|weights\|" in blocks(type("_", (), {"__doc__": "The |weights|."}))
    assert blocks(blr.from_torch_ivon).count("::\n") == inspect.getdoc(blr.from_torch_ivon).count(
        "::\n"
    )


# --- links ----------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub and the documentation make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    pages += [path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts]
    wrong = []
    for path in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if "://" in target:
                continue
            file, _, fragment = target.partition("#")
            there = path.parent / file if file else path
            if not there.exists():
                wrong.append(f"{path.name}: {target}")
            elif fragment:
                headings = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
                if fragment not in map(anchor, headings):
                    wrong.append(f"{path.name}: {target}")
    assert not wrong


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
