"""Beside `per_example`: its plan in words, and products with per-example gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax.per_example._separable import batch_size, checked
from blr_optax.per_example._taps import _jaxpr, _plan

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax._typing import Params, PyTree


def per_example_dot(
    loss: Callable[..., Array], params: Params, v: PyTree, *batch: PyTree
) -> Float[Array, " B"]:
    """<g_i, v> for every example: one forward-mode pass, no per-example gradient.

    Args:
        loss: `loss(params, *batch)`, a mean over the batch.
        params: tree of floating-point arrays.
        v: direction, a tree like params.
        batch: trees of arrays with one leading axis of examples.

    Returns:
        [B]. A loss with a custom reverse-mode rule (`custom_vjp`) has no forward mode: there the
        pass is the transpose of a reverse-mode pass, which has to be linear, as derivatives are.

    Raises:
        ValueError: as `per_example`, and for v of another structure.

    Source: Pearlmutter (1994). Special case of `blr_update`: the linear response of `memory`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> x = jnp.array([[1.0], [2.0]])
      >>> print(blr.per_example_dot(loss, jnp.ones(1), jnp.ones(1), x))
      [2. 8.]
    """
    _refuse_terms("per_example_dot", loss)
    batch_size("per_example_dot", batch)
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    v = _tree.matching_leaves(v, params, "v")
    v = jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), v, params)
    found = checked("per_example_dot", loss, params, batch)

    def each(params: Params) -> Float[Array, " B"]:
        return jax.vmap(lambda *one: loss(params, *jax.tree.map(lambda x: x[None], one)))(*batch)

    if not _jaxpr.has_primitive(found.jaxpr, _jaxpr.CUSTOM_VJP):
        return jax.jvp(each, (params,), (v,))[1]
    value, pull = jax.vjp(each, params)  # <g_i, v> is linear in the cotangents
    return jax.vjp(lambda c: pull(c)[0], jnp.zeros_like(value))[1](v)[0]


def _refuse_terms(who: str, loss: object) -> None:
    if not callable(loss):
        raise ValueError(
            f"{who}: loss must be a function loss(params, *batch); got {type(loss).__name__}, "
            "whose statistics have a closed form: see per_example."
        )


def explain(loss: Callable[..., Array], params: Params, *batch: PyTree) -> None:
    """Print how `per_example` treats every parameter, why, and what it adds; nothing is run.

    The way is "places" (statistics where it meets activations; why names their kinds), "copy" (a
    small parameter is copied for every example), "chunks" (plain gradients of single examples, a
    few at a time) or "unused" (its gradient is zero). All are exact; they differ in price.

    Args:
        loss: `loss(params, *batch)`, a mean over the batch.
        params: tree of arrays, or of their shapes (`jax.ShapeDtypeStruct`).
        batch: as for `per_example`, or its shapes.

    Raises:
        ValueError: as `per_example`.

    Source: `per_example`, the layer taps behind OGN and VOGN; special case of `blr_update` with
    `estimator=monte_carlo(1, curvature=per_example_squares())`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"]) ** 2)
      >>> params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 1))}
      >>> blr.explain(loss, params, jnp.ones((8, 3)))
      parameter  shape   way     why    extra multiply-adds
      ['v']      (4, 1)  places  dense  32
      ['w']      (3, 4)  places  dense  96
    """
    _refuse_terms("explain", loss)
    size = batch_size("explain", batch)
    ways = checked("explain", loss, params, batch).ways
    rows = [("parameter", "shape", "way", "why", "extra multiply-adds")]
    for (path, leaf), way in zip(jax.tree_util.tree_leaves_with_path(params), ways, strict=True):
        extra = _plan.extra_work(way, leaf.size, size)
        rows.append((_tree.leaf_name(path), str(leaf.shape), way.kind, way.reason, f"{extra:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip())
