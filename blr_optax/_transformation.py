"""How a transformation of optax is made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import optax

from blr_optax._validate import check_update_arguments

if TYPE_CHECKING:
    from blr_optax._typing import OptState, Params, Updates


def transformation(
    init: Callable[..., OptState], update: Callable[..., tuple[Updates, OptState]]
) -> optax.GradientTransformationExtraArgs:
    """Make a transformation; optax's own type has room for states of nothing but arrays.

    Its `update` refuses a state that is none, and names under which the statistic is mistaken.
    """

    @functools.wraps(update)
    def checked(updates: Updates, state: OptState, *rest: Params, **extra: Any) -> Any:
        check_update_arguments(state, extra)
        return update(updates, state, *rest, **extra)

    return optax.GradientTransformationExtraArgs(init, checked)
