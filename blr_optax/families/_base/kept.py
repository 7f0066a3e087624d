"""Whether natural parameters hold the standard ones that they were made from.

lambda is the state of record, and has as many digits as its numbers. Some standard parameters need
more: a - 1 in float32 is -1 for a concentration of 1e-8, scale^-shape underflows, and beside
kappa m^2 a small rate is lost. What would come back as another member, or none, is refused where it
is made. The test asks for the luck of no input: lambda may be off by its rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax._validate import concrete

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax.families._base import standard_parameters as standards

TOLERANCE = 1e-3  # relative, of a standard parameter that comes back
ORDINARY = (0.1, 10.0)  # powers and products of such numbers lose nothing
CANDIDATES = 128  # values that the search for the least one tries
PADDING = 16  # numbers of elements are rounded up to powers of it: a program for each
Values = dict[str, np.ndarray]


@functools.cache
def _program(natural: Callable[..., Any], family: Any) -> Callable[..., Any]:
    """Return standard parameters at lambda and at its neighbours, and whether it is a member."""

    def beside(lam: Any, end: float) -> Any:
        return jax.tree.map(lambda x: jnp.nextafter(x, jnp.full_like(x, end)), lam)

    def probe(given: dict[str, Array]) -> Any:
        # Without the barrier XLA may take 1 + (a - 1) for a.
        lam = jax.lax.optimization_barrier(natural(family, **given))
        back = [family.standard(x) for x in (lam, beside(lam, np.inf), beside(lam, -np.inf))]
        return *back, family.in_domain(lam)

    return jax.jit(probe)


def _probe(program: Callable[..., Any], given: Values) -> Any:
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, program(given))


def _sizes(name: str, given: Values, axes: Mapping[str, list[str]], spread: np.ndarray) -> Any:
    """Return what an error of a parameter is measured by."""
    x, mine = given[name], axes[name]
    if len(mine) == 2 and mine[0] == mine[1]:
        root = np.sqrt(np.diagonal(x, axis1=-2, axis2=-1))
        return root[..., :, None] * root[..., None, :]
    size, floor = np.abs(x), 0.0 if np.all(x > 0) else np.finfo(x.dtype).tiny ** 0.5
    if mine and floor:  # the coordinates of a vector share one size
        return np.max(size, axis=tuple(range(1, x.ndim)), keepdims=True) + spread + floor
    return size + floor


def _spread(back: Values) -> Any:
    """Return standard deviations, where a matrix of (co)variances tells them."""
    for name in ("covariance", "scale"):
        if name in back and back[name].ndim == 3:
            return np.sqrt(np.abs(np.diagonal(back[name], axis1=-2, axis2=-1)))
    return np.zeros(())


def _errors(found: Any, given: Values, own: Mapping[str, standards.Parameter]) -> Values:
    """Return the relative error of every parameter that comes back, for each batch element."""
    at, up, down, _ = found
    axes = {name: parameter.axes.split() for name, parameter in own.items()}
    spread = _spread(at)
    errors = {}
    for name, x in given.items():
        if name not in at or not own[name].unique:
            continue
        size = _sizes(name, given, axes, spread if len(axes[name]) == 1 else np.zeros(()))
        off = np.maximum(np.abs(at[name] - x), 0.25 * np.abs(up[name] - down[name])) / size
        off = np.where(np.isfinite(off), off, np.inf)
        errors[name] = np.max(off, axis=tuple(range(1, off.ndim)), initial=0.0)
    return errors


def _lost(
    found: Any, given: Values, own: Mapping[str, standards.Parameter]
) -> tuple[np.ndarray, Values]:
    """Return which batch elements are lost, and the errors."""
    at, *_, inside = found
    errors = _errors(found, given, own)
    lost = ~np.broadcast_to(inside, (len(next(iter(given.values()))),))
    for x in at.values():
        lost = lost | ~np.all(np.isfinite(x), axis=tuple(range(1, np.ndim(x))))
    return lost | (np.max(list(errors.values()), axis=0, initial=0.0) > TOLERANCE), errors


def _kept_from(
    program: Callable[..., Any], name: str, element: Values, own: Mapping[str, standards.Parameter]
) -> str:
    """Say from where on a parameter is kept, all others as they are; nothing if that is unknown."""
    x = element[name]
    if np.any(x <= 0) or len(own[name].axes.split()) > 1:
        return ""
    worst = x.flat[np.argmax(np.abs(np.log(x)))]
    ends = np.geomspace(worst, 1.0, CANDIDATES).astype(x.dtype)
    ends = ends.reshape(-1, *[1] * (x.ndim - 1))
    moved = np.maximum(x, ends) if worst < 1 else np.minimum(x, ends)
    given = {k: np.broadcast_to(v, (CANDIDATES, *v.shape[1:])) for k, v in element.items()}
    given[name] = moved
    kept = ~_lost(_probe(program, given), given, own)[0]
    first = CANDIDATES - int(np.argmin(np.append(kept[::-1], False)))
    if first >= CANDIDATES - 1:
        return ""
    return f" It is kept {'from' if worst < 1 else 'up to'} about {float(ends.flat[first]):.2g}."


def check_kept(
    who: str,
    family: Any,
    natural: Callable[..., Any],
    given: Mapping[str, Array],
    own: Mapping[str, standards.Parameter],
) -> None:
    """Raise ValueError where lambda would not give standard parameters back; not for traced ones.

    Args:
        who: what the error names.
        family: the family.
        natural: its `natural`, without checks.
        given: standard parameters, of one batch shape.
        own: what each of them is.
    """
    if not concrete(given):
        return
    events = {name: len(own[name].axes.split()) for name in given}
    flat = {
        name: np.asarray(x).reshape(-1, *x.shape[x.ndim - events[name] :])
        for name, x in given.items()
    }
    ordinary = [_ordinary(x, own[name]) for name, x in flat.items()]
    chosen = np.flatnonzero(~np.all(ordinary, axis=0))
    if not chosen.size:
        return
    if not any(events.values()):
        chosen = np.resize(chosen, PADDING ** int(np.ceil(np.log(chosen.size) / np.log(PADDING))))
    flat = {name: x[chosen] for name, x in flat.items()}
    program = _program(natural, family)
    found = _probe(program, flat)
    with np.errstate(all="ignore"):
        lost, errors = _lost(found, flat, own)
        if not lost.any():
            return
        i = int(np.argmax(lost))
        element = {name: x[i : i + 1] for name, x in flat.items()}
        name = max(errors, key=lambda name: errors[name][i], default=next(iter(flat)))
        least = _kept_from(program, name, element, own)
    (at, up, down, _), held = found, ""
    dtype, back = flat[name].dtype, at.get(name)
    if back is not None:
        held = f": they hold it as {_text(back[i])}"
        with np.errstate(all="ignore"):
            rounding = 0.25 * np.max(np.abs(up[name][i] - down[name][i]))
        held += f", give or take {rounding:.2g}" if np.isfinite(rounding) else ""
    wider = " Use float64 (jax.config.update('jax_enable_x64', True))"
    hint = (wider if dtype == np.float32 else " Rescale the variable") + family.when_lost + "."
    others = ", ".join(f"{k}={_text(x[0])}" for k, x in element.items() if k != name)
    others = f" (at {others})" if others else ""
    raise ValueError(
        f"{who}: {name}={_text(element[name][0])}{others} is lost in {dtype} natural "
        f"parameters{held}.{least}{hint}"
    )


def _ordinary(x: np.ndarray, parameter: standards.Parameter) -> np.ndarray:
    """Whether numbers, one for each batch element, need no check."""
    if len(parameter.axes.split()) > 1:
        return np.zeros(len(x), bool)
    inside = (np.abs(x) <= ORDINARY[1]) & ((np.abs(x) >= ORDINARY[0]) | parameter.location)
    return np.all(inside, axis=tuple(range(1, x.ndim)))


def _text(x: Any) -> str:
    return np.array2string(np.asarray(x), precision=7, threshold=8, separator=", ")
