"""Weights below float32: rounding on average, and noise whose statistics rounding leaves right.

    x  =  sigma' eps,   theta  =  round(m + x),   sigma'  =  max( sigma, 3 s / 4 )
    s     spacing of the weights' dtype at m          g  =  h (theta - m), a curvature of h

Rounded to nearest, noise far below the spacing moves no weight, or a few by a whole spacing: the
curvature that it measures is 0, or far too large. From 3 s / 4 on rounding adds variance as if it
were independent of the noise, to 1e-4 of it for normal noise (2 % for uniform noise):

    E[(theta - m)^2]  =  sigma'^2 + s^2 / 12                  Sheppard's correction
    E[x (theta - m)]  =  sigma'^2,   E[x g] = h sigma'^2      no correction

so that noise of deviation sigma', where sigma was asked for, still measures h: as
E[x g] / sigma'^2, or from the displacement that was made, E[(theta - m) g] over its own variance.

What is no noise and shorter than s / 2 (a step, an adversary) is rounded stochastically: up with
the probability of its remainder, E[round(x)] = x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax._random import canonical_key, standard_uniform, step_key

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import DTypeLike, KeyLike, PyTree

LEAST_SPACINGS = 0.75
NO_SAMPLE = 2**31


def least_deviation(sigma: Array, m: Array, whole: bool = False) -> Array:
    """Return the deviation that noise gets on the weights m: sigma, or more below float32.

    With `whole` one floor for all of m, that of its largest entry: for noise along other axes.
    """
    if not _tree.narrow(m.dtype):
        return sigma
    s = _tree.spacing(m)
    return jnp.maximum(sigma, LEAST_SPACINGS * (jnp.max(s) if whole and m.size else s))


def widening(sigma: Array, m: Array, whole: bool = False) -> Array | float:
    """Return k >= 1, by which noise of deviation sigma is multiplied on the weights m.

    Of noise x that was asked for, k x is drawn, and E[x g / k] is what E[x g] would have been.
    """
    return least_deviation(sigma, m, whole) / sigma if _tree.narrow(m.dtype) else 1.0


def rounding_variance(m: Array) -> Array:
    """s^2 / 12, the variance that rounding adds; below a power of two the grid is twice as fine."""
    s = _tree.spacing(m)
    at_power = jnp.abs(jnp.frexp(m.astype(s.dtype))[0]) == 0.5
    return jnp.where(at_power, 0.625, 1.0) * jnp.square(s) / 12.0  # the mean of 1 and 1/4


def share_unmoved(sigma: Array, m: Array) -> Array:
    """Return the chance that normal noise, rounded to the dtype of the weights m, moves them not.

    P(|x| < s / 2) = erf( s / (2 sqrt(2) sigma) );  0 where sigma is 0, of points.
    """
    drawn = jnp.where(sigma > 0, sigma, 1.0)
    found = jax.lax.erf(_tree.spacing(m).astype(drawn.dtype) / (2.0 * 2.0**0.5 * drawn))
    return jnp.where(sigma > 0, found, 0.0)


def stochastically(x: Array, dtype: DTypeLike, chance: Array) -> Array:
    """Return x on the grid of a dtype, up with the probability of its remainder: E[.] = x."""
    s = _tree.spacing(x, dtype)
    below = jnp.floor(x / s)
    return s * (below + (chance < x / s - below))


def cast_on_average(tree: PyTree, like: PyTree, key: KeyLike, count: Array) -> PyTree:
    """Return a tree in the dtypes of another; what is below float32 is rounded stochastically.

    The chances are those of a step, and none of the samples that it numbers from 0 on.
    """
    if not any(_tree.narrow(m.dtype) for m in jax.tree.leaves(like)):
        return jax.tree.map(lambda x, m: x.astype(m.dtype), tree, like)

    chances = standard_uniform(step_key(canonical_key(key), count, NO_SAMPLE), like)

    def leaf(x: Array, m: Array, chance: Array) -> Array:
        x = stochastically(x, m.dtype, chance) if _tree.narrow(m.dtype) else x
        return x.astype(m.dtype)

    return jax.tree.map(leaf, tree, like, chances)
