"""What joint families share: theta of several parts, and steps that rounding must not spoil."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _loops

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import NaturalParameters, PyTree


FAR = (
    ", or where the mean is far from zero count it from a point: families.Centered(family, at=...)"
)
MARGIN = 64  # roundings: compiled and plain code round differently


class MeanPrecision(NamedTuple):
    """theta of a joint density: a mean and a precision (a number or a matrix)."""

    mean: Array
    precision: Array


class MeanVariance(NamedTuple):
    """theta of a joint density: a mean and a variance."""

    mean: Array
    variance: Array


def retract_shortened(
    family: Any,
    lam: NaturalParameters,
    step: PyTree,
    move: Callable[[PyTree, PyTree], tuple[PyTree, Array]],
) -> PyTree:
    """Return move(lam, step), with the step cut by powers of 16 until that is safe.

    Where the domain couples fields, a move that stays inside on paper may not in lambda: b is the
    difference of -lambda_precision and kappa m^2 / 2, and either may drown or overflow. `move`
    also returns whether b is above `MARGIN` roundings of them.
    """

    def spread(t: Array, name: str) -> Array:
        return jnp.expand_dims(t, tuple(range(-family.domains[name].event_ndim, 0)))

    def cut(t: Array, step: Any) -> Any:
        return step._replace(
            **{name: spread(t, name) * getattr(step, name) for name in family.domains}
        )

    def kept(new: Any, safe: Array) -> Array:
        return safe & family.in_domain(new)

    fixed_lam, fixed_step = jax.lax.stop_gradient((lam, step))

    def outside(t: Array) -> Array:
        return ~kept(*move(fixed_lam, cut(t, fixed_step)))

    def shorten(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        t, out = carry
        t = jnp.where(out, t / 16.0, t)
        return t, outside(t) & (t > 0)

    out = outside(jnp.ones((), lam[0].dtype))
    begin = (jnp.ones(out.shape, lam[0].dtype), out)
    t, _ = _loops.while_loop(lambda carry: jnp.any(carry[1]), shorten, begin)
    new, safe = move(lam, cut(t, step))
    inside = kept(new, safe)
    return lam._replace(
        **{
            name: jnp.where(spread(inside, name), getattr(new, name), getattr(lam, name))
            for name in family.domains
        }
    )
