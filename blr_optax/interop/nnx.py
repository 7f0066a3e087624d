"""Flax nnx: models and optimizers that hold their own arrays and change in place.

    with sampled(model, optimizer):  loss(model)          the loss at this step's weights
    step(x, y)                                            a whole step, of `make_step`
    q, apply = posterior(model, optimizer)                a value, and the model as a function

The mean is taken out as plain arrays and put back, which a loop written by hand can forget; random
number streams and running statistics of the model go on, and every draw has its own dropout mask.
Needs the extra `flax`, which is imported where it is used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax

from blr_optax import state
from blr_optax.state._reader import find_posterior_states

if TYPE_CHECKING:
    from flax import nnx
    from jaxtyping import Array

    from blr_optax._distribution import Distribution
    from blr_optax._typing import PyTree
    from blr_optax.state import StepInfo

__all__ = ["make_step", "posterior", "sampled"]


def _check(who: str, model: nnx.Module, optimizer: nnx.Optimizer) -> None:
    """Raise ValueError for anything but a model and an optimizer of nnx, in this order."""
    from flax import nnx

    if not isinstance(optimizer, nnx.Optimizer) or not isinstance(model, nnx.Module):
        raise ValueError(
            f"nnx.{who}: give the model and its nnx.Optimizer(model, tx, wrt=nnx.Param); got "
            f"{type(model).__name__} and {type(optimizer).__name__}."
        )


@contextlib.contextmanager
def sampled(model: nnx.Module, optimizer: nnx.Optimizer) -> Iterator[nnx.Module]:
    """Put this step's sample of the posterior into the model, and its mean back at the end.

    theta ~ q inside the `with` block: take the gradient there, and call
    `optimizer.update(model, grads)` after it, as always.

    Args:
        model: the model, whose parameters are the posterior's mean.
        optimizer: its `nnx.Optimizer`, of any transformation that carries a posterior.

    Yields:
        The model.

    Raises:
        ValueError: for other arguments, and as `blr_optax.sample`.

    Source: Shen et al. (2024), Alg. 1, line 1. For every Gaussian row of `blr_update`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, blr.ivon(0.1, ess=10.0), wrt=nnx.Param)
      >>> before = model.kernel[...]
      >>> with blr.nnx.sampled(model, optimizer):
      ...     print(bool(jnp.all(model.kernel[...] != before)))
      True
      >>> print(bool(jnp.all(model.kernel[...] == before)))
      True
    """
    from flax import nnx

    _check("sampled", model, optimizer)
    mean = nnx.as_pure(nnx.state(model, optimizer.wrt))
    nnx.update(model, state.sample(nnx.as_pure(optimizer.opt_state), mean))
    try:
        yield model
    finally:
        nnx.update(model, mean)


def make_step(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    loss: Callable[..., Any],
    *,
    samples: int = 1,
    antithetic: bool = False,
    microbatch: int | None = None,
    has_aux: bool = False,
) -> Callable[..., StepInfo]:
    """Return the training step of a model and its optimizer, which changes both in place.

    info = step(*batch)

    `blr_optax.make_step` for nnx, for any optimizer: the gradient is taken where the optimizer
    wants it. Running statistics (BatchNorm) are averaged over the draws, and the random number
    streams go on: every draw, micro-batch and step has its own dropout mask.

    Args:
        model: the model; `model.train()` and `model.eval()` may be called between steps.
        optimizer: its `nnx.Optimizer`.
        loss: `loss(model, *batch)`, a mean over the examples; `(loss, aux)` with `has_aux`.
        samples: draws of the weights per step.
        antithetic: evaluate every draw and its mirror image, under one mask.
        microbatch: evaluate the batch in pieces of this size, in bounded memory.
        has_aux: whether the loss returns `(value, aux)`.

    Returns:
        A compiled function of the batch that returns a `StepInfo`.

    Raises:
        ValueError: for other arguments, an optimizer that evaluates the loss itself (it is given
            functions of plain arrays: split the model and use `blr_optax.make_step`), and as
            `blr_optax.make_step`. For vogn and ogn nothing but the random streams may change in
            the model: BatchNorm has to run on its averages.

    Source: Khan and Rue (2023), Eq. 3. For every Gaussian row of `blr_update`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> from flax import nnx
      >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, blr.ivon(0.1, ess=100.0, b2=0.99), wrt=nnx.Param)
      >>> loss = lambda model, x, y: 0.5 * jnp.mean((model(x) - y) ** 2)
      >>> step = blr.nnx.make_step(model, optimizer, loss)
      >>> x = jnp.linspace(-1.0, 1.0, 8)[:, None]
      >>> for _ in range(200):
      ...     info = step(x, 2.0 * x)
      >>> print(bool(abs(model.kernel[0, 0] - 2.0) < 0.1))
      True
    """
    from flax import nnx

    _check("make_step", model, optimizer)
    readers = [s.reader for s in find_posterior_states(nnx.as_pure(optimizer.opt_state))]
    if any(reader.evaluates_loss for reader in readers):
        raise ValueError(
            "nnx.make_step: this optimizer evaluates the loss itself, at plain arrays: split the "
            "model, nnx.as_pure(nnx.split(model, nnx.Param, ...)), and use blr_optax.make_step."
        )
    by_example = any(reader.by_example for reader in readers)
    several = samples > 1 or microbatch is not None or by_example

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, *batch: PyTree) -> StepInfo:
        graphdef, mean, streams, rest = nnx.as_pure(
            nnx.split(model, optimizer.wrt, nnx.RngKey, ...)
        )

        def pure_loss(theta: PyTree, *batch: PyTree, key: Array | None = None) -> Any:
            own = streams if key is None else _folded(streams, key)
            net = nnx.merge(graphdef, theta, own, rest)
            value, aux = loss(net, *batch) if has_aux else (loss(net, *batch), None)
            if by_example:
                return value
            return value, (nnx.as_pure(nnx.split(net, optimizer.wrt, nnx.RngKey, ...)[3]), aux)

        pure_step = state.make_step(
            optimizer.tx,
            pure_loss,
            samples=samples,
            antithetic=antithetic,
            microbatch=microbatch,
            has_aux=not by_example,
            jit=False,
        )
        options = {"key": jax.random.key(optimizer.step[...])} if several else {}
        new, opt_state, info = pure_step(mean, nnx.as_pure(optimizer.opt_state), *batch, **options)
        left, aux = (rest, None) if by_example else info.aux
        nnx.update(model, new, left)
        nnx.update(optimizer.opt_state, nnx.state(opt_state))
        optimizer.step[...] += 1
        return info._replace(aux=aux)

    return functools.partial(step, model, optimizer)


def _folded(streams: PyTree, key: Array) -> PyTree:
    """Return random number streams that are other ones for every key."""
    bits = jax.random.bits(key)

    def fold(stream: Array) -> Array:
        every = jax.vmap(jax.random.fold_in, (0, None))(stream.reshape(-1), bits)
        return every.reshape(stream.shape)

    return jax.tree.map(fold, streams)


def posterior(
    model: nnx.Module, optimizer: nnx.Optimizer
) -> tuple[Distribution, Callable[..., Any]]:
    """Return the posterior over the trained parameters, and the model as a function of them.

    q = q(theta),  apply(theta, *inputs) = model(*inputs) at the parameters theta

    Args:
        model: the model. `apply` calls a copy in evaluation mode, with what is not trained as it is
            now: no dropout, and running averages in BatchNorm.
        optimizer: its `nnx.Optimizer`.

    Returns:
        (q, apply), as `predict(key, q, apply, x)` takes them.

    Raises:
        ValueError: for other arguments, and as `blr_optax.posterior`.

    Source: Khan and Rue (2023), Sec. 1. For every row of `blr_update`.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = blr.ivon(0.1, ess=10.0, hess_init=1.0, weight_decay=0.0)
      >>> q, apply = blr.nnx.posterior(model, nnx.Optimizer(model, tx, wrt=nnx.Param))
      >>> print(q.variance["bias"], apply(q.mean, jnp.ones((3, 2))).shape)
      [0.1] (3, 1)
    """
    from flax import nnx

    _check("posterior", model, optimizer)
    graphdef, mean, rest = nnx.as_pure(nnx.split(model, optimizer.wrt, ...))

    def apply(theta: PyTree, *inputs: Any) -> Any:
        net = nnx.merge(graphdef, theta, rest)
        net.eval()
        return net(*inputs)

    return state.posterior(nnx.as_pure(optimizer.opt_state), mean), apply
