"""Families on the half-line, the line and the simplex: golden points and hard points."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from family_rows.positive import ROWS
from scipy import special, stats
from tools import compiled, load_golden

from blr_optax.families._continuous.inverse_gaussian import (
    _follow_inverse_gaussian,
    inverse_gaussian_slopes,
)
from blr_optax.families._numerics.gamma_draws import _follow_gamma, gamma_log_draw, gamma_slope

RENAMED = {
    "gamma": {"alpha": "concentration", "beta": "rate"},
    "inverse_gamma": {"alpha": "concentration", "beta": "scale"},
    "exponential": {},
    "inverse_gaussian": {},
    "beta": {"a": "alpha", "b": "beta"},
    "dirichlet": {"alpha": "concentration"},
}
PARTS = (3, 5, 20)  # cases are stacked, and those of the Dirichlet differ in length
GROUPS = [(name, None) for name in RENAMED if name != "dirichlet"]
GROUPS += [("dirichlet", k) for k in PARTS]
ROUNDINGS = 100  # the accuracy bar, in roundings of what is given


def bar(dtype):
    return 1e-10 if dtype is np.float64 else 1e-4


def cases_of(name, parts):
    cases = load_golden("expfam_values")["families"][name]["cases"]
    return [c for c in cases if parts in (None, len(np.ravel(c["natural"])))]


def columns_of(name, params, dtype):
    """The stacked standard parameters of golden cases."""
    return {RENAMED[name].get(k, k): np.array([p[k] for p in params], dtype) for k in params[0]}


def learnt(family, x):
    """The fields of lambda or mu as one last axis."""
    fields = [getattr(x, name) for name in family.domains]
    return fields[0] if family.event_ndim else jnp.stack(fields, -1)


def matrix(family, lam, product, kind):
    """The matrices of a batch whose products with vectors of a type are given."""

    def one(lam):
        flat = learnt(family, lam)

        def column(e):
            v = kind(e) if family.event_ndim else kind(*e)
            return learnt(family, product(lam, v))

        return jax.vmap(column, out_axes=1)(jnp.eye(flat.shape[-1], dtype=flat.dtype))

    return jax.vmap(one)(lam)


def inverse_fisher(family, lam):
    return matrix(family, lam, family.inverse_fisher_product, family.Expectation)


def inverse(family, mu):
    """lambda(mu), and whether there is one."""
    return compiled(lambda mu: family.natural_from_expectation(mu, with_status=True), mu)


def check(found, expected, dtype, conditioning):
    """Relative error below the bar, or what `conditioning` roundings of the input may cause."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == dtype
    assert np.all(np.isfinite(found))
    allowed = np.maximum(
        bar(dtype) * np.abs(expected), ROUNDINGS * np.finfo(dtype).eps * np.asarray(conditioning)
    )
    np.testing.assert_array_less(np.abs(found - expected), allowed + 1e-300)


def with_conditioning(function, *arguments):
    """function(*arguments) in float64, and how much relative changes of the arguments change it.

    Sums of its terms are not exact either: one rounding of order one is always allowed.
    """
    leaves, treedef = jax.tree.flatten(arguments)
    leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
    variants = [leaves]
    for i, leaf in enumerate(leaves):
        for j in range(leaf[0].size):
            factor = np.ones(leaf[0].size)
            factor[j] += 1e-7
            moved = leaf * factor.reshape(leaf[0].shape)
            variants.append([*leaves[:i], moved, *leaves[i + 1 :]])
    stacked = [np.concatenate(variant) for variant in zip(*variants, strict=True)]
    values = compiled(function, *jax.tree.unflatten(treedef, stacked))
    values = values.reshape(len(variants), len(leaves[0]), *values.shape[1:])
    return values[0], 1.0 + np.abs((values[1:] - values[0]) / 1e-7).sum(0)


def numbers(family, lam, q):
    """What golden cases give as one number each."""
    log_h = family.expected_log_base_measure(lam)
    a = family.log_partition(lam) - (log_h if family.constant_base_measure else 0.0)
    return jnp.stack([a, family.entropy(lam), log_h, family.kl(lam, q)], -1)


def golden_numbers(family, case):
    a = case["log_partition"] - case["E_log_h"] * family.constant_base_measure
    return a, case["entropy"], case["E_log_h"], case["kl"]["kl_p_q"]


def density_points(name, parts):
    """Which case a point is of, where it is, and log q there."""
    rows = [(i, at) for i, c in enumerate(cases_of(name, parts)) for at in c["log_prob"]]
    owner, points = zip(*rows, strict=True)
    return np.array(owner), np.array([p["x"] for p in points]), [p["value"] for p in points]


@functools.cache
def golden(name, parts, dtype):
    """Everything that a family says of its golden cases, by one program for all tests."""
    family, cases = ROWS[name].family, cases_of(name, parts)
    owner, x, _ = density_points(name, parts)
    mu = np.array([c["expectation"] for c in cases], dtype)
    given = family.Expectation(mu) if family.event_ndim else family.Expectation(*mu.T)

    def evaluate(own, others, x, given):
        lam, q = family.natural(**own), family.natural(**others)
        found = {
            "lambda": lam,
            "q": q,
            "flat": learnt(family, lam),
            "mu": learnt(family, family.expectation(lam)),
            "fisher": matrix(family, lam, family.fisher_product, family.Natural),
            "inverse_fisher": inverse_fisher(family, lam),
            "inverse": family.natural_from_expectation(given, with_status=True),
        }
        if dtype is np.float32:  # in float64 `with_conditioning` finds these
            at = jax.tree.map(lambda v: v[owner], lam)
            found |= {"numbers": numbers(family, lam, q), "log_prob": family.log_prob(at, x)}
        return found

    own, others = [c["params"] for c in cases], [c["kl"]["q_params"] for c in cases]
    columns = (columns_of(name, params, dtype) for params in (own, others))
    return compiled(evaluate, *columns, np.asarray(x, dtype), given)


@functools.cache  # for both types
def wide_numbers(name, parts):
    family, found = ROWS[name].family, golden(name, parts, np.float64)
    function = functools.partial(numbers, family)
    value, conditioning = with_conditioning(function, found["lambda"], found["q"])
    # log Gamma(a) is a difference of terms as large as a log a.
    flat = np.abs(found["flat"])
    conditioning[:, 0] += np.sum(flat * np.log(2 + flat), -1)
    return value, conditioning


@functools.cache
def wide_density(name, parts):
    owner, x, _ = density_points(name, parts)
    lam = golden(name, parts, np.float64)["lambda"]
    return with_conditioning(
        ROWS[name].family.log_prob, jax.tree.map(lambda v: v[owner], lam), np.asarray(x)
    )


@pytest.mark.parametrize(("name", "parts"), GROUPS)
def test_golden_inverse(name, parts, dtype):
    """lambda(mu) is as accurate as mu allows, and so is F^{-1}: golden says how much that is."""
    family, cases, everything = ROWS[name].family, cases_of(name, parts), golden(name, parts, dtype)
    mu = np.array([c["expectation"] for c in cases], dtype)
    moved = np.abs(everything["inverse_fisher"] * mu[:, None, :]).sum(-1)
    recorded = np.array([c["mu_to_lambda_relative_amplification"] for c in cases])
    flat = everything["flat"]
    known = recorded < 1e100
    found = np.max(np.abs(moved / np.where(flat == 0, np.nan, flat))[known], -1)
    np.testing.assert_allclose(found, recorded[known], rtol=1e-8 if dtype is np.float64 else 2e-2)

    back, proper = everything["inverse"]
    back = np.asarray(learnt(family, back))
    expected = np.array([c["natural"] for c in cases])
    # Where rounding mu changes concentrations by a tenth or more, there may be no lambda at all.
    hopeless = ROUNDINGS * np.finfo(dtype).eps * np.max(moved / (1 + np.abs(flat)), -1) > 0.1
    assert np.all(proper | hopeless)
    assert dtype is np.float32 or not np.any(hopeless)
    keep = ~hopeless
    check(back[keep], expected[keep], dtype, (moved + np.abs(flat))[keep])


HARD = {
    3: [[1e-6] * 3, [1e8] * 3, [1e4, 1, 1], [1e-6, 1, 1e6], [1e8, 1e-3, 5], [1e-6, 1e-6, 1e4]],
    2: [[0.01, 1e4], [1e-6, 1e8], [1e-3, 1e-6], [0.5, 0.5], [1e8, 2e8]],
    50: [[0.01] * 50, [1e-6] * 49 + [10.0], list(np.geomspace(1e-6, 1e8, 50))],
}


@pytest.mark.parametrize("parts", HARD)
def test_dirichlet_inverse_at_hard_points(parts, x64):
    family, beta = ROWS["dirichlet"].family, ROWS["beta"].family

    def evaluate(concentration):
        lam = family.natural(concentration=concentration)
        mu = family.expectation(lam)
        back = family.natural_from_expectation(mu, with_status=True)
        pair = beta.Expectation(*mu.log.T) if parts == 2 else None
        pair = pair and beta.natural_from_expectation(pair, with_status=True)
        return lam, mu, back, inverse_fisher(family, lam), pair

    lam, mu, (back, proper), product, pair = compiled(evaluate, np.array(HARD[parts]))
    moved = np.abs(product * mu.log[:, None, :]).sum(-1)
    assert np.all(proper)
    check(back.log, lam.log, np.float64, 1 + moved)
    if parts == 2:
        one, status = pair
        np.testing.assert_allclose(np.stack(one, -1), back.log, rtol=1e-12)
        assert np.all(status)


@pytest.mark.parametrize("name", ["gamma", "inverse_gamma"])
def test_gamma_inverse_at_hard_points(name, x64):
    family = ROWS[name].family
    a, b = np.meshgrid([1e-6, 1e-3, 1.0, 30.0, 1e4, 1e8], [1e-8, 1.0, 1e8])

    def evaluate(standard):
        lam = family.natural(**standard)
        mu = family.expectation(lam)
        return lam, mu, *family.natural_from_expectation(mu, with_status=True)

    standard = dict(zip(ROWS[name].members[0], (a, b), strict=True))
    lam, mu, back, proper = compiled(evaluate, standard)
    assert np.all(proper)
    for found, expected in zip(back, lam, strict=True):
        allowed = 1e-10 + ROUNDINGS * np.finfo(float).eps * 2 * (1 + a) * (1 + np.abs(mu.log))
        error = np.abs(found[a != 1] / expected[a != 1] - 1)
        np.testing.assert_array_less(error, allowed[a != 1])


UNREACHABLE = {
    "gamma": [(0.1, 1.0), (0.0, -1.0), (np.nan, 1.0)],  # E[log x] > log E[x]
    "inverse_gamma": [(-0.1, 1.0), (0.0, 0.0)],
    "exponential": [(0.0,), (-1.0,), (np.inf,)],
    "inverse_gaussian": [(1.0, 0.9), (1.0, 1.0), (-1.0, 2.0)],
    "beta": [(-0.1, -0.1), (0.1, -5.0), (np.nan, -1.0)],
    "log_normal": [(1.0, 1.0), (1.0, 0.5)],
    "laplace": [(0.0, 0.4), (np.nan, 0.4)],
    "weibull": [(-1.0, 1.7)],
}


@pytest.mark.parametrize("name", UNREACHABLE)
def test_unreachable_expectations_give_nan(name):
    family = ROWS[name].family
    mu = family.Expectation(*np.array(UNREACHABLE[name], np.float32).T)
    lam, proper = inverse(family, mu)
    assert not np.any(proper)
    for field in family.domains:
        assert np.all(np.isnan(getattr(lam, field)))


def test_unreachable_dirichlet():
    family = ROWS["dirichlet"].family
    mu = family.Expectation(np.log(np.array([[0.2, 0.3, 0.6], [0.2, 0.3, 0.4]], np.float32)))
    lam, proper = inverse(family, mu)
    np.testing.assert_array_equal(proper, [False, True])
    assert np.all(np.isnan(lam.log[0])) and np.all(lam.log[1] > -1)


def dirichlet_kl(p, q):
    p, q = [mpmath.mpf(x) for x in p], [mpmath.mpf(x) for x in q]
    total = mpmath.loggamma(sum(p)) - mpmath.loggamma(sum(q))
    for x, y in zip(p, q, strict=True):
        slope = mpmath.digamma(x) - mpmath.digamma(sum(p))
        total += mpmath.loggamma(y) - mpmath.loggamma(x) + (x - y) * slope
    return float(total)


def gamma_kl(p, q):
    (a, b), (c, d) = ([mpmath.mpf(x) for x in pair] for pair in (p, q))
    total = mpmath.loggamma(c) - mpmath.loggamma(a) + c * mpmath.log(b / d)
    return float(total + (a - c) * mpmath.digamma(a) + (d - b) * a / b)


def test_divergence_of_neighbours_at_large_concentrations(dtype):
    # All numbers are exact in float32, lambda too.
    a, apart = 2.0**26, 2.0**13
    with mpmath.workdps(60):
        gamma, dirichlet = ROWS["gamma"].family, ROWS["dirichlet"].family
        p = gamma.Natural(np.asarray(a, dtype), np.asarray(-a, dtype))
        q = gamma.Natural(np.asarray(a + apart, dtype), np.asarray(-a, dtype))
        expected = gamma_kl((a + 1, a), (a + apart + 1, a))
        np.testing.assert_allclose(
            jax.jit(gamma.kl)(p, q), expected, rtol=1e4 * np.finfo(dtype).eps
        )
        one, two = np.array([a, a, 2 * a]), np.array([a + apart, a, 2 * a])
        p, q = (dirichlet.Natural(np.asarray(x, dtype)) for x in (one, two))
        expected = dirichlet_kl(one + 1, two + 1)
        found = jax.jit(dirichlet.kl)(p, q)
        np.testing.assert_allclose(found, expected, rtol=1e4 * np.finfo(dtype).eps)


def test_density_far_in_the_tails(dtype):
    """Small ratios x / m, and points that are many standard deviations out."""
    family = ROWS["gamma"].family
    standard = {"concentration": np.array([20.0, 1e8, 1e-3], dtype), "rate": dtype(1e-6)}
    x = np.array([1e-33, 1.3e14, 1e-30], dtype)

    def evaluate(standard, x):
        lam = family.natural(**standard)
        return family.log_prob(lam, x), family.standard(lam)

    value, standard = compiled(evaluate, standard, x)
    a, b = (np.asarray(v, np.float64) for v in standard.values())
    with mpmath.workdps(50):
        expected = [
            float((mpmath.mpf(a) - 1) * mpmath.log(x) - b * x + a * mpmath.log(b))
            - float(mpmath.loggamma(a))
            for a, b, x in zip(*np.broadcast_arrays(a, b, x.astype(np.float64)), strict=True)
        ]
    np.testing.assert_allclose(value, expected, rtol=1e-9 if dtype is np.float64 else 1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_outside_the_support(name, x64):
    family, member = ROWS[name].family, ROWS[name].members[0]
    if name == "laplace":
        return
    outside = {"dirichlet": [[-0.1, 0.6, 0.5], [0.2, 0.2, 0.2]], "beta": [-0.1, 1.1]}
    x = np.array(outside.get(name, [-1.0, -1e-3]))

    def evaluate(member):
        lam = family.natural(**member)
        density = lambda lam: family.log_prob(lam, x)  # noqa: E731
        return density(lam), jax.jacrev(density)(lam)

    value, slopes = compiled(evaluate, member)
    assert np.all(np.isneginf(value))
    for slope in jax.tree.leaves(slopes):
        assert np.all(np.isfinite(slope))


IMPLICIT = load_golden("implicit_reparam")["cases"]


def implicit(kind):
    rows = [c for c in IMPLICIT if c["dist"].startswith(kind)]
    params = [np.array(p) for p in zip(*(c["params"].values() for c in rows), strict=True)]
    return params, np.array([c["x"] for c in rows]), np.array([c["dx"] for c in rows])


def test_gamma_samples_follow_their_concentration(dtype):
    rows = [c for c in IMPLICIT if c["dist"].startswith("gamma")]
    a = np.array([c["params"]["alpha"] for c in rows], dtype)
    log_x = np.log([c["x"] for c in rows]).astype(dtype)
    found = jax.jit(gamma_slope)(a, log_x)
    expected = [c["dlogx"] for c in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-12 if dtype is np.float64 else 1e-5)


def exact_gamma_slope(a, x):
    a, x = mpmath.mpf(a), mpmath.mpf(x)

    def cdf(a):  # from the side where it is not nearly one
        if x < a:
            return mpmath.gammainc(a, 0, x, regularized=True)
        return -mpmath.gammainc(a, x, mpmath.inf, regularized=True)

    h = a * mpmath.mpf(10) ** -12
    density = mpmath.exp(a * mpmath.log(x) - x) / mpmath.gamma(a)
    return float(-(cdf(a + h) - cdf(a - h)) / (2 * h) / density)


@functools.cache  # for both types
def gamma_plane():
    """Points and slopes on both sides of every border between the formulas, to six deviations."""
    points = []
    for a in (1e-3, 0.03, 0.5, 0.999, 1.2, 4.0, 7.9, 8.1, 60.0, 3e3):
        points += [(a, a * np.exp(z / np.sqrt(max(a, 1.0)))) for z in (-5.0, -1.0, -0.01)]
        points += [(a, a + z * np.sqrt(a)) for z in (0.01, 1.0, 6.0)]
    with mpmath.workdps(40):
        return *np.array(points).T, [exact_gamma_slope(*point) for point in points]


def test_gamma_slopes_across_the_plane(dtype):
    """By both formulas."""
    a, x, expected = gamma_plane()
    found = jax.jit(gamma_slope)(a.astype(dtype), np.log(x).astype(dtype))
    np.testing.assert_allclose(found, expected, rtol=1e-11 if dtype is np.float64 else 5e-5)


def test_inverse_gaussian_samples_follow_their_parameters(dtype):
    (m, s), x, dx = implicit("inverse_gaussian")
    found = jax.jit(inverse_gaussian_slopes)(*(np.asarray(v, dtype) for v in (m, s, x)))
    rtol = 1e-12 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(np.stack(found, -1), dx, rtol=rtol)


def test_beta_samples_follow_their_parameters_on_average(x64):
    """x = g / (g + h) for gammas: given x, the mean of dx is the derivative at a fixed quantile."""
    (alpha, beta), x, dx = implicit("beta")
    z, h = np.linspace(-120.0, 12.0, 3001, retstep=True)  # log(g + h), which is gamma
    weight = h * np.exp(stats.loggamma(alpha + beta).logpdf(z[:, None]))
    slope = jax.jit(gamma_slope)
    by_alpha = (1 - x) * np.sum(weight * slope(alpha, z[:, None] + np.log(x)), 0)
    by_beta = (1 - x) * np.sum(weight * slope(beta, z[:, None] + np.log1p(-x)), 0)
    np.testing.assert_allclose(np.stack([x * by_alpha, -x * by_beta], -1), dx, rtol=1e-9)


@pytest.mark.parametrize("name", ["gamma", "inverse_gamma", "beta", "dirichlet"])
def test_samples_at_small_concentrations(name):
    """float32 cannot hold most of these draws: the nearest number inside the support instead."""
    family = ROWS[name].family
    small = np.array([[1e-3, 0.02, 0.3], [0.01, 0.01, 4.0]], np.float32)
    fields = {"dirichlet": (small - 1,), "beta": (small - 1, small[::-1] - 1)}
    minus = {"gamma": (small - 1, -small), "inverse_gamma": (-1 - small, -small)}
    lam = family.Natural(*(fields | minus)[name])

    def draw(lam):
        sample = lambda lam: family.sample(jax.random.key(0), lam, (500,))  # noqa: E731
        x, change = jax.jvp(sample, (lam,), (jax.tree.map(jnp.ones_like, lam),))
        return x, change, family.log_prob(lam, x)

    x, change, log_q = compiled(draw, lam)
    assert np.all(x > 0) and np.all(np.isfinite(x))
    assert not np.any(np.isnan(change))
    assert np.all(np.isfinite(log_q))
    if name == "beta":
        assert np.all(x < 1)
    if name == "dirichlet":
        np.testing.assert_allclose(x.sum(-1), 1.0, atol=1e-6)
        np.testing.assert_allclose(change.sum(-1), 0.0, atol=1e-3 * np.abs(change).max())


@pytest.mark.parametrize("name", ROWS)
def test_statistics_of_samples_move_as_the_fisher_matrix_says(name, x64):
    family, member = ROWS[name].family, ROWS[name].members[0]

    def evaluate(member):
        lam = family.natural(**member)
        along = jax.tree.map(lambda x: 0.3 * jnp.ones_like(x), lam)
        along = along._replace(**{k: jnp.zeros_like(getattr(lam, k)) for k in family.known})
        known = {"lam": lam} if family.known else {}

        def statistics(lam):
            draws = family.sample(jax.random.key(3), lam, (20000,))
            return family.sufficient_statistics(draws, **known)

        return jax.jvp(statistics, (lam,), (along,))[1], family.fisher_product(lam, along)

    slopes, expected = compiled(evaluate, member)
    for field in family.domains:
        found = getattr(slopes, field)
        error = np.std(found, 0) / np.sqrt(len(found)) + 1e-12
        np.testing.assert_array_less(np.abs(found.mean(0) - getattr(expected, field)), 5 * error)


def second_along_ones(f):
    first = lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]  # noqa: E731
    return lambda x: jax.jvp(first, (x,), (jnp.ones_like(x),))[1]


def test_second_derivatives_at_a_fixed_quantile(x64):
    """Following the first derivative for a little while changes it as the second one says."""
    a, log_x = np.array([0.05, 0.6, 3.0, 3.0, 50.0]), np.array([-9.0, 0.4, 0.3, 1.6, 3.8])
    slope, h = jax.jit(gamma_slope), 1e-4 * a
    here = np.asarray(slope(a, log_x))
    ahead, behind = (np.asarray(slope(a + t, log_x + t * here)) for t in (h, -h))
    second = compiled(second_along_ones(lambda a: _follow_gamma(a, log_x)), a)
    np.testing.assert_allclose(second, (ahead - behind) / (2 * h), rtol=1e-5)

    m, s, x = np.array([1.0, 3.0, 0.5]), np.array([1.0, 0.5, 20.0]), np.array([0.4, 2.7, 0.6])
    slope, h = jax.jit(lambda s, x: inverse_gaussian_slopes(m, s, x)[1]), 1e-4 * s
    here = np.asarray(slope(s, x))
    ahead, behind = (np.asarray(slope(s + t, x + t * here)) for t in (h, -h))
    second = compiled(second_along_ones(lambda s: _follow_inverse_gaussian(m, s, x)), s)
    np.testing.assert_allclose(second, (ahead - behind) / (2 * h), rtol=1e-5)


@pytest.mark.parametrize("name", ["log_normal", "laplace", "weibull"])
def test_against_scipy(name, x64):
    family = ROWS[name].family
    laws = {
        "log_normal": lambda s: stats.lognorm(s["variance"] ** 0.5, scale=np.exp(s["location"])),
        "laplace": lambda s: stats.laplace(s["location"], s["scale"]),
        "weibull": lambda s: stats.weibull_min(s["shape"], scale=s["scale"]),
    }
    members = list(ROWS[name].members)
    if name == "weibull":
        members += [{"scale": 2.0, "shape": 0.6}, {"scale": 0.5, "shape": 25.0}]

    @jax.jit
    def evaluate(member, x):
        lam = family.natural(**member)
        return family.log_prob(lam, x), family.mean(lam), family.variance(lam), family.entropy(lam)

    for member in members:
        law = laws[name](member)
        x = law.rvs(20, random_state=0)
        log_prob, mean, variance, entropy = evaluate(member, x)
        np.testing.assert_allclose(log_prob, law.logpdf(x), rtol=1e-11)
        np.testing.assert_allclose(mean, law.mean(), rtol=1e-11)
        np.testing.assert_allclose(variance, law.var(), rtol=1e-9)
        np.testing.assert_allclose(entropy, law.entropy(), rtol=1e-11)


@pytest.mark.parametrize("a", [0.05, 0.6, 3.0])
def test_logarithms_of_gamma_draws_have_their_moments(a, x64):
    count = 40_000
    *_, log_draw = compiled(
        lambda key: gamma_log_draw(key, jnp.asarray(a), (count,)), jax.random.key(0)
    )
    mean, variance = special.digamma(a), special.polygamma(1, a)
    fourth = special.polygamma(3, a) / variance**2 + 2.0  # relative variance of a square
    assert abs(log_draw.mean() - mean) < 5 * np.sqrt(variance / count)
    assert abs(log_draw.var() / variance - 1) < 5 * np.sqrt(fourth / count)


def test_weibull_variance_does_not_cancel(dtype):
    family = ROWS["weibull"].family
    k = np.array([0.5, 3.0, 1e3, 1e5], dtype)
    found = jax.jit(lambda k: family.variance(family.natural(scale=jnp.ones_like(k), shape=k)))(k)
    with mpmath.workdps(40):
        gamma = lambda n, k: mpmath.gamma(1 + n / mpmath.mpf(float(k)))  # noqa: E731
        expected = [float(gamma(2, k) - gamma(1, k) ** 2) for k in k]
    np.testing.assert_allclose(found, expected, rtol=1e-9 if dtype is np.float64 else 1e-4)


@pytest.mark.parametrize(
    ("name", "other"),
    [("laplace", {"scale": 0.9, "location": 1.5}), ("weibull", {"scale": 0.9, "shape": 2.6})],
)
def test_divergence_between_different_known_fields(name, other, x64):
    row = ROWS[name]
    family, member = row.family, row.members[0]
    x, w = row.rule(member)
    log_p, log_q = (np.maximum(row.logpdf(s, x), -1e4) for s in (member, other))
    expected = np.sum(w * np.exp(log_p) * (log_p - log_q))
    both = lambda p, q: family.kl(family.natural(**p), family.natural(**q))  # noqa: E731
    found = jax.jit(both)(member, other)
    # The other Laplace density has a kink inside the rule.
    np.testing.assert_allclose(found, expected, rtol=1e-4 if name == "laplace" else 1e-9)


@pytest.mark.parametrize("name", ["laplace", "weibull"])
def test_statistics_need_what_is_known(name):
    family = ROWS[name].family
    (known,) = family.known
    with pytest.raises(ValueError, match=f"known {known}: pass lam="):
        family.sufficient_statistics(np.ones(3, np.float32))

    def statistics(member, x):
        return family.sufficient_statistics(x, lam=family.natural(**member))

    t = jax.jit(statistics)(ROWS[name].members[0], np.ones(3, np.float32))
    assert type(t) is family.Expectation and all(x.shape == (3,) for x in t)


@functools.cache  # for both types
def inverse_gaussian_gradients():
    """Means, shapes, and grad_mu E[log h] by sixty digits."""
    m, s = np.array([1.0, 2.0, 0.5, 1.0, 3.0]), np.array([1e-6, 0.3, 20.0, 1e4, 1e8])

    def expected_log_h(u, v):  # of mu
        shape = 1 / (v - 1 / u)
        y = 2 * shape / u
        return mpmath.mpf(-1.5) * (mpmath.log(u) - mpmath.exp(y) * mpmath.e1(y))

    def slope(m, s, order):
        u = mpmath.mpf(m)
        v = 1 / u + 1 / mpmath.mpf(s)
        return float(mpmath.diff(expected_log_h, (u, v), order, h=mpmath.mpf(10) ** -30))

    with mpmath.workdps(60):
        pairs = list(zip(m, s, strict=True))
        return m, s, [[slope(*pair, order) for pair in pairs] for order in ((1, 0), (0, 1))]


def test_inverse_gaussian_base_measure_gradient_at_hard_points(dtype):
    """grad_mu E[log h] is F^{-1} times grad_lambda, whose terms cancel for a narrow density."""
    family = ROWS["inverse_gaussian"].family
    m, s, exact = inverse_gaussian_gradients()

    def evaluate(m, s):
        return family.base_measure_gradient(family.natural(mean=m, shape=s))

    found = compiled(evaluate, m.astype(dtype), s.astype(dtype))
    rtol = 1e-10 if dtype is np.float64 else 1e-4
    np.testing.assert_allclose(np.stack([found.linear, found.reciprocal]), exact, rtol=rtol)


def test_integers_and_scalars_become_floats():
    # Concrete values in a trace: they are checked, and nothing else is computed.
    gamma = ROWS["gamma"].family
    lam = jax.eval_shape(lambda: gamma.natural(concentration=3, rate=np.array([1, 2])))
    assert lam.log.dtype == lam.linear.dtype == jnp.float32
    assert lam.log.shape == lam.linear.shape == (2,)
