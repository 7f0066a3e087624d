"""What a step did to the posterior, read off the states before and after it.

    p, p'  precision per example before and after       u  relative step:  p' = p (1 + u + u^2 / 2)
    c_s    curvature per example of draw s of S         rho = 1 - b2

    correction_of_move       sum p u^2/2  /  sum ( p |u| + p u^2/2 )
    correction_of_precision  sum p u^2/2  /  ( rho sum p )
    curvature_signal_to_noise^2
        sum ( (mean_s c)^2 - var_s c / S ) / p^2  /  sum var_s c / p^2
    statistic_score          sum c/p  /  sqrt( sum (c/p)^2 )

Nothing is computed, and nothing kept in the state, unless it is asked for.

The second line is what the correction does in the long run. Where the precision neither grows nor
shrinks, rho (E[c] + d0 - p) + p E[u^2] / 2 = 0, so that p = E[c] + d0 + (its share of p): a floor
made of the noise of c. With one draw var c is about ess p E[g^2], and without any curvature or
prior p settles at rho ess E[g^2] / (2 - rho) on average, all of it correction (for small rho its
distribution over coordinates is exponential); the move then is hardly correction at all, as |u| is
of the order of sqrt(rho) and u^2 of rho.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax._decay import masked
from blr_optax._rounding import share_unmoved
from blr_optax._validate import check_positive, check_unit_interval
from blr_optax.state._reader import posterior_states
from blr_optax.state._reading import covered

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array

    from blr_optax._typing import Hyperparameter, OptState, Params, PyTree, Scalar, Updates


class Diagnostics(NamedTuple):
    """What `diagnostics` returns for one posterior; scalars, None where something is not known.

    Attributes:
        correction_of_move: share of the retraction's second-order term in the precision's move; 0
            for plain steps.
        correction_of_precision: share of the precision that this term sustains (noisy, and above 1
            while the precision grows by it); needs `b2`.
        clipped: share of coordinates whose update was clipped; needs `updates` and `bound`.
        smallest_precision: one over the largest marginal variance.
        smallest_per_example: the same per example, divided by ess.
        curvature_signal_to_noise: of the curvature of one draw; needs `draws`.
        statistic_score: sum c/p / sqrt( sum (c/p)^2 ) over all weights: of size 1 and either sign
            when c knows nothing of the noise, as when the gradient was taken at the parameters in
            place of the sample; larger than 0 on average when it does. Needs `b2`; add it up over T
            steps and divide by sqrt(T), so that right and wrong part.
        statistic_over_precision: sum (c + d0) / sum p, of the mean over `draws`, or of `statistic`;
            needs one of them. Once the precision is learnt it is about 1, a little less as the
            correction sustains a share. Far above 1: the precision has not followed, since the
            gradients of the steps were taken at the parameters (80 in a trial), or `b2` is too slow
            (3 there). Draws must be taken at samples, by `estimate`, whatever the steps do.
        learnt: share of coordinates whose precision differs by more than 10 % from what decay alone
            makes of the old one, (p - d0) b2^t + d0 after t steps: what the data have told. Give
            the state after `init` as `before`; near 0 all deviations are still those of the start.
            Needs `b2`, and `weight_decay`.
        growth: the largest p / p' of all coordinates: how much longer the step of one gradient has
            become. With a constant rate a run diverges at some such factor.
        unmoved: share of coordinates at which a draw of the posterior, rounded to the dtype of the
            weights, is expected to be the mean itself: their spacing is wider than the posterior.
            In float32 or wider a step measures no curvature there; below float32 it draws wider
            noise. Points do not count; None for signs.
        retracted: of `blr_update`, the members of lambda that the step had to retract.
        skipped: steps skipped so far because something was not finite.
        shortened: gradients shortened so far by `clip_spikes`; None without that bound.
        rounding: of `blr_update`, how far half a spacing of lambda's numbers moves the mean of q,
            in its deviations, or its variance, relative: the largest of all. A posterior that
            drifts far from the origin loses digits, above 0.01 ones that matter: count its
            statistics from a point near the data, `families.Centered`, or use float64.
    """

    correction_of_move: Array | None
    correction_of_precision: Array | None
    clipped: Array | None
    smallest_precision: Array
    smallest_per_example: Array | None
    curvature_signal_to_noise: Array | None
    statistic_score: Array | None
    statistic_over_precision: Array | None
    learnt: Array | None
    growth: Array | None
    unmoved: Array | None
    retracted: Array | None
    skipped: Array | None
    shortened: Array | None
    rounding: Array | None


def _growth(before: Any, after: Any) -> Array | None:
    """Return how much longer the same gradient's step is, at most."""
    old, new = (getattr(state, "precision", None) for state in (before, after))
    if old is None or new is None:
        return None
    ratios = jax.tree.map(lambda p, q: jnp.max(p / q, initial=0.0), old, new)
    return functools.reduce(jnp.maximum, jax.tree.leaves(ratios), jnp.zeros(()))


def _clipped(part: Any, updates: Updates, bound: Any) -> Array | None:
    """Share of coordinates at the bound, up to rounding."""
    if updates is None or bound is None:
        return None
    updates = _tree.matching_leaves(updates, part, "updates")
    bound = _tree.fitting_leaves(bound, part, "bound")

    def count(x: Array, b: Any) -> Array:
        edge = jnp.asarray(b, _tree.statistics_dtype(x.dtype)) * (1 - 2 * jnp.finfo(x.dtype).eps)
        return jnp.sum(jnp.abs(x.astype(edge.dtype)) >= edge)

    size = sum(x.size for x in jax.tree.leaves(updates))
    return _tree.total(count, updates, bound) / size


def _signal_to_noise(part: Any, scale: Any, draws: Any) -> Array | None:
    """Over draws in front: the noise's own share is taken out of the square of their mean."""
    if draws is None or scale is None:
        return None
    draws = _tree.matching_leaves(draws, part, "draws", leading=1)
    sizes = {x.shape[0] for x in jax.tree.leaves(draws)}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(
            f"diagnostics: draws= needs one leading axis of two or more draws; got {sizes}. One "
            "draw says nothing about its own noise."
        )
    (count,) = sizes
    relative = jax.tree.map(lambda c, p: c / p, draws, scale)
    noise = _tree.total(lambda c: jnp.sum(jnp.var(c, axis=0, ddof=1)), relative)
    square = _tree.total(lambda c: jnp.sum(jnp.square(jnp.mean(c, axis=0))), relative)
    return jnp.sqrt(_tree.ratio(jnp.maximum(square - noise / count, 0.0), noise))


def _over_precision(state: Any, statistic: Any, draws: Any, weight_decay: Any) -> Array | None:
    """Return the statistic, averaged over draws where there are any, over the precision held."""
    if draws is not None:
        statistic = jax.tree.map(lambda c: jnp.mean(c, axis=0), draws)
    if statistic is None:
        return None
    return state.reader.statistic_over_precision(state, statistic, weight_decay)


def unmoved(part: PyTree, variance: PyTree) -> Array | None:
    """Return the share of coordinates whose noise rounding takes away; of those that have noise."""
    if jax.tree.structure(part) != jax.tree.structure(variance):
        return None  # not weight by weight
    part = jax.tree.map(jnp.asarray, part)
    deviation = jax.tree.map(lambda v: jnp.sqrt(jnp.where(v > 0, v, 0.0)), variance)
    lost = _tree.total(lambda s, m: jnp.sum(share_unmoved(s, m)), deviation, part)
    return _tree.ratio(lost, _tree.total(lambda s: jnp.sum(s > 0), deviation))


def _score(old: Any, new: Any, b2: Any, weight_decay: Any) -> Array | None:
    """Sum of the statistic in units of its size; coordinates without one count as nothing."""
    relative = None if b2 is None else new.reader.relative_statistic(old, new, b2, weight_decay)
    if relative is None:
        return None
    total = _tree.total(jnp.sum, relative)
    size = jnp.sqrt(_tree.total(lambda c: jnp.sum(jnp.square(c)), relative))
    return _tree.ratio(total, size)


def diagnostics(
    before: OptState,
    after: OptState,
    params: Params,
    updates: Updates = None,
    *,
    statistic: PyTree = None,
    b2: Scalar | None = None,
    bound: PyTree = None,
    draws: PyTree = None,
    weight_decay: Hyperparameter = 0.0,
    mask: PyTree | Callable[[Params], PyTree] = None,
) -> tuple[Diagnostics, ...]:
    """How healthy a step was: scalars per posterior, from the states before and after it.

    p' = p (1 + u + u^2 / 2):  sum p u^2/2 / sum (p |u| + p u^2/2), and the like; see `Diagnostics`.

    It is a pure function, also under jit, of what a training step has at hand, so that it costs
    nothing in the steps that do not call it. The shares of the correction are read off p' / p,
    which is the same for u and -2 - u: without `statistic` a step down by more than p itself, which
    the retraction folds back, counts as its mirror image, and the shares come out smaller.

    Args:
        before: the optimizer state that `update` got; any chain, mask, partition or wrapper.
        after: the one that it returned.
        params: the parameters, before or after.
        updates: what `update` returned beside it, for `clipped`.
        statistic: what `update` got, to tell folded steps, and for `statistic_over_precision`;
            needs `b2` and `weight_decay`.
        b2: the decay of the precision, for `correction_of_precision`.
        bound: the largest update that clipping lets through, learning_rate * (hess_init +
            weight_decay) * clip_radius for `ivon`; a number or a prefix tree. (In a chain of your
            own, `optax.snapshot("clipped", lambda x: jnp.mean(jnp.abs(x) > radius))` in front of
            `optax.clip` measures the same without it.)
        draws: the curvature of two or more separate draws on one batch, a tree like params
            with the draws in front, for `curvature_signal_to_noise` and
            `statistic_over_precision`: one estimate, also of many
            draws, does not know its own noise. Of S draws in one estimate it is sqrt(S) times
            better.
        weight_decay: the optimizer's, with its damping (a `prior` is in the state); a number,
            prefix tree, schedule or, with `params` before the step, `EmpiricalPrior`.
        mask: the optimizer's: which leaves decay, a prefix tree of booleans or a function from
            params to one; None for all.

    Returns:
        A tuple of `Diagnostics`, one per posterior in the state (one but for `optax.partition`).

    Raises:
        ValueError: for states without a posterior or of different make, for fewer than two draws,
            trees of another structure.

    Source: Shen et al. (2024), Algorithm 1, whose second-order term it watches; the stationary
    floor is derived at the head of this file. For every row of `blr_update`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx, params = blr.soba(0.5, ess=10.0, b2=0.5, weight_decay=0.0), jnp.ones(1)
      >>> before = tx.init(params)
      >>> updates, after = tx.update(jnp.ones(1), before, params, statistic=jnp.array([3.0]))
      >>> (found,) = blr.diagnostics(before, after, params, b2=0.5)
      >>> print(found.correction_of_move, found.smallest_precision)  # u = 1: a half of 1 + 1/2
      0.33333334 25.0
    """
    if statistic is not None and b2 is None:
        raise ValueError(
            "diagnostics: statistic= needs b2=, the decay of the precision, beside it."
        )
    if b2 is not None:
        check_unit_interval("b2", b2)
    if bound is not None:
        check_positive("bound", bound)
    weight_decay = masked(weight_decay, mask)
    states = posterior_states(before, "diagnostics"), posterior_states(after, "diagnostics")
    rules = [[(s.reader, s.reader.core(s).reader) for s in side] for side in states]
    if rules[0] != rules[1]:
        raise ValueError(
            "diagnostics: before and after hold different posteriors; pass the states that one "
            "update got and returned."
        )
    numbers = statistic, b2, bound, draws, weight_decay
    parts = covered(states[1], params, "diagnostics")
    return tuple(
        _one(old, new, part, updates, *numbers)
        for old, new, part in zip(*states, parts, strict=True)
    )


def rounding(core: Any) -> Array | None:
    """Return how much of q the rounding of lambda may be; None for states that keep no lambda."""
    lam = getattr(core, "natural", None)
    return None if lam is None else core.reader.family.rounding(lam)


def _one(
    old: Any,
    new: Any,
    part: Any,
    updates: Updates,
    statistic: Any,
    b2: Scalar | None,
    bound: Any,
    draws: Any,
    weight_decay: Hyperparameter,
) -> Diagnostics:
    """Return the diagnostics of one posterior state."""
    weight_decay = old.reader.decay_of_step(old, part, weight_decay)
    q = new.reader.posterior(new, part)
    # Not q.variance, which refuses an improper posterior: that is what a diagnostic must show.
    variances = jax.tree.leaves(q.family.variance(q.natural))
    smallest = functools.reduce(jnp.minimum, [jnp.min(1.0 / v) for v in variances])
    before, core = old.reader.core(old), new.reader.core(new)
    ess = getattr(core, "ess", None)
    return Diagnostics(
        *new.reader.corrections(old, new, b2, statistic, weight_decay),
        clipped=_clipped(part, updates, bound),
        smallest_precision=smallest,
        smallest_per_example=None if ess is None else smallest / ess.astype(smallest.dtype),
        curvature_signal_to_noise=_signal_to_noise(part, getattr(before, "precision", None), draws),
        statistic_score=_score(old, new, b2, weight_decay),
        statistic_over_precision=_over_precision(old, statistic, draws, weight_decay),
        learnt=None if b2 is None else new.reader.learnt(old, new, b2, weight_decay),
        growth=_growth(before, core),
        unmoved=unmoved(part, new.reader.variance(new, part, q)),
        retracted=getattr(core, "retracted", None),
        skipped=getattr(core, "skipped", None),
        shortened=getattr(getattr(core, "spikes", None), "shortened", None),
        rounding=rounding(core),
    )
