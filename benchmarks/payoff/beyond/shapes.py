"""Drawn shapes over two photographs: an image, and the shape of every pixel."""

from __future__ import annotations

import numpy as np

from benchmarks.payoff.tables import need

SIDE, CLASSES = 24, ("photograph", "disc", "square", "triangle")


def photographs() -> dict[str, np.ndarray]:
    """scikit-learn's two sample photographs, in [0, 1]."""
    images = need("sklearn", "sklearn.datasets")
    return {k: images.load_sample_image(f"{k}.jpg") / 255.0 for k in ("china", "flower")}


def shape_mask(kind: int, center: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Which pixels a shape of class 1, 2 or 3 covers."""
    y, x = np.mgrid[:SIDE, :SIDE] - center[:, None, None]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == 1:
        return u**2 + v**2 < radius**2
    if kind == 2:
        return np.maximum(np.abs(u), np.abs(v)) < 0.85 * radius
    return (v > -0.5 * radius) & (v < radius - 1.73 * np.abs(u))


def drawn(
    photograph: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(count, side, side, 3) images and (count, side, side) classes.

    One to three shapes per image, a little transparent, in any colour; and noise over all.
    """
    height, width, _ = photograph.shape
    x = np.zeros((count, SIDE, SIDE, 3))
    y = np.zeros((count, SIDE, SIDE), np.int32)
    for i in range(count):
        top, left = rng.integers(0, height - SIDE), rng.integers(0, width - SIDE)
        x[i] = photograph[top : top + SIDE, left : left + SIDE]
        for _ in range(rng.integers(1, 4)):
            kind = int(rng.integers(1, len(CLASSES)))
            mask = shape_mask(kind, rng.uniform(4, SIDE - 4, 2), rng.uniform(4, 8),
                              rng.uniform(0, 2 * np.pi))  # fmt: skip
            colour, opacity = rng.random(3), rng.uniform(0.6, 1.0)
            x[i][mask] = opacity * colour + (1 - opacity) * x[i][mask]
            y[i][mask] = kind
    x += 0.05 * rng.standard_normal(x.shape)
    return x.astype(np.float32), y
