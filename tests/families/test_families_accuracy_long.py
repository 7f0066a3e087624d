"""Densities, entropies, divergences and log-partitions in float32 against mpmath, 1e-6 to 1e8.

The rule: off by at most 1e-5 of the value, or 1e-5 (1e-6 for A and KL) where that is small, beyond
what one rounding of lambda changes. For a density of concentration 1e8 four deviations from its
top, that is 1e-3.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from mpmath import mp, mpf

from blr_optax import families

lg, psi, log, exp, root = mp.loggamma, mp.digamma, mp.log, mp.exp, mp.sqrt
SIZES = (1e-6, 1e-2, 0.3, 1.0, 3.3, 50.0, 1e4, 1e6, 1e8)
WIDE = (1e-6, 0.1, 1.0, 1e4, 1e8)


def gamma_points(s):
    a, b = s
    m, sd = a / b, root(a) / b
    return [m, m + 4 * sd, max(m - 3 * sd, m / 10**6), m / mpf(10) ** 20]


def beta_points(s):
    a, b = s
    m = a / (a + b)
    sd = root(m * (1 - m) / (a + b + 1))
    return [m, m + sd, m - 4 * sd, mpf(10) ** -30, mpf(1) / 100, 1 - mpf(2) ** -23]


def log_beta(a, b):
    return lg(a) + lg(b) - lg(a + b)


def beta_kl(p, q):
    (a, b), (c, d) = p, q
    mean_logs = (a - c) * psi(a) + (b - d) * psi(b) + (c - a + d - b) * psi(a + b)
    return log_beta(c, d) - log_beta(a, b) + mean_logs


def gamma_kl(p, q):
    (a, b), (c, d) = p, q
    return (a - c) * psi(a) - lg(a) + lg(c) + c * log(b / d) + a * (d - b) / b


def binary_logs(logit):
    return -log(1 + exp(-logit)), -log(1 + exp(logit))


def binomial_kl(p, q):
    n, (yes, no), (other_yes, other_no) = p[1], binary_logs(p[0]), binary_logs(q[0])
    return n * (exp(yes) * (yes - other_yes) + exp(no) * (no - other_no))


def binomial_density(s, x):
    (yes, no), n = binary_logs(s[0]), s[1]
    return lg(n + 1) - lg(x + 1) - lg(n - x + 1) + x * yes + (n - x) * no


def binomial_points(s):
    p, n = exp(binary_logs(s[0])[0]), s[1]
    m, sd = n * p, root(n * p * (1 - p))
    return [mp.floor(min(max(x, 0), n)) for x in (0, n, m, m + 4 * sd, m - 2 * sd)]


def waiting_points(s):
    fail, r = exp(s[0]), s[1]
    m = r * fail / (1 - fail)
    sd = root(m / (1 - fail))
    return [mp.floor(max(x, 0)) for x in (0, 1, m, m + 4 * sd, m - 2 * sd)]


def waiting_kl(p, q):
    (u, r), (v, _) = p, q
    return r * (log((1 - exp(u)) / (1 - exp(v))) + exp(u) / (1 - exp(u)) * (u - v))


def inverse_gaussian_entropy(m, s):
    y = 2 * s / m
    return (1 + log(2 * mp.pi / s)) / 2 + mpf(3) / 2 * (log(m) - exp(y) * mp.e1(y))


def inverse_gaussian_kl(p, q):
    (m, s), (n, t) = p, q
    return (log(s / t) + t / s - 1 + t * (m - n) ** 2 / (n**2 * m)) / 2


# Standard parameters; lambda -> what the rest is written in; A, H, KL, log q; points.
CASES = {
    "gamma": (
        {"concentration": SIZES, "rate": WIDE},
        lambda log_x, x: (1 + log_x, -x),
        lambda a, b: lg(a) - a * log(b),
        lambda a, b: a - log(b) + lg(a) + (1 - a) * psi(a),
        gamma_kl,
        lambda s, x: (s[0] - 1) * log(x) - s[1] * x + s[0] * log(s[1]) - lg(s[0]),
        gamma_points,
    ),
    "inverse_gamma": (
        {"concentration": SIZES, "scale": WIDE},
        lambda log_x, x: (-1 - log_x, -x),
        lambda a, b: lg(a) - a * log(b),
        lambda a, b: a + log(b) + lg(a) - (1 + a) * psi(a),
        gamma_kl,
        lambda s, x: -(s[0] + 1) * log(x) - s[1] / x + s[0] * log(s[1]) - lg(s[0]),
        lambda s: [1 / x for x in gamma_points(s)],
    ),
    "beta": (
        {"alpha": SIZES, "beta": SIZES},
        lambda a, b: (1 + a, 1 + b),
        log_beta,
        lambda a, b: (
            log_beta(a, b) - (a - 1) * psi(a) - (b - 1) * psi(b) + (a + b - 2) * psi(a + b)
        ),
        beta_kl,
        lambda s, x: (s[0] - 1) * log(x) + (s[1] - 1) * log(1 - x) - log_beta(*s),
        beta_points,
    ),
    "weibull": (
        {"scale": (1e-3, 0.1, 1.0, 7.0, 100.0), "shape": (0.1, 0.5, 1.0, 2.5, 10.0)},
        lambda power, k: (-power, k),
        lambda b, k: -log(b),
        lambda b, k: 1 - log(b) - log(k) + (k - 1) / k * (log(b) + mp.euler),
        None,
        lambda s, x: log(s[0] * s[1]) + (s[1] - 1) * log(x) - s[0] * x ** s[1],
        lambda s: [(mpf(v) / s[0]) ** (1 / s[1]) for v in (1e-12, 0.01, 1, 20)],
    ),
    "inverse_gaussian": (
        {"mean": (1e-6, 1e-3, 1.0, 30.0, 1e8), "shape": WIDE},
        lambda x, inverse: (root(inverse / x), -2 * inverse),
        lambda m, s: -s / m - log(s) / 2,
        inverse_gaussian_entropy,
        inverse_gaussian_kl,
        lambda s, x: (log(s[1] / (2 * mp.pi * x**3)) - s[1] * (x / s[0] - 1) ** 2 / x) / 2,
        lambda s: [s[0], s[0] * (1 + root(s[0] / s[1])), s[0] / 100, 100 * s[0]],
    ),
    "binomial": (
        {"logit": (-20.0, -1.0, 0.0, 6.0, 30.0), "total": (1.0, 7.0, 100.0, 1e4, 1e6, 1e8)},
        lambda logit, n: (logit, n),
        lambda logit, n: n * log(1 + exp(logit)),
        None,
        binomial_kl,
        binomial_density,
        binomial_points,
    ),
    "negative_binomial": (
        {"probability": (1e-6, 1e-3, 0.1, 0.9, 0.999), "total": (1e-3, 0.1, 1.0, 7.0, 1e6)},
        lambda log_fail, r: (log_fail, r),
        lambda u, r: -r * log(1 - exp(u)),
        None,
        waiting_kl,
        lambda s, x: lg(s[1] + x) - lg(s[1]) - lg(x + 1) + x * s[0] + s[1] * log(1 - exp(s[0])),
        waiting_points,
    ),
}


def exact(x):
    return mpf(float(x))


def with_allowance(family, lam, truth):
    """The truth at a lambda, and by how much one rounding of its learnt fields changes it."""
    value, allowance = truth([exact(x) for x in lam]), mpf(0)
    for i, name in enumerate(lam._fields):
        if name in family.domains:
            moved = [exact(x) + (i == j) * exact(np.spacing(x)) for j, x in enumerate(lam)]
            allowance += abs(truth(moved) - value)
    return value, allowance


def check(what, found, truths, floor, cases):
    """The rule at the head of this file."""
    for x, (truth, allowance), case in zip(np.ravel(found), truths, cases, strict=True):
        off = abs(exact(x) - truth) - allowance
        assert np.isfinite(x) and off <= 1e-5 * abs(truth) + floor, (what, case, x, float(truth))


@functools.cache
def members(name):
    """All members of a grid that lambda holds in float32, one by one and stacked."""
    family, standard = families.get(name), CASES[name][0]
    grid = np.array(list(itertools.product(*standard.values())), np.float32).T
    lam = jax.tree.map(
        np.asarray, jax.jit(family.natural)(**dict(zip(standard, grid, strict=True)))
    )
    return family, lam, [family.Natural(*row) for row in zip(*lam, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_densities_and_entropies_in_float32(name):
    with mp.workdps(40):
        _, standard, log_a, entropy, _, density, points = CASES[name]
        family, lam, each = members(name)
        x = [[float(p) for p in points(standard(*map(exact, one)))] for one in each]
        least = 0.0 if name.endswith("binomial") else 1e-37
        x = np.clip(np.array(x), least, 3e38).astype(np.float32)
        x = np.minimum(x, np.float32(1 - 2.0**-24)) if name == "beta" else x

        @jax.jit
        def evaluate(lam, x):
            column = jax.tree.map(lambda v: v[:, None], lam)
            return family.log_prob(column, x), family.entropy(lam), family.log_partition(lam)

        log_q, h, a = evaluate(lam, x)
        pairs = [(one, v) for one, row in zip(each, x, strict=True) for v in row]
        truth = lambda v: lambda fields: density(standard(*fields), exact(v))  # noqa: E731
        truths = [with_allowance(family, one, truth(v)) for one, v in pairs]
        check("log q", log_q, truths, 1e-5, pairs)
        exact_a = [(log_a(*standard(*map(exact, one))), mpf(0)) for one in each]
        if name in ("gamma", "inverse_gamma"):  # which crosses zero where a is large
            fields = lambda fields: log_a(*standard(*fields))  # noqa: E731
            exact_a = [with_allowance(family, one, fields) for one in each]
        check("A", a, exact_a, 1e-6, each)
        if entropy is not None:
            truth = lambda fields: entropy(*standard(*fields))  # noqa: E731
            check("H", h, [with_allowance(family, one, truth) for one in each], 1e-5, each)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[4]])
def test_divergences_in_float32(name):
    """Of pairs at random from the grid, and of every member with one nearby."""
    with mp.workdps(40):
        standard, kl = CASES[name][1], CASES[name][4]
        family, lam, each = members(name)
        rng = np.random.default_rng(0)
        known = [getattr(lam, field) for field in family.known]
        first, second = rng.integers(0, len(each), (2, 300))
        same = np.all([x[first] == x[second] for x in known], axis=0) if known else first >= 0
        p, q = (jax.tree.map(lambda x, i=i: x[i[same]], lam) for i in (first, second))
        beside = lam._replace(**{n: getattr(lam, n) * np.float32(1.01) for n in family.domains})
        inside = np.asarray(family.in_domain(beside))
        p = jax.tree.map(lambda a, b: np.concatenate([a, b[inside]]), p, lam)
        q = jax.tree.map(lambda a, b: np.concatenate([a, b[inside]]), q, beside)
        found = jax.jit(family.kl)(p, q)
        rows = ([family.Natural(*x) for x in zip(*side, strict=True)] for side in (p, q))
        pairs = list(zip(*rows, strict=True))

        def truth(a, b):
            at_a, at_b = (standard(*map(exact, x)) for x in (a, b))
            value, by_a = with_allowance(family, a, lambda x: kl(standard(*x), at_b))
            return value, by_a + with_allowance(family, b, lambda x: kl(at_a, standard(*x)))[1]

        check("KL", found, [truth(*pair) for pair in pairs], 1e-6, pairs)


@pytest.mark.parametrize("one, many", [(1e-3, 1e8), (1.0, 1e-3), (3.3, 2e-5), (1e8, 3e-4)])
def test_where_one_part_is_nearly_all(one, many):
    """E log x is near 0 there, and the log-partition a small difference of large numbers."""
    beta, dirichlet = families.get("beta"), families.get("dirichlet")
    with mp.workdps(40):
        lam = beta.Natural(np.float32(one - 1), np.float32(many - 1))
        a, b = (1 + exact(x) for x in lam)
        three = dirichlet.Natural(np.array([many, one, many], np.float32) - np.float32(1))
        parts = [1 + exact(x) for x in three.log]
        mu, found_a, mu_three, found_three = jax.jit(
            lambda p, q: (
                beta.expectation(p),
                beta.log_partition(p),
                dirichlet.expectation(q).log,
                dirichlet.log_partition(q),
            )
        )(lam, three)
        pairs = [
            (mu.log, psi(a) - psi(a + b)),
            (mu.log1m, psi(b) - psi(a + b)),
            (found_a, log_beta(a, b)),
            *((x, psi(k) - psi(sum(parts))) for x, k in zip(mu_three, parts, strict=True)),
            (found_three, sum(map(lg, parts)) - lg(sum(parts))),
        ]
        for found, truth in pairs:
            assert abs(exact(found) - truth) <= 1e-5 * abs(truth), (found, float(truth))
