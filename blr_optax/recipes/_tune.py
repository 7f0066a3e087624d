"""Before training for good: the width of the prior, tried on a validation part in one program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import optimizers
from blr_optax._distribution import Distribution
from blr_optax._random import canonical_key
from blr_optax._validate import check_count, check_number, scalar_loss
from blr_optax.optimizers._first_weights import (
    RelativePrior,
    check_narrower,
    relative_noise,
    warm_cosine,
)
from blr_optax.recipes import _recipe
from blr_optax.state import make_step, posterior

if TYPE_CHECKING:
    from blr_optax._typing import KeyLike, OptState, Params, PyTree, Scalar

PRIORS = (1.7, 3.2, 10.0)
ROWS = ("ivon", "vogn", "evon", "bsam")


class Tuned(NamedTuple):
    """What `tune` found.

    Attributes:
        prior: the width with the lowest score.
        scores: of every width, the validation score after training.
        params: trained with `prior`.
        opt_state: its optimizer state, for `posterior`.
    """

    prior: float
    scores: dict[float, float]
    params: Params
    opt_state: OptState


def tune(
    loss: Callable[..., Scalar],
    params: Params,
    train: Sequence[PyTree],
    validation: Sequence[PyTree],
    num_steps: int,
    *,
    batch_size: int = 50,
    priors: Sequence[float] = PRIORS,
    noise: float = _recipe.NOISE,
    temperature: float = 1.0,
    task: str = "classification",
    learning_rate: float | None = None,
    score: Callable[[Distribution], Scalar] | None = None,
    row: str = "ivon",
    key: KeyLike = 0,
) -> Tuned:
    """Train with several widths of the prior at once, and keep the best on validation data.

    All runs are one program, the optimizer under `vmap`: same first weights, batches and noise, so
    that the scores differ by the prior alone.

    Args:
        loss: the mean loss, loss(params, *batch).
        params: the first parameters of every run.
        train: arrays with the training examples in front, as the loss takes them.
        validation: the same of other examples.
        num_steps: of every run.
        batch_size: examples per step, drawn anew for each.
        priors: deviations of the prior in units of the first weights.
        noise, temperature, task, learning_rate: as in `recipes.ivon`.
        score: of a trained posterior, lower is better, a function that jax can trace; by default
            the loss of its mean on the validation examples.
        row: "ivon", "vogn", "evon" or "bsam".
        key: typed key or integer seed, of batches and noise.

    Returns:
        A `Tuned`. Train once more on all examples with `recipes.ivon(..., prior=tuned.prior)`.

    Raises:
        ValueError: for counts or numbers out of range, an unknown task or row, arrays of different
            lengths, or when no score is finite.

    Source: the width is what NLL depends on most (docs/payoff.md).

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> x = jax.random.normal(jax.random.key(0), (60, 3))
      >>> loss = lambda w, x, y: jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))
      >>> y = jnp.sign(x @ jnp.array([2.0, -1.0, 0.0]))
      >>> tuned = blr.recipes.tune(
      ...     loss, jnp.full(3, 0.1), (x[:40], y[:40]), (x[40:], y[40:]), 100, batch_size=20
      ... )
      >>> print(tuned.prior)  # labels without noise: the weakest prior
      10.0
    """
    check_count("num_steps", num_steps)
    check_count("batch_size", batch_size)
    if len(priors) == 0:
        raise ValueError("tune: priors= must have at least one width.")
    for prior in priors:
        check_number("tune: priors", prior)
        check_narrower(noise, prior)
    check_number("temperature", temperature)
    train, validation = _arrays("train", train), _arrays("validation", validation)
    examples = jax.tree.leaves(train)[0].shape[0]
    if row not in ROWS:
        raise ValueError(f"tune: row={row!r} is unknown; known: {', '.join(ROWS)}.")
    peak = _recipe.peak_rate(task, learning_rate)
    first = "init_precision" if row in _recipe.UNSCALED else "hess_init"
    loss = scalar_loss("tune", loss)
    of_batches, of_noise = jax.random.split(canonical_key(key))
    judge = score or (lambda q: loss(q.mean, *validation))

    def run(prior: Any, train: tuple) -> tuple[Params, OptState, Scalar]:
        tx = getattr(optimizers, row)(
            warm_cosine(peak, num_steps),
            ess=examples / temperature,
            num_steps=num_steps,
            prior=RelativePrior(prior),
            key=of_noise,
            **{first: relative_noise(noise)},
        )
        step = make_step(tx, loss, jit=False, donate=False)

        def body(carry: Any, key: Any) -> Any:
            rows = jax.random.randint(key, (min(batch_size, examples),), 0, examples)
            batch = jax.tree.map(lambda x: x[rows], train)
            params, state, _ = step(*carry, *batch)
            return (params, state), None

        keys = jax.random.split(of_batches, num_steps)
        (after, state), _ = jax.lax.scan(body, (params, tx.init(params)), keys)
        return after, state, jnp.asarray(judge(posterior(state, after)))

    widths = jnp.asarray(priors, jnp.float32)
    trained, states, found = jax.jit(jax.vmap(run, (0, None)))(widths, train)
    scores = np.where(np.isfinite(found), found, np.inf)
    best = int(np.argmin(scores))
    if not np.isfinite(scores[best]):
        raise ValueError(f"tune: no score is finite: {np.asarray(found).tolist()}.")
    chosen = jax.tree.map(lambda x: x[best], (trained, states))
    named = dict(zip(map(float, priors), np.asarray(found).tolist(), strict=True))
    return Tuned(float(priors[best]), named, *chosen)


def _arrays(name: str, given: Sequence[PyTree]) -> tuple[PyTree, ...]:
    """Return the arguments of a loss as arrays, all with as many examples.

    Raises:
        ValueError: for what is no list of them, or when they differ in length.
    """
    if not isinstance(given, (tuple, list)) or not given:
        raise ValueError(f"tune: {name}= is a tuple of arrays, as the loss takes them: (x, y).")
    is_list = lambda x: isinstance(x, list)  # noqa: E731
    arrays = jax.tree.map(lambda x: jnp.asarray(x), tuple(given), is_leaf=is_list)
    sizes = {x.shape[:1] for x in jax.tree.leaves(arrays)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(f"tune: the arrays of {name}= differ in their leading axes: {sizes}.")
    return arrays
