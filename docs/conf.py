"""Sphinx configuration: `make docs` builds with warnings as errors and needs no network."""

import re
import tomllib
from pathlib import Path

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())

project = PYPROJECT["project"]["name"]
author = PYPROJECT["project"]["authors"][0]["name"]
release = version = PYPROJECT["project"]["version"]
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# A literal block without a language is a formula.
highlight_language = "none"
html_theme = "furo"
html_title = f"{project} {release}"

# `name` in a docstring is a link wherever such a name is documented, and plain code elsewhere.
default_role = "py:obj"
add_module_names = False
autodoc_default_options = {"members": True, "imported-members": True}
autodoc_member_order = "bysource"
autosummary_generate = False  # tables only: the members stand below them
# Shapes are in the docstrings; in a signature they would bury the names of the arguments.
autodoc_typehints = "none"
# An attribute section describes fields that autodoc lists as well: one object, one description.
napoleon_use_ivar = True


# A section of a docstring, from which napoleon takes over.
SECTION = re.compile(r"(Args|Attributes|Example|Examples|Note|Raises|Returns|Source|Yields)s?:")
# Six words in a row are a sentence.
SENTENCE = re.compile(r"(?:(?:[A-Za-z][a-z'-]+|a),?\s+){6,}[A-Za-z]")
RELATION = re.compile(r"<-|(?<![=<>!])=(?!=)| ~ ")


def is_formula(paragraph):
    """Whether a paragraph of a docstring is mathematics: relations without code and sentences."""
    text = " ".join(paragraph)
    return "`" not in text and bool(RELATION.search(text)) and not SENTENCE.search(text)


def formula(paragraph):
    """Return a literal block, one update a line."""
    if not any(line.startswith(" ") for line in paragraph):
        paragraph = re.sub(r"(;|\.(?=\s+mu: ))\s+", r"\1\n", " ".join(paragraph)).splitlines()
    return ["::", "", *("    " + line for line in paragraph)]


def prose(paragraph):
    """Keep |x|, *batch and x_ as they are written: docstrings are read in the source first."""
    lines = []
    for line in paragraph:
        pieces = re.split(r"(``.*?``|`.*?`|\*\*\w.*?\w\*\*)", line)
        pieces[::2] = [re.sub(r"([|*]|(?<=\w)_(?=\W|$))", r"\\\1", text) for text in pieces[::2]]
        markup = line.lstrip().startswith((">>>", "...", "..", ":"))
        lines.append(line if markup else "".join(pieces))
    return lines


def mathematics_is_not_markup(app, what, name, obj, options, lines):
    """Make the formulas of a docstring literal blocks; elsewhere signs stand for themselves."""
    paragraphs = [[]]
    for line in lines:
        paragraphs.append([]) if not line.strip() else paragraphs[-1].append(line)
    found, head, literal = [], True, False
    for paragraph in filter(None, paragraphs):
        head = head and not SECTION.match(paragraph[0])
        indented = paragraph[0].startswith(" ")
        if head and found and not literal and (indented or is_formula(paragraph)):
            found += formula(paragraph)
        else:
            found += paragraph if head and indented else prose(paragraph)
        found.append("")
        # After a "::" of the author's the indented lines are a literal block already.
        literal = found[-2].endswith("::") or (literal and indented)
    lines[:] = found


def link_by_name(app, env, node, contnode):
    """Link `ivon` or `estimators.delta` from every page, wherever the name is documented."""
    if node.get("refdomain") != "py" or node.get("reftype") != "obj":
        return None
    domain, name = env.get_domain("py"), node["reftarget"].removeprefix("blr.")
    full = [
        known
        for known, entry in domain.objects.items()
        if known.endswith(f".{name}") and entry.objtype in ("class", "function")
    ]
    if len(full) != 1:
        return None
    page = node["refdoc"]
    return domain.resolve_xref(env, page, app.builder, "obj", full[0], node, contnode)


def setup(app):
    """Called by sphinx."""
    app.connect("autodoc-process-docstring", mathematics_is_not_markup, priority=400)
    app.connect("missing-reference", link_by_name)
