"""`blr_update(family, loss, ...)`: the Bayesian learning rule as an optax transformation.

Each update evaluates the loss under q, takes its natural gradient, and makes one `natural_step`:

    value, gradient = natural_gradient(family, loss, estimator)(key, lambda, *batch)
    lambda <- natural_step(family, lambda, gradient, rho, prior, ess)
    updates = mean(lambda) - params

An `ExponentialStep` or a `ConditionalStep` knows how, for its kind of family.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blr_optax import _tree
from blr_optax._distribution import Distribution, check_distribution
from blr_optax._random import canonical_key, standard_normal
from blr_optax._transformation import transformation
from blr_optax._validate import all_finite, at, check_positive, holds, is_schedule
from blr_optax.estimators._curvature import AbsoluteGradient
from blr_optax.estimators._expectation import Delta
from blr_optax.families import Family, get
from blr_optax.rule._conditional_step import ConditionalStep
from blr_optax.rule._exponential_step import ExponentialStep
from blr_optax.rule._natural_step import kept_step
from blr_optax.rule._start import check_whole_tree, family_over
from blr_optax.state._reader import Reader

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import (
        KeyLike,
        Loss,
        NaturalParameters,
        Params,
        PyTree,
        ScalarOrSchedule,
        Updates,
    )
    from blr_optax.estimators import Estimator
    from blr_optax.estimators._terms import Term


class BlrUpdateState(NamedTuple):
    """State of `blr_update`; `natural` is authoritative, the parameters follow it.

    Attributes:
        count: steps made, skipped ones too (int32).
        key: typed key, constant; step t draws from fold_in(key, t).
        reader: static, how the posterior is read.
        natural: lambda.
        ess: effective sample size of the coming step.
        expected_loss: E_q[mean loss] before the last step, as estimated.
        retracted: members of lambda that the last step had to retract (int32).
        skipped: steps in which a member of lambda had to stay where it was (int32): its gradient
            was not finite, or led where there is no member with a finite mean.
    """

    count: Array
    key: Array
    reader: BlrReader
    natural: NaturalParameters
    ess: Array
    expected_loss: Array
    retracted: Array
    skipped: Array


@dataclasses.dataclass(frozen=True)
class BlrReader(Reader):
    """How a `BlrUpdateState` is read: q itself, with or without noise.

    Attributes:
        family: the family of `natural`.
        point: whether the estimator evaluates the loss at the mean only.
        generator: of the noise.
    """

    family: Family
    point: bool
    generator: str
    evaluates_loss = True

    def part(self, state: BlrUpdateState, params: Params) -> PyTree:
        """Return the leaves of theta, `MaskedNode` elsewhere."""
        theta = jax.eval_shape(self.family.mean, state.natural)
        if len(jax.tree.leaves(theta)) == len(jax.tree.leaves(params)):
            return params
        return _tree.mask_to(params, _tree.paths(theta))

    def noise(self, state: BlrUpdateState, key: Array) -> PyTree:
        """Return standard normals for a Gaussian; for other families the key itself."""
        if self.point or getattr(self.family, "curvature", None) is None:
            return None if self.point else key
        return standard_normal(key, self.family.mean(state.natural), self.generator)

    def weights(self, state: BlrUpdateState, params: Params, noise: PyTree) -> PyTree:
        if noise is None or not jax.tree.leaves(state.natural):
            return params
        if getattr(self.family, "curvature", None) is None:
            return optax.tree.cast_like(self.family.sample(noise, state.natural), params)
        draw = jax.tree.map(
            jnp.add, self.family.mean(state.natural), self.family.displace(state.natural, noise)
        )
        return optax.tree.cast_like(draw, params)

    def posterior(self, state: BlrUpdateState, params: Params) -> Distribution:
        # A copy: the state may be donated, the posterior is a value to keep.
        return Distribution(self.family, jax.tree.map(jnp.copy, state.natural))


def blr_update(
    family: str | Family,
    loss: Loss | Term,
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule = 1.0,
    prior: Distribution | None = None,
    init: Distribution | Callable[[PyTree], Distribution] | None = None,
    estimator: Estimator | None = None,
    step: str | None = None,
    key: KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation of the Bayesian learning rule, for any family and loss.

    lambda <- (1 - rho) lambda + rho ( lambda_0 - ess grad_mu E_q[mean loss] )

    without `prior`: (1 - rho) lambda - rho grad_mu { ess E_q[mean loss] + E_q[log h] }, a flat
    density.

    The transformation evaluates the loss itself: `update(grads, state, params, batch=(x, y))`;
    `grads` are not used and may be None. The parameters are the mean of q; where that is infinite
    they stay what they are, until it is finite. It must stand last in a chain.

    After any gradient, however large or not a number, lambda is a member of the family: a step that
    would end elsewhere is retracted, or not made and counted in `skipped`. Members that are
    independent (the numbers of a mean field, the factors of a product) are judged one by one.

    Args:
        family: a registered name or a family; over a pytree elementwise families become mean
            fields, Gaussians and conditional vector families act on its flat vector, other families
            take what they sample. Conditional ones (`mixture`, ...) update block by block.
        loss: `loss(theta, *batch)`, a mean loss; or `conjugate(...)`, `glm(...)`, or a sum; or
            `loss(mu, *batch)` for `estimators.closed_form()`.
        learning_rate: rho, a number or an optax schedule.
        ess: effective sample size: the number of examples the mean loss stands for. May be a
            schedule.
        prior: a posterior of the family (of any family for conditional ones); that of one number
            holds for every parameter of a mean field or a Gaussian. None is a flat density.
        init: the first posterior, or a function `params -> Distribution` of the first parameters;
            by default centred at params with the precision of the prior, else one, for families
            with a location, else the prior.
        estimator: how plain functions are treated, see `estimators.natural_gradient`; conditional
            families take `monte_carlo(...)` and `delta(...)`, mixtures `shared_draws(...)`, with
            the curvature `exact()` or `reparameterized()`.
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
    family, how = get(family), "auto" if step is None else step
    family.check_learnable("blr_update")
    kind = ExponentialStep if family.exponential else ConditionalStep
    whole = isinstance(ess, (int, float)) and ess == 1
    if isinstance(getattr(estimator, "curvature", None), AbsoluteGradient) and not whole:
        raise ValueError(
            f"ess={ess}: absolute_gradient() goes with ess=1 here; multiply the loss instead."
        )
    return from_steps(
        family,
        lambda over: kind(over, loss, estimator, prior, how),
        learning_rate,
        ess=ess,
        init=init,
        key=key,
    )


def from_steps(
    family: Family,
    steps: Callable[[PyTree], ExponentialStep | ConditionalStep],
    learning_rate: ScalarOrSchedule,
    *,
    ess: ScalarOrSchedule,
    init: Distribution | Callable[[PyTree], Distribution] | None,
    key: KeyLike,
) -> optax.GradientTransformationExtraArgs:
    """`blr_update` from its step: `steps(family)` for the family over the parameters."""
    # A warm-up starts at zero: such a step moves nothing.
    check_positive("learning_rate", learning_rate, scalar=True, zero=is_schedule(learning_rate))
    check_positive("ess", ess, scalar=True)
    if init is not None and not callable(init):
        check_distribution("init", init)
    step_of = functools.cache(steps)
    step_of(family)  # checks its arguments where they are given

    def init_fn(params: Params) -> BlrUpdateState:
        _tree.check_float_leaves(params, "blr_update")
        if not holds(all_finite, params):
            raise ValueError(
                f"blr_update: params={params} must be finite. A posterior may have an infinite "
                "mean, such as an inverse gamma of concentration up to 1: start from any finite "
                "numbers, such as jax.tree.map(jnp.ones_like, q.mean); they become q's mean as "
                "soon as it is finite."
            )
        over = family_over(family, params)
        check_whole_tree(over, params)
        step = step_of(over)
        natural = step.first(params, init(params) if callable(init) else init)
        count = jnp.zeros((), jnp.int32)
        return BlrUpdateState(
            count=count,
            key=canonical_key(key),
            reader=BlrReader(
                step.family,
                isinstance(step.estimator, Delta),
                getattr(step.estimator, "generator", "jax"),
            ),
            natural=natural,
            ess=jnp.array(at(ess, count), jnp.result_type(float)),
            expected_loss=jnp.zeros((), jnp.result_type(*jax.tree.leaves(natural), jnp.float32)),
            retracted=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: Updates,
        state: BlrUpdateState,
        params: Params = None,
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
        step, lam = step_of(state.reader.family), state.natural
        if not jax.tree.leaves(lam):  # a group of optax.partition that matches none
            return params, state._replace(count=optax.safe_increment(state.count))
        dtype = jnp.result_type(*jax.tree.leaves(lam))
        rho = jnp.asarray(at(learning_rate, state.count), dtype)
        scale = jnp.asarray(at(ess, state.count), dtype)
        batch = batch if isinstance(batch, tuple) else (batch,)

        draw = jax.random.fold_in(state.key, state.count)
        value, d = step.direction(draw, lam, batch, scale, points)
        new, mean, stayed, retracted = kept_step(
            step.family, lam, d, lambda known: step.move(lam, known, rho, state.count)
        )

        def change(m: Array, p: Array) -> Array:
            u = (m - p.astype(m.dtype)).astype(p.dtype)
            return jnp.where(jnp.isfinite(u), u, 0.0)  # a mean may be infinite, and become finite

        updates = jax.tree.map(change, mean, params)
        moved = (stayed == 0) & jnp.isfinite(value)
        count = optax.safe_increment(state.count)
        return updates, state._replace(
            count=count,
            natural=new,
            ess=jnp.array(at(ess, count), state.ess.dtype),
            retracted=retracted,
            expected_loss=jnp.where(
                moved, value.astype(state.expected_loss.dtype), state.expected_loss
            ),
            skipped=state.skipped + (stayed > 0).astype(jnp.int32),
        )

    return transformation(init_fn, update_fn)
