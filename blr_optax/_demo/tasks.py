"""The two kinds of task of the demo: data, network, loss, and how a prediction is scored.

    regression       diabetes (442 x 10): net 10-50-50-1 and one noise deviation for all, learnt
                     with the weights; inputs and targets standardised by the training part; 60 %
                     train, 10 % validate, 30 % test
    classification   digits (1797 x 8 x 8): net 64-100-100-10; the training part's mean image is
                     subtracted and its one deviation divides; 45 % train, 10 % validate, 45 % test

ReLU, flax.linen, flax's default initialisation. Every seed draws its own parts. Noisy labels are
replaced with probability 0.15 by one of the ten at random, in all three parts. Shifted images are
those of the test part moved two pixels down and two to the right, zeros coming in.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import blr_optax as blr
from blr_optax import metrics

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from blr_optax._predict_distribution import PredictiveMixture

NOISY, SHIFT, LEVEL = 0.15, 2, 0.9


class Data(NamedTuple):
    """The parts of every seed, seeds in front; `origin` and `unit` give targets their own unit."""

    train_x: Array
    train_y: Array
    val_x: Array
    val_y: Array
    test_x: Array
    test_y: Array
    shifted_x: Array | None
    origin: Array
    unit: Array


def _of(rows: list[dict[str, Any]]) -> Data:
    """One row for every seed."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    stacked = {name: jnp.asarray(np.stack(column)) for name, column in columns.items()}
    return Data(**{"shifted_x": None, **stacked})


@functools.cache
def network(*widths: int) -> Any:
    """The flax module: dense layers with ReLU between them."""
    from flax import linen

    layers = [layer for width in widths[:-1] for layer in (linen.Dense(width), linen.relu)]
    return linen.Sequential([*layers, linen.Dense(widths[-1])])


# --- regression with learnt noise -----------------------------------------------------------------


def load_diabetes(seeds: tuple[int, ...], noisy: float) -> Data:
    """The parts, standardised."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    rows = []
    for seed in seeds:
        parts = _split(len(y), seed, 0.6, 0.1)
        center, deviation = x[parts["train"]].mean(0), x[parts["train"]].std(0)
        origin, unit = y[parts["train"]].mean(), y[parts["train"]].std()
        row: dict[str, Any] = {"origin": np.float32(origin), "unit": np.float32(unit)}
        for name, index in parts.items():
            row[f"{name}_x"] = np.float32((x[index] - center) / deviation)
            row[f"{name}_y"] = np.float32((y[index] - origin) / unit)
        rows.append(row)
    return _of(rows)


def start_regression(key: Any) -> Any:
    """The first parameters: of the network, and the noise's logarithm, 0 for the targets' own."""
    net = network(50, 50, 1).init(key, jnp.zeros((1, 10)))
    return {"net": net, "log_noise": jnp.zeros(())}


def observation(params: Any, x: Array) -> tuple[Array, Array]:
    """Mean and variance of a target."""
    return network(50, 50, 1).apply(params["net"], x)[..., 0], jnp.exp(2.0 * params["log_noise"])


def regression_loss(params: Any, x: Array, y: Array) -> Array:
    """The mean of -log N(y | f(x), s^2), up to a constant."""
    mean, variance = observation(params, x)
    return 0.5 * jnp.mean(jnp.square(y - mean) / variance + jnp.log(variance))


def distribution(key: Any, q: Any, x: Array, samples: int) -> PredictiveMixture:
    """The prediction averaged over samples of q; of [params] at these."""
    return blr.predict_distribution(key, q, observation, x, samples=samples)


def regression_scores(found: PredictiveMixture, y: Array) -> dict[str, Array]:
    """NLL of standardised targets, share inside the 90 % interval, error of the mean."""
    inside = jnp.abs(found.cdf(y) - 0.5) <= LEVEL / 2  # between the quantiles at 0.05 and 0.95
    return {
        "nll": -jnp.mean(found.log_prob(y)),
        "coverage": jnp.mean(inside.astype(jnp.float32)),
        "rmse": jnp.sqrt(jnp.mean(jnp.square(found.mean - y))),
    }


# --- classification -------------------------------------------------------------------------------


def load_digits(seeds: tuple[int, ...], noisy: float) -> Data:
    """The parts, with noisy labels, or with a shifted copy of the test part."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, size = np.asarray(pixels, np.float32), len(labels)
    moved = np.zeros((size, 8, 8), np.float32)
    moved[:, SHIFT:, SHIFT:] = x.reshape(size, 8, 8)[:, :-SHIFT, :-SHIFT]
    moved = moved.reshape(size, 64)
    rows = []
    for seed in seeds:
        parts = _split(size, seed, 0.45, 0.1)
        draw = np.random.RandomState([1, seed])
        wrong, others = draw.rand(size) < noisy, draw.randint(0, 10, size)
        y = np.where(wrong, others, labels)
        center, deviation = x[parts["train"]].mean(0), x[parts["train"]].std()
        row: dict[str, Any] = {"origin": np.float32(0.0), "unit": np.float32(1.0)}
        for name, index in parts.items():
            row[f"{name}_x"], row[f"{name}_y"] = (x[index] - center) / deviation, y[index]
        if not noisy:
            row["shifted_x"] = (moved[parts["test"]] - center) / deviation
        rows.append(row)
    return _of(rows)


def start_classification(key: Any) -> Any:
    """The first parameters."""
    return network(100, 100, 10).init(key, jnp.zeros((1, 64)))


def logits(params: Any, x: Array) -> Array:
    """The network's."""
    return network(100, 100, 10).apply(params, x)


def classification_loss(params: Any, x: Array, y: Array) -> Array:
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def log_probabilities(key: Any, q: Any, x: Array, samples: int) -> Float[Array, "n 10"]:
    """The prediction averaged over samples of q; of [params] at these."""
    if isinstance(q, list):
        return jax.nn.log_softmax(logits(q[0], x))
    return jnp.log(blr.predict(key, q, logits, x, samples=samples).probabilities)


def classification_scores(found: Array, y: Array) -> dict[str, Array]:
    """NLL, accuracy, expected calibration error in 15 bins of equal width."""
    probs = jnp.exp(found)
    return {
        "nll": metrics.nll(found, y, log=True).mean(),
        "accuracy": metrics.accuracy(probs, y),
        "ece": metrics.calibration(probs, y).ece,
    }


def auroc(found: Array, shifted: Array) -> Array:
    """The probability that a shifted image is the less certain one of a pair."""
    doubt = metrics.in_vs_out(metrics.entropy(jnp.exp(shifted)), metrics.entropy(jnp.exp(found)))
    return metrics.auroc(*doubt)


# --- parts ----------------------------------------------------------------------------------------


def _split(size: int, seed: int, train: float, val: float) -> dict[str, np.ndarray]:
    order = np.random.RandomState([0, seed]).permutation(size)
    parts = np.split(order, [round(train * size), round((train + val) * size)])
    return dict(zip(("train", "val", "test"), parts, strict=True))


class Task(NamedTuple):
    """What the demo needs of a kind of task; `names` are those of its scores."""

    names: tuple[str, ...]
    load: Any
    start: Any
    loss: Any
    predict: Any
    scores: Any


TASKS = {
    "regression": Task(
        ("nll", "coverage", "rmse"), load_diabetes, start_regression, regression_loss,
        distribution, regression_scores,
    ),
    "classification": Task(
        ("nll", "accuracy", "ece"), load_digits, start_classification, classification_loss,
        log_probabilities, classification_scores,
    ),
}  # fmt: skip


class Part(NamedTuple):
    """One part of the demo; `said` are the scores of its closing lines, the first has the wins."""

    title: str
    task: str
    steps: int
    said: tuple[str, ...]
    figure: str
    noisy: float = 0.0

    @property
    def headline(self) -> str:
        """The score that is compared seed by seed."""
        return self.said[0]


PARTS = {
    "a": Part(
        "diabetes, intervals of 90 %", "regression", 3000, ("nll", "coverage"), "intervals.png"
    ),
    "b": Part(
        "digits with 15 % random labels", "classification", 2000, ("nll",), "label_noise.png", NOISY
    ),
    "c": Part(
        "digits against their shifted copy", "classification", 2000, ("auroc", "nll"), "shifted.png"
    ),
}
