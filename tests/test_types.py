"""Signatures say what they take and return, and shapes are as annotated."""

import inspect
import json
import re
import runpy
from collections.abc import Iterator

from test_surface import PUBLIC, fresh, resolve
from tools import ROOT


def functions() -> Iterator[tuple[str, object]]:
    """Every public function, and the public methods of every public class."""
    for name in PUBLIC:
        value = resolve(name)
        if inspect.isclass(value):
            for method, found in vars(value).items():
                found = getattr(found, "__func__", getattr(found, "fget", found))
                own = inspect.isfunction(found) and found.__name__ != "<lambda>"
                if own and not method.startswith("_"):
                    yield f"{name}.{method}", found
        elif inspect.isroutine(value):
            yield name, value


def annotations(function: object) -> Iterator[tuple[str, object]]:
    signature = inspect.signature(function)
    for name, parameter in signature.parameters.items():
        if name not in ("self", "cls"):
            yield name, parameter.annotation
    yield "return", signature.return_annotation


def test_public_signatures_are_annotated_and_nothing_is_any():
    everything = list(functions())
    assert len(everything) > 400
    untyped = [
        f"{name}: {part}"
        for name, function in everything
        for part, annotation in annotations(function)
        if annotation is inspect.Signature.empty or re.match(r"(typing\.)?Any\b", str(annotation))
    ]
    assert not untyped


def test_public_fields_are_not_any():
    untyped = [
        f"{name}.{field}"
        for name in PUBLIC
        if inspect.isclass(resolve(name))
        for field, annotation in vars(resolve(name)).get("__annotations__", {}).items()
        if "Any" in (annotation, getattr(annotation, "__forward_arg__", None))
    ]
    assert not untyped


def test_the_example_that_is_type_checked_runs():
    runpy.run_path(str(ROOT / "tests" / "typing_example.py"))


def test_shapes_are_checked():
    """The example once more with every annotation checked, and a call with a wrong shape."""
    code = """
import runpy, sys; sys.path.insert(0, "tests")
import checked_shapes; checked_shapes.install()
runpy.run_path("tests/typing_example.py")
import numpy as np, blr_optax as blr
try:
    blr.metrics.entropy(np.ones((), np.float32))
except Exception as error:
    print(type(error).__name__)
"""
    assert fresh(code).split() == ["TypeCheckError"]


def test_the_errors_left_only_shrink():
    """Repair one, run `make types`, and lower the number: it never goes up."""
    baseline = json.loads((ROOT / ".basedpyright" / "baseline.json").read_text())["files"]
    assert sum(map(len, baseline.values())) <= 55
    assert not [file for file in baseline if "tests/" in file]
