"""Eager checks of standard parameters: clear errors on values, nothing on traced ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array


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


def exactly_one(who: str, **given: Any) -> None:
    """Raises ValueError unless exactly one of the keywords was given."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"{who}: give exactly one of {' or '.join(given)}; got {names or 'none'}.")


def require(name: str, value: Any, valid: str, test: Callable[[Any], Any]) -> None:
    """Raises ValueError when a concrete standard parameter is outside its range."""
    if not holds(lambda x: test(jnp.asarray(x)), value):
        raise ValueError(f"{name} must be {valid}; got {value}.")


def as_floats(*values: Any) -> list[Array]:
    """Standard parameters as arrays of one floating type and shape; integers become floats."""
    dtype = jnp.result_type(float, *values)
    return jnp.broadcast_arrays(*(jnp.asarray(value, dtype) for value in values))


def positive(x: Array) -> Array:
    """The test of a positive standard parameter."""
    return (x > 0) & jnp.isfinite(x)
