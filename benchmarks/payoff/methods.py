"""The contestants: a transformation each, its untuned numbers, and the box of its search.

All share first weights, batches, steps and the schedule: 5 % warm-up, then a cosine to zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import blr_optax as blr
from blr_optax.optimizers._first_weights import CLIP_STEP, NOISE, PRIOR
from blr_optax.recipes._recipe import RATES

WARM_UP, MEMBERS, CONFIGURATIONS = 0.05, 5, 8
Numbers = dict[str, float]
Box = dict[str, tuple[float, float]]


class Setting(NamedTuple):
    """What a transformation is made of, traced but for `steps`.

    Attributes:
        hyper: numbers by name.
        scales: root mean square of the first weights, one number per leaf.
        n: number of training rows.
        steps: of the run.
        key: of the method's noise.
    """

    hyper: dict[str, Any]
    scales: Any
    n: Any
    steps: int
    key: Any

    def shape(self, t: Any) -> Any:
        """The schedule, at most 1."""
        warm = WARM_UP * self.steps
        done = jnp.maximum(t - warm, 0) / (self.steps - warm)
        return jnp.minimum((t + 1) / warm, 0.5 * (1 + jnp.cos(jnp.pi * done)))

    def rate(self, t: Any) -> Any:
        """The learning rate at a step."""
        return self.hyper["lr"] * self.shape(t)

    @property
    def b2(self) -> float:
        """Decay of the precision: it forgets its first value by a factor e within the run."""
        return 1 - 1 / self.steps


@dataclasses.dataclass(frozen=True)
class Method:
    """A contestant.

    Attributes:
        make: setting -> transformation, with the schedule inside.
        untuned: numbers by kind, of the recipe or the usual defaults.
        box: of the search, by kind: log-uniform ranges.
        posterior: whether gradients are those of `blr.estimate`.
        sampled: whether its predictions are averaged over a posterior, or over dropout masks.
        dropout: whether units are dropped.
        members: of an ensemble of independent runs.
        search: the method whose search it takes its tuned numbers from, by default its own.
    """

    make: Callable[[Setting], optax.GradientTransformation]
    untuned: dict[str, Numbers]
    box: dict[str, Box]
    posterior: bool = False
    sampled: bool = False
    dropout: bool = False
    members: int = 1
    search: str = ""


def both(x: Any) -> dict[str, Any]:
    """The same for both kinds."""
    return {"classification": x, "regression": x}


def adamw(s: Setting) -> optax.GradientTransformation:
    """AdamW; a global log noise does not decay."""
    mask = {name: name != "log_noise" for name in s.scales}
    return optax.adamw(s.rate, weight_decay=s.hyper["wd"], mask=mask)


def sam(s: Setting) -> optax.GradientTransformation:
    """SAM over SGD with momentum; its radius is fixed."""
    return blr.sam(s.rate, rho=0.05, weight_decay=s.hyper["wd"])


class Recipe(NamedTuple):
    """What the recipe gives every leaf, per example: of the first posterior and of the prior.

    Attributes:
        ess: N / temperature.
        first: h_0, so that the first deviation is noise * scale.
        prior: delta, so that the prior's deviation is prior * scale.
    """

    ess: Any
    first: Any
    prior: Any


def recipe(s: Setting) -> Recipe:
    """Precisions from the scales of the first weights."""
    ess = s.n / s.hyper.get("temperature", 1.0)
    prior = jax.tree.map(lambda r: 1 / (ess * (s.hyper["prior"] * r) ** 2), s.scales)
    total = jax.tree.map(lambda r: 1 / (ess * (s.hyper["noise"] * r) ** 2), s.scales)
    return Recipe(ess, jax.tree.map(lambda t, d: t - d, total, prior), prior)


def ivon_like(make: Callable) -> Callable[[Setting], optax.GradientTransformation]:
    """IVON or EVON by the recipe, of which `num_steps=` would not know what is padding."""

    def transformation(s: Setting) -> optax.GradientTransformation:
        r = recipe(s)
        return make(
            s.rate, ess=r.ess, hess_init=r.first, weight_decay=r.prior, b2=s.b2,
            clip_step=s.hyper["clip_step"], key=s.key,
        )  # fmt: skip

    return transformation


def vogn_like(make: Callable, **options: Any) -> Callable[[Setting], optax.GradientTransformation]:
    """VOGN or bSAM by the recipe; they take total precisions and rescale nothing."""

    def transformation(s: Setting) -> optax.GradientTransformation:
        r = recipe(s)
        first = jax.tree.map(lambda h, d: r.ess * (h + d), r.first, r.prior)
        prior = jax.tree.map(lambda d: r.ess * d, r.prior)
        return make(
            s.rate, ess=r.ess, prior_precision=prior, init_precision=first, b2=s.b2,
            clip_step=s.hyper["clip_step"], key=s.key, **options,
        )  # fmt: skip

    return transformation


ADAMW_BOX: Box = {"lr": (5e-4, 2e-2), "wd": (0.03, 5.0)}
UNTUNED_ADAMW: Numbers = {"lr": 1e-3, "wd": 1e-4}
# The library's own numbers: those of `blr.recipes.ivon(params, num_examples, num_steps, task=...)`.
RECIPE: dict[str, Numbers] = {
    task: {"noise": NOISE, "prior": PRIOR, "lr": rate, "clip_step": CLIP_STEP}
    for task, rate in RATES.items()
}
RECIPE_BOX: dict[str, Box] = {
    "classification": {"lr": (0.5, 50.0), "noise": (0.1, 0.4), "prior": (1.3, 10.0)},
    "regression": {"lr": (0.02, 0.5), "noise": (0.1, 0.4), "prior": (1.3, 10.0)},
}


def bayes(make: Callable) -> Method:
    """A method that follows the recipe and averages over its posterior."""
    return Method(make, RECIPE, RECIPE_BOX, posterior=True, sampled=True)


METHODS: dict[str, Method] = {
    "adamw": Method(adamw, both(UNTUNED_ADAMW), both(ADAMW_BOX)),
    "dropout": Method(
        adamw, both({"lr": 1e-3, "wd": 1e-4, "rate": 0.1}),
        both({**ADAMW_BOX, "rate": (0.05, 0.5)}), sampled=True, dropout=True,
    ),
    "ensemble": Method(
        adamw, both(UNTUNED_ADAMW), both(ADAMW_BOX), members=MEMBERS, search="adamw"
    ),
    "sam": Method(
        sam,
        {"classification": {"lr": 0.05, "wd": 5e-4}, "regression": {"lr": 5e-3, "wd": 5e-4}},
        {"classification": {"lr": (3e-3, 0.3), "wd": (1e-4, 3e-2)},
         "regression": {"lr": (3e-4, 3e-2), "wd": (1e-4, 3e-2)}},
        posterior=True,
    ),
    "ivon": bayes(ivon_like(blr.ivon)),
    "vogn": bayes(vogn_like(blr.vogn)),
    "evon": bayes(ivon_like(blr.evon)),
    "bsam": bayes(vogn_like(blr.bsam, damping=0.0)),
}  # fmt: skip


def untuned(method: str, kind: str) -> Numbers:
    """The numbers of a method that nobody searches."""
    return dict(METHODS[method].untuned[kind])


def halton(index: int, base: int) -> float:
    """The radical inverse: digits of the index, mirrored at the point."""
    found, share = 0.0, 1.0
    while index:
        share /= base
        index, digit = divmod(index, base)
        found += share * digit
    return found


def configurations(method: str, kind: str, count: int = CONFIGURATIONS) -> list[Numbers]:
    """The first Halton points of the box; what it leaves out stays untuned."""
    box = METHODS[method].box[kind]
    found = []
    for index in range(1, count + 1):
        point = [halton(index, base) for base in (2, 3, 5, 7)[: len(box)]]
        chosen = {
            name: float(np.exp(np.log(low) + u * np.log(high / low)))
            for (name, (low, high)), u in zip(box.items(), point, strict=True)
        }
        found.append(untuned(method, kind) | chosen)
    return found
