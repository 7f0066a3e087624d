"""Which parameters are the kernel of one layer, and in which order their numbers lie.

A place sees a view of the parameter, whose axes may have been moved, and takes its inputs in the
operation's own order (a convolution's window first, then the channels; a product's contracted axes
as its dimension numbers list them). Kronecker factors belong to the parameter as the user holds it:
inputs and outputs are counted as they come in its leaf, read row by row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from blr_optax.per_example._taps._moments import KroneckerFactors
from blr_optax.per_example._taps._places import layer_axes

if TYPE_CHECKING:
    from blr_optax.per_example._taps._plan import Way


class Layer(NamedTuple):
    """The only place of a kernel, once or at every step of a loop.

    Attributes:
        steps: their order in the leaf; None outside loops.
        inputs: the place's inputs in the order of the leaf.
        outputs: likewise.
    """

    steps: np.ndarray | None
    inputs: np.ndarray
    outputs: np.ndarray

    def empty(self, kind: type[KroneckerFactors], dtype: Any) -> KroneckerFactors:
        """Zeros for the layer's factors."""
        steps = () if self.steps is None else self.steps.shape
        m, k = self.inputs.size, self.outputs.size
        return kind(*(jnp.zeros((*steps, *shape), dtype) for shape in ((m, m), (m,), (k, k))))

    def ordered(self, factors: KroneckerFactors) -> KroneckerFactors:
        """From the order of the place to that of the leaf."""

        def square(x: Any, order: np.ndarray) -> Any:
            return taken(taken(x, order, -2), order, -1)

        inputs, mean = square(factors.inputs, self.inputs), taken(factors.mean, self.inputs, -1)
        found = type(factors)(inputs, mean, square(factors.outputs, self.outputs))
        if self.steps is None:
            return found
        return type(found)(*(taken(x, self.steps, 0) for x in found))


def taken(x: Any, order: np.ndarray, axis: int) -> Any:
    """Take an axis in another order; nothing to do for its own."""
    own = np.array_equal(order, np.arange(order.size))
    return x if own else jnp.take(x, order, axis, unique_indices=True, mode="clip")


def layer(way: Way, size: int) -> Layer | None:
    """Return the layer of a parameter of `size` numbers; None where it is no layer's kernel."""
    places = [use for use in way.uses if use.by != "scan"]
    loops = [use for use in way.uses if use.by == "scan"]
    if len(places) != 1 or len(loops) > 1 or places[0].view.scaled:
        return None
    axes, steps = layer_axes(places[0]), math.prod(use.eqn.params["length"] for use in loops)
    if axes is None or places[0].size * steps != size:
        return None
    if any(len(use.view.roots) != 1 for use in loops or places):
        return None
    numbers = places[0].view.numbers().astype(np.int64)
    if loops:
        of_steps = loops[0].view.numbers().reshape(steps, -1)
        numbers = of_steps[:, (numbers - numbers.min()).ravel()].reshape(steps, *numbers.shape)
    else:
        numbers = numbers[None]
    inputs, outputs = (tuple(i + 1 for i in part) for part in axes)
    rest = tuple(i for i in range(numbers.ndim) if i not in (*inputs, *outputs))
    m = math.prod(numbers.shape[i] for i in inputs)
    numbers = numbers.transpose(*rest, *inputs, *outputs).reshape(steps, m, -1)
    s, i, o = numbers[:, :1, :1], numbers[:1, :, :1], numbers[:1, :1, :]
    if not np.array_equal(numbers, s + i + o - 2 * numbers[0, 0, 0]):
        return None  # which input a number belongs to depends on the output
    orders = [np.argsort(x.ravel()) for x in (s, i, o)]
    return Layer(orders[0] if loops else None, *orders[1:])
