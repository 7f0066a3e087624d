"""Reading any optimizer state: this step's weights, the posterior, and a fresh key.

Several posteriors over disjoint leaves (`optax.partition`) are merged leaf by leaf, each by its own
reader. Two over one leaf are an error.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax._distribution import Distribution
from blr_optax._random import canonical_key, step_key
from blr_optax.families import MeanField, Point, PointNatural, SideBySide
from blr_optax.state._reader import draws_noise, map_posterior_states, posterior_states

if TYPE_CHECKING:
    from blr_optax._typing import KeyLike, OptState, Params, PyTree

POINTS = MeanField(Point())


def covered(states: list[PyTree], params: Params, who: str) -> list[PyTree]:
    """For every state, the part of params that it knows (`MaskedNode` elsewhere).

    Raises:
        ValueError: when two states know the same leaf.
    """
    parts, seen = [], set()
    for state in states:
        part = state.reader.part(state, params)
        twice = seen & (known := _tree.paths(part))
        if twice:
            raise ValueError(
                f"{who}: two posteriors over one leaf, {sorted(twice)[0] or 'params'}. Chain "
                "at most one transformation that carries a posterior over each parameter."
            )
        seen |= known
        parts.append(part)
    return parts


def draw(states: list[PyTree], parts: list[PyTree], params: Params, noises: list[PyTree]) -> PyTree:
    """Return the weights at which the loss is evaluated, from the noise (None: a point)."""
    drawn = [
        state.reader.weights(state, part, noise)
        for state, part, noise in zip(states, parts, noises, strict=True)
    ]
    return _tree.merge_by_path(params, *drawn)


def sample(opt_state: OptState, params: Params) -> PyTree:
    """Return this step's weights, at which the gradient is to be taken.

    theta = m + sigma eps, eps a function of the state's key, the step and the leaf's path, so the
    same call within one step gives the same weights and nothing is stored. An optimizer that looks
    at its parameters (SGD, Adam, Newton) returns params.

    Args:
        opt_state: the state of any chain, mask, partition or wrapper with a posterior inside.
        params: the parameters, the posterior's mean.

    Returns:
        A tree like params, in its dtypes.

    Raises:
        ValueError: when the state carries no posterior, or two over one leaf.

    Source: Shen et al. (2024), Algorithm 1, line 1. For every row of `blr_update`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> params = jnp.zeros(3)
      >>> state = blr.ivon(0.1, ess=1e12).init(params)
      >>> print(jnp.abs(blr.sample(state, params)).max() < 1e-5)
      True
    """
    states = posterior_states(opt_state, "sample", params)
    parts = covered(states, params, "sample")
    noises = [noise_of(state) for state in states]
    return draw(states, parts, params, noises)


def noise_of(state: OptState, index: Any = 0, fold: Any = None) -> PyTree:
    """Return the noise of one draw of this step; None for a point. `fold` separates devices."""
    if not draws_noise(state):
        return None
    core = state.reader.core(state)
    key = step_key(core.key, core.count, index)
    return state.reader.noise(state, key if fold is None else jax.random.fold_in(key, fold))


def posterior(opt_state: OptState, params: Params) -> Distribution:
    """Return the posterior that an optimizer state carries, as a value.

    Args:
        opt_state: the state of any chain, mask, partition or wrapper with a posterior inside.
        params: the parameters, the posterior's mean.

    Returns:
        A `Distribution` over a tree like params. Leaves without one are the points that params has
        there (family `Point`); parts of different families stand side by side (`SideBySide`). Its
        mean and samples have the dtypes of params, its own parameters float32 or wider.

    Raises:
        ValueError: when the state carries no posterior, or two over one leaf.

    Source: Khan and Rue (2023), Table 1. For every row of `blr_update`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> params = {"w": jnp.ones(2)}
      >>> q = blr.posterior(
      ...     blr.ivon(0.1, ess=50.0, hess_init=2.0, weight_decay=0.0).init(params), params
      ... )
      >>> print(q.mean["w"], q.variance["w"])
      [1. 1.] [0.01 0.01]
    """
    states = posterior_states(opt_state, "posterior", params)
    parts = covered(states, params, "posterior")
    found = [
        (_tree.paths(part), state.reader.posterior(state, part))
        for state, part in zip(states, parts, strict=True)
    ]
    together = _together([one for one in found if one[0]] or found[:1])
    points = _tree.paths(params).difference(*(paths for paths, _ in found))
    if points:
        # Copies: params may be donated to the next step, the posterior is a value to keep.
        known = jax.tree.map(jnp.array, _tree.mask_to(params, points))
        together.append(Distribution(POINTS, PointNatural(known)))
    if len(together) == 1:
        (q,) = together
    else:
        family = SideBySide(tuple(q.family for q in together))
        q = Distribution(family, family.natural(*(q.natural for q in together)))
    dtypes = tuple(jnp.result_type(x) for x in jax.tree.leaves(params))
    return dataclasses.replace(q, dtypes=dtypes) if any(map(_tree.narrow, dtypes)) else q


def _together(found: list[tuple[set[str], Distribution]]) -> list[Distribution]:
    """Join posteriors over disjoint leaves (given by path) where one family holds both.

    Those that cannot be joined are sorted by their first leaf, so that the order of an optimizer's
    groups does not matter.
    """
    joined: list[tuple[set[str], Distribution]] = []
    for paths, q in found:
        for k, (others, p) in enumerate(joined):
            both = p.family.join(p.natural, q.family, q.natural) or q.family.join(
                q.natural, p.family, p.natural
            )
            if both is not None:
                joined[k] = (others | paths, Distribution(*both))
                break
        else:
            joined.append((paths, q))
    return [q for _, q in sorted(joined, key=lambda one: min(one[0], default=""))]


def reseed(opt_state: OptState, key: KeyLike) -> OptState:
    """Return the same state with another key, so that an ensemble's members draw different noise.

    `jax.vmap(tx.init)` gives every member one key; with a stacked state the new key is split over
    the leading axes of the old.

    Args:
        opt_state: a state with a posterior inside.
        key: typed key or integer seed.

    Raises:
        ValueError: when the state carries no posterior.

    Source: the line "Keys" of the contract (docs/contract.md). For every row of `blr_update`.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> state = jax.vmap(blr.ivon(0.1, ess=10.0).init)(jnp.zeros((4, 2)))
      >>> state = blr.reseed(state, jax.random.key(1))
      >>> theta = jax.vmap(blr.sample)(state, jnp.zeros((4, 2)))
      >>> print(len(set(theta[:, 0].tolist())))
      4
    """
    posterior_states(opt_state, "reseed", key)
    key = canonical_key(key)

    def renew(state: OptState) -> Any:
        if not draws_noise(state):
            return state
        core = state.reader.core(state)
        shape = jnp.shape(core.key)
        new = core._replace(key=jax.random.split(key, shape) if shape else jax.random.clone(key))
        return state.reader.with_core(state, new)

    return map_posterior_states(renew, opt_state)
