"""Families on the half-line, the line and the simplex."""

import numpy as np
from scipy import stats

from blr_optax.families._continuous.dirichlet import Beta, BetaNatural, Dirichlet, DirichletNatural
from blr_optax.families._continuous.gamma import (
    Exponential,
    ExponentialNatural,
    Gamma,
    GammaNatural,
    InverseGamma,
    InverseGammaNatural,
)
from blr_optax.families._continuous.inverse_gaussian import InverseGaussian, InverseGaussianNatural
from blr_optax.families._continuous.positive import (
    Laplace,
    LaplaceNatural,
    LogNormal,
    LogNormalNatural,
    Weibull,
    WeibullNatural,
)
from family_rows._row import Row, half_line, unit_interval


def simplex(count=215, reach=16.0):
    """Three parts of one: trapezes in the logits of two breaks of a stick."""
    z, h = np.linspace(-reach, reach, count, retstep=True)
    v, w = np.meshgrid(1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-z)), indexing="ij")
    points = np.stack([v, (1 - v) * w, (1 - v) * (1 - w)], -1).reshape(-1, 3)
    # dx_1 dx_2 = (1 - v) dv dw and dv = v (1 - v) dz
    weights = h * h * (v * (1 - v)) * (w * (1 - w)) * (1 - v)
    return points, weights.ravel()


def two_sides(centre, scale, reach=40.0, count=4001):
    """Trapezes in log |x - centre|: the kink of a Laplace density lies between two pieces."""
    x, w = half_line(scale, count, reach)
    return np.concatenate([centre - x, centre + x]), np.concatenate([w, w])


def inverse_gaussian(mean, shape):
    return stats.invgauss(mean / shape, scale=shape)


ROWS = {
    "gamma": Row(
        Gamma(),
        "positive",
        (
            {"concentration": 2.5, "rate": 0.7},
            {"concentration": 0.8, "rate": 3.0},
            {"concentration": 12.0, "rate": 1.5},
        ),
        lambda s, x: stats.gamma(s["concentration"], scale=1 / s["rate"]).logpdf(x),
        lambda s: half_line(s["concentration"] / s["rate"], reach=60.0),
        (
            ("concentration", {"concentration": 0.0, "rate": 1.0}),
            ("concentration", {"concentration": np.array([1.0, np.nan]), "rate": 1.0}),
            ("rate", {"concentration": 1.0, "rate": -2.0}),
        ),
        tuple(
            GammaNatural(*x)
            for x in [(-1.0, -1.0), (-2.0, -1.0), (0.0, 0.0), (np.nan, -1.0), (np.inf, -1.0)]
        ),
    ),
    "inverse_gamma": Row(
        InverseGamma(),
        "positive",
        (
            {"concentration": 6.5, "scale": 0.7},
            {"concentration": 9.0, "scale": 3.0},
            {"concentration": 12.0, "scale": 1.5},
        ),
        lambda s, x: stats.invgamma(s["concentration"], scale=s["scale"]).logpdf(x),
        lambda s: half_line(s["scale"] / s["concentration"], reach=15.0),
        (
            ("concentration", {"concentration": -1.0, "scale": 1.0}),
            ("scale", {"concentration": 1.0, "scale": 0.0}),
        ),
        tuple(
            InverseGammaNatural(*x)
            for x in [(-1.0, -1.0), (0.0, -1.0), (-3.0, 0.0), (-3.0, np.nan), (-np.inf, -1.0)]
        ),
    ),
    "exponential": Row(
        Exponential(),
        "positive",
        ({"rate": 0.7}, {"rate": 3.0}, {"rate": 1.0}),
        lambda s, x: stats.expon(scale=1 / s["rate"]).logpdf(x),
        lambda s: half_line(1 / s["rate"], reach=40.0),
        (("rate", {"rate": 0.0}), ("rate", {"rate": np.inf})),
        tuple(ExponentialNatural(x) for x in (0.0, 1.0, np.nan, -np.inf)),
    ),
    "inverse_gaussian": Row(
        InverseGaussian(),
        "positive",
        (
            {"mean": 1.5, "shape": 3.0},
            {"mean": 0.4, "shape": 0.9},
            {"mean": 2.0, "shape": 30.0},
        ),
        lambda s, x: inverse_gaussian(s["mean"], s["shape"]).logpdf(x),
        lambda s: half_line(s["mean"], reach=12.0),
        (
            ("mean", {"mean": -1.0, "shape": 1.0}),
            ("shape", {"mean": 1.0, "shape": 0.0}),
        ),
        tuple(
            InverseGaussianNatural(*x)
            for x in [(0.0, -1.0), (-1.0, 0.0), (1.0, 1.0), (np.nan, -1.0), (-1.0, -np.inf)]
        ),
    ),
    "dirichlet": Row(
        Dirichlet(),
        "simplex",
        (
            {"concentration": np.array([2.0, 3.0, 4.5])},
            {"concentration": np.array([6.0, 2.5, 3.0])},
            {"concentration": np.array([3.0, 9.0, 5.0])},
        ),
        lambda s, x: stats.dirichlet(s["concentration"]).logpdf(x.T),
        lambda s: simplex(),
        (
            ("concentration", {"concentration": np.array([1.0, 0.0])}),
            ("concentration", {"concentration": np.array([1.0, np.nan])}),
        ),
        tuple(
            DirichletNatural(np.array(x))
            for x in [(-1.0, 1.0, 1.0), (0.0, -3.0, 1.0), (np.nan, 1.0, 1.0), (np.inf, 0.0, 0.0)]
        ),
    ),
    "beta": Row(
        Beta(),
        "simplex",
        ({"alpha": 2.0, "beta": 3.5}, {"alpha": 0.8, "beta": 1.5}, {"alpha": 9.0, "beta": 4.0}),
        lambda s, x: stats.beta(s["alpha"], s["beta"]).logpdf(x),
        lambda s: unit_interval(reach=36.0),
        (
            ("alpha", {"alpha": 0.0, "beta": 1.0}),
            ("beta", {"alpha": 1.0, "beta": -1.0}),
        ),
        tuple(
            BetaNatural(*x)
            for x in [(-1.0, 1.0), (0.0, -1.5), (np.nan, 1.0), (0.0, np.inf), (-np.inf, 0.0)]
        ),
    ),
    "log_normal": Row(
        LogNormal(),
        "positive",
        (
            {"location": 0.3, "variance": 0.2},
            {"location": -1.0, "variance": 0.5},
            {"location": 0.4, "variance": 0.1},
        ),
        lambda s, x: stats.lognorm(np.sqrt(s["variance"]), scale=np.exp(s["location"])).logpdf(x),
        lambda s: half_line(np.exp(s["location"]), reach=14 * np.sqrt(s["variance"])),
        (
            ("variance", {"location": 0.0, "variance": -1.0}),
            ("precision", {"location": 0.0, "precision": 0.0}),
            ("variance or precision", {"location": 0.0}),
        ),
        tuple(
            LogNormalNatural(*x)
            for x in [(0.0, 0.0), (0.0, 1.0), (np.nan, -1.0), (0.0, -np.inf), (np.inf, -1.0)]
        ),
    ),
    "laplace": Row(
        Laplace(),
        "real line",
        (
            {"scale": 0.7, "location": 0.4},
            {"scale": 2.0, "location": 0.4},
            {"scale": 1.3, "location": 0.4},
        ),
        lambda s, x: stats.laplace(s["location"], s["scale"]).logpdf(x),
        lambda s: two_sides(s["location"], s["scale"]),
        (
            ("scale", {"scale": 0.0, "location": 0.0}),
            ("scale", {"scale": np.array([1.0, np.nan]), "location": 0.0}),
        ),
        tuple(LaplaceNatural(x, 0.4) for x in (0.0, 1.0, np.nan, -np.inf)),
    ),
    "weibull": Row(
        Weibull(),
        "positive",
        (
            {"scale": 0.7, "shape": 1.7},
            {"scale": 2.0, "shape": 1.7},
            {"scale": 1.3, "shape": 1.7},
        ),
        lambda s, x: stats.weibull_min(s["shape"], scale=s["scale"]).logpdf(x),
        lambda s: half_line(s["scale"], reach=30.0),
        (
            ("scale", {"scale": -1.0, "shape": 1.0}),
            ("shape", {"scale": 1.0, "shape": 0.0}),
        ),
        tuple(WeibullNatural(x, 1.7) for x in (0.0, 1.0, np.nan, -np.inf)),
    ),
}
