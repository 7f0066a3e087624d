"""Flax Linen: a `TrainState`, which holds parameters and optimizer state as one value.

    state.params  ->  sampled(state).params               this step's weights, for `jax.grad`
    state, info = step(state, x, y)                       a whole step, of `make_step`
    q, apply = posterior(state)                           a value, and the model as a function

Needs the extra `flax`, or nothing: any dataclass with the fields of `TrainState` will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from blr_optax import state
from blr_optax.state._donation import donating

if TYPE_CHECKING:
    from flax.training.train_state import TrainState

    from blr_optax._distribution import Distribution
    from blr_optax._typing import KeyLike, PyTree
    from blr_optax.state import StepInfo

__all__ = ["make_step", "posterior", "sampled"]


def _check(who: str, train_state: TrainState) -> None:
    """Raise ValueError for anything but a train state."""
    missing = [
        name
        for name in ("step", "apply_fn", "params", "tx", "opt_state", "replace")
        if not hasattr(train_state, name)
    ]
    if missing:
        raise ValueError(
            f"linen.{who}: give a flax.training.train_state.TrainState; "
            f"{type(train_state).__name__} has no {', '.join(missing)}."
        )


def sampled(train_state: TrainState) -> TrainState:
    """Return the train state with this step's sample of the posterior for its parameters.

    theta ~ q: differentiate at `sampled(state).params`, and apply the gradients to `state` itself.

    Args:
        train_state: its parameters are the posterior's mean.

    Returns:
        Another train state; keep the first one.

    Raises:
        ValueError: for anything but a train state, and as `blr_optax.sample`.

    Source: Shen et al. (2024), Alg. 1, line 1. For every Gaussian row of `blr_update`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> from flax.training.train_state import TrainState
      >>> tx = blr.ivon(0.1, ess=10.0)
      >>> state = TrainState.create(apply_fn=jnp.dot, params={"w": jnp.ones(2)}, tx=tx)
      >>> theta = blr.linen.sampled(state).params
      >>> state = state.apply_gradients(grads={"w": 2 * theta["w"]})
      >>> print(int(state.step))
      1
    """
    _check("sampled", train_state)
    return train_state.replace(params=state.sample(train_state.opt_state, train_state.params))


def make_step(
    loss: Callable[..., Any],
    *,
    samples: int = 1,
    antithetic: bool = False,
    microbatch: int | None = None,
    has_aux: bool = False,
    jit: bool = True,
    donate: bool = True,
) -> Callable[..., tuple[TrainState, StepInfo]]:
    """Return the training step of a train state, for any optimizer in it.

    state, info = step(state, *batch)

    `blr_optax.make_step` for `TrainState`: the gradient is taken where the optimizer wants it.

    Args:
        loss: `loss(params, state, *batch)`, a mean over the examples, which may read
            `state.apply_fn` and other fields; with `has_aux` it returns `(loss, fields)`.
        samples: draws of the weights per step.
        antithetic: evaluate every draw and its mirror image.
        microbatch: evaluate the batch in pieces of this size, in bounded memory.
        has_aux: whether the loss returns beside its value a dictionary of fields that the train
            state goes on with, such as `{"batch_stats": new}`: averages over the draws.
        jit: whether to compile the step.
        donate: whether the compiled step may reuse the memory of the train state, which is then
            gone: go on with the one that it returns.

    Returns:
        A function of (state, *batch) that returns (state, `StepInfo`). Given `key=` besides, it
        calls the loss with a key of its own for every draw and micro-batch, for `rngs=` of dropout.

    Raises:
        ValueError: for anything but a train state, an optimizer that evaluates the loss itself
            (use `blr_optax.make_step`), and as `blr_optax.make_step`.

    Source: Khan and Rue (2023), Eq. 3. For every Gaussian row of `blr_update`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> from flax.training.train_state import TrainState
      >>> loss = lambda w, state, x, y: 0.5 * jnp.mean((state.apply_fn(w, x) - y) ** 2)
      >>> tx = blr.ivon(0.1, ess=100.0, b2=0.99)
      >>> state = TrainState.create(apply_fn=jnp.multiply, params=jnp.zeros(()), tx=tx)
      >>> step = blr.linen.make_step(loss)
      >>> for _ in range(200):
      ...     state, info = step(state, jnp.ones(8), jnp.full(8, 2.0))
      >>> print(bool(abs(state.params - 2.0) < 0.1))
      True
    """

    def step(
        train_state: TrainState, *batch: PyTree, key: KeyLike | None = None
    ) -> tuple[TrainState, StepInfo]:
        _check("make_step", train_state)

        def pure_loss(theta: PyTree, *batch: PyTree, **options: Any) -> Any:
            return loss(theta, train_state, *batch, **options)

        pure_step = state.make_step(
            train_state.tx,
            pure_loss,
            samples=samples,
            antithetic=antithetic,
            microbatch=microbatch,
            has_aux=has_aux,
            jit=False,
        )
        options = {} if key is None else {"key": key}
        params, opt_state, info = pure_step(
            train_state.params, train_state.opt_state, *batch, **options
        )
        fields = info.aux if has_aux else {}
        new = train_state.replace(
            step=train_state.step + 1, params=params, opt_state=opt_state, **fields
        )
        return new, info

    if not jit:
        return step
    return donating(step, 1) if donate else jax.jit(step)


def posterior(train_state: TrainState) -> tuple[Distribution, Callable[..., Any]]:
    """Return the posterior over the parameters, and the model as a function of them.

    q = q(theta),  apply(theta, *inputs, **options) = apply_fn({"params": theta, ...}, *inputs)

    Args:
        train_state: a train state; `batch_stats`, where it has that field, is handed to the model
            beside the parameters.

    Returns:
        (q, apply), as `predict(key, q, apply, x)` takes them. Options of the model in evaluation
        (`train=False`) are given to `apply` by `functools.partial`.

    Raises:
        ValueError: for anything but a train state, and as `blr_optax.posterior`.

    Source: Khan and Rue (2023), Sec. 1. For every row of `blr_update`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> from flax.training.train_state import TrainState
      >>> tx = blr.ivon(0.1, ess=10.0, hess_init=1.0, weight_decay=0.0)
      >>> model = lambda variables, x: x @ variables["params"]
      >>> state = TrainState.create(apply_fn=model, params=jnp.ones(2), tx=tx)
      >>> q, apply = blr.linen.posterior(state)
      >>> print(q.variance, apply(q.mean, jnp.ones((3, 2))))
      [0.1 0.1] [2. 2. 2.]
    """
    _check("posterior", train_state)
    others = {
        name: getattr(train_state, name) for name in ("batch_stats",) if hasattr(train_state, name)
    }

    def apply(theta: PyTree, *inputs: Any, **options: Any) -> Any:
        return train_state.apply_fn({"params": theta, **others}, *inputs, **options)

    return state.posterior(train_state.opt_state, train_state.params), apply
