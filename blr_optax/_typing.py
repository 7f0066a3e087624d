"""Names for what functions of this library take and return, where a type has no name of its own.

A tree may be of any containers that jax knows (dicts, tuples, modules of Flax or Equinox), so for
the type checker it is anything; the names say which tree is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

__all__ = [
    "Alternative",
    "AnyArray",
    "ArrayLike",
    "AxisName",
    "DTypeLike",
    "ExpectationParameters",
    "Hyperparameter",
    "KeyLike",
    "Loss",
    "LossOrTerm",
    "NaturalParameters",
    "OptState",
    "Params",
    "PyTree",
    "Scalar",
    "ScalarOrSchedule",
    "TreeDef",
    "Updates",
]

AnyArray: TypeAlias = jax.Array | np.ndarray  # of jax or of numpy
PyTree: TypeAlias = Any  # arrays in any containers that jax knows
TreeDef: TypeAlias = Any  # the structure of one, from `jax.tree.structure`
Params: TypeAlias = PyTree  # the parameters that are trained, or a tree of their structure
Updates: TypeAlias = PyTree  # gradients or updates, a tree like the parameters
OptState: TypeAlias = PyTree  # the state of any optax transformation

Alternative: TypeAlias = ArrayLike | None  # a keyword of several, of which exactly one is given
NaturalParameters: TypeAlias = PyTree  # lambda: the `Natural` type of some family
ExpectationParameters: TypeAlias = PyTree  # mu: the `Expectation` type of some family

Scalar: TypeAlias = float | jax.Array  # one number
ScalarOrSchedule: TypeAlias = optax.ScalarOrSchedule  # a number, or a function of the step
Hyperparameter: TypeAlias = PyTree  # a number, a prefix tree of the parameters, or a schedule
Loss: TypeAlias = Callable[..., Any]  # loss(params, *batch), a number, or (number, aux)
LossOrTerm: TypeAlias = Any  # a loss, or a part of one that `estimators` makes, such as glm(...)
KeyLike: TypeAlias = jax.Array | int  # a typed key, or the seed of one
AxisName: TypeAlias = str | tuple[str, ...]  # a named axis of shard_map or vmap
