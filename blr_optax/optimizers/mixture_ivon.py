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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._distribution import Posterior
from blr_optax._random import step_key
from blr_optax._validate import at, check_positive, check_unit_interval, is_zero
from blr_optax.families import GaussianNatural, MeanField, Raveled, SideBySide, get
from blr_optax.optimizers.ivon import WEIGHT_DECAY, steps_after
from blr_optax.rule import scale_by_precision
from blr_optax.rule._precision import PrecisionRule, ScaleByPrecisionState, prior_precision

if TYPE_CHECKING:
    from jaxtyping import Array


class MixtureIvonState(NamedTuple):
    """State of `mixture_ivon`'s precision: that of `scale_by_precision`, and the mixing weights.

    Attributes:
        count, key, rule, precision, ess, prior, momentum, skipped: as in `scale_by_precision`,
            over the stacked parameters.
        log_odds: log(pi_k / pi_K) for k < K.
    """

    count: Array
    key: Array
    rule: MixtureRule
    precision: Any
    ess: Array
    prior: Any
    momentum: Any
    skipped: Array
    log_odds: Array


class MixtureRule(PrecisionRule):
    """Samples and curvatures of K stacked Gaussians; the posterior is their mixture."""

    def posterior(self, state: MixtureIvonState, params: Any) -> Posterior:
        """sum_k pi_k N(params[k], 1 / (ess p[k])), over the weights of one network."""
        stacked = super().posterior(state, params).natural
        family = Raveled.like(get("mixture", family="normal"), jax.tree.map(lambda m: m[0], params))
        components = GaussianNatural(*map(family.ravel, stacked))
        return Posterior(family, family.Natural(components, jnp.copy(state.log_odds)))


def components_of(params: Any) -> int:
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


def repulsion(theta: Any, mean: Any, precision: Any, log_pi: Array) -> tuple[Array, Any, Any]:
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
      >>> value, slope, bend = repulsion(one * 0, jnp.array([[-1.0], [1.0]]), one, jnp.zeros(2))
      >>> print(slope[:, 0], bend[:, 0])  # halfway, both are drawn back to where they come from
      [ 1. -1.] [1. 1.]
    """
    leaves, treedef = jax.tree.flatten(theta)
    leaves = list(zip(leaves, jax.tree.leaves(mean), jax.tree.leaves(precision), strict=True))
    # One component at a time: all pairs at once would be K times the memory of the state.

    def at_component(k: Array) -> tuple:
        ratio, slopes, falls = log_pi, [], []
        for x, m, s in leaves:
            away = x[k] - m
            pull = s * away
            ratio += 0.5 * jnp.sum(
                (jnp.log(s) - jnp.log(s[k]) - pull * away + pull[k] * away[k]).reshape(len(s), -1),
                axis=1,
            )  # log pi_j q_j / q_k, summed as differences, which are small for near components
            slopes.append(pull[k] - pull)
            falls.append(s[k] - s)
        share = jax.nn.softmax(ratio)

        def average(a: Array) -> Array:
            return jnp.sum(share.reshape(-1, *[1] * (a.ndim - 1)).astype(a.dtype) * a, axis=0)

        slope = [average(a) for a in slopes]
        bend = [
            average(f) + average((a - g) ** 2) for a, f, g in zip(slopes, falls, slope, strict=True)
        ]
        return jax.nn.logsumexp(ratio), treedef.unflatten(slope), treedef.unflatten(bend)

    return jax.lax.map(at_component, jnp.arange(len(log_pi)))


def _expected_cost(state: MixtureIvonState, mean: Any, d0: Any) -> Array:
    """E_k[-log prior + log q_k] of every component, up to a constant."""
    ess = state.ess
    linear = state.prior.linear if state.prior else jax.tree.map(jnp.zeros_like, mean)

    def leaf(m: Array, p: Array, d: Any, b: Array) -> Array:
        total = ess.astype(p.dtype) * p
        prior = 0.5 * jnp.asarray(d, p.dtype) * ess.astype(p.dtype) * (m * m + 1 / total) - b * m
        return jnp.sum((prior + 0.5 * jnp.log(total)).reshape(len(m), -1), axis=1)

    return sum(jax.tree.leaves(jax.tree.map(leaf, mean, state.precision, d0, linear)))


def _scale_by_mixture(
    ess: Any, weight_decay: Any, prior: Posterior | None, strength: Any, weight_rate: Any,
    **fixed: Any,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """`scale_by_precision` over stacked parameters, given the corrected gradient and curvature."""

    def inner(prior: Posterior | None) -> optax.GradientTransformationExtraArgs:
        return scale_by_precision(ess, weight_decay=weight_decay, prior=prior, **fixed)

    plain = inner(None)

    # A rate of zero may come as an array, from inject_hyperparams; then the losses decide.
    learns = callable(weight_rate) or (
        isinstance(weight_rate, (int, float)) and not is_zero(weight_rate)
    )

    def init_fn(params: Any) -> MixtureIvonState:
        count = components_of(params)
        given = prior
        if isinstance(getattr(prior, "family", None), (MeanField, SideBySide)):  # of one network
            given = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), prior)
        state = inner(given).init(params)
        dtypes = [x.dtype for x in jax.tree.leaves(state.precision)]
        return MixtureIvonState(
            *state._replace(rule=MixtureRule(state.rule.kind, state.rule.generator)),
            log_odds=jnp.zeros(count - 1, jnp.result_type(jnp.float32, *dtypes)),
        )

    def update_fn(
        updates: Any,
        state: MixtureIvonState,
        params: Any = None,
        *,
        curvature: Any = None,
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
        rule, p = state.rule, state.precision

        def widen(tree: Any, name: str) -> Any:
            found = _tree.matching_leaves(tree, p, name)
            return jax.tree.map(lambda p, x: x.astype(p.dtype), p, found)

        weights = rule.weights(
            state, rule.part(state, params), rule.noise(state, step_key(state.key, state.count))
        )
        grads, theta, mean = widen(updates, "grads"), widen(weights, "weights"), widen(params, "m")
        found = (
            rule.curvature(state, params, weights, updates)
            if curvature is None
            else widen(curvature, "curvature")
        )
        total = jax.tree.map(lambda p: state.ess.astype(p.dtype) * p, p)
        log_pi = log_weights(state.log_odds)
        apart, slope, bend = repulsion(theta, mean, total, log_pi)
        share = at(strength, state.count) / state.ess

        def add(x: Array, more: Array) -> Array:
            return x + jnp.asarray(share, x.dtype) * more

        out, new = plain.update(
            jax.tree.map(add, grads, slope),
            ScaleByPrecisionState(*state[:-1]),
            params,
            curvature=jax.tree.map(add, found, bend),
            **extra,
        )
        log_odds = state.log_odds
        if losses is not None and not is_zero(weight_rate):
            d0 = prior_precision(weight_decay, state.prior, state.ess, p, state.count)
            apart = at(strength, state.count) * apart
            cost = state.ess * jnp.asarray(losses) + apart + _expected_cost(state, mean, d0)
            step = at(weight_rate, state.count) * (cost[:-1] - cost[-1]).astype(log_odds.dtype)
            moves = (new.skipped == state.skipped) & jnp.all(jnp.isfinite(step))
            log_odds = jnp.where(moves, log_odds - step, log_odds).astype(log_odds.dtype)
        return out, MixtureIvonState(*new, log_odds=log_odds)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mixture_ivon(
    learning_rate: float | Array | Callable,
    ess: float | Array | Callable,
    *,
    weight_rate: float | Array | Callable = 0.0,
    repulsion: float | Array | Callable = 1.0,
    hess_init: Any = 1.0,
    b1: Any = 0.9,
    b2: Any = 0.99999,
    weight_decay: Any = None,
    clip_radius: Any = None,
    rescale_lr: bool = True,
    debias: bool = True,
    prior: Posterior | None = None,
    key: Any = 0,
    generator: str = "hash",
) -> optax.GradientTransformationExtraArgs:
    """A mixture of IVONs over one network: components that know of each other.

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
        learning_rate, hess_init, b1, b2, weight_decay, clip_radius: as in `ivon`, over the stacked
            parameters.
        rescale_lr, debias, key, generator: as in `ivon`.
        ess: effective sample size, as in `ivon`; may be a schedule.
        weight_rate: rho of the mixing weights, a number or schedule; 0 keeps them equal. Above 0,
            `update` needs `losses=`, the mean loss of every component, [K]: `est.aux` of a loss
            that returns (sum, losses), with `has_aux=True`. Costs are of size ess times a loss.
        repulsion: multiplies log(q / q_k), a number or schedule: 0 is K independent IVONs, an
            ensemble; 1 is the mixture.
        prior: a mean-field Gaussian posterior over the weights of one network, or one of one
            number; the same for every component.

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
    check_positive("learning_rate", learning_rate, zero=True, scalar=True)
    check_positive("weight_rate", weight_rate, zero=True, scalar=True)
    check_positive("repulsion", repulsion, zero=True, scalar=True)
    check_unit_interval("b1", b1)
    if weight_decay is None:
        weight_decay = WEIGHT_DECAY if prior is None else 0.0
    return steps_after(
        _scale_by_mixture(
            ess,
            weight_decay,
            prior,
            repulsion,
            weight_rate,
            b2=b2,
            hess_init=hess_init,
            momentum=optax.ema(b1, debias=debias),
            generator=generator,
            key=key,
        ),
        learning_rate,
        hess_init,
        weight_decay,
        clip_radius=clip_radius,
        rescale_lr=rescale_lr,
    )
