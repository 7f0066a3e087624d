"""Places: where a view of a parameter meets an activation.

Each place is a custom derivative that returns the cotangent of its activation together with the
statistics of `_moments` as the cotangents of dummy arguments, the view's shadow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax.per_example._taps import _jaxpr
from blr_optax.per_example._taps._convolution import unfold
from blr_optax.per_example._taps._moments import Shadow, moments, weighed

if TYPE_CHECKING:
    from jaxtyping import Array


def place(
    forward: Callable[[Any, Any], Array], statistics: Callable[..., Shadow]
) -> Callable[..., Array]:
    """Return a place from its operation and the statistics of its gradients.

    Args:
        forward: (activation, view) -> output, all examples at once.
        statistics: (activation, output cotangent, shadow, weights) -> cotangents of the shadow.
    """

    @jax.custom_vjp
    def tapped(a: Any, w: Any, shadow: Shadow, weights: Any) -> Array:
        return forward(a, w)

    def fwd(a: Any, w: Any, shadow: Shadow, weights: Any) -> tuple[Array, tuple]:
        return forward(a, w), (a, w, shadow, weights)

    def bwd(saved: tuple, d: Array) -> tuple:
        a, w, shadow, weights = saved
        found = statistics(a, d, shadow, weights)
        # Norms are of all parameters, in the widest of their dtypes.
        found = jax.tree.map(lambda x, like: x.astype(like.dtype), found, shadow)
        back = None
        if a is not None and jnp.issubdtype(a.dtype, jnp.floating):
            (back,) = jax.vjp(lambda x: forward(x, w), a)[1](d)
        return back, None, found, None

    tapped.defvjp(fwd, bwd)
    return tapped


def copy(batch: int) -> Callable[..., Array]:
    """Copy the view for every example: whatever follows, G_i is the copy's cotangent."""

    def forward(_: None, w: Array) -> Array:
        return jnp.broadcast_to(w, (batch, *w.shape))

    def statistics(_: None, d: Array, shadow: Shadow, weights: Any) -> Shadow:
        dtype = shadow.dtype
        d = d.astype(dtype)
        dd = jnp.square(d)

        def summed(x: Array) -> Array:
            return jnp.sum(weighed(x, weights), 0)

        return Shadow(
            None if shadow.total is None else summed(d),
            None if shadow.squares is None else summed(dd),
            None if shadow.norms is None else jnp.sum(dd.reshape(batch, -1), 1),
        )

    return place(forward, statistics)


def _dense_axes(eqn: Any, side: int) -> tuple[tuple, tuple]:
    """Return (grouped, contracted, free) axes of the activation, and of the view, at `side`."""
    order = (1 - side, side)
    contract, grouped = eqn.params["dimension_numbers"]

    def axes(operand: int) -> tuple:
        c, g = tuple(contract[operand]), tuple(grouped[operand])
        ndim = len(eqn.invars[operand].aval.shape)
        return g, c, tuple(i for i in range(ndim) if i not in (*c, *g))

    return axes(order[0]), axes(order[1])


def layer_axes(use: Any) -> tuple[tuple, tuple] | None:
    """Return the axes of a kernel's inputs and outputs, in the order of a place's statistics.

    None for places that are no layers of their own: convolutions with groups, products of which
    several are computed side by side, tables.
    """
    shape = use.eqn.invars[use.operand].aval.shape
    if use.by == "dense":
        grouped, contracted, free = _dense_axes(use.eqn, use.operand)[1]
        return (contracted, free) if math.prod(shape[i] for i in grouped) == 1 else None
    if use.by == "conv" and use.eqn.params["feature_group_count"] == 1:
        outputs, inputs, *space = use.eqn.params["dimension_numbers"].rhs_spec
        return (*space, inputs), (outputs,)
    return None


def dense(eqn: Any, side: int) -> Callable[..., Array]:
    """`dot_general` of an activation with the view, which is operand `side`."""
    flip = side == 0
    (ab, ac, af), (wb, wc, wf) = _dense_axes(eqn, side)
    a_shape, w_shape = (eqn.invars[i].aval.shape for i in (1 - side, side))
    e, m, k = (math.prod(w_shape[i] for i in axes) for axes in (wb, wc, wf))
    positions = math.prod(a_shape[i] for i in af)

    def forward(a: Array, w: Array) -> Array:
        def one(x: Array) -> Array:
            return _jaxpr.bind(eqn, *((w, x) if flip else (x, w)))[0]

        return jax.vmap(one)(a)

    def inputs(a: Array) -> Array:
        order = [0, *(i + 1 for i in (*ab, *af, *ac))]
        return a.transpose(order).reshape(a.shape[0], e, positions, m)

    def statistics(a: Array, d: Array, shadow: Shadow, weights: Any) -> Shadow:
        shape = (e, k, positions) if flip else (e, positions, k)
        d = d.reshape(d.shape[0], *shape)
        d = d.swapaxes(2, 3) if flip else d
        order = (*wb, *wc, *wf)
        back = [order.index(i) for i in range(len(order))]
        found = moments(inputs, a, d, (positions, m), shadow, weights)
        return found.shaped(lambda x: x.reshape([w_shape[i] for i in order]).transpose(back))

    return place(forward, statistics)


def convolution(eqn: Any) -> Callable[..., Array]:
    """`conv_general_dilated` of activations with the view as its kernel."""
    kernel = eqn.invars[1].aval.shape
    spec = eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    window = [kernel[i] for i in spec.rhs_spec[2:]]
    per_group, outputs = kernel[spec.rhs_spec[1]], kernel[spec.rhs_spec[0]] // groups
    out = eqn.outvars[0].aval.shape
    positions = math.prod(out) // out[spec.out_spec[1]]
    taps = math.prod(window)

    def forward(a: Array, w: Array) -> Array:
        return jax.vmap(lambda x: _jaxpr.bind(eqn, x, w)[0])(a)

    def inputs(a: Array) -> Array:
        return unfold(eqn, a).reshape(a.shape[0], groups, positions, taps * per_group)

    def statistics(a: Array, d: Array, shadow: Shadow, weights: Any) -> Shadow:
        order = [spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1]]
        d = d.transpose([0, *(i + 1 for i in order)])
        d = d.reshape(d.shape[0], positions, groups, outputs).swapaxes(1, 2)

        def as_kernel(x: Array) -> Array:
            x = x.reshape(groups, *window, per_group, outputs)
            x = jnp.moveaxis(x, (0, -1), (0, 1)).reshape(groups * outputs, *window, per_group)
            axes = [spec.rhs_spec[0], *spec.rhs_spec[2:], spec.rhs_spec[1]]
            return x.transpose([axes.index(i) for i in range(len(axes))])

        found = moments(inputs, a, d, (positions, taps * per_group), shadow, weights)
        return found.shaped(as_kernel)

    return place(forward, statistics)


def lookup(eqn: Any) -> Callable[..., Array]:
    """`gather` of rows of the view, an embedding; the tokens are the activation.

    G_i has one row for every token that occurs in example i: the cotangents of its occurrences are
    added up before anything is squared.
    """
    rows = eqn.invars[0].aval.shape[0]
    offset = eqn.params["dimension_numbers"].offset_dims
    clip = "CLIP" in str(eqn.params["mode"])

    def forward(a: Array, w: Array) -> Array:
        return jax.vmap(lambda x: _jaxpr.bind(eqn, w, x)[0])(a)

    def statistics(a: Array, d: Array, shadow: Shadow, weights: Any) -> Shadow:
        dtype = shadow.dtype
        batch = d.shape[0]
        width = [d.shape[i + 1] for i in offset]
        tokens = a.reshape(batch, -1).astype(jnp.int32)
        d = jnp.moveaxis(d, [i + 1 for i in offset], range(-len(offset), 0))
        d = d.reshape(batch, tokens.shape[1], -1).astype(dtype)
        # Out of range: clipped like the forward pass, or dropped (a negative index would wrap).
        inside = (tokens >= 0) & (tokens < rows)
        tokens = jnp.clip(tokens, 0, rows - 1) if clip else jnp.where(inside, tokens, rows)

        same = tokens[:, :, None] == tokens[:, None, :]
        earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
        kept = (tokens < rows) & ~jnp.any(same & earlier, -1)
        g = jnp.einsum("bst,btk->bsk", same.astype(dtype), d) * kept[:, :, None]
        gg = jnp.square(g)

        def scattered(x: Array) -> Array:
            table = jnp.zeros((rows, x.shape[-1]), dtype)
            return table.at[tokens].add(weighed(x, weights), mode="drop").reshape(rows, *width)

        return Shadow(
            None if shadow.total is None else scattered(g),
            None if shadow.squares is None else scattered(gg),
            None if shadow.norms is None else jnp.sum(gg, (1, 2)),
        )

    return place(forward, statistics)
