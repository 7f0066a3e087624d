"""`estimate`: the gradient and the curvature of one step, over samples, micro-batches and devices.

    value = mean l(theta),  grad = mean g(theta),  curvature = mean c(theta, g)

The averages are over S draws of theta (and their mirror images), over the micro-batches of the
batch, and over a named device axis. The curvature is averaged itself: it is a product, and a
product of averages would be wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from blr_optax import _tree
from blr_optax._validate import check_count
from blr_optax.per_example._taps._moments import strided
from blr_optax.state._reader import draws_noise, posterior_states, refuse_multi_steps
from blr_optax.state._reading import covered, draw, noise_of

if TYPE_CHECKING:
    from jaxtyping import Array

UNROLLED_SAMPLES = 4


class Estimate(NamedTuple):
    """What `estimate` returns.

    Attributes:
        value: mean loss over all evaluations.
        grad: mean gradient, a tree like params in its dtypes.
        curvature: mean curvature per example, float32 or wider, for `update(..., curvature=)`; zero
            at leaves without a curvature, None when no leaf has one.
        aux: auxiliary output: floating leaves are averaged over the evaluations, others are the
            last evaluation's. None without `has_aux`.
    """

    value: Array
    grad: Any
    curvature: Any
    aux: Any


def _split(batch: tuple, count: int | None, microbatch: int | None = None) -> tuple[Callable, int]:
    """A function from an index to one of `count` strided pieces (of size `microbatch`), and count.

    Example i goes to micro-batch i mod M: a sharded batch axis stays sharded within each. Arguments
    without axes (a temperature, a key) go to all.
    """
    sizes = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf)}
    if len(sizes) != 1:
        raise ValueError(
            f"estimate: microbatch={microbatch} and split need one leading batch axis shared by "
            f"all arrays of the batch; found sizes {sorted(sizes)}."
        )
    (size,) = sizes
    if microbatch is not None:
        if microbatch < 1 or size % microbatch:
            raise ValueError(
                f"estimate: microbatch={microbatch} must divide the batch size {size}."
            )
        count = size // microbatch
    elif size % count:
        raise ValueError(f"estimate: split: samples={count} must divide the batch size {size}.")

    def piece(index: Array) -> tuple:
        def take(x: Any) -> Any:
            if not jnp.ndim(x):
                return x
            return strided(jnp.asarray(x), count, index)

        return jax.tree.map(take, batch)

    return piece, count


def _accumulate(total: Any, new: Any) -> Any:
    """Sums of floating leaves, in float32 or wider; the newest of others."""

    def add(t: Array, x: Array) -> Array:
        if not jnp.issubdtype(t.dtype, jnp.floating):
            return x
        wide = _tree.statistics_dtype(t.dtype)
        return t.astype(wide) + x.astype(wide)

    return jax.tree.map(add, total, new)


def scaled(tree: Any, a: float) -> Any:
    """a times every leaf."""
    return jax.tree.map(lambda x: a * x, tree)


def _zeros(shapes: Any) -> Any:
    def zero(x: Any) -> Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.zeros(x.shape, _tree.statistics_dtype(x.dtype) if floating else x.dtype)

    return jax.tree.map(zero, shapes)


def _total(evaluate: Callable[[Any], Any], inputs: Any, count: int, unrolled: int) -> Any:
    """Sum of evaluate over the leading axis of inputs: unrolled up to a count, else one scan.

    A CPU runs convolutions inside a scan many times slower than outside, so a few samples are
    unrolled; micro-batches are asked for to save memory, which only a scan does.
    """
    if count <= unrolled:
        rows = [jax.tree.map(lambda x, i=i: x[i], inputs) for i in range(count)]
        return functools.reduce(_accumulate, map(evaluate, rows))
    first = jax.tree.map(lambda x: x[0], inputs)
    start = _zeros(jax.eval_shape(evaluate, first))
    return jax.lax.scan(lambda t, x: (_accumulate(t, evaluate(x)), None), start, inputs)[0]


def estimate(
    loss: Callable[..., Any],
    opt_state: Any,
    params: Any,
    *batch: Any,
    samples: int = 1,
    antithetic: bool = False,
    noise: Any = None,
    has_aux: bool = False,
    microbatch: int | None = None,
    split: bool = False,
    axis_name: Any = None,
) -> Estimate:
    """Value, gradient and curvature of a mean loss at this step's samples of the posterior.

    E_q[l] ~ 1/(S M) sum_{s, b} l_b(theta_s), and likewise grad and curvature; then
    `tx.update(est.grad, opt_state, params, curvature=est.curvature)`.

    With `samples=1` the weights are those of `sample(opt_state, params)`, so the curvature may be
    left out of `update`, which then derives the same.

    Args:
        loss: `loss(theta, *batch)`, a mean over the examples of the batch; `(loss, aux)` with
            `has_aux`.
        opt_state: any optimizer state with a posterior inside.
        params: the parameters.
        batch: passed to the loss.
        samples: S, number of draws.
        antithetic: evaluate every draw at m + sigma eps and m - sigma eps, on the same batch: twice
            the gradients, and the dominant noise of the reparameterised curvature cancels.
        noise: recorded standard normals instead of fresh ones, a tree like params (or its part with
            a posterior) with a leading axis of samples.
        has_aux: whether the loss returns `(value, aux)`; not for vogn and ogn.
        microbatch: evaluate the batch in pieces of this size, in bounded memory. Micro-batches are
            strided: example i goes to piece i mod M. For sam and bsam each has its own adversary.
        split: whether every sample sees its own part of the batch, strided too: the cost of one
            sample whatever their number, and m-sharpness for `sam` and `bsam`.
        axis_name: a named axis (shard_map, vmap) to average over; draws then differ between
            devices.

    Returns:
        An `Estimate`.

    Raises:
        ValueError: for a state without a posterior, of `MultiSteps`, or of `blr_update` (which
            evaluates the loss itself), wrong structure of `noise`, samples < 1, or a microbatch
            or samples to split by that do not divide the batch; for vogn and ogn as `per_example`.

    Source: Shen et al. (2024), Sec. 3.2. For every Gaussian row of `blr_update`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> params, loss = jnp.ones(2), lambda w: 2.0 * jnp.sum(w**2)
      >>> state = blr.ivon(0.1, ess=100.0).init(params)
      >>> est = blr.estimate(loss, state, params, noise=jnp.ones((1, 2)), antithetic=True)
      >>> print(est.grad, est.curvature)  # Hessian 4, exact for a quadratic
      [4. 4.] [4. 4.]
    """
    refuse_multi_steps(opt_state, "estimate")
    states = posterior_states(opt_state, "estimate")
    if any(state.rule.evaluates_loss for state in states):
        raise ValueError(
            "estimate: blr_update evaluates the loss itself; call update(None, opt_state, params, "
            "batch=(...)) instead."
        )
    parts = covered(states, params, "estimate")
    if noise is not None:
        leading = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(noise)}
        if len(leading) != 1 or leading == {()}:
            raise ValueError(
                f"noise: every leaf needs the same leading axis of samples; found {leading}."
            )
        ((recorded,),) = leading
        if samples not in (1, recorded):
            raise ValueError(f"noise: it has {recorded} samples, but samples={samples}.")
        samples = recorded
        noise = [
            _tree.matching_leaves(noise, part, "noise", leading=1 + state.rule.noise_axes)
            if draws_noise(state)
            else None
            for state, part in zip(states, parts, strict=True)
        ]
    check_count("estimate: samples", samples)
    share = _split(batch, samples)[0] if split else lambda index: batch
    device = None if axis_name is None else jax.lax.axis_index(axis_name)
    by_example = any(state.rule.by_example for state in states)
    if by_example and has_aux:
        raise ValueError(
            "estimate: vogn and ogn take the gradients of single examples, for which has_aux=True "
            "has no meaning; drop the auxiliary output."
        )

    def gradient(weights: Any, *examples: Any) -> tuple:
        """(loss, gradient), and per-example squares of it where a state asks for these."""
        if not by_example:
            return *jax.value_and_grad(loss, has_aux=has_aux)(weights, *examples), None
        from blr_optax.per_example._statistics import batch_size, per_example  # with all taps

        found = per_example(loss, weights, *examples)
        size = batch_size("estimate", examples)
        return found.value, found.grad, jax.tree.map(lambda x: x / size, found.sum_squares)

    def second(grad: Any, weights: Any, examples: tuple) -> Any:
        """The gradient at the adversaries, for states that have one; elsewhere at the weights."""
        if not any(state.rule.adversarial for state in states):
            return grad
        moved = [
            state.rule.adversary(state, part, _tree.matching_leaves(grad, part, "grads"))
            for state, part in zip(states, parts, strict=True)
            if state.rule.adversarial
        ]
        found = jax.grad(loss, has_aux=has_aux)(_tree.merge_by_path(weights, *moved), *examples)
        return found[0] if has_aux else found

    def at_weights(noises: list[Any], examples: tuple) -> tuple:
        weights = draw(states, parts, params, noises)
        value, grad, squares = gradient(weights, *examples)
        value, aux = value if has_aux else (value, None)
        first, grad = grad, second(grad, weights, examples)
        aux = jax.tree.map(jnp.asarray, aux)
        curvature = [
            _tree.matching_leaves(squares, part, "squares")
            if state.rule.by_example
            else state.rule.statistic(
                state,
                part,
                _tree.matching_leaves(weights, part, "weights"),
                _tree.matching_leaves(first, part, "grads"),
                drawn,
            )
            for state, part, drawn in zip(states, parts, noises, strict=True)
        ]
        return value, grad, curvature, aux

    def at_draw(one: tuple) -> tuple:
        index, given = one
        noises = (
            given if noise is not None else [noise_of(state, index, device) for state in states]
        )
        signs = (1.0, -1.0) if antithetic else (1.0,)

        def at_examples(examples: tuple) -> tuple:
            results = [at_weights(scaled(noises, sign), examples) for sign in signs]
            return functools.reduce(_accumulate, results)

        if microbatch is None:
            return at_examples(share(index))
        piece, count = _split(share(index), None, microbatch)
        return _total(lambda index: at_examples(piece(index)), jnp.arange(count), count, 1)

    total = _total(at_draw, (jnp.arange(samples), noise), samples, UNROLLED_SAMPLES)
    pieces = 1 if microbatch is None else _split(share(0), None, microbatch)[1]
    evaluations = samples * pieces * (2 if antithetic else 1)

    def average(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        x = x if evaluations == 1 else x / evaluations
        return x if axis_name is None else jax.lax.pmean(x, axis_name)

    value, grad, curvature, aux = jax.tree.map(average, total)
    grad = jax.tree.map(lambda g, p: g.astype(p.dtype), grad, params)
    if not jax.tree.leaves(curvature):
        return Estimate(value, grad, None, aux)
    zeros = jax.tree.map(lambda p: jnp.zeros((), _tree.statistics_dtype(p.dtype)), params)
    return Estimate(value, grad, _tree.merge_by_path(zeros, *curvature), aux)
