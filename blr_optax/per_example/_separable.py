"""What a loss must be for its examples to have gradients of their own: a mean, each alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax.per_example._taps import _plan
from blr_optax.per_example._taps._coupling import UNEVEN, coupling
from blr_optax.per_example._taps._sums import Traced, shapes, traced

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import Params


def batch_size(who: str, batch: tuple) -> int:
    """Return the number of examples of a batch.

    Raises:
        ValueError: without one leading axis that all arrays share.
    """
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"{who}: every array of the batch needs the same leading axis of examples; found "
            f"{sorted(sizes)}. Pass arrays, not lists of numbers, and close over what is not one "
            "per example (a temperature)."
        )
    ((size,),) = sizes
    if not size:
        raise ValueError(f"{who}: the batch is empty.")
    return size


def checked(who: str, loss: Callable[..., Array], params: Params, batch: tuple) -> Traced:
    """Return the traced loss of one example.

    Raises:
        ValueError: for integer parameters, a result that is not a scalar, parameters that are
            closed over, or a loss that is not a mean over separate examples.
    """
    _tree.check_float_leaves(params, who)
    found = traced(loss, params, batch)
    if [x.shape for x in jax.tree.leaves(found.shape)] != [()]:
        raise ValueError(
            f"{who}: loss must return one number, the mean over the batch; on a batch of one it "
            f"returns {jax.tree.map(lambda x: x.shape, found.shape)}. Take jnp.mean of it (and "
            "drop auxiliary outputs)."
        )
    refuse_closed_over(f"{who}: loss", params, found)
    refuse_coupled(who, loss, params, batch)
    return found


def refuse_closed_over(what: str, params: Params, found: Traced) -> None:
    """Raise ValueError for a function that does not use its parameters, or other ones instead."""
    unused = [way.kind == _plan.UNUSED for way in found.ways]
    closed = [any(leaf is c for c in found.consts) for leaf in jax.tree.leaves(params)]
    if all(unused) or any(a and b for a, b in zip(unused, closed, strict=True)):
        raise ValueError(
            f"{what} uses its parameters other than through its first argument (or not at all), "
            "so their gradient is lost. Write it as a function of (params, *batch); parameters: "
            f"{sorted(_tree.paths(params))}."
        )


def _coupling(loss: Callable[..., Array], params: Params, batch: tuple) -> Any:
    try:
        return coupling(loss, shapes(params), batch)
    except Exception as error:
        error.add_note(
            "per_example traces the loss at batch sizes 1, 1009 and 1613, to see whether its "
            "examples are separate: it must take any size, and pass what is one per example in "
            "the batch."
        )
        raise


def refuse_coupled(who: str, loss: Callable[..., Array], params: Params, batch: tuple) -> None:
    """Raise ValueError for a loss that is not a mean over separate examples; warn when unsure."""
    kind = _coupling(loss, params, batch)
    growth = kind.power if kind.tag == "const" or kind.power is None else kind.power + 1
    if kind == UNEVEN or (growth and kind.tag in ("sum", "const")):
        how = kind.reason or f"it grows like B^{growth:g}"
        raise ValueError(
            f"{who}: the loss is not a mean over the batch ({how}). Return jnp.mean(...), and "
            "terms without examples undivided, so that value, grad and curvature are per example."
        )
    if kind.tag == "mixed":
        raise ValueError(
            f"{who}: the loss couples its examples: {kind.reason}. Gradients of single examples "
            "are defined only for a mean of losses that each see their own example. Put batch "
            "normalisation into inference mode (or use LayerNorm, GroupNorm), pass masks and "
            "token counts as weights=, and mix examples before the batch is passed."
        )
    if growth is None:
        reason = kind.reason or "the batch size occurs inside a nonlinear function"
        warnings.warn(
            f"{who}: cannot see whether the loss is a mean over separate examples: {reason}.",
            stacklevel=6,
        )
