"""Statistics of per-example gradients at about the price of one gradient: see `per_example`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from blr_optax import _loops, _tree
from blr_optax._random import canonical_key
from blr_optax.per_example._likelihood import EXACT, exact_cotangent, sampled_cotangent
from blr_optax.per_example._separable import (
    batch_size,
    checked,
    refuse_closed_over,
    refuse_coupled,
)
from blr_optax.per_example._taps import _mesh
from blr_optax.per_example._taps._moments import KroneckerFactors, Reduced, strided
from blr_optax.per_example._taps._sums import (
    Sums,
    Wanted,
    over_pieces,
    sums,
    traced,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax._typing import KeyLike, LossOrTerm, Params, PyTree, Updates

STATISTICS = ("sum_squares", "norms", "kfac", "ggn_diagonal")
LABELS = ("exact", "sampled", "true")
POSITIONS = {"expand": KroneckerFactors, "reduce": Reduced}


class PerExample(NamedTuple):
    """What `per_example` returns; None for what was not asked.

    Attributes:
        value: mean loss.
        grad: mean gradient, a tree like params in its dtypes.
        sum_squares: sum_i g_i^2, a tree like params in float32 or wider.
        norms: |g_i| over all parameters, [B], in the order of the examples.
        kfac: Kronecker factors by the name of the kernel's leaf (its key path, "['layer']['w']"),
            for dense layers and convolutions without groups whose kernel is used once, along a
            leading axis for layers in a scan; other leaves are absent. A bias is in the inputs'
            mean; inputs and outputs are in the order in which the leaf holds them, whatever its
            layout: I, H, W for a kernel OIHW, and H, W, I for HWIO.
        ggn_diagonal: diagonal of sum_i J_i^T Lambda_i J_i, a tree like params.
    """

    value: Array
    grad: Updates
    sum_squares: PyTree
    norms: Float[Array, " B"] | None
    kfac: dict[str, KroneckerFactors] | None
    ggn_diagonal: PyTree


def per_example(
    loss: LossOrTerm,
    params: Params,
    *batch: PyTree,
    statistics: tuple[str, ...] = ("sum_squares",),
    outputs: Callable[..., Array] | None = None,
    likelihood: str | None = None,
    labels: str = "exact",
    positions: str = "expand",
    microbatch: int | None = None,
    weights: Float[Array, " B"] | None = None,
    key: KeyLike | None = None,
) -> PerExample:
    """Mean gradient, and statistics of the gradients of single examples, in one backward pass.

    sum_squares = sum_i g_i^2,  norms = |g_i|,  g_i the gradient of example i's loss.

    Where a parameter meets an activation a with output cotangent d, G_i = a_i d_i^T, and the sum
    of squares of a dense layer is one more matrix product, (A*A)^T (D*D). Those places are found
    in the jaxpr of any loss; `explain` says where, and what could not go this way (used twice, in
    a loop, or non-linearly): those parameters get plain per-example gradients, just as exact.

    Args:
        loss: `loss(params, *batch)`, a mean over the batch; or a `glm` term. It is evaluated on
            batches of one example, with their leading axis of 1, so batch statistics are refused,
            and random masks drawn inside are the same for all examples: for dropout pass a key per
            example in the batch. An L2 term in it is exact, but costs a gradient per example:
            prefer a prior.
        params: tree of floating-point arrays.
        batch: trees of arrays with one leading axis of examples.
        statistics: which of "sum_squares", "norms", "kfac", "ggn_diagonal".
        outputs: `outputs(params, *batch)` -> the model's outputs [B, ..., k], logits or means.
        likelihood: "categorical", "bernoulli" or "gaussian" (unit variance), of the outputs.
        labels: whose gradients make `ggn_diagonal` and `kfac`'s outputs: "exact", the expectation
            over the model's own labels, by as many passes as one example has outputs; "sampled",
            one draw of them, unbiased, in one pass; "true", the batch's, the empirical Fisher
            (`kfac` only, needs no outputs; its diagonal is `sum_squares`). The model's own labels
            stand for one loss at every position, added up; a loss that is their mean over T
            positions has true gradients of 1/T of that.
        positions: what `kfac` does where positions share a kernel: "expand" takes each position as
            an example, "reduce" the mean input and the sum of the cotangents.
        microbatch: examples at a time, in bounded memory; example i goes to piece i mod M, so a
            sharded batch axis stays sharded when this is a multiple of the devices.
        weights: how often each example counts, 0 for a padded row (whose loss must still be
            finite): c_i. Then value and grad are sum_i c_i (...) / sum_i c_i and sums are
            sum_i c_i g_i^2; norms stay as they are.
        key: typed key or integer seed, for sampled labels.

    Returns:
        A `PerExample`.

    Raises:
        ValueError: for an unknown statistic or likelihood, missing outputs, likelihood or key,
            integer parameters, a batch without a common leading axis, a microbatch that does not
            divide it, weights of another shape, a loss that is not a scalar or not a mean, that
            couples its examples, or that closes over its parameters.

    Source: Goodfellow (2015), arXiv:1510.01799; Dangel et al. (2020), BackPACK; Eschenhagen et al.
    (2023) for expand and reduce. Special case of `blr_update` with
    `estimator=monte_carlo(1, curvature=per_example_squares())`: OGN and VOGN.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
      >>> found = blr.per_example(loss, jnp.zeros(1), jnp.array([[1.0], [2.0]]), jnp.ones(2))
      >>> print(found.grad, found.sum_squares)  # g = (-2, -4)
      [-3.] [20.]
    """
    _check_statistics(statistics, labels, positions)
    if not (callable(loss) or hasattr(loss, "per_example")):
        raise ValueError(f"per_example: loss must be a function or a glm term; got {loss!r}.")
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    weights = None if weights is None else jnp.asarray(weights)
    size = loss.size(batch) if hasattr(loss, "per_example") else batch_size("per_example", batch)
    whole = microbatch is None or isinstance(microbatch, int)
    if not whole or (microbatch is not None and (microbatch < 1 or size % microbatch)):
        raise ValueError(f"per_example: microbatch={microbatch} must divide the batch of {size}.")
    if weights is not None and jnp.shape(weights) != (size,):
        raise ValueError(
            f"per_example: weights has shape {jnp.shape(weights)}; give one number per example, "
            f"({size},)."
        )
    if hasattr(loss, "per_example"):
        return _of_glm(loss, params, batch, statistics, weights, labels)
    if {"kfac", "ggn_diagonal"} & {*statistics} and labels != "true":
        key = _check_model(outputs, likelihood, labels, key)
    model = Model(outputs, likelihood, labels)
    asked: Any = functools.partial(_statistics, loss, statistics, model, positions, microbatch)
    mesh = _mesh.explicit_mesh((params, batch, weights))
    if mesh is not None:
        like, everywhere = _mesh.shardings(params, mesh), NamedSharding(mesh, PartitionSpec())
        places = PerExample(everywhere, like, None, _mesh.leading(batch, mesh), everywhere, None)
        places = places._replace(
            **{k: like for k in ("sum_squares", "ggn_diagonal") if k in statistics}
        )
        asked = jax.sharding.auto_axes(asked, out_sharding=places)
    return asked(params, batch, weights, key)


def _statistics(
    loss: Callable[..., Array],
    statistics: tuple[str, ...],
    model: Model,
    positions: str,
    microbatch: int | None,
    params: Params,
    batch: tuple,
    weights: Any,
    key: KeyLike | None,
) -> PerExample:
    """Compute the requested statistics; the arguments have been checked."""
    params, batch, weights = _together(loss, params, batch, weights)
    found = checked("per_example", loss, params, batch)
    leaves, tree = jax.tree.flatten(params)
    size = len(jax.tree.leaves(batch)[0])
    kron = POSITIONS[positions] if "kfac" in statistics else None
    own, ggn = model.labels == "true", "ggn_diagonal" in statistics
    wanted = Wanted("sum_squares" in statistics, "norms" in statistics, kron if own else None)
    of_model = Wanted(ggn, factors=None if own else kron)
    count = 1 if microbatch is None else size // microbatch

    def piece(index: Array) -> Sums:
        part, c = batch, weights
        if count > 1:
            part, c = jax.tree.map(lambda x: strided(x, count, index), (batch, weights))
        result = sums(found, params, part, wanted, c)
        if not any(of_model):
            return result
        more = model.sums(of_model, params, part, c, key, index)
        return result._replace(ggn=more.squares, factors=more.factors)

    total = over_pieces(piece, count)
    n = size if weights is None else jnp.sum(weights)
    grad = [(t / n).astype(x.dtype) for t, x in zip(total.total, leaves, strict=True)]
    return PerExample(
        (total.value / n).astype(jax.tree.leaves(found.shape)[0].dtype),
        tree.unflatten(grad),
        tree.unflatten(total.squares) if wanted.squares else None,
        jnp.sqrt(total.norms) if wanted.norms else None,
        _named(params, total.factors, n) if kron else None,
        tree.unflatten(total.ggn) if ggn else None,
    )


def _together(loss: Callable[..., Array], params: Params, batch: tuple, weights: Any) -> tuple:
    """Parameters and batch of each device, where those of several are traced as one.

    The gradients are then those of the device's own examples, whatever `jax.grad` would add up.
    """
    axes = _loops.varying((params, batch, weights))
    if _loops.on_manual_axes():  # what the loss closes over may vary as well
        axes |= _loops.varying(jax.eval_shape(loss, params, *batch))
    return _loops.spread((params, batch, weights), axes)


def _of_glm(
    loss: LossOrTerm,
    params: Params,
    batch: tuple,
    statistics: tuple[str, ...],
    weights: Any,
    labels: str,
) -> PerExample:
    """Ask a term, which has all in closed form; its one layer is the flat parameter vector."""
    if labels == "sampled":
        raise ValueError(
            'per_example: labels="sampled" needs a likelihood, and a glm term has a loss; use '
            '"exact" or "true".'
        )
    found = loss.per_example(params, batch, weights, labels == "true")
    factors = {"": KroneckerFactors(*found.pop("factors"))}
    wanted = {name: value if name in statistics else None for name, value in found.items()}
    kfac = factors if "kfac" in statistics else None
    return PerExample(found["value"], found["grad"], wanted["sum_squares"], wanted["norms"], kfac,
                      wanted["ggn_diagonal"])  # fmt: skip


def _named(params: Params, factors: list[Any], n: Any) -> dict[str, KroneckerFactors]:
    """Return the layers' factors by the names of their kernels; inputs become means."""
    names = [_tree.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {
        name: KroneckerFactors(f.inputs / n, f.mean / n, f.outputs)
        for name, f in zip(names, factors, strict=True)
        if f is not None
    }


def _check_statistics(statistics: tuple[str, ...], labels: str, positions: str) -> None:
    is_tuple = isinstance(statistics, (tuple, list))
    if not is_tuple or any(name not in STATISTICS for name in statistics):
        raise ValueError(
            f"per_example: statistics={statistics!r}; give a tuple of {', '.join(STATISTICS)}."
        )
    if labels not in LABELS:
        raise ValueError(f"per_example: labels={labels!r} is unknown; known: {', '.join(LABELS)}.")
    if positions not in POSITIONS:
        raise ValueError(
            f"per_example: positions={positions!r} is unknown; known: {', '.join(POSITIONS)}."
        )
    if labels == "true" and "ggn_diagonal" in statistics:
        raise ValueError(
            'per_example: labels="true" with ggn_diagonal is the empirical Fisher, which is '
            'sum_squares; ask for that, or for labels="exact" or "sampled".'
        )


def _check_model(outputs: Any, likelihood: Any, labels: str, key: KeyLike | None) -> Any:
    if outputs is None or likelihood is None:
        raise ValueError(
            "per_example: ggn_diagonal and kfac need the model's outputs and what they mean: pass "
            f"outputs=lambda params, *batch: logits and likelihood= one of {', '.join(EXACT)} "
            '(or, for kfac, labels="true").'
        )
    if likelihood not in EXACT:
        raise ValueError(
            f"per_example: likelihood={likelihood!r} is unknown; known: {', '.join(EXACT)}."
        )
    if labels == "sampled" and key is None:
        raise ValueError('per_example: labels="sampled" needs key=, a typed key or a seed.')
    return None if key is None else canonical_key(key)


class Model(NamedTuple):
    """A model whose Gauss-Newton statistics are wanted."""

    outputs: Any
    likelihood: Any
    labels: str

    def sums(
        self,
        wanted: Wanted,
        params: Params,
        batch: tuple,
        weights: PyTree,
        key: Any,
        index: Array,
    ) -> Sums:
        """Return the sums of all passes over one batch; of the layers' inputs, of one pass."""
        f = self.outputs(params, *batch)
        if jnp.ndim(f) < 2 or not jnp.issubdtype(f.dtype, jnp.floating):
            raise ValueError(
                f"per_example: outputs must return floating-point [B, ..., k]; got {f.dtype} of "
                f"shape {jnp.shape(f)}."
            )
        if self.likelihood == "categorical" and f.shape[-1] < 2:
            raise ValueError(
                f"per_example: categorical outputs of shape {f.shape} have one class; a single "
                'logit is likelihood="bernoulli".'
            )

        def linear(params: Params, cotangent: Array, *batch: Any) -> Array:
            return jnp.sum(cotangent * self.outputs(params, *batch))

        mean_output = lambda p, *b: jnp.mean(self.outputs(p, *b))  # noqa: E731
        refuse_coupled("per_example, outputs", mean_output, params, batch)
        found = traced(linear, params, (f, *batch))
        refuse_closed_over("per_example: outputs", params, found)

        def one(cotangent: Array) -> Sums:
            result = sums(found, params, (cotangent, *batch), wanted, weights)
            return Sums(None, None, result.squares, None, result.factors)

        if self.labels == "sampled":
            draw = jax.random.fold_in(key, index)
            return one(sampled_cotangent(self.likelihood, draw, f))
        passes = math.prod(f.shape[1:])

        def step(total: Sums, index: Array) -> tuple[Sums, None]:
            found = one(exact_cotangent(self.likelihood, f, index))
            return jax.tree.map(jnp.add, total, found), None

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, f))
        total = _loops.scan(step, zero, jnp.arange(passes))[0]
        same = [
            None if k is None else k._replace(inputs=k.inputs / passes, mean=k.mean / passes)
            for k in total.factors
        ]
        return total._replace(factors=same)
