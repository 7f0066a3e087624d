"""Von Mises-Fisher, Wishart and joint families: golden points, hard points and what is special."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from family_rows.matrix import ROWS
from family_tools import direction
from scipy import stats
from tools import close, compiled, load_golden

from blr_optax.families._continuous.joint import MeanPrecision
from blr_optax.families._numerics.bessel import bessel
from blr_optax.families._numerics.sphere_draws import attach

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


def bar(dtype):
    return 1e-10 if dtype is np.float64 else 1e-4


def stack(items, dtype=np.float64):
    return jax.tree.map(lambda *x: np.asarray(np.stack(x), dtype), *items)


def standard(name, params, dtype=np.float64):
    """The standard parameters of stacked cases."""
    arrays = ({k: np.asarray(v) for k, v in p.items()} for p in params)
    return {RENAMED[name].get(k, k): v for k, v in stack(list(arrays), dtype).items()}


def golden_fields(family, cases, key, dtype=np.float64):
    """Fields of lambda or mu, stacked."""
    one = len(family.Natural._fields) == 1
    columns = zip(*([c[key]] if one else c[key] for c in cases), strict=True)
    return [np.array(column, dtype) for column in columns]


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
def test_golden_fisher(x64, name, cases):
    family, own = ROWS[name].family, standard(name, [c["params"] for c in cases])
    forward, _ = np.transpose([conditioning_of(name, c) for c in cases])

    def product(own, v):
        return family.fisher_product(family.natural(**own), v)

    if "fisher_action" in cases[0]:
        actions = [family.Natural(*map(np.asarray, c["fisher_action"]["dlam"])) for c in cases]
        found = compiled(product, own, stack(actions))
        golden = [family.Expectation(*map(np.asarray, c["fisher_action"]["dmu"])) for c in cases]
        for x, expected in zip(found, stack(golden), strict=True):
            check(x, expected, np.float64, forward)
    elif "fisher" in cases[0]:
        fisher = np.array([c["fisher"] for c in cases])
        one = len(family.domains) == 1
        basis = np.eye(fisher.shape[-1])[:, None] * np.ones((len(cases), 1))
        v = family.Natural(basis) if one else family.Natural(*np.moveaxis(basis, -1, 0))
        found = compiled(jax.vmap(product, (None, 0)), own, v)
        columns = found[0] if one else np.stack(found, -1)
        check(np.moveaxis(columns, 0, -1), fisher, np.float64, forward)


# --- one dimension is a gamma density -------------------------------------------------------------

GAMMAS = load_golden("expfam_values")["families"]["gamma"]["cases"]


def as_wishart(params, dtype):
    """Gamma densities as Wishart ones of one dimension: nu = 2 a, V = 1 / (2 b)."""
    a, b = (np.array([p[k] for p in params]) for k in ("alpha", "beta"))
    scale = np.asarray(0.5 / b, dtype)[:, None, None]
    return {"scale": scale, "degrees": np.asarray(2 * a, dtype)}


def test_wishart_of_one_dimension_is_gamma(dtype):
    """Concentrations from 1e-4 to 1e8."""
    own, others = (as_wishart([f(c) for c in GAMMAS], dtype) for f in (
        lambda c: c["params"], lambda c: c["kl"]["q_params"]))  # fmt: skip
    golden = {k: np.array([c[k] for c in GAMMAS]) for k in ("entropy", "expectation", "natural")}
    eps, a = np.finfo(dtype).eps, np.array([c["params"]["alpha"] for c in GAMMAS])
    # lambda holds a - 1, whose rounding is a relative one of small a.
    blur = np.maximum(bar(dtype), 100 * eps / np.minimum(a, 1.0))
    given = WISHART.Expectation(
        np.asarray(golden["expectation"][:, 0], dtype),
        np.asarray(golden["expectation"][:, 1], dtype)[:, None, None],
    )

    def evaluate(own, others, given):
        lam, q = WISHART.natural(**own), WISHART.natural(**others)
        inverse = WISHART.natural_from_expectation(given, with_status=True)
        return WISHART.expectation(lam), WISHART.entropy(lam), WISHART.kl(lam, q), inverse

    mu, entropy, divergence, (back, converged) = compiled(evaluate, own, others, given)
    for found, expected in [
        (entropy, golden["entropy"]),
        (mu.log_det, golden["expectation"][:, 0]),
        (mu.matrix[:, 0, 0], golden["expectation"][:, 1]),
    ]:
        error = np.abs(found - expected)
        assert np.all(error <= blur * np.abs(expected) + 20 * eps), error
    kl = np.array([c["kl"]["kl_p_q"] for c in GAMMAS])
    other = np.array([c["kl"]["q_params"]["alpha"] for c in GAMMAS])
    error = np.abs(divergence / kl - 1)
    assert np.all(error < blur + 100 * eps / np.minimum(other, 1.0)), error
    amplified = np.array([c["mu_to_lambda_relative_amplification"] for c in GAMMAS])
    known = (amplified < 1e-2 / eps) & converged
    assert np.all(known | (amplified > 1e-3 / eps))
    error = np.abs((back.log_det + 1) / a - 1)[known]
    assert np.all(error < bar(dtype) + 100 * eps * np.maximum(a, 1 / a)[known]), error


def multivariate_log_gamma(a, d):
    terms = (mpmath.loggamma(a - mpmath.mpf(j) / 2) for j in range(d))
    return sum(terms) + mpmath.mpf(d * (d - 1)) / 4 * mpmath.log(mpmath.pi)


def mp_wishart(log_det, m, d):
    """a, A and dA / da at M = m I, from lambda as it was rounded."""
    a = mpmath.mpf(float(log_det)) + mpmath.mpf(d + 1) / 2
    slope = sum(mpmath.digamma(a - mpmath.mpf(j) / 2) for j in range(d)) - d * mpmath.log(m)
    return a, multivariate_log_gamma(a, d) - a * d * mpmath.log(m), slope


def test_wishart_at_hard_points(dtype):
    """d = 3 against sixty digits at the same lambda: entropy, KL of neighbours, log density."""
    d, eps, degrees = 3, np.finfo(dtype).eps, np.array([2 + 1e-4, 2.5, 30.0, 1e4, 1e8])

    def member(factor):
        scale = np.eye(d) * 0.7 / degrees[:, None, None]
        nu = d - 1 + (degrees - d + 1) * factor
        return {"scale": np.asarray(scale, dtype), "degrees": np.asarray(nu, dtype)}

    def evaluate(members):
        p, *others = (WISHART.natural(**member) for member in members)
        x = WISHART.mean(p)
        found = {"entropy": WISHART.entropy(p), "log_prob": WISHART.log_prob(p, x)}
        return p, others, x, found, [WISHART.kl(p, q) for q in others]

    p, others, x, found, divergences = compiled(evaluate, [member(f) for f in (1.0, 1.01, 3.0)])
    truth = {"entropy": [], "log_prob": []}
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


def test_inverse_fisher_of_wishart_keeps_its_digits_in_float32(x64):
    """F is singular but for one part in nu: against float64 at the same lambda and gradient."""
    rng = np.random.default_rng(0)

    for degrees in (2.5, 50.0, 1e4, 1e7):
        scale = np.asarray(np.diag([1.0, 0.5]) / degrees, np.float32)
        z = rng.normal(size=(2, 2))
        v = WISHART.Expectation(np.float32(0.3), np.asarray(z + z.T, np.float32))
        own = {"scale": scale, "degrees": np.float32(degrees)}
        lam = compiled(lambda own: WISHART.natural(**own), own)
        wide_lam, wide = (jax.tree.map(np.float64, x) for x in (lam, v))
        # Operation by operation: at nu = 1e7 the bar below leaves no room for fused rounding.
        truth = WISHART.inverse_fisher_product(wide_lam, wide)
        back = WISHART.fisher_product(wide_lam, truth)
        for found, expected in zip(WISHART.inverse_fisher_product(lam, v), truth, strict=True):
            close(found, expected, atol=1e-5 * np.max(np.abs(expected)))
        close(back.log_det, wide.log_det, atol=1e-15 * degrees + 1e-12)
        close(back.matrix, wide.matrix, rtol=1e-8, atol=1e-12)


def test_joint_families_of_one_dimension_agree(x64):
    """Normal-Wishart with d = 1 is normal-gamma with a = nu / 2 and b = 1 / (2 W)."""
    cases = GOLDEN["normal_gamma"]
    rows = [(i, row) for i, case in enumerate(cases) for row in case["log_prob"]]
    owner = np.array([i for i, _ in rows])
    x, tau = np.transpose([row["x"] for _, row in rows])

    def lift(params):
        m, kappa, a, b = (np.array([p[k] for p in params]) for k in ("m", "kappa", "a", "b"))
        scale = (0.5 / b)[:, None, None]
        return {"mean": m[:, None], "kappa": kappa, "scale": scale, "degrees": 2 * a}

    def evaluate(own, others, theta):
        p, q = NORMAL_WISHART.natural(**own), NORMAL_WISHART.natural(**others)
        at = jax.tree.map(lambda v: v[owner], p)
        return {
            "log_partition": NORMAL_WISHART.log_partition(p),
            "entropy": NORMAL_WISHART.entropy(p),
            "kl": NORMAL_WISHART.kl(p, q),
            "log_prob": NORMAL_WISHART.log_prob(at, theta),
        }

    both = (lift([c["params"] for c in cases]), lift([c["kl"]["q_params"] for c in cases]))
    found = compiled(evaluate, *both, MeanPrecision(x[:, None], tau[:, None, None]))
    for key in ("log_partition", "entropy"):
        close(found[key], [c[key] for c in cases], 1e-11)
    close(found["kl"], [c["kl"]["kl_p_q"] for c in cases], 1e-11)
    close(found["log_prob"], [row["value"] for _, row in rows], 1e-11)


# --- steps where fields are coupled ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["normal_gamma", "normal_inverse_gamma", "normal_wishart"])
def test_steps_of_coupled_fields_stay_inside(name):
    """Also far from the origin, where b or W^{-1} is a small difference of large numbers."""
    family, member = ROWS[name].family, ROWS[name].members[0]
    count = 200
    scales = np.repeat([1.0, 100.0], count // 2).astype(np.float32)
    means = np.multiply.outer(scales, np.ones_like(member["mean"], np.float32))
    others = {k: np.float32(v) for k, v in member.items() if k != "mean"}
    lam = compiled(lambda own: family.natural(**own), {"mean": means, **others})
    sizes = np.random.default_rng(0).uniform(-8, 30, size=(len(family.domains), count))
    one = jax.tree.map(np.asarray, direction(family, lam))
    step = one._replace(
        **{
            field: x * (10.0**size).astype(np.float32).reshape(-1, *(1,) * (x.ndim - 1))
            for (field, x), size in zip(one._asdict().items(), sizes, strict=True)
        }
    )

    def moved(lam, step):
        new = family.retract(lam, step)
        return new, family.in_domain(new)

    new, inside = compiled(moved, lam, step)
    assert all(x.dtype == np.float32 for x in new)
    assert np.all(inside)


@functools.cache
def inverse(family):
    """lambda(mu), whether there is one, and whether what is returned is one."""

    def evaluate(mu):
        lam, converged = family.natural_from_expectation(mu, with_status=True)
        return lam, converged, family.in_domain(lam)

    return jax.jit(evaluate)


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
    mu = family.Expectation(*(np.asarray(x, np.float64) for x in mu))
    lam, converged, inside = inverse(family)(mu)
    assert not bool(converged)
    assert any(np.any(np.isnan(x)) for x in lam)
    assert not bool(inside)


@pytest.mark.parametrize("name", ["wishart", "inverse_wishart", "normal_gamma", "normal_wishart"])
def test_density_is_zero_outside_the_support(x64, name):
    family = ROWS[name].family

    def evaluate(own):
        lam = family.natural(**own)
        return family.log_prob(lam, jax.tree.map(lambda x: -x, family.mean(lam)))

    assert compiled(evaluate, ROWS[name].members[0]) == -np.inf


def test_zero_density_has_zero_gradients(x64):
    density = lambda lam: jnp.exp(WISHART.log_prob(lam, -jnp.eye(2)))  # noqa: E731
    slope = lambda own: jax.grad(density)(WISHART.natural(**own))  # noqa: E731
    assert all(np.all(x == 0) for x in compiled(slope, ROWS["wishart"].members[0]))


def test_moments_that_do_not_exist_are_infinite(x64):
    low = {"mean": 0.0, "kappa": 1.0, "concentration": 0.9, "rate": 1.0}
    variance = lambda own: NORMAL_GAMMA.variance(NORMAL_GAMMA.natural(**own))  # noqa: E731
    assert compiled(variance, low).mean == np.inf
    family = ROWS["inverse_wishart"].family

    @jax.jit
    def moments(degrees):
        lam = family.natural(scale=jnp.eye(2), degrees=degrees)
        return family.mean(lam)[0, 0], family.variance(lam)[0, 0]

    for degrees, *finite in [(2.5, False, False), (4.0, True, False), (5.5, True, True)]:
        assert np.isfinite(moments(degrees)).tolist() == finite


# --- the sphere -----------------------------------------------------------------------------------

KAPPAS = [1e-12, 1e-3, 0.1, 3.0, 8.9, 9.1, 21.9, 22.1, 60.0, 1e3, 1e8]


@pytest.mark.parametrize("order", [0.0, 0.5, 4.0, 24.0, 249.0])
def test_bessel_functions_to_the_last_digits(dtype, order):
    """Against fifty digits, at x = kappa^2 as it was rounded."""
    x = np.square(np.asarray(KAPPAS, dtype))
    found = compiled(lambda x: bessel(order, x), x)
    eps = np.finfo(dtype).eps
    with mpmath.workdps(50):
        for i, square in enumerate(x):
            kappa, nu = mpmath.sqrt(mpmath.mpf(float(square))), mpmath.mpf(order)
            low, high = (mpmath.besseli(n, kappa, maxterms=10**6) for n in (nu, nu + 1))
            log, mean = mpmath.log(low) - nu * mpmath.log(kappa), high / low
            close(found.log[i], float(log), 20 * eps, 80 * eps)
            close(found.entropy[i], float(log - kappa * mean), 20 * eps, 80 * eps)
            close(found.ratio[i], float(mean / kappa), 10 * eps)
            close(found.rest[i], float(1 - mean), 30 * eps)
            slope = 1 - mean**2 - (2 * nu + 1) * mean / kappa
            close(found.slope[i], float(slope), 500 * eps)


@pytest.mark.parametrize("d", [3, 60])
def test_sphere_maps_and_their_derivatives_over_the_whole_range(dtype, d):
    """mu -> lambda, F^{-1} F, and the slope of the entropy, from the uniform density to 1e8."""
    kappa = np.array([0.0, 1e-6, 0.3, 1.0, 5.0, 30.0, 1e3, 1e5, 1e8])
    rng = np.random.default_rng(d)
    u, v = (np.asarray(rng.normal(size=(kappa.size, d)), dtype) for _ in range(2))

    def evaluate(u, kappa, v):
        lam, v = SPHERE.natural(direction=u, concentration=kappa), SPHERE.Natural(v)
        slope = jax.grad(lambda lam: jnp.sum(SPHERE.entropy(lam)))(lam)
        return {
            "lambda": lam.linear,
            "inverse": SPHERE.natural_from_expectation(SPHERE.expectation(lam), with_status=True),
            "again": SPHERE.inverse_fisher_product(lam, SPHERE.fisher_product(lam, v)).linear,
            "slope": SPHERE.inner(slope, lam),
            "expected": -SPHERE.inner(lam, SPHERE.fisher_product(lam, lam)),
            "spread": SPHERE.variance(lam),
        }

    found, eps = compiled(evaluate, u, np.asarray(kappa, dtype), v), np.finfo(dtype).eps
    back, converged = found["inverse"]
    known = kappa < 0.01 / eps  # beyond it mu is on the sphere but for rounding
    assert np.all(converged[known])
    error = np.linalg.norm(back.linear - found["lambda"], axis=-1)
    assert np.all((error <= 100 * eps * (1 + kappa) * kappa)[known]), error
    # Along u F is smaller than across it, by kappa.
    error = np.max(np.abs(found["again"] - v), axis=-1)
    assert np.all(error <= 100 * eps * (1 + kappa)), error
    close(found["slope"], found["expected"], rtol=1000 * eps)
    assert np.all(np.isfinite(found["spread"])) and np.all(found["spread"] >= 0)


def test_sphere_moments_against_scipy(x64):
    for d, kappa in [(2, 9.0), (7, 4.0)]:
        u = np.arange(1.0, d + 1)
        reference = stats.vonmises_fisher(u / np.linalg.norm(u), kappa)
        x = reference.rvs(5, random_state=0)

        def evaluate(u, kappa, x):
            lam = SPHERE.natural(direction=u, concentration=kappa)
            return SPHERE.entropy(lam), SPHERE.log_prob(lam, x)

        entropy, log_prob = compiled(evaluate, u, kappa, x)
        close(entropy, reference.entropy(), 1e-10)
        close(log_prob, reference.logpdf(x), 1e-10)


def test_kl_of_nearby_directions_keeps_its_digits(x64):
    """Half the Fisher norm along and across u, and at zero, where neither is defined."""
    kappa = np.array([0.0, 1e-3, 1.0, 10.0, 1e3, 1e6])[:, None]
    u, size = np.array([0.6, 0.0, 0.8]), np.maximum(kappa, 1.0)
    moves = np.stack([size * u, size * np.roll(u, 1), size * (u + 0.3 * np.roll(u, 1))])
    gap = np.array([1e-1, 1e-3, 1e-6]).reshape(-1, 1, 1, 1)

    def evaluate(p, v):
        q, middle = (SPHERE.combine((1.0, p), (t, v)) for t in (1.0, 1 / 3))
        # At a third of the way the norm is right to second order.
        return SPHERE.kl(p, q), 0.5 * SPHERE.inner(v, SPHERE.fisher_product(middle, v))

    found, norm = compiled(evaluate, SPHERE.Natural(kappa * u), SPHERE.Natural(gap * moves))
    error = np.abs(found / norm - 1)
    assert np.all(error <= gap[..., 0] ** 2 + 1e-14 * size[:, 0] / gap[..., 0]), error


def test_golden_implicit_derivative_of_an_angle(dtype):
    cases = load_golden("implicit_reparam")["cases"]
    cases = [c for c in cases if c["dist"].startswith("von_mises")]
    angle = np.array([c["x"] for c in cases])
    kappa = np.array([c["params"]["kappa"] for c in cases])
    x = np.asarray(np.stack([np.cos(angle), np.sin(angle)], -1), dtype)
    lin = np.asarray(np.stack([kappa, 0 * kappa], -1), dtype)
    change = np.zeros_like(lin) + np.eye(2, dtype=dtype)[0]

    def slope(x, lin, change):
        return jax.jvp(lambda lin: attach(lin, x), (lin,), (change,))[1]

    dx = compiled(slope, x, lin, change)
    turned = np.sum(dx * np.stack([-np.sin(angle), np.cos(angle)], -1), -1)
    close(turned, [c["dx"] for c in cases], 1e-12 if dtype is np.float64 else 1e-5)
    close(np.sum(dx * x, -1), np.zeros(len(cases)), atol=10 * np.finfo(dtype).eps)


def test_draws_near_the_edge_of_the_wishart_domain_are_finite():
    """nu just above d - 1: chi variables of tiny shape."""
    own = {"mean": np.zeros(3), "kappa": 1.0, "scale": np.eye(3), "degrees": 2.05}

    def draw(own):
        return NORMAL_WISHART.sample(jax.random.key(0), NORMAL_WISHART.natural(**own), (200,))

    assert all(np.all(np.isfinite(part)) for part in compiled(draw, own))


def test_standard_parameters_of_several_types(x64):
    """Integers, lists of Python floats and batches that broadcast."""

    def natural(family, **own):
        return jax.eval_shape(lambda own: family.natural(**own), own)

    lam = SPHERE.natural(direction=np.array([0, 0, 2]), concentration=3)
    assert lam.linear.dtype == np.float64
    close(lam.linear, [0.0, 0.0, 3.0])
    assert natural(SPHERE, direction=np.eye(3), concentration=2.0).linear.shape == (3, 3)
    close(compiled(SPHERE.standard, SPHERE.Natural(np.zeros(3)))["direction"], [1.0, 0.0, 0.0])
    lam = natural(WISHART, scale=np.eye(2, dtype=int), degrees=np.arange(3, 6))
    assert lam.matrix.shape == (3, 2, 2) and lam.log_det.dtype == np.float64
    own = {"mean": np.ones((4, 1, 2)), "kappa": np.ones(3), "scale": np.eye(2, dtype=np.float32)}
    lam = natural(NORMAL_WISHART, **own, degrees=4)
    assert lam.linear.shape == (4, 3, 2) and lam.matrix.shape == (4, 3, 2, 2)
    own = {"mean": 0, "kappa": np.ones(2), "concentration": 2, "rate": np.ones((3, 1))}
    assert {x.shape for x in natural(NORMAL_GAMMA, **own)} == {(3, 2)}
