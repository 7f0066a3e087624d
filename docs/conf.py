"""Sphinx configuration: `make docs` builds with warnings as errors and needs no network."""

import re
import tomllib
from pathlib import Path

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())

project = PYPROJECT["project"]["name"]
author = PYPROJECT["project"]["authors"][0]["name"]
release = version = PYPROJECT["project"]["version"]
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {release}"

# `name` in a docstring is a link wherever such a name is documented, and plain code elsewhere.
default_role = "py:obj"
add_module_names = False
autodoc_default_options = {"members": True, "imported-members": True}
autodoc_member_order = "bysource"
# Shapes are in the docstrings; in a signature they would bury the names of the arguments.
autodoc_typehints = "none"
# An attribute section describes fields that autodoc lists as well: one object, one description.
napoleon_use_ivar = True


def mathematics_is_not_markup(app, what, name, obj, options, lines):
    """Keep |x|, *batch and x_ as they are written: docstrings are read in the source first."""
    for i, line in enumerate(lines):
        pieces = re.split(r"(``.*?``|`.*?`|\*\*\w.*?\w\*\*)", line)
        pieces[::2] = [re.sub(r"([|*]|(?<=\w)_(?=\W|$))", r"\\\1", text) for text in pieces[::2]]
        if not line.lstrip().startswith((">>>", "...", "..", ":")):
            lines[i] = "".join(pieces)


def setup(app):
    """Called by sphinx."""
    app.connect("autodoc-process-docstring", mathematics_is_not_markup, priority=400)
