"""A character transformer on 20,000 characters of a play: perplexity on the next 24,000.

The effective sample size is the number of characters. AdamW is given its best early stop, and
dropout is printed beside both. Settings were chosen with seed 100 and the validation characters.
"""

from __future__ import annotations

import functools
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import blr_optax as blr
from benchmarks.payoff import figures
from benchmarks.payoff.beyond import transformer
from benchmarks.payoff.claims import Claim, unmeasured
from benchmarks.payoff.loop import one_step, transformation
from benchmarks.payoff.methods import METHODS, RECIPE, Numbers
from benchmarks.payoff.page import cell, markdown
from benchmarks.payoff.records import Job, Records, number
from benchmarks.payoff.tables import folder as package_folder

NAME, TASK = "language", "hamlet"
TRAIN, VALID, TEST = 20_000, 4_000, 24_000
STEPS, BATCH, EVERY, SEEDS = 3000, 16, 100, (0, 1, 2)
AVERAGES = (1, 4, 16, 64)
CONTESTANTS: dict[str, tuple[str, Numbers]] = {
    "AdamW 3e-3": ("adamw", {"lr": 3e-3, "wd": 0.01}),
    "AdamW 3e-3, weight decay 0.5": ("adamw", {"lr": 3e-3, "wd": 0.5}),
    "dropout 0.1": ("dropout", {"lr": 5e-3, "wd": 0.01, "rate": 0.1}),
    "IVON recipe": ("ivon", RECIPE["language_model"]),
}


@functools.cache
def text() -> tuple[np.ndarray, int]:
    """The play as numbers, from its first act on, and how many characters there are."""
    raw = (package_folder("shksprdata") / "texts/hamlet_gut.txt").read_text(errors="ignore")
    start = re.search(r"^ACT I\b", raw, re.MULTILINE)
    raw = re.sub(r"\s*\n\s*", "\n", raw[start.start() if start else 0 :])
    letters = sorted(set(raw[: TRAIN + VALID + TEST]))
    index = {c: i for i, c in enumerate(letters)}
    return np.array([index[c] for c in raw[: TRAIN + VALID + TEST]], np.int32), len(letters)


def windows(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Characters, and those that follow, in windows that do not overlap."""
    size = transformer.CONTEXT
    count = (len(part) - 1) // size
    cut = part[: count * size + 1]
    return cut[:-1].reshape(count, size), cut[1:].reshape(count, size)


def mean_nll(weights: Any, part: tuple[Any, Any]) -> Any:
    """Mean over all characters of a part."""
    return jnp.mean(transformer.nll(transformer.apply(weights, part[0]), part[1]))


def trainer(method: str, characters: int, steps: int = STEPS, every: int = EVERY) -> Any:
    """(hyper, seed, text, starts, valid, test) -> NLL of every view, and the validation curve."""
    row = METHODS[method]

    def loss(weights: Any, x: Any, y: Any, *drop: Any) -> Any:
        return jnp.mean(transformer.nll(transformer.apply(weights, x, *drop), y))

    def train(hyper: Any, seed: Any, chars: Any, starts: Any, valid: Any, test: Any) -> Any:
        first, noise, last = jax.random.split(jax.random.key(seed), 3)
        weights = transformer.initial(first, characters)
        tx = transformation(method, weights, jnp.float32(len(chars)), steps, hyper, noise)
        step = one_step(row, loss, tx)
        inside = jnp.arange(transformer.CONTEXT)

        def one(carry: Any, at: Any) -> tuple[Any, None]:
            t, start = at
            places = start[:, None] + inside
            drop = (jax.random.fold_in(noise, t), hyper["rate"]) if row.dropout else ()
            return step(*carry, chars[places], chars[places + 1], *drop), None

        def chunk(carry: Any, at: Any) -> tuple[Any, Any]:
            inner, best, least = carry
            inner, _ = jax.lax.scan(one, inner, at)
            found = mean_nll(inner[0], valid)
            best = jax.tree.map(lambda b, w: jnp.where(found < least, w, b), best, inner[0])
            return (inner, best, jnp.minimum(found, least)), found

        at = (jnp.arange(steps).reshape(-1, every), starts.reshape(steps // every, every, -1))
        carry = ((weights, tx.init(weights)), weights, jnp.float32(jnp.inf))
        ((weights, state), best, _), curve = jax.lax.scan(chunk, carry, at)
        views = {"mean": mean_nll(weights, test), "stopped": mean_nll(best, test)}
        if row.sampled:
            views |= averages(weights, state, hyper, last, test)
        return views, curve

    def averages(weights: Any, state: Any, hyper: Any, key: Any, test: Any) -> Any:
        def drawn(carry: Any, key: Any) -> tuple[Any, Any]:
            if row.dropout:
                logits = transformer.apply(weights, test[0], key, hyper["rate"])
            else:
                logits = transformer.apply(blr.posterior(state, weights).sample(key), test[0])
            # Logs of the sum of probabilities so far: one number per character is kept.
            total = jnp.logaddexp(carry[0], -transformer.nll(logits, test[1]))
            return (total, carry[1] + 1), -jnp.mean(total) + jnp.log(carry[1] + 1)

        start = jnp.full(test[1].shape, -jnp.inf), jnp.float32(0)
        _, found = jax.lax.scan(drawn, start, jax.random.split(key, AVERAGES[-1]))
        return {f"{count} samples": found[count - 1] for count in AVERAGES}

    return jax.jit(train)


_trainer = functools.cache(trainer)


def run(label: str, seed: int) -> dict[str, Any]:
    """Perplexity of every view."""
    method, hyper = CONTESTANTS[label]
    chars, characters = text()
    train, valid, test = np.split(chars, [TRAIN, TRAIN + VALID])
    starts = np.random.default_rng(seed).integers(
        0, TRAIN - transformer.CONTEXT - 1, (STEPS, BATCH)
    )
    begin = time.perf_counter()
    numbers = {k: jnp.float32(v) for k, v in hyper.items()}
    views, curve = _trainer(method, characters)(
        numbers, seed, train, starts.astype(np.int32), windows(valid), windows(test)
    )
    return {
        "hyper": hyper,
        "views": {k: {"perplexity": float(np.exp(v))} for k, v in views.items()},
        "curve": np.exp(np.asarray(curve)).tolist(),
        "seconds": time.perf_counter() - begin,
    }


def jobs(records: Records, optional: bool) -> list[Job]:
    """Every contestant with every seed; the play is part of bench-data."""
    if not optional:
        return []
    return [
        Job(f"{NAME}:{TASK}", method, label, seed, functools.partial(run, label, seed), hyper)
        for label, (method, hyper) in CONTESTANTS.items()
        for seed in SEEDS
    ]


def values(records: Records, label: str, view: str) -> np.ndarray:
    """Perplexity by seed."""
    method = CONTESTANTS[label][0]
    found = [records.get(f"{NAME}:{TASK}", method, label, seed) for seed in SEEDS]
    views = [{} if r is None else r["views"] for r in found]
    return np.array([number(v[view]["perplexity"]) if view in v else np.nan for v in views])


def claims(records: Records) -> list[Claim]:
    """16 samples against AdamW's best early stop, with dropout beside it."""
    text = "character model, perplexity: 16 samples of IVON less AdamW's best early stop"
    demand = "at most -0.4"
    d = values(records, "IVON recipe", "16 samples") - values(records, "AdamW 3e-3", "stopped")
    if np.isnan(d).any():
        return [unmeasured(text, demand)]
    dropout = values(records, "dropout 0.1", "16 samples").mean()
    says = f"{d.mean():+.2f}, wins {np.sum(d < 0)} of {len(d)} (dropout {dropout:.2f})"
    return [Claim(text, demand, says, bool(d.mean() <= -0.4))]


def section(records: Records) -> str:
    """Perplexity of every view."""
    views = ("mean", "stopped", *(f"{count} samples" for count in AVERAGES))
    lines = []
    for label in CONTESTANTS:
        line = [cell(values(records, label, view), 2) for view in views]
        if any(line):
            lines.append([label, *line])
    if not lines:
        return ""
    return (
        f"## A character transformer\n\nTest perplexity after {STEPS:,} steps on {TRAIN:,} "
        f"characters, {len(SEEDS)} seeds.\n\n{markdown(['perplexity', *views], lines)}\n"
        "![validation perplexity while training](figures/payoff_language.png)\n"
    )


def draw(records: Records, folder: Path) -> None:
    """Validation perplexity while training."""
    figure, ax = figures.plt.subplots(figsize=(5, 3.2), layout="constrained")
    for label, (method, _) in CONTESTANTS.items():
        found = [records.get(f"{NAME}:{TASK}", method, label, seed) for seed in SEEDS]
        curves = np.array([r["curve"] for r in found if r is not None], float)
        if len(curves):
            at = EVERY * np.arange(1, curves.shape[1] + 1)
            ax.plot(at, np.median(curves, 0), label=label)
    if ax.lines:
        ax.set(xlabel="step", ylabel="validation perplexity", ylim=(5, 20))
        ax.legend(fontsize=7)
        figures.save(figure, folder, NAME)
    figures.plt.close(figure)
