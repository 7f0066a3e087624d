"""Predictions of a posterior: average over weights, and say how much the weights disagree.

Every prediction is a mean over weight samples ``theta_s ~ q`` of what the network says with them,

    p(y | x, data)  ~=  1/S sum_s p(y | x, theta_s),          theta_s = q.sample(fold_in(key, s)),

accumulated a chunk of samples at a time: memory is that of one chunk's outputs whatever ``S`` is,
and `chunk` changes the result by rounding only. Accumulators are float32 or wider.

Outside `jit` one program is compiled for what `apply` does and the shapes of the inputs, and used
again by later calls, also by a fresh lambda: functions whose traces are the same share it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import metrics
from blr_optax._averages import Average, Task, averaged, default_chunk, in_batches, split
from blr_optax._distribution import Distribution
from blr_optax._ensemble import Ensemble, ensemble
from blr_optax._random import canonical_key
from blr_optax._validate import check_count, concrete, holds, require
from blr_optax.state._reader import find_posterior_states

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float, Key, PyTree

    from blr_optax._typing import AnyArray, KeyLike

__all__ = [
    "Predictive",
    "RegressionPredictive",
    "Sampler",
    "binary_link",
    "predict",
    "predict_regression",
]


@runtime_checkable
class Sampler(Protocol):
    """What a posterior must offer here: `blr_optax.Distribution`, an ensemble, an MCMC trace."""

    def sample(self, key: Key[Array, ""], shape: tuple[int, ...]) -> PyTree:
        """Draw weights with leading axes `shape`."""


class Predictive(NamedTuple):
    """Averaged class probabilities and the split of their entropy, in nats, per example.

    The entropies are those of `metrics.entropy_split`: ``total = aleatoric + epistemic``.
    """

    probabilities: Float[AnyArray, "*n k"]
    total: Float[AnyArray, "*n"]
    aleatoric: Float[AnyArray, "*n"]
    epistemic: Float[AnyArray, "*n"]


class RegressionPredictive(NamedTuple):
    """Mean of the predicted function, its variance over weights, and the variance of the noise."""

    mean: Float[AnyArray, "*n"]
    epistemic: Float[AnyArray, "*n"]
    aleatoric: Float[AnyArray, "*n"]

    @property
    def variance(self) -> Float[AnyArray, "*n"]:
        """Variance of a new observation, ``epistemic + aleatoric``."""
        return self.epistemic + self.aleatoric


def binary_link(logits: Float[ArrayLike, "*n"]) -> Float[Array, "*n 2"]:
    """Link for one logit per example: the probabilities of classes 0 and 1, on a new last axis.

    >>> binary_link(jnp.log(jnp.array([1.0, 3.0]))).round(4).tolist()  # odds 1:1 and 3:1
    [[0.5, 0.5], [0.25, 0.75]]
    """
    logits = _wide(jnp.asarray(logits))
    return jnp.stack([jax.nn.sigmoid(jnp.negative(logits)), jax.nn.sigmoid(logits)], axis=-1)


def predict(
    key: KeyLike,
    q: Sampler | Sequence[PyTree],
    apply: Callable[..., Float[Array, "*n k"]],
    *inputs: PyTree,
    samples: int = 64,
    chunk: int | None = None,
    link: Callable[[Array], Float[Array, "*n k"]] = jax.nn.softmax,
    batch_size: int | None = None,
    progress: bool = False,
) -> Predictive:
    """Class probabilities averaged over weight samples, with their uncertainty split in two.

    ``probabilities = mean_s p_s``, ``total = H(mean_s p_s)``, ``aleatoric = mean_s H(p_s)``,
    ``epistemic = total - aleatoric``, with ``p_s = link(apply(theta_s, *inputs))``.

    Args:
        key: typed key or integer seed. Sample ``s`` uses ``fold_in(key, s)``.
        q: The posterior over weights, or a list of them, or an `Ensemble`, whose members take
            turns (`samples` is rounded up to a multiple of their number). One whose class jax does
            not know as a tree is a constant of the program.
        apply: ``apply(weights, *inputs) -> logits``, classes on the last axis, any axes before it
            (examples, pixels, tokens).
        *inputs: Passed on to `apply`.
        samples: Number of weight samples ``S`` (static).
        chunk: How many of them are evaluated at once (static), lower it to save memory; 8, and 1
            on a CPU, where more is slower.
        link: From the outputs of `apply`, in float32 or wider, to probabilities over the last axis.
            For logits without a class axis, one per example or per independent label, use
            `binary_link`; for log-probabilities, `jax.numpy.exp`.
        batch_size: Go through the examples, the leading axis of all inputs, in batches of this
            size, with the same weights; outside `jit`, in the memory of one batch.
        progress: Whether to draw a progress bar over the batches (with rich).

    Returns:
        A `Predictive`; score its `probabilities` with `blr_optax.metrics`.

    Raises:
        ValueError: if `key` is not one key or seed, `samples` or `chunk` is below 1, the outputs
            have one class only, `link` is `jax.nn.sigmoid`, whose values are not a distribution
            over the last axis, or (outside `jit`) its values do not sum to one.
        ImportError: for `progress` without rich.

    Outside `jit` it warns where the outputs are probabilities already, of which it would take a
    softmax. Two equally likely weights that are certain and disagree: all of ``log 2`` is epistemic

    >>> class TwoModels:
    ...     def sample(self, key, shape):
    ...         return jnp.where(jax.random.bernoulli(key, 0.5, shape), 1e3, -1e3)
    >>> p = predict(
    ...     jax.random.key(0), TwoModels(), jnp.multiply, 1.0, samples=4096, link=binary_link
    ... )
    >>> [round(float(h), 2) for h in (p.total, p.aleatoric, p.epistemic)]
    [0.69, 0.0, 0.69]
    """
    if link is jax.nn.sigmoid:
        raise ValueError(
            "link=jax.nn.sigmoid gives one number per output, not a distribution over the last "
            "axis; use link=blr_optax.binary_link, which returns both classes."
        )
    if not callable(link):
        raise ValueError(f"link={link!r} must be a function of the outputs, such as binary_link.")
    options = Options(samples, chunk, batch_size, progress)
    found = run(_classes, _split_entropy, False, key, q, (apply, link), inputs, options)
    if concrete(found.already):
        if np.size(found.already) and np.all(found.already == 1) and link is jax.nn.softmax:
            warnings.warn(
                "predict: the outputs of apply are probabilities already, and a softmax of them is "
                "too flat; give the logits, or link=lambda p: p.",
                stacklevel=2,
            )
        if np.any(found.excess > 0.02):
            raise ValueError(
                "predict: link gives numbers that are not a distribution over the last axis, as "
                "they do not sum to one; for logits leave it out, for log-probabilities give "
                "jax.numpy.exp."
            )
    return found.predictive


class _Checked(NamedTuple):
    """A prediction, and per example what is looked at before it is returned."""

    predictive: Predictive
    already: Array  # share of the samples whose outputs are probabilities
    excess: Array  # |1 - sum of the link's values|


def _classes(functions: Sequence[Any], weights: PyTree, inputs: tuple) -> tuple[Array, ...]:
    apply, link = functions
    outputs = _floating(apply(weights, *inputs))
    sizes = {jnp.shape(x)[0] for x in jax.tree.leaves(inputs) if jnp.ndim(x)}
    if link is jax.nn.softmax:
        if outputs.ndim == 0 or (outputs.ndim == 1 and outputs.shape[0] in sizes):
            raise ValueError(
                f"predict: apply returned shape {outputs.shape}, one number per example and no "
                "class axis to take a softmax over. For one logit per example use "
                "link=binary_link; for a regression use predict_regression."
            )
        if outputs.shape[-1] == 1:
            raise ValueError(
                f"predict: apply returned shape {outputs.shape}, a single class, whose softmax is "
                "1 whatever the logit. For one logit per example drop that axis in apply, [..., 0],"
                " and use link=binary_link; for a regression use predict_regression."
            )
    probs = link(_wide(outputs))
    tolerance = 100 * float(jnp.finfo(outputs.dtype).eps)
    already = jnp.all(outputs >= 0, -1) if outputs.ndim else jnp.zeros((), bool)
    if outputs.ndim:
        already &= jnp.abs(jnp.sum(_wide(outputs), -1) - 1) < tolerance
    excess = jnp.abs(jnp.sum(_wide(probs), -1) - 1)
    return _wide(probs), metrics.entropy(probs), already.astype(jnp.float32), excess


def _split_entropy(average: Average) -> _Checked:
    probs, aleatoric, *checks = average.mean
    return _Checked(Predictive(probs, *metrics.split_means(probs, aleatoric)), *checks)


def predict_regression(
    key: KeyLike,
    q: Sampler | Sequence[PyTree],
    apply: Callable[..., PyTree],
    *inputs: PyTree,
    noise_variance: Float[ArrayLike, "*#n"] | Callable[..., Float[Array, "*#n"]] | None = None,
    samples: int = 64,
    chunk: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> RegressionPredictive:
    """Mean and variance of a prediction over weight samples, with the variance of the noise.

    ``mean = mean_s f_s``, ``epistemic = sum_s (f_s - mean)^2 / (S - 1)`` (unbiased) and
    ``aleatoric = mean_s noise_s``, with ``f_s = apply(theta_s, *inputs)``.

    Args:
        key: typed key or integer seed. Sample ``s`` uses ``fold_in(key, s)``.
        q: The posterior over weights; as in `predict`.
        apply: ``apply(weights, *inputs) -> outputs``, of any shape. A network that predicts its own
            noise returns a pair (mean, variance), a dict of "mean" and "variance" or "std", or a
            `blr_optax.Distribution` of the observation.
        *inputs: Passed on to `apply`.
        noise_variance: Variance of an observation given the function, in the squared unit of the
            outputs: numbers, broadcast to them, or for learnt noise a function
            ``noise_variance(weights, *inputs)``.
        samples: Number of weight samples ``S``, at least 2 (static).
        chunk: How many of them are evaluated at once (static); as in `predict`.
        batch_size: Go through the examples in batches; as in `predict`.
        progress: Whether to draw a progress bar over the batches.

    Returns:
        A `RegressionPredictive`; score it with `blr_optax.metrics.regression`.

    Raises:
        ValueError: if `key` is not one key or seed, `samples` is below 2 or `chunk` below 1, the
            noise is given twice, or (outside `jit`) a variance is negative.

    >>> class StandardNormal:
    ...     def sample(self, key, shape):
    ...         return jax.random.normal(key, shape)
    >>> key, slope = jax.random.key(0), StandardNormal()
    >>> f = predict_regression(key, slope, jnp.multiply, jnp.array([0.0, 3.0]), samples=16384)
    >>> [round(float(v)) for v in f.epistemic]  # the variance of x * N(0, 1) is x^2
    [0, 9]
    """
    if samples < 2:
        raise ValueError(f"samples={samples} has no variance; give at least 2.")
    learnt = noise_variance if callable(noise_variance) else None
    given = None if learnt else noise_variance
    if given is not None:
        if isinstance(given, str):
            raise ValueError(f"noise_variance={given!r} must be a number, an array or a function.")
        require("noise_variance", given, "at least zero, a variance", lambda v: v >= 0)
    options = Options(samples, chunk, batch_size, progress)
    functions = (apply, learnt, given is not None)
    found = run(mean_and_noise, _moments, True, key, q, functions, inputs, options)
    if concrete(found.aleatoric) and np.any(found.aleatoric < 0):
        raise ValueError(
            "predict_regression: a variance of the noise is negative. The second output of apply "
            "is the variance of an observation: of a network that gives its logarithm, return "
            "jnp.exp of it."
        )
    if given is None:
        return found
    noise = noise_like("predict_regression", given, found.epistemic.shape, found.epistemic.dtype)
    return found._replace(aleatoric=noise)


def noise_like(who: str, noise: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return given variances as an array of the shape and dtype of the outputs.

    Raises:
        ValueError: for shapes that do not broadcast to it.
    """
    noise = jnp.asarray(noise, dtype)
    try:
        return jnp.broadcast_to(noise, shape)
    except ValueError:
        raise ValueError(
            f"{who}: noise_variance has the shape {noise.shape}, and the outputs of apply "
            f"{shape}; give one number, or an array that broadcasts to them."
        ) from None


def mean_and_noise(functions: Sequence[Any], weights: PyTree, inputs: tuple) -> tuple[Array, ...]:
    """Return the mean of an observation, and its variance about that, at one sample."""
    apply, learnt, given = functions
    mean, noise = mean_and_variance(apply(weights, *inputs))
    if noise is not None and (learnt or given):
        raise ValueError(
            "predict_regression: apply returns the variance of the noise, and noise_variance= "
            "gives another; leave that out."
        )
    if learnt:
        noise = learnt(weights, *inputs)
    noise = _wide(jnp.asarray(0.0 if noise is None else noise))
    mean = _floating(mean)
    return mean, jnp.broadcast_to(noise, mean.shape)


def mean_and_variance(outputs: PyTree) -> tuple[Array, Array | None]:
    """Return what `apply` says of an observation: its mean and, where it says so, its variance."""
    if isinstance(outputs, Distribution):
        return outputs.mean, outputs.variance
    if isinstance(outputs, Mapping):
        parts = set(outputs)
        if parts == {"mean", "variance"}:
            return outputs["mean"], outputs["variance"]
        if parts == {"mean", "std"}:
            return outputs["mean"], jnp.square(_wide(jnp.asarray(outputs["std"])))
    elif isinstance(outputs, (tuple, list)):
        if len(outputs) == 2:
            return outputs[0], outputs[1]
    else:
        return outputs, None
    found = sorted(outputs) if isinstance(outputs, Mapping) else f"{len(outputs)} outputs"
    raise ValueError(
        f"predict_regression: apply returned {found}; give an array of means, a pair (mean, "
        'variance), a dict of "mean" and "variance" or "std", or a blr_optax.Distribution.'
    )


def _moments(average: Average) -> RegressionPredictive:
    mean, noise = average.mean
    epistemic = average.square / (average.size - 1).astype(average.square.dtype)
    return RegressionPredictive(mean, epistemic, noise)


class Options(NamedTuple):
    """How the samples and the inputs are gone through."""

    samples: int
    chunk: int | None
    batch_size: int | None
    progress: bool


def run(
    statistics: Callable[..., Any],
    finish: Callable[..., Any] | None,
    spread: bool,
    key: KeyLike,
    q: Sampler | Sequence[PyTree],
    functions: tuple,
    inputs: tuple,
    options: Options,
) -> Any:
    """Return what is made of samples of the weights, over batches of the inputs."""
    key = canonical_key(key)
    check_count("samples", options.samples)
    if not callable(functions[0]):
        raise ValueError(
            "apply must be a function apply(weights, *inputs) of the network's outputs; got "
            f"{type(functions[0]).__name__}. The order is (key, q, apply, *inputs)."
        )
    one: Any = q
    if not hasattr(one, "sample") and find_posterior_states(one):
        raise ValueError(
            "q: an optimizer state stands where the posterior belongs; give "
            "posterior(opt_state, params)."
        )
    if isinstance(one, (list, tuple)) and not hasattr(one, "sample"):
        one = ensemble(one)
    _check_sampler(one)
    samples = one.draws(options.samples) if isinstance(one, Ensemble) else options.samples
    chunk = default_chunk(options.chunk)
    if options.progress and options.batch_size is None:
        raise ValueError("progress=True shows batches: give batch_size=, the size of one.")

    programs: dict[Any, Any] = {}

    def whole(*inputs: PyTree) -> Any:
        others, arrays = split(inputs)
        task = Task(statistics, finish, spread, functions, others, samples, chunk)
        return averaged(task, key, one, arrays, programs)

    if options.batch_size is None:
        return whole(*inputs)
    # All samples are kept on the first axis, where there is nothing that finishes their average.
    axis = 0 if finish else 1
    return in_batches(whole, inputs, options.batch_size, options.progress, axis)


def _wide(x: Array) -> Array:
    """Return an array in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _floating(x: ArrayLike) -> Array:
    """Return numbers as floating ones: integers would have no mean."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)


def _check_sampler(q: Any) -> None:
    if not hasattr(q, "sample"):
        raise ValueError(
            "q must have a method sample(key, shape), as posterior(opt_state, params) has; got "
            f"{type(q).__name__}."
        )
    if isinstance(q, Ensemble):
        q = q.members
    if isinstance(q, Distribution) and not holds(q.family.in_domain, q.natural):
        q.sample(0)  # which says what is wrong
