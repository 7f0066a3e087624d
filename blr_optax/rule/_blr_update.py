"""`blr_update(family, loss, ...)`: the Bayesian learning rule as an optax transformation.

Each update looks at the loss under q, takes its natural gradient, and makes one `natural_step`:

    value, gradient = natural_gradient(family, loss, estimator)(key, lambda, *batch)
    lambda <- natural_step(family, lambda, gradient, rho, prior, ess)
    updates = mean(lambda) - params
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._distribution import Posterior
from blr_optax._random import canonical_key, standard_normal
from blr_optax._validate import all_finite, at, check_positive, zero_unless
from blr_optax.estimators import Estimator, natural_gradient
from blr_optax.estimators._curvature import AbsoluteGradient
from blr_optax.estimators._expectation import Delta
from blr_optax.families import (
    Conditional,
    Family,
    Leafwise,
    MeanField,
    Product,
    Raveled,
    SideBySide,
    get,
)
from blr_optax.rule._conditional_step import (
    MixtureDraws,
    check_conditional,
    conditional_gradient,
    conditional_move,
    prior_over,
)
from blr_optax.rule._natural_step import check_step, direction, move, spread
from blr_optax.state._reader import Rule

if TYPE_CHECKING:
    from jaxtyping import Array


class BlrUpdateState(NamedTuple):
    """State of `blr_update`; `natural` is authoritative, the parameters follow it.

    Attributes:
        count: steps made, skipped ones too (int32).
        key: typed key, constant; step t draws from fold_in(key, t).
        rule: static, how the posterior is read.
        natural: lambda.
        expected_loss: E_q[mean loss] before the last step, as estimated.
        retracted: members of lambda that the last step had to retract (int32).
        skipped: steps skipped because something was not finite (int32).
    """

    count: Array
    key: Array
    rule: BlrRule
    natural: Any
    expected_loss: Array
    retracted: Array
    skipped: Array


@dataclasses.dataclass(frozen=True)
class BlrRule(Rule):
    """How a `BlrUpdateState` is read: q itself, with or without noise.

    Attributes:
        family: the family of `natural`.
        point: whether the estimator looks at the mean only.
        generator: of the noise.
    """

    family: Family
    point: bool
    generator: str
    evaluates_loss = True

    def noise(self, state: BlrUpdateState, key: Array) -> Any:
        """Standard normals for a Gaussian; for other families the key itself."""
        if self.point or getattr(self.family, "curvature", None) is None:
            return None if self.point else key
        return standard_normal(key, self.family.mean(state.natural), self.generator)

    def weights(self, state: BlrUpdateState, params: Any, noise: Any) -> Any:
        if noise is None:
            return params
        if getattr(self.family, "curvature", None) is None:
            return self.family.sample(noise, state.natural)
        draw = jax.tree.map(
            jnp.add, self.family.mean(state.natural), self.family.displace(state.natural, noise)
        )
        return jax.tree.map(lambda x, p: x.astype(p.dtype), draw, params)

    def posterior(self, state: BlrUpdateState, params: Any) -> Posterior:
        # A copy: the state may be donated, the posterior is a value to keep.
        return Posterior(self.family, jax.tree.map(jnp.copy, state.natural))


def family_over(family: str | Family | Conditional, params: Any) -> Family | Conditional:
    """The family over a tree of parameters: elementwise ones become mean fields, Gaussians ravel.

    Matrix families are one per leaf.

    Other families take what they sample: a vector, a matrix, a NamedTuple, or batches of these.
    """
    family = get(family)
    if isinstance(family, (MeanField, Raveled, Leafwise, Product, SideBySide)):
        return family
    if family.conditional:
        leaves = jax.tree.leaves(params)
        one = jax.tree_util.all_leaves([params]) or not leaves
        if family.event_ndim == 2 and leaves:
            is_matrix = one and jnp.ndim(params) == 2
            return family if is_matrix else Leafwise.like(family, params)
        return family if one else Raveled.like(family, params)
    if family.elementwise:
        return MeanField(family)
    is_vector = isinstance(params, jax.Array) and params.ndim == 1
    return Raveled.like(family, params) if family.location and not is_vector else family


def _first(family: Any, params: Any, init: Posterior | None, prior: Posterior | None) -> Any:
    """The first lambda: `init`, else centred at params, else the prior."""
    # Copies: a state that held the parameters themselves would be donated with them.
    params = jax.tree.map(lambda p: jnp.array(p, _tree.statistics_dtype(p.dtype)), params)
    if init is not None:
        return jax.tree.map(jnp.array, init.natural)
    if family.location:
        return family.natural_at(params, None if prior is None else prior.natural)
    if prior is not None:
        return jax.tree.map(jnp.array, prior.natural)
    lifted = isinstance(family, MeanField)
    name = type(family.family if lifted else family).__name__
    tree = f"; over a tree it is Posterior(MeanField({name}()), ...)" if lifted else ""
    ways = "init=" if family.conditional else "init= or prior="
    raise ValueError(
        f"blr_update: {name} has no location to centre at params; pass {ways}, a Posterior of the "
        f"family{tree}."
    )


def _check_like(name: str, given: Posterior | None, family: Any, params: Any) -> None:
    """Raises ValueError when a posterior argument does not fit the family and the parameters."""
    if given is None or not jax.tree.leaves(params):  # optax's placeholder has no leaves
        return
    if not isinstance(given, Posterior):
        raise ValueError(f"{name} must be a Posterior; got {type(given).__name__}.")
    flat = family.family if isinstance(family, Raveled) else family
    if family.conditional and given.family not in (family, flat):
        raise ValueError(
            f"{name} is a member of {given.family}, not of {flat}; give blr_update the family "
            "itself, such as init.family."
        )
    if not isinstance(given.natural, family.Natural):
        raise ValueError(
            f"{name}: natural parameters of type {type(given.natural).__name__}; the family over "
            f"params has {family.Natural.__name__}."
        )
    if not family.location:
        return  # nothing to compare with: `_check_params` compares the mean
    like = jax.eval_shape(lambda p: _first(family, p, None, None), params)
    _check_shapes(name, given, like)


def _check_shapes(name: str, given: Posterior, like: Any) -> None:
    """Raises ValueError when a posterior argument is not shaped like lambda."""
    found, wanted = (jax.tree.map(jnp.shape, x) for x in (given.natural, like))
    if found != wanted:
        raise ValueError(
            f"{name}: its natural parameters have structure and shapes {found}; the family over "
            f"params has {wanted}."
        )


def _check_params(family: Any, natural: Any, params: Any) -> None:
    """Raises ValueError when the parameters are not shaped like q's mean."""
    if not jax.tree.leaves(params):
        return
    mean = jax.eval_shape(family.mean, natural)
    shapes = [jax.tree.map(jnp.shape, x) for x in (mean, params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "blr_update: params must be like the mean of q, with structure and shapes "
            f"{shapes[0]}; got {shapes[1]}. Start from params = q.mean, q being init= or prior=; "
            "over a tree q is a Posterior of MeanField(family)."
        )


def blr_update(
    family: str | Family | Conditional,
    loss: Any,
    learning_rate: Any,
    *,
    ess: Any = 1.0,
    prior: Posterior | None = None,
    init: Posterior | None = None,
    estimator: Estimator | None = None,
    step: str | None = None,
    key: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """The Bayesian learning rule for any family and loss.

    lambda <- (1 - rho) lambda + rho ( lambda_0 - ess grad_mu E_q[mean loss] )

    without `prior`: (1 - rho) lambda - rho grad_mu { ess E_q[mean loss] + E_q[log h] }, a flat
    density.

    The transformation evaluates the loss itself: `update(grads, state, params, batch=(x, y))`;
    `grads` are not used and may be None. The parameters are the mean of q. It must stand last in a
    chain.

    Args:
        family: a registered name or a family; over a pytree elementwise families become mean
            fields, Gaussians and conditional vector families act on its flat vector, other families
            take what they sample. Conditional ones (`mixture`, ...) update block by block.
        loss: `loss(theta, *batch)`, a mean loss; or `conjugate(...)`, `glm(...)`, or a sum; or
            `loss(mu, *batch)` for `estimators.exact()`.
        learning_rate: rho, a number or an optax schedule.
        ess: effective sample size: the number of examples the mean loss stands for. May be a
            schedule.
        prior: a posterior of the family (of any family for conditional ones); that of one number
            holds for every parameter of a mean field. None is a flat density.
        init: the first posterior; by default centred at params with the precision of the prior,
            else one, for families with a location, else the prior.
        estimator: how plain functions are treated, see `estimators.natural_gradient`; conditional
            families take `monte_carlo(...)` and `delta(...)`.
        step: how lambda moves, see `natural_step`; None is "auto".
        key: typed key or integer seed.

    Returns:
        A transformation whose state carries q; read it with `posterior(opt_state, params)`.

    Raises:
        ValueError: for an unknown family, loss, estimator or step, a rate or ess that is not
            positive, a prior or init of another structure, integer parameters, or missing params.

    Source: Khan and Rue (2023), "The Bayesian Learning Rule", Eqs. 3-5. Every optimizer of this
    library is a special case.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> tx = blr.blr_update(
      ...     "gaussian",
      ...     lambda x: 2.0 * jnp.sum((x - 3.0) ** 2),
      ...     1.0,
      ...     estimator=blr.estimators.delta(),
      ... )
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(None, tx.init(params), params)
      >>> print(params + updates, blr.posterior(state, params).variance)
      [3. 3.] [0.25 0.25]
    """
    check_positive("learning_rate", learning_rate, scalar=True)
    check_positive("ess", ess, scalar=True)
    family, how = get(family), "auto" if step is None else step
    family.check_learnable("blr_update")
    conditional = family.conditional
    if conditional:
        check_conditional(family, loss, how, estimator)
    else:
        check_step(how, family)
        natural_gradient(family, loss, estimator)  # checks its arguments where they are given
        whole = isinstance(ess, (int, float)) and ess == 1
        if isinstance(getattr(estimator, "curvature", None), AbsoluteGradient) and not whole:
            raise ValueError(
                f"ess={ess}: absolute_gradient() goes with ess=1 here; multiply the loss instead."
            )
    point = estimator is not None and isinstance(estimator, Delta)
    generator = getattr(estimator, "generator", "threefry")

    def init_fn(params: Any) -> BlrUpdateState:
        _tree.check_float_leaves(params, "blr_update")
        over = family_over(family, params)
        if conditional:  # its prior may be of any family
            prior_over(prior, params)
        own = None if conditional else spread(prior, over, params)
        _check_like("prior", own, over, params)
        _check_like("init", init, over, params)
        natural = _first(over, params, init, own)
        if own is not None and jax.tree.leaves(params):
            _check_shapes("prior", own, natural)
        _check_params(over, natural, params)
        dtype = jnp.result_type(*jax.tree.leaves(natural), jnp.float32)
        return BlrUpdateState(
            count=jnp.zeros((), jnp.int32),
            key=canonical_key(key),
            rule=BlrRule(over, point, generator),
            natural=natural,
            expected_loss=jnp.zeros((), dtype),
            retracted=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: Any,
        state: BlrUpdateState,
        params: Any = None,
        *,
        batch: Any = (),
        points: Any = None,
        **unused: Any,
    ) -> tuple[Any, BlrUpdateState]:
        del updates, unused
        if params is None:
            raise ValueError(
                "blr_update: update needs params, update(grads, state, params, batch=(...))."
            )
        over, lam = state.rule.family, state.natural
        dtype = jnp.result_type(*jax.tree.leaves(lam))
        rho = jnp.asarray(at(learning_rate, state.count), dtype)
        scale = jnp.asarray(at(ess, state.count), dtype)
        batch = batch if isinstance(batch, tuple) else (batch,)

        draw = jax.random.fold_in(state.key, state.count)
        if points is not None and not isinstance(estimator, MixtureDraws):
            raise ValueError('update: points= are draws for multimodal(draws="mixture") alone.')
        if conditional:
            terms = (over, loss, estimator, draw, lam, batch, scale, prior_over(prior, params))
            value, d = conditional_gradient(*terms, points)
        else:
            value, grad_mu = natural_gradient(over, loss, estimator)(draw, lam, *batch)
            d = direction(over, lam, grad_mu, prior, scale)
        finite = all_finite(d)
        gate = finite.astype(dtype)
        d = zero_unless(finite, d)
        if conditional:
            new = conditional_move(over, lam, d, rho * gate, how, state.count)
            retracted = jnp.zeros((), jnp.int32)
        else:
            new, retracted = move(over, lam, over.combine((rho * gate, d)), how)
        new = jax.tree.map(lambda x, old: x.astype(old.dtype), new, lam)

        new_mean = over.mean(new)
        updates = jax.tree.map(
            lambda m, p: (m - p.astype(m.dtype)).astype(p.dtype), new_mean, params
        )
        return updates, state._replace(
            count=optax.safe_increment(state.count),
            natural=new,
            retracted=retracted,
            expected_loss=jnp.where(
                finite, value.astype(state.expected_loss.dtype), state.expected_loss
            ),
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
