"""The conditional families, and quadrature rules for what they hide."""

import functools

import jax.numpy as jnp
import numpy as np
from scipy import special, stats
from tools import compiled

from blr_optax import estimators
from blr_optax.families import Normal
from blr_optax.families._conditional.low_rank import GaussianLowRank, LowRankNoise
from blr_optax.families._conditional.matrix_gaussian import MatrixGaussian
from blr_optax.families._conditional.mixture import Mixture
from blr_optax.families._conditional.skew_gaussian import SkewGaussian, SkewNoise
from blr_optax.families._conditional.student_t import StudentT
from family_rows._row import spd

RNG = np.random.default_rng(0)
COVARIANCES = np.stack([spd(1), spd(2), spd(3)])
MEANS = np.array([[-1.0, 0.5], [0.8, 0.0], [0.2, 1.4]])
WEIGHTS = np.array([0.2, 0.5, 0.3])
FACTOR = RNG.normal(size=(4, 2))


def hermite(order, d):
    """(z [n, d], w [n]): a tensor-product rule for standard normal numbers."""
    x, w = np.polynomial.hermite_e.hermegauss(order)
    z = np.stack(np.meshgrid(*[x] * d, indexing="ij"), -1).reshape(-1, d)
    weights = np.prod(np.stack(np.meshgrid(*[w] * d, indexing="ij"), -1), -1).reshape(-1)
    return z, weights / weights.sum()


def half_normal(order=50):
    """(|w|, weights) for w standard normal."""
    x, w = np.polynomial.legendre.leggauss(order)
    x, w = 4.5 * (x + 1.0), 4.5 * w
    return x, w * 2 * stats.norm.pdf(x)


def skew_logpdf(s, x):
    omega = s["covariance"] + np.outer(s["skew"], s["skew"])
    pull = np.linalg.solve(omega, s["skew"])
    along = (x - s["mean"]) @ pull / np.sqrt(1 - s["skew"] @ pull)
    normal = stats.multivariate_normal(s["mean"], omega).logpdf(x)
    return np.log(2) + normal + stats.norm.logcdf(along)


def mixture_logpdf(s, x):
    parts = [
        stats.multivariate_normal(m, c).logpdf(x) for m, c in zip(s["mean"], s["c"], strict=True)
    ]
    return special.logsumexp(np.stack(parts, -1), axis=-1, b=s["weights"])


def low_rank_dense(s):
    return np.linalg.inv(np.diag(s["diagonal"]) + s["factor"] @ s["factor"].T)


MIXED = {"weights": WEIGHTS, "mean": MEANS}
VARIANCES = np.array([[0.5, 1.0], [0.2, 2.0], [1.0, 0.3]])
# name: family, standard parameters, log density by scipy or numpy, shape of one event
ROWS = {
    "mixture": (
        Mixture(),
        {**MIXED, "covariance": COVARIANCES},
        lambda s, x: mixture_logpdf({**s, "c": s["covariance"]}, x),
        (2,),
    ),
    "mixture_diagonal": (
        Mixture(Normal()),
        {**MIXED, "variance": VARIANCES},
        lambda s, x: mixture_logpdf({**s, "c": [np.diag(v) for v in s["variance"]]}, x),
        (2,),
    ),
    "skew_gaussian": (
        SkewGaussian(),
        {"mean": MEANS[0], "skew": np.array([1.5, -0.7]), "covariance": spd(4)},
        skew_logpdf,
        (2,),
    ),
    "student_t": (
        StudentT(),
        {"mean": MEANS[1], "degrees": 5.0, "scale": spd(5)},
        lambda s, x: stats.multivariate_t(s["mean"], s["scale"], df=s["degrees"]).logpdf(x),
        (2,),
    ),
    "gaussian_low_rank": (
        GaussianLowRank(),
        {"mean": np.arange(4.0), "diagonal": np.array([1.0, 0.3, 2.0, 0.7]), "factor": FACTOR},
        lambda s, x: stats.multivariate_normal(s["mean"], low_rank_dense(s)).logpdf(x),
        (4,),
    ),
    "matrix_gaussian": (
        MatrixGaussian(),
        {
            "mean": RNG.normal(size=(2, 3)),
            "row_precision": spd(6),
            "column_precision": spd(7, 3),
        },
        lambda s, x: stats.matrix_normal(
            s["mean"], np.linalg.inv(s["row_precision"]), np.linalg.inv(s["column_precision"])
        ).logpdf(x),
        (2, 3),
    ),
}

# The members whose theta is one number.
LINE = {
    "mixture": {
        "weights": WEIGHTS,
        "mean": MEANS[:, :1],
        "covariance": COVARIANCES[:, :1, :1],
    },
    "skew_gaussian": {"mean": MEANS[0, :1], "skew": np.array([2.5]), "covariance": np.eye(1)},
    "student_t": {"mean": MEANS[0, :1], "degrees": 4.5, "scale": 2.0 * np.eye(1)},
    "gaussian_low_rank": {
        "mean": np.array([0.3]),
        "diagonal": np.array([0.5]),
        "factor": np.array([[1.5]]),
    },
}


@functools.cache
def member(name, dtype=np.float64):
    family, standard, _, _ = ROWS[name]
    return family, natural(family, {k: np.asarray(v, dtype) for k, v in standard.items()})


def natural(family, standard):
    """lambda in numpy."""
    return compiled(lambda s: family.natural(**s), standard)


def advance(family, key, lam, loss, rate, estimator=None, **step):
    """The value and the lambda of one step of the rule on a total potential."""
    value, gradient = estimators.natural_gradient(family, loss, estimator)(key, lam)
    return value, family.move(lam, gradient, rate, **step)


def quartic(x):
    """A potential that couples its coordinates, with a bounded start and polynomial growth."""
    flat = x.reshape(-1)
    return jnp.sum(0.1 * (flat - 0.5) ** 4 + flat**2) + 0.3 * flat[0] * flat[1] + flat[0]


def rule(name, order):
    """A quadrature rule as noise and weights, exact for polynomials."""
    if name.startswith("mixture"):
        z, w = hermite(order, 2)
        return np.repeat(z[:, None], 3, axis=1), w
    if name == "skew_gaussian":
        (z, w), (shift, ws) = hermite(order, 2), half_normal()
        noise = SkewNoise(np.repeat(shift, len(w)), np.tile(z, (len(ws), 1)))
        return noise, np.outer(ws, w).reshape(-1)
    z, w = hermite(order, 6)
    if name == "matrix_gaussian":
        return z.reshape(-1, 2, 3), w
    return LowRankNoise(z[:, :4], z[:, 4:]), w


def trapezoid(count=801, reach=10.0):
    """A rule for standard normal numbers, spectral for anything smooth on the line."""
    z, h = np.linspace(-reach, reach, count, retstep=True)
    return z[:, None], h * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
