"""The strength of a prior per leaf: a number, a tree or a schedule, for all leaves or some."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from blr_optax import _tree
from blr_optax._validate import at, check_positive, concrete, is_schedule, refuse_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from blr_optax._typing import Hyperparameter, Params, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedDecay:
    """A weight decay of some leaves, none of the others.

    Attributes:
        decay: a number, prefix tree or schedule.
        mask: a prefix tree of booleans, or a function from params to one.
    """

    decay: Hyperparameter
    mask: PyTree | Callable[[Params], PyTree]


def masked(decay: Hyperparameter, mask: PyTree) -> PyTree:
    """Return the decay where the mask is true; the decay itself without one.

    Raises:
        ValueError: for a decay that is none.
    """
    if not isinstance(decay, MaskedDecay):
        if any(isinstance(leaf, bool | np.bool_) for leaf in jax.tree.leaves(decay)):
            raise ValueError(
                f"weight_decay={decay} has True or False, which are no numbers: what tells where "
                "to decay goes into mask=, beside the number."
            )
        check_positive("weight_decay", decay, zero=True)
    return decay if mask is None else MaskedDecay(decay, mask)


def moves(decay: Hyperparameter) -> bool:
    """Whether a decay depends on the step."""
    return is_schedule(decay.decay if isinstance(decay, MaskedDecay) else decay)


def mask_leaves(mask: PyTree, like: Params) -> PyTree:
    """Return a tree like `like` of plain booleans.

    Raises:
        ValueError: for entries that are none, or known to no one before the step is run.
    """
    if not jax.tree.leaves(like):  # `map_params`'s placeholder, or an empty group
        return like
    found = _tree.fitting_leaves(mask(like) if is_schedule(mask) else mask, like, "mask")
    for leaf in jax.tree.leaves(found):
        if not concrete(leaf) or np.ndim(leaf) or np.asarray(leaf).dtype != bool:
            raise ValueError(
                f"mask has {leaf!r}; it takes True or False, a tree of these, or a function from "
                "params to one, as optax.adamw does."
            )
    return jax.tree.map(bool, found)


def decay_leaves(
    decay: Hyperparameter, like: PyTree, count: Any, name: str = "weight_decay (prior_precision)"
) -> PyTree:
    """Return the decay of every leaf at a step, a tree like `like`."""
    if not isinstance(decay, MaskedDecay):
        return _tree.fitting_leaves(at(decay, count), like, name)
    numbers = decay_leaves(decay.decay, like, count, name)
    return jax.tree.map(lambda d, m: d if m else 0.0, numbers, mask_leaves(decay.mask, like))


def check_decay(decay: Hyperparameter, params: Params) -> None:
    """Raise ValueError for a function that is no schedule but makes a tree of params."""
    refuse_mask("weight_decay", decay.decay if isinstance(decay, MaskedDecay) else decay, params)
