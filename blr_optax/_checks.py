"""Checks of values that Python may look at, and nothing on traced ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def concrete(*values: Any) -> bool:
    """Whether all arrays in these trees have values that Python may look at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def holds(test: Callable[[Any], Any], value: Any) -> bool:
    """Whether a test holds for all of a value; True for traced ones, which Python cannot see.

    Constants are looked at outside any trace that the caller may be in, such as a scan's.
    """
    if not concrete(value):
        return True
    with jax.ensure_compile_time_eval():
        return bool(jnp.all(test(value)))


def require(name: str, value: Any, valid: str, test: Callable[[Any], Any]) -> None:
    """Raises ValueError when a concrete standard parameter is outside its range."""
    if not holds(lambda x: test(jnp.asarray(x)), value):
        raise ValueError(f"{name} must be {valid}; got {value}.")
