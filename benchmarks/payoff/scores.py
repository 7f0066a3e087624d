"""Scores of padded predictions: rows beyond the last do not count."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from blr_optax import metrics

INSIDE = (0.05, 0.95)  # of the predictive distribution: the 90 % interval
IGNORED = -1
NOISE_GRID = np.linspace(-4.0, 2.0, 121, dtype=np.float32)


@jax.jit
def of_classes(log_probs: Any, labels: Any) -> dict[str, Any]:
    """NLL, accuracy (%), ECE in 15 bins and Brier score; labels -1 are padding."""
    probs = jnp.exp(log_probs)
    probs = probs / probs.sum(-1, keepdims=True)
    used = (labels != IGNORED).astype(jnp.float32)
    labels = jnp.maximum(labels, 0)
    nll = -jnp.take_along_axis(log_probs, labels[:, None], 1)[:, 0]
    return {
        "nll": jnp.sum(nll * used) / used.sum(),
        "accuracy": 100 * metrics.accuracy(probs, labels, weights=used),
        "ece": metrics.calibration(probs, labels, weights=used).ece,
        "brier": metrics.brier(probs, labels, weights=used).mean(),
    }


def _mixture(mean: Any, log_noise: Any, y: Any) -> tuple[Any, Any]:
    """Log density and distribution function of the average over samples of N(f, s^2), at y."""
    scaled = (y - mean) * jnp.exp(-log_noise)[:, None]
    log_density = jax.nn.logsumexp(norm.logpdf(scaled) - log_noise[:, None], 0)
    return log_density - jnp.log(len(mean)), norm.cdf(scaled).mean(0)


@jax.jit
def of_numbers(mean: Any, log_noise: Any, y: Any, mask: Any) -> dict[str, Any]:
    """NLL, RMSE and coverage of 90 % intervals of an average over samples."""
    log_density, below = _mixture(mean, log_noise, y)
    inside = (below > INSIDE[0]) & (below < INSIDE[1])

    def average(x: Any) -> Any:
        return jnp.sum(jnp.where(mask > 0, x, 0.0)) / mask.sum()

    return {
        "nll": average(-log_density),
        "rmse": jnp.sqrt(average((mean.mean(0) - y) ** 2)),
        "coverage": average(inside.astype(jnp.float32)),
    }


@jax.jit
def fitted_noise(mean: Any, y: Any, mask: Any) -> Any:
    """The log noise of the highest validation likelihood, one for all samples, on a grid."""

    def nll(log_noise: Any) -> Any:
        log_density, _ = _mixture(mean, jnp.full(len(mean), log_noise), y)
        return jnp.sum(jnp.where(mask > 0, -log_density, 0.0))

    grid = jnp.asarray(NOISE_GRID)
    return grid[jnp.argmin(jax.lax.map(nll, grid))]


@jax.jit
def fitted_temperature(log_probs: Any, labels: Any) -> Any:
    """The temperature of the highest validation likelihood."""
    used = (labels != IGNORED).astype(jnp.float32)
    # A padded class is out of reach at every temperature, and its logit small enough to multiply.
    logits = jnp.maximum(log_probs, -1e4)
    return metrics.temperature(logits, jnp.maximum(labels, 0), weights=used)


def classification(valid: dict, test: dict, a: Any) -> dict[str, dict[str, float]]:
    """Scores as predicted, and after scaling by the validation rows' temperature."""
    heat = fitted_temperature(valid["log_probs"], a.valid_y)
    heat = jnp.where(jnp.isfinite(heat), heat, 1.0)
    scaled = jax.nn.log_softmax(test["log_probs"] / heat)
    return {
        "": numbers(of_classes(test["log_probs"], a.test_y))
        | {"valid_nll": float(of_classes(valid["log_probs"], a.valid_y)["nll"])},
        "+temperature": numbers(of_classes(scaled, a.test_y)) | {"temperature": float(heat)},
    }


def regression(valid: dict, test: dict, a: Any) -> dict[str, dict[str, float]]:
    """Scores with the noise as learnt, and with the validation rows' noise."""
    found = numbers(of_numbers(**test, y=a.test_y, mask=a.test_mask))
    on_valid = of_numbers(**valid, y=a.valid_y, mask=a.valid_mask)
    refitted = fitted_noise(valid["mean"], a.valid_y, a.valid_mask)
    noise = jnp.full(len(test["mean"]), refitted)
    return {
        "": found | {"valid_nll": float(on_valid["nll"])},
        "+noise": numbers(of_numbers(test["mean"], noise, a.test_y, a.test_mask)),
    }


def numbers(found: dict[str, Any]) -> dict[str, float]:
    """Plain numbers of Python."""
    return {k: float(v) for k, v in found.items()}


def averaged(members: list[dict[str, Any]]) -> dict[str, Any]:
    """The predictions of several runs, averaged: one view of an ensemble."""
    if "log_probs" in members[0]:
        stacked = jnp.stack([m["log_probs"] for m in members])
        return {"log_probs": jax.nn.logsumexp(stacked, 0) - np.log(len(members))}
    return {k: jnp.concatenate([m[k] for m in members]) for k in members[0]}
