"""Dropout: a mixture posterior for every unit, kept or dropped, inside any optimizer.

    q(theta_j)  =  pi N(m_j, S_j^{-1}) + (1 - pi) N(0, 1 / s_0)     for every unit j
    theta_j  ~  z_j m_j,   z_j ~ Bernoulli(pi)                       delta method: the means
    S_j  <-  (1 - rho) S_j + rho (z_j / pi) hess_j l(z o m)
    m_j  <-  m_j - rho S_j^{-1} (z_j / pi) grad_j l(z o m)

The rule needs E[grad_j l | z_j = 1], of which (z_j / pi) grad_j l(z o m) is an unbiased draw; the
responsibility of the kept component at its own mean is taken to be one, so that log q adds nothing
but -S_j (Khan and Rue 2023, Sec. 4.3). What the inner optimizer makes of that gradient is its own
row of the table: S_j fixed for SGD, a root of squares for Adam.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._distribution import Distribution
from blr_optax._random import canonical_key, standard_normal
from blr_optax._transformation import transformation
from blr_optax._validate import (
    at,
    check_number,
    check_positive,
    check_whole,
    holds,
    is_schedule,
    squares_finite,
    zero_unless,
)
from blr_optax.optimizers._posteriors.unit_mixture import UnitMixture
from blr_optax.state import posterior
from blr_optax.state._reader import (
    Reader,
    carries_posterior,
    check_transformation,
    refuse_own_weights,
)
from blr_optax.state._reading import noise_of

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike

    from blr_optax._typing import KeyLike, Params, PyTree, ScalarOrSchedule, Updates


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Units:
    """What stands for a parameter in its place: the shape of its units' masks, None without.

    A node without leaves, so that shapes stay static.
    """

    shape: tuple[int, ...] | None


class UnitNoise(NamedTuple):
    """Standard normals of the units, by the path of their leaf."""

    by_path: dict[str, Array]


class DropoutState(NamedTuple):
    """State of `dropout`.

    Attributes:
        count: steps made (int32).
        key: typed key, constant; the masks of step t are a function of (key, t, path).
        reader: static, how the masks are drawn.
        units: static, a tree like the parameters of the units of every leaf.
        keep: the keep rate of the coming step.
        dropped_variance: 1 / s_0.
        inner: state of the inner optimizer.
        skipped: steps skipped because something was not finite (int32).
    """

    count: Array
    key: Array
    reader: DropoutReader
    units: PyTree
    keep: Array
    dropped_variance: Array
    inner: PyTree
    skipped: Array


class DropoutReader(Reader):
    """Weights are the parameters with units dropped; the posterior is the mixture of both."""

    def part(self, state: DropoutState, params: Params) -> PyTree:
        """Return the leaves that the state was made for."""
        return _tree.part_at(params, set(_shapes(state)), "dropout")

    def noise(self, state: DropoutState, key: Array) -> UnitNoise:
        """Draw a normal per unit, kept when below the quantile: its mirror image is antithetic."""
        return UnitNoise(
            {
                path: standard_normal(
                    jax.random.fold_in(key, zlib.crc32(path.encode())),
                    jnp.zeros(shape, jnp.float32),
                )
                for path, shape in _shapes(state).items()
                if shape is not None
            }
        )

    def weights(self, state: DropoutState, params: Params, noise: PyTree) -> PyTree:
        """z o m."""

        def leaf(kept: Any, m: Array) -> Array:
            return m if kept is None else jnp.where(kept, m, jnp.zeros_like(m))

        return _over_units(leaf, state, noise, params)

    def statistic(
        self, state: DropoutState, params: Params, weights: PyTree, grads: Updates, noise: PyTree
    ) -> PyTree:
        """(z / pi) g, the gradient given that the unit is kept."""

        def leaf(kept: Any, m: Array, g: Array) -> Array:
            g = g.astype(_tree.statistics_dtype(m.dtype))
            return g if kept is None else jnp.where(kept, 1.0 / state.keep, 0.0).astype(g.dtype) * g

        return _over_units(leaf, state, noise, params, grads)

    def posterior(self, state: DropoutState, params: Params) -> Distribution:
        """pi N(m, v) + (1 - pi) N(0, 1 / s_0) per unit; v of the inner optimizer, else zero."""
        # A copy: the parameters may be donated, the posterior is a value to keep.
        mean = jax.tree.map(lambda m: jnp.array(m, _tree.statistics_dtype(m.dtype)), params)
        inner = jax.tree.leaves(state.inner, is_leaf=carries_posterior)
        known = any(map(carries_posterior, inner))
        family = UnitMixture(tuple(_shapes(state).items()))
        return Distribution(
            family,
            family.natural(
                mean=mean,
                variance=posterior(state.inner, mean).variance if known else None,
                keep=jnp.copy(state.keep),
                dropped_variance=jnp.copy(state.dropped_variance),
            ),
        )


def _shapes(state: DropoutState) -> dict[str, tuple[int, ...] | None]:
    """For every leaf by its path, the shape of its units' masks; None where there are none."""
    nodes = jax.tree_util.tree_leaves_with_path(
        state.units, is_leaf=lambda node: isinstance(node, Units)
    )
    return {_tree.leaf_name(path): node.shape for path, node in nodes if isinstance(node, Units)}


def _over_units(fun: Callable, state: DropoutState, noise: Any, *trees: Any) -> Any:
    """fun(which units are kept, or None without units; *leaves) at every leaf."""
    if isinstance(noise, UnitNoise):
        normals = noise.by_path
    else:  # a recording, shaped like params: the first of every unit's numbers counts
        normals = {
            _tree.leaf_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(noise)
        }
    below, shapes = jax.scipy.special.ndtri(state.keep), _shapes(state)

    def leaf(path: Any, *leaves: Array) -> Array:
        name = _tree.leaf_name(path)
        shape = shapes[name]
        if shape is None:
            return fun(None, *leaves)
        u = normals[name][tuple(slice(n) for n in shape)]
        return fun(u < below.astype(u.dtype), *leaves)

    return jax.tree_util.tree_map_with_path(leaf, *trees)


def _units_of(params: Params, mask: Any, unit_axis: int) -> PyTree:
    """Where the units are, a tree like params."""
    if not jax.tree.leaves(params):  # one leaf, see `_tree.coverage`; no mask fits a placeholder
        return jnp.zeros((), jnp.int32)
    wanted = _tree.fitting_leaves(mask(params) if is_schedule(mask) else mask, params, "mask")

    def units(path: Any, leaf: Array, drop: Any) -> Units:
        if isinstance(drop, str):
            raise ValueError(
                f"dropout: mask= has {drop!r} at {_tree.leaf_name(path)}; it takes True or False, "
                "a tree of these, or a function from params to one."
            )
        ndim = jnp.ndim(leaf)
        if not drop or ndim < 2:
            return Units(None)
        if not -ndim <= unit_axis < ndim:
            raise ValueError(
                f"dropout: unit_axis={unit_axis} is no axis of {_tree.leaf_name(path)} with "
                f"shape {jnp.shape(leaf)}; leave the leaf out with mask=."
            )
        axis = unit_axis % ndim
        return Units(tuple(n if i == axis else 1 for i, n in enumerate(jnp.shape(leaf))))

    return jax.tree_util.tree_map_with_path(units, params, wanted)


def dropout(
    inner: optax.GradientTransformation,
    keep_rate: ScalarOrSchedule,
    *,
    mask: PyTree = True,
    unit_axis: int = -2,
    dropped_variance: float = 0.0,
    key: KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Dropout inside any optimizer, as the mixture posterior that it is.

    theta_j = z_j m_j, z_j ~ Bernoulli(pi);  m <- inner( (z_j / pi) grad_j l(z o m) );
    q(theta_j) = pi N(m_j, v_j) + (1 - pi) N(0, 1 / s_0).

    The network needs no dropout layers: take its gradient at `sample(opt_state, params)`, which has
    units dropped. A unit is everything that one input of a layer is multiplied with: a row of a
    kernel [in, out], an input channel of [..., in, out], so that dropping it is dropping that
    input. Biases and other vectors are always kept. By default the inputs of the network are units
    as well; leave their kernel out with `mask`.

    The parameters m are those of kept units, and predict nothing by themselves: at test time use
    `posterior(opt_state, params).mean`, which is pi m, or `predict` with the posterior, which is
    Monte Carlo dropout. Inverted dropout, as layers do it, is the same with m' = pi m: the gradient
    that reaches `inner` is exactly that of its loss in m'. An inner Adam squares (z / pi) g: its
    second moments, and the posterior's precision, are 1 / pi above the rule's. A step whose
    gradient is not finite moves nothing, not even the state of `inner`; `skipped` counts them.

    Args:
        inner: the optimizer, of optax or of this library (`blr.sgd(0.1, ess=N)`), whose posterior
            is then that of kept weights. Its own weights must be the parameters (no `ivon`).
        keep_rate: pi in (0, 1], one number or schedule. Other rates for other leaves: one
            `dropout` each, in `optax.partition`.
        mask: which leaves have units: True, a prefix tree of booleans, or a function from params to
            one. Leaves with less than two axes have none.
        unit_axis: the axis that counts the units of a leaf.
        dropped_variance: 1 / s_0 of the posterior, zero for the limit of dropping.
        key: typed key or integer seed.

    Returns:
        A transformation. `update(grads, state, params, statistic=None)` takes the gradient at
        `sample(opt_state, params)`; with several draws, or `noise=`, pass on what `estimate`
        returns as statistic, which here is the average of (z / pi) g.

    Raises:
        ValueError: for arguments out of range, an inner optimizer that samples, missing params,
            integer parameters.

    Source: Khan and Rue (2023), Sec. 4.3. Special case of `blr_update` with family "mixture" for
    every unit, its zero component fixed, `estimator=delta()` given the other units' masks,
    responsibilities of one, and the inner optimizer's row for the kept component.

    Example:
      >>> import jax, jax.numpy as jnp, optax, blr_optax as blr
      >>> params = {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}
      >>> tx = blr.dropout(optax.sgd(0.1), keep_rate=0.5)
      >>> state = tx.init(params)
      >>> print(blr.sample(state, params)["w"][:, 0], blr.posterior(state, params).mean["w"][:, 0])
      [1. 0. 1. 0.] [0.5 0.5 0.5 0.5]
    """
    check_positive("keep_rate", keep_rate, scalar=True)
    canonical_key(key)
    check_number("dropped_variance", dropped_variance, zero=True)
    check_whole("dropout: unit_axis", unit_axis)
    if not is_schedule(keep_rate) and not holds(lambda k: k <= 1, keep_rate):
        raise ValueError(f"keep_rate={keep_rate} must be in (0, 1]; it is the rate of kept units.")
    check_transformation("dropout", inner)
    inner = optax.with_extra_args_support(inner)
    reader = DropoutReader()

    def rate(count: ArrayLike) -> Array:
        return jnp.array(at(keep_rate, count), jnp.result_type(float))

    def init_fn(params: Params) -> DropoutState:
        _tree.check_float_leaves(params, "dropout")
        state = inner.init(params)
        refuse_own_weights(state, "dropout")
        count = jnp.zeros((), jnp.int32)
        return DropoutState(
            count,
            canonical_key(key),
            reader,
            _units_of(params, mask, unit_axis),
            rate(count),
            jnp.array(dropped_variance, jnp.result_type(float)),
            state,
            jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: Updates,
        state: DropoutState,
        params: Params = None,
        *,
        statistic: Any = None,
        **extra: Any,
    ) -> tuple[Any, DropoutState]:
        if params is None:
            raise ValueError("dropout: update needs params, update(grads, state, params).")
        if statistic is None:
            statistic = reader.statistic(state, params, None, updates, noise_of(state))
        else:
            statistic = _tree.matching_leaves(statistic, params, "statistic")
        wide = jax.tree.map(lambda g, c: g.astype(c.dtype), updates, statistic)
        finite = squares_finite(wide, statistic)
        grads = jax.tree.map(lambda g, c: c.astype(g.dtype), updates, statistic)
        out, inner_state = inner.update(grads, state.inner, params, **extra)
        count = optax.safe_increment(state.count)
        return zero_unless(finite, out), state._replace(
            count=count,
            keep=rate(count),
            inner=optax.tree.where(finite, inner_state, state.inner),
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )

    return transformation(init_fn, update_fn)
