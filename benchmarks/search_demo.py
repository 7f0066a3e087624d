"""Chooses the demo's hyper-parameters: as many configurations for every optimizer, no test data.

    python -m benchmarks.search_demo

Each configuration is trained `FOLDS` times. Fold f leaves another quarter of the training half out
to validate on, and has its own seed, none of the demo's; epochs, batches and schedule are the
demo's. The smallest mean validation NLL wins: of the prediction averaged over 64 samples for IVON,
of the only prediction there is for SGD and AdamW. The grids, the momentum, IVON's b2 and the
subtraction of the mean image come from earlier, smaller rounds on the same validation parts and
from one run on the whole training half, whose training loss diverged with b2 = 0.999.

Choices and all trials go into `results/search_demo.json`; the choices are copied by hand into
`blr_optax._demo.run.DEFAULTS`, and a test compares the two.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from blr_optax import metrics
from blr_optax._demo import run as experiment
from blr_optax._demo.folder import write_json

if TYPE_CHECKING:
    from jaxtyping import Array

RESULT = Path(__file__).parent / "results" / "search_demo.json"
FOLDS, FIRST_SEED = 4, 1000
GRIDS: dict[str, dict[str, list[float]]] = {
    "sgd": {
        "learning_rate": [0.03, 0.1, 0.2, 0.3, 0.5, 1.0],
        "weight_decay": [1e-4, 3e-4, 1e-3, 3e-3],
    },
    "adamw": {
        "learning_rate": [0.001, 0.003, 0.01, 0.02, 0.03, 0.1],
        "weight_decay": [0.03, 0.1, 0.3, 1.0],
    },
    "ivon": {
        "learning_rate": [1.0, 2.0, 3.0, 4.0],
        "hess_init": [0.1, 0.15, 0.3],
        "weight_decay": [3e-4, 1e-3],
    },
}


def configurations(name: str) -> list[dict[str, float]]:
    """Every point of an optimizer's grid."""
    grid = GRIDS[name]
    return [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]


def folds() -> list[tuple[Array, Array, Array, Array]]:
    """Training and validation examples of each fold, all out of the demo's training half."""
    data = experiment.load_data()
    quarter = len(data.train_x) // FOLDS
    parts = []
    for fold in range(FOLDS):
        rows = np.arange(len(data.train_x))
        held = (rows >= fold * quarter) & (rows < (fold + 1) * quarter)
        # What is subtracted must not know the validation part either.
        x, val_x = data.train_x[~held], data.train_x[held]
        mean = x.mean(axis=0)
        parts.append((x - mean, data.train_y[~held], val_x - mean, data.train_y[held]))
    return parts


@functools.partial(jax.jit, static_argnums=0)
def validate(
    name: str, hyper: dict[str, Array], seed: int, x: Array, y: Array, val_x: Array, val_y: Array
) -> dict[str, Array]:
    """Validation scores of one training run."""
    run = experiment.start(name, hyper, seed, experiment.EPOCHS, len(x))

    def epoch(run: experiment.Run, index: Array) -> tuple[experiment.Run, None]:
        return experiment.train_epoch(name, hyper, run, seed, index, x, y), None

    run, _ = jax.lax.scan(epoch, run, jnp.arange(experiment.EPOCHS))
    if name == "ivon":
        log_probs = experiment.averaged_log_probabilities(run, val_x, seed, experiment.SAMPLES)
    else:
        log_probs = experiment.log_probabilities(run, val_x)
    nll = metrics.nll(log_probs, val_y, log=True).mean()
    return {"nll": nll, "accuracy": metrics.accuracy(log_probs, val_y)}


def search(name: str) -> list[dict[str, Any]]:
    """All trials of one optimizer."""
    trials, parts = [], folds()
    for hyper in configurations(name):
        scores = [validate(name, hyper, FIRST_SEED + f, *part) for f, part in enumerate(parts)]
        folded = {key: [number(s[key]) for s in scores] for key in ("nll", "accuracy")}
        means = {f"mean_{key}": mean(values) for key, values in folded.items()}
        trials.append({**hyper, **means, **folded})
        print(name, hyper, means, flush=True)
    return trials


def number(value: Array) -> float | None:
    """A JSON number; None for what is not finite, which JSON has no word for."""
    return float(value) if np.isfinite(value) else None


def mean(values: list[float | None]) -> float | None:
    """The mean over folds; None when one of them diverged."""
    return None if None in values else float(np.mean(values))


def best(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial with the smallest mean NLL, the first one on ties, none that diverged."""
    return min((t for t in trials if t["mean_nll"] is not None), key=lambda t: t["mean_nll"])


def environment() -> dict[str, Any]:
    """What the numbers were made with."""
    packages = ("jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "system": platform.system(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "cpu_count": os.cpu_count(),
    }


def main() -> None:
    """Searches for all optimizers and writes the result."""
    trials = {name: search(name) for name in GRIDS}
    choices = {name: {key: best(rows)[key] for key in GRIDS[name]} for name, rows in trials.items()}
    result = {
        "selected_by": "smallest mean_nll, on the validation parts",
        "epochs": experiment.EPOCHS,
        "batch": experiment.BATCH,
        "folds": FOLDS,
        "configurations_per_optimizer": {name: len(rows) for name, rows in trials.items()},
        "fixed": {
            "momentum": experiment.MOMENTUM,
            "ivon_b2": experiment.IVON_B2,
            "samples": experiment.SAMPLES,
        },
        "choices": choices,
        "environment": environment(),
        "trials": trials,
    }
    RESULT.parent.mkdir(exist_ok=True)
    write_json(RESULT, result)
    print(choices)


if __name__ == "__main__":
    main()
