"""Weights of examples: what a mean loss is when not every example counts alike.

    value = sum_i c_i l_i / sum_i c_i  =  1/B sum_i c'_i l_i,          c'_i = c_i / mean(c)

Normalised over the whole batch (and all devices) first, the weighted loss is a mean over examples
again, so that micro-batches and devices average to it however the weights fall on them. A loss that
divides by its own number of valid tokens is not such a mean: `refuse_normalised`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax._validate import holds

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import AxisName, Loss, Params


class Weighted(NamedTuple):
    """A mean loss whose last argument are weights of mean one.

    Attributes:
        loss: the loss that was given, of one number or of one per example.
        mean: the weighted mean, `mean(params, *batch, weights)`.
    """

    loss: Loss
    mean: Callable[..., Any]


def weighted(
    loss: Loss, params: Params, batch: tuple, weights: Float[ArrayLike, "B ..."], has_aux: bool
) -> Weighted:
    """Return the weighted mean of a loss.

    Raises:
        ValueError: for weights that are negative, or of another shape than the loss's examples; for
            a loss of one number that is no mean over separate examples, or has auxiliary output.
    """
    shape = jnp.shape(weights)
    found = jax.eval_shape(loss, params, *batch)
    values = found[0] if has_aux else found
    if not holds(lambda c: c >= 0, weights):
        raise ValueError("weights must not be negative; 0 leaves an example out.")
    if values.shape:
        if values.shape != shape:
            raise ValueError(
                f"weights have shape {shape}, and the loss returns values of shape {values.shape}: "
                "give one weight for each."
            )
        return Weighted(loss, _of_values(loss, has_aux))
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    if sizes != {shape}:
        raise ValueError(
            f"weights have shape {shape}; give one per example, {sorted(sizes)}. For weights of "
            "tokens let the loss return its values, of the shape of the weights, not their mean."
        )
    if has_aux:
        raise ValueError(
            "weights: with has_aux=True the loss has to return one value per example beside its "
            "auxiliary output, not their mean."
        )
    from blr_optax.per_example._separable import refuse_coupled

    refuse_coupled("weights", loss, params, batch)
    return Weighted(loss, _of_values(_values(loss), False))


def _values(loss: Loss) -> Callable[..., Array]:
    """Return the losses of single examples, of a mean loss."""

    def values(params: Params, *batch: Any, **options: Any) -> Array:
        axes = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, batch)

        def one(*example: Any) -> Array:
            alone = jax.tree.map(
                lambda x, axis: x if axis is None else x[None], example, axes, is_leaf=_is_none
            )
            return loss(params, *alone, **options)

        return jax.vmap(one, in_axes=axes)(*batch)

    return values


def _is_none(x: Any) -> bool:
    return x is None


def _of_values(loss: Loss, has_aux: bool) -> Callable[..., Any]:
    def mean(params: Params, *batch: Any, **options: Any) -> Any:
        *examples, weights = batch
        found = loss(params, *examples, **options)
        values, aux = found if has_aux else (found, None)
        weights = weights.astype(_tree.statistics_dtype(values.dtype))
        value = jnp.mean(jnp.where(weights > 0, values, 0) * weights).astype(values.dtype)
        return (value, aux) if has_aux else value

    return mean


def first_of(loss: Loss) -> Loss:
    """Return a loss without its auxiliary output."""
    return lambda params, *batch: loss(params, *batch)[0]


def of_mean_one(weights: Float[ArrayLike, "B ..."], axis_name: AxisName | None) -> Array:
    """Return the weights over their mean, which is that over all devices."""
    weights = jnp.asarray(weights)
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    mean = jnp.mean(weights)
    return weights / (mean if axis_name is None else jax.lax.pmean(mean, axis_name))


def refuse_normalised(loss: Loss, params: Params, batch: tuple, how: str) -> None:
    """Raise ValueError for a loss whose means over parts of a batch do not average to the whole's.

    Only where the traced loss shows it: one that cannot be traced at other sizes passes.
    """
    from blr_optax.per_example._taps._coupling import UNEVEN, coupling
    from blr_optax.per_example._taps._sums import shapes

    try:
        kind = coupling(loss, shapes(params), batch)
    except Exception:  # of whatever the user's loss raises at a batch of another size
        return
    if kind.tag == "mixed" and "of a sum over the examples" in kind.reason:
        raise ValueError(
            f"estimate: {how} averages the loss over parts of the batch, and this loss is no mean "
            f"over its examples ({kind.reason}): the average would not be the whole batch's. One "
            "that divides by its number of valid tokens: return the values of all tokens, and pass "
            "weights=, 1 for valid tokens and 0 for others."
        )
    if kind == UNEVEN or (kind.tag == "sum" and kind.power is not None and kind.power > -1):
        raise ValueError(
            f"estimate: {how} averages the loss over parts of the batch, and this loss is a sum "
            "over its examples, so that the result would depend on their number; return jnp.mean."
        )
