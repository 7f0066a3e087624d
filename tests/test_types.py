"""Every public name says what it takes and returns; `make lint` holds the code to it."""

import inspect
import json

from test_surface import PUBLIC, resolve
from tools import ROOT

ERRORS = 129  # that basedpyright finds inside the package, all in its baseline: may only shrink


def functions():
    """Public functions, and the public methods that public classes define, by name."""
    for name in PUBLIC:
        thing = resolve(name)
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing) and thing.__module__.startswith("blr_optax"):
            for method, value in vars(thing).items():
                if inspect.isfunction(value) and not method.startswith("_"):
                    yield f"{name}.{method}", value


def test_public_functions_are_annotated_and_nothing_is_any():
    untyped, anything = [], []
    for name, function in functions():
        signature = inspect.signature(function)
        found = [
            p.annotation for p in signature.parameters.values() if p.name not in ("self", "cls")
        ]
        found.append(signature.return_annotation)
        if inspect.Signature.empty in found:
            untyped.append(name)
        if "Any" in found:
            anything.append(name)
    assert not untyped
    assert not anything


def test_the_baseline_of_the_type_checker_only_shrinks():
    files = json.loads((ROOT / ".basedpyright/baseline.json").read_text())["files"]
    assert sum(len(errors) for errors in files.values()) <= ERRORS
