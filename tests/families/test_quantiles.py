"""Distribution functions, quantiles and intervals of marginals against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import blr_optax as blr

COVARIANCE = np.array([[2.0, 0.5], [0.5, 1.0]])
DIAGONAL = np.sqrt(np.diag(COVARIANCE))
MEAN = np.array([1.0, -3.0])
A, B = np.array([0.3, 2.0, 60.0]), np.array([2.0, 0.5, 4.0])
SUM = A.sum()

# family: standard parameters, scipy's marginals (a number may be an array of them)
ROWS = {
    "normal": ({"mean": A, "variance": B}, stats.norm(A, np.sqrt(B))),
    "log_normal": (
        {"location": A[:2], "variance": B[:2]}, stats.lognorm(np.sqrt(B[:2]), 0, np.exp(A[:2]))
    ),
    "gamma": ({"concentration": A, "rate": B}, stats.gamma(A, scale=1 / B)),
    "inverse_gamma": ({"concentration": A, "scale": B}, stats.invgamma(A, scale=B)),
    "exponential": ({"rate": B}, stats.expon(scale=1 / B)),
    "beta": ({"alpha": A, "beta": B}, stats.beta(A, B)),
    "dirichlet": ({"concentration": A}, stats.beta(A, SUM - A)),
    "laplace": ({"location": A, "scale": B}, stats.laplace(A, B)),
    "weibull": ({"scale": A, "shape": B}, stats.weibull_min(B, scale=A)),
    "inverse_gaussian": ({"mean": A, "shape": B}, stats.invgauss(A / B, scale=B)),
    "gaussian": ({"mean": MEAN, "covariance": COVARIANCE}, stats.norm(MEAN, DIAGONAL)),
    "gaussian_fixed": ({"mean": MEAN, "covariance": COVARIANCE}, stats.norm(MEAN, DIAGONAL)),
    "student_t": (
        {"mean": MEAN, "degrees": 3.0, "scale": COVARIANCE}, stats.t(3.0, MEAN, DIAGONAL)
    ),
}  # fmt: skip
P = np.array([1e-3, 0.025, 0.3, 0.5, 0.9, 0.975])


@pytest.mark.parametrize("name", ["gamma", "gaussian"])
def test_quantiles_and_distribution_functions_are_scipys(name, dtype):
    check_quantiles(name, dtype)


def check_quantiles(name, dtype):
    standard, expected = ROWS[name]
    q = blr.distribution(name, **{k: np.asarray(x, dtype) for k, x in standard.items()})
    p = P.astype(dtype)
    found, back, low, high = jax.jit(lambda q, p: (q.icdf(p), q.cdf(q.icdf(p)), *q.interval(0.9)))(
        q, p
    )
    rtol = 1e-9 if dtype == np.float64 else 3e-4
    want = np.stack([expected.ppf(x) for x in P])
    # Where the density is nearly 0 or 1 on a wide range, float32 holds the probability only.
    scale = np.abs(want) + (1e-30 if dtype == np.float64 else 1e-6)
    assert found.dtype == dtype and found.shape == want.shape
    assert np.max(np.abs(found - want) / scale) < rtol
    np.testing.assert_allclose(back, np.broadcast_to(P[:, None], want.shape), rtol=rtol)
    np.testing.assert_allclose(low, expected.ppf(0.05), rtol=rtol, atol=1e-30)
    np.testing.assert_allclose(high, expected.ppf(0.95), rtol=rtol)


@pytest.mark.parametrize("name", ["gamma", "inverse_gamma", "log_normal", "beta", "weibull"])
def test_outside_the_support_there_is_nothing_and_the_ends_are_its_ends(name, x64):
    standard, expected = ROWS[name]
    q = blr.distribution(name, **standard)
    points = np.array([-1.0, 0.0, 1.0, 50.0])
    shape = np.shape(expected.mean())
    theta = np.broadcast_to(points.reshape(-1, *[1] * len(shape)), (4, *shape))
    cdf, ends = jax.jit(lambda q, x: (q.cdf(x), q.icdf(np.array([0.0, 1.0]))))(q, theta)
    np.testing.assert_allclose(cdf, expected.cdf(theta), rtol=1e-10, atol=1e-300)
    np.testing.assert_array_equal(ends, np.stack([expected.ppf(0.0), expected.ppf(1.0)]))


def test_a_mixture_is_the_sum_of_its_parts(x64):
    mean, variance = np.array([[-2.0, 0.0], [3.0, 1.0]]), np.array([[1.0, 4.0], [0.25, 1.0]])
    weights = np.array([0.3, 0.7])
    parts = stats.norm(mean, np.sqrt(variance))
    for kind, spread in (("normal", {"variance": variance}), ("gaussian", None)):
        spread = spread or {"covariance": np.stack([np.diag(v) for v in variance])}
        family = blr.families.get("mixture", family=kind)
        q = blr.distribution(family, weights=weights, mean=mean, **spread)
        found = jax.jit(lambda q: q.icdf(P))(q)
        cdf = np.einsum("k,pkd->pd", weights, parts.cdf(np.asarray(found)[:, None, :]))
        np.testing.assert_allclose(cdf, np.broadcast_to(P[:, None], (6, 2)), rtol=1e-12)


def test_a_tree_of_weights_has_intervals_leaf_by_leaf(x64):
    """Lifts: a mean field, one beside frozen leaves, and a full covariance over a tree."""
    mean = {"w": np.array([[1.0, 2.0]]), "b": np.array(3.0)}
    variance = {"w": np.array([[4.0, 9.0]]), "b": np.array(0.25)}
    field = blr.distribution("normal", mean=mean, variance=variance)
    found, cdf = field.icdf([0.1, 0.8]), field.cdf({"w": np.zeros((1, 2)), "b": np.array(3.0)})
    for name in mean:
        std = np.sqrt(variance[name])
        want = np.stack([stats.norm.ppf(p, mean[name], std) for p in (0.1, 0.8)])
        np.testing.assert_allclose(found[name], want)
    np.testing.assert_allclose(cdf["w"], stats.norm.cdf(0, mean["w"], [[2.0, 3.0]]))
    np.testing.assert_allclose(cdf["b"], 0.5)
    raveled = blr.families.Raveled.like(blr.families.get("gaussian"), mean)
    q = blr.Distribution(raveled, raveled.natural(mean=mean, covariance=np.diag([0.25, 4.0, 9.0])))
    low, high = q.interval(0.5)
    np.testing.assert_allclose(low["w"], stats.norm.ppf(0.25, mean["w"], [[2.0, 3.0]]))
    np.testing.assert_allclose(high["b"], stats.norm.ppf(0.75, 3.0, 0.5))
    product = blr.families.Product({"m": "normal", "tau": "gamma"})
    both = blr.distribution(
        product,
        m={"mean": 0.0, "variance": 1.0},
        tau={"concentration": np.ones(2), "rate": np.ones(2)},
    )
    np.testing.assert_allclose(both.icdf(0.5)["tau"], np.full(2, np.log(2.0)))


def test_gradients_are_those_of_the_implicit_function(x64):
    """d icdf / d rate of a gamma is -x / rate; of its concentration, by differences of scipy."""
    x = lambda a, b: blr.distribution("gamma", concentration=a, rate=b).icdf(0.3)  # noqa: E731
    slope_a, slope_b = jax.jit(jax.grad(x, (0, 1)))(2.0, 3.0)
    value = stats.gamma(2.0, scale=1 / 3.0).ppf(0.3)
    np.testing.assert_allclose(slope_b, -value / 3.0, rtol=1e-9)
    difference = stats.gamma(2.0 + 1e-5, scale=1 / 3.0).ppf(0.3) - stats.gamma(
        2.0 - 1e-5, scale=1 / 3.0
    ).ppf(0.3)
    np.testing.assert_allclose(slope_a, difference / 2e-5, rtol=1e-6)


def test_families_without_one_say_so():
    for q in (
        blr.distribution("poisson", rate=2.0),
        blr.distribution("categorical", logits=[0.0, 1.0]),
        blr.distribution("skew_gaussian", mean=np.zeros(2), skew=np.ones(2), covariance=np.eye(2)),
    ):
        for ask in (lambda q=q: q.cdf(q.mean), lambda q=q: q.icdf(0.5), q.interval):
            with pytest.raises(ValueError, match=r"of its marginals in closed form: .*q.sample"):
                ask()


def test_what_is_no_probability_is_refused():
    q = blr.distribution("normal", mean=0.0, variance=1.0)
    with pytest.raises(ValueError, match=r"Distribution.icdf: p must be in \[0, 1\]"):
        q.icdf(95.0)
    with pytest.raises(ValueError, match=r"level=95; give a fraction"):
        q.interval(95)
    with pytest.raises(ValueError, match=r"Distribution.cdf: .*outside the domain"):
        (q**-1.0).cdf(0.0)
    assert np.isnan(jax.jit(lambda p: q.icdf(p))(jnp.array(1.5)))
