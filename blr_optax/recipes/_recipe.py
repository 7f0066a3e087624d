"""A recipe: an optimizer made from two counts, and everything that was chosen for it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import numpy as np

from blr_optax import _tree, optimizers
from blr_optax._distribution import Distribution
from blr_optax._validate import check_count, check_number, concrete
from blr_optax.optimizers._first_weights import (
    CLIP_STEP,
    NOISE,
    PRIOR,
    RATE,
    relative_noise,
    relative_prior,
    scales,
    warm_cosine,
)

if TYPE_CHECKING:
    import optax

    from blr_optax._typing import Params

# Peak learning rates. With the bound on the step any rate from 1 to 50 serves classification and
# language models alike. A regression that learns its noise has gradients 1 / noise^2 times as
# large, and small data sets, on which a slow rate overfits less.
RATES = {"classification": RATE, "language_model": RATE, "regression": 0.1}
# Of rows that do not multiply the rate by the first precision per example.
UNSCALED = ("vogn", "bsam")


def peak_rate(task: str, learning_rate: float | None) -> float:
    """Return the largest learning rate, the task's unless another is given.

    Raises:
        ValueError: for an unknown task, or a rate that is no positive number.
    """
    if task not in RATES:
        raise ValueError(f"task={task!r} is unknown; known: {', '.join(RATES)}.")
    if learning_rate is None:
        return RATES[task]
    check_number("learning_rate", learning_rate)
    return learning_rate


class LeafChoice(NamedTuple):
    """What was chosen for one leaf of the parameters.

    Attributes:
        name: its path.
        shape: its shape.
        scale: s, the root mean square of its first values; of zeros, the smallest matrix's.
        deviation: of the first posterior, noise * s.
        prior_deviation: prior * s.
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    deviation: float
    prior_deviation: float


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimizer and the numbers that it was made from; `print` shows them as a table.

    Attributes:
        optimizer: the transformation, for `make_step`.
        row: its name.
        learning_rate: the schedule.
        peak: its largest value.
        ess: effective sample size, num_examples / temperature.
        num_steps: of the whole run.
        b2: decay of the precision, 1 - 1 / num_steps.
        clip_step: bound on a weight's step, in deviations of the first posterior.
        noise: deviations of the first posterior, in units of the first weights.
        prior: deviation of the prior, in the same units.
        leaves: of every leaf.
    """

    optimizer: optax.GradientTransformationExtraArgs
    row: str
    learning_rate: optax.Schedule
    peak: float
    ess: float
    num_steps: int
    b2: float
    clip_step: float
    noise: float
    prior: float
    leaves: tuple[LeafChoice, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.row}: ess {self.ess:g}, b2 {self.b2:.8g}, {self.num_steps} steps",
            f"learning rate: up to {self.peak:g} in 5 %, then a cosine to 0; "
            f"a weight's step is at most {self.clip_step:g} deviations",
            f"{'leaf':30s} {'shape':>14s} {'rms':>9s} {'noise':>9s} {'prior':>9s}",
        ]
        for leaf in self.leaves:
            shape = "x".join(map(str, leaf.shape)) or "number"
            numbers = (leaf.scale, leaf.deviation, leaf.prior_deviation)
            lines.append(f"{leaf.name:30s} {shape:>14s}" + "".join(f" {x:9.3g}" for x in numbers))
        return "\n".join(lines)


def _recipe(
    row: str,
    params: Params,
    num_examples: int,
    num_steps: int,
    *,
    noise: float = NOISE,
    prior: float = PRIOR,
    temperature: float = 1.0,
    task: str = "classification",
    learning_rate: float | None = None,
    clip_step: float = CLIP_STEP,
    **options: Any,
) -> Recipe:
    """Make the optimizer of a row, and say what was chosen."""
    check_count("num_examples", num_examples)
    check_count("num_steps", num_steps)
    check_number("temperature", temperature)
    if isinstance(prior, Distribution) or "init" in options:
        raise ValueError(
            f"recipes.{row}: prior= is a width in units of the first weights, and the first "
            f"posterior N(params, (noise s)^2). Distributions go into blr.{row}(prior=, init=)."
        )
    peak = peak_rate(task, learning_rate)
    _tree.check_float_leaves(params, f"recipes.{row}")
    schedule = warm_cosine(peak, num_steps)
    clip_step = CLIP_STEP if clip_step is None else clip_step
    if options.get("b2") is None:
        options["b2"] = 1.0 - 1.0 / num_steps
    first = "init_precision" if row in UNSCALED else "hess_init"
    made = getattr(optimizers, row)(
        schedule,
        ess=num_examples / temperature,
        num_steps=num_steps,
        prior=relative_prior(prior),
        clip_step=clip_step,
        **{first: relative_noise(noise)},
        **options,
    )
    return Recipe(
        optimizer=made,
        row=row,
        learning_rate=schedule,
        peak=peak,
        ess=num_examples / temperature,
        num_steps=num_steps,
        b2=options["b2"],
        clip_step=clip_step,
        noise=noise,
        prior=prior,
        leaves=tuple(_leaf_choices(params, noise, prior, int(row == "mixture_ivon"))),
    )


def _leaf_choices(params: Params, noise: float, prior: float, leading: int) -> list[LeafChoice]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if any(isinstance(x, jax.ShapeDtypeStruct) for _, x in leaves):
        raise ValueError("recipes: params must be arrays, of whose values the sizes are taken.")
    found = scales(params, leading)
    if not concrete(found):
        return []
    sizes = np.asarray(found).tolist()
    return [
        LeafChoice(_tree.leaf_name(path) or "params", x.shape, s, noise * s, prior * s)
        for (path, x), s in zip(leaves, sizes, strict=True)
    ]


def ivon(
    params: Params,
    num_examples: int,
    num_steps: int,
    *,
    noise: float = NOISE,
    prior: float = PRIOR,
    temperature: float = 1.0,
    task: str = "classification",
    learning_rate: float | None = None,
    clip_step: float = CLIP_STEP,
    **options: object,
) -> Recipe:
    """Return IVON for a run of known length: noise, prior, rate and b2 follow from two counts.

    sigma_0 = noise s, prior deviation = prior s, ess = num_examples / temperature,
    b2 = 1 - 1 / num_steps, and no weight moves by more than clip_step sigma_0 in a step; s is the
    root mean square of each leaf's first values.

    Args:
        params: the first parameters, as drawn or pre-trained; only their sizes are looked at. In a
            group of `optax.partition` sizes of zeros are those of the group.
        num_examples: N, the training examples (for a language model, the tokens) that the mean
            loss stands for.
        num_steps: of the whole run; the schedule ends there, and later steps move nothing.
        noise: deviation of the first posterior in units of s; 0.3 for noisy labels.
        prior: deviation of the prior in units of s, the number that matters most: 1.7, 3.2 or 10,
            see `tune`.
        temperature: below 1 for a colder, narrower posterior.
        task: "classification", "language_model" or "regression", for the learning rate.
        learning_rate: its peak, in place of the task's.
        clip_step: bound on a weight's step, in deviations of the first posterior.
        options: others of `blr_optax.ivon`, but for `init`.

    Raises:
        ValueError: for counts or numbers out of range, an unknown task, integer parameters, and as
            the optimizer does.

    Source: measured on small tabular, image and text data (docs/payoff.md). Special case of
    `blr_update` as `ivon` is.

    Example:
      >>> import jax, jax.numpy as jnp, blr_optax as blr
      >>> params = {"w": jax.random.normal(jax.random.key(0), (50, 20)) / 50**0.5}
      >>> recipe = blr.recipes.ivon(params, num_examples=1000, num_steps=2000)
      >>> print(recipe.ess, recipe.b2)
      1000.0 0.9995
      >>> (leaf,) = recipe.leaves
      >>> print(leaf.name, round(leaf.scale, 2), round(leaf.deviation, 3))
      ['w'] 0.14 0.028
    """
    return _recipe(
        "ivon",
        params,
        num_examples,
        num_steps,
        noise=noise,
        prior=prior,
        temperature=temperature,
        task=task,
        learning_rate=learning_rate,
        clip_step=clip_step,
        **options,
    )


def vogn(params: Params, num_examples: int, num_steps: int, **options: object) -> Recipe:
    """Return VOGN for a run of known length: as `recipes.ivon`, from per-example gradients.

    Args:
        params, num_examples, num_steps: as in `recipes.ivon`.
        options: `noise=`, `prior=`, `temperature=`, `task=`, `learning_rate=`, `clip_step=` as in
            `recipes.ivon`, and others of `blr_optax.vogn`.

    Raises:
        ValueError: as `recipes.ivon`.

    Source: as `recipes.ivon`. Special case of `blr_update` as `vogn` is.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> recipe = blr.recipes.vogn({"w": jnp.full((3, 2), 0.5)}, 1000, 2000)
      >>> print(recipe.row, round(recipe.leaves[0].deviation, 3))
      vogn 0.1
    """
    given = cast("dict[str, Any]", options)
    return _recipe("vogn", params, num_examples, num_steps, **given)


def evon(params: Params, num_examples: int, num_steps: int, **options: object) -> Recipe:
    """Return EVON for a run of known length: as `recipes.ivon`, along learnt directions.

    Args:
        params, num_examples, num_steps: as in `recipes.ivon`.
        options: `noise=`, `prior=`, `temperature=`, `task=`, `learning_rate=`, `clip_step=` as in
            `recipes.ivon`, and others of `blr_optax.evon`.

    Raises:
        ValueError: as `recipes.ivon`.

    Source: as `recipes.ivon`. Special case of `blr_update` as `evon` is.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> recipe = blr.recipes.evon({"w": jnp.full((3, 2), 0.5)}, 1000, 2000)
      >>> print(recipe.row, round(recipe.leaves[0].deviation, 3))
      evon 0.1
    """
    given = cast("dict[str, Any]", options)
    return _recipe("evon", params, num_examples, num_steps, **given)


def bsam(params: Params, num_examples: int, num_steps: int, **options: object) -> Recipe:
    """Return bSAM for a run of known length: as `recipes.ivon`, with an adversary.

    Args:
        params, num_examples, num_steps: as in `recipes.ivon`.
        options: `noise=`, `prior=`, `temperature=`, `task=`, `learning_rate=`, `clip_step=` as in
            `recipes.ivon`, and others of `blr_optax.bsam`.

    Raises:
        ValueError: as `recipes.ivon`.

    Source: as `recipes.ivon`. Special case of `blr_update` as `bsam` is.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> recipe = blr.recipes.bsam({"w": jnp.full((3, 2), 0.5)}, 1000, 2000)
      >>> print(recipe.row, round(recipe.leaves[0].deviation, 3))
      bsam 0.1
    """
    given = cast("dict[str, Any]", options)
    return _recipe("bsam", params, num_examples, num_steps, **given)


def mixture_ivon(params: Params, num_examples: int, num_steps: int, **options: object) -> Recipe:
    """Return a mixture of IVONs for a run of known length: as `recipes.ivon`, stacked networks.

    Args:
        params, num_examples, num_steps: as in `recipes.ivon`.
        options: `noise=`, `prior=`, `temperature=`, `task=`, `learning_rate=`, `clip_step=` as in
            `recipes.ivon`, and others of `blr_optax.mixture_ivon`.

    Raises:
        ValueError: as `recipes.ivon`.

    Source: as `recipes.ivon`. Special case of `blr_update` as `mixture_ivon` is.

    Example:
      >>> import jax.numpy as jnp, blr_optax as blr
      >>> recipe = blr.recipes.mixture_ivon({"w": jnp.full((3, 2), 0.5)}, 1000, 2000)
      >>> print(recipe.row, round(recipe.leaves[0].deviation, 3))
      mixture_ivon 0.1
    """
    return _recipe(
        "mixture_ivon", params, num_examples, num_steps, **cast("dict[str, Any]", options)
    )
