"""`estimate`: the gradient and the statistic of one step, over samples, micro-batches and devices.

    value = mean l(theta),  grad = mean g(theta),  statistic = mean c(theta, g)

The averages are over S draws of theta (and their mirror images), over the micro-batches of the
batch, and over a named device axis. The statistic is averaged itself: it is a product, and a
product of averages would be wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _loops, _tree
from blr_optax._random import canonical_key
from blr_optax._validate import check_count, scalar_loss
from blr_optax.per_example._taps._moments import strided
from blr_optax.state._reader import draws_noise, posterior_states, refuse_multi_steps
from blr_optax.state._reading import covered, draw, noise_of
from blr_optax.state._weights import (
    Weighted,
    first_of,
    of_mean_one,
    refuse_normalised,
    weighted,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import (
        AxisName,
        KeyLike,
        Loss,
        OptState,
        Params,
        PyTree,
        Scalar,
        Updates,
    )

UNROLLED_SAMPLES = 4


class Estimate(NamedTuple):
    """What `estimate` returns.

    Attributes:
        value: mean loss over all evaluations.
        grad: mean gradient, a tree like params in its dtypes.
        statistic: mean second statistic, float32 or wider, for `update(..., statistic=)`: usually
            a curvature per example; zero at leaves without one, None when no leaf has one.
        aux: auxiliary output: floating leaves are averaged over the evaluations, others are the
            last evaluation's. None without `has_aux`.
    """

    value: Array
    grad: Updates
    statistic: PyTree
    aux: PyTree


def _split(batch: tuple, count: int, microbatch: int | None = None) -> tuple[Callable, int]:
    """Return a function from an index to one of `count` strided pieces, and their count.

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
    """Add floating leaves, in float32 or wider; of other leaves keep the last value."""

    def add(t: Array, x: Array) -> Array:
        if not jnp.issubdtype(t.dtype, jnp.floating):
            return x
        wide = _tree.statistics_dtype(t.dtype)
        return t.astype(wide) + x.astype(wide)

    return jax.tree.map(add, total, new)


def scaled(tree: PyTree, a: Scalar) -> PyTree:
    """Multiply every leaf by a."""
    return jax.tree.map(lambda x: a * x, tree)


def _zeros(shapes: Any) -> Any:
    def zero(x: Any) -> Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.zeros(x.shape, _tree.statistics_dtype(x.dtype) if floating else x.dtype)

    return jax.tree.map(zero, shapes)


def _total(evaluate: Callable[[Any], Any], inputs: Any, count: int, unrolled: int) -> Any:
    """Sum of evaluate over the leading axis of inputs: unrolled up to a count, else one scan.

    A CPU runs convolutions inside a scan many times slower than outside, so a few samples are
    unrolled; micro-batches are asked for to save memory, which only a scan does: XLA keeps what the
    backward passes of unrolled pieces need at once, with or without barriers in between.
    """
    if count <= unrolled:
        rows = [jax.tree.map(lambda x, i=i: x[i], inputs) for i in range(count)]
        return functools.reduce(_accumulate, map(evaluate, rows))
    first = jax.tree.map(lambda x: x[0], inputs)
    start = _zeros(jax.eval_shape(evaluate, first))
    return _loops.scan(lambda t, x: (_accumulate(t, evaluate(x)), None), start, inputs)[0]


def _averaged(total: Any, evaluations: int, axis_name: AxisName | None) -> Any:
    """Means of floating leaves over the evaluations and the devices; others as they are."""

    def average(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        x = x if evaluations == 1 else x / evaluations
        return x if axis_name is None else jax.lax.pmean(x, axis_name)

    return jax.tree.map(average, total)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A loss, evaluated at draws of the posteriors in an optimizer state.

    Attributes:
        loss: the mean loss.
        has_aux: whether it returns `(value, aux)`.
        params: the parameters.
        states: the states that carry a posterior.
        parts: of each, its part of params.
        device: index on the axis of devices, which separates their draws; None for one device.
        signs: of the noise of a draw: (1, -1) for antithetic pairs.
        weighted: the loss with weights, which then are the last of the examples.
    """

    loss: Callable[..., Any]
    has_aux: bool
    params: Params
    states: list[PyTree]
    parts: list[PyTree]
    device: Array | None
    signs: tuple[float, ...]
    weighted: Weighted | None = None

    def keyed(self, key: Array | None) -> Evaluation:
        """Return the evaluation of `loss(..., key=key)`; of the loss itself for None."""
        if key is None:
            return self
        return dataclasses.replace(self, loss=functools.partial(self.loss, key=key))

    def noises(self, index: Any) -> list[PyTree]:
        """Return the noise of one draw, for every state."""
        return [noise_of(state, index, self.device) for state in self.states]

    def total(self, noises: list[PyTree], examples: tuple) -> tuple:
        """Return the sum of `at` over the signs of the noise."""
        results = [self.at(scaled(noises, sign), examples) for sign in self.signs]
        return functools.reduce(_accumulate, results)

    def at(
        self, noises: list[PyTree], examples: tuple
    ) -> tuple[Array, PyTree, list[PyTree], PyTree]:
        """(value, gradient, every state's statistic, aux) at one draw of the weights."""
        weights = draw(self.states, self.parts, self.params, noises)
        weights = _loops.by_its_value(self.loss, weights, *examples)
        (value, aux), first, squares = self.gradient(weights, examples)
        grad = self.second_gradient(first, weights, examples)
        statistics = [
            self.statistic(state, part, noise, weights, first, squares)
            for state, part, noise in zip(self.states, self.parts, noises, strict=True)
        ]
        return value, grad, statistics, jax.tree.map(jnp.asarray, aux)

    def gradient(self, weights: PyTree, examples: tuple) -> tuple[tuple, PyTree, PyTree]:
        """((value, aux), gradient, mean squared gradients of examples if a state needs them)."""
        if not any(state.reader.by_example for state in self.states):
            value, grad = jax.value_and_grad(self.loss, has_aux=self.has_aux)(weights, *examples)
            return value if self.has_aux else (value, None), grad, None
        from blr_optax.per_example._separable import batch_size
        from blr_optax.per_example._statistics import per_example  # with all taps

        size = batch_size("estimate", examples)
        if self.weighted is None:
            found = per_example(self.loss, weights, *examples)
            share = 1.0
        else:
            loss, counts = self.weighted.loss, examples[-1]
            single = lambda params, *batch: jnp.mean(loss(params, *batch))  # noqa: E731
            found = per_example(single, weights, *examples[:-1], weights=counts)
            share = jnp.sum(counts) / size  # of a micro-batch; of the whole batch it is 1
        squares = jax.tree.map(lambda x: x / size, found.sum_squares)
        return (share * found.value, None), scaled(found.grad, share), squares

    def second_gradient(self, first: PyTree, weights: PyTree, examples: tuple) -> PyTree:
        """Return the gradient at the adversaries, of states that have one, else at the weights."""
        moved = [
            state.reader.adversary(state, part, _tree.matching_leaves(first, part, "grads"))
            for state, part in zip(self.states, self.parts, strict=True)
            if state.reader.adversarial
        ]
        if not moved:
            return first
        adversary = _tree.merge_by_path(weights, *moved)
        found = jax.grad(self.loss, has_aux=self.has_aux)(adversary, *examples)
        return found[0] if self.has_aux else found

    @staticmethod
    def statistic(
        state: OptState,
        part: PyTree,
        noise: PyTree,
        weights: PyTree,
        first: PyTree,
        squares: PyTree,
    ) -> PyTree:
        """Return what one state's `update` takes beside the gradient, from the first gradient."""
        if state.reader.by_example:
            return _tree.matching_leaves(squares, part, "squares")
        weights = _tree.matching_leaves(weights, part, "weights")
        first = _tree.matching_leaves(first, part, "grads")
        return state.reader.statistic(state, part, weights, first, noise)


def _recorded(noise: Any, samples: int, states: list[Any], parts: list[Any]) -> tuple[Any, int]:
    """Return recorded noise, of each state its part, and how many samples it has.

    Raises:
        ValueError: for another structure, or another number of samples than `samples` asks for.
    """
    leading = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(noise)}
    if len(leading) != 1 or leading == {()}:
        raise ValueError(
            f"noise: every leaf needs the same leading axis of samples; found {leading}."
        )
    ((recorded,),) = leading
    if samples not in (1, recorded):
        raise ValueError(f"noise: it has {recorded} samples, but samples={samples}.")
    noises = [
        _tree.matching_leaves(noise, part, "noise", leading=1 + state.reader.noise_axes)
        if draws_noise(state)
        else None
        for state, part in zip(states, parts, strict=True)
    ]
    return noises, recorded


def estimate(
    loss: Loss,
    opt_state: OptState,
    params: Params,
    *batch: PyTree,
    samples: int = 1,
    antithetic: bool = False,
    noise: PyTree = None,
    has_aux: bool = False,
    microbatch: int | None = None,
    split: bool = False,
    axis_name: AxisName | None = None,
    key: KeyLike | None = None,
    weights: Float[ArrayLike, "B ..."] | None = None,
) -> Estimate:
    """Value, gradient and second statistic of a mean loss at this step's samples of the posterior.

    E_q[l] ~ 1/(S M) sum_{s, b} l_b(theta_s), and likewise grad and statistic; then
    `tx.update(est.grad, opt_state, params, statistic=est.statistic)`.

    With `samples=1` the weights are those of `sample(opt_state, params)`, so the statistic may be
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
            The pieces are a loop, in which a CPU is slow at convolutions; unrolled, they would take
            the memory of the whole batch.
        split: whether every sample sees its own part of the batch, strided too: the cost of one
            sample whatever their number, and m-sharpness for `sam` and `bsam`.
        axis_name: a named axis (shard_map, vmap) to average over; draws then differ between
            devices. Without it each device of a `shard_map` gets the gradient of its own value;
            that of a loss which is averaged over the devices itself is the same on all.
        key: typed key or integer seed for a loss that draws by itself (dropout): the loss is called
            as `loss(theta, *batch, key=...)`, with a key of its own for every draw of the weights,
            micro-batch and device. The two evaluations of an antithetic pair share it.
        weights: how much every example counts, c_i >= 0, one per example: value and grad are then
            sum_i c_i (...) / sum_i c_i, over the whole batch and all devices. A loss may return one
            value per example, or per token, and then takes weights of that shape, 0 for padding.

    Returns:
        An `Estimate`.

    Raises:
        ValueError: for a state without a posterior, of `MultiSteps`, or of `blr_update` (which
            evaluates the loss itself), weights that do not fit, a loss that is no mean over its
            examples (one divided by its number of valid tokens) in parts, wrong structure of
            `noise`, samples < 1, or a microbatch or samples to split by that do not divide the
            batch; for vogn and ogn as `per_example`.

    Source: Shen et al. (2024), Sec. 3.2. For every Gaussian row of `blr_update`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> params, loss = jnp.ones(2), lambda w: 2.0 * jnp.sum(w**2)
      >>> state = blr.ivon(0.1, ess=100.0).init(params)
      >>> est = blr.estimate(loss, state, params, noise=jnp.ones((1, 2)), antithetic=True)
      >>> print(est.grad, est.statistic)  # Hessian 4, exact for a quadratic
      [4. 4.] [4. 4.]
    """
    refuse_multi_steps(opt_state, "estimate")
    if weights is None:
        loss = scalar_loss("estimate", loss, has_aux)
    states = posterior_states(opt_state, "estimate", params)
    if any(state.reader.evaluates_loss for state in states):
        raise ValueError(
            "estimate: blr_update evaluates the loss itself; call update(None, opt_state, params, "
            "batch=(...)) instead."
        )
    if has_aux and any(state.reader.by_example for state in states):
        raise ValueError(
            "estimate: vogn and ogn take the gradients of single examples, for which has_aux=True "
            "has no meaning; drop the auxiliary output."
        )
    parts = covered(states, params, "estimate")
    if noise is not None:
        noise, samples = _recorded(noise, samples, states, parts)
    check_count("estimate: samples", samples)
    given, drawn = None, loss
    if key is not None:
        key = canonical_key(key)
        drawn = functools.partial(loss, key=key)  # as it is traced, under any key
    if weights is not None:
        given = weighted(drawn, params, batch, weights, has_aux)
        loss, batch = given.mean, (*batch, of_mean_one(weights, axis_name))
    else:
        how = [f"microbatch={microbatch}"] * (microbatch is not None) + ["split=True"] * split
        if how or axis_name is not None:
            by = (how or [f"axis_name={axis_name!r}"])[0]
            refuse_normalised(first_of(drawn) if has_aux else drawn, params, batch, by)
    device = None if axis_name is None else jax.lax.axis_index(axis_name)
    signs = (1.0, -1.0) if antithetic else (1.0,)
    if key is not None and device is not None:
        key = jax.random.fold_in(key, device)
    evaluation = Evaluation(loss, has_aux, params, states, parts, device, signs, given)
    share = _split(batch, samples)[0] if split else lambda index: batch

    def at_draw(inputs: tuple) -> tuple:
        index, given = inputs
        noises = evaluation.noises(index) if noise is None else given
        own = None if key is None else jax.random.fold_in(key, index)
        if microbatch is None:
            return evaluation.keyed(own).total(noises, share(index))
        piece, count = _split(share(index), 1, microbatch)

        def at_piece(i: Array) -> tuple:
            here = None if own is None else jax.random.fold_in(own, i)
            return evaluation.keyed(here).total(noises, piece(i))

        return _total(at_piece, jnp.arange(count), count, 1)

    total = _total(at_draw, (jnp.arange(samples), noise), samples, UNROLLED_SAMPLES)
    pieces = 1 if microbatch is None else _split(share(0), 1, microbatch)[1]
    evaluations = samples * pieces * len(signs)
    value, grad, statistics, aux = _averaged(total, evaluations, axis_name)
    grad = optax.tree.cast_like(grad, params)
    if not jax.tree.leaves(statistics):
        return Estimate(value, grad, None, aux)
    zeros = jax.tree.map(lambda p: jnp.zeros((), _tree.statistics_dtype(p.dtype)), params)
    return Estimate(value, grad, _tree.merge_by_path(zeros, *statistics), aux)
