"""The Gaussian families."""

import numpy as np
from scipy import stats

from blr_optax import families
from blr_optax.families import GaussianNatural
from family_rows._row import Row, line, plane, spd

NORMAL, GAUSSIAN = families.get("normal"), families.get("gaussian")
FIXED = families.get("gaussian_fixed")

SHARED = spd(3)
MEAN = np.array([0.3, -1.0])
INDEFINITE = np.array([[1.0, 2.0], [2.0, 1.0]])
ROWS = {
    "normal": Row(
        NORMAL,
        "real line",
        (
            {"mean": 0.3, "variance": 0.8},
            {"mean": -2.0, "variance": 4.0},
            {"mean": 0.0, "variance": 0.1},
        ),
        lambda s, x: stats.norm(s["mean"], np.sqrt(s["variance"])).logpdf(x),
        lambda s: line(s["mean"], s["variance"]),
        (
            ("variance", {"mean": 0.0, "variance": -1.0}),
            ("variance", {"mean": 0.0, "variance": np.array([1.0, np.nan])}),
            ("precision", {"mean": 0.0, "precision": 0.0}),
            ("variance or precision", {"mean": 0.0}),
            ("variance or precision", {"mean": 0.0, "variance": 1.0, "precision": 1.0}),
        ),
        tuple(
            GaussianNatural(*x)
            for x in [(0.0, 0.0), (0.0, 1.0), (np.nan, -1.0), (0.0, -np.inf), (np.inf, -1.0)]
        ),
    ),
    "gaussian": Row(
        GAUSSIAN,
        "multivariate",
        (
            {"mean": MEAN, "covariance": spd(0)},
            {"mean": np.array([1.0, 0.5]), "covariance": spd(1)},
            {"mean": np.zeros(2), "covariance": np.array([[1.0, 0.9], [0.9, 1.0]])},
        ),
        lambda s, x: stats.multivariate_normal(s["mean"], s["covariance"]).logpdf(x),
        lambda s: plane(s["mean"], s["covariance"]),
        (
            ("covariance", {"mean": MEAN, "covariance": INDEFINITE}),
            ("precision", {"mean": MEAN, "precision": np.zeros((2, 2))}),
            ("covariance or precision", {"mean": MEAN}),
        ),
        tuple(
            GaussianNatural(np.asarray(a), np.asarray(b))
            for a, b in [
                (MEAN, -INDEFINITE),
                (MEAN, np.eye(2)),
                (MEAN, np.zeros((2, 2))),
                (MEAN, np.full((2, 2), np.nan)),
                (MEAN, -np.diag([1.0, np.inf])),
                (MEAN * np.nan, -np.eye(2)),
            ]
        ),
    ),
    "gaussian_fixed": Row(
        FIXED,
        "multivariate",
        ({"mean": MEAN, "precision": SHARED}, {"mean": np.array([1.0, 0.5]), "precision": SHARED}),
        lambda s, x: stats.multivariate_normal(s["mean"], np.linalg.inv(s["precision"])).logpdf(x),
        lambda s: plane(s["mean"], np.linalg.inv(s["precision"])),
        (("precision", {"mean": MEAN, "precision": INDEFINITE}),),
        tuple(families.FixedNatural(MEAN * x, SHARED) for x in (np.nan, np.inf)),
    ),
}
