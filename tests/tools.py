"""What the tests share: where files lie, comparisons in numpy, and functions that compile once."""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

ROOT = Path(__file__).parents[1]
# How users' programs are compiled, where the suite's own flags differ; from jax 0.11 on, XLA has no
# other way to fuse.
FUSED = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
USERS = {"xla_backend_optimization_level": 3, **FUSED}
GOLDEN = ROOT / "tests" / "golden"


def load_golden(name: str) -> dict:
    """Reference numbers from tests/golden/NAME.json; its `readme` key says what they are.

    A fresh dict each time, so that no test can spoil another one's numbers.
    """
    return json.loads((GOLDEN / f"{name}.json").read_text())


# --- comparisons ----------------------------------------------------------------------------------


def close(actual: Any, expected: Any, rtol: float = 1e-12, atol: float = 0.0) -> None:
    """Two arrays agree."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def near(actual: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    """All leaves of two trees agree."""
    jax.tree.map(lambda x, y: close(x, y, rtol, atol), actual, expected)


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    """Two trees agree in structure and values, exactly unless a tolerance is given.

    Typed keys are compared by their data; exact trees agree in their dtypes too.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(jax.random.key_data(x), jax.random.key_data(y))
        elif tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


# --- one program for each function ----------------------------------------------------------------
#
# An eager operation is a program of its own, and compiling it costs about as much as compiling a
# whole small function: a test that calls a family or an optimizer eagerly compiles dozens.


def compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, in numpy, computed by one program."""
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


STATIC = {"shape", "with_status", "form", "event_shape"}


@functools.cache
def _jitted(method: Callable[..., Any]) -> Callable[..., Any]:
    static = STATIC & set(inspect.signature(method).parameters)
    return jax.jit(method, static_argnames=tuple(static))


class Compiled:
    """An object whose methods run as one program each: `Compiled(family).expectation(lam)`.

    Attributes that are no methods are those of the object. Not for tests of refusals, which need
    to see concrete values.
    """

    def __init__(self, thing: Any):
        self.thing = thing

    def __getattr__(self, name: str) -> Any:
        """The attribute, compiled if it is a method."""
        found = getattr(self.thing, name)
        bound = getattr(found, "__self__", None) is self.thing
        return _jitted(found) if bound else found


def run_steps(
    step: Callable[[Any, Any], tuple[Any, Any]],
    start: Callable[[], Any],
    inputs: Any = None,
    length: int | None = None,
    fused: bool = False,
) -> tuple[Any, Any]:
    """A training loop as one program: the last carry, and what was seen of every step, in numpy.

    `start()` is the first carry; `step(carry, input)` the next one and what to see of it, stacked.
    With `fused` the noise from hashes, which is in float32, is one loop wherever it is derived, as
    in users' programs, and so rounded alike; under the suite's own flags it is not.
    """
    options = FUSED if fused else None

    def loop(inputs: Any) -> Any:
        return jax.lax.scan(step, start(), inputs, length)

    last, seen = jax.jit(loop, compiler_options=options)(inputs)
    return last, jax.tree.map(np.asarray, seen)


def built_inside(
    make: Callable[[], optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """A transformation that is built where it is used: what building it computes is traced too."""
    return optax.GradientTransformationExtraArgs(
        lambda params: make().init(params),
        lambda *args, **extra: make().update(*args, **extra),
    )
