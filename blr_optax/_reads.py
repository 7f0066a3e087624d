"""What a function reads: a key under which its compiled program may be used again.

A compiled function is right as long as the function would do the same if it were traced anew. That
depends on its code and on what it reads beside its arguments: its closure, its defaults, the global
names that its code loads, the object that a method belongs to. `Reads` collects all of these, so
that a fresh lambda with the code and the closure of an earlier one has the same key, and a function
whose global `batch_stats` was replaced has another.

Of what changes in place, lists, dicts and attributes, only arrays, truth values and functions
count: a counter of calls must not make every call a new program. Nor do names that the code itself
assigns.
"""

from __future__ import annotations

import dis
import functools
import zlib
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import jax
import numpy as np

from blr_optax._validate import concrete

PLAIN = (int, float, complex, str, bytes, bool, type(None), np.dtype, np.generic, type)
# Their functions and objects are taken as they are: what they read does not change.
LIBRARIES = {
    *("blr_optax", "equinox", "flax", "haiku", "jax", "jaxlib", "numpy", "optax", "scipy"),
    *("functools", "unittest"),
}
DEPTH = 4  # of objects in attributes of objects


class Reads:
    """A hashable key of functions, which keeps what it compares by identity alive.

    Attributes:
        functions: the functions, for whoever makes a program of them.
        key: what is compared.
        traced: whether one of them reads a value of a trace, so that no program may outlive it.
    """

    def __init__(self, *functions: Any) -> None:
        """Walk through what the functions read."""
        self.functions = functions
        self._kept: list[Any] = []
        self._seen: dict[int, int] = {}
        self.traced = False
        self.key = tuple(self._value(function) for function in functions)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reads) and self.key == other.key

    def _value(self, value: Any) -> Any:
        """Return a hashable stand-in for a value: of arrays and objects their identity."""
        if isinstance(value, PLAIN):
            return type(value), repr(value) if isinstance(value, float) else value
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)  # its id is not given away while this key lives
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return "method", self._value(value.__func__), self._value(value.__self__)
        if isinstance(value, functools.partial):
            return "partial", *map(self._value, (value.func, value.args, value.keywords))
        if isinstance(value, (jax.Array, np.ndarray)):
            return self._array(value)
        if isinstance(value, ModuleType):
            return id(value)
        if isinstance(value, (list, dict, set)):
            return id(value), *self._contents(value, DEPTH)
        leaves, tree = jax.tree.flatten(value)
        if not (len(leaves) == 1 and leaves[0] is value):
            return (*map(self._value, leaves), tree if _hashable(tree) else id(value))
        if type(value).__hash__ is not object.__hash__ and _hashable(value):
            return type(value), value
        if _library(type(value)):
            return id(value)
        return id(value), *self._contents(value, DEPTH)

    def _array(self, value: Any) -> Any:
        """Identity, and for floating-point numbers of numpy, which change in place, a hash."""
        if not concrete(value):
            self.traced = True
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return id(value), zlib.crc32(value.tobytes())
        return id(value)

    def _contents(self, holder: Any, depth: int) -> Iterator[Any]:
        """Stand-ins for the arrays, truth values and functions in what changes in place."""
        if isinstance(holder, (dict, list, tuple)):
            values = holder.values() if isinstance(holder, dict) else holder
        else:
            values = getattr(holder, "__dict__", {}).values()
        for value in list(values):
            if isinstance(value, bool) and not isinstance(holder, list):
                yield value
            elif isinstance(value, (jax.Array, np.ndarray, FunctionType, MethodType)):
                yield self._value(value)
            elif not isinstance(value, (*PLAIN, ModuleType)) and id(value) not in self._seen:
                self._seen[id(value)] = len(self._seen)
                self._kept.append(value)
                yield from self._contents(value, depth - 1) if depth else ()

    def _function(self, function: FunctionType) -> Any:
        """Code, defaults, closure, and the global names that the code loads."""
        code = function.__code__
        loaded, assigned = _global_names(code)
        closure = zip(code.co_freevars, function.__closure__ or (), strict=True)
        found = [code, *map(self._value, (function.__defaults__, function.__kwdefaults__))]
        found += [self._value(_content(cell)) for name, cell in closure if name not in assigned]
        if not _library(function):
            scope = function.__globals__
            names = (name for name in loaded if name in scope and name not in assigned)
            found += [(name, self._value(scope[name])) for name in names]
        return tuple(found)


def _library(thing: Any) -> bool:
    return (thing.__module__ or "").partition(".")[0] in LIBRARIES


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@functools.lru_cache(maxsize=1024)
def _global_names(code: CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the global names that a code loads, and the outer names that it assigns."""
    loaded: set[str] = set()
    assigned: set[str] = set()
    for op in dis.get_instructions(code):
        if op.opname == "LOAD_GLOBAL":
            loaded.add(op.argval)
        elif op.opname == "STORE_GLOBAL" or (
            op.opname == "STORE_DEREF" and op.argval in code.co_freevars
        ):
            assigned.add(op.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more, outer = _global_names(inner)
            loaded.update(more)
            assigned.update(outer - set(code.co_cellvars))
    return tuple(sorted(loaded)), frozenset(assigned)
