"""Every public name says what it takes and returns; `make lint` holds the code to it."""

import inspect
import json
import runpy

from test_surface import PUBLIC, resolve
from tools import ROOT

ERRORS = 66  # that basedpyright finds inside the package, all in its baseline: may only shrink


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


def test_public_fields_are_not_any():
    untyped = [
        f"{name}.{field}"
        for name in PUBLIC
        if inspect.isclass(resolve(name))
        for field, annotation in vars(resolve(name)).get("__annotations__", {}).items()
        if "Any" in (annotation, getattr(annotation, "__forward_arg__", None))
    ]
    assert not untyped


def test_the_calls_that_the_type_checker_reads_run():
    runpy.run_path(str(ROOT / "tests" / "typing_example.py"))


def test_the_baseline_of_the_type_checker_only_shrinks():
    files = json.loads((ROOT / ".basedpyright/baseline.json").read_text())["files"]
    assert sum(len(errors) for errors in files.values()) <= ERRORS
