"""Natural and expectation parameters as types that cannot be mixed up.

Both are NamedTuples with the same fields, so that `optax.tree.get` and checkpoints see inside
them. A bare NamedTuple would concatenate under `+` and repeat under `*`; here every arithmetic
operator raises, since adding a mu to a lambda, or two lambdas without their family (which knows
the fields that never move), is an error.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

_OPERATORS = (
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "neg",
    "pow",
    "matmul",
    "rmatmul",
    "iadd",
    "imul",
)
T = TypeVar("T")


def _refuse(self: Any, *_: Any) -> NoReturn:
    raise TypeError(
        f"{type(self).__name__} has no arithmetic: combine natural parameters with "
        "family.combine((a, lam), (b, other)), or multiply Distribution values."
    )


def parameters(cls: type[T]) -> type[T]:
    """Class decorator: makes the arithmetic operators of a NamedTuple raise.

    Example:
      >>> import blr_optax as blr
      >>> lam = blr.families.get("normal").natural(mean=1.0, precision=2.0)
      >>> try:
      ...     lam + lam
      ... except TypeError as error:
      ...     print(str(error)[:33])
      GaussianNatural has no arithmetic
    """
    for name in _OPERATORS:
        setattr(cls, f"__{name}__", _refuse)
    cls.__array_ufunc__ = None  # numpy would make an array of the fields
    return cls
