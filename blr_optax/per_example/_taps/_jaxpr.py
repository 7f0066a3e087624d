"""All that the layer taps ask of JAX's internals, in one file.

A jaxpr is a list of equations `outvars = primitive[params](invars)`; an operand is a variable or a
literal. Only names of primitives and their documented parameters are used elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
REMAT = ("remat2", "remat", "checkpoint")
CUSTOM_VJP = ("custom_vjp_call", "custom_vjp_call_jaxpr")


def trace(f: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """Return the jaxpr of f at the shapes of `args`, and the shapes of what it returns."""
    return jax.make_jaxpr(f, return_shape=True)(*args)


def is_literal(atom: Any) -> bool:
    """Whether an operand is a number written into the equation."""
    from jax.extend.core import Literal  # only here: it imports Pallas, as long as all of us

    return isinstance(atom, Literal)


def inner_jaxpr(eqn: Any) -> Any | None:
    """Return the jaxpr of an equation that only calls it (an inner jit, a rematerialised block)."""
    name = eqn.primitive.name
    if name in REMAT:
        found = eqn.params["jaxpr"]
    elif name in INLINED:
        found = eqn.params[INLINED[name]]
    else:
        return None
    return open_jaxpr(found)[0] if not open_jaxpr(found)[1] else None


def has_primitive(jaxpr: Any, names: Sequence[str]) -> bool:
    """Whether one of these primitives occurs in a jaxpr, or in one that it calls."""
    for eqn in jaxpr.eqns:
        inner = (open_jaxpr(x)[0] for x in jax.tree.leaves(list(eqn.params.values())))
        if eqn.primitive.name in names or any(
            has_primitive(x, names) for x in inner if hasattr(x, "eqns")
        ):
            return True
    return False


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Return a jaxpr without its constants, and the constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def bind(eqn: Any, *args: Any) -> list[Any]:
    """Return the outputs of one equation at other operands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    out = eqn.primitive.bind(*args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many constants a `scan` has, and how many numbers it carries."""
    if "num_consts" in eqn.params:  # jax 0.10
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def checkpointed(eqn: Any, f: Callable[..., Any]) -> Callable[..., Any]:
    """f rematerialised as the equation's block is; f itself for an inner jit."""
    if eqn.primitive.name not in REMAT:
        return f
    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(f, policy=policy, prevent_cse=prevent_cse)
