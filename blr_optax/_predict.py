"""Predictions of a posterior: average over weights, and say how much the weights disagree.

Every prediction is a mean over weight samples ``theta_s ~ q`` of what the network says with them,

    p(y | x, data)  ~=  1/S sum_s p(y | x, theta_s),          theta_s = q.sample(fold_in(key, s)),

accumulated a chunk of samples at a time: memory is that of one chunk's outputs whatever ``S`` is,
and `chunk` changes the result by rounding only. Accumulators are float32 or wider.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from blr_optax import _loops, metrics
from blr_optax._random import canonical_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array, ArrayLike, Float, Key, PyTree

    from blr_optax._typing import AnyArray, KeyLike


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
    return jnp.stack([jax.nn.sigmoid(jnp.negative(logits)), jax.nn.sigmoid(logits)], axis=-1)


def predict(
    key: KeyLike,
    q: Sampler,
    apply: Callable[..., Float[Array, "*n k"]],
    *inputs: PyTree,
    samples: int = 64,
    chunk: int = 8,
    link: Callable[[Array], Float[Array, "*n k"]] = jax.nn.softmax,
) -> Predictive:
    """Class probabilities averaged over weight samples, with their uncertainty split in two.

    ``probabilities = mean_s p_s``, ``total = H(mean_s p_s)``, ``aleatoric = mean_s H(p_s)``,
    ``epistemic = total - aleatoric``, with ``p_s = link(apply(theta_s, *inputs))``.

    Args:
        key: typed key or integer seed. Sample ``s`` uses ``fold_in(key, s)``.
        q: The posterior over weights.
        apply: ``apply(weights, *inputs) -> logits``, classes on the last axis, any axes before it
            (examples, pixels, tokens).
        *inputs: Passed on to `apply`.
        samples: Number of weight samples ``S`` (static).
        chunk: How many of them are evaluated at once (static), lower it to save memory.
        link: From the outputs of `apply` to probabilities over the last axis. For logits without a
            class axis, one per example or per independent label, use `binary_link`; for
            log-probabilities, `jax.numpy.exp`.

    Returns:
        A `Predictive`; score its `probabilities` with `blr_optax.metrics`.

    Raises:
        ValueError: if `key` is not one key or seed, `samples` or `chunk` is below 1, or `link` is
            `jax.nn.sigmoid`, whose values are not a distribution over the last axis.

    Two equally likely weights that are certain and disagree, so all of ``log 2`` is epistemic:

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

    def statistics(weights):
        outputs = apply(weights, *inputs)
        sizes = {jnp.shape(x)[0] for x in jax.tree.leaves(inputs) if jnp.ndim(x)}
        if link is jax.nn.softmax and outputs.ndim == 1 and outputs.shape[0] in sizes:
            raise ValueError(
                f"predict: apply returned shape {outputs.shape}, one number per example and no "
                "class axis to take a softmax over. For one logit per example use "
                "link=binary_link; for a regression use predict_regression."
            )
        probs = link(outputs)
        return probs, metrics.entropy(probs)

    probs, aleatoric = _mean_over_samples(key, q, statistics, samples, chunk)
    return Predictive(probs, *metrics.split_means(probs, aleatoric))


def predict_regression(
    key: KeyLike,
    q: Sampler,
    apply: Callable[..., Float[Array, "*n"]],
    *inputs: PyTree,
    noise_variance: Float[ArrayLike, "*#n"] = 0.0,
    samples: int = 64,
    chunk: int = 8,
) -> RegressionPredictive:
    """Mean and variance of a prediction over weight samples, with the variance of the noise.

    ``mean = mean_s f_s``, ``epistemic = sum_s (f_s - mean)^2 / (S - 1)`` (unbiased) and
    ``aleatoric = noise_variance``, with ``f_s = apply(theta_s, *inputs)``.

    Args:
        key: typed key or integer seed. Sample ``s`` uses ``fold_in(key, s)``.
        q: The posterior over weights.
        apply: ``apply(weights, *inputs) -> outputs``, of any shape.
        *inputs: Passed on to `apply`.
        noise_variance: Variance of an observation given the function, in the squared unit of the
            outputs, broadcast to them.
        samples: Number of weight samples ``S``, at least 2 (static).
        chunk: How many of them are evaluated at once (static).

    Returns:
        A `RegressionPredictive`; score it with `blr_optax.metrics.regression`.

    Raises:
        ValueError: if `key` is not one key or seed, `samples` is below 2 or `chunk` below 1.

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
    key = _one_key(key)
    _check_sampler(q)
    # Squares are taken about one of the samples: about 0, a mean far above the spread would cancel.
    origin = apply(q.sample(jax.random.fold_in(key, 0), ()), *inputs)
    origin = origin.astype(_accumulator(origin))

    def statistics(weights):
        shifted = apply(weights, *inputs) - origin
        return shifted, shifted**2

    shifted, square = _mean_over_samples(key, q, statistics, samples, chunk)
    epistemic = jnp.maximum(square - shifted**2, 0) * (samples / (samples - 1))
    noise = jnp.broadcast_to(jnp.asarray(noise_variance, epistemic.dtype), epistemic.shape)
    return RegressionPredictive(origin + shifted, epistemic, noise)


def _mean_over_samples(
    key: KeyLike, q: Sampler, statistics: Callable[[PyTree], PyTree], samples: int, chunk: int
) -> PyTree:
    """``mean_s statistics(theta_s)``, at most `chunk` samples at a time."""
    key = _one_key(key)
    _check_sampler(q)
    for name, value in (("samples", samples), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name}={value} evaluates nothing; give at least 1.")
    # As many chunks as needed, as equal as possible: 10 samples by 8 are two chunks of 5.
    chunks = -(-samples // chunk)
    index = jnp.arange(chunks * -(-samples // chunks)).reshape(chunks, -1)

    def total(index):
        draw = jax.vmap(lambda s: statistics(q.sample(jax.random.fold_in(key, s), ())))

        def add(x):
            used = (index < samples).reshape(-1, *[1] * (x.ndim - 1))
            return jnp.sum(jnp.where(used, x, 0), axis=0, dtype=_accumulator(x))

        return jax.tree.map(add, draw(index))

    def step(sums, index):
        return jax.tree.map(jnp.add, sums, total(index)), None

    # Zeros like the shapes, as these know how the outputs are sharded.
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(total, index[0]))
    sums, _ = _loops.scan(step, zeros, index)
    return jax.tree.map(lambda x: x / samples, sums)


def _accumulator(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _check_sampler(q: Sampler) -> None:
    if not hasattr(q, "sample"):
        raise ValueError(
            "q must have a method sample(key, shape), as posterior(opt_state, params) has; got "
            f"{type(q).__name__}."
        )


def _one_key(key: KeyLike) -> Array:
    """Return the typed key of a typed key or an integer seed."""
    key = canonical_key(key)
    if key.shape != ():
        raise ValueError(f"key: give one typed key, not an array of shape {key.shape}.")
    return key
