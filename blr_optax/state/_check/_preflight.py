"""`check`: what is wrong with an optimizer, a loss and a batch, in words, before the run.

A few evaluations of the loss (`_loss`), a few updates without one (`_rule`) and, if it is given,
two runs of the user's own training step (`_step`) are compared with what a right set-up would do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from blr_optax._random import canonical_key
from blr_optax._validate import check_count, concrete, scalar_loss
from blr_optax.state._check import _loss, _rule, _step
from blr_optax.state._check._report import CheckReport, Finding, short
from blr_optax.state._estimate import estimate
from blr_optax.state._make_step import make_step
from blr_optax.state._reader import check_transformation, draws_noise, find_posterior_states
from blr_optax.state._reading import reseed, sample

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import KeyLike, Loss, OptState, Params, PyTree, Updates

OWN_LOOP = (
    "your own training loop: pass step=, called step(params, opt_state, *batch), or watch "
    "statistic_score and statistic_over_precision of blr.diagnostics while it runs."
)
MULTI_STEPS = "what optax.MultiSteps wraps inside a chain, and a step= with it: it goes outermost."
DISAGREES = 5.0  # factor between statistic and precision of a trained state


def _inside(tx: Any) -> tuple[optax.GradientTransformationExtraArgs, bool]:
    """Return the optimizer, without a `MultiSteps` around it, and whether there was one."""
    around = getattr(tx.update, "__self__", None)  # of MultiSteps(...).gradient_transformation()
    if isinstance(around, optax.MultiSteps):
        return optax.with_extra_args_support(around.inner_opt), True
    return optax.with_extra_args_support(tx), False


def _accumulates(opt_state: OptState) -> bool:
    def is_multi(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    return any(map(is_multi, jax.tree.leaves(opt_state, is_leaf=is_multi)))


def check(
    tx: optax.GradientTransformation | optax.MultiSteps,
    loss: Loss,
    params: Params,
    *batch: PyTree,
    num_examples: int | None = None,
    num_steps: int | None = None,
    has_aux: bool = False,
    step: Callable[..., tuple[PyTree, ...]] | None = None,
    opt_state: OptState | None = None,
    draws: int = 4,
    key: KeyLike = 0,
) -> CheckReport:
    """Say in words what is wrong with an optimizer, a loss and a batch, before the run.

    l(batch, batch) = l(batch);  ess = num_examples;  1 - b2^num_steps near 1;  |g seen| = |g|

    It runs a few draws, and names what would make the posterior wrong without an error. Call it
    once, outside jit, with the batch of a step:

        print(blr.check(tx, loss, params, x, y, num_examples=len(data), num_steps=steps))

    Warnings are "sum_loss", "loss_depends_on_batch_size", "ess_is_batch_size", "ess_is_one",
    "slow_b2", "transformed_gradient" and "averaged_gradient" (a clip, or an average, in front of
    the rule), "wide_first_noise", "noise_below_spacing", "not_finite", "lost_digits" (of a
    posterior far from the origin); with `step` "gradient_at_params", "sample_as_params" and
    "state_not_kept"; with `opt_state` "precision_disagrees". Notes, which leave the report true,
    are "noise_variance" (what a squared loss implies), "temperature", "steps_below_spacing",
    "total_loss" and "no_posterior"; some warnings are notes where they do little harm.

    Cost: one value and `draws` gradients, two or three values of the batch repeated or reversed,
    and at most five gradients with respect to each of up to three arrays of the batch; with `step`
    two runs of it, a step of `make_step` and up to three gradients more, with `opt_state` twice
    `draws` gradients. The report counts them, but for those of your own step.

    Args:
        tx: the optimizer, of this library or of optax, in any chain or wrapper.
        loss: `loss(params, *batch)`, a mean over the examples; `(loss, aux)` with `has_aux`. For
            an optimizer that evaluates the loss itself, the loss that it was given.
        params: the first parameters, or the trained ones beside `opt_state`.
        batch: one batch, as the step gets it.
        num_examples: how many training examples there are, to check `ess`.
        num_steps: how many updates the run makes, to check `b2`.
        has_aux: whether the loss returns `(value, aux)`.
        step: your own training step, called `step(params, opt_state, *batch)` and returning
            `(params, opt_state, ...)`; it is run twice, from first states.
        opt_state: the state of a run, to compare its precision with the curvature at its samples.
        draws: of the weights.
        key: typed key or integer seed, of the draws.

    Returns:
        A `CheckReport`: `report.findings`, `report.numbers`, `report.ok`, `print(report)`.

    Raises:
        ValueError: for a `tx` that is not a transformation, a loss that does not return one
            number, counts that are not whole, traced arguments, and as `tx.init`.

    Source: Shen et al. (2024), Algorithm 1, for what a right step is. For every row of
    `blr_update`, and any optimizer of optax.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> loss = lambda w, x, y: 0.5 * jnp.sum((w * x - y) ** 2)  # not a mean
      >>> x, y = jnp.arange(8.0), jnp.ones(8)
      >>> report = blr.check(blr.ivon(0.1, ess=8), loss, jnp.ones(()), x, y, num_examples=800)
      >>> print(report.ok, [found.name for found in report.warnings])
      False ['sum_loss', 'ess_is_batch_size']
    """
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    check_transformation("check", tx)
    check_count("check: draws", draws)
    for name, count in (("num_examples", num_examples), ("num_steps", num_steps)):
        if count is not None:
            check_count(f"check: {name}", count)
    if not concrete(params, batch, opt_state):
        raise ValueError("check: call it outside jit, grad and vmap; it reads values.")
    inner, multi = _inside(tx)
    first = inner.init(params)
    states = find_posterior_states(first)
    own = any(state.reader.evaluates_loss for state in states)
    numbers: dict[str, float] = {}
    unchecked: list[str] = []
    key = canonical_key(key)
    counted, seen = None, None
    if callable(loss) or not own:  # else terms of a loss
        counted = _loss.Counted(_value_of(loss, has_aux))
        seen = _looked_at(counted, first, params, batch, draws, key, own)

    findings = [] if states else [Finding(
        "no_posterior",
        "note",
        "The optimizer carries no posterior: it trains a point, and blr.posterior will refuse "
        "its state.",
        "For a posterior use a transformation of this library, such as "
        "blr.ivon(0.1, ess=num_examples), also inside chain, masked or partition.",
    )]  # fmt: skip
    sizes = _rule.sizes_of_data(states)
    how = "unknown"
    if counted is None or seen is None:
        unchecked.append("the loss, which is not a function of the weights here.")
    else:
        how = _loss.growth(counted, seen.thetas[0], seen.values[0], batch, numbers)
        findings += _of_loss(
            counted, seen, states, params, batch, how, sizes, num_examples, numbers
        )
        if how == "unknown":
            unchecked.append(
                "whether the loss is a mean over the examples: it takes no batch with an axis of "
                "examples, or one size of it only."
            )
    findings += _rule.of_ess(sizes, _loss.example_axis(batch), num_examples, how)
    if len(sizes) == 1:
        numbers["ess"] = sizes[0]
    at_hand = first
    if opt_state is not None:
        at_hand = opt_state.inner_opt_state if multi else opt_state
    findings += _rule.of_narrow_noise(find_posterior_states(at_hand), params, numbers)
    if states and num_examples is None:
        unchecked.append("ess: pass num_examples=.")
    if states and counted is not None and seen is not None and not own:
        extra = _auxiliary(loss, states, seen.thetas[0], batch, has_aux)
        if _accumulates(first):
            unchecked.append(MULTI_STEPS)
        else:
            told = seen.finite and any(np.any(g) for g in jax.tree.leaves(seen.grads))
            grads = seen.grads if told else jax.tree.map(np.ones_like, params)
            moved = _rule.rates(inner, first, params, grads, extra)
            findings += [f for rate in moved for f in _rule.of_rate(rate, num_steps, numbers)]
            if moved and num_steps is None:
                unchecked.append("b2: pass num_steps=.")
            if not any(map(_needs_estimate, states)):
                findings += _rule.of_steps(inner, first, params, grads, extra, numbers)
            if any(map(draws_noise, states)) and not any(map(_needs_estimate, states)):
                in_front = _rule.in_front(inner, first, params, grads, extra)
                findings += _rule.of_front(in_front)
        if any(map(draws_noise, states)):
            if step is not None and not (multi or _accumulates(first)):
                right = make_step(inner, loss, has_aux=has_aux, donate=False)
                findings += _step.of_step(step, inner, counted, params, batch, right, extra)
            elif opt_state is None:
                unchecked.append(MULTI_STEPS if step is not None else OWN_LOOP)
        if opt_state is not None:
            findings += _of_precision(counted, at_hand, params, batch, draws, key, numbers)
    findings += _rule.of_rounding(find_posterior_states(at_hand), numbers)
    findings.sort(key=lambda found: found.severity == "note")
    evaluations = 0 if counted is None else counted.count
    return CheckReport(tuple(findings), numbers, evaluations, tuple(unchecked))


def _value_of(loss: Loss, has_aux: bool) -> Loss:
    """Return the loss without its auxiliary output, which refuses what is not one number."""
    checked = scalar_loss("check", loss, has_aux)
    return (lambda *args: checked(*args)[0]) if has_aux else checked


def _needs_estimate(state: PyTree) -> bool:
    """Whether `update` takes a statistic that a gradient does not give."""
    return state.reader.by_example or state.reader.adversarial


def _auxiliary(
    loss: Loss, states: list[PyTree], theta: PyTree, batch: tuple, has_aux: bool
) -> dict[str, Any]:
    """Return the extra arguments that `update` needs, as `make_step` passes them.

    Raises:
        ValueError: when the loss does not give them.
    """
    names = [state.reader.aux_argument for state in states if state.reader.aux_argument]
    if names and not has_aux:
        raise ValueError(
            f"check: this optimizer needs {names[0]}=, an auxiliary output of the loss; let it "
            f"return (value, {names[0]}), and pass has_aux=True."
        )
    return dict.fromkeys(names, jax.jit(loss)(theta, *batch)[1]) if names else {}


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The loss at a few draws of the weights, and at the parameters.

    Attributes:
        thetas, values: draws, and the loss at each.
        grads: the gradient at the first.
        at_mean: the loss at the parameters.
        finite: whether values and gradients all are.
    """

    thetas: list[PyTree]
    values: list[float]
    grads: Updates
    at_mean: float
    finite: bool


def _looked_at(
    loss: _loss.Counted,
    state: OptState,
    params: Params,
    batch: tuple,
    draws: int,
    key: Any,
    own: bool,
) -> _Seen | None:
    """Evaluate the loss at a few draws; None for one that is no function of the weights."""
    noisy = any(map(draws_noise, find_posterior_states(state)))
    states = [reseed(state, k) for k in jax.random.split(key, draws)] if noisy else [state]
    carries = bool(find_posterior_states(state))
    drawn = jax.jit(sample)
    thetas = [drawn(one, params) if carries else params for one in states]
    try:
        found = [loss.value_and_grad(theta, batch) for theta in thetas]
        at_mean = loss(params, batch) if noisy else found[0][0]
    except (AttributeError, TypeError, ValueError):
        if not own:
            raise
        return None  # a loss of mu
    values = [value for value, _ in found]
    flat = [leaf for _, grad in found for leaf in jax.tree.leaves(grad)]
    finite = all(np.isfinite(np.asarray(x, np.float64)).all() for x in [*values, *flat])
    return _Seen(thetas, values, found[0][1], at_mean, bool(finite))


def _of_loss(
    loss: _loss.Counted,
    seen: _Seen,
    states: list[PyTree],
    params: Params,
    batch: tuple,
    how: str,
    sizes: list[float],
    examples: int | None,
    numbers: dict[str, float],
) -> list[Finding]:
    """Return what is to be said about the loss, at the parameters and at the samples."""
    size = _loss.example_axis(batch)
    at_draws = float(np.mean(seen.values))
    numbers |= {"loss": seen.values[0], "loss_at_params": seen.at_mean, "loss_at_samples": at_draws}
    whole = how == "sum" and sizes == [1.0] and examples in (None, size)
    findings = _loss.of_growth(how, size, numbers, whole)
    if whole:
        findings.append(Finding(
            "total_loss",
            "note",
            "The loss is a sum over the batch, and ess is 1: right if the batch is always all of "
            "the data.",
            "For batches, return the mean, and give ess= the number of training examples.",
        ))  # fmt: skip
    if not seen.finite:
        findings.append(Finding(
            "not_finite",
            "warning",
            "The loss or its gradient is not finite where a step takes it (the loss is "
            f"{short(seen.at_mean)} at the parameters, and {short(at_draws)} at the samples on "
            "average): such steps are skipped.",
            "Look for logarithms and quotients in the loss; raise hess_init, so that the first "
            "samples stay near the parameters.",
        ))  # fmt: skip
    else:
        around, weights = _rule.spread(states, params, seen.thetas)
        numbers |= {"first_deviation": around, "weight_size": weights}
        findings += _rule.of_noise_scale(around, weights, seen.at_mean, at_draws)
        findings += _loss.of_noise(loss, seen.thetas[0], batch, how, numbers)
    return findings


def _of_precision(
    loss: _loss.Counted,
    opt_state: OptState,
    params: Params,
    batch: tuple,
    draws: int,
    key: Array,
    numbers: dict[str, float],
) -> list[Finding]:
    """Compare the precision that a run has reached with the curvature at its samples."""

    @jax.jit
    def ratios(key: Array) -> list[Array | None]:
        state = reseed(opt_state, key)
        found = estimate(loss.loss, state, params, *batch, antithetic=True).statistic
        return [
            one.reader.statistic_over_precision(one, found, 0.0)
            for one in find_posterior_states(state)
        ]

    loss.count += 2 * draws
    drawn = [ratios(one) for one in jax.random.split(key, draws)]
    findings = []
    for values in zip(*drawn, strict=True):
        if values[0] is None:
            continue
        many = np.asarray(values, np.float64)
        ratio, error = float(many.mean()), float(many.std() / np.sqrt(max(draws - 1, 1)))
        numbers["statistic_over_precision"] = max(
            ratio, numbers.get("statistic_over_precision", ratio)
        )
        if ratio - 2.0 * error > DISAGREES:
            findings.append(Finding(
                "precision_disagrees",
                "warning",
                f"The curvature at this state's samples is {short(ratio)} times the precision that "
                "it holds, where about 1 is right: the deviations are "
                f"{short(float(np.sqrt(ratio)))} times too large.",
                "Look where the step takes its gradient (at blr.sample(opt_state, params), not at "
                "params; blr.make_step does), and whether b2 is too slow for the steps made.",
            ))  # fmt: skip
    return findings
