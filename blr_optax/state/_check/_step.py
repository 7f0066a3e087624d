"""What a user's own training step says: where its gradient and its parameters come from.

It is run from two keys, and compared with a right step of the same key. A sample that is passed on
as parameters leaves theta - m in the new parameters; a gradient taken at the parameters leads to
the very state that an update with this gradient leads to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blr_optax.state._check._loss import Counted
from blr_optax.state._check._report import Finding
from blr_optax.state._reader import draws_noise, find_posterior_states
from blr_optax.state._reading import reseed, sample

if TYPE_CHECKING:
    from blr_optax._typing import Params, PyTree

VISIBLE = 1e-5  # relative difference of a right and a wrong state, above which they are told apart
SAME = 0.05  # of that difference: how near the wrong one a state counts as equal to it


def _flat(tree: PyTree) -> np.ndarray:
    """All floating entries of a tree, one after another."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return np.concatenate([np.zeros(0), *(np.ravel(np.asarray(x, np.float64)) for x in leaves)])


def _is_the_wrong_one(state: PyTree, right: PyTree, wrong: PyTree) -> bool:
    """Whether a state is the wrong one in every array in which right and wrong differ."""
    shares = []
    for leaves in zip(*map(jax.tree.leaves, (state, right, wrong)), strict=True):
        one, other, third = (_flat([leaf]) for leaf in leaves)
        apart = np.linalg.norm(other - third)
        if apart > VISIBLE * np.linalg.norm(third):
            shares.append(np.linalg.norm(one - third) / apart)
    return bool(shares) and max(shares) < SAME


def _counts(opt_state: PyTree) -> list[int]:
    states = [state for state in find_posterior_states(opt_state) if draws_noise(state)]
    return [int(state.reader.core(state).count) for state in states]


def of_step(
    step: Callable[..., Any],
    tx: optax.GradientTransformationExtraArgs,
    loss: Counted,
    params: Params,
    batch: tuple,
    right: Callable[..., Any],
    extra: dict[str, Any],
) -> list[Finding]:
    """Run a user's step from two keys and compare, with each other and with a right one.

    Raises:
        ValueError: when it fails, as a step of another optimizer does, or does not return
            parameters and state first.
    """

    def run(key: int) -> tuple[PyTree, PyTree, PyTree]:
        # Copies: the step may donate its arguments.
        start = jax.tree.map(jnp.array, params)
        state = reseed(tx.init(start), key)
        theta = sample(state, params)
        try:
            found = step(start, state, *batch)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "check: step= failed on the first state of tx and this batch. It must be a step of "
                "the same tx, called step(params, opt_state, *batch). It said "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(found, tuple) or len(found) < 2:
            raise ValueError(
                "check: step= must be called step(params, opt_state, *batch) and return "
                f"(params, opt_state, ...); it returned {type(found).__name__}."
            )
        shapes = (jax.tree.map(jnp.shape, found[0]), jax.tree.map(jnp.shape, params))
        if shapes[0] != shapes[1]:
            raise ValueError(
                "check: step= must return (params, opt_state, ...); the first thing that it "
                "returned does not have the structure of params."
            )
        return theta, found[0], found[1]

    (theta, new, state), (other, new_other, _) = run(1), run(2)
    if _counts(state) == _counts(tx.init(params)):
        return [Finding(
            "state_not_kept",
            "warning",
            "The step returns the optimizer state that it got: every step would see the same "
            "noise, and nothing is learnt about the precision.",
            "updates, opt_state = tx.update(grads, opt_state, params); return the new opt_state.",
        )]  # fmt: skip
    # The noise is in the new parameters, and is not what several samples leave of an update.
    noise = _flat(theta) - _flat(params)
    first = reseed(tx.init(params), 1)
    reference = right(params, first, *batch)
    excess = _flat(new) - _flat(reference[0])
    loss.count += 1
    change = _flat(new) - _flat(new_other), _flat(theta) - _flat(other)
    if np.vdot(excess, noise) > 0.5 * np.vdot(noise, noise) and np.vdot(*change) > 0.0:
        return [Finding(
            "sample_as_params",
            "warning",
            "The step returns parameters that contain this step's noise: the sample was passed to "
            "update, or to apply_updates, in place of the parameters. The mean then makes a random "
            "walk.",
            "theta = blr.sample(opt_state, params) is for the gradient only: "
            "updates, opt_state = tx.update(grads, opt_state, params), and "
            "optax.apply_updates(params, updates). blr.make_step does it.",
        )]  # fmt: skip
    if any(one.reader.by_example or one.reader.adversarial for one in find_posterior_states(state)):
        return []  # without estimate there is no step
    _, at_mean = loss.value_and_grad(params, batch)
    _, wrong = jax.jit(tx.update)(at_mean, first, params, **extra)
    posteriors = map(find_posterior_states, (state, reference[1], wrong))
    if not _is_the_wrong_one(*posteriors):
        return []
    return [Finding(
        "gradient_at_params",
        "warning",
        "The gradient of the step knows nothing of this step's noise: it was taken at the "
        "parameters. The curvature then comes out as zero on average, and the deviations many "
        "times too wide.",
        "Take it at the sample: jax.grad(loss)(blr.sample(opt_state, params), *batch), then "
        "tx.update(grads, opt_state, params). blr.make_step does it.",
    )]  # fmt: skip
