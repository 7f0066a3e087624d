"""Sums over examples of what the taps find, of one batch.

value  sum_i c_i l_i      total  sum_i c_i g_i      squares  sum_i c_i g_i^2      norms  |g_i|^2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _loops, _tree
from blr_optax.per_example._taps import _jaxpr
from blr_optax.per_example._taps._layers import layer
from blr_optax.per_example._taps._moments import KroneckerFactors, Shadow, pieces, strided, weighed
from blr_optax.per_example._taps._plan import CHUNKS, COPY, PLACES, UNUSED, Way, plan
from blr_optax.per_example._taps._run import Batch, Plain, Runner, Tapped, Value

if TYPE_CHECKING:
    from jaxtyping import Array


class Traced(NamedTuple):
    """A loss of one example, traced.

    Attributes:
        loss: (params, *batch) -> scalar, a mean over the batch.
        jaxpr: of one example, which keeps its leading axis of 1.
        consts: what the loss closes over.
        shape: of the loss's result.
        ways: how each parameter's statistics are computed.
    """

    loss: Callable[..., Array]
    jaxpr: Any
    consts: Sequence[Any]
    shape: Any
    ways: list[Way]


class Wanted(NamedTuple):
    """Which sums are wanted besides value and total.

    Attributes:
        squares: sum_i c_i g_i^2.
        norms: |g_i|^2.
        factors: the type of the layers' Kronecker factors, or None.
    """

    squares: bool = False
    norms: bool = False
    factors: type[KroneckerFactors] | None = None


class Sums(NamedTuple):
    """Sums over the examples of a batch; lists over the parameters' leaves; None: not wanted."""

    value: Any
    total: Any
    squares: Any
    norms: Any
    factors: Any = None
    ggn: Any = None


def one_example(batch: Any) -> Any:
    """Return the shapes of a batch of one example."""
    return jax.tree.map(lambda x: _loops.shaped(x, (1, *x.shape[1:])), batch)


def shapes(tree: Any) -> Any:
    """Return the shapes and dtypes of a tree."""
    return jax.tree.map(lambda x: _loops.shaped(x, x.shape), tree)


def traced(loss: Callable[..., Array], params: Any, batch: tuple) -> Traced:
    """Traces the loss of one example and plans its taps."""
    closed, shape = _jaxpr.trace(loss, shapes(params), *one_example(batch))
    jaxpr, consts = _jaxpr.open_jaxpr(closed)
    return Traced(
        loss, jaxpr, consts, shape, plan(jaxpr, [x.shape for x in jax.tree.leaves(params)])
    )


def wide(x: Array) -> Array:
    """In the dtype in which statistics are accumulated."""
    return x.astype(_tree.statistics_dtype(x.dtype))


def zeros_like(x: Array) -> Array:
    """Zeros in the statistics dtype of a parameter."""
    return jnp.zeros_like(x, dtype=_tree.statistics_dtype(x.dtype))


def outputs(
    found: Traced, leaves: Sequence[Array], batch: tuple, shadows: Sequence[Shadow], weights: Any
) -> list[Array]:
    """Return what the traced function returns for every example, with taps at its places."""
    examples = jax.tree.leaves(batch)
    runner = Runner(len(examples[0]), weights)

    def entered(leaf: Array, way: Way, shadow: Shadow) -> Value:
        if way.kind == PLACES:
            return Tapped(leaf, shadow)
        if way.kind == COPY:
            return runner.copied(Tapped(leaf, shadow))
        return Plain(leaf)

    values = [
        *map(entered, leaves, found.ways, shadows),
        *(Batch(jnp.expand_dims(x, 1)) for x in examples),
    ]
    return [runner.copied(v).x for v in runner.run(found.jaxpr, found.consts, values)]


def sums(found: Traced, params: Any, batch: tuple, wanted: Wanted, weights: Array | None) -> Sums:
    """Return one batch's sums: one backward pass with taps, and chunks where they are needed."""
    leaves = jax.tree.leaves(params)
    zeros = [zeros_like(x) for x in leaves]
    nothing = [None] * len(leaves)
    norms = jnp.zeros(jax.tree.leaves(batch)[0].shape[:1], jnp.result_type(*zeros))
    layers, factors = [None] * len(leaves), [None] * len(leaves)
    if wanted.factors is not None:
        kind = wanted.factors
        layers = [layer(way, x.size) for way, x in zip(found.ways, leaves, strict=True)]
        factors = [k and k.empty(kind, z.dtype) for k, z in zip(layers, zeros, strict=True)]
    dummies = Sums(
        None,
        zeros,
        list(zeros) if wanted.squares else None,
        norms if wanted.norms else None,
        factors,
    )
    dummies = _loops.spread(dummies, _loops.varying((params, batch)))
    chunks = [i for i, way in enumerate(found.ways) if way.kind == CHUNKS]
    in_chunks: Any = chunk_sums(found, params, chunks, batch, wanted, weights) if chunks else None
    if chunks and all(way.kind in (CHUNKS, UNUSED) for way in found.ways):
        sums = dummies._replace(value=in_chunks.value)
    else:

        def loss(dummies: Sums) -> tuple[Array, Array]:
            shadows = [
                Shadow(total, squares, dummies.norms, factors)
                for total, squares, factors in zip(
                    dummies.total, dummies.squares or nothing, dummies.factors, strict=True
                )
            ]
            (each,) = outputs(found, leaves, batch, shadows, weights)
            return jnp.sum(each), each

        sums, each = jax.grad(loss, has_aux=True)(dummies)
        factors = [k and k.ordered(f) for k, f in zip(layers, sums.factors, strict=True)]
        sums = sums._replace(value=jnp.sum(weighed(wide(each), weights)), factors=factors)
    for place, i in enumerate(chunks):
        sums.total[i] = in_chunks.total[place]
        if wanted.squares:
            sums.squares[i] = in_chunks.squares[place]
    if chunks and wanted.norms:
        sums = sums._replace(norms=sums.norms + in_chunks.norms)
    return sums


def chunk_sums(
    found: Traced,
    params: Any,
    which: Sequence[int],
    batch: tuple,
    wanted: Wanted,
    weights: Array | None,
) -> Sums:
    """Plain per-example gradients of some parameters, a few examples at a time."""
    leaves, tree = jax.tree.flatten(params)
    size = len(jax.tree.leaves(batch)[0])
    chosen = [leaves[i] for i in which]
    count = pieces(size, sum(x.size for x in chosen))

    def loss(chosen: list[Array], example: tuple) -> Array:
        full = dict(enumerate(leaves)) | dict(zip(which, chosen, strict=True))
        return found.loss(tree.unflatten(list(full.values())), *example)

    def piece(index: Array) -> Sums:
        examples = jax.tree.map(lambda x: jnp.expand_dims(strided(x, count, index), 1), batch)
        value, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(chosen, examples)
        c = None if weights is None else strided(weights, count, index)
        grads = list(map(wide, grads))
        gg = [jnp.square(g) for g in grads]
        return Sums(
            jnp.sum(weighed(wide(value), c)),
            [jnp.sum(weighed(g, c), 0) for g in grads],
            [jnp.sum(weighed(g, c), 0) for g in gg] if wanted.squares else None,
            sum(jnp.sum(g.reshape(len(g), -1), 1) for g in gg) if wanted.norms else None,
        )

    return over_pieces(piece, count)


def over_pieces(piece: Callable[[Array], Sums], count: int) -> Sums:
    """Return the sums of strided pieces, added up; norms in the order of the examples."""
    if count == 1:
        return piece(jnp.zeros((), jnp.int32))
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(piece, jnp.zeros((), jnp.int32))
    )

    def step(total: Sums, index: Array) -> tuple[Sums, Any]:
        found = piece(index)
        return jax.tree.map(jnp.add, total, found._replace(norms=None)), found.norms

    total, norms = _loops.scan(step, zero._replace(norms=None), jnp.arange(count))
    return total._replace(norms=None if norms is None else norms.T.reshape(-1))
