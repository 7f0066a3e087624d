"""Distribution: a density as a value, against densities on a grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tools import assert_same

from blr_optax import Distribution, families
from blr_optax import distribution as blr_distribution

NORMAL, GAUSSIAN = families.get("normal"), families.get("gaussian")
FIXED, DIAGONAL = families.get("gaussian_fixed"), families.get("gaussian_diagonal")
COVARIANCES = (np.array([[1.0, 0.4], [0.4, 0.7]]), np.array([[0.5, -0.2], [-0.2, 2.0]]))
MEANS = (np.array([0.3, -0.5]), np.array([-0.4, 0.8]))


def posterior(family, **standard):
    return Distribution(family, jax.jit(family.natural)(**standard))


def pair(name):
    """Two posteriors of a family, and their scipy densities over points [n, 2]."""
    return pair_in(name, jax.config.jax_enable_x64)


@functools.cache
def pair_in(name, x64):
    if name == "gaussian":
        q = [
            posterior(GAUSSIAN, mean=m, covariance=c)
            for m, c in zip(MEANS, COVARIANCES, strict=True)
        ]
        return q, [
            stats.multivariate_normal(m, c).logpdf for m, c in zip(MEANS, COVARIANCES, strict=True)
        ]
    diagonal = [np.diag(c) for c in COVARIANCES]
    logs = [
        stats.multivariate_normal(m, np.diag(v)).logpdf
        for m, v in zip(MEANS, diagonal, strict=True)
    ]
    if name == "gaussian_diagonal":
        tree = lambda x: {"a": x[:1], "b": x[1]}  # noqa: E731
        return [
            posterior(DIAGONAL, mean=tree(m), precision=tree(1 / v))
            for m, v in zip(MEANS, diagonal, strict=True)
        ], logs
    return [
        posterior(NORMAL, mean=m, variance=v) for m, v in zip(MEANS, diagonal, strict=True)
    ], logs


def log_density(q, points):
    """log q over points [n, 2], whatever the family's theta looks like."""
    if q.family == DIAGONAL:
        return q.log_prob({"a": points[:, :1], "b": points[:, 1]})
    value = q.log_prob(points)
    return value.sum(-1) if q.family == NORMAL else value


@functools.cache
def grid():
    z, h = np.linspace(-14, 14, 401, retstep=True)
    return np.stack(np.meshgrid(z, z), -1).reshape(-1, 2), h * h


@functools.cache
def densities(name):
    """The scipy log densities of a pair over the grid."""
    points, _ = grid()
    return [log(points) for log in pair(name)[1]]


@pytest.mark.parametrize("name", ["normal", "gaussian", "gaussian_diagonal"])
@pytest.mark.parametrize(
    ("combine", "exponents"),
    [
        (lambda p, q: p * q, (1, 1)),
        (lambda p, q: p**2 / q**0.25, (2, -0.25)),
        (lambda p, q: p**0.3, (0.3, 0)),
        (lambda p, q: p * q / q, (1, 0)),
        (lambda p, q: (p * q) ** 0.5 * q, (0.5, 1.5)),
    ],
)
def test_arithmetic_is_that_of_densities(x64, name, combine, exponents):
    (p, q), (log_p, log_q) = pair(name)[0], densities(name)
    points, cell = grid()
    product = exponents[0] * log_p + exponents[1] * log_q
    normalised = product - np.log(np.sum(np.exp(product)) * cell)
    found = jax.jit(lambda p, q, points: log_density(combine(p, q), points))(p, q, points)
    np.testing.assert_allclose(found, normalised, rtol=1e-9, atol=1e-8)


def test_a_known_base_measure_is_counted_once(x64):
    """q1 q2 / h for the fixed Gaussian: lambda adds, the known precision does not move."""
    s = np.linalg.inv(COVARIANCES[0])
    p, q = (posterior(FIXED, mean=m, precision=s) for m in MEANS)
    points, cell = grid()
    both, ratio, root, found = jax.jit(
        lambda p, q, x: ((p * q).mean, (p / q).mean, (p**0.5).variance, (p * q).log_prob(x))
    )(p, q, points)
    np.testing.assert_allclose(both, MEANS[0] + MEANS[1], rtol=1e-12)
    np.testing.assert_allclose(ratio, MEANS[0] - MEANS[1], rtol=1e-12)
    np.testing.assert_allclose(root, np.diag(COVARIANCES[0]), rtol=1e-12)
    of_mean = lambda m: stats.multivariate_normal(m, COVARIANCES[0]).logpdf(points)  # noqa: E731
    product = of_mean(MEANS[0]) + of_mean(MEANS[1]) - of_mean(np.zeros(2))
    product -= np.log(np.sum(np.exp(product)) * cell)
    np.testing.assert_allclose(found, product, rtol=1e-9, atol=1e-8)


def test_methods_are_those_of_the_family(x64):
    p, q = pair("gaussian")[0]
    asked = jax.jit(
        lambda p, q: {
            "mean": (p.mean, GAUSSIAN.mean(p.natural)),
            "variance": p.variance,
            "covariance": p.standard()["covariance"],
            "quadratic": p.expectation().quadratic,
            "entropy": p.entropy(),
            "sample": p.sample(jax.random.key(0), (3, 4)),
            "kl": p.kl(q),
            "proper": p.proper,
        }
    )
    found = asked(p, q)
    np.testing.assert_array_equal(*found["mean"])
    np.testing.assert_allclose(found["variance"], np.diag(COVARIANCES[0]))
    np.testing.assert_allclose(found["covariance"], COVARIANCES[0])
    np.testing.assert_allclose(found["quadratic"], COVARIANCES[0] + np.outer(MEANS[0], MEANS[0]))
    np.testing.assert_allclose(
        found["entropy"], stats.multivariate_normal(MEANS[0], COVARIANCES[0]).entropy()
    )
    assert found["sample"].shape == (3, 4, 2)
    d, c = MEANS[0] - MEANS[1], COVARIANCES
    s = np.linalg.inv(c[1])
    kl = 0.5 * (
        np.trace(s @ c[0]) - 2 + d @ s @ d - np.log(np.linalg.det(c[0]) / np.linalg.det(c[1]))
    )
    np.testing.assert_allclose(found["kl"], kl)
    assert bool(found["proper"])


IMPROPER = {
    "normal": lambda: pair("normal")[0][0] ** -1.0,
    "gaussian": lambda: pair("gaussian")[0][0] / pair("gaussian")[0][0],
    "gaussian_diagonal": lambda: pair("gaussian_diagonal")[0][0] ** -0.5,
}


@pytest.mark.parametrize("name", IMPROPER)
def test_improper_sites_take_part_in_arithmetic_only(x64, name):
    site, (p, q) = IMPROPER[name](), pair(name)[0]
    assert not bool(site.proper)
    theta = p.sample(jax.random.key(0))
    asked = {
        "mean": lambda: site.mean,
        "variance": lambda: site.variance,
        "standard": site.standard,
        "expectation": site.expectation,
        "sample": lambda: site.sample(jax.random.key(0)),
        "log_prob": lambda: site.log_prob(theta),
        "entropy": site.entropy,
        "kl": lambda: site.kl(p),
    }
    for what, ask in asked.items():
        with pytest.raises(ValueError, match=rf"Distribution.{what}: .* outside the domain"):
            ask()
    with pytest.raises(ValueError, match=r"Distribution.kl: .* outside the domain"):
        p.kl(site)
    back = (p * q) * site / site
    jax.tree.map(np.testing.assert_allclose, back.natural, (p * q).natural)


def test_under_tracing_an_improper_site_is_nan_not_an_error(x64):
    site = IMPROPER["normal"]()
    entropy, proper = jax.jit(lambda q: (q.entropy(), q.proper))(site)
    assert np.isnan(entropy).all() and not bool(proper)


def test_a_posterior_is_a_pytree(x64):
    p, q = pair("gaussian")[0]
    assert len(jax.tree.leaves(p)) == 2
    assert jax.tree.structure(p) == jax.tree.structure(q)
    product = jax.jit(lambda a, b: a * b)(p, q)
    assert isinstance(product, Distribution) and product.family == GAUSSIAN
    jax.tree.map(np.testing.assert_allclose, product, p * q)
    both = jax.tree.map(lambda *x: np.stack(x), p, q)
    means = jax.jit(jax.vmap(lambda a: a.mean))(both)
    np.testing.assert_allclose(means, MEANS)
    np.testing.assert_allclose(both.mean, MEANS)  # families broadcast over leading axes
    derivative = jax.jit(jax.grad(lambda a: a.kl(p)))
    slope = derivative(p)
    assert isinstance(slope, Distribution)
    jax.tree.map(lambda x: np.testing.assert_allclose(x, 0, atol=1e-12), slope)
    h = 1e-6
    along = jax.jit(
        lambda t: Distribution(GAUSSIAN, GAUSSIAN.combine((1.0, q.natural), (t, p.natural))).kl(p)
    )
    ahead, behind = along(h), along(-h)
    np.testing.assert_allclose(
        jax.jit(GAUSSIAN.inner)(derivative(q).natural, p.natural),
        (ahead - behind) / (2 * h),
        rtol=1e-6,
    )


def test_one_improper_element_of_a_batch_makes_it_improper(x64):
    batch = Distribution(NORMAL, families.GaussianNatural(jnp.zeros(2), jnp.array([-1.0, 1.0])))
    assert not bool(batch.proper)
    with pytest.raises(ValueError, match="outside the domain"):
        _ = batch.mean


@pytest.mark.parametrize("op", ["__mul__", "__truediv__", "kl"])
def test_members_of_two_families_do_not_mix(op):
    normal, gaussian = pair("normal")[0][0], pair("gaussian")[0][0]
    for other in (gaussian, 2.0):
        with pytest.raises(ValueError, match="two members of one family; got Normal"):
            getattr(normal, op)(other)


@pytest.mark.parametrize("op", ["__mul__", "__truediv__", "kl"])
def test_members_over_other_trees_do_not_mix(op):
    """What the posterior of a network meets: the prior of one number, and of another tree."""
    tree = {"w": np.ones(3, np.float32), "b": np.float32(0.0)}
    q = blr_distribution("normal", mean=tree, precision=4.0)
    act = getattr(q, op)
    with pytest.raises(ValueError, match=r"make the other one by distribution\(q\.family"):
        act(blr_distribution("normal", mean=0.0, precision=1.0))
    for mean in (0.0, tree["w"], {"w": tree["w"]}, [tree["w"], tree["b"]]):
        with pytest.raises(ValueError, match=r"one tree of parameters; .*'b': \(\), 'w': \(3,\)"):
            act(blr_distribution(q.family, mean=mean, precision=1.0))
    zeros = jax.tree.map(np.zeros_like, tree)
    found = act(blr_distribution(q.family, mean=zeros, precision=1.0))
    if op == "kl":  # four numbers of precision 4 against 1, three of them at 1
        assert float(found) == pytest.approx(4 * 0.5 * (0.25 - 1 + np.log(4)) + 3 * 0.5, rel=1e-5)
    else:
        precision = {"__mul__": 5.0, "__truediv__": 3.0}[op]
        np.testing.assert_allclose(found.mean["w"], np.full(3, 4 / precision), rtol=1e-6)


@pytest.mark.parametrize("name", ["dirichlet", "categorical"])
def test_members_of_different_sizes_are_refused(name):
    family = families.get(name)
    make = {
        "dirichlet": lambda k: family.natural(concentration=jnp.ones(k)),
        "categorical": lambda k: family.natural(logits=jnp.zeros(k)),
    }[name]
    three, five = (Distribution(family, make(k)) for k in (3, 5))
    for act in (lambda: three.kl(five), lambda: three * five, lambda: three / five):
        with pytest.raises(ValueError, match="of one size"):
            act()


def test_distribution_makes_what_three_calls_make():
    made = blr_distribution("normal", mean=[0.0, 1.0], precision=4.0)
    assert_same(made, Distribution(NORMAL, NORMAL.natural(mean=[0.0, 1.0], precision=4.0)))
    tree = {"w": np.ones(2, np.float32), "b": np.float32(0.5)}
    lifted = blr_distribution("normal", mean=tree, variance=None, precision=4.0)
    assert_same(lifted, Distribution(DIAGONAL, DIAGONAL.natural(mean=tree, precision=4.0)))
    mixture = families.get("mixture", family="normal")
    standard = {"weights": [0.5, 0.5], "mean": [[-1.0], [1.0]], "variance": [[1.0], [1.0]]}
    assert_same(
        blr_distribution(mixture, **standard), Distribution(mixture, mixture.natural(**standard))
    )
    with pytest.raises(ValueError, match="unknown family 'norml'"):
        blr_distribution("norml", mean=0.0)
    with pytest.raises(ValueError, match=r"normal\.natural.*scale"):
        blr_distribution("normal", mean=0.0, scale=1.0)


def test_an_integer_is_a_seed():
    q = blr_distribution("normal", mean=0.0, precision=1.0)
    np.testing.assert_array_equal(q.sample(3, (2,)), q.sample(jax.random.key(3), (2,)))
