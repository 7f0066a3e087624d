"""Standard parameters, checked: clear errors for wrong calls and values, nothing on traced ones.

`@checked(mean=REAL.over("d"), precision=DEFINITE)` around a family's `natural` is all that a family
says: its parameters, their trailing axes and their ranges. Keywords without a default must be
given; of those with a default, the alternatives, exactly one. What arrives are arrays of one
floating type, float32 or wider, and one batch shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax._validate import concrete, require
from blr_optax.families._base import domain
from blr_optax.families._base.kept import check_kept

if TYPE_CHECKING:
    from jaxtyping import Array, Bool

    from blr_optax._typing import DTypeLike, PyTree

P = ParamSpec("P")
Lambda = TypeVar("Lambda")


# What a parameter may be.


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What a standard parameter must be.

    Attributes:
        valid: its range, in words.
        test: whether values are in it.
        axes: names of its trailing axes; a name has one size in all parameters of a family.
        least: the smallest size of those axes.
        location: whether zero is a value like any other.
        unique: whether members that are equal have equal values (unlike logits, up to a constant).
    """

    valid: str
    test: Callable[[Array], Array]
    axes: str = ""
    least: int = 1
    location: bool = False
    unique: bool = True

    def over(self, axes: str, least: int = 1) -> Parameter:
        """Return the same with trailing axes, such as "d d"."""
        return dataclasses.replace(self, axes=axes, least=least)

    @property
    def shape(self) -> str:
        """Its shape, in words."""
        names = dict.fromkeys(self.axes.split())
        sizes = [f"{name} >= {self.least}" for name in names if self.least > 1]
        return " with ".join([f"[{', '.join(['...', *self.axes.split()])}]", *sizes])


def positive(x: Array) -> Bool[Array, ...]:
    """Whether numbers are positive and finite."""
    return (x > 0) & jnp.isfinite(x)


def symmetric_definite(x: Array) -> Bool[Array, ...]:
    """Whether a matrix is symmetric, up to rounding, and positive definite."""
    transposed = jnp.swapaxes(x, -1, -2)
    rounding = 100 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x), initial=0.0)
    symmetric = jnp.all(jnp.abs(x - transposed) <= rounding, axis=(-1, -2))
    return symmetric & domain.positive_definite().contains(x)


def _is_distribution(p: Array) -> Bool[Array, ...]:
    return jnp.all(p > 0, axis=-1) & (jnp.abs(jnp.sum(p, axis=-1) - 1.0) < 1e-4)


REAL = Parameter("finite", jnp.isfinite, location=True)
POSITIVE = Parameter("positive and finite", positive)
COUNT = Parameter(
    "a whole number of at least zero",
    lambda n: (n >= 0) & jnp.isfinite(n) & (n == jnp.round(n)),
)
# At these ends a natural parameter is infinite: what is certain is no member of the family.
FRACTION = Parameter(
    "strictly between 0 and 1 (at 0 or 1, a certain outcome, lambda is infinite)",
    lambda p: (p > 0) & (p < 1),
)
DISTRIBUTION = Parameter(
    "positive and sum to 1 (at a probability of 0 lambda is infinite; leave the category out)",
    _is_distribution,
    "K",
)
COUNT_RATE = Parameter(
    "positive and finite (at 0, where all counts are 0, lambda = log(rate) is infinite)", positive
)
SUCCESSES = Parameter(
    "positive and finite (with 0 successes to wait for there is nothing to count)", positive
)
DEFINITE = Parameter("symmetric positive definite", symmetric_definite, "d d")


# The calls.


def name_of(family: Any) -> str:
    """Return the name of a family in errors: its class, written like the registered names."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(family).__name__).lower()


def check_keywords(who: str, natural: Callable, given: Mapping[str, PyTree]) -> None:
    """Raise ValueError for a keyword that is unknown or missing, listing what there is.

    What a (bound) `natural` takes is in its signature: defaults of None mark alternatives.
    """
    taken = inspect.signature(natural).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return
    needed = [name for name, p in taken.items() if p.default is p.empty]
    choices = [name for name, p in taken.items() if p.default is None]
    choices = choices if len(choices) > 1 else []  # one alone may be left out
    either = " or ".join([", ".join(choices[:-1]), *choices[-1:]])
    takes = [", ".join(needed)] if needed else []
    takes += [f"one of {either}"] if choices else []
    known = f"it takes {' and '.join(takes)}."
    for name in given:
        if name not in taken:
            raise ValueError(f"{who}: unknown keyword {name!r}; {known}")
    for name in needed:
        if given.get(name) is None:
            raise ValueError(f"{who}: {name} is missing; {known}")
    found = [name for name in choices if given.get(name) is not None]
    if choices and len(found) != 1:
        got = " and ".join(found) or "none"
        raise ValueError(f"{who}: give exactly one of {either}; got {got}.")


def as_array(value: Any, dtype: DTypeLike | None = None) -> Array:
    """Return a value as an array; constants stay concrete inside a trace, see `holds`."""
    with jax.ensure_compile_time_eval() if concrete(value) else contextlib.nullcontext():
        return jnp.asarray(value, dtype)


def as_number(who: str, name: str, value: Any) -> PyTree:
    """Return what jax can make a real array of; Python numbers stay, so that they follow others.

    Raises:
        ValueError: for anything else, truth values and complex numbers included.
    """
    refusal = f"{who}: {name} must be a number or an array of numbers; got "
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # jax has no integers beyond 32 bits
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, float)):
        try:
            value = as_array(value)
        except (TypeError, ValueError, OverflowError) as error:
            tree = " For a tree of parameters lift the family: families.MeanField(family)."
            hint = tree if isinstance(value, Mapping) else ""
            raise ValueError(f"{refusal}{value!r}.{hint}") from error
    dtype = jnp.result_type(value) if isinstance(value, jax.Array) else np.asarray(value).dtype
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise ValueError(f"{refusal}dtype {dtype}.")
    return value


def _check_shapes(
    who: str, parameters: dict[str, Parameter], arrays: dict[str, Array]
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return the common batch shape, and the size of every named axis."""
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    batches: dict[str, tuple[int, ...]] = {}
    for name, x in arrays.items():
        axes, wanted = parameters[name].axes.split(), parameters[name].shape
        split = x.ndim - len(axes)
        wrong = f"{who}: {name} must have shape {wanted}"
        if split < 0 or min(x.shape[split:], default=1) < parameters[name].least:
            raise ValueError(f"{wrong}; got shape {x.shape}.")
        for axis, size in zip(axes, x.shape[split:], strict=True):
            if sizes.setdefault(axis, size) != size:
                like = owner[axis]
                known = "" if like == name else f", {axis} = {sizes[axis]} as in {like}"
                raise ValueError(f"{wrong}{known}; got shape {x.shape}.")
            owner.setdefault(axis, name)
        batches[name] = x.shape[:split]
    try:
        return np.broadcast_shapes(*batches.values()), sizes
    except ValueError as error:
        found = ", ".join(f"{name} {batch}" for name, batch in batches.items())
        raise ValueError(f"{who}: these batch shapes do not broadcast: {found}.") from error


def checked(
    **parameters: Parameter | Callable[[PyTree], Parameter],
) -> Callable[[Callable[P, Lambda]], Callable[P, Lambda]]:
    """Decorate a family's `natural`: check the call, and hand over arrays that fit.

    Args:
        **parameters: what each keyword must be; a function of the family where that depends on it.

    Returns:
        The decorator. Its `natural` raises ValueError for keywords, types, shapes and (concrete)
        values that are wrong, and for values that lambda cannot hold (`check_kept`); alternatives
        that were not given are not handed over.
    """

    def decorate(natural: Any) -> Any:
        @functools.wraps(natural)
        def checked_natural(self: Any, *positional: Any, **given: Any) -> Any:
            who = f"{name_of(self)}.natural"
            if positional:
                raise ValueError(
                    f"{who}: give keywords, {', '.join(parameters)}; got {len(positional)} values "
                    "without a name."
                )
            own = {
                name: p if isinstance(p, Parameter) else p(self)
                for name, p in parameters.items()
                if given.get(name) is not None
            }
            check_keywords(who, natural.__get__(self), given)
            numbers = {name: as_number(who, name, given[name]) for name in own}
            dtype = jnp.promote_types(jnp.result_type(float, *numbers.values()), jnp.float32)
            arrays = {name: as_array(x, dtype) for name, x in numbers.items()}
            batch, sizes = _check_shapes(who, own, arrays)
            for name, x in arrays.items():
                require(f"{who}: {name}", x, own[name].valid, own[name].test)
                shape = (*batch, *(sizes[axis] for axis in own[name].axes.split()))
                arrays[name] = jnp.broadcast_to(x, shape)
            lam = natural(self, **arrays)
            check_kept(who, self, natural, arrays, own)
            return lam

        return checked_natural

    return decorate
