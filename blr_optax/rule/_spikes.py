"""Gradients far longer than all those before them, shortened: one bad batch moves no posterior.

    n   <-  |g|                                            of all weights together
    f   <-  min( 1, r s / n )                              r = clip_spikes, s the length so far
    g   <-  f g,   c <- f^k c                              k = 2 for squares of gradients, else 1
    s^2 <-  s^2 + max(1 / t, 1 / 100) ( (f n)^2 - s^2 )    t = 1, 2, ... of gradients that are not 0

A gradient 1e6 times too long would otherwise move the mean by as much, and the precision by the
square of that: a relative step u = rho (c + d0 - p) / p far above 1, which takes 1 / rho steps and
more to be forgotten. With f no u is larger than r^k times an ordinary one. The first `WARM_UP`
gradients are not shortened: there is no ordinary length yet. A length that grows for good is
followed, by a factor of sqrt(1 + r^2 / 100) per step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax._validate import check_number, holds

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import PyTree, Scalar

# A length that ordinary training never meets: batch noise and the way to a minimum keep |g| within
# a few times its root mean square, and one that doubles at every step within ten times.
CLIP_SPIKES = 30.0
MEMORY, WARM_UP = 100, 20


class SpikesState(NamedTuple):
    """What is known of the gradients' length.

    Attributes:
        square: s^2, the mean square length of the last gradients.
        met: gradients so far that were finite and not zero (int32).
        shortened: how many of them were shortened (int32).
    """

    square: Array
    met: Array
    shortened: Array


def check_bound(clip_spikes: Scalar | None) -> None:
    """Raise ValueError unless it is one number of at least 1, or None."""
    if clip_spikes is None:
        return
    check_number("clip_spikes", clip_spikes)
    if not holds(lambda x: x >= 1, clip_spikes):
        raise ValueError(f"clip_spikes={clip_spikes!r} must be at least 1, or None for no bound.")


def first_spikes(clip_spikes: Scalar | None) -> SpikesState | tuple[()]:
    """Nothing is known yet; () without a bound."""
    if clip_spikes is None:
        return ()
    count = (jnp.zeros((), jnp.int32) for _ in range(2))
    return SpikesState(jnp.zeros((), jnp.result_type(float)), *count)


def shorten(
    state: SpikesState | tuple[()], clip_spikes: Scalar | None, square: Array, finite: Array
) -> tuple[Array | float, SpikesState | tuple[()]]:
    """Return f of a gradient whose squares have this sum, and what is known after it."""
    if clip_spikes is None or not isinstance(state, SpikesState):
        return 1.0, state
    square = square.astype(state.square.dtype)
    known = (state.met >= WARM_UP) & (state.square > 0)
    largest = jnp.where(known, clip_spikes**2 * state.square, jnp.inf)
    spike = finite & (square > largest)
    # Chosen before the root and the quotient, whose derivatives are not finite elsewhere.
    factor = jnp.sqrt(jnp.where(spike, largest, 1.0) / jnp.where(spike, square, 1.0))
    counts = (finite & (square > 0)).astype(jnp.int32)
    met = state.met + counts
    rate = counts / jnp.clip(met, 1, MEMORY)
    change = jnp.where(finite, jnp.minimum(square, largest), 0.0) - state.square
    return factor, SpikesState(
        (state.square + rate * change).astype(state.square.dtype),
        met,
        state.shortened + spike.astype(jnp.int32),
    )


def times(factor: Array | float, tree: PyTree) -> PyTree:
    """Return the tree, every leaf multiplied by one number."""
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)
