"""BayesBiNN and STE: networks of signs, by the rule for Bernoulli variables.

    lambda  natural parameters, half the logit of +1: the optimizer's params, "latent weights"
    mu      expectation parameters, tanh lambda;        l  mean loss,   N  ess

    e       =  log(u / (1 - u)) / 2,  u uniform         half a logistic number
    w       =  tanh( (lambda + e) / tau )               relaxed signs, at which l is evaluated
    s       =  (1 - w^2 + c) / ( tau (1 - mu^2 + c) )   dw / dmu
    v       <-  b v + (1 - b) ( N s grad l(w) + r (lambda - lambda_0) )
    lambda  <-  lambda - rho v / (1 - b^t)

Meng, Bachmann and Khan (2020), Algorithm 1. As tau -> 0 w is the sign of lambda + e; the delta
method, e = 0 without the entropy (r = 0) and the scale s, is the straight-through estimator.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._distribution import Distribution
from blr_optax._random import (
    canonical_key,
    check_generator,
    standard_logistic,
)
from blr_optax._transformation import transformation
from blr_optax._validate import (
    at,
    check_number,
    check_positive,
    check_unit_interval,
    finite_and_square,
)
from blr_optax.families import MeanField, Rademacher
from blr_optax.rule import PointReader, with_posterior
from blr_optax.rule._natural_step import own_part, spread
from blr_optax.rule._spikes import (
    CLIP_SPIKES,
    SpikesState,
    check_bound,
    first_spikes,
    shorten,
    times,
)
from blr_optax.state import Reader
from blr_optax.state._reader import check_transformation
from blr_optax.state._reading import noise_of

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import (
        KeyLike,
        OptState,
        Params,
        PyTree,
        Scalar,
        ScalarOrSchedule,
        Updates,
    )
    from blr_optax.rule import WithPosteriorState

FAMILY = MeanField(Rademacher())


def _wide(params: Params) -> Any:
    """Return copies in float32 or wider: a posterior outlives donated parameters."""
    return jax.tree.map(lambda m: jnp.array(m, _tree.statistics_dtype(m.dtype)), params)


def one_minus_tanh2(x: Array) -> Array:
    """1 - tanh(x)^2 = 4 t / (1 + t)^2, t = exp(-2 |x|), which never cancels."""
    t = jnp.exp(-2.0 * jnp.abs(x))
    return 4.0 * t / jnp.square(1.0 + t)


class BayesBinnState(NamedTuple):
    """State of BayesBiNN; the posterior's natural parameters are the params themselves.

    Attributes:
        count: steps made, skipped ones too (int32).
        key: typed key, constant.
        reader: static, how weights and their gradients in mu are formed.
        ess: effective sample size of the coming step.
        prior: natural parameters of the prior, a tree like the parameters; () for even odds.
        momentum: average of natural gradients.
        skipped: steps skipped because something was not finite (int32).
        spikes: the gradients' length so far; () without a bound.
    """

    count: Array
    key: Array
    reader: BinaryReader
    ess: Array
    prior: PyTree
    momentum: PyTree
    skipped: Array
    spikes: SpikesState | tuple[()]


@dataclasses.dataclass(frozen=True)
class BinaryReader(Reader):
    """How a `BayesBinnState` is read.

    Attributes:
        temperature: tau of the relaxation.
        floor: c, added to 1 - w^2 and 1 - mu^2.
        generator: of the noise; None evaluates at the mean, w = tanh lambda.
    """

    temperature: float
    floor: float
    generator: str | None

    def part(self, state: BayesBinnState, params: Params) -> PyTree:
        """Return the leaves of params that the state was made for."""
        return _tree.matching_leaves(params, state.momentum.ema, "params")

    def noise(self, state: BayesBinnState, key: Array) -> PyTree:
        """Half of standard logistic numbers."""
        if self.generator is None:
            return None
        drawn = standard_logistic(key, state.momentum.ema, self.generator)
        return jax.tree.map(lambda x: 0.5 * x, drawn)

    def weights(self, state: BayesBinnState, params: Params, noise: PyTree) -> PyTree:
        """tanh((lambda + e) / tau), in the parameters' dtype."""
        if self.generator is None:
            return jax.tree.map(lambda m, x: jnp.tanh(x).astype(m.dtype), params, _wide(params))
        return jax.tree.map(
            lambda m, x, e: jnp.tanh((x + e) / self.temperature).astype(m.dtype),
            params, _wide(params), noise,
        )  # fmt: skip

    def statistic(
        self, state: BayesBinnState, params: Params, weights: PyTree, grads: Updates, noise: PyTree
    ) -> PyTree:
        """s grad l(w), the gradient in mu per example.

        From the noise, not from w: signs are rounded to 1 where 1 - w^2 still counts.
        """
        if self.generator is None:
            return _wide(grads)

        def leaf(x: Array, e: Array, g: Array) -> Array:
            relaxed = one_minus_tanh2((x + e) / self.temperature) + self.floor
            flat = one_minus_tanh2(x) + self.floor
            # Without a floor a sign may be certain to its last digit: both vanish, and so does s.
            return relaxed / (self.temperature * jnp.where(flat > 0, flat, 1.0)) * g

        return jax.tree.map(leaf, _wide(params), noise, _wide(grads))

    def variance(self, state: OptState, params: Params, q: Distribution) -> PyTree:
        """None: params are natural parameters, not the signs that are drawn."""
        return None

    def posterior(self, state: OptState, params: Params) -> Distribution:
        """Independent signs of natural parameters lambda = params."""
        return Distribution(FAMILY, FAMILY.Natural(_wide(params)))


def random_signs(key: Array, params: Params, scale: float = 10.0) -> PyTree:
    """First natural parameters for `bayesbinn`: +scale or -scale, evenly, for every parameter.

    A sign of scale 10 is as good as certain; near 0 every step would see another network.

    Args:
        key: typed key or integer seed.
        params: a tree of arrays (of a full-precision network) whose shapes and dtypes to follow.
        scale: |lambda|, positive.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> print(abs(blr.random_signs(jax.random.key(0), jnp.zeros(3), 10.0)))
      [10. 10. 10.]
    """
    key = canonical_key(key)
    check_number("scale", scale)
    _tree.check_float_leaves(params, "random_signs")

    def leaf(path: Any, x: Array) -> Array:
        draw = jax.random.rademacher(jax.random.fold_in(key, _tree.path_hash(path)), x.shape)
        return (scale * draw).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)


def _prior_signs(prior: Distribution | None, params: Params) -> Any:
    """lambda_0 as a tree like params; () for None, which is zero."""
    if prior is None:
        return ()
    prior = own_part(spread(prior, FAMILY, params), FAMILY)
    if not isinstance(prior, Distribution) or prior.family != FAMILY:
        found = prior.family if isinstance(prior, Distribution) else type(prior).__name__
        raise ValueError(
            f"prior must be a mean-field Distribution of rademacher signs, such as the posterior "
            f"of an earlier bayesbinn; got {found}."
        )
    found = _tree.matching_leaves(prior.natural.linear, params, "prior")
    return jax.tree.map(lambda m, x: x.astype(_tree.statistics_dtype(m.dtype)), params, found)


def bayesbinn(
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule,
    temperature: float = 1.0,
    b1: Scalar = 0.0,
    kl_weight: Scalar = 1.0,
    floor: float = 1e-10,
    prior: Distribution | None = None,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str | None = "hash",
) -> optax.GradientTransformationExtraArgs:
    """BayesBiNN: a posterior over networks whose weights are signs.

    w = tanh((lambda + e) / tau),  s = (1 - w^2 + c) / (tau (1 - mu^2 + c));
    v <- b v + (1 - b)(N s grad l(w) + r (lambda - lambda_0));
    lambda <- lambda - rho v / (1 - b^t).

    The params are the natural parameters lambda (start from `random_signs`). Take the gradient at
    `sample(opt_state, params)`, or both from `estimate`, whose `statistic` is here the gradient in
    mu. Predict with `posterior(opt_state, params)`: its samples are networks of signs, its `mean`
    is tanh lambda, and the sign of that the most likely network.

    Args:
        learning_rate: rho, a number or schedule; small where floor is what keeps s finite.
        ess: N, effective sample size; may be a schedule.
        temperature: tau of the relaxation. At the authors' 1e-10 w is a sign, and s is all floor:
            c / (tau (1 - mu^2 + c)).
        b1: decay of the average of natural gradients, debiased; 0 for none.
        kl_weight: r, the weight of the divergence from the prior.
        floor: c, in both places. 1e-10 is the authors'; it bounds s where lambda is large.
        prior: a mean-field posterior of signs, of an earlier task; None is even odds, lambda_0 = 0.
        clip_spikes: the longest gradient in units of those before it, against bad batches; see
            `scale_by_precision`. None for no bound.
        key: typed key or integer seed.
        generator: "hash" (fast) or "jax", of the weights' noise; None evaluates at the mean,
            w = tanh lambda, with s = 1.

    Raises:
        ValueError: for arguments out of range, a prior of another family or tree structure, integer
            parameters, missing params.

    Source: Meng, Bachmann and Khan (2020), "Training Binary Neural Networks using the Bayesian
    Learning Rule", Algorithm 1. Special case of `blr_update` with family "rademacher" and
    `estimator=concrete(temperature)`, when b1 = 0 and floor = 0.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> x = jnp.array([[1.0, 1.0], [1.0, -1.0]])
      >>> loss = lambda w: jnp.mean((x @ w - x @ jnp.array([1.0, -1.0])) ** 2)
      >>> tx, params = blr.bayesbinn(0.05, ess=2.0), jnp.zeros(2)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(loss)(blr.sample(state, params))
      ...     updates, state = tx.update(grads, state, params)
      ...     return params + updates, state
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> print(jnp.sign(params))
      [ 1. -1.]
    """
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_positive("ess", ess, scalar=True)
    check_unit_interval("b1", b1)
    check_positive("kl_weight", kl_weight, zero=True, scalar=True)
    for name, number in (("temperature", temperature), ("floor", floor)):
        if not isinstance(number, (int, float)) or not 0 <= number < float("inf"):
            raise ValueError(
                f"{name}={number!r} must be a plain finite number, not negative; with "
                f'inject_hyperparams name it in static_args=("temperature", "floor").'
            )
    if temperature == 0:
        raise ValueError("temperature=0 has no gradient; use `ste`, or a small one such as 1e-10.")
    if generator is not None:
        check_generator(generator)
    check_bound(clip_spikes)
    reader = BinaryReader(float(temperature), float(floor), generator)
    average = optax.ema(b1, debias=True)

    def init_fn(params: Params) -> BayesBinnState:
        _tree.check_float_leaves(params, "bayesbinn")
        zeros = jax.tree.map(
            lambda m: jnp.zeros_like(m, dtype=_tree.statistics_dtype(m.dtype)), params
        )
        return BayesBinnState(
            count=jnp.zeros((), jnp.int32),
            key=canonical_key(key),
            reader=reader,
            ess=jnp.array(at(ess, 0), jnp.result_type(float)),
            prior=_prior_signs(prior, params),
            momentum=average.init(zeros),
            skipped=jnp.zeros((), jnp.int32),
            spikes=first_spikes(clip_spikes),
        )

    def update_fn(
        updates: Updates,
        state: BayesBinnState,
        params: Params = None,
        *,
        statistic: Any = None,
        **extra: Any,
    ) -> tuple[Any, BayesBinnState]:
        if params is None:
            raise ValueError("bayesbinn: update needs params, update(grads, state, params).")
        like = state.momentum.ema
        grads = _tree.matching_leaves(updates, like, "grads")
        if statistic is None:
            statistic = state.reader.statistic(state, params, None, grads, noise_of(state))
        statistic = _tree.matching_leaves(statistic, like, "statistic")
        in_mu, grads = (optax.tree.cast_like(x, like) for x in (statistic, grads))
        finite, square = finite_and_square(grads, in_mu)
        factor, spikes = shorten(state.spikes, clip_spikes, square, finite)
        in_mu = times(factor, in_mu)
        prior_ = state.prior if jax.tree.leaves(state.prior) else jax.tree.map(lambda _: 0.0, like)

        def natural_gradient(g: Array, x: Array, x0: Any) -> Array:
            total = state.ess.astype(g.dtype) * jnp.where(finite, g, 0)
            return total + jnp.asarray(at(kl_weight, state.count), g.dtype) * (x - x0)

        gradient = jax.tree.map(natural_gradient, in_mu, _wide(params), prior_)
        averaged, momentum = average.update(gradient, state.momentum, params)
        out = jax.tree.map(lambda m, v: jnp.where(finite, v, 0).astype(m.dtype), params, averaged)
        count = optax.safe_increment(state.count)
        return out, state._replace(
            count=count,
            ess=jnp.array(at(ess, count), state.ess.dtype),
            momentum=momentum,
            skipped=state.skipped + (~finite).astype(jnp.int32),
            spikes=spikes,
        )

    return optax.chain(
        transformation(init_fn, update_fn),
        optax.scale_by_learning_rate(learning_rate),
    )


class SignReader(PointReader):
    """The delta method for signs: the loss is evaluated at the most likely network."""

    who = "ste"

    def weights(self, state: WithPosteriorState, params: Params, noise: PyTree) -> PyTree:
        """Return the sign of the latent weights, +1 at zero."""
        return jax.tree.map(lambda m: jnp.where(m < 0, -1, 1).astype(m.dtype), params)

    def variance(self, state: OptState, params: Params, q: Distribution) -> PyTree:
        """None: params are natural parameters, not the signs that are drawn."""
        return None

    def posterior(self, state: WithPosteriorState, params: Params) -> Distribution:
        """Independent signs of natural parameters lambda = params."""
        return Distribution(FAMILY, FAMILY.Natural(_wide(params)))


def _keep_within(radius: float) -> optax.GradientTransformation:
    """Shortens updates so that the parameters stay in [-radius, radius]."""

    def update(updates: Updates, params: Params) -> Any:
        if params is None:
            raise ValueError("ste: update needs params, update(grads, state, params).")

        def leaf(u: Array, m: Array) -> Array:
            return (jnp.clip(m + u.astype(m.dtype), -radius, radius) - m).astype(u.dtype)

        return jax.tree.map(leaf, updates, params)

    return optax.stateless(update)


def ste(
    learning_rate: ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip: float | None = 1.0,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """STE, the straight-through estimator: networks of signs, trained by latent weights.

    w = sign(lambda);  lambda <- clip( lambda - lr adam(grad l(w)), -1, 1 ).

    The params are the latent weights. Take the gradient at `sample(opt_state, params)`, the signs.

    Args:
        learning_rate: lr of Adam, a number or schedule; not used with `inner`.
        b1, b2, eps: of Adam.
        clip: bound on the latent weights; None for none.
        inner: an optax optimizer in Adam's place.

    Raises:
        ValueError: for arguments out of range or integer parameters.

    Source: Courbariaux et al. (2016); Khan and Rue (2023), Sec. 4.5. Special case of `blr_update`
    with family "rademacher" and the delta method at the most likely signs, without the entropy
    (which would let lambda decay), when `inner=optax.sgd(...)` and clip=None. The scale of the
    latent weights is then free, and with it that of the posterior, whose lambda they are.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> tx, params = blr.ste(0.1), jnp.array([0.3, -0.02])
      >>> state = tx.init(params)
      >>> print(blr.sample(state, params))
      [ 1. -1.]
      >>> grads = jax.grad(lambda w: jnp.sum((w - 1.0) ** 2))(blr.sample(state, params))
      >>> updates, state = tx.update(grads, state, params)
      >>> print(blr.sample(state, params + updates))
      [1. 1.]
    """
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_unit_interval("b1", b1)
    check_unit_interval("b2", b2)
    check_positive("eps", eps, zero=True)
    if clip is not None:
        check_positive("clip", clip)
    if inner is not None:
        check_transformation("ste", inner)
    parts = [optax.adam(learning_rate, b1, b2, eps) if inner is None else inner]
    if clip is not None:
        parts.append(_keep_within(clip))
    return with_posterior(optax.chain(*parts), SignReader())
