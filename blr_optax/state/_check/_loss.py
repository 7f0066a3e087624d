"""What a few evaluations say about a loss: a mean or a sum, and which noise it assumes.

    mean of the examples        l(2 B) = l(B)                       of the batch repeated
    sum of the examples         l(3 B) - l(2 B) = l(2 B) - l(B)
    squared error of a target   grad_y l = k (y - f),  k one number:  noise variance 1 / (k N)

The last is proved, not guessed: the gradient with respect to a part y of the batch must be linear
in y with one factor k for all its entries, the same at other parameters.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax.state._check._report import Finding, short

if TYPE_CHECKING:
    from blr_optax._typing import Loss, PyTree

TARGETS = 3  # parts of the batch that are tried as the target of a squared loss
AGREE = 1e-3  # relative, of what should be equal up to rounding


class Counted:
    """A loss, compiled once per shape of its batch, that counts its evaluations."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.count = loss, 0
        self._value, self._both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))

    def __call__(self, theta: PyTree, batch: tuple) -> float:
        """Return the loss."""
        self.count += 1
        return float(self._value(theta, *batch))

    def value_and_grad(self, theta: PyTree, batch: tuple) -> tuple[float, PyTree]:
        """Return loss and gradient."""
        self.count += 1
        value, grad = self._both(theta, *batch)
        return float(value), grad


def example_axis(batch: tuple) -> int | None:
    """Return the size of the leading axis that most arrays of the batch share."""
    sizes = [np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)]
    return collections.Counter(sizes).most_common(1)[0][0] if sizes else None


def _each(f: Callable[[Any], Any], batch: tuple, size: int) -> tuple:
    """Apply f to the arrays that have the axis of examples."""
    return jax.tree.map(
        lambda x: f(jnp.asarray(x)) if np.ndim(x) and np.shape(x)[0] == size else x, batch
    )


def growth(
    loss: Counted, theta: PyTree, value: float, batch: tuple, numbers: dict[str, float]
) -> str:
    """How the loss grows when every example is repeated: "mean", "sum", "other", or "unknown"."""
    size = example_axis(batch)
    if size is None or not np.isfinite(value):
        return "unknown"

    def repeated(times: int) -> float:
        return loss(theta, _each(lambda x: jnp.concatenate([x] * times), batch, size))

    try:
        twice = repeated(2)
        # A loss that draws masks of its own differs for another order of the examples, too.
        order = abs(loss(theta, _each(lambda x: jnp.flip(x, 0), batch, size)) - value)
        close = AGREE * max(abs(value), abs(twice)) + 3.0 * order
        numbers["loss_of_repeated_batch"] = twice
        if abs(twice - value) <= close:
            return "mean"
        thrice = repeated(3)
    except (TypeError, ValueError):  # it takes batches of one size only
        return "unknown"
    return "sum" if abs((thrice - twice) - (twice - value)) <= 2.0 * close else "other"


def of_growth(how: str, size: int | None, numbers: dict[str, float], whole: bool) -> list[Finding]:
    """Put the growth into words; `whole`: the sum is over all data, and `ess` is 1."""
    ratio = numbers.get("loss_of_repeated_batch", np.nan) / (numbers["loss"] or np.nan)
    if how == "sum" and not whole:
        return [Finding(
            "sum_loss",
            "warning",
            f"The loss is a sum over the examples, not a mean: with every example repeated it is "
            f"{short(ratio)} times as large. Curvatures come out {size} times too large, and "
            f"deviations sqrt({size}) times too small.",
            "Return the mean over the batch (jnp.mean in place of jnp.sum), and give ess= the "
            "number of training examples.",
        )]  # fmt: skip
    if how == "other":
        return [Finding(
            "loss_depends_on_batch_size",
            "warning",
            f"The loss is neither a mean nor a sum over the examples: with every example repeated "
            f"it is {short(ratio)} times as large, so what it stands for depends on the size of "
            "the batch.",
            "Return a mean over the examples; leave the prior to the optimizer (weight_decay, "
            "prior_precision or prior), and divide what belongs to all of the data by its size.",
        )]  # fmt: skip
    return []


def _squared(loss: Counted, thetas: tuple[PyTree, PyTree], batch: tuple, index: int) -> Any:
    """Return (k, residuals) of a squared error in one array of the batch, None for another loss."""
    leaves, tree = jax.tree.flatten(batch)
    y = jnp.asarray(leaves[index])

    def with_leaf(y: Any, theta: PyTree) -> Any:
        changed = [*leaves[:index], y, *leaves[index + 1 :]]
        return loss.loss(theta, *jax.tree.unflatten(tree, changed))

    compiled = jax.jit(jax.grad(with_leaf))

    def slope(shift: Any, theta: PyTree) -> np.ndarray:
        loss.count += 1
        return np.asarray(compiled(y + jnp.asarray(shift, y.dtype), theta), np.float64)

    scale = float(np.std(np.asarray(y, np.float64))) or 1.0
    moves = scale * np.random.default_rng(0).normal(size=(2, *y.shape))
    first = slope(0.0 * moves[0], thetas[0])
    change = slope(moves[0], thetas[0]) - first
    k = float(np.vdot(change, moves[0]) / np.vdot(moves[0], moves[0]))

    def linear(change: np.ndarray, move: np.ndarray) -> bool:
        worst = np.max(np.abs(change - k * move))
        return bool(worst <= AGREE * k * np.max(np.abs(move)))  # False where not finite

    if not (k > 0.0 and linear(change, moves[0])):
        return None
    if not linear(slope(2.0 * moves[1], thetas[0]) - first, 2.0 * moves[1]):
        return None
    elsewhere = slope(0.0 * moves[0], thetas[1])
    if not linear(slope(moves[0], thetas[1]) - elsewhere, moves[0]):
        return None
    return k, first / k


def of_noise(
    loss: Counted, theta: PyTree, batch: tuple, how: str, numbers: dict[str, float]
) -> list[Finding]:
    """Say which noise variance a squared loss stands for, where it provably is one."""
    size = example_axis(batch)
    if size is None or how not in ("mean", "sum"):
        return []
    moved = jax.tree.map(lambda x: 1.3 * x + 0.1, theta)
    targets = [
        index for index, leaf in enumerate(jax.tree.leaves(batch))
        if np.ndim(leaf) and np.shape(leaf)[0] == size
        and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]  # fmt: skip
    for index in targets[: -TARGETS - 1 : -1]:  # targets usually stand last
        found = _squared(loss, (theta, moved), batch, index)
        if found is None:
            continue
        k, residuals = found
        variance = 1.0 / (k * (size if how == "mean" else 1))
        square = float(np.mean(np.square(residuals)))
        numbers |= {"noise_variance": variance, "residual_mean_square": square}
        return [Finding(
            "noise_variance",
            "note",
            f"The loss is a squared error whose noise has the variance {short(variance)} (per "
            f"target); the residuals have a mean square of {short(square)} now, before training. "
            "The deviations of the posterior are proportional to the noise's.",
            "If the noise of the targets has another variance s2, return "
            "jnp.mean((f - y)**2) / (2 * s2), with the mean over examples and a sum over outputs; "
            "the mean square of residuals on held-out data estimates s2.",
        )]  # fmt: skip
    return []
