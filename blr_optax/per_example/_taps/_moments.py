"""Statistics of the gradients of single examples at one place, from inputs and cotangents.

    a_i, d_i   input and output cotangent of example i, over shared positions p
    G_i        sum_p a_ip d_ip^T, the gradient of example i
    c_i        weight of example i (1 when none are given)

    total  sum_i c_i G_i        squares  sum_i c_i G_i^2        norms  |G_i|^2

Without shared positions sum_i G_i^2 is the product of the squares, (A*A)^T (D*D); with them the
G_i are formed a few examples at a time. All is accumulated in float32 or wider.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _loops

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax._typing import PyTree

FORMED_AT_ONCE = 2**25  # numbers of per-example gradients that are held at a time


class Shadow(NamedTuple):
    """Zeros whose cotangents are a view's statistics; None: not wanted.

    Attributes:
        total: like the view.
        squares: like the view.
        norms: [B], shared by all parameters, so that their squared norms add up.
        factors: of one layer.
    """

    total: Any
    squares: Any
    norms: Any
    factors: Any = None

    @property
    def dtype(self) -> Any:
        """The dtype in which statistics are accumulated."""
        return jax.tree.leaves(self)[0].dtype

    def shaped(self, reshape: Callable[[Array], Array]) -> Shadow:
        """With total and squares in another shape."""
        total, squares = (None if x is None else reshape(x) for x in self[:2])
        return self._replace(total=total, squares=squares)


class KroneckerFactors(NamedTuple):
    """Kronecker factors of one layer's Gauss-Newton matrix, sum_i G_i ~ inputs (x) outputs.

    Attributes:
        inputs: [m, m], E[a a^T] over examples and positions.
        mean: [m], E[a]: a bias is one more input that is 1.
        outputs: [k, k], sum over examples and positions of d d^T.
    """

    inputs: PyTree
    mean: PyTree
    outputs: PyTree


class Reduced(KroneckerFactors):
    """Of each example's mean input and summed cotangent over the positions."""


def pieces(examples: int, numbers: int) -> int:
    """Into how many equal pieces the examples are split when each forms this many numbers."""
    most = one_for_each_device(examples)
    fewest = min(most, max(1, math.ceil(examples * numbers / FORMED_AT_ONCE)))
    return next(n for n in range(fewest, most + 1) if most % n == 0)


def one_for_each_device(examples: int) -> int:
    """Return the most pieces of which each still spreads over all devices, as examples may."""
    return examples // math.gcd(examples, jax.device_count())


def strided(x: Array, count: int, index: Array) -> Array:
    """Examples index, index + count, ...: a sharded axis stays sharded within each piece."""
    split = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(split, index, axis=1, keepdims=False)


def weighed(x: Array, weights: Array | None) -> Array:
    """c_i x_i, or x without weights."""
    if weights is None:
        return x
    return x * jnp.expand_dims(weights, range(1, x.ndim)).astype(x.dtype)


def moments(
    inputs: Callable[[Array], Float[Array, "b e p m"]],
    a: Array,
    d: Float[Array, "B e p k"],
    sizes: tuple[int, int],
    wanted: Shadow,
    weights: Float[Array, " B"] | None,
) -> Shadow:
    """Statistics [e, m, k] of G_i = sum_p a_ip d_ip^T, with a_i formed from `a` by `inputs`.

    Args:
        inputs: examples of `a` -> their inputs [b, e, p, m].
        a: what the inputs are made of, leading axis B.
        d: output cotangents.
        sizes: (p, m) of the inputs.
        wanted: what is asked, and in which dtype.
        weights: of the examples, but not in the norms.
    """
    if sizes[0] == 1:
        found = _single(inputs(a), d, wanted, weights)
    else:
        found = _shared(inputs, a, d, sizes[1], wanted, weights)
    if wanted.factors is None:
        return found
    return found._replace(factors=_factors(inputs(a)[:, 0], d[:, 0], wanted, weights))


def _product(spec: str, x: Array, y: Array, dtype: Any) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=dtype)


def _single(a: Array, d: Array, wanted: Shadow, weights: Any) -> Shadow:
    """One position: the squares of a product are the product of the squares."""
    dtype, spec = wanted.dtype, "bepm,bepk->emk"
    aa, dd = jnp.square(a.astype(dtype)), jnp.square(d.astype(dtype))
    return Shadow(
        None if wanted.total is None else _product(spec, a, weighed(d, weights), dtype),
        None if wanted.squares is None else _product(spec, aa, weighed(dd, weights), dtype),
        None if wanted.norms is None else jnp.sum(jnp.sum(aa, -1) * jnp.sum(dd, -1), (1, 2)),
    )


def _shared(
    inputs: Callable[[Array], Array], a: Array, d: Array, m: int, wanted: Shadow, weights: Any
) -> Shadow:
    """Several positions: the G_i are formed, a few examples at a time."""
    dtype, (batch, e, _, k) = wanted.dtype, d.shape
    # On a CPU one at a time: XLA would fuse a batched product into both sums as a naive loop.
    on_cpu = jax.default_backend() == "cpu"
    count = one_for_each_device(batch) if on_cpu else pieces(batch, e * m * k)

    def piece(index: Array) -> Shadow:
        at = functools.partial(strided, count=count, index=index)
        g = _product("bepm,bepk->bemk", inputs(at(a)), at(d), dtype)
        c, gg = None if weights is None else at(weights), jnp.square(g)
        return Shadow(
            None if wanted.total is None else jnp.sum(weighed(g, c), 0),
            None if wanted.squares is None else jnp.sum(weighed(gg, c), 0),
            None if wanted.norms is None else jnp.sum(gg, (1, 2, 3)),
        )

    if count == 1:
        return piece(jnp.zeros((), jnp.int32))

    def step(sums: Shadow, index: Array) -> tuple[Shadow, Any]:
        found = piece(index)
        return jax.tree.map(jnp.add, sums, found._replace(norms=None)), found.norms

    zeros = wanted._replace(norms=None, factors=None).shaped(lambda _: jnp.zeros((e, m, k), dtype))
    sums, norms = _loops.scan(step, zeros, jnp.arange(count))
    return sums._replace(norms=None if norms is None else norms.T.reshape(batch))


def _factors(a: Array, d: Array, wanted: Shadow, weights: Any) -> KroneckerFactors:
    """Return the factors of a layer without groups; of the inputs the sum over examples."""
    kind, dtype, positions = type(wanted.factors), wanted.dtype, a.shape[1]
    a, d = a.astype(dtype), d.astype(dtype)
    if kind is Reduced:
        a, d, positions = jnp.mean(a, 1, keepdims=True), jnp.sum(d, 1, keepdims=True), 1
    ca, cd = weighed(a, weights), weighed(d, weights)
    return kind(
        jnp.einsum("bpm,bpn->mn", ca, a) / positions,
        jnp.sum(ca, (0, 1)) / positions,
        jnp.einsum("bpk,bpl->kl", cd, d),
    )
