"""Hyper-parameters as the transformations take them: numbers, arrays or schedules."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def at(hyper: Any, count: Any) -> Any:
    """The value of a number, array, tree or schedule at a step."""
    return hyper(count) if callable(hyper) else hyper


def check_positive(name: str, hyper: Any, *, zero: bool = False) -> None:
    """Raises ValueError for plain Python numbers out of range; others may be traced."""
    for number in jax.tree.leaves(hyper):
        if isinstance(number, (int, float)) and not (number > 0 or (zero and number == 0)):
            raise ValueError(f"{name}={number} must be {'at least zero' if zero else 'positive'}.")


def check_unit_interval(name: str, number: Any) -> None:
    """Raises ValueError for a plain number outside [0, 1)."""
    if isinstance(number, (int, float)) and not 0.0 <= number < 1.0:
        raise ValueError(f"{name}={number} must be in [0, 1).")


def all_finite(*trees: Any) -> Any:
    """One boolean: whether every entry is finite (a sum is, if and only if, barring overflow).

    Sums over the leading axes first, which add whole rows at a time; one sum over all would be
    a chain of additions that no compiler may reorder.
    """
    checks = [
        jnp.all(jnp.isfinite(jnp.sum(x, axis=tuple(range(jnp.ndim(x) - 1)))))
        for x in jax.tree.leaves(trees)
    ]
    return functools.reduce(jnp.logical_and, checks, jnp.array(True))
