"""Stochastic rounding: steps below the spacing of bfloat16 weights are taken on average.

    m' = m + u,  k = floor(m' / s),  m <- s (k + 1) with probability m' / s - k,  else  s k

with s the spacing of the weights' dtype at m', so that E[m] = m'. Rounding to the nearest drops
every step below s / 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._random import canonical_key, standard_uniform
from blr_optax._rounding import stochastically

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import KeyLike, OptState, Params, Updates


class RoundStochasticallyState(NamedTuple):
    """State of `round_stochastically`.

    Attributes:
        step: steps made (int32).
        key: typed key, constant.
    """

    step: Array
    key: Array


def round_stochastically(key: KeyLike = 0) -> optax.GradientTransformationExtraArgs:
    """Round the new weights of a dtype below float32 up or down at random, right on average.

    m <- round(m + u), E[round(x)] = x. Weights of float32 or wider are left alone. Chain it last:
    `optax.chain(blr.ivon(...), blr.round_stochastically())`, before `optax.apply_updates`, under
    which a step larger than the weight itself is rounded once more.

    Args:
        key: typed key or integer seed.

    Raises:
        ValueError: for a raw key.

    Source: Gupta et al. (2015), arXiv:1502.02551, Sec. 3.1. It belongs behind any row of
    `blr_update` whose weights are bfloat16.

    Example:
      >>> import jax, jax.numpy as jnp, optax, blr_optax as blr
      >>> params = jnp.ones(4096, jnp.bfloat16)  # the next number is 1.0078
      >>> tx = blr.round_stochastically()
      >>> updates, _ = tx.update(jnp.full(4096, 0.001, jnp.bfloat16), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates).astype(jnp.float32).mean().round(3))
      1.001
    """
    key = canonical_key(key)

    def init(params: Params) -> RoundStochasticallyState:
        return RoundStochasticallyState(jnp.zeros((), jnp.int32), canonical_key(key))

    def update(
        updates: Updates,
        state: OptState,
        params: Params = None,
        **extra: object,
    ) -> tuple[Updates, OptState]:
        if params is None:
            raise ValueError(
                "round_stochastically: update needs params, tx.update(grads, state, params)."
            )
        chances = standard_uniform(jax.random.fold_in(state.key, state.step), params)

        def leaf(u: Array, m: Array, chance: Array) -> Array:
            if not _tree.narrow(m.dtype):
                return u
            old = m.astype(chance.dtype)
            rounded = stochastically(old + u.astype(chance.dtype), m.dtype, chance)
            return (rounded - old).astype(u.dtype)

        step = optax.safe_increment(state.step)
        return jax.tree.map(leaf, updates, params, chances), state._replace(step=step)

    return optax.GradientTransformationExtraArgs(init, update)
