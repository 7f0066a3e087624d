"""A bandit on digits: an image a round, ten arms, reward 1 for its class; regret counts the misses.

A network with an output per arm is trained by one step a round on what was played so far, at a
constant rate. The arm is that of the largest output of the network at its weights (greedy; with
probability 0.1 any arm, epsilon), of one dropout mask, or of one draw of the posterior (Thompson
sampling). The recipe knows the number of rounds. Settings: the untuned ones; the others get ten
times AdamW's rate as well, for a short run learns slowly at 1e-3.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import blr_optax as blr
from benchmarks.payoff import figures
from benchmarks.payoff.claims import Claim, unmeasured
from benchmarks.payoff.loop import fan_in, one_step, scales
from benchmarks.payoff.methods import METHODS, RECIPE, Numbers, Setting
from benchmarks.payoff.page import cell, markdown
from benchmarks.payoff.records import Job, Records
from benchmarks.payoff.tasks import BOUND, SPLITS, table

NAME, TASK = "bandit", "digits"
ROUNDS, BATCH, HIDDEN, ARMS, EPSILON = 3000, 32, 100, 10, 0.1
SHOWN = (500, 1000, 2000, 3000)
CONTESTANTS: dict[str, tuple[str, Numbers]] = {
    "greedy": ("adamw", {"lr": 1e-3, "wd": 1e-4}),
    "epsilon-greedy": ("adamw", {"lr": 1e-3, "wd": 1e-4}),
    "dropout, Thompson": ("dropout", {"lr": 1e-3, "wd": 1e-4, "rate": 0.1}),
    "greedy, rate 1e-2": ("adamw", {"lr": 1e-2, "wd": 1e-4}),
    "epsilon-greedy, rate 1e-2": ("adamw", {"lr": 1e-2, "wd": 1e-4}),
    "dropout, Thompson, rate 1e-2": ("dropout", {"lr": 1e-2, "wd": 1e-4, "rate": 0.1}),
    "IVON recipe, Thompson": ("ivon", RECIPE["classification"]),
    "IVON recipe, greedy at the mean": ("ivon", RECIPE["classification"]),
}


class Steady(Setting):
    """A setting whose rate stays constant after the warm-up: a bandit never ends."""

    def shape(self, t: Any) -> Any:
        return jnp.minimum((t + 1) / (0.05 * self.steps), 1.0)


class Played(NamedTuple):
    """What was seen, played and earned, a row per round."""

    x: Any
    arm: Any
    reward: Any


def outputs(weights: dict[str, Any], x: Any, key: Any = None, rate: Any = 0.0) -> Any:
    """A logit of the reward for every arm."""
    h = jax.nn.relu(x @ weights["w1"] + weights["b1"])
    if key is not None:
        h = jnp.where(jax.random.bernoulli(key, 1 - rate, h.shape), h / (1 - rate), 0.0)
    return h @ weights["w2"] + weights["b2"]


def loss(weights: dict[str, Any], x: Any, arm: Any, reward: Any, *drop: Any) -> Any:
    """Cross-entropy of the rewards of the arms that were played."""
    logits = jnp.take_along_axis(outputs(weights, x, *drop), arm[:, None], 1)[:, 0]
    return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(logits, reward))


def player(label: str, rounds: int = ROUNDS) -> Any:
    """(hyper, seed, images, classes) -> misses by round; jitted."""
    method = METHODS[CONTESTANTS[label][0]]
    thompson = "Thompson" in label

    def play(hyper: dict[str, Any], seed: Any, images: Any, classes: Any) -> Any:
        first, second, noise, keys = jax.random.split(jax.random.key(seed), 4)
        weights = {
            "w1": fan_in(first, images.shape[1], HIDDEN, gain=2**0.5), "b1": jnp.zeros(HIDDEN),
            "w2": fan_in(second, HIDDEN, ARMS), "b2": jnp.zeros(ARMS),
        }  # fmt: skip
        n = jnp.float32(rounds)
        tx = method.make(Steady(hyper, scales(weights), n, rounds, noise))
        step = one_step(method, loss, tx)

        def choice(weights: Any, state: Any, x: Any, key: Any) -> Any:
            if thompson and method.posterior:
                return outputs(blr.posterior(state, weights).sample(key), x).argmax()
            if thompson:
                return outputs(weights, x, key, hyper["rate"]).argmax()
            best = outputs(weights, x).argmax()
            if not label.startswith("epsilon"):
                return best
            explore, arm = jax.random.split(key)
            at_random = jax.random.randint(arm, (), 0, ARMS)
            return jnp.where(jax.random.bernoulli(explore, EPSILON), at_random, best)

        def one(carry: Any, t: Any) -> tuple[Any, Any]:
            weights, state, seen = carry
            act, replay, drop = jax.random.split(jax.random.fold_in(keys, t), 3)
            arm = choice(weights, state, images[t], act)
            reward = (arm == classes[t]).astype(jnp.float32)
            seen = Played(seen.x, seen.arm.at[t].set(arm), seen.reward.at[t].set(reward))
            rows = jax.random.randint(replay, (BATCH,), 0, t + 1)
            batch = (seen.x[rows], seen.arm[rows], seen.reward[rows])
            more = (drop, hyper["rate"]) if method.dropout else ()
            weights, state = step(weights, state, *batch, *more)
            return (weights, state, seen), 1 - reward

        seen = Played(images, jnp.zeros(rounds, int), jnp.zeros(rounds))
        carry = (weights, tx.init(weights), seen)
        return jax.lax.scan(one, carry, jnp.arange(rounds))[1]

    return jax.jit(play)


_player = functools.cache(player)


def run(label: str, seed: int) -> dict[str, Any]:
    """Regret after some rounds, and every 50 of them."""
    x, y = table(TASK)
    order = np.random.default_rng([seed, 2]).integers(0, len(x), ROUNDS)
    x = np.clip((x - x.mean(0)) / (x.std(0) + 1e-6), -BOUND, BOUND)[order].astype(np.float32)
    numbers = {k: jnp.float32(v) for k, v in CONTESTANTS[label][1].items()}
    begin = time.perf_counter()
    regret = np.cumsum(np.asarray(_player(label)(numbers, seed, x, y[order])))
    return {
        "hyper": CONTESTANTS[label][1],
        "views": {"regret": {str(t): float(regret[t - 1]) for t in SHOWN}},
        "curve": regret[49::50].tolist(),
        "seconds": time.perf_counter() - begin,
    }


def jobs(records: Records, optional: bool) -> list[Job]:
    """Every contestant with every seed."""
    return [
        Job(f"{NAME}:{TASK}", method, label, seed, functools.partial(run, label, seed), hyper)
        for label, (method, hyper) in CONTESTANTS.items()
        for seed in SPLITS
    ]


def values(records: Records, label: str, rounds: int) -> np.ndarray:
    """Regret by seed."""
    method = CONTESTANTS[label][0]
    found = [records.get(f"{NAME}:{TASK}", method, label, s) for s in SPLITS]
    return np.array([np.nan if r is None else r["views"]["regret"][str(rounds)] for r in found])


def claims(records: Records) -> list[Claim]:
    """Thompson sampling from the posterior against its rivals; nothing was demanded in numbers."""
    text, demand = "bandit, regret of IVON Thompson sampling", "below epsilon-greedy and dropout"
    regret = {label: values(records, label, ROUNDS).mean() for label in CONTESTANTS}
    ours = regret["IVON recipe, Thompson"]
    epsilon, dropout = (
        min(v for k, v in regret.items() if k.startswith(name)) for name in ("epsilon", "dropout")
    )
    if np.isnan(sum(regret.values())):
        return [unmeasured(text, demand)]
    at_mean = regret["IVON recipe, greedy at the mean"]
    says = f"{ours:.0f} (better rate of epsilon-greedy {epsilon:.0f}, of dropout {dropout:.0f})"
    return [
        Claim(text, demand, says, bool(ours < min(epsilon, dropout))),
        Claim("bandit, regret of sampling over greedy at the mean, both IVON", "below",
              f"{ours:.0f} against {at_mean:.0f}", bool(ours < at_mean)),
    ]  # fmt: skip


def section(records: Records) -> str:
    """Regret over rounds."""
    lines = []
    for label in CONTESTANTS:
        line = [cell(values(records, label, rounds), 0) for rounds in SHOWN]
        if any(line):
            lines.append([label, *line])
    if not lines:
        return ""
    table = markdown(["misses after", *(f"{t:,} rounds" for t in SHOWN)], lines)
    text = "## A bandit on digits\n\nOne image a round, a reward for the right one of ten arms.\n\n"
    return f"{text}{table}\n![regret of the bandits](figures/payoff_bandit.png)\n"


def draw(records: Records, folder: Path) -> None:
    """Regret over rounds."""
    figure, ax = figures.plt.subplots(figsize=(5, 3.2), layout="constrained")
    for label, (method, _) in CONTESTANTS.items():
        found = [records.get(f"{NAME}:{TASK}", method, label, s) for s in SPLITS]
        curves = np.array([r["curve"] for r in found if r is not None])
        if len(curves):
            at = 50 * np.arange(1, curves.shape[1] + 1)
            (line,) = ax.plot(at, curves.mean(0), label=label)
            ax.fill_between(at, curves.min(0), curves.max(0), alpha=0.15, color=line.get_color())
    if ax.lines:
        ax.set(xlabel="round", ylabel="misses so far")
        ax.legend(fontsize=7)
        figures.save(figure, folder, NAME)
    figures.plt.close(figure)
