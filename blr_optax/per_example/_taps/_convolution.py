"""The inputs of a convolution at every output position, by slices of the padded image."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def unfold(eqn: Any, a: Array) -> Float[Array, "B groups n ... taps c"]:
    """Return what the kernel meets: for every output position the inputs under its window.

    Strides are strides of the slices, a dilated kernel spaces their starts, a dilated input (a
    transposed convolution) is padded in between.

    Args:
        eqn: the `conv_general_dilated` equation of one example.
        a: its inputs, a leading axis of examples.

    Returns:
        [B, groups, n, positions ..., taps, channels per group].
    """
    spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    n, c, *space = (i + 1 for i in spec.lhs_spec)
    a = a.transpose([0, n, *space, c])
    holes = [(0, 0, 0)]
    padding = zip(eqn.params["padding"], eqn.params["lhs_dilation"], strict=True)
    config = [*holes * 2, *((low, high, gap - 1) for (low, high), gap in padding), *holes]
    a = jax.lax.pad(a, jnp.zeros((), a.dtype), config)

    window = [kernel[i] for i in spec.rhs_spec[2:]]
    steps = eqn.params["window_strides"]
    sizes = [out[i] for i in spec.out_spec[2:]]

    def tap(offset: tuple[int, ...]) -> Array:
        starts = [o * gap for o, gap in zip(offset, eqn.params["rhs_dilation"], strict=True)]
        limits = [s + (size - 1) * t + 1 for s, size, t in zip(starts, sizes, steps, strict=True)]
        edges = ([0, 0, *starts, 0], [*a.shape[:2], *limits, a.shape[-1]])
        return jax.lax.slice(a, *edges, [1, 1, *steps, 1])

    taps = jnp.stack([tap(o) for o in itertools.product(*map(range, window))], axis=-2)
    taps = taps.reshape(*taps.shape[:-1], groups, -1)
    return jnp.moveaxis(taps, -2, 1)
