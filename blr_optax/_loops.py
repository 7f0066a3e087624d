"""Loops as those of `jax.lax`, also inside `jax.shard_map`, and which devices a number varies over.

On the manual axes of a mesh the type of an array says over which of them it varies, and a loop
wants its carry to go in as it comes out. What starts as zeros or ones varies over none; here it is
made to vary as the body's result does. Outside of manual axes these are jax's own loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import PyTree

# How jax names what an array varies over: from 0.10.2 on, and before.
TYPES = ("manual_axis_type", "vma")


def on_manual_axes() -> bool:
    """Whether this is traced inside `shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def varying(tree: PyTree) -> frozenset[str]:
    """Return the manual axes over which arrays of a tree, or their shapes, vary: some of them."""

    def of(x: Any) -> frozenset[str]:
        found = jax.typeof(x) if not isinstance(x, jax.ShapeDtypeStruct) else x
        found = next((getattr(found, name) for name in TYPES if hasattr(found, name)), None)
        return frozenset(getattr(found, "varying", found) or ())

    return frozenset().union(*map(of, jax.tree.leaves(tree)))


def spread(tree: PyTree, axes: frozenset[str]) -> PyTree:
    """Return a tree whose arrays vary over these manual axes as well."""

    def leaf(x: Any) -> Any:
        missing = tuple(sorted(axes - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(leaf, tree) if axes else tree


def together(tree: PyTree) -> PyTree:
    """Return a tree whose arrays all vary over what any of them does."""
    return spread(tree, varying(tree))


def as_varying(tree: PyTree, like: PyTree) -> PyTree:
    """Return a tree whose arrays vary over what those of another tree vary over, one by one."""
    return jax.tree.map(lambda x, y: spread(x, varying(y)), tree, like)


def shaped(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Return the type of an array in another shape, varying over what it varies over."""
    found = jax.typeof(x)
    if not varying(x):
        return jax.ShapeDtypeStruct(shape, found.dtype)
    kind = {name: getattr(found, name) for name in TYPES if hasattr(found, name)}
    everywhere = NamedSharding(found.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, found.dtype, sharding=everywhere, **kind)


def by_its_value(loss: Callable[..., Any], point: PyTree, *args: Any) -> PyTree:
    """Return a point at which the gradient of a loss varies over what its value varies over.

    Where parameters that are the same on all devices meet examples that are not, `jax.grad` adds
    up the gradients of the devices, silently. Here each device gets that of its own value; a loss
    that is averaged over the devices itself has one value and one gradient.

    Args:
        loss: (point, *args) -> its value, or a tuple whose first entry it is.
        point: parameters.
        args: what else it is called with.
    """
    if not on_manual_axes():
        return point
    value = jax.eval_shape(loss, point, *args)
    return spread(point, varying(value[0] if isinstance(value, tuple) else value))


def key_for(key: Array, *numbers: Any) -> Array:
    """Return a key that varies as numbers do, for draws of jax's that loop (`gamma`, `poisson`)."""
    return spread(key, varying(numbers))


def settled(body: Callable[[Any], Any], carry: Any) -> Any:
    """Return a carry that varies over what the body's result does."""
    while on_manual_axes():
        found = as_varying(carry, jax.eval_shape(body, carry))
        if list(map(varying, jax.tree.leaves(found))) == list(map(varying, jax.tree.leaves(carry))):
            break
        carry = found
    return carry


def while_loop(running: Callable[[Any], Any], body: Callable[[Any], Any], carry: Any) -> Any:
    """Like `jax.lax.while_loop`."""
    return jax.lax.while_loop(running, body, settled(body, carry))


def fori_loop(low: int, high: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Like `jax.lax.fori_loop`."""
    return jax.lax.fori_loop(low, high, body, settled(lambda c: body(low, c), carry))


def scan(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, *options: Any
) -> tuple[Any, Any]:
    """Like `jax.lax.scan`; `options` are its length, direction and unrolling."""

    def once(carry: Any) -> Any:
        return body(carry, jax.tree.map(lambda x: x[0], xs))[0]

    return jax.lax.scan(body, settled(once, carry), xs, *options)
