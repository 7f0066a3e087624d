"""The predictive distribution of a regression, as a value: a mixture over weight samples.

    p(y | x, data)  ~=  1/S sum_s p(y | x, theta_s)

`predict_regression` keeps two moments of it; here every p(y | x, theta_s) is kept, so that it has a
density, quantiles and draws, which are not those of a Gaussian with its moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from blr_optax._distribution import Distribution, distribution
from blr_optax._predict import Options, Sampler, mean_and_noise, noise_like, run
from blr_optax._random import canonical_key, leading_shape
from blr_optax._validate import require
from blr_optax.families._numerics.quantiles import quantile

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float

    from blr_optax._typing import KeyLike, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PredictiveMixture:
    """What is to be observed at every input: a mixture with one component per weight sample.

    Attributes:
        components: the observation's distribution given the weights, samples on the leading axis.
    """

    components: Distribution

    @property
    def mean(self) -> Float[Array, "*n"]:
        """Mean of an observation."""
        return jnp.mean(self.components.mean, axis=0)

    @property
    def epistemic(self) -> Float[Array, "*n"]:
        """Variance of the components' means (unbiased)."""
        return jnp.var(self.components.mean, axis=0, ddof=1)

    @property
    def aleatoric(self) -> Float[Array, "*n"]:
        """Mean of the components' variances."""
        return jnp.mean(self.components.variance, axis=0)

    @property
    def variance(self) -> Float[Array, "*n"]:
        """Variance of an observation, ``epistemic + aleatoric``."""
        return self.epistemic + self.aleatoric

    def log_prob(self, targets: Float[ArrayLike, "*n"]) -> Float[Array, "*n"]:
        """Return log( 1/S sum_s p_s(target) ), per example, in nats."""
        found = self.components.log_prob(jnp.asarray(targets))
        return jax.nn.logsumexp(found, axis=0) - jnp.log(found.shape[0])

    def cdf(self, targets: Float[ArrayLike, "*n"]) -> Float[Array, "*n"]:
        """Return 1/S sum_s F_s(target); uniform over right predictions."""
        return jnp.mean(self.components.cdf(jnp.asarray(targets)), axis=0)

    def icdf(self, p: ArrayLike) -> Float[Array, ...]:
        """Return the quantiles at p, a number, or an array whose axes lead."""
        require("icdf: p", p, "in [0, 1], a probability", lambda p: (p >= 0) & (p <= 1))
        like = jax.eval_shape(lambda q: q.mean, self)
        p = jnp.asarray(p, like.dtype)
        support = self.components.family.support_of_marginals

        def at(p: Array) -> Array:
            return quantile(self.cdf, jnp.broadcast_to(p, like.shape), support)

        return jax.vmap(at)(p.ravel()).reshape(p.shape + like.shape)

    def interval(self, level: float = 0.95) -> tuple[Array, Array]:
        """Both ends of the central interval of probability `level`, per example."""
        if not 0 <= level <= 1:
            raise ValueError(f"interval: level={level}; give a fraction, not percent.")
        low, high = self.icdf(jnp.array([0.5 - 0.5 * level, 0.5 + 0.5 * level]))
        return low, high

    def sample(self, key: KeyLike, shape: int | tuple[int, ...] = ()) -> Float[Array, ...]:
        """Draw observations at all inputs together: one draw has one sample of the weights."""
        shape = leading_shape("sample", shape)
        which, noise = jax.random.split(canonical_key(key))
        size = jax.tree.leaves(self.components)[0].shape[0]
        index = jax.random.randint(which, shape, 0, size)

        def one(key: Array, i: Array) -> Array:
            return jax.tree.map(lambda x: x[i], self.components).sample(key)

        for _ in shape:
            one = jax.vmap(one)
        return one(jax.random.split(noise, shape), index)


def predict_distribution(
    key: KeyLike,
    q: Sampler | Sequence[PyTree],
    apply: Callable[..., PyTree],
    *inputs: PyTree,
    noise_variance: Float[ArrayLike, "*#n"] | Callable[..., Float[Array, "*#n"]] | None = None,
    samples: int = 64,
    chunk: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> PredictiveMixture:
    """Distribution of what is to be observed: density, quantiles, intervals, draws.

    1/S sum_s p(y | apply(theta_s, *inputs)).

    Args:
        key: typed key or integer seed. Sample ``s`` uses ``fold_in(key, s)``.
        q: The posterior over weights, or several; as in `predict`.
        apply: ``apply(weights, *inputs)`` returns the distribution of an observation, for any
            likelihood a `blr_optax.Distribution`, and of a Gaussian one what `predict_regression`
            takes: a pair (mean, variance), a dict, or means and `noise_variance`.
        *inputs: Passed on to `apply`.
        noise_variance: Variance of a Gaussian observation given the function; numbers, or a
            function ``noise_variance(weights, *inputs)``.
        samples: Number of weight samples ``S`` (static); all are kept.
        chunk: How many of them are evaluated at once (static); as in `predict`.
        batch_size: Go through the examples in batches; as in `predict`. What is kept of a batch
            are its components.
        progress: Whether to draw a progress bar over the batches.

    Returns:
        A `PredictiveMixture`.

    Raises:
        ValueError: as `predict_regression`, and where nothing says what the noise is.

    >>> import blr_optax as blr
    >>> two = blr.Ensemble(jnp.array([-1.0, 1.0]))  # networks that say -1 and 1, with noise 0.01
    >>> y = blr.predict_distribution(0, two, lambda w: w, noise_variance=0.01)
    >>> print(y.log_prob(1.0).round(3), y.interval(0.9)[1].round(2))  # log( N(0) / 2 / 0.1 )
    0.691 1.13
    """
    learnt = noise_variance if callable(noise_variance) else None
    given = None if learnt else noise_variance
    if given is not None:
        require("noise_variance", given, "positive, a variance", lambda v: v > 0)
    functions = (apply, learnt, given is not None)
    options = Options(samples, chunk, batch_size, progress)
    found = run(_observation, None, False, key, q, functions, inputs, options)
    if given is not None:
        # One noise for all samples and batches, whatever it is broadcast from.
        noise = noise_like("predict_distribution", given, found.shape[1:], found.dtype)
        found = _normal(found, noise)
    return PredictiveMixture(found)


@jax.jit
def _normal(mean: Array, variance: Array) -> Distribution:
    return distribution("normal", mean=mean, variance=jnp.broadcast_to(variance, mean.shape))


def _observation(functions: Sequence[Any], weights: PyTree, inputs: tuple) -> Distribution | Array:
    """Return an observation's distribution at one sample, or its mean where the noise is given."""
    apply, learnt, given = functions
    outputs = apply(weights, *inputs)
    if isinstance(outputs, Distribution):
        if learnt or given:
            raise ValueError(
                "predict_distribution: apply returns a distribution, and noise_variance= gives "
                "another noise; leave that out."
            )
        return outputs
    stated = isinstance(outputs, (dict, tuple, list)) or learnt or given
    if not stated:
        raise ValueError(
            "predict_distribution: apply returns means, and nothing says how an observation "
            "differs from them; give noise_variance=, or return a pair (mean, variance) or a "
            "blr_optax.Distribution."
        )
    mean, noise = mean_and_noise((lambda *_: outputs, learnt, given), weights, inputs)
    mean = mean.astype(noise.dtype)  # float32 or wider
    return mean if given else _normal(mean, noise)
