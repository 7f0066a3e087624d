"""Standard noise over a tree of weights, drawn leaf by leaf from a key and the leaf's path.

The noise of a step is a pure function of (key, sample index, path), so it is never stored: whoever
needs it derives it again, and inside one jit XLA merges the derivations.

Two generators. "jax" is `jax.random.normal`. "hash" is made for perturbing weights, where a
cryptographic generator costs more than a training step: every number hashes its own counter,

    z <- (i xor k0) c1;   z <- (z xor (z >> 15)) (k1 or 1);   z <- z xor (z >> 16)

and becomes a normal by Box and Muller, e = sqrt(-2 log u) cos(2 pi t), with u from the high bits
and t from a further round, so that one 32-bit word buys one normal. Logarithm and cosine are
polynomials on the ranges that occur here, which vectorises where library calls do not. A standard
logistic number is log( u / (1 - u) ) with 23 bits of u, at most 16.7 in size.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import _tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array, Float, UInt32

    from blr_optax._typing import KeyLike, PyTree

GENERATORS = ("hash", "jax")

# Odd multipliers with good avalanche: lowbias32's first, and the golden ratio's.
_C1, _C2 = np.uint32(0x7FEB352D), np.uint32(0x9E3779B1)

# cos(2 pi t) = p(t^2) for |t| <= 1/2, and log(1 + m) = m q(m) on [sqrt(1/2) - 1, sqrt(2) - 1].
_COS = (
    1.0,
    -19.739208802,
    64.939394023,
    -85.456817207,
    60.244641372,
    -26.426256783,
    7.903536371,
    -1.714390711,
)
_LOG = (
    1.0,
    -0.5,
    0.33333331,
    -0.24999994,
    0.20000714,
    -0.16668057,
    0.14249323,
    -0.12420141,
    0.11676998,
    -0.11514610,
    0.07037684,
)


def check_generator(name: str) -> str:
    """Raise ValueError for an unknown generator."""
    if name not in GENERATORS:
        raise ValueError(f"generator={name!r} is unknown; known: {', '.join(GENERATORS)}.")
    return name


def _polynomial(x: Array, coefficients: tuple[float, ...]) -> Array:
    total = jnp.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * x + np.float32(c)
    return total


def _log(u: Float[Array, ...]) -> Float[Array, ...]:
    """log u of positive normal float32 numbers: exponent plus a polynomial of the mantissa."""
    bits = jax.lax.bitcast_convert_type(u, jnp.uint32) + np.uint32(0x3F800000 - 0x3F3504F3)
    exponent = (bits >> 23).astype(jnp.int32) - 127
    mantissa = (bits & np.uint32(0x7FFFFF)) + np.uint32(0x3F3504F3)
    m = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0
    return m * _polynomial(m, _LOG) + exponent.astype(jnp.float32) * np.float32(np.log(2.0))


def _counters(shape: tuple[int, ...]) -> UInt32[Array, ...]:
    """Row-major positions, by sums of iotas: no reshape, so a sharded leaf stays sharded."""
    total, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        step = np.uint32(stride % 2**32)
        total = total + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
        stride *= shape[axis]
    return total


def _hashed(
    words: UInt32[Array, 2], shape: tuple[int, ...]
) -> tuple[Float[Array, ...], UInt32[Array, ...]]:
    """Uniform numbers in (0, 1], and the words whose high bits they are."""
    z = (_counters(shape) ^ words[0]) * _C1
    # A multiplier that is itself part of the key: streams that share counters share nothing else.
    z = (z ^ (z >> 15)) * (words[1] | np.uint32(1))
    z = z ^ (z >> 16)
    return ((z >> 8).astype(jnp.float32) + 0.5) * np.float32(2.0**-24), z


def hash_normal(words: UInt32[Array, 2], shape: tuple[int, ...]) -> Float[Array, ...]:
    """Return standard normals from two key words by the counter hash, float32."""
    u, z = _hashed(words, shape)
    z = z * _C2
    z = z ^ (z >> 15)
    t = z.astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-32)
    return jnp.sqrt(-2.0 * _log(u)) * _polynomial(t * t, _COS)


def hash_logistic(words: UInt32[Array, 2], shape: tuple[int, ...]) -> Float[Array, ...]:
    """Return standard logistic numbers from two key words by the counter hash, float32."""
    _, z = _hashed(words, shape)
    u = ((z >> 9).astype(jnp.float32) + 0.5) * np.float32(2.0**-23)  # never 1: exact in float32
    return _log(u / (1.0 - u))


def standard_normal(key: Array, like: PyTree, generator: str = "jax") -> PyTree:
    """Return a tree of standard normals shaped like `like`, in its statistics dtype.

    Args:
        key: typed key of this draw.
        like: tree of arrays; `MaskedNode`s in it are passed over.
        generator: "hash" or "jax".
    """
    return _standard(hash_normal, jax.random.normal, key, like, generator)


def standard_uniform(key: Array, like: PyTree) -> PyTree:
    """Return a tree of numbers in (0, 1], of 24 random bits each, as `standard_normal`."""
    return _standard(lambda *a: _hashed(*a)[0], jax.random.uniform, key, like, "hash")


def standard_normals(key: Array, like: PyTree, shape: tuple[int, ...]) -> PyTree:
    """Return independent trees of standard normals, along leading axes of a shape.

    By the hash, which compiles in a fraction of the time of one cryptographic generator per leaf;
    its numbers have 24 random bits, so trees with a float64 leaf are drawn by "jax". Every tree has
    a key of its own: a counter does not wrap however many are drawn.
    """
    wide = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(like))
    generator = "jax" if wide else "hash"
    if not shape:
        return standard_normal(key, like, generator)
    keys = jax.random.split(key, math.prod(shape))
    draws = jax.vmap(lambda k: standard_normal(k, like, generator))(keys)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), draws)


def standard_logistic(key: Array, like: PyTree, generator: str = "jax") -> PyTree:
    """Return a tree of standard logistic numbers, as `standard_normal`."""
    return _standard(hash_logistic, jax.random.logistic, key, like, generator)


def _standard(hashed: Callable, plain: Callable, key: Array, like: Any, generator: str) -> Any:
    """Return a tree of noise by one of two generators."""
    if generator == "hash":
        words = jax.random.bits(key, (2,), jnp.uint32)

    def leaf(path: Any, x: Any) -> Array:
        dtype, code = _tree.statistics_dtype(x.dtype), _tree.path_hash(path)
        if generator == "jax":
            return plain(jax.random.fold_in(key, code), x.shape, dtype)
        # The path enters both words, once mixed, so that leaves share no counter sequence.
        mixed = np.uint32((code * 0x9E3779B1 + 0x7F4A7C15) % 2**32)
        return hashed(words ^ jnp.array([code, mixed], jnp.uint32), x.shape).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, like)


def step_key(key: Array, count: Array, sample: PyTree = 0) -> Array:
    """Return the key of one draw: the state's key, folded with the step and the sample's index."""
    return jax.random.fold_in(jax.random.fold_in(key, count), sample)


def leading_shape(name: str, shape: Any) -> tuple[int, ...]:
    """Return the shape of draws, given as a tuple, a list or one number.

    Raises:
        ValueError: for what is no shape.
    """
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    try:
        if all(operator.index(size) >= 0 for size in sizes):
            return tuple(map(operator.index, sizes))
    except TypeError:
        pass
    shown = repr(shape) if np.ndim(shape) == 0 and shape is not None else type(shape).__name__
    raise ValueError(f"{name}: shape={shown} must be whole numbers, such as (8,).")


def canonical_key(key: KeyLike) -> Array:
    """Return a typed key from a typed key or an integer seed.

    Raises:
        ValueError: for a raw uint32 key, and for an array of keys.
    """
    if isinstance(key, (int, np.integer)):
        return jax.random.key(key)
    if not hasattr(key, "dtype"):
        raise ValueError(
            f"key: give a typed key, jax.random.key(seed), or an integer seed; got "
            f"{type(key).__name__}."
        )
    if jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        if jnp.ndim(key):
            raise ValueError(
                f"key: give one typed key, not an array of shape {jnp.shape(key)}; for several, "
                "jax.vmap over them."
            )
        return jax.random.clone(key)  # donating the state must not delete the caller's key
    if jnp.ndim(key) == 0 and jnp.issubdtype(jnp.result_type(key), jnp.integer):
        return jax.random.key(key)
    raise ValueError(
        "key: give a typed key, jax.random.key(seed), or an integer seed; got an array of dtype "
        f"{jnp.result_type(key)} (jax.random.wrap_key_data turns a raw key into a typed one)."
    )
