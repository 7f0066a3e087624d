"""Families on the half-line, the line and the simplex: golden points and hard points."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from family_rows.positive import ROWS
from scipy import stats
from tools import load_golden

from blr_optax.families._gamma_sample import _follow_gamma, gamma_slope
from blr_optax.families._inverse_gaussian import _follow_inverse_gaussian, inverse_gaussian_slopes

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
# Half the time of these tests is compilation; this leaves out what only makes code run faster.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": False})
ROUNDINGS = 100  # the accuracy bar, in roundings of what is given


@pytest.fixture(params=[np.float64, np.float32], ids=["float64", "float32"])
def dtype(request, x64):
    return request.param


def bar(dtype):
    return 1e-10 if dtype is np.float64 else 1e-4


def cases_of(name, parts):
    cases = load_golden("expfam_values")["families"][name]["cases"]
    return [c for c in cases if parts in (None, len(np.ravel(c["natural"])))]


def lambdas(name, params, dtype):
    """The stacked natural parameters of golden cases."""
    columns = {RENAMED[name].get(k, k): np.array([p[k] for p in params], dtype) for k in params[0]}
    return ROWS[name].family.natural(**columns)


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

    return fast_jit(jax.vmap(one))(lam)


def inverse_fisher(family, lam):
    return matrix(family, lam, family.inverse_fisher_product, family.Expectation)


def inverse(family, mu):
    return fast_jit(lambda mu: family.natural_from_expectation(mu, with_status=True))(mu)


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
    values = np.asarray(fast_jit(function)(*jax.tree.unflatten(treedef, stacked)))
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


def members_of(name, parts, dtype):
    cases = cases_of(name, parts)
    own, others = [c["params"] for c in cases], [c["kl"]["q_params"] for c in cases]
    return lambdas(name, own, dtype), lambdas(name, others, dtype)


def density_points(name, parts, dtype):
    rows = [(c["params"], row) for c in cases_of(name, parts) for row in c["log_prob"]]
    x = jnp.asarray(np.array([row["x"] for _, row in rows], dtype))
    return lambdas(name, [params for params, _ in rows], dtype), x, [r["value"] for _, r in rows]


@functools.cache  # for both types
def wide_numbers(name, parts):
    family = ROWS[name].family
    function = functools.partial(numbers, family)
    value, conditioning = with_conditioning(function, *members_of(name, parts, np.float64))
    # log Gamma(a) is a difference of terms as large as a log a.
    flat = np.abs(learnt(family, members_of(name, parts, np.float64)[0]))
    conditioning[:, 0] += np.sum(flat * np.log(2 + flat), -1)
    return value, conditioning


@functools.cache
def wide_density(name, parts):
    return with_conditioning(
        ROWS[name].family.log_prob, *density_points(name, parts, np.float64)[:2]
    )


@pytest.mark.parametrize(("name", "parts"), GROUPS)
def test_golden_values(name, parts, dtype):
    family, cases = ROWS[name].family, cases_of(name, parts)
    lam, q = members_of(name, parts, dtype)
    flat = np.abs(np.asarray(learnt(family, lam)))
    fisher = np.array([c["fisher"] for c in cases])
    np.testing.assert_allclose(
        learnt(family, lam), np.array([c["natural"] for c in cases]), rtol=10 * bar(dtype)
    )
    value, conditioning = wide_numbers(name, parts)
    if dtype is np.float32:
        value = fast_jit(functools.partial(numbers, family))(lam, q)
    check(value, [golden_numbers(family, case) for case in cases], dtype, conditioning)

    mu = fast_jit(family.expectation)(lam)
    moved = np.einsum("nij,nj->ni", np.abs(fisher), flat)
    check(learnt(family, mu), [c["expectation"] for c in cases], dtype, moved)
    # lambda is a concentration less one: what it rounds is far more of a small one.
    small = [np.min(c["params"].get("alpha", c["params"].get("a", 1.0))) for c in cases]
    small = [min(x, c["params"].get("b", 1.0)) for x, c in zip(small, cases, strict=True)]
    size = 1 / np.minimum(small, 1.0)[:, None, None]
    found = matrix(family, lam, family.fisher_product, family.Natural)
    check(found, fisher, dtype, size * np.abs(fisher))


@pytest.mark.parametrize(("name", "parts"), GROUPS)
def test_golden_log_prob(name, parts, dtype):
    value, conditioning = wide_density(name, parts)
    lam, x, expected = density_points(name, parts, dtype)
    if dtype is np.float32:
        value = fast_jit(ROWS[name].family.log_prob)(lam, x)
    check(value, expected, dtype, conditioning)


@pytest.mark.parametrize(("name", "parts"), GROUPS)
def test_golden_inverse(name, parts, dtype):
    """lambda(mu) is as accurate as mu allows, and so is F^{-1}: golden says how much that is."""
    family, cases = ROWS[name].family, cases_of(name, parts)
    lam = lambdas(name, [c["params"] for c in cases], dtype)
    mu = np.array([c["expectation"] for c in cases], dtype)
    moved = np.abs(inverse_fisher(family, lam) * mu[:, None, :]).sum(-1)
    golden = np.array([c["mu_to_lambda_relative_amplification"] for c in cases])
    flat = np.asarray(learnt(family, lam))
    known = golden < 1e100
    found = np.max(np.abs(moved / np.where(flat == 0, np.nan, flat))[known], -1)
    np.testing.assert_allclose(found, golden[known], rtol=1e-8 if dtype is np.float64 else 2e-2)

    columns = mu if family.event_ndim else mu.T
    given = family.Expectation(columns) if family.event_ndim else family.Expectation(*columns)
    back, proper = inverse(family, given)
    expected = np.array([c["natural"] for c in cases])
    # Where rounding mu changes concentrations by a tenth or more, there may be no lambda at all.
    hopeless = ROUNDINGS * np.finfo(dtype).eps * np.max(moved / (1 + np.abs(flat)), -1) > 0.1
    assert np.all(proper | hopeless)
    assert dtype is np.float32 or not np.any(hopeless)
    keep = ~hopeless
    check(learnt(family, back)[keep], expected[keep], dtype, (moved + np.abs(flat))[keep])


HARD = {
    3: [[1e-6] * 3, [1e8] * 3, [1e4, 1, 1], [1e-6, 1, 1e6], [1e8, 1e-3, 5], [1e-6, 1e-6, 1e4]],
    2: [[0.01, 1e4], [1e-6, 1e8], [1e-3, 1e-6], [0.5, 0.5], [1e8, 2e8]],
    50: [[0.01] * 50, [1e-6] * 49 + [10.0], list(np.geomspace(1e-6, 1e8, 50))],
}


@pytest.mark.slow
@pytest.mark.parametrize("parts", HARD)
def test_dirichlet_inverse_at_hard_points(parts, x64):
    family = ROWS["dirichlet"].family
    lam = family.natural(concentration=np.array(HARD[parts]))
    mu = fast_jit(family.expectation)(lam)
    back, proper = inverse(family, mu)
    moved = np.abs(inverse_fisher(family, lam) * mu.log[:, None, :]).sum(-1)
    assert np.all(proper)
    check(back.log, lam.log, np.float64, 1 + moved)
    if parts == 2:
        beta = ROWS["beta"].family
        pair, status = inverse(beta, beta.Expectation(*mu.log.T))
        np.testing.assert_allclose(np.stack(pair, -1), back.log, rtol=1e-12)
        assert np.all(status)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gamma", "inverse_gamma"])
def test_gamma_inverse_at_hard_points(name, x64):
    family = ROWS[name].family
    a, b = np.meshgrid([1e-6, 1e-3, 1.0, 30.0, 1e4, 1e8], [1e-8, 1.0, 1e8])
    lam = family.natural(**dict(zip(ROWS[name].members[0], (a, b), strict=True)))
    mu = fast_jit(family.expectation)(lam)
    back, proper = inverse(family, mu)
    assert np.all(proper)
    for found, expected in zip(back, lam, strict=True):
        allowed = 1e-10 + ROUNDINGS * np.finfo(float).eps * 2 * (1 + a) * (1 + np.abs(mu.log))
        np.testing.assert_array_less(np.abs(found / expected - 1)[a != 1], allowed[a != 1])


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


@pytest.mark.slow
@pytest.mark.parametrize("name", UNREACHABLE)
def test_unreachable_expectations_give_nan(name):
    family = ROWS[name].family
    mu = family.Expectation(*jnp.array(UNREACHABLE[name]).T)
    lam, proper = inverse(family, mu)
    assert not np.any(proper)
    for field in family.domains:
        assert np.all(np.isnan(getattr(lam, field)))


@pytest.mark.slow
def test_unreachable_dirichlet():
    family = ROWS["dirichlet"].family
    mu = family.Expectation(jnp.log(jnp.array([[0.2, 0.3, 0.6], [0.2, 0.3, 0.4]])))
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


@pytest.mark.slow
def test_divergence_of_neighbours_at_large_concentrations(dtype):
    # All numbers are exact in float32, lambda too.
    a, apart = 2.0**26, 2.0**13
    with mpmath.workdps(60):
        gamma, dirichlet = ROWS["gamma"].family, ROWS["dirichlet"].family
        p = gamma.Natural(jnp.asarray(a, dtype), jnp.asarray(-a, dtype))
        q = gamma.Natural(jnp.asarray(a + apart, dtype), jnp.asarray(-a, dtype))
        expected = gamma_kl((a + 1, a), (a + apart + 1, a))
        np.testing.assert_allclose(gamma.kl(p, q), expected, rtol=1e4 * np.finfo(dtype).eps)
        one, two = np.array([a, a, 2 * a]), np.array([a + apart, a, 2 * a])
        p, q = (dirichlet.Natural(jnp.asarray(x, dtype)) for x in (one, two))
        expected = dirichlet_kl(one + 1, two + 1)
        np.testing.assert_allclose(dirichlet.kl(p, q), expected, rtol=1e4 * np.finfo(dtype).eps)


@pytest.mark.slow
def test_density_far_in_the_tails(dtype):
    """Small ratios x / m, and points that are many standard deviations out."""
    family = ROWS["gamma"].family
    lam = family.natural(concentration=np.array([20.0, 1e8, 1e-3], dtype), rate=dtype(1e-6))
    x = np.array([1e-33, 1.3e14, 1e-30], dtype)
    value = family.log_prob(lam, jnp.asarray(x))
    a, b = (np.asarray(v, np.float64) for v in family.standard(lam).values())
    with mpmath.workdps(50):
        expected = [
            float((mpmath.mpf(a) - 1) * mpmath.log(x) - b * x + a * mpmath.log(b))
            - float(mpmath.loggamma(a))
            for a, b, x in zip(*np.broadcast_arrays(a, b, x.astype(np.float64)), strict=True)
        ]
    np.testing.assert_allclose(value, expected, rtol=1e-9 if dtype is np.float64 else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_outside_the_support(name, x64):
    family, member = ROWS[name].family, ROWS[name].members[0]
    lam = family.natural(**member)
    if name == "laplace":
        return
    outside = {"dirichlet": [[-0.1, 0.6, 0.5], [0.2, 0.2, 0.2]], "beta": [-0.1, 1.1]}
    x = jnp.array(outside.get(name, [-1.0, -1e-3]))
    density = lambda lam: family.log_prob(lam, x)  # noqa: E731
    assert np.all(np.isneginf(fast_jit(density)(lam)))
    for slope in jax.tree.leaves(fast_jit(jax.jacrev(density))(lam)):
        assert np.all(np.isfinite(slope))


IMPLICIT = load_golden("implicit_reparam")["cases"]


def implicit(kind):
    rows = [c for c in IMPLICIT if c["dist"].startswith(kind)]
    params = [np.array(p) for p in zip(*(c["params"].values() for c in rows), strict=True)]
    return params, np.array([c["x"] for c in rows]), np.array([c["dx"] for c in rows])


@pytest.mark.slow
def test_gamma_samples_follow_their_concentration(dtype):
    rows = [c for c in IMPLICIT if c["dist"].startswith("gamma")]
    a = np.array([c["params"]["alpha"] for c in rows], dtype)
    log_x = np.log([c["x"] for c in rows]).astype(dtype)
    found = fast_jit(gamma_slope)(a, log_x)
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


@pytest.mark.slow
def test_gamma_slopes_across_the_plane(dtype):
    """Both formulas, on both sides of every border between them, out to six deviations."""
    points = []
    for a in (1e-3, 0.03, 0.5, 0.999, 1.2, 4.0, 7.9, 8.1, 60.0, 3e3):
        points += [(a, a * np.exp(z / np.sqrt(max(a, 1.0)))) for z in (-5.0, -1.0, -0.01)]
        points += [(a, a + z * np.sqrt(a)) for z in (0.01, 1.0, 6.0)]
    a, x = np.array(points).T
    with mpmath.workdps(40):
        expected = [exact_gamma_slope(*point) for point in points]
    found = fast_jit(gamma_slope)(a.astype(dtype), np.log(x).astype(dtype))
    np.testing.assert_allclose(found, expected, rtol=1e-11 if dtype is np.float64 else 5e-5)


@pytest.mark.slow
def test_inverse_gaussian_samples_follow_their_parameters(dtype):
    (m, s), x, dx = implicit("inverse_gaussian")
    found = inverse_gaussian_slopes(*(jnp.asarray(v, dtype) for v in (m, s, x)))
    rtol = 1e-12 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(np.stack(found, -1), dx, rtol=rtol)


@pytest.mark.slow
def test_beta_samples_follow_their_parameters_on_average(x64):
    """x = g / (g + h) for gammas: given x, the mean of dx is the derivative at a fixed quantile."""
    (alpha, beta), x, dx = implicit("beta")
    z, h = np.linspace(-120.0, 12.0, 3001, retstep=True)  # log(g + h), which is gamma
    weight = h * np.exp(stats.loggamma(alpha + beta).logpdf(z[:, None]))
    slope = fast_jit(gamma_slope)
    by_alpha = (1 - x) * np.sum(weight * slope(alpha, z[:, None] + np.log(x)), 0)
    by_beta = (1 - x) * np.sum(weight * slope(beta, z[:, None] + np.log1p(-x)), 0)
    np.testing.assert_allclose(np.stack([x * by_alpha, -x * by_beta], -1), dx, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gamma", "inverse_gamma", "beta", "dirichlet"])
def test_samples_at_small_concentrations(name):
    """float32 cannot hold most of these draws: the nearest number inside the support instead."""
    family = ROWS[name].family
    small = jnp.array([[1e-3, 0.02, 0.3], [0.01, 0.01, 4.0]])
    fields = {"dirichlet": (small - 1,), "beta": (small - 1, small[::-1] - 1)}
    minus = {"gamma": (small - 1, -small), "inverse_gamma": (-1 - small, -small)}
    lam = family.Natural(*(fields | minus)[name])

    @fast_jit
    def draw(lam):
        sample = lambda lam: family.sample(jax.random.key(0), lam, (500,))  # noqa: E731
        x, change = jax.jvp(sample, (lam,), (jax.tree.map(jnp.ones_like, lam),))
        return x, change, family.log_prob(lam, x)

    x, change, log_q = draw(lam)
    assert np.all(x > 0) and np.all(np.isfinite(x))
    assert not np.any(np.isnan(change))
    assert np.all(np.isfinite(log_q))
    if name == "beta":
        assert np.all(x < 1)
    if name == "dirichlet":
        np.testing.assert_allclose(x.sum(-1), 1.0, atol=1e-6)
        np.testing.assert_allclose(change.sum(-1), 0.0, atol=1e-3 * np.abs(change).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_statistics_of_samples_move_as_the_fisher_matrix_says(name, x64):
    family, member = ROWS[name].family, ROWS[name].members[0]
    lam = family.natural(**member)
    along = jax.tree.map(lambda x: 0.3 * jnp.ones_like(x), lam)
    along = along._replace(**{k: jnp.zeros_like(getattr(lam, k)) for k in family.known})
    known = {"lam": lam} if family.known else {}

    def statistics(lam):
        return family.sufficient_statistics(
            family.sample(jax.random.key(3), lam, (20000,)), **known
        )

    slopes = fast_jit(lambda lam: jax.jvp(statistics, (lam,), (along,))[1])(lam)
    expected = fast_jit(family.fisher_product)(lam, along)
    for field in family.domains:
        found = getattr(slopes, field)
        error = np.std(found, 0) / np.sqrt(len(found)) + 1e-12
        np.testing.assert_array_less(np.abs(found.mean(0) - getattr(expected, field)), 5 * error)


@pytest.mark.slow
def test_second_derivatives_at_a_fixed_quantile(x64):
    """Following the first derivative for a little while changes it as the second one says."""
    a, log_x = np.array([0.05, 0.6, 3.0, 3.0, 50.0]), np.array([-9.0, 0.4, 0.3, 1.6, 3.8])
    slope, h = fast_jit(gamma_slope), 1e-4 * a
    ahead, behind = (slope(a + t, log_x + t * slope(a, log_x)) for t in (h, -h))
    first = lambda a: jax.jvp(lambda a: _follow_gamma(a, log_x), (a,), (jnp.ones_like(a),))[1]  # noqa: E731
    second = fast_jit(lambda a: jax.jvp(first, (a,), (jnp.ones_like(a),))[1])(a)
    np.testing.assert_allclose(second, (ahead - behind) / (2 * h), rtol=1e-5)

    m, s, x = np.array([1.0, 3.0, 0.5]), np.array([1.0, 0.5, 20.0]), np.array([0.4, 2.7, 0.6])
    slope, h = (lambda s, x: inverse_gaussian_slopes(m, s, x)[1]), 1e-4 * s
    ahead, behind = (slope(s + t, x + t * slope(s, x)) for t in (h, -h))
    follow = lambda s: _follow_inverse_gaussian(m, s, x)  # noqa: E731
    first = lambda s: jax.jvp(follow, (s,), (jnp.ones_like(s),))[1]  # noqa: E731
    second = fast_jit(lambda s: jax.jvp(first, (s,), (jnp.ones_like(s),))[1])(s)
    np.testing.assert_allclose(second, (ahead - behind) / (2 * h), rtol=1e-5)


@pytest.mark.slow
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
    for member in members:
        lam, law = family.natural(**member), laws[name](member)
        x = law.rvs(20, random_state=0)
        np.testing.assert_allclose(family.log_prob(lam, x), law.logpdf(x), rtol=1e-11)
        np.testing.assert_allclose(family.mean(lam), law.mean(), rtol=1e-11)
        np.testing.assert_allclose(family.variance(lam), law.var(), rtol=1e-9)
        np.testing.assert_allclose(family.entropy(lam), law.entropy(), rtol=1e-11)


@pytest.mark.slow
def test_weibull_variance_does_not_cancel(dtype):
    family = ROWS["weibull"].family
    k = np.array([0.5, 3.0, 1e3, 1e5], dtype)
    found = family.variance(family.natural(scale=np.ones(4, dtype), shape=k))
    with mpmath.workdps(40):
        gamma = lambda n, k: mpmath.gamma(1 + n / mpmath.mpf(float(k)))  # noqa: E731
        expected = [float(gamma(2, k) - gamma(1, k) ** 2) for k in k]
    np.testing.assert_allclose(found, expected, rtol=1e-9 if dtype is np.float64 else 1e-4)


@pytest.mark.slow
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
    found = family.kl(family.natural(**member), family.natural(**other))
    # The other Laplace density has a kink inside the rule.
    np.testing.assert_allclose(found, expected, rtol=1e-4 if name == "laplace" else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["laplace", "weibull"])
def test_statistics_need_what_is_known(name):
    family = ROWS[name].family
    (known,) = family.known
    with pytest.raises(ValueError, match=f"known {known}: pass lam="):
        family.sufficient_statistics(jnp.ones(3))
    lam = family.natural(**ROWS[name].members[0])
    t = family.sufficient_statistics(jnp.ones(3), lam=lam)
    assert type(t) is family.Expectation and all(x.shape == (3,) for x in t)


@pytest.mark.slow
def test_inverse_gaussian_base_measure_gradient_at_hard_points(dtype):
    """grad_mu E[log h] is F^{-1} times grad_lambda, whose terms cancel for a narrow density."""
    family = ROWS["inverse_gaussian"].family
    m, s = np.array([1.0, 2.0, 0.5, 1.0, 3.0]), np.array([1e-6, 0.3, 20.0, 1e4, 1e8])
    found = family.base_measure_gradient(
        family.natural(mean=m.astype(dtype), shape=s.astype(dtype))
    )

    def expected_log_h(u, v):  # of mu
        shape = 1 / (v - 1 / u)
        y = 2 * shape / u
        return mpmath.mpf(-1.5) * (mpmath.log(u) - mpmath.exp(y) * mpmath.e1(y))

    with mpmath.workdps(60):
        for i in range(len(m)):
            u = mpmath.mpf(m[i])
            v = 1 / u + 1 / mpmath.mpf(s[i])
            for order, value in (((1, 0), found.linear[i]), ((0, 1), found.reciprocal[i])):
                exact = float(mpmath.diff(expected_log_h, (u, v), order, h=mpmath.mpf(10) ** -30))
                rtol = 1e-10 if dtype is np.float64 else 1e-4
                np.testing.assert_allclose(value, exact, rtol=rtol)


@pytest.mark.slow
def test_integers_and_scalars_become_floats():
    lam = ROWS["gamma"].family.natural(concentration=3, rate=np.array([1, 2]))
    assert lam.log.dtype == lam.linear.dtype == jnp.float32
    assert lam.log.shape == lam.linear.shape == (2,)
