"""A compiled step that reuses the memory of its arguments, also where these share some of it.

The first state of an optimizer may hold the parameters themselves, or one array twice
(`optax.lbfgs`, `optax.contrib.prodigy`, look-ahead), and a batch may: memory that is given away
twice, or given away and read, is an error of the runtime. What is shared is copied before the first
step; outputs of a compiled program share nothing, so that a state it has returned is not looked at.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax._validate import concrete

if TYPE_CHECKING:
    from blr_optax._typing import PyTree


def donating(step: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Compile a step that may reuse the memory of its first arguments, and returns them first.

    Args:
        step: a function that returns a tuple.
        count: how many arguments it may reuse.
    """
    compiled = jax.jit(step, donate_argnums=tuple(range(count)))
    returned: list[Callable[[], Any]] = []

    @functools.wraps(step)
    def call(*arguments: Any, **named: Any) -> Any:
        given, read = arguments[:count], (arguments[count:], named)
        ends = [x for tree in given for x in _ends(tree)]
        known = len(ends) == len(returned)
        if not (known and all(x is last() for x, last in zip(ends, returned, strict=True))):
            given = unshared(given, read)
        found = compiled(*given, *arguments[count:], **named)
        if concrete(*ends):
            returned[:] = [weakref.ref(x) for tree in found[:count] for x in _ends(tree)]
        return found

    return call


def unshared(given: PyTree, read: PyTree = ()) -> PyTree:
    """Copy what of the first tree shares memory with itself or the second; traced arrays pass."""
    taken: set[int] = set()
    for leaf in jax.tree.leaves(read):
        taken.update(_memory(leaf))

    def own(leaf: Any) -> Any:
        mine = _memory(leaf)
        shares = not taken.isdisjoint(mine)
        taken.update(mine)
        return jnp.copy(leaf) if shares else leaf

    return jax.tree.map(own, given)


def _ends(tree: PyTree) -> list[Any]:
    """Return the first and the last array of a tree, by which it is known again."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return [leaves[0], leaves[-1]] if leaves else []


def _memory(leaf: Any) -> list[int]:
    """Return where an array lies, on every device; nothing for what has no memory of its own."""
    if not isinstance(leaf, jax.Array) or not concrete(leaf) or leaf.is_deleted() or not leaf.size:
        return []
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
