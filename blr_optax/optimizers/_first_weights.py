"""Noise, prior and steps in units of the first weights, so that no number depends on the network.

    s        root mean square of a leaf's first values
    S_q      1 / (noise s)^2      total precision of the first posterior
    S_0      1 / (prior s)^2      total precision of a zero-mean prior
    h_0      S_q / ess - delta,   delta = S_0 / ess                            both per example
    step     <=  clip_step / sqrt(S_q) for every weight: in deviations of the first posterior

A deviation of 0.03 is little for weights of 1 and all there is for weights of 0.03; as a share of s
it means the same in every layer and network. Leaves of zeros (biases) have no size of their own:
theirs is that of the smallest matrix. The bound on the step is what lets one learning rate serve
many tasks: with a rate that is too large every weight moves by the bound, and follows the schedule.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blr_optax import _tree
from blr_optax._decay import decay_leaves, masked
from blr_optax._validate import (
    check_count,
    check_number,
    check_positive,
    check_state,
    concrete,
    holds,
    size_at,
)
from blr_optax.optimizers._zero_mean_prior import (
    WEIGHT_DECAY,
    decay_of,
    per_example,
    total_precision,
)

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._distribution import Distribution
    from blr_optax._typing import (
        Hyperparameter,
        OptState,
        Params,
        PyTree,
        Scalar,
        ScalarOrSchedule,
        Updates,
    )

NOISE, PRIOR = 0.2, 3.2
RATE, WARM_UP, CLIP_STEP = 5.0, 0.05, 0.1
LARGEST_OF_VECTORS = 0.3  # gains of a normalisation start at 1, and are no wider than other weights


@dataclasses.dataclass(frozen=True)
class RelativeNoise:
    """A first posterior whose deviations are this share of every leaf's first values."""

    share: float


@dataclasses.dataclass(frozen=True)
class RelativePrior:
    """A zero-mean prior whose deviations are this multiple of every leaf's first values."""

    share: float


def relative_noise(share: float = NOISE) -> RelativeNoise:
    """Return a first posterior relative to the first weights: sigma = share * rms of every leaf.

    It is the `hess_init=` of `ivon`, `evon` and `mixture_ivon`, and the `init_precision=` of `vogn`
    and `bsam`: the same noise in any network, for any number of examples. The precision of a
    distribution as `prior=` comes on top. In a group of `optax.partition`, leaves of zeros have the
    size of the smallest matrix of their group.

    Args:
        share: of the root mean square of a leaf's first values; 0.2 to 0.3.

    Raises:
        ValueError: unless it is one positive number.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> params = jnp.array([[0.5, -0.5]])
      >>> tx = blr.ivon(0.1, ess=1000.0, hess_init=blr.relative_noise(0.2))
      >>> print(blr.posterior(tx.init(params), params).variance ** 0.5)  # 0.2 * 0.5
      [[0.1 0.1]]
    """
    check_number("relative_noise: share", share)
    return RelativeNoise(share)


def relative_prior(share: float = PRIOR) -> RelativePrior:
    """Return a zero-mean prior relative to the first weights: its deviation is share * rms.

    It is a `prior=` of `ivon`, `vogn`, `evon`, `bsam` and `mixture_ivon`. The share is the one
    number that is worth a search: 1.7, 3.2 and 10 are strong, ordinary and weak regularisation.

    Args:
        share: of the root mean square of a leaf's first values.

    Raises:
        ValueError: unless it is one positive number.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> params = jnp.array([[0.5, -0.5]])
      >>> tx = blr.vogn(0.1, ess=1000.0, prior=blr.relative_prior(2.0))
      >>> state = tx.init(params)
      >>> print(state.inner[0].precision)  # 1 + 1 / (1000 * (2 * 0.5)^2)
      [[1.001 1.001]]
    """
    check_number("relative_prior: share", share)
    return RelativePrior(share)


def warm_cosine(peak: float, num_steps: int) -> optax.Schedule:
    """Return a schedule: 5 % of the steps rise to the peak, a half cosine falls to zero."""
    rise = min(max(1, round(WARM_UP * num_steps)), num_steps - 1)
    if rise < 1:
        return optax.constant_schedule(peak)
    return optax.warmup_cosine_decay_schedule(peak / (rise + 1), peak, rise, num_steps)


@functools.partial(jax.jit, static_argnames="leading")
def scales(params: Params, leading: int = 0) -> Array:
    """Return s of every leaf, one float32 array; `leading` axes are of networks side by side."""
    leaves = jax.tree.leaves(params)
    sizes = [jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))) / max(x.size, 1)) for x in leaves]
    pairs = list(zip(sizes, leaves, strict=True))
    known = [jnp.where(size > 0, size, jnp.inf) for size, x in pairs if x.ndim > 1 + leading]
    smallest = jnp.min(jnp.array(known), initial=jnp.inf)

    def leaf(size: Array, x: Array) -> Array:
        # A network that starts at zero: the size with which layers are drawn.
        inputs = max(math.prod(x.shape[leading:-1]), 1)
        drawn = min(1.0 / math.sqrt(inputs), LARGEST_OF_VECTORS)
        other = jnp.where(jnp.isfinite(smallest), smallest, drawn)
        found = jnp.where(size > 0, size, other)
        return found if x.ndim > 1 + leading else jnp.minimum(found, LARGEST_OF_VECTORS)

    return jnp.array([leaf(*pair) for pair in pairs], jnp.float32)


def _array(x: Any) -> Any:
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


class FirstWeightsState(NamedTuple):
    """State of an optimizer whose numbers are relative to the first weights.

    Attributes:
        scales: s of every leaf, one array.
        inner: the optimizer's own state.
    """

    scales: Array
    inner: OptState


def from_first_weights(
    make: Callable[[PyTree, PyTree], optax.GradientTransformationExtraArgs],
    noise: Hyperparameter | RelativeNoise | None,
    prior: Hyperparameter | RelativePrior,
    ess: ScalarOrSchedule | None,
    trial: tuple[float | None, float],
    *,
    mask: PyTree | Callable[[Params], PyTree] = None,
    leading: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Return make(noise, prior), both in numbers; what is relative is known once params are.

    Args:
        make: of the row: (h_0, delta) or, without ess, (S_q, S_0), trees of numbers.
        noise: the first, or relative.
        prior: the second, or relative.
        ess: where both are per example; None where they are total.
        trial: numbers for which `make` checks its other arguments at once.
        mask: of the leaves that the prior holds for.
        leading: axes of networks side by side.
    """
    relative = isinstance(noise, RelativeNoise), isinstance(prior, RelativePrior)
    if not any(relative):
        return make(noise, prior)
    shares = [x.share for x in (noise, prior) if isinstance(x, (RelativeNoise, RelativePrior))]
    if all(relative):
        check_narrower(*shares)
    make(*trial)

    def of(sizes: Any, like: PyTree) -> optax.GradientTransformationExtraArgs:
        s = jax.tree.unflatten(jax.tree.structure(like), list(sizes))
        return make(*in_numbers(noise, prior, s, ess, like, mask))

    def init_fn(params: Params) -> FirstWeightsState:
        _tree.check_float_leaves(params, "ivon, vogn, evon, bsam, mixture_ivon")
        # Of parameters that are only shapes the state has the right types, and is never read.
        found = scales(jax.tree.map(_array, params), leading)
        # Numbers that Python knows are checked, and nothing is compiled for them.
        known = np.asarray(found).tolist() if concrete(found) else found
        return FirstWeightsState(found, of(known, params).init(params))

    def update_fn(
        updates: Updates, state: Any, params: Params = None, **extra: Any
    ) -> tuple[Any, FirstWeightsState]:
        check_state(state, "scales")
        tx = of(state.scales, updates)
        out, inner = tx.update(updates, state.inner, params, **extra)
        return out, FirstWeightsState(state.scales, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def in_numbers(
    noise: Hyperparameter | RelativeNoise | None,
    prior: Hyperparameter | RelativePrior,
    s: PyTree,
    ess: ScalarOrSchedule | None,
    like: Params,
    mask: PyTree | Callable[[Params], PyTree] = None,
) -> tuple[PyTree, PyTree]:
    """Return (h_0, delta), or without ess (S_q, S_0), for the scales s of all leaves.

    Raises:
        ValueError: where the first posterior would be wider than a prior in numbers.
    """
    if isinstance(prior, RelativePrior):
        total = jax.tree.map(lambda s: 1.0 / (prior.share * s) ** 2, s)
        prior = total if ess is None else decay_of(total, ess)
    if not isinstance(noise, RelativeNoise):
        return noise, prior
    first = jax.tree.map(lambda s: 1.0 / (noise.share * s) ** 2, s)
    if ess is None:
        return first, prior
    delta = decay_leaves(masked(prior, mask), like, 0)
    curvature = jax.tree.map(lambda p, d: p / size_at(ess, 0) - d, first, delta)
    if not all(holds(lambda h: h >= 0, h) for h in jax.tree.leaves(curvature)):
        raise ValueError(
            f"relative_noise({noise.share}): the first posterior would be wider than the prior, "
            "whose strength is per example and counts ess times. Give "
            "prior=relative_prior(...), a smaller weight_decay, or less noise."
        )
    return curvature, prior


def check_narrower(noise: Scalar, prior: Scalar) -> None:
    """Raise ValueError unless the noise is narrower than the prior; traced numbers pass."""
    if not holds(lambda pair: pair[0] < pair[1], (noise, prior)):
        raise ValueError(
            f"relative_noise({noise}) must be below relative_prior({prior}): a posterior is never "
            "wider than its prior."
        )


class ChosenPrior(NamedTuple):
    """A prior in the two forms that a row takes.

    Attributes:
        strength: delta per example, or S_0 in total, of a zero-mean prior; numbers or relative.
        density: a distribution, or None.
    """

    strength: Hyperparameter | RelativePrior
    density: Distribution | None


def prior_of(
    who: str,
    prior: Distribution | RelativePrior | None,
    weight_decay: Hyperparameter,
    prior_precision: Hyperparameter,
    ess: ScalarOrSchedule,
    *,
    default: float = WEIGHT_DECAY,
    total: bool = False,
) -> ChosenPrior:
    """Return the prior from whichever is given, per example or in total.

    Raises:
        ValueError: for a relative prior beside another strength.
    """
    if isinstance(prior, RelativePrior):
        if weight_decay is not None or prior_precision is not None:
            raise ValueError(
                f"{who}: prior=relative_prior(...) is the prior's whole strength; leave "
                "weight_decay= and prior_precision= out."
            )
        return ChosenPrior(prior, None)
    if total:
        return ChosenPrior(total_precision(prior_precision, prior, ess), prior)
    return ChosenPrior(per_example(weight_decay, prior_precision, prior, ess, default), prior)


def first_precision(
    hess_init: Hyperparameter,
    weight_decay: Hyperparameter,
    ess: ScalarOrSchedule,
    damping: Hyperparameter = 0.0,
) -> Callable[[Params], PyTree]:
    """Return S_q = ess (h_0 + delta + gamma) at the start, for a tree like the parameters."""

    def total(like: Params) -> PyTree:
        parts = (
            _tree.fitting_leaves(hess_init, like, "hess_init"),
            decay_leaves(weight_decay, like, 0),
            _tree.fitting_leaves(damping, like, "damping"),
        )
        return jax.tree.map(lambda *of_leaf: size_at(ess, 0) * sum(of_leaf), *parts)

    return total


def clipped_step(
    radius: Scalar, first_precision: Callable[[Params], PyTree]
) -> optax.GradientTransformation:
    """Bound the step of every weight by `radius` deviations of the first posterior.

    A distribution as prior is left out of them, as it is out of the rescaled rate.

    Args:
        radius: one number for all weights.
        first_precision: S_q, total, a tree like the updates that it gets.
    """
    check_positive("clip_step", radius, scalar=True, schedule=False)

    def clipped(updates: Updates, params: Params) -> Updates:
        def leaf(u: Array, p: Any) -> Array:
            bound = jnp.asarray(radius / jnp.sqrt(p), _tree.statistics_dtype(u.dtype))
            return jnp.clip(u.astype(bound.dtype), -bound, bound).astype(u.dtype)

        return jax.tree.map(leaf, updates, first_precision(updates))

    return optax.stateless(clipped)


class GivenRun(NamedTuple):
    """Arguments of a row that follow from the number of steps where they are None.

    Attributes:
        learning_rate, b2, noise, prior, clip_step: as the row takes them.
    """

    learning_rate: ScalarOrSchedule | None
    b2: Scalar | None
    noise: Hyperparameter | RelativeNoise | None
    prior: Distribution | RelativePrior | None
    clip_step: Scalar | None


class OfRun(NamedTuple):
    """The same arguments, with all that a row needs.

    Attributes:
        learning_rate, b2, noise, prior, clip_step: as in `GivenRun`.
    """

    learning_rate: ScalarOrSchedule
    b2: Scalar
    noise: Any
    prior: Any
    clip_step: Scalar | None


def of_run(
    who: str,
    num_steps: int | None,
    given: GivenRun,
    otherwise: GivenRun,
    *,
    has_prior: bool,
    has_start: bool = False,
) -> OfRun:
    """Return what is given; what is not, from the number of steps, or from the row's defaults.

    Args:
        who: the row.
        num_steps: of the whole run, or None.
        given: with None for what is not.
        otherwise: defaults without `num_steps`.
        has_prior: whether a prior is given in another argument.
        has_start: whether the first posterior is.

    Raises:
        ValueError: for neither a learning rate nor a number of steps.
    """
    defaults = otherwise
    if num_steps is not None:
        check_count("num_steps", num_steps)
        defaults = GivenRun(
            learning_rate=warm_cosine(RATE, num_steps),
            b2=1.0 - 1.0 / num_steps,
            noise=RelativeNoise(NOISE),
            prior=None if has_prior else RelativePrior(PRIOR),
            clip_step=CLIP_STEP,
        )
        if has_start:  # of which nothing here knows the size
            defaults = otherwise._replace(b2=defaults.b2, prior=defaults.prior)
    chosen: list[Any] = [d if g is None else g for g, d in zip(given, defaults, strict=True)]
    found = OfRun(*chosen)
    if found.learning_rate is None:
        raise ValueError(
            f"{who}: give learning_rate=, or num_steps=, the number of steps of the whole run: "
            "then rate, schedule, b2, noise and prior follow (beside init= the rate does not)."
        )
    if has_start and (found.clip_step is not None or isinstance(found.noise, RelativeNoise)):
        raise ValueError(
            f"{who}: clip_step= and relative_noise(...) are about the first posterior; init= gives "
            "another one. Leave them out."
        )
    return found
