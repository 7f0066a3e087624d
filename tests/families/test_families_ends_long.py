"""Densities where the support ends: log 0 times an exponent of zero is zero, and finite.

The truth is scipy's, or the formula of the density in numpy where scipy refuses the point.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sc
import scipy.stats as ss
from family_tools import program
from tools import close

from blr_optax import families
from blr_optax.families import MeanPrecision, MeanVariance

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
OUT = np.array([-1.0, 0.0, 1e-30, 0.5, np.inf])
PART = np.array([-0.5, 0.0, 0.25, 1.0, 1.5])


def gamma(concentration, rate):
    return ss.gamma(concentration, scale=1 / rate)


def weibull(scale, shape):
    return ss.weibull_min(shape, scale=scale)


def inverse_gamma(concentration, scale):
    return ss.invgamma(concentration, scale=scale)


def inverse_gaussian(mean, shape):
    return ss.invgauss(mean / shape, scale=shape)


def log_normal(location, variance):
    return ss.lognorm(np.sqrt(variance), scale=np.exp(location))


def beta(alpha, beta):
    return ss.beta(alpha, beta)


def exponential(rate):
    return ss.expon(scale=1 / rate)


# One, below one, above one; chi-square with two degrees of freedom is gamma(1, 1/2).
SHAPES = np.array([1.0, 0.5, 2.5])
FAMILIES = {
    "gamma": (gamma, {"concentration": SHAPES, "rate": np.array([0.5, 2.0, 3.0])}, OUT),
    "weibull": (weibull, {"scale": np.array([2.0, 3.0, 0.5]), "shape": SHAPES}, OUT),
    "beta": (beta, {"alpha": [1.0, 1, 8, 0.5, 2], "beta": [8.0, 1, 1, 3, 0.5]}, PART),
    "exponential": (exponential, {"rate": np.array([0.5, 2.0])}, OUT),
    "inverse_gamma": (inverse_gamma, {"concentration": SHAPES, "scale": np.ones(3)}, OUT),
    "inverse_gaussian": (inverse_gaussian, {"mean": SHAPES, "shape": np.array([1.0, 2, 3])}, OUT),
    "log_normal": (log_normal, {"location": np.zeros(3), "variance": SHAPES}, OUT),
}


@DTYPES
@pytest.mark.parametrize("name", FAMILIES)
def test_ends_of_the_support_are_scipys(x64, name, dtype):
    family, (truth, standard, points) = families.get(name), FAMILIES[name]
    standard = {key: np.asarray(x, float) for key, x in standard.items()}

    @jax.jit
    def evaluate(standard, x):
        return family.log_prob(family.natural(**standard), x)

    small = {key: x.astype(dtype) for key, x in standard.items()}
    found = evaluate(small, points[:, None].astype(dtype))
    assert found.dtype == dtype
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = truth(**standard).logpdf(points[:, None])
    expected[np.isinf(points)] = -np.inf  # where scipy may say NaN
    digits = 5e-6 if dtype == np.float32 else 1e-12
    close(found, expected, rtol=digits, atol=digits)


@DTYPES
@pytest.mark.parametrize("name, end", [("gamma", 0), ("weibull", 0), ("beta", 0), ("beta", 1)])
def test_slopes_at_a_closed_end_are_finite(x64, name, end, dtype):
    """In theta and in what does not multiply log 0; that one is -inf, as T - mu is."""
    family, (truth, standard, _) = families.get(name), FAMILIES[name]
    standard = {key: float(np.asarray(x)[0]) for key, x in standard.items()}
    if end:
        standard = {"alpha": standard["beta"], "beta": standard["alpha"]}
    h = 1e-6 * (1 - 2 * end)
    first = lambda x, **own: float(truth(**{**standard, **own}).logpdf(x))  # noqa: E731

    @jax.jit
    def slopes(standard, x):
        lam = family.natural(**standard)
        log_q = lambda given, x: family.log_prob(family.natural(**given), x)  # noqa: E731
        by_lambda = jax.grad(family.log_prob)(lam, x)
        along = jax.jvp(lambda x: family.log_prob(lam, x), (x,), (jnp.ones_like(x),))[1]
        return jax.grad(log_q, (0, 1))(standard, x), by_lambda, along

    given = {key: dtype(x) for key, x in standard.items()}
    (by_standard, by_point), by_lambda, along = slopes(given, dtype(end))
    slope = (first(end + h) - first(end)) / h
    close([by_point, along], slope, rtol=1e-4, atol=1e-4)
    free = {"gamma": "rate", "weibull": "scale", "beta": ("beta", "alpha")[end]}[name]
    moved = (first(end, **{free: standard[free] + 1e-6}) - first(end)) / 1e-6
    close(by_standard[free], moved, rtol=1e-4)
    singular = {"gamma": "log", "weibull": "shape", "beta": ("log", "log1m")[end]}[name]
    assert getattr(by_lambda, singular) == -np.inf


@DTYPES
def test_faces_of_a_dirichlet(x64, dtype):
    family = families.get("dirichlet")
    a = np.array([[1.0, 1, 1], [2, 1, 1], [3, 1, 0.5], [1, 2, 2], [2, 0.5, 3]])
    x = np.array([[1.0, 0, 0], [0.25, 0.75, 0], [0, 0.5, 0.5], [0.5, 0.25, 0.25], [0.5, 0.6, 0]])

    @jax.jit
    def evaluate(a, x):
        lam = family.natural(concentration=a)
        flat = family.natural(concentration=a[0, 0])
        return family.log_prob(lam, x), jax.grad(lambda x: family.log_prob(flat, x))(x[0])

    found, slope = evaluate(a.astype(dtype)[:, None], x.astype(dtype))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.sum(sc.xlogy(a[:, None] - 1, x), -1)
    log_q += (sc.gammaln(a.sum(-1)) - sc.gammaln(a).sum(-1))[:, None]
    log_q[:, -1] = -np.inf  # whose parts do not sum to one
    undefined = np.isnan(log_q)  # 0^k with k of either sign
    assert undefined.sum() == 1
    np.testing.assert_array_equal(np.isnan(found), undefined)
    digits = 2e-6 if dtype == np.float32 else 1e-12
    close(np.asarray(found)[~undefined], log_q[~undefined], rtol=digits, atol=digits)
    close(log_q[0, 1], ss.dirichlet(a[0]).logpdf(x[1]))
    # Flat along the simplex.
    close(slope - slope.mean(), np.zeros(3), atol=1e-6)


def log_wishart(x, scale, degrees):
    """log q by its formula, with the exponent of |X| zero."""
    d = len(scale)
    assert degrees == d + 1
    top = -0.5 * np.trace(np.linalg.solve(scale, x)) - 0.5 * degrees * d * np.log(2)
    return top - 0.5 * degrees * np.linalg.slogdet(scale)[1] - sc.multigammaln(degrees / 2, d)


@DTYPES
def test_singular_matrices_of_a_wishart(x64, dtype):
    family = families.get("wishart")
    scale = np.array([[1.0, 0.3], [0.3, 2.0]])
    v = np.array([1.0, 3.0])
    points = np.stack([np.diag([1.0, 0.0]), np.zeros((2, 2)), np.outer(v, v), np.diag([1.0, -1.0])])
    inside = np.array([[2.0, 0.5], [0.5, 1.0]])
    close(log_wishart(inside, scale, 3), ss.wishart(3, scale).logpdf(inside))

    @jax.jit
    def evaluate(degrees, x):
        lam = family.natural(scale=jnp.asarray(scale, dtype), degrees=degrees)
        log_q, slope = jax.vmap(jax.value_and_grad(family.log_prob, 1), (None, 0))(lam, x)
        return (
            log_q,
            slope,
            jax.grad(lambda lam: family.log_prob(lam, jnp.eye(2, dtype=dtype)))(lam),
        )

    found, slope, inner = evaluate(dtype(3), points.astype(dtype))
    expected = [log_wishart(x, scale, 3) for x in points[:3]]
    digits = 3e-6 if dtype == np.float32 else 1e-12
    close(found, [*expected, -np.inf], rtol=digits)
    close(slope[:3], np.broadcast_to(-0.5 * np.linalg.inv(scale), (3, 2, 2)), rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(inner))
    for degrees, end in ((2.5, np.inf), (4.0, -np.inf)):
        found, _, _ = evaluate(dtype(degrees), points.astype(dtype))
        assert list(found) == [end, end, end, -np.inf]


@DTYPES
def test_a_precision_of_zero_in_joint_families(x64, dtype):
    """tau^(a - 1/2) of a normal-gamma density, |Lambda|^((nu - d) / 2) of a normal-Wishart one."""
    scalar, matrix = families.NormalGamma(), families.NormalWishart()
    by_variance = families.NormalInverseGamma()
    m, kappa, b, x = 1.0, 2.0, 3.0, 0.3

    @jax.jit
    def evaluate(a, degrees):
        number = lambda x: jnp.asarray(x, dtype)  # noqa: E731
        mean = number(m) + jnp.zeros_like(a)
        first = scalar.natural(mean=mean, kappa=kappa, concentration=a, rate=b)
        theta = MeanPrecision(number(x), number(0.0))
        wide = matrix.natural(
            mean=number([m]), kappa=number(kappa), scale=number([[0.5 / b]]), degrees=degrees
        )
        flat = MeanPrecision(number([x]), number([[0.0]]))
        varied = by_variance.natural(mean=mean, kappa=kappa, concentration=a, scale=b)
        return (
            scalar.log_prob(first, theta),
            matrix.log_prob(wide, flat),
            jax.grad(lambda t: matrix.log_prob(wide, t)[0])(flat).precision,
            by_variance.log_prob(varied, MeanVariance(number(x), number(0.0))),
        )

    a = np.array([0.5, 0.25, 0.75], dtype)
    # sqrt(kappa / 2 pi) b^a / Gamma(a) at a = 1/2; the Wishart density of a number is gamma's.
    top = 0.5 * np.log(kappa / (2 * np.pi)) + 0.5 * np.log(b) - sc.gammaln(0.5)
    first, second, slope, never = evaluate(a, 2 * a)
    digits = 2e-6 if dtype == np.float32 else 1e-12
    close(first, [top, np.inf, -np.inf], rtol=digits)
    close(second, [top, np.inf, -np.inf], rtol=digits)
    close(slope, [[-b - 0.5 * kappa * (x - m) ** 2]], rtol=1e-5)
    assert list(never) == [-np.inf] * 3


def test_the_default_density_of_a_family_takes_zero_times_log_zero_as_zero(x64):
    """As for families outside the registry that write T = log x."""
    gamma, dirichlet = families.get("gamma"), families.get("dirichlet")
    default = program(families.ExponentialFamily.log_prob)
    lam = gamma.natural(concentration=[1.0, 2.0, 0.5], rate=2.0)
    close(default(gamma, lam, np.zeros(3)), [np.log(2.0), -np.inf, np.inf])
    flat = dirichlet.natural(concentration=np.ones(3))
    close(default(dirichlet, flat, np.array([0.5, 0.5, 0.0])), np.log(2.0))
