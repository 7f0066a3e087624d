"""Tree helpers that optax.tree lacks: leaves found by path, so that masked trees fit full ones.

Under `optax.partition` and `optax.masked` a transformation sees `MaskedNode` where other leaves
were, while extra arguments, priors and parameters arrive whole. The path of a leaf is the same in
both, its position is not; everything that pairs two trees here pairs them by path.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Set
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blr_optax._validate import holds

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import DTypeLike, Params, PyTree


def leaf_name(path: Any) -> str:
    """Return a leaf's path as text, without the `.value` of a box around the leaf.

    `nnx.Optimizer` gives `init` its variables boxed and `update` the bare arrays: one leaf, one
    name.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path)


def path_hash(path: Any) -> int:
    """Return a stable 32-bit number for a leaf's path, the same in every process and version."""
    return zlib.crc32(leaf_name(path).encode())


def statistics_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype in which statistics of a weight of this dtype are kept: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def narrow(dtype: DTypeLike) -> bool:
    """Whether weights of this dtype are coarser than their statistics (bfloat16, float16)."""
    return statistics_dtype(dtype) != dtype


def spacing(x: Array, dtype: DTypeLike | None = None) -> Array:
    """Return the distance from every number to the next larger one of a dtype, float32 or wider.

    The dtype is that of x unless another is given. Of what is below its normal numbers: that of the
    smallest normal number.
    """
    info, wide = jnp.finfo(dtype or x.dtype), statistics_dtype(x.dtype)
    size = jnp.maximum(jnp.abs(x.astype(wide)), float(info.smallest_normal))
    _, exponent = jnp.frexp(size)
    found = jnp.ldexp(jnp.asarray(float(info.eps), wide), exponent - 1)
    return jnp.maximum(found, jnp.finfo(wide).smallest_normal)  # one below it would be flushed to 0


def check_float_leaves(params: Params, who: str, numbers: bool = False) -> None:
    """Raise ValueError when a parameter leaf is not a real floating-point array.

    With `numbers` those of Python pass.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not numbers and not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{who}: parameter {leaf_name(path) or 'params'} is {leaf!r}, no array; make one "
                "of it, jnp.asarray(...): jax.tree.map(jnp.asarray, params)."
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{who}: parameter {leaf_name(path) or 'params'} has dtype {dtype}; a "
                "posterior needs floating-point parameters. Keep other leaves out with "
                "optax.masked or optax.partition."
            )


def prefix_leaves(tree: PyTree, params: Params, name: str) -> PyTree:
    """Spreads a prefix tree (a number, or a tree that stops early) over the leaves of params.

    Args:
        tree: a number or array for every leaf, or a tree with the structure of a prefix of params.
        params: the tree to follow; `MaskedNode`s in it are passed over.
        name: the argument's name, for the error.

    Returns:
        A tree like params whose leaves are the entries of `tree` that stand at or above them.

    Raises:
        ValueError: when a leaf of params has no entry above it.
    """
    entries = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def look_up(path: Any, leaf: Any) -> Any:
        for end in range(len(path), -1, -1):
            key = leaf_name(path[:end])
            if key in entries:
                return entries[key]
        raise ValueError(
            f"{name}: no entry for parameter {leaf_name(path)}; it has entries for "
            f"{sorted(entries)}. Give a number, or a tree with the structure of params."
        )

    found = jax.tree_util.tree_map_with_path(look_up, params)
    _refuse_strays(entries, params, name)
    return found


def fitting_leaves(tree: PyTree, params: Params, name: str) -> PyTree:
    """Return `prefix_leaves`, whose entries broadcast to the parameters.

    Raises:
        ValueError: for one that does not, and as `prefix_leaves`.
    """
    found = prefix_leaves(tree, params, name)
    pairs = zip(jax.tree.leaves(found), jax.tree_util.tree_leaves_with_path(params), strict=True)
    for entry, (path, leaf) in pairs:
        _check_spreads(entry, leaf, name, leaf_name(path))
    return found


def _check_spreads(entry: Any, leaf: Any, name: str, path: str) -> None:
    """Raise ValueError for an array that does not broadcast to a parameter."""
    shape, wanted = np.shape(entry), getattr(leaf, "shape", ())
    if shape == () or shape == wanted:
        return
    try:
        fits = np.broadcast_shapes(shape, wanted) == tuple(wanted)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: its shape {shape} does not fit that of the parameter {path or 'array'}, "
            f"{tuple(wanted)}. Give one number, one for every entry of the parameter, or a tree; "
            "a matrix has no meaning for independent weights."
        )


def _refuse_strays(entries: dict[str, Any], params: Params, name: str) -> None:
    """Raise ValueError when entries match no leaf of params, unless params is a masked part."""
    known = paths(params)
    if not known or any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
        return
    strays = [key for key in entries if not any(path.startswith(key) for path in known)]
    if strays:
        raise ValueError(f"{name}: entries {strays} stand at no parameter; known: {sorted(known)}.")


def _difference(tree: PyTree, missing: str, name: str) -> str:
    """Say in words what a tree is that has no leaf where the parameters have one."""
    known, kind = sorted(paths(tree)), type(tree).__name__
    wanted = "its structure must be that of params"
    if name == "params":
        made_for = f"parameters with an array at {missing}" if missing else "one array"
        wanted = f"the optimizer's state was made for {made_for}"
    if tree is None or not known:
        found = "it is None" if tree is None else f"it is a {kind} without arrays"
    elif known == [""]:
        found = f"nothing at {missing}: it is one array, of shape {jnp.shape(tree)}"
    elif missing:
        found = f"nothing at {missing}: it has leaves at {known}"
    else:
        pair = name == "grads" and isinstance(tree, tuple) and len(tree) == 2
        hint = " (jax.value_and_grad returns (value, grads))" if pair else ""
        place = "" if name == "params" else ", where params is one array"
        found = f"it is a {kind} with leaves at {known}{hint}{place}"
    return f"{found}; {wanted}"


def matching_leaves(tree: PyTree, params: Params, name: str, leading: int = 0) -> PyTree:
    """Pick from `tree` the leaf that stands at the path of each leaf of params.

    Args:
        tree: a tree like the full params, of which params may be a masked part.
        params: the tree to follow.
        name: the argument's name, for the error.
        leading: how many extra leading axes the leaves of `tree` have.

    Raises:
        ValueError: when a leaf is missing or has another shape.
    """
    entries = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    if type(tree).__name__ == "Estimate" and name in ("grads", "statistic"):
        field = "grad" if name == "grads" else name
        raise ValueError(f"{name}: got an Estimate; pass its field, est.{field}.")

    def look_up(path: Any, param: Any) -> Any:
        key = leaf_name(path)
        if key not in entries:
            raise ValueError(f"{name}: wrong tree structure, {_difference(tree, key, name)}.")
        shape = jnp.shape(entries[key])[leading:]
        if shape != jnp.shape(param):
            what = f"leaf {key}" if key else "the array"
            raise ValueError(
                f"{name}: {what} has shape {jnp.shape(entries[key])}, expected "
                f"{'samples + ' if leading else ''}{jnp.shape(param)}."
            )
        return entries[key]

    found = jax.tree_util.tree_map_with_path(look_up, params)
    if name in ("statistic", "noise", "prior", "init"):
        _refuse_strays(entries, params, name)
    return found


def merge_by_path(params: Params, *parts: PyTree) -> PyTree:
    """Return a tree like params with every leaf replaced by the one that a part has at its path."""
    entries = {
        leaf_name(path): leaf
        for part in parts
        for path, leaf in jax.tree_util.tree_leaves_with_path(part)
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: entries.get(leaf_name(path), leaf), params
    )


def mask_to(tree: PyTree, keep: Set[str]) -> PyTree:
    """Return a tree in which every leaf whose path is not in `keep` is a `MaskedNode`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if leaf_name(path) in keep else optax.MaskedNode(), tree
    )


def paths(tree: PyTree) -> set[str]:
    """Return the paths of all leaves of a tree."""
    return {leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def subtree(tree: PyTree, path: tuple[str | int, ...], who: str) -> PyTree:
    """Return what stands at a path of keys, attribute names and indices; a hole where it ends.

    Raises:
        ValueError: when nothing is there.
    """
    for depth, step in enumerate(path):
        if is_hole(tree):
            return tree
        children = (
            {
                getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))): child
                for (key,), child in jax.tree_util.tree_flatten_with_path(
                    tree, is_leaf=lambda node, tree=tree: node is not tree
                )[0]
                if key
            }
            if not jax.tree_util.all_leaves([tree])
            else {}
        )
        if step not in children:
            raise ValueError(
                f"{who}: nothing at {step!r} below {'/'.join(map(str, path[:depth])) or 'the root'}"
                f"; there are {list(children)}."
            )
        tree = children[step]
    return tree


class Known(NamedTuple):
    """Stands for a parameter that a state was made for, in its place: `MaskedNode`'s opposite."""


def coverage(params: Params) -> PyTree:
    """Return what a state keeps to tell which leaves it was made for, where no other tree does.

    Their number when nothing was masked away, else a tree of `Known` and `MaskedNode`. The
    placeholder with which `optax.tree.map_params` calls `init` gives a number, one leaf, in whose
    place `map_params` leaves whatever a state has there.
    """
    if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
        return jax.tree.map(lambda _: Known(), params)
    return jnp.array(len(jax.tree.leaves(params)), jnp.int32)


def covered_part(coverage: PyTree, params: Params, who: str) -> PyTree:
    """Return the leaves of params that a state was made for, `MaskedNode` elsewhere.

    Raises:
        ValueError: when params has more leaves, or less, than a state that knew all.
    """
    known = jax.tree_util.tree_leaves_with_path(coverage, is_leaf=lambda x: isinstance(x, Known))
    if not all(isinstance(node, Known) for _, node in known):
        number = len(jax.tree.leaves(params))
        if not holds(lambda n: n == number, coverage):
            raise ValueError(
                f"{who}: params has {number} leaves; the state was made for another number, "
                f"{coverage}. Pass the tree that init got."
            )
        return params
    return part_at(params, {leaf_name(path) for path, _ in known}, who)


def part_at(params: Params, keep: Set[str], who: str) -> PyTree:
    """Return the leaves of params at these paths, `MaskedNode` elsewhere.

    Raises:
        ValueError: when params has nothing at one of them.
    """
    if missing := keep - paths(params):
        raise ValueError(
            f"{who}: params has nothing at {sorted(missing)[0] or 'the root'}, which the state was "
            f"made for; it has leaves at {sorted(paths(params))}. Pass the tree that init got."
        )
    return mask_to(params, keep)


def is_hole(leaf: Any) -> bool:
    """Whether a node stands for a leaf that was masked away."""
    return isinstance(leaf, optax.MaskedNode)


def fill(first: PyTree, *others: PyTree) -> PyTree:
    """One tree of trees with holes in different places: at every leaf the first that has one.

    A hole may stand for a whole subtree, as a mask that is a prefix tree leaves it.
    """

    def pair(a: Any, b: Any) -> Any:
        if is_hole(a) or is_hole(b):
            return b if is_hole(a) else a
        children, treedef = jax.tree.flatten(a, is_leaf=lambda node: node is not a)
        if jax.tree_util.treedef_is_leaf(treedef):
            return a
        rows = zip(children, treedef.flatten_up_to(b), strict=True)
        return treedef.unflatten([pair(*row) for row in rows])

    return functools.reduce(pair, others, first)


def total(f: Any, *trees: PyTree) -> Array:
    """Sum of f over all entries of trees of one structure."""
    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(f, *trees)), jnp.zeros(()))


def ratio(a: Array, b: Array) -> Array:
    """Return a / b, and 0 where both are."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def is_split(x: Array) -> bool:
    """Whether the type of x says that it is split over devices, as it does on explicit meshes."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)
