"""Segmentation of drawn shapes, with the uncertainty of every pixel.

A network of three dilated 3 x 3 convolutions of 24 channels names the shape of every pixel. It
trains on crops of one photograph and is tested on other crops of it and of another photograph. The
effective sample size is the number of training pixels. Scores are per pixel; "finds errors" is the
AUROC of the entropy for being wrong.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import blr_optax as blr
from benchmarks.payoff import figures
from benchmarks.payoff.beyond.shapes import CLASSES, SIDE, drawn, photographs
from benchmarks.payoff.claims import Claim, unmeasured
from benchmarks.payoff.loop import fan_in, one_step, transformation
from benchmarks.payoff.methods import METHODS, untuned
from benchmarks.payoff.page import cell, markdown
from benchmarks.payoff.records import Job, Records, number
from benchmarks.payoff.tasks import SPLITS, passes
from blr_optax import metrics

NAME, TASK = "segmentation", "shapes"
TRAIN, TEST, STEPS, BATCH, SAMPLES, CHANNELS = 100, 100, 1500, 4, 16, 24
DILATIONS = (1, 2, 4)
METHODS_SHOWN = ("adamw", "dropout", "ivon")
PLACES = ("same photograph", "other photograph")
SCORES = ("nll", "accuracy", "ece", "finds errors")


def initial(key: Any) -> dict[str, Any]:
    """First filters, as matrices, and biases."""
    weights, inputs = {}, 3
    for i, k in enumerate(jax.random.split(key, len(DILATIONS))):
        weights[f"w{i}"] = fan_in(k, 9 * inputs, CHANNELS, gain=2**0.5)
        weights[f"b{i}"] = jnp.zeros(CHANNELS)
        inputs = CHANNELS
    return {**weights, "w": fan_in(key, CHANNELS, len(CLASSES)), "b": jnp.zeros(len(CLASSES))}


def neighbours(x: Any, dilation: int) -> Any:
    """The channels of a pixel and of its eight neighbours, side by side.

    Times a matrix that is a convolution, and on a CPU much faster than XLA's.
    """
    edge = ((0, 0), (dilation, dilation), (dilation, dilation), (0, 0))
    wide, (_, height, width, _) = jnp.pad(x, edge), x.shape
    starts = [i * dilation for i in range(3)]
    return jnp.concatenate(
        [wide[:, i : i + height, j : j + width] for i in starts for j in starts], -1
    )


def apply(weights: dict[str, Any], x: Any, key: Any = None, rate: Any = 0.0) -> Any:
    """Logits of every pixel; with a key, channels are dropped per image."""
    for i, dilation in enumerate(DILATIONS):
        x = neighbours(x, dilation) @ weights[f"w{i}"]
        x = jax.nn.relu(x + weights[f"b{i}"])
        if key is not None:
            shape = (x.shape[0], 1, 1, x.shape[-1])
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, shape)
            x = jnp.where(kept, x / (1 - rate), 0.0)
    return x @ weights["w"] + weights["b"]


def loss(weights: dict[str, Any], x: Any, y: Any, *drop: Any) -> Any:
    """Mean cross-entropy of the pixels."""
    logits = apply(weights, x, *drop)
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))


def trainer(method: str) -> Any:
    """(hyper, seed, images, classes, rows, test images) -> log probabilities by view; jitted."""
    row = METHODS[method]

    def train(hyper: Any, seed: Any, x: Any, y: Any, rows: Any, test: Any) -> dict[str, Any]:
        first, noise, last = jax.random.split(jax.random.key(seed), 3)
        weights, steps = initial(first), len(rows)
        tx = transformation(method, weights, jnp.float32(y.size), steps, hyper, noise)
        step = one_step(row, loss, tx)

        def one(carry: Any, at: Any) -> tuple[Any, None]:
            t, rows = at
            drop = (jax.random.fold_in(noise, t), hyper["rate"]) if row.dropout else ()
            return step(*carry, x[rows], y[rows], *drop), None

        carry = (weights, tx.init(weights))
        weights, state = jax.lax.scan(one, carry, (jnp.arange(steps), rows))[0]
        views = {"mean": jax.nn.log_softmax(apply(weights, test))}

        def drawn_log_probs(key: Any) -> Any:
            if row.dropout:
                return jax.nn.log_softmax(apply(weights, test, key, hyper["rate"]))
            q = blr.posterior(state, weights)
            return jax.nn.log_softmax(apply(q.sample(key), test))

        if row.sampled:
            logs = jax.lax.map(drawn_log_probs, jax.random.split(last, SAMPLES))
            views["samples"] = jax.nn.logsumexp(logs, 0) - jnp.log(SAMPLES)
        return views

    return jax.jit(train)


_trainer = functools.cache(trainer)


@functools.cache
def data(split: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and classes by part, standardised by the training images."""
    rng = np.random.default_rng([split, 4])
    pictures = photographs()
    parts = {
        "train": drawn(pictures["china"], TRAIN, rng),
        PLACES[0]: drawn(pictures["china"], TEST, rng),
        PLACES[1]: drawn(pictures["flower"], TEST, rng),
    }
    center, deviation = (f(parts["train"][0], axis=(0, 1, 2)) for f in (np.mean, np.std))
    return {k: ((x - center) / deviation, y) for k, (x, y) in parts.items()}


def predictions(method: str, split: int) -> dict[str, np.ndarray]:
    """Log probabilities of both test parts, one after the other, by view."""
    parts = data(split)
    hyper = {k: jnp.float32(v) for k, v in untuned(method, "classification").items()}
    rows = passes(split, TRAIN, STEPS, BATCH)
    test = np.concatenate([parts[place][0] for place in PLACES])
    return jax.tree.map(np.asarray, _trainer(method)(hyper, split, *parts["train"], rows, test))


@jax.jit
def scores(log_probs: Any, labels: Any) -> dict[str, Any]:
    """Scores over all pixels."""
    probs = jnp.exp(log_probs).reshape(-1, len(CLASSES))
    probs, labels = probs / probs.sum(-1, keepdims=True), labels.reshape(-1)
    return {
        "nll": metrics.nll(probs, labels).mean(),
        "accuracy": 100 * metrics.accuracy(probs, labels),
        "ece": metrics.calibration(probs, labels).ece,
        "finds errors": metrics.auroc(metrics.entropy(probs), ~metrics.correct(probs, labels)),
    }


def run(method: str, split: int) -> dict[str, Any]:
    """Scores per pixel, by view and place."""
    parts, begin = data(split), time.perf_counter()
    found = predictions(method, split)
    seconds = time.perf_counter() - begin
    views = {}
    for view, log_probs in found.items():
        for place, part in zip(PLACES, np.split(log_probs, 2), strict=True):
            views[f"{view}, {place}"] = {
                k: float(v) for k, v in scores(part, parts[place][1]).items()
            }
    return {"hyper": untuned(method, "classification"), "views": views, "seconds": seconds}


def jobs(records: Records, optional: bool) -> list[Job]:
    """Every method with its untuned numbers."""
    return [
        Job(f"{NAME}:{TASK}", method, "untuned", split, functools.partial(run, method, split),
            untuned(method, "classification"))
        for method in METHODS_SHOWN
        for split in SPLITS
    ]  # fmt: skip


def values(records: Records, method: str, view: str, metric: str) -> np.ndarray:
    """A score by split."""
    found = [records.get(f"{NAME}:{TASK}", method, "untuned", s) for s in SPLITS]
    views = [{} if r is None else r["views"] for r in found]
    return np.array([number(v[view][metric]) if view in v else np.nan for v in views])


def claims(records: Records) -> list[Claim]:
    """Samples against AdamW, on both photographs; nothing was demanded in numbers."""
    return [_claim(records, place) for place in PLACES]


def _claim(records: Records, place: str) -> Claim:
    text, demand = f"segmentation, {place}, NLL: IVON recipe / AdamW 1e-3", "below 1"
    x = values(records, "ivon", f"samples, {place}", "nll")
    y = values(records, "adamw", f"mean, {place}", "nll")
    if np.isnan(x + y).any():
        return unmeasured(text, demand)
    relative = float(np.exp(np.mean(np.log(x) - np.log(y))))
    dropout = values(records, "dropout", f"samples, {place}", "nll").mean() / y.mean()
    says = f"{relative:.3f}, wins {np.sum(x < y)} of {len(x)} (dropout {dropout:.3f})"
    return Claim(text, demand, says, relative < 1)


def section(records: Records) -> str:
    """Scores per pixel."""
    lines = []
    for place in PLACES:
        for method in METHODS_SHOWN:
            for view in ("mean", "samples"):
                found = [values(records, method, f"{view}, {place}", m) for m in SCORES]
                if not np.isnan(found).all():
                    label = f"{place}: {method}, {view}"
                    digits = [1 if metric == "accuracy" else 3 for metric in SCORES]
                    lines.append([label, *map(cell, found, digits)])
    if not lines:
        return ""
    return (
        f"## The uncertainty of pixels\n\nShapes drawn over photographs, {SIDE} x {SIDE} pixels; "
        f"{TRAIN} training images, {STEPS:,} steps.\n\n{markdown(['', *SCORES], lines)}\n"
        "![images, classes, predictions and entropies](figures/payoff_segmentation.png)\n"
    )


def draw(records: Records, folder: Path) -> None:
    """Four test images of the other photograph: image, truth, prediction, entropy."""
    if np.isnan(values(records, "ivon", f"samples, {PLACES[1]}", "nll")).any():
        return
    target = folder / f"payoff_{NAME}.png"
    if target.exists():  # it takes a training run, and shows the same whenever it is drawn
        return
    x, y = data(SPLITS[0])[PLACES[1]]
    plt = figures.plt
    figure, axes = plt.subplots(4, 6, figsize=(9, 6), layout="constrained")
    kept = {m: predictions(m, SPLITS[0]) for m in ("adamw", "ivon")}
    views = {"AdamW": kept["adamw"]["mean"][TEST:], "IVON": kept["ivon"]["samples"][TEST:]}
    for i, line in enumerate(axes):
        image = (x[i] - x[i].min()) / np.ptp(x[i])
        shown = [("image", image, {}), ("truth", y[i], {"vmin": 0, "vmax": 3})]
        for name, log_probs in views.items():
            p = np.exp(log_probs[i])
            entropy = -np.sum(p * np.log(np.maximum(p, 1e-30)), -1)
            shown.append((name, p.argmax(-1), {"vmin": 0, "vmax": 3}))
            shown.append((f"{name}, entropy", entropy, {"vmin": 0, "vmax": 1.2, "cmap": "magma"}))
        for ax, (title, picture, options) in zip(line, shown, strict=True):
            ax.imshow(picture, interpolation="nearest", **options)
            ax.set_axis_off()
            if i == 0:
                ax.set_title(title, fontsize=9)
    figures.save(figure, folder, NAME)
