"""Families of unit vectors, of positive definite matrices, and joint ones of a mean and a scale."""

import numpy as np
from scipy import special, stats

from blr_optax.families._continuous.joint import MeanPrecision, MeanVariance
from blr_optax.families._continuous.normal_gamma import (
    NormalGamma,
    NormalGammaNatural,
    NormalInverseGamma,
    NormalInverseGammaNatural,
)
from blr_optax.families._continuous.von_mises_fisher import VonMisesFisher, VonMisesFisherNatural
from blr_optax.families._matrix.inverse_wishart import InverseWishart, InverseWishartNatural
from blr_optax.families._matrix.normal_wishart import NormalWishart, NormalWishartNatural
from blr_optax.families._matrix.wishart import Wishart, WishartNatural
from family_rows._row import Row, half_line, spd

INDEFINITE = np.array([[1.0, 2.0], [2.0, 1.0]])
EYE = np.eye(2)
MEAN = np.array([0.3, -1.0])


def hermite(count):
    """Nodes z and weights that integrate exp(-z^2 / 2) times a polynomial."""
    z, w = np.polynomial.hermite_e.hermegauss(count)
    return z, w * np.exp(0.5 * z * z)


def sphere(_):
    """The unit sphere in three dimensions: Legendre in the height, trapezes in the angle."""
    height, w = np.polynomial.legendre.leggauss(60)
    angle = 2 * np.pi * np.arange(60) / 60
    z, phi = (a.ravel() for a in np.meshgrid(height, angle, indexing="ij"))
    r = np.sqrt(1 - z * z)
    return np.stack([r * np.cos(phi), r * np.sin(phi), z], -1), np.repeat(w * 2 * np.pi / 60, 60)


def log_chi(degrees):
    """Trapezes for the logarithm of a chi variable."""
    h = min(0.14, 0.6 / np.sqrt(2 * degrees))
    right = 0.5 * np.log1p((12 * np.sqrt(degrees) + 80) / degrees)
    return 0.5 * np.log(degrees) + np.arange(-34 / degrees, right, h), h


def bartlett(scale, degrees, count=7):
    """Factors B of X = B B^T in two dimensions, and weights that integrate over X.

    B = L A with L L^T = scale, the diagonal of A on a logarithmic grid; the entry below it, which
    is standard normal in a Wishart density, by Hermite's rule.
    """
    root = np.linalg.cholesky(scale)
    (t1, h1), (t2, h2) = (log_chi(degrees - i) for i in range(2))
    z, w = hermite(count)
    t1, t2, z = (a.ravel() for a in np.meshgrid(t1, t2, z, indexing="ij"))
    a = np.zeros((len(z), 2, 2))
    a[:, 0, 0], a[:, 1, 1], a[:, 1, 0] = np.exp(t1), np.exp(t2), z
    b = root @ a
    # dX = 4 B_11^2 B_22 dB and dB_ii = B_ii dt_i
    weights = 4 * b[:, 0, 0] ** 3 * b[:, 1, 1] ** 2 * root[1, 1]
    return b, weights * h1 * h2 * np.tile(w, len(z) // count)


def transpose(x):
    return np.swapaxes(x, -1, -2)


def wishart_rule(s):
    b, w = bartlett(s["scale"], s["degrees"])
    return b @ transpose(b), w


def inverse_wishart_rule(s):
    """dX^{-1} = |X|^{d + 1} dX turned around."""
    b, w = bartlett(np.linalg.inv(s["scale"]), s["degrees"])
    c = np.linalg.inv(b)
    return transpose(c) @ c, w * np.abs(np.linalg.det(c)) ** 6


def normal_gamma_rule(s, scale="rate"):
    """Hermite's rule for x given tau."""
    tau, w = half_line(s["concentration"] / s[scale], 2001, 12.0)
    z, wz = hermite(5)
    sd = 1 / np.sqrt(s["kappa"] * tau)
    x = s["mean"] + sd[:, None] * z
    return MeanPrecision(x.ravel(), np.repeat(tau, 5)), ((w * sd)[:, None] * wz).ravel()


def normal_inverse_gamma_rule(s):
    (x, tau), w = normal_gamma_rule(s, "scale")
    return MeanVariance(x, 1 / tau), w / tau**2


def normal_wishart_rule(s):
    b, w = bartlett(s["scale"], s["degrees"], 5)
    z, wz = hermite(3)
    z = np.stack(np.meshgrid(z, z, indexing="ij"), -1).reshape(-1, 2)
    wz = np.outer(wz, wz).ravel()
    moves = np.linalg.inv(transpose(b))[:, None] @ z[:, :, None] / np.sqrt(s["kappa"])
    size = 1 / np.linalg.det(b) / s["kappa"]
    precision = np.repeat(b @ transpose(b), len(z), axis=0)
    points = MeanPrecision(s["mean"] + moves.reshape(-1, 2), precision)
    return points, ((w * size)[:, None] * wz).ravel()


def stack_last(x):
    """scipy wants the matrices of a batch along the last axis."""
    return np.moveaxis(np.asarray(x), 0, -1)


def checked_by(law, found, x):
    """Values of a formula, where scipy (a slow loop over matrices) agrees on some of them."""
    some = slice(None, None, max(1, len(found) // 200))
    np.testing.assert_allclose(found[some], law.logpdf(stack_last(x[some])), rtol=1e-11, atol=1e-10)
    return found


def log_det_and_root(x):
    """By Cholesky: many of the matrices are nearly singular."""
    root = np.linalg.cholesky(x)
    return 2 * np.sum(np.log(np.diagonal(root, axis1=-2, axis2=-1)), axis=-1), root


def wishart_logpdf(s, x):
    degrees, scale = s["degrees"], s["scale"]
    log_det, root = log_det_and_root(x)
    trace = np.sum(np.linalg.solve(np.linalg.cholesky(scale), root) ** 2, axis=(-2, -1))
    size = degrees * np.log(2 * np.sqrt(np.linalg.det(scale)))  # d = 2
    found = 0.5 * ((degrees - 3) * log_det - trace) - size - special.multigammaln(degrees / 2, 2)
    return checked_by(stats.wishart(degrees, scale), found, x)


def inverse_wishart_logpdf(s, x):
    degrees, scale = s["degrees"], s["scale"]
    log_det, root = log_det_and_root(x)
    trace = np.sum(np.linalg.solve(root, np.linalg.cholesky(scale)) ** 2, axis=(-2, -1))
    size = degrees * np.log(2 / np.sqrt(np.linalg.det(scale)))  # d = 2
    found = -0.5 * ((degrees + 3) * log_det + trace) - size - special.multigammaln(degrees / 2, 2)
    return checked_by(stats.invwishart(degrees, scale), found, x)


def normal_gamma_logpdf(s, theta):
    x, tau = theta
    normal = stats.norm(s["mean"], 1 / np.sqrt(s["kappa"] * tau)).logpdf(x)
    return normal + stats.gamma(s["concentration"], scale=1 / s["rate"]).logpdf(tau)


def normal_inverse_gamma_logpdf(s, theta):
    x, v = theta
    normal = stats.norm(s["mean"], np.sqrt(v / s["kappa"])).logpdf(x)
    return normal + stats.invgamma(s["concentration"], scale=s["scale"]).logpdf(v)


def normal_wishart_logpdf(s, theta):
    x, precision = theta
    apart = x - s["mean"]
    square = s["kappa"] * np.einsum("ni,nij,nj->n", apart, precision, apart)
    log_det = np.linalg.slogdet(precision)[1]
    normal = np.log(s["kappa"]) - np.log(2 * np.pi) + 0.5 * (log_det - square)
    return normal + wishart_logpdf(s, precision)


BAD_SCALES = (
    ("scale", {"scale": INDEFINITE, "degrees": 4.0}),
    ("degrees", {"scale": EYE, "degrees": 1.0}),
    ("degrees", {"scale": EYE, "degrees": np.nan}),
)
GAMMA = {"mean": 0.3, "kappa": 2.0, "concentration": 6.5, "rate": 0.7}
INVERSE_GAMMA = {"mean": 0.3, "kappa": 2.0, "concentration": 8.5, "scale": 0.7}
WISHART = {"mean": MEAN, "kappa": 2.0, "scale": spd(0), "degrees": 12.0}
# The last of these has b (or W^{-1}) below zero, although every field on its own is fine.
OUTSIDE_GAMMA = (
    (0.0, 0.0, 1.0, -1.0),
    (0.0, -1.0, -0.5, -1.0),
    (0.0, -1.0, 1.0, 0.0),
    (np.nan, -1.0, 1.0, -1.0),
    (np.inf, -1.0, 1.0, -1.0),
    (4.0, -0.5, 1.0, -7.0),
)

ROWS = {
    "von_mises_fisher": Row(
        VonMisesFisher(),
        "multivariate",
        (
            {"direction": np.array([0.48, 0.6, 0.64]), "concentration": 3.0},
            {"direction": np.array([-0.6, 0.64, 0.48]), "concentration": 0.7},
            {"direction": np.array([0.0, -0.8, 0.6]), "concentration": 12.0},
        ),
        lambda s, x: stats.vonmises_fisher(s["direction"], s["concentration"]).logpdf(x),
        sphere,
        (
            ("direction", {"direction": np.zeros(3), "concentration": 1.0}),
            ("direction", {"direction": np.ones(1), "concentration": 1.0}),
            ("concentration", {"direction": np.ones(3), "concentration": -1.0}),
        ),
        tuple(VonMisesFisherNatural(np.array([1.0, x, 0.0])) for x in (np.nan, np.inf)),
    ),
    "wishart": Row(
        Wishart(),
        "matrix",
        (
            {"scale": spd(0), "degrees": 4.5},
            {"scale": spd(1), "degrees": 9.0},
            {"scale": np.array([[1.0, 0.8], [0.8, 1.0]]), "degrees": 6.0},
        ),
        wishart_logpdf,
        wishart_rule,
        BAD_SCALES,
        tuple(
            WishartNatural(*x)
            for x in [(-1.0, -EYE), (1.0, EYE), (1.0, -INDEFINITE), (np.nan, -EYE), (1.0, 0 * EYE)]
        ),
    ),
    "inverse_wishart": Row(
        InverseWishart(),
        "matrix",
        (
            {"scale": spd(0), "degrees": 24.0},
            {"scale": spd(1), "degrees": 20.0},
            {"scale": np.array([[1.0, 0.8], [0.8, 1.0]]), "degrees": 30.0},
        ),
        inverse_wishart_logpdf,
        inverse_wishart_rule,
        BAD_SCALES,
        tuple(
            InverseWishartNatural(*x)
            for x in [(-2.0, -EYE), (0.0, -EYE), (-4.0, EYE), (-4.0, -INDEFINITE), (np.nan, -EYE)]
        ),
    ),
    "normal_gamma": Row(
        NormalGamma(),
        "joint",
        (
            GAMMA,
            {"mean": -1.5, "kappa": 0.6, "concentration": 9.0, "rate": 5.0},
            {"mean": 0.9, "kappa": 5.0, "concentration": 12.0, "rate": 2.0},
        ),
        normal_gamma_logpdf,
        normal_gamma_rule,
        (
            ("mean", {**GAMMA, "mean": np.inf}),
            *((name, {**GAMMA, name: 0.0}) for name in ("kappa", "concentration", "rate")),
        ),
        tuple(NormalGammaNatural(*x) for x in OUTSIDE_GAMMA),
    ),
    "normal_inverse_gamma": Row(
        NormalInverseGamma(),
        "joint",
        (
            INVERSE_GAMMA,
            {"mean": -1.5, "kappa": 0.6, "concentration": 11.0, "scale": 5.0},
            {"mean": 0.9, "kappa": 5.0, "concentration": 14.0, "scale": 2.0},
        ),
        normal_inverse_gamma_logpdf,
        normal_inverse_gamma_rule,
        (
            ("mean", {**INVERSE_GAMMA, "mean": np.nan}),
            *((name, {**INVERSE_GAMMA, name: 0.0}) for name in ("kappa", "concentration", "scale")),
        ),
        tuple(NormalInverseGammaNatural(a, b, -c - 2.0, d) for a, b, c, d in OUTSIDE_GAMMA),
    ),
    "normal_wishart": Row(
        NormalWishart(),
        "joint",
        (
            WISHART,
            {"mean": np.array([1.0, 0.5]), "kappa": 0.6, "scale": spd(1), "degrees": 15.0},
            {"mean": np.zeros(2), "kappa": 5.0, "scale": spd(2), "degrees": 20.0},
        ),
        normal_wishart_logpdf,
        normal_wishart_rule,
        (
            ("mean", {**WISHART, "mean": MEAN * np.nan}),
            ("kappa", {**WISHART, "kappa": 0.0}),
            ("scale", {**WISHART, "scale": INDEFINITE}),
            ("degrees", {**WISHART, "degrees": 1.0}),
        ),
        tuple(
            NormalWishartNatural(*x)
            for x in [
                (MEAN, 0.0, 1.0, -EYE),
                (MEAN, -1.0, -0.5, -EYE),
                (MEAN, -1.0, 1.0, EYE),
                (MEAN * np.nan, -1.0, 1.0, -EYE),
                (4.0 * MEAN / MEAN, -0.5, 1.0, -7.0 * EYE),
            ]
        ),
    ),
}
