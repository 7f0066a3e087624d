"""Exponential families: what a posterior can be, and its geometry (natural <-> expectation).

`register(name)`, `get(name, **static)` and `names()` are the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blr_optax.families._composed import Pinned, PinnedNatural, Raveled
from blr_optax.families._domain import Domain
from blr_optax.families._family import Family
from blr_optax.families._gaussian import (
    Gaussian,
    GaussianExpectation,
    GaussianNatural,
    Normal,
)
from blr_optax.families._gaussian_fixed import FixedExpectation, FixedNatural, GaussianFixed
from blr_optax.families._mean_field import MeanField
from blr_optax.families._parameters import parameters

__all__ = [
    "Domain",
    "Family",
    "FixedExpectation",
    "FixedNatural",
    "Gaussian",
    "GaussianExpectation",
    "GaussianFixed",
    "GaussianNatural",
    "MeanField",
    "Normal",
    "Pinned",
    "PinnedNatural",
    "Raveled",
    "get",
    "names",
    "parameters",
    "register",
]

_REGISTRY: dict[str, Callable[..., Family]] = {}


def register(name: str) -> Callable[[Callable[..., Family]], Callable[..., Family]]:
    """Decorator that registers a family, or a function that builds one, under a name.

    Raises:
        ValueError: when the name is taken.

    Example:
      >>> import blr_optax as blr
      >>> @blr.families.register("wide_normal")
      ... class WideNormal(blr.families.Normal):
      ...     '''A normal.'''
      >>> print("wide_normal" in blr.families.names())
      True
    """
    if name in _REGISTRY:
        raise ValueError(f"families.register: the name {name!r} is taken by {_REGISTRY[name]}.")

    def add(build: Callable[..., Family]) -> Callable[..., Family]:
        _REGISTRY[name] = build
        return build

    return add


def get(name: str | Family, **static: Any) -> Family:
    """The family registered under `name`, with its static choices; a Family passes through.

    Raises:
        ValueError: for an unknown name, listing the known ones.

    Example:
      >>> import blr_optax as blr
      >>> print(blr.families.get("normal").natural(mean=2.0, precision=3.0).linear)
      6.0
    """
    if isinstance(name, Family):
        return name
    if name not in _REGISTRY:
        raise ValueError(f"unknown family {name!r}; known: {', '.join(names())}.")
    return _REGISTRY[name](**static)


def names() -> tuple[str, ...]:
    """The registered names, sorted.

    Example:
      >>> import blr_optax as blr
      >>> print("gaussian" in blr.families.names())
      True
    """
    return tuple(sorted(_REGISTRY))


register("normal")(Normal)
register("gaussian")(Gaussian)
register("gaussian_fixed")(GaussianFixed)
register("gaussian_diagonal")(lambda: MeanField(Normal()))
