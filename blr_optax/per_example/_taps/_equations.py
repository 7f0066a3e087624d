"""What one equation does to a view of a parameter.

plain   no view is involved: the equation under `vmap`
inner   a call: look inside                   scan    a loop: look inside, layer by layer
stop    the view becomes a constant           view    a part or another shape of the view
scale   a number times it, or a constant added to it
dense, conv, lookup   a place                 copy    small: a copy per example
refuse  none of these
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from blr_optax.per_example._taps import _jaxpr

CONST, BATCHED, VIEW = "const", "batched", "view"

# Linear and injective in their first operand: they only move numbers.
MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "slice", "rev", "split", "copy",
         "unstack")  # fmt: skip
# They change the precision of the numbers, or say something of them: nothing for a shadow to do.
CASTS = ("convert_element_type", "reduce_precision", "copy_p", "sharding_constraint", "name",
         "optimization_barrier")  # fmt: skip
SCALES = ("mul", "div", "add", "sub", "neg")
SMALL = 4096


def rule(eqn: Any, tags: Sequence[str]) -> str:
    """Return the name of the rule for an equation whose operands have these tags."""
    views = [i for i, tag in enumerate(tags) if tag == VIEW]
    if not views:
        return "plain"
    name = eqn.primitive.name
    if name == "stop_gradient" or _is_rounding(eqn):
        return "stop"
    if any(jnp.issubdtype(x.aval.dtype, jnp.complexfloating) for x in (*eqn.invars, *eqn.outvars)):
        return "refuse"  # the statistics are of real gradients
    if name == "scan":
        return "scan"
    if _jaxpr.inner_jaxpr(eqn) is not None:
        return "inner"
    if _is_move(eqn, tags):
        return "view"
    if name in SCALES and _is_scale(eqn, tags, views):
        return "scale"
    if len(views) == 1 and BATCHED in tags:
        if name == "dot_general":
            return "dense"
        if name == "conv_general_dilated" and views == [1] and _plain_batch(eqn):
            return "conv"
    if name == "gather" and views == [0] and _is_lookup(eqn):
        return "lookup"
    return "copy" if all(_is_small(eqn, tags, i) for i in views) else "refuse"


def _is_rounding(eqn: Any) -> bool:
    """Whether numbers become integers or truth values, which have no gradient."""
    is_cast = eqn.primitive.name == "convert_element_type"
    return is_cast and not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)


def _size(atom: Any) -> int:
    return math.prod(atom.aval.shape)


def _is_move(eqn: Any, tags: Sequence[str]) -> bool:
    name, others = eqn.primitive.name, tags[1:]
    if name in ("concatenate", "stack"):
        return all(tag == VIEW for tag in tags)
    if name == "broadcast_in_dim":
        return not others and _size(eqn.invars[0]) == _size(eqn.outvars[0])
    if name == "dynamic_slice":
        return tags[0] == VIEW and all(map(_jaxpr.is_literal, eqn.invars[1:]))
    return not others and name in (*MOVES, *CASTS)


def _is_scale(eqn: Any, tags: Sequence[str], views: list[int]) -> bool:
    """Whether a number multiplies a view, or a constant is added to it."""
    name = eqn.primitive.name
    if BATCHED in tags or len(views) != 1 or (name == "div" and views != [0]):
        return False
    if name in ("mul", "div") and _size(eqn.invars[1 - views[0]]) != 1:
        return False
    return eqn.outvars[0].aval.shape == eqn.invars[views[0]].aval.shape


def _plain_batch(eqn: Any) -> bool:
    return eqn.params["batch_group_count"] == 1


def _is_lookup(eqn: Any) -> bool:
    """Whether whole rows are gathered, each by one number."""
    d, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    return (
        tuple(d.collapsed_slice_dims) == (0,)
        and tuple(d.start_index_map) == (0,)
        and not d.operand_batching_dims
        and len(shape) > 1
        and tuple(eqn.params["slice_sizes"]) == (1, *shape[1:])
        and not str(eqn.params["mode"]).endswith("ONE_HOT")
    )


def _is_small(eqn: Any, tags: Sequence[str], index: int) -> bool:
    """Whether copies of a view cost no more than the activations that it meets."""
    size = _size(eqn.invars[index])
    activations = [_size(x) for x, tag in zip(eqn.invars, tags, strict=True) if tag == BATCHED]
    if eqn.primitive.name == "broadcast_in_dim":
        activations.append(_size(eqn.outvars[0]))
    return size <= max([SMALL, *activations])
