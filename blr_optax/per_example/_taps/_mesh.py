"""Meshes with explicit axes: there every intermediate result has a sharding in its type.

The taps run the jaxpr of one example, which knows of no batch and so of no sharding. They leave the
choice to the compiler, as on a mesh with automatic axes, and say only where the results belong.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def explicit_mesh(tree: Any) -> Any:
    """Return the mesh with explicit axes that some array of the tree is on; None without."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree))
    return next((m for m in meshes if AxisType.Explicit in (m.axis_types or ())), None)


def shardings(tree: Any, mesh: Any) -> Any:
    """Where every array of the tree is."""

    def of(x: Any) -> NamedSharding:
        found = jax.typeof(x).sharding
        return NamedSharding(mesh, P() if found.mesh.empty else found.spec)

    return jax.tree.map(of, tree)


def leading(tree: Any, mesh: Any) -> NamedSharding:
    """Where numbers of the examples belong: where the leading axes of a batch are."""
    specs = [sharding.spec for sharding in jax.tree.leaves(shardings(tree, mesh))]
    return NamedSharding(mesh, P(next((spec[0] for spec in specs if spec and spec[0]), None)))
