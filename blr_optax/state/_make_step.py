"""`make_step`: one training step for every optimizer, of this library or of optax.

    est    = estimate(loss, opt_state, params, *batch)            at this step's samples
    params = params + tx.update(est.grad, opt_state, params, statistic)

An optimizer that evaluates the loss itself (`blr_update`, `newton`, ...) gets the batch instead,
and one of optax the value and gradient at its parameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax._random import canonical_key
from blr_optax._validate import check_count
from blr_optax.estimators._terms import Term
from blr_optax.state._donation import donating
from blr_optax.state._estimate import estimate
from blr_optax.state._reader import Reader, check_transformation, draws_noise, find_posterior_states
from blr_optax.state._weights import of_mean_one, weighted

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import AxisName, KeyLike, Loss, OptState, Params, PyTree


class StepInfo(NamedTuple):
    """What a step of `make_step` tells beside parameters and state.

    Attributes:
        value: mean loss before the step, at the samples where an optimizer draws any.
        aux: auxiliary output of the loss, None without `has_aux`. Over draws and micro-batches its
            floating leaves are averaged, and others are those of the last evaluation: return means,
            not counts or arrays of one entry per example.
        skipped: steps skipped so far because something was not finite (int32); 0 for optimizers
            that do not count them.
    """

    value: Array
    aux: PyTree
    skipped: Array


class PointState(NamedTuple):
    """What `estimate` reads for an optimizer without a posterior: the loss at the parameters."""

    reader: Reader


def _skipped(opt_state: OptState) -> Array:
    states = find_posterior_states(opt_state)
    counts = [getattr(state.reader.core(state), "skipped", 0) for state in states]
    return jnp.asarray(sum(counts), jnp.int32)


def taken(update: Callable[..., Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return the extra arguments that an update takes: all, or those that it names."""
    known = inspect.signature(update).parameters.values()
    if any(argument.kind == argument.VAR_KEYWORD for argument in known):
        return extra
    return {name: extra[name] for name in extra.keys() & {argument.name for argument in known}}


def make_step(
    tx: optax.GradientTransformation,
    loss: Loss,
    *,
    samples: int = 1,
    antithetic: bool = False,
    microbatch: int | None = None,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
    jit: bool = True,
    donate: bool = True,
) -> Callable[..., tuple[PyTree, PyTree, StepInfo]]:
    """Return the training step of an optimizer, the same for all of them.

    params, opt_state, info = step(params, opt_state, *batch, weights=None)

    theta ~ q;  g = grad l(theta);  params <- params + update(g): `estimate`, `tx.update` and
    `optax.apply_updates` in one function, for an optimizer of this library and of optax alike. The
    gradient is taken where the optimizer wants it, so the mistake of taking it at the
    parameters cannot be made.

    Args:
        tx: any optax transformation; its state may carry posteriors anywhere inside.
        loss: `loss(params, *batch)`, a mean over the examples of the batch; `(loss, aux)` with
            `has_aux`. For an optimizer that evaluates the loss itself, the loss that it was given.
        samples: draws of the weights per step; of no effect for optimizers that do not draw.
        antithetic: evaluate every draw and its mirror image.
        microbatch: evaluate the batch in pieces of this size, in bounded memory.
        has_aux: whether the loss returns `(value, aux)`.
        axis_name: a named axis (shard_map, vmap) to average over.
        jit: whether to compile the step; without, it can be part of a larger program.
        donate: whether the compiled step may reuse the memory of `params` and `opt_state`, which
            are then gone: go on with the ones that it returns. Where they share some of it, as the
            first state of `optax.lbfgs` does, it is copied.

    Returns:
        A function of (params, opt_state, *batch) that returns (params, opt_state, `StepInfo`).
        Given `key=` besides, a typed key or integer seed that changes from step to step, it calls
        the loss as `loss(params, *batch, key=...)` with a key of its own for every draw and
        micro-batch: for dropout and other noise that the loss draws by itself. Given `weights=`, it
        counts every example, or token, that much, as `estimate` does.

    Raises:
        ValueError: for a `tx` that is not a transformation, samples < 1, options that an optimizer
            that evaluates the loss itself does not have, and as `estimate`.

    Source: Khan and Rue (2023), Eq. 3. For every row of `blr_update`, and any optimizer of optax.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> loss = lambda w, x, y: 0.5 * jnp.mean((w * x - y) ** 2)
      >>> tx, params = blr.ivon(0.1, ess=100.0, b2=0.99), jnp.zeros(())
      >>> step, opt_state = blr.make_step(tx, loss), tx.init(params)
      >>> x, y = jnp.ones(8), jnp.full(8, 2.0)
      >>> for _ in range(200):
      ...     params, opt_state, info = step(params, opt_state, x, y)
      >>> print(jnp.abs(params - 2.0) < 0.1, info.skipped)
      True 0
    """
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    check_transformation("make_step", tx)
    check_count("make_step: samples", samples)
    if not (callable(loss) or isinstance(loss, Term)):
        raise ValueError(
            "make_step: the loss must be a function loss(params, *batch), not its value; got "
            f"{type(loss).__name__}."
        )
    tx = optax.with_extra_args_support(tx)
    options = {"antithetic": antithetic, "microbatch": microbatch, "has_aux": has_aux}
    asked = [name for name, value in options.items() if value]
    asked += ["samples"] * int(samples != 1) + ["axis_name"] * (axis_name is not None)

    def by_batch(
        params: Params, opt_state: OptState, batch: tuple, asked: list[str]
    ) -> tuple[Any, Any, StepInfo]:
        """Return the step of an optimizer that evaluates the loss itself."""
        if asked:
            raise ValueError(
                f"make_step: {', '.join(asked)}: this optimizer evaluates the loss itself; give "
                "its own estimator= the number of draws, and drop these arguments."
            )
        before = _skipped(opt_state)
        # No gradients are used; optax.masked and partition want a tree.
        none = jax.tree.map(jnp.zeros_like, params)
        updates, opt_state = tx.update(none, opt_state, params, batch=batch)
        info = StepInfo(
            find_posterior_states(opt_state)[0].expected_loss, None, _skipped(opt_state)
        )
        # The state keeps the last finite loss; what this step saw was not.
        value = jnp.where(info.skipped > before, jnp.nan, info.value)
        return optax.apply_updates(params, updates), opt_state, info._replace(value=value)

    def step(
        params: Params,
        opt_state: OptState,
        *batch: Any,
        key: KeyLike | None = None,
        weights: Float[ArrayLike, "B ..."] | None = None,
    ) -> tuple[Any, Any, StepInfo]:
        states = find_posterior_states(opt_state)
        if find_posterior_states(params) and not states:
            raise ValueError(
                "make_step: the state stands where the parameters belong; the order is "
                "step(params, opt_state, *batch)."
            )
        if states and all(state.reader.evaluates_loss for state in states):
            if weights is not None:
                raise ValueError(
                    "make_step: weights: this optimizer evaluates the loss itself; put the weights "
                    "into its batch, and into its loss, jnp.sum(c * values) / jnp.sum(c)."
                )
            return by_batch(params, opt_state, batch, asked + ["key"] * (key is not None))
        draws = any(map(draws_noise, states))
        est = estimate(
            loss,
            opt_state if states else PointState(Reader()),
            params,
            *batch,
            samples=samples if draws else 1,
            antithetic=antithetic and draws,
            microbatch=microbatch,
            has_aux=has_aux,
            axis_name=axis_name,
            key=key,
            weights=weights,
        )

        # A line search compares with the value above, so under the same noise.
        first = None if key is None else jax.random.fold_in(canonical_key(key), 0)
        drawn = loss if key is None else functools.partial(loss, key=first)

        def value_fn(params: Params) -> Array:
            if weights is None:
                found = drawn(params, *batch)
            else:
                counts = of_mean_one(weights, axis_name)
                whole = weighted(drawn, params, batch, weights, has_aux)
                found = whole.mean(params, *batch, counts)
            return found[0] if has_aux else found

        # What optimizers of optax may ask for; a line search refuses what it does not know.
        extra = {"value": est.value, "grad": est.grad, "value_fn": value_fn}
        if est.statistic is not None:
            extra["statistic"] = est.statistic
        names = [state.reader.aux_argument for state in states if state.reader.aux_argument]
        if names and not has_aux:
            raise ValueError(
                f"make_step: this optimizer needs {names[0]}=, an auxiliary output of the loss; "
                f"let it return (value, {names[0]}), and pass has_aux=True."
            )
        extra |= dict.fromkeys(names, est.aux)
        updates, opt_state = tx.update(est.grad, opt_state, params, **taken(tx.update, extra))
        info = StepInfo(est.value, est.aux, _skipped(opt_state))
        return optax.apply_updates(params, updates), opt_state, info

    if not jit:
        return step
    return donating(step, 2) if donate else jax.jit(step)
