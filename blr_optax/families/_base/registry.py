"""The registry: families by name, with the structure that a name leaves open."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from blr_optax.families._base.family import Family

if TYPE_CHECKING:
    pass

REGISTRY: dict[str, Callable[..., Family]] = {}


def register(name: str) -> Callable[[Callable[..., Family]], Callable[..., Family]]:
    """Register a family, or a function that builds one, under a name; a decorator.

    A definition of one's own that is run again (a cell of a notebook, a module that is reloaded)
    takes the place of the one before.

    Raises:
        ValueError: when the name is taken by another family.

    Example:
      >>> import blr_optax as blr
      >>> @blr.families.register("wide_normal")
      ... class WideNormal(blr.families.Normal):
      ...     '''A normal.'''
      >>> print("wide_normal" in blr.families.names())
      True
    """

    def place(build: object) -> tuple[str, str]:
        return getattr(build, "__module__", ""), getattr(build, "__qualname__", repr(build))

    def refuse_unless(free: Callable[[object], bool]) -> None:
        if name in REGISTRY and not free(REGISTRY[name]):
            raise ValueError(f"families.register: the name {name!r} is taken by {REGISTRY[name]}.")

    refuse_unless(lambda holder: not place(holder)[0].startswith("blr_optax."))

    def add(build: Callable[..., Family]) -> Callable[..., Family]:
        refuse_unless(lambda holder: place(holder) == place(build))
        REGISTRY[name] = build
        return build

    return add


def get(name: str | Family, **static: object) -> Family:
    """Return the family registered under `name`, with its static choices; a family passes through.

    Raises:
        ValueError: for an unknown name, listing the known ones, or for a choice that the family
            does not have.

    Example:
      >>> import blr_optax as blr
      >>> print(blr.families.get("normal").natural(mean=2.0, precision=3.0).linear)
      6.0
    """
    if isinstance(name, Family):
        return name
    if inspect.isclass(name) and issubclass(name, Family):
        raise ValueError(
            f"families.get: {name.__name__} is a class; give a family of it, {name.__name__}()."
        )
    if not isinstance(name, str) or name not in REGISTRY:
        raise ValueError(f"unknown family {name!r}; known: {', '.join(names())}.")
    build = REGISTRY[name]
    known = inspect.signature(build).parameters
    strays = [key for key in static if key not in known]
    if strays:
        raise ValueError(
            f"families.get({name!r}): unknown choice {strays[0]!r}; it takes "
            f"{', '.join(known) or 'none'}. Standard parameters belong to natural(...), as in "
            f"get({name!r}).natural({strays[0]}=...)."
        )
    return build(**static)


def names() -> tuple[str, ...]:
    """Return the registered names, sorted.

    Example:
      >>> import blr_optax as blr
      >>> print("gaussian" in blr.families.names())
      True
    """
    return tuple(sorted(REGISTRY))
