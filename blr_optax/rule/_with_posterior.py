"""`with_posterior`: an optax transformation that also carries the posterior the rule assigns to it.

The steps are the wrapped transformation's own, to the bit; one whose gradient is not finite, or so
large that its statistics are not, moves nothing, neither the weights nor that transformation's
state, and is counted. The posterior is a mean-field normal centred at the parameters whose
precision is a function of that state.

For bfloat16 weights the transformation runs in float32, and its updates are rounded: in bfloat16 a
decay of 0.999 is 1, so that a second moment only grows. In float16 it is optax's own, where an
update that is not finite is skipped too: the squares of small gradients are 0, and so is eps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._distribution import Distribution
from blr_optax._transformation import transformation
from blr_optax._validate import (
    all_finite,
    at,
    is_schedule,
    unwritten,
    within_reach,
    zero_unless,
)
from blr_optax.families import MeanField, Normal
from blr_optax.state._reader import Reader, refuse_own_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array

    from blr_optax._typing import Params, PyTree, Scalar, ScalarOrSchedule, Updates


DIGITS = 10  # bits after the point, of float16


def _coarse(x: Any) -> bool:
    """Whether a leaf has fewer bits than float16, as bfloat16 has."""
    dtype = jnp.result_type(x)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).nmant < DIGITS


def _in_float32(tree: PyTree) -> PyTree:
    """Return the tree with bfloat16 leaves in float32, of arrays or of their shapes."""

    def leaf(x: Any) -> Any:
        if not _coarse(x):
            return x
        dtype = _tree.statistics_dtype(x.dtype)
        return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

    return jax.tree.map(leaf, tree)


def _finite_where_narrow(tree: PyTree) -> Array | bool:
    """Whether all leaves below float32 are finite; those that are wide are not looked at."""
    leaves = [x for x in jax.tree.leaves(tree) if _tree.narrow(jnp.result_type(x))]
    return all_finite(leaves) if leaves else True


class WithPosteriorState(NamedTuple):
    """State of an optimizer that follows optax's and carries a posterior.

    Attributes:
        count: steps made, without skipped ones (int32).
        reader: static, how the precision is read off `inner`.
        covered: the parameters that the state was made for, see `_tree.coverage`.
        hyper: the numbers that the precision needs, at the coming step.
        inner: state of the wrapped transformation.
        skipped: steps skipped because the gradient or its statistics were not finite (int32).
    """

    count: Array
    reader: PointReader
    covered: PyTree
    hyper: dict[str, Array]
    inner: PyTree
    skipped: Array


class PointReader(Reader):
    """A delta-method rule: the loss is evaluated at the parameters."""

    who = "with_posterior"  # the optimizer's name, in errors
    takes_numbers = False  # whether a parameter may be a number of Python

    def part(self, state: WithPosteriorState, params: Params) -> PyTree:
        return _tree.covered_part(state.covered, params, self.who)

    def precision(self, state: WithPosteriorState, mean: PyTree) -> PyTree:
        """Total posterior precision, a tree like `mean`."""
        raise unwritten(self, "precision(self, state, mean)", "api/rule")

    def posterior(self, state: WithPosteriorState, params: Params) -> Distribution:
        """N(params, 1 / precision)."""
        mean = jax.tree.map(
            lambda m: jnp.asarray(m, _tree.statistics_dtype(jnp.result_type(m))), params
        )
        family = MeanField(Normal())
        return Distribution(family, family.from_mean(mean, self.precision(state, mean)))


def with_posterior(
    tx: optax.GradientTransformation,
    reader: PointReader,
    *,
    growth: Callable[[Array], Scalar] | None = None,
    **hyper: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Wrap `tx` so that its state carries the posterior that `reader` reads off it.

    A step whose gradient is not finite, or no longer when `tx` has squared or summed it, is
    skipped: `tx` keeps its state.

    Args:
        tx: any optax transformation that evaluates the loss at its parameters.
        reader: how the precision follows from its state.
        growth: of a `tx` that takes no squares, from the count to the factor by which its sums may
            exceed a gradient. By default squares must be finite.
        hyper: numbers or schedules that the rule needs, kept in the state for the coming step.

    Raises:
        ValueError: for integer parameters, or a `tx` that has weights of its own.

    Source: Khan and Rue (2023), Table 1. Special case of `blr_update` with `estimator=delta()`, in
    the limit that the reader's docstring states.

    Example:
      >>> import jax, jax.numpy as jnp, optax, blr_optax as blr
      >>> class Seen(blr.rule.PointReader):  # as many examples as seen: one a step, and one before
      ...     def precision(self, state, mean):
      ...         return jax.tree.map(lambda m: jnp.full_like(m, 1 + state.count), mean)
      >>> tx, params = blr.rule.with_posterior(optax.sgd(0.5), Seen()), jnp.ones(2)
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> print(params + updates, blr.posterior(state, params).variance)
      [0.5 0.5] [0.5 0.5]
    """
    tx = optax.with_extra_args_support(tx)

    def numbers(count: Any) -> dict[str, Array]:
        return {name: jnp.array(at(x, count), jnp.result_type(float)) for name, x in hyper.items()}

    def init_fn(params: Params) -> WithPosteriorState:
        _tree.check_float_leaves(params, reader.who, reader.takes_numbers)
        for name, x in hyper.items():
            if not is_schedule(x):
                _tree.fitting_leaves(x, params, name)  # refuses what does not broadcast
        count, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # no shared buffer
        inner = tx.init(_in_float32(params))
        refuse_own_weights(inner, reader.who)
        covered = _tree.coverage(params)
        return WithPosteriorState(count, reader, covered, numbers(count), inner, skipped)

    def update_fn(
        updates: Updates, state: WithPosteriorState, params: Params = None, **extra: Any
    ) -> tuple[Any, WithPosteriorState]:
        if updates is None:
            raise ValueError(f"{reader.who}: update got no gradients, None in their place.")
        factor = 1.0 if growth is None else growth(state.count)
        grads = _in_float32(updates)
        finite = within_reach(grads, factor, squares=growth is None)
        out, inner = tx.update(grads, state.inner, _in_float32(params), **extra)
        out = jax.tree.map(lambda u, g: u.astype(g.dtype) if _coarse(g) else u, out, updates)
        finite &= _finite_where_narrow(out)
        # Skipped steps do not count: `tx`, whose schedules and averages the reader reads, has none.
        count = jnp.where(finite, optax.safe_increment(state.count), state.count)
        return zero_unless(finite, out), state._replace(
            count=count,
            hyper=numbers(count),
            inner=optax.tree.where(finite, inner, state.inner),
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )

    return transformation(init_fn, update_fn)
