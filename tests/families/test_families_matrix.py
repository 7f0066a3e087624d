"""Von Mises-Fisher, Wishart and joint families: golden points, hard points and what is special."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from family_rows.matrix import ROWS
from family_tools import direction
from scipy import stats
from tools import close, load_golden

from blr_optax.families._bessel import bessel
from blr_optax.families._joint import MeanPrecision
from blr_optax.families._sphere_sample import attach

NAMES = ("von_mises_fisher", "wishart", "normal_gamma", "normal_wishart")
GOLDEN = {name: load_golden("expfam_values")["families"][name]["cases"] for name in NAMES}


def groups():
    """Golden cases by family and shape."""
    found = {}
    for name in NAMES:
        for case in GOLDEN[name]:
            size = (
                np.size(case["natural"][0])
                if name != "von_mises_fisher"
                else np.size(case["natural"])
            )
            size = np.size(case["params"].get("V", size)) if name == "wishart" else size
            found.setdefault((name, size), []).append(case)
    return [pytest.param(n, cases, id=f"{n}-{size}") for (n, size), cases in found.items()]


RENAMED = {
    "von_mises_fisher": {"kappa": "concentration"},
    "wishart": {"V": "scale", "nu": "degrees"},
    "normal_gamma": {"m": "mean", "a": "concentration", "b": "rate"},
    "normal_wishart": {"m": "mean", "W": "scale", "nu": "degrees"},
}
SPHERE, WISHART = ROWS["von_mises_fisher"].family, ROWS["wishart"].family
NORMAL_GAMMA, NORMAL_WISHART = ROWS["normal_gamma"].family, ROWS["normal_wishart"].family


@pytest.fixture(params=[np.float64, np.float32], ids=["float64", "float32"])
def dtype(request, x64):
    return request.param


def bar(dtype):
    return 1e-10 if dtype is np.float64 else 1e-4


def stack(items, dtype=np.float64):
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x), dtype), *items)


def natural(name, params, dtype=np.float64):
    """lambda of stacked cases."""
    arrays = ({k: np.asarray(v) for k, v in p.items()} for p in params)
    standard = {RENAMED[name].get(k, k): v for k, v in stack(list(arrays), dtype).items()}
    return ROWS[name].family.natural(**standard)


def golden_fields(family, cases, key, dtype=np.float64):
    """Fields of lambda or mu, stacked."""
    one = len(family.Natural._fields) == 1
    columns = zip(*([c[key]] if one else c[key] for c in cases), strict=True)
    return [jnp.asarray(np.array(column), dtype) for column in columns]


def check(found, expected, dtype, conditioning):
    """Relative error of the largest entry below the bar, or 100 roundings of the input."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == dtype and np.all(np.isfinite(found)), found
    entries = tuple(range(1, expected.ndim))
    error = np.max(np.abs(found - expected), axis=entries)
    size = np.max(np.abs(expected), axis=entries)
    allowed = np.maximum(bar(dtype), 100 * np.finfo(dtype).eps * conditioning)
    # A mean or shape of exactly zero is known as well as rounding of order one allows.
    assert np.all(error <= allowed * np.where(size == 0, 1.0, size)), (error, size, allowed)


def conditioning_of(name, case):
    """How much rounding lambda, or mu, may cost; golden says it for mu where F is a matrix."""
    params = case["params"]
    if name == "von_mises_fisher":
        forward, recorded = 1.0, params["kappa"]
    elif name == "normal_gamma":
        forward, recorded = 1.0 + params["kappa"] * params["m"] ** 2 / params["b"], 1.0
    else:
        scale = np.asarray(params.get("V", params.get("W")))
        forward = np.linalg.cond(scale)
        if name == "normal_wishart":
            m = np.asarray(params["m"])
            forward *= 1.0 + params["kappa"] * np.max(np.linalg.eigvalsh(scale)) * m @ m
        recorded = forward * params["nu"]
    return forward, case.get("mu_to_lambda_relative_amplification", recorded)


def theta_of(name, points, dtype):
    if name == "von_mises_fisher":
        return stack([np.asarray(x) / np.linalg.norm(x) for x in points], dtype)
    if name == "wishart":
        return stack([np.asarray(x) for x in points], dtype)
    parts = (x.values() if isinstance(x, dict) else x for x in points)
    return stack([MeanPrecision(*map(np.asarray, x)) for x in parts], dtype)


@pytest.mark.parametrize(("name", "cases"), groups())
def test_golden_values(name, cases, dtype):
    family = ROWS[name].family
    forward, backward = np.transpose([conditioning_of(name, c) for c in cases])
    lam = natural(name, [c["params"] for c in cases], dtype)
    other = natural(name, [c["kl"]["q_params"] for c in cases], dtype)
    theta = theta_of(name, [c["log_prob"][0]["x"] for c in cases], dtype)
    mu = family.Expectation(*golden_fields(family, cases, "expectation", dtype))

    @jax.jit
    def everything(lam, other, theta, mu):
        values = {
            "log_partition": family.log_partition(lam),
            "entropy": family.entropy(lam),
            "log_prob": family.log_prob(lam, theta),
            "kl": family.kl(lam, other),
        }
        return values, family.expectation(lam), family.natural_from_expectation(mu, True)

    values, found_mu, (back, converged) = everything(lam, other, theta, mu)
    golden = golden_fields(family, cases, "natural")
    for found, expected in zip(lam, golden, strict=True):
        check(found, expected, dtype, np.sqrt(forward))
    for found, expected in zip(found_mu, golden_fields(family, cases, "expectation"), strict=True):
        check(found, expected, dtype, forward)
    expected = {
        "log_partition": [c["log_partition"] for c in cases],
        "entropy": [c["entropy"] for c in cases],
        "log_prob": [c["log_prob"][0]["value"] for c in cases],
        "kl": [c["kl"]["kl_p_q"] for c in cases],
    }
    for key, value in values.items():
        check(value, expected[key], dtype, forward)
    assert np.all(converged)
    for found, expected in zip(back, golden, strict=True):
        check(found, expected, dtype, backward)


@pytest.mark.parametrize(("name", "cases"), groups())
def test_golden_fisher(x64, name, cases):
    family, lam = ROWS[name].family, natural(name, [c["params"] for c in cases])
    forward, _ = np.transpose([conditioning_of(name, c) for c in cases])
    if "fisher_action" in cases[0]:
        actions = [family.Natural(*map(np.asarray, c["fisher_action"]["dlam"])) for c in cases]
        found = family.fisher_product(lam, stack(actions))
        golden = [family.Expectation(*map(np.asarray, c["fisher_action"]["dmu"])) for c in cases]
        for x, expected in zip(found, stack(golden), strict=True):
            check(x, expected, np.float64, forward)
    elif "fisher" in cases[0]:
        fisher = np.array([c["fisher"] for c in cases])
        one = len(family.domains) == 1
        basis = np.eye(fisher.shape[-1])[:, None] * np.ones((len(cases), 1))
        v = (
            family.Natural(jnp.asarray(basis))
            if one
            else family.Natural(*np.moveaxis(basis, -1, 0))
        )
        found = jax.jit(jax.vmap(lambda v: family.fisher_product(lam, v)))(v)
        columns = found[0] if one else np.stack(found, -1)
        check(np.moveaxis(columns, 0, -1), fisher, np.float64, forward)


# --- one dimension is a gamma density -------------------------------------------------------------

GAMMAS = load_golden("expfam_values")["families"]["gamma"]["cases"]


def as_wishart(params, dtype):
    """Gamma densities as Wishart ones of one dimension: nu = 2 a, V = 1 / (2 b)."""
    a, b = (np.array([p[k] for p in params]) for k in ("alpha", "beta"))
    scale = jnp.asarray(0.5 / b, dtype)[:, None, None]
    return WISHART.natural(scale=scale, degrees=jnp.asarray(2 * a, dtype))


@pytest.mark.slow
def test_wishart_of_one_dimension_is_gamma(dtype):
    """Concentrations from 1e-4 to 1e8."""
    lam, q = (as_wishart([f(c) for c in GAMMAS], dtype) for f in (
        lambda c: c["params"], lambda c: c["kl"]["q_params"]))  # fmt: skip
    golden = {k: np.array([c[k] for c in GAMMAS]) for k in ("entropy", "expectation", "natural")}
    eps, a = np.finfo(dtype).eps, np.array([c["params"]["alpha"] for c in GAMMAS])
    # lambda holds a - 1, whose rounding is a relative one of small a.
    blur = np.maximum(bar(dtype), 100 * eps / np.minimum(a, 1.0))
    mu = WISHART.expectation(lam)
    for found, expected in [
        (WISHART.entropy(lam), golden["entropy"]),
        (mu.log_det, golden["expectation"][:, 0]),
        (mu.matrix[:, 0, 0], golden["expectation"][:, 1]),
    ]:
        error = np.abs(np.asarray(found) - expected)
        assert np.all(error <= blur * np.abs(expected) + 20 * eps), error
    kl = np.array([c["kl"]["kl_p_q"] for c in GAMMAS])
    other = np.array([c["kl"]["q_params"]["alpha"] for c in GAMMAS])
    error = np.abs(np.asarray(WISHART.kl(lam, q)) / kl - 1)
    assert np.all(error < blur + 100 * eps / np.minimum(other, 1.0)), error
    mu = WISHART.Expectation(
        jnp.asarray(golden["expectation"][:, 0], dtype),
        jnp.asarray(golden["expectation"][:, 1], dtype)[:, None, None],
    )
    back, converged = WISHART.natural_from_expectation(mu, with_status=True)
    amplified = np.array([c["mu_to_lambda_relative_amplification"] for c in GAMMAS])
    known = (amplified < 1e-2 / eps) & np.asarray(converged)
    assert np.all(known | (amplified > 1e-3 / eps))
    error = np.abs((np.asarray(back.log_det) + 1) / a - 1)[known]
    assert np.all(error < bar(dtype) + 100 * eps * np.maximum(a, 1 / a)[known]), error


def multivariate_log_gamma(a, d):
    terms = (mpmath.loggamma(a - mpmath.mpf(j) / 2) for j in range(d))
    return sum(terms) + mpmath.mpf(d * (d - 1)) / 4 * mpmath.log(mpmath.pi)


def mp_wishart(log_det, m, d):
    """a, A and dA / da at M = m I, from lambda as it was rounded."""
    a = mpmath.mpf(float(log_det)) + mpmath.mpf(d + 1) / 2
    slope = sum(mpmath.digamma(a - mpmath.mpf(j) / 2) for j in range(d)) - d * mpmath.log(m)
    return a, multivariate_log_gamma(a, d) - a * d * mpmath.log(m), slope


@pytest.mark.slow
def test_wishart_at_hard_points(dtype):
    """d = 3 against sixty digits at the same lambda: entropy, KL of neighbours, log density."""
    d, eps, degrees = 3, np.finfo(dtype).eps, np.array([2 + 1e-4, 2.5, 30.0, 1e4, 1e8])

    def member(factor):
        scale = np.eye(d) * 0.7 / degrees[:, None, None]
        nu = d - 1 + (degrees - d + 1) * factor
        return WISHART.natural(scale=jnp.asarray(scale, dtype), degrees=jnp.asarray(nu, dtype))

    p, others = member(1.0), [member(1.01), member(3.0)]
    x = WISHART.mean(p)
    found = {"entropy": WISHART.entropy(p), "log_prob": WISHART.log_prob(p, x)}
    truth = {"entropy": [], "log_prob": []}
    divergences = [WISHART.kl(p, q) for q in others]
    with mpmath.workdps(60):
        for i in range(degrees.size):
            m, size = (mpmath.mpf(float(v[i, 0, 0])) for v in (-p.matrix, x))
            a, log_partition, slope = mp_wishart(p.log_det[i], m, d)
            truth["entropy"].append(float(log_partition - (a - 2) * slope + d * a))
            log_prob = (a - 2) * d * mpmath.log(size) - m * d * size - log_partition
            truth["log_prob"].append(float(log_prob))
            for q, divergence in zip(others, divergences, strict=True):
                m_q = mpmath.mpf(float(-q.matrix[i, 0, 0]))
                a_q, log_partition_q, _ = mp_wishart(q.log_det[i], m_q, d)
                kl = log_partition_q - log_partition - (a_q - a) * slope + (m_q - m) * d * a / m
                # What rounding costs is relative to the distance, here one per cent.
                close(divergence[i], float(kl), max(bar(dtype), 2000 * eps))
    for key, value in found.items():
        close(value, truth[key], bar(dtype), 100 * eps)


@pytest.mark.slow
def test_inverse_fisher_of_wishart_keeps_its_digits_in_float32(x64):
    """F is singular but for one part in nu: against float64 at the same lambda and gradient."""
    rng = np.random.default_rng(0)
    for degrees in (2.5, 50.0, 1e4, 1e7):
        scale = jnp.asarray(np.diag([1.0, 0.5]) / degrees, np.float32)
        lam = WISHART.natural(scale=scale, degrees=np.float32(degrees))
        z = rng.normal(size=(2, 2))
        v = WISHART.Expectation(jnp.float32(0.3), jnp.asarray(z + z.T, np.float32))
        wide = [jax.tree.map(lambda x: jnp.asarray(x, np.float64), x) for x in (lam, v)]
        truth = WISHART.inverse_fisher_product(*wide)
        for found, expected in zip(WISHART.inverse_fisher_product(lam, v), truth, strict=True):
            close(found, expected, atol=1e-5 * np.max(np.abs(expected)))
        back = WISHART.fisher_product(wide[0], truth)
        close(back.log_det, wide[1].log_det, atol=1e-15 * degrees + 1e-12)
        close(back.matrix, wide[1].matrix, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_joint_families_of_one_dimension_agree(x64):
    """Normal-Wishart with d = 1 is normal-gamma with a = nu / 2 and b = 1 / (2 W)."""
    for case in GOLDEN["normal_gamma"]:
        p, q = case["params"], case["kl"]["q_params"]

        def lift(p):
            return NORMAL_WISHART.natural(
                mean=np.array([p["m"]]),
                kappa=p["kappa"],
                scale=np.array([[0.5 / p["b"]]]),
                degrees=2 * p["a"],
            )

        close(NORMAL_WISHART.log_partition(lift(p)), case["log_partition"], 1e-11)
        close(NORMAL_WISHART.entropy(lift(p)), case["entropy"], 1e-11)
        close(NORMAL_WISHART.kl(lift(p), lift(q)), case["kl"]["kl_p_q"], 1e-11)
        for row in case["log_prob"]:
            x, tau = row["x"]
            theta = MeanPrecision(jnp.array([x]), jnp.array([[tau]]))
            close(NORMAL_WISHART.log_prob(lift(p), theta), row["value"], 1e-11)


# --- steps where fields are coupled ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normal_gamma", "normal_inverse_gamma", "normal_wishart"])
def test_steps_of_coupled_fields_stay_inside(name):
    """Also far from the origin, where b or W^{-1} is a small difference of large numbers."""
    family, member = ROWS[name].family, ROWS[name].members[0]
    count = 200
    scales = np.repeat([1.0, 100.0], count // 2).astype(np.float32)
    means = np.multiply.outer(scales, np.ones_like(member["mean"], np.float32))
    lam = family.natural(mean=means, **{k: np.float32(v) for k, v in member.items() if k != "mean"})
    sizes = np.random.default_rng(0).uniform(-8, 30, size=(len(family.domains), count))
    one = direction(family, lam)
    step = one._replace(
        **{
            field: x * (10.0**size).astype(np.float32).reshape(-1, *(1,) * (x.ndim - 1))
            for (field, x), size in zip(one._asdict().items(), sizes, strict=True)
        }
    )
    new = jax.jit(family.retract)(lam, step)
    assert all(x.dtype == np.float32 for x in new)
    assert bool(jnp.all(family.in_domain(new)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mu"),
    [
        ("von_mises_fisher", [np.array([0.6, 0.8, 0.0])]),
        ("von_mises_fisher", [np.array([3.0, 0.0, 0.0])]),
        ("von_mises_fisher", [np.array([np.nan, 0.0, 0.0])]),
        ("wishart", [0.1, np.eye(2)]),  # E log|X| > log|E X|
        ("wishart", [0.0, np.eye(2)]),
        ("wishart", [-1.0, np.array([[1.0, 2.0], [2.0, 1.0]])]),
        ("wishart", [np.nan, np.eye(2)]),
        ("inverse_wishart", [-0.1, np.eye(2)]),
        ("normal_gamma", [1.0, 1.0, -1.0, 1.0]),  # E[tau x^2] = m E[tau x]
        ("normal_gamma", [0.0, 1.0, 0.1, 1.0]),
        ("normal_gamma", [0.0, 1.0, -1.0, -1.0]),
        ("normal_inverse_gamma", [0.0, 1.0, -0.1, 1.0]),
        ("normal_wishart", [np.zeros(2), -1.0, -1.0, np.eye(2)]),
        ("normal_wishart", [np.zeros(2), 1.0, 0.5, np.eye(2)]),
    ],
)
def test_unreachable_mu_is_reported_and_never_a_guess(x64, name, mu):
    family = ROWS[name].family
    mu = family.Expectation(*(jnp.asarray(x, np.float64) for x in mu))
    lam, converged = family.natural_from_expectation(mu, with_status=True)
    assert not bool(converged)
    assert any(bool(jnp.any(jnp.isnan(x))) for x in lam)
    assert not bool(family.in_domain(lam))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wishart", "inverse_wishart", "normal_gamma", "normal_wishart"])
def test_density_is_zero_outside_the_support(x64, name):
    family, lam = ROWS[name].family, ROWS[name].family.natural(**ROWS[name].members[0])
    theta = jax.tree.map(lambda x: -x, family.mean(lam))
    assert family.log_prob(lam, theta) == -np.inf


@pytest.mark.slow
def test_zero_density_has_zero_gradients(x64):
    lam = WISHART.natural(**ROWS["wishart"].members[0])
    density = lambda lam: jnp.exp(WISHART.log_prob(lam, -jnp.eye(2)))  # noqa: E731
    assert all(bool(jnp.all(x == 0)) for x in jax.jit(jax.grad(density))(lam))


@pytest.mark.slow
def test_moments_that_do_not_exist_are_infinite(x64):
    low = ROWS["normal_gamma"].family.natural(mean=0.0, kappa=1.0, concentration=0.9, rate=1.0)
    assert NORMAL_GAMMA.variance(low).mean == np.inf
    family = ROWS["inverse_wishart"].family
    for degrees, mean, variance in [(2.5, False, False), (4.0, True, False), (5.5, True, True)]:
        lam = family.natural(scale=np.eye(2), degrees=degrees)
        assert np.isfinite(family.mean(lam)[0, 0]) == mean
        assert np.isfinite(family.variance(lam)[0, 0]) == variance


# --- the sphere -----------------------------------------------------------------------------------

KAPPAS = [1e-12, 1e-3, 0.1, 3.0, 8.9, 9.1, 21.9, 22.1, 60.0, 1e3, 1e8]


@pytest.mark.slow
@pytest.mark.parametrize("order", [0.0, 0.5, 4.0, 24.0, 249.0])
def test_bessel_functions_to_the_last_digits(dtype, order):
    """Against fifty digits, at x = kappa^2 as it was rounded."""
    x = jnp.square(jnp.asarray(KAPPAS, dtype))
    found = jax.tree.map(np.asarray, jax.jit(lambda x: bessel(order, x))(x))
    eps = np.finfo(dtype).eps
    with mpmath.workdps(50):
        for i, square in enumerate(np.asarray(x, np.float64)):
            kappa, nu = mpmath.sqrt(mpmath.mpf(float(square))), mpmath.mpf(order)
            low, high = (mpmath.besseli(n, kappa, maxterms=10**6) for n in (nu, nu + 1))
            log, mean = mpmath.log(low) - nu * mpmath.log(kappa), high / low
            close(found.log[i], float(log), 20 * eps, 80 * eps)
            close(found.entropy[i], float(log - kappa * mean), 20 * eps, 80 * eps)
            close(found.ratio[i], float(mean / kappa), 10 * eps)
            close(found.rest[i], float(1 - mean), 30 * eps)
            slope = 1 - mean**2 - (2 * nu + 1) * mean / kappa
            close(found.slope[i], float(slope), 500 * eps)


@pytest.mark.slow
@pytest.mark.parametrize("d", [3, 60])
def test_sphere_maps_and_their_derivatives_over_the_whole_range(dtype, d):
    """mu -> lambda, F^{-1} F, and the slope of the entropy, from the uniform density to 1e8."""
    kappa = np.array([0.0, 1e-6, 0.3, 1.0, 5.0, 30.0, 1e3, 1e5, 1e8])
    rng = np.random.default_rng(d)
    u, v = (jnp.asarray(rng.normal(size=(kappa.size, d)), dtype) for _ in range(2))
    lam = SPHERE.natural(direction=u, concentration=jnp.asarray(kappa, dtype))
    eps, v = np.finfo(dtype).eps, SPHERE.Natural(v)
    back, converged = SPHERE.natural_from_expectation(SPHERE.expectation(lam), with_status=True)
    known = kappa < 0.01 / eps  # beyond it mu is on the sphere but for rounding
    assert np.all(np.asarray(converged)[known])
    error = np.linalg.norm(back.linear - lam.linear, axis=-1)
    assert np.all((error <= 100 * eps * (1 + kappa) * kappa)[known]), error
    again = SPHERE.inverse_fisher_product(lam, SPHERE.fisher_product(lam, v)).linear
    # Along u F is smaller than across it, by kappa.
    error = np.max(np.abs(again - v.linear), axis=-1)
    assert np.all(error <= 100 * eps * (1 + kappa)), error
    slope = SPHERE.inner(jax.grad(lambda lam: jnp.sum(SPHERE.entropy(lam)))(lam), lam)
    close(slope, -SPHERE.inner(lam, SPHERE.fisher_product(lam, lam)), rtol=1000 * eps)
    spread = np.asarray(SPHERE.variance(lam))
    assert np.all(np.isfinite(spread)) and np.all(spread >= 0)


@pytest.mark.slow
def test_sphere_moments_against_scipy(x64):
    for d, kappa in [(2, 9.0), (7, 4.0)]:
        u = np.arange(1.0, d + 1)
        lam = SPHERE.natural(direction=u, concentration=kappa)
        reference = stats.vonmises_fisher(u / np.linalg.norm(u), kappa)
        close(SPHERE.entropy(lam), reference.entropy(), 1e-10)
        x = reference.rvs(5, random_state=0)
        close(SPHERE.log_prob(lam, x), reference.logpdf(x), 1e-10)


@pytest.mark.slow
def test_kl_of_nearby_directions_keeps_its_digits(x64):
    """Half the Fisher norm along and across u, and at zero, where neither is defined."""
    kappa = np.array([0.0, 1e-3, 1.0, 10.0, 1e3, 1e6])[:, None]
    u, size = np.array([0.6, 0.0, 0.8]), np.maximum(kappa, 1.0)
    moves = np.stack([size * u, size * np.roll(u, 1), size * (u + 0.3 * np.roll(u, 1))])
    gap = np.array([1e-1, 1e-3, 1e-6]).reshape(-1, 1, 1, 1)
    p, v = SPHERE.Natural(jnp.asarray(kappa * u)), SPHERE.Natural(jnp.asarray(gap * moves))
    q, middle = (SPHERE.combine((1.0, p), (t, v)) for t in (1.0, 1 / 3))
    # At a third of the way the norm is right to second order.
    norm = 0.5 * SPHERE.inner(v, SPHERE.fisher_product(middle, v))
    error = np.abs(SPHERE.kl(p, q) / norm - 1)
    assert np.all(error <= gap[..., 0] ** 2 + 1e-14 * size[:, 0] / gap[..., 0]), error


def test_golden_implicit_derivative_of_an_angle(dtype):
    cases = load_golden("implicit_reparam")["cases"]
    cases = [c for c in cases if c["dist"].startswith("von_mises")]
    angle = np.array([c["x"] for c in cases])
    kappa = np.array([c["params"]["kappa"] for c in cases])
    x = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], -1), dtype)
    lin = jnp.asarray(np.stack([kappa, 0 * kappa], -1), dtype)
    change = jnp.zeros_like(lin).at[:, 0].set(1.0)
    _, dx = jax.jvp(lambda lin: attach(lin, x), (lin,), (change,))
    turned = np.sum(dx * np.stack([-np.sin(angle), np.cos(angle)], -1), -1)
    close(turned, [c["dx"] for c in cases], 1e-12 if dtype is np.float64 else 1e-5)
    close(np.sum(dx * x, -1), np.zeros(len(cases)), atol=10 * np.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 3, 6])
def test_sphere_draws_move_with_lambda(d):
    """d E[x] = F dlambda through the sampler, on both sides of kappa = 1 and at zero."""
    kappa = jnp.array([0.0, 0.8, 1.2, 40.0])
    u, change = jnp.eye(d)[0] + 0.5, jnp.linspace(-1.0, 2.0, d)
    lam = SPHERE.natural(direction=jnp.tile(u, (4, 1)), concentration=kappa)
    v = SPHERE.Natural(jnp.tile(change, (4, 1)))
    draw = lambda lam: SPHERE.sample(jax.random.key(0), lam, (20_000,))  # noqa: E731
    x, dx = (np.asarray(a) for a in jax.jit(lambda: jax.jvp(draw, (lam,), (v,)))())
    close(np.sum(x * x, -1), 1.0, rtol=1e-5)
    close(np.sum(x * dx, -1), 0.0, atol=1e-5)
    assert np.max(np.abs(dx)) < 4 * np.linalg.norm(change)  # bounded, also close to zero
    for values, truth in [(x, SPHERE.mean(lam)), (dx, SPHERE.fisher_product(lam, v).linear)]:
        error = np.std(values, axis=0) / np.sqrt(len(values)) + 1e-6
        assert np.all(np.abs(values.mean(0) - np.asarray(truth)) < 5 * error)


@pytest.mark.slow
def test_draws_near_the_edge_of_the_wishart_domain_are_finite():
    """nu just above d - 1: chi variables of tiny shape."""
    standard = {"scale": np.eye(3), "degrees": 2.05}
    lam = NORMAL_WISHART.natural(mean=np.zeros(3), kappa=1.0, **standard)
    theta = jax.jit(lambda lam: NORMAL_WISHART.sample(jax.random.key(0), lam, (200,)))(lam)
    assert all(np.all(np.isfinite(part)) for part in theta)


@pytest.mark.slow
def test_standard_parameters_of_several_types(x64):
    """Integers, lists of Python floats and batches that broadcast."""
    lam = SPHERE.natural(direction=np.array([0, 0, 2]), concentration=3)
    assert lam.linear.dtype == np.float64
    close(lam.linear, [0.0, 0.0, 3.0])
    assert SPHERE.natural(direction=np.eye(3), concentration=2.0).linear.shape == (3, 3)
    close(SPHERE.standard(SPHERE.Natural(jnp.zeros(3)))["direction"], [1.0, 0.0, 0.0])
    lam = WISHART.natural(scale=np.eye(2, dtype=int), degrees=np.arange(3, 6))
    assert lam.matrix.shape == (3, 2, 2) and lam.log_det.dtype == np.float64
    lam = NORMAL_WISHART.natural(
        mean=np.ones((4, 1, 2)), kappa=np.ones(3), scale=np.eye(2, dtype=np.float32), degrees=4
    )
    assert lam.linear.shape == (4, 3, 2) and lam.matrix.shape == (4, 3, 2, 2)
    lam = NORMAL_GAMMA.natural(mean=0, kappa=np.ones(2), concentration=2, rate=np.ones((3, 1)))
    assert {x.shape for x in lam} == {(3, 2)}
