"""A mixture of IVONs: K diagonal Gaussians over the weights of one network, which share them out.

    q(theta) = sum_k pi_k q_k(theta),   q_k = N(m_k, 1 / S_k),   S_k = ess p_k
    theta_k  ~  q_k                                    one draw of every component
    r_j(theta)  =  pi_j q_j(theta) / q(theta)          responsibility of component j

Every component runs IVON on the mean loss l plus what the others add to its entropy term,

    l_k(theta)  =  l(theta) + log( q(theta) / q_k(theta) ) / ess

so with one component, or far from the others (r_k = 1), it is IVON. With the slope of q_j against
q_k, a_j = S_k (theta - m_k) - S_j (theta - m_j), what is added to gradient and curvature is

    grad log(q / q_k)  =  sum_j r_j a_j
    diag hess log(q / q_k)  =  sum_j r_j (S_k - S_j) + sum_j r_j (a_j - sum_i r_i a_i)^2

and log(pi_k / pi_K) <- log(pi_k / pi_K) - rho (f_k - f_K),  f_k = E_k[ess l - log prior + log q].

These are the natural gradients of the joint q(k, theta): Lin, Khan and Schmidt (2019), with
E_k[grad log q_k] = 0 and E_k[diag hess log q_k] = -S_k taken out as control variates; each
precision moves as in Shen et al. (2024), Algorithm 1.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._decay import masked
from blr_optax._distribution import Distribution
from blr_optax._transformation import transformation
from blr_optax._validate import at, check_positive, check_unit_interval, is_schedule, is_zero
from blr_optax.families import GaussianNatural, MeanField, Normal, Raveled, SideBySide, get
from blr_optax.optimizers._first_weights import (
    GivenRun,
    RelativeNoise,
    RelativePrior,
    from_first_weights,
    of_run,
    prior_of,
)
from blr_optax.optimizers.ivon import steps_after
from blr_optax.rule import ScaleByPrecisionState, scale_by_precision
from blr_optax.rule._precision import prior_of_step
from blr_optax.rule._spikes import CLIP_SPIKES
from blr_optax.state._reader import OuterReader
from blr_optax.state._reading import noise_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array

    from blr_optax._typing import (
        Hyperparameter,
        KeyLike,
        Params,
        PyTree,
        Scalar,
        ScalarOrSchedule,
        Updates,
    )


class MixtureIvonState(NamedTuple):
    """State of `mixture_ivon`'s precision: that of its Gaussians, and the mixing weights.

    Attributes:
        reader: static, how samples, curvature and the posterior are read.
        gaussians: state of `scale_by_precision` over the stacked parameters.
        log_odds: log(pi_k / pi_K) for k < K.
    """

    reader: MixtureReader
    gaussians: ScaleByPrecisionState
    log_odds: Array


@dataclasses.dataclass(frozen=True)
class MixtureReader(OuterReader):
    """Samples and curvatures are those of the K Gaussians; the posterior is their mixture.

    Attributes:
        aux_argument: "losses" where the mixing weights learn from these.
    """

    inside = "gaussians"
    aux_argument: str | None = None

    def variance(self, state: MixtureIvonState, params: Params, q: Distribution) -> PyTree:
        """Of the components, which stand side by side in params."""
        del q
        family = MeanField(Normal())
        return family.variance(state.gaussians.reader.posterior(state.gaussians, params).natural)

    def posterior(self, state: MixtureIvonState, params: Params) -> Distribution:
        """sum_k pi_k N(params[k], 1 / (ess p[k])), over the weights of one network."""
        each = state.gaussians.reader.posterior(state.gaussians, params)
        if not jax.tree.leaves(params):  # a group of optax.partition that matches none
            return each
        stacked = each.natural
        family = Raveled.like(get("mixture", family="normal"), jax.tree.map(lambda m: m[0], params))
        components = GaussianNatural(*map(family.ravel, stacked))
        return Distribution(family, family.Natural(components, jnp.copy(state.log_odds)))


def components_of(params: Params) -> int:
    """K, the leading axis that all leaves of the stacked parameters share.

    Raises:
        ValueError: when they do not.
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if len(sizes) > 1 or () in sizes:
        raise ValueError(
            "mixture_ivon: every leaf of params needs the same leading axis of components, found "
            f"{sorted(sizes)}. Stack the members: jax.vmap(model.init)(keys), or "
            "jax.tree.map(lambda *x: jnp.stack(x), *members)."
        )
    return next(iter(sizes))[0] if sizes else 1  # optax's placeholder has no leaves


def log_weights(log_odds: Array) -> Array:
    """log pi_k from log(pi_k / pi_K)."""
    return jax.nn.log_softmax(jnp.append(log_odds, jnp.zeros((), log_odds.dtype)))


def repulsion(
    theta: PyTree, mean: PyTree, precision: PyTree, log_pi: Array
) -> tuple[Array, PyTree, PyTree]:
    """log(q / q_k) at theta_k for every component k, its gradient and its Hessian's diagonal.

    Args:
        theta: one draw of every component, a tree of leaves [K, ...].
        mean: m, a tree like theta.
        precision: total precisions S, a tree like theta.
        log_pi: log mixing weights [K].

    Returns:
        (values [K], gradients, curvatures), trees like theta.

    Example:
      >>> import jax.numpy as jnp
      >>> from blr_optax.optimizers.mixture_ivon import repulsion
      >>> one = jnp.ones((2, 1))
      >>> value, gradient, curvature = repulsion(
      ...     one * 0, jnp.array([[-1.0], [1.0]]), one, jnp.zeros(2)
      ... )
      >>> print(gradient[:, 0], curvature[:, 0])  # halfway, both are drawn back to their means
      [ 1. -1.] [1. 1.]
    """
    leaves, treedef = jax.tree.flatten(theta)
    leaves = list(zip(leaves, jax.tree.leaves(mean), jax.tree.leaves(precision), strict=True))
    # One component at a time: all pairs at once would be K times the memory of the state.

    def at_component(k: Array) -> tuple:
        log_ratio, slopes, curvatures = log_pi, [], []  # of pi_j q_j against q_k, for all j
        for x, m, s in leaves:
            offset = x[k] - m
            descent = s * offset  # -grad log q_j
            # Summed as differences, which are small for near components.
            terms = jnp.log(s) - jnp.log(s[k]) - descent * offset + descent[k] * offset[k]
            log_ratio += 0.5 * jnp.sum(terms.reshape(len(s), -1), axis=1)
            slopes.append(descent[k] - descent)
            curvatures.append(s[k] - s)
        responsibilities = jax.nn.softmax(log_ratio)

        def average(x: Array) -> Array:
            r = responsibilities.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
            return jnp.sum(r * x, axis=0)

        gradient = [average(a) for a in slopes]
        curvature = [
            average(h) + average((a - g) ** 2)
            for h, a, g in zip(curvatures, slopes, gradient, strict=True)
        ]
        value = jax.nn.logsumexp(log_ratio)
        return value, treedef.unflatten(gradient), treedef.unflatten(curvature)

    return jax.lax.map(at_component, jnp.arange(len(log_pi)))


def _expected_cost(state: ScaleByPrecisionState, mean: Any, d0: Any) -> Array:
    """E_k[-log prior + log q_k] of every component, up to a constant."""
    ess = state.ess
    linear = state.prior.linear if state.prior else jax.tree.map(jnp.zeros_like, mean)

    def leaf(m: Array, p: Array, d: Any, b: Array) -> Array:
        total = ess.astype(p.dtype) * p
        prior = 0.5 * jnp.asarray(d, p.dtype) * ess.astype(p.dtype) * (m * m + 1 / total) - b * m
        return jnp.sum((prior + 0.5 * jnp.log(total)).reshape(len(m), -1), axis=1)

    return sum(jax.tree.leaves(jax.tree.map(leaf, mean, state.precision, d0, linear)))


def _for_all_components(prior: Distribution | None) -> Any:
    """Return the prior of one network, repeated for every component of the parameters."""

    def repeated(params: Params) -> Distribution:
        count = components_of(params)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), prior)

    # What is of one number holds for every component as it is.
    return (
        repeated if isinstance(getattr(prior, "family", None), (MeanField, SideBySide)) else prior
    )


def _scale_by_mixture(
    ess: ScalarOrSchedule,
    weight_decay: Hyperparameter,
    prior: Distribution | None,
    strength: ScalarOrSchedule,
    weight_rate: ScalarOrSchedule,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_precision` over stacked parameters, given the corrected gradient and curvature."""
    inner: Any = scale_by_precision(
        ess=ess, weight_decay=weight_decay, prior=_for_all_components(prior), **options
    )
    # A rate of zero may come as an array, from inject_hyperparams; then the losses decide.
    learns = is_schedule(weight_rate) or (
        isinstance(weight_rate, (int, float)) and not is_zero(weight_rate)
    )
    reader = MixtureReader(aux_argument="losses" if learns else None)

    def init_fn(params: Params) -> MixtureIvonState:
        count = components_of(params)
        gaussians = inner.init(params)
        dtypes = [x.dtype for x in jax.tree.leaves(gaussians.precision)]
        log_odds = jnp.zeros(count - 1, jnp.result_type(jnp.float32, *dtypes))
        return MixtureIvonState(reader, gaussians, log_odds)

    def update_fn(
        updates: Updates,
        state: MixtureIvonState,
        params: Params = None,
        *,
        statistic: Any = None,
        losses: Any = None,
        **extra: Any,
    ) -> tuple[Any, MixtureIvonState]:
        if params is None:
            raise ValueError("mixture_ivon: update needs params, update(grads, state, params).")
        members = state.log_odds.shape[0] + 1
        if losses is None and learns:
            raise ValueError(
                "mixture_ivon: weight_rate needs the mean loss of every component: "
                "update(..., losses=losses), which estimate returns as aux of a loss that returns "
                "(sum, losses)."
            )
        if losses is not None and jnp.shape(losses) != (members,):
            raise ValueError(
                f"mixture_ivon: losses has shape {jnp.shape(losses)}; give the mean loss of each "
                f"of the {members} components, shape ({members},)."
            )
        gaussians, log_odds = state.gaussians, state.log_odds
        p = gaussians.precision

        def wide(tree: Any, name: str) -> Any:
            return optax.tree.cast_like(_tree.matching_leaves(tree, p, name), p)

        weights = reader.weights(state, reader.part(state, params), noise_of(state))
        if statistic is None:
            statistic = reader.curvature(state, params, weights, updates)
        theta, mean = wide(weights, "weights"), wide(params, "params")
        # Of the draws as they are: in weights below float32 they may be wider than q.
        drawn = gaussians.reader.drawn_precision(gaussians, reader.part(state, params))
        log_ratio, ratio_gradient, ratio_curvature = repulsion(
            theta, mean, drawn, log_weights(log_odds)
        )
        per_example = at(strength, gaussians.count) / gaussians.ess

        def add(x: Array, more: Array) -> Array:
            return x + jnp.asarray(per_example, x.dtype) * more

        out, after = inner.update(
            jax.tree.map(add, wide(updates, "grads"), ratio_gradient),
            gaussians,
            params,
            statistic=jax.tree.map(add, wide(statistic, "statistic"), ratio_curvature),
            **extra,
        )
        if losses is not None and not is_zero(weight_rate):
            d0 = prior_of_step(gaussians, params, weight_decay)
            cost = gaussians.ess * jnp.asarray(losses) + at(strength, gaussians.count) * log_ratio
            cost = cost + _expected_cost(gaussians, mean, d0)
            step = at(weight_rate, gaussians.count) * (cost[:-1] - cost[-1]).astype(log_odds.dtype)
            moves = (after.skipped == gaussians.skipped) & jnp.all(jnp.isfinite(step))
            log_odds = jnp.where(moves, log_odds - step, log_odds).astype(log_odds.dtype)
        return out, MixtureIvonState(reader, after, log_odds)

    return transformation(init_fn, update_fn)


def mixture_ivon(
    learning_rate: ScalarOrSchedule | None = None,
    *,
    ess: ScalarOrSchedule,
    num_steps: int | None = None,
    weight_rate: ScalarOrSchedule = 0.0,
    repulsion: ScalarOrSchedule = 1.0,
    hess_init: Hyperparameter | RelativeNoise = None,
    b1: Scalar = 0.9,
    b2: Scalar | None = None,
    weight_decay: Hyperparameter = None,
    prior_precision: Hyperparameter = None,
    mask: PyTree | Callable[[Params], PyTree] = None,
    clip_radius: Hyperparameter = None,
    clip_step: Scalar | None = None,
    rescale_lr: bool = True,
    debias: bool = True,
    prior: Distribution | RelativePrior | None = None,
    clip_spikes: Scalar | None = CLIP_SPIKES,
    key: KeyLike = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """Return a mixture of IVONs over one network, whose components repel each other.

    g_k <- grad l(theta_k) + grad log(q / q_k)(theta_k) / ess;
    c_k <- c_k + diag hess log(q / q_k)(theta_k) / ess;  then IVON for every k.

    The parameters are K networks stacked on a leading axis of every leaf
    (`jax.vmap(model.init)(keys)`); `sample` returns one draw of every component, stacked. The
    gradient is that of the *sum* over components of their mean losses,

        loss = lambda theta, *batch: jnp.sum(jax.vmap(lambda w: mean_loss(w, *batch))(theta))

    for `jax.grad` and `estimate` alike (a mean over components would be K times too small).
    `posterior` is the mixture over the weights of one network, for `predict`. Responsibilities are
    those of all leaves together: in a network they are 0 or 1 unless components nearly coincide, so
    start from different initialisations, and expect the repulsion to act where they meet.

    Args:
        learning_rate, num_steps, hess_init, b1, b2: as in `ivon`, over the stacked parameters.
        clip_radius, clip_step: as in `ivon`.
        weight_decay, prior_precision, mask: as in `ivon`.
        rescale_lr, debias, clip_spikes, key, generator: as in `ivon`.
        ess: effective sample size, as in `ivon`; may be a schedule.
        weight_rate: rho of the mixing weights, a number or schedule; 0 keeps them equal. Above 0,
            `update` needs `losses=`, the mean loss of every component, [K]: `est.aux` of a loss
            that returns (sum, losses), with `has_aux=True`. Costs are of size ess times a loss.
        repulsion: multiplies log(q / q_k), a number or schedule: 0 is K independent IVONs, an
            ensemble; 1 is the mixture.
        prior: a mean-field Gaussian posterior over the weights of one network, or one of one
            number; the same for every component. Or `relative_prior(3.2)`.

    Raises:
        ValueError: as `ivon`; for leaves without a common leading axis; for missing losses.

    Source: Lin, Khan and Schmidt (2019), with the step of Shen et al. (2024), Algorithm 1. Special
    case of `blr_update` with family "mixture" of "normal" components, `monte_carlo(1)` and
    `step="improved"`, up to the control variates, when b1 = 0, learning_rate = 1 - b2,
    rescale_lr=False.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> wells = lambda w: jnp.sum((w**2 - 4.0) ** 2)
      >>> params, tx = jnp.array([[-0.5], [0.5]]), blr.mixture_ivon(0.01, ess=100.0, b2=0.99)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(lambda w: jnp.sum(jax.vmap(wells)(w)))(blr.sample(state, params))
      ...     updates, state = tx.update(grads, state, params)
      ...     return params + updates, state
      >>> for _ in range(300):
      ...     params, state = step(params, state)
      >>> print(params[:, 0].round(1), blr.posterior(state, params).mean.round(1))
      [-2.  2.] [0.]
    """
    check_positive("weight_rate", weight_rate, zero=True, scalar=True)
    check_positive("repulsion", repulsion, zero=True, scalar=True)
    check_unit_interval("b1", b1)
    run = of_run(
        "mixture_ivon",
        num_steps,
        GivenRun(learning_rate, b2, hess_init, prior, clip_step),
        GivenRun(None, 0.99999, 1.0, None, None),
        has_prior=weight_decay is not None or prior_precision is not None,
    )
    chosen = prior_of("mixture_ivon", run.prior, weight_decay, prior_precision, ess)

    def make(hess_init: PyTree, decay: PyTree) -> optax.GradientTransformationExtraArgs:
        return steps_after(
            _scale_by_mixture(
                ess,
                masked(decay, mask),
                chosen.density,
                repulsion,
                weight_rate,
                b2=run.b2,
                hess_init=hess_init,
                momentum=optax.ema(b1, debias=debias),
                clip_spikes=clip_spikes,
                generator=generator,
                key=key,
            ),
            run.learning_rate,
            hess_init,
            masked(decay, mask),
            ess=ess,
            clip_radius=clip_radius,
            clip_step=run.clip_step,
            rescale_lr=rescale_lr,
        )

    return from_first_weights(
        make, run.noise, chosen.strength, ess, (1.0, 1.0), mask=mask, leading=1
    )
