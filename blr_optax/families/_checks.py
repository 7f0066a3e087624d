"""Eager checks of standard parameters: clear errors on values, nothing on traced ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def concrete(*values: Any) -> bool:
    """Whether all arrays in these trees have values that Python may look at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def exactly_one(who: str, **given: Any) -> None:
    """Raises ValueError unless exactly one of the keywords was given."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"{who}: give exactly one of {' or '.join(given)}; got {names or 'none'}.")


def require(name: str, value: Any, valid: str, test: Callable[[Any], Any]) -> None:
    """Raises ValueError when a concrete standard parameter is outside its range."""
    if concrete(value) and not bool(jnp.all(test(jnp.asarray(value)))):
        raise ValueError(f"{name} must be {valid}; got {value}.")
