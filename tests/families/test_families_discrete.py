"""Discrete families: golden points, hard points, sums over the support, draws."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from family_rows.discrete import ROWS
from jax.flatten_util import ravel_pytree
from scipy import special, stats
from tools import close, load_golden

from blr_optax.families import Family
from blr_optax.families import _log_factorial as lf

ROUNDINGS = 100  # the accuracy bar, in roundings of what is given
BERNOULLI, RADEMACHER = ROWS["bernoulli"].family, ROWS["rademacher"].family
CATEGORICAL, MULTINOMIAL = ROWS["categorical"].family, ROWS["multinomial"].family
BINOMIAL, POISSON = ROWS["binomial"].family, ROWS["poisson"].family
GEOMETRIC, NEGATIVE = ROWS["geometric"].family, ROWS["negative_binomial"].family
COUNTED = (BINOMIAL, POISSON, NEGATIVE)  # those whose base measure is not constant


@pytest.fixture(params=[np.float64, np.float32], ids=["float64", "float32"])
def dtype(request, x64):
    return request.param


def bar(dtype):
    return 1e-10 if dtype is np.float64 else 1e-4


def natural(family, linear, *known, dtype=np.float64):
    return family.Natural(*(jnp.asarray(np.asarray(x), dtype) for x in (linear, *known)))


@functools.cache
def jitted(f):
    """One compilation of a method for all tests: operation by operation would take minutes."""
    return jax.jit(f)


def wide(lam):
    """The same lambda in float64."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), lam)


# --- golden points --------------------------------------------------------------------------------

GOLDEN = {
    "bernoulli": lambda p: (BERNOULLI, p["logit"]),
    "categorical_minimal": lambda p: (CATEGORICAL, p["logits"]),
    "poisson": lambda p: (POISSON, p["log_rate"]),
    "binomial": lambda p: (BINOMIAL, p["logit"], p["n"]),
}
# (name, number of learnt numbers): cases are stacked, so their lengths must agree.
GROUPS = (("bernoulli", 1), ("poisson", 1), ("binomial", 1))
GROUPS += (("categorical_minimal", 2), ("categorical_minimal", 5))
# The reference numbers themselves have 60 digits beside one: 1e-304 is lost at logit -700.
LOST = 1e-58


def cases_of(name, size):
    cases = load_golden("expfam_values")["families"][name]["cases"]
    return [c for c in cases if len(c["natural"]) == size]


def stack(name, params, dtype):
    family, *columns = (list(x) for x in zip(*map(GOLDEN[name], params), strict=True))
    return family[0], natural(family[0], *columns, dtype=dtype)


@pytest.mark.parametrize(("name", "size"), GROUPS)
def test_golden_points(dtype, name, size):
    cases = cases_of(name, size)
    family, lam = stack(name, [c["params"] for c in cases], dtype)
    _, other = stack(name, [c["kl"]["q_params"] for c in cases], dtype)

    @jax.jit
    def evaluate(lam, other):
        mu = family.expectation(lam)
        eye = jnp.eye(size, dtype=dtype)
        fisher = jax.vmap(
            lambda e: family.fisher_product(lam, lam._replace(
                linear=jnp.broadcast_to(e if family.domains["linear"].event_ndim else e[0],
                                        lam.linear.shape))).linear, out_axes=-1
        )(eye)  # fmt: skip
        return {
            "expectation": mu.linear,
            "fisher": fisher,
            "log_partition": family.log_partition(lam),
            "entropy": family.entropy(lam),
            "E_log_h": family.expected_log_base_measure(lam),
            "kl": jitted(family.kl)(lam, other),
        }, family.natural_from_expectation(mu, with_status=True)

    found, (back, reached) = evaluate(lam, other)
    tiny = float(np.finfo(dtype).tiny)
    for key, values in found.items():
        assert values.dtype == dtype
        expected = np.array([c["kl"]["kl_p_q"] if key == "kl" else c[key] for c in cases])
        close(values, expected.reshape(values.shape), rtol=bar(dtype), atol=max(LOST, tiny))
    for i, case in enumerate(cases):
        for point in case["log_prob"]:
            one = jax.tree.map(lambda x, i=i: x[i], lam)
            log_p = jitted(family.log_prob)(one, jnp.asarray(point["x"]))
            assert log_p.dtype == dtype
            close(log_p, point["value"], rtol=bar(dtype), atol=max(LOST, tiny))
        amplified = case["mu_to_lambda_relative_amplification"]
        slack = max(bar(dtype), ROUNDINGS * float(np.finfo(dtype).eps) * amplified)
        mu = np.asarray(found["expectation"][i])
        inside = np.all(mu > 0) and (name != "bernoulli" or mu < 1)
        if name == "categorical_minimal":
            inside &= np.sum(mu) < 1
        assert bool(reached[i]) == inside
        assert np.all(np.isnan(back.linear[i])) == (not inside)
        if inside and slack < 1:
            close(back.linear[i], np.reshape(case["natural"], back.linear[i].shape), rtol=slack)


# --- E log h, its gradient and the entropy --------------------------------------------------------


def table(family, log_h_steps, lam, size):
    """(log q, log h) at 0 .. size, added up in long double: lambda T + log h is a running sum."""
    steps = np.asarray(log_h_steps(np.arange(size, dtype=np.longdouble)), np.longdouble)
    log_h = np.concatenate([[np.longdouble(0)], np.cumsum(steps)])
    weight = log_h + np.longdouble(lam) * np.arange(size + 1)
    top = weight.max()
    return weight - top - np.log(np.sum(np.exp(weight - top))), log_h


def binomial_steps(n):
    return lambda x: np.log((n - x) / (x + 1))


def poisson_steps():
    return lambda x: -np.log(x + 1)


def negative_steps(r):
    return lambda x: np.log((x + np.longdouble(r)) / (x + 1))


# Small and large counts on both sides of where the series take over, either outcome certain, few
# and many trials, shapes below, at and above one.
POISSON_AT = [(np.log(m),) for m in (1e-6, 0.1, 3, 19.9, 20.1, 50, 999, 1001, 1e5)]
BINOMIAL_AT = [
    (0.0, 1), (0.3, 2), (-20.0, 2), (0.0, 10), (4.0, 10), (-2.0, 1000), (2.0, 1000), (0.0, 1000),
    (-10.0, 100_000), (0.5, 5000), (40.0, 30), (-1e-3, 4000), (-18.0, 1e8), (-14.5, 1e8),
    (-11.0, 1e8), (-26.0, 1e12),
]  # fmt: skip
NEGATIVE_AT = [
    (-0.2, 1e-3), (-0.01, 1e-6), (-1e-2, 0.5), (-0.3, 1.0), (-0.02, 3.0), (-0.7, 2500.0),
    (-10.0, 1e6), (-16.0, 1e8), (-2.0, 1000.0), (-20.0, 0.7), (-0.1, 1100.0), (-11.5, 1e8),
    (-40.0, 2.5),
]  # fmt: skip


def summed(family, point):
    """E log h, the entropy and grad_mu E log h by sums over the support."""
    lam, *known = point
    if family is POISSON:
        steps, top = poisson_steps(), np.exp(lam) + 60 * np.exp(lam / 2) + 60
    elif family is BINOMIAL:
        n = known[0]
        mean, rare = n / (1 + np.exp(-lam)), n / (1 + np.exp(abs(lam)))
        steps, top = binomial_steps(n), min(n, mean + 60 * np.sqrt(rare) + 60)
    else:
        mean = known[0] / np.expm1(-lam)
        steps, top = (
            negative_steps(known[0]),
            mean + 60 * np.sqrt(mean / -np.expm1(lam)) + 80 / -lam + 60,
        )
    log_q, log_h = table(family, steps, lam, int(top))
    q, x = np.exp(log_q), np.arange(len(log_q))
    mean, expected = q @ x, q @ log_h
    covariance = (q * (x - mean)) @ (log_h - expected)
    return float(expected), float(-q @ log_q), float(covariance / (q @ (x - mean) ** 2))


HARD = [(POISSON, POISSON_AT), (BINOMIAL, BINOMIAL_AT), (NEGATIVE, NEGATIVE_AT)]


@functools.cache
def of_base_measure(family):
    def evaluate(lam):
        return (
            family.expected_log_base_measure(lam),
            family.entropy(lam),
            family.base_measure_gradient(lam).linear,
        )

    return jax.jit(evaluate)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "points"), HARD, ids=["poisson", "binomial", "negative"])
def test_base_measure_and_entropy_are_sums_over_the_support(dtype, family, points):
    lam = natural(family, *np.array(points).T, dtype=dtype)
    truth = np.array([summed(family, map(float, p)) for p in zip(*lam, strict=True)]).T
    rtol = 1e-11 if dtype is np.float64 else 1e-4
    # E log h of one trial is zero; an entropy of 1e-15 is lost in long double; and a gradient of
    # zero by symmetry (logit 0) is as good as its two halves, of the order of one.
    eps = float(np.finfo(dtype).eps)
    atols = (eps, 1e-18, ROUNDINGS * eps)
    for found, expected, atol in zip(of_base_measure(family)(lam), truth, atols, strict=True):
        assert found.dtype == dtype
        close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.slow
def test_multinomial_base_measure_and_entropy(x64):
    """Against sums over all counts, and against the binomial where a category is impossible."""
    logits = np.array([[0.0, 0.0], [5.0, -30.0], [-12.0, 0.5], [40.0, 41.0], [-3.0, -60.0]])
    logits = np.resize(logits, (len(BINOMIAL_AT), 2))
    full = np.concatenate([logits, np.zeros((len(logits), 1))], 1)
    p = np.exp(full - special.logsumexp(full, axis=1, keepdims=True))
    evaluate = of_base_measure(MULTINOMIAL)
    for n in (1, 2, 7):
        x = np.array([x for x in itertools.product(range(n + 1), repeat=3) if sum(x) == n])
        log_q = np.stack([stats.multinomial(n, one).logpmf(x) for one in p])
        log_h = special.gammaln(n + 1) - special.gammaln(x + 1).sum(1)
        found = evaluate(natural(MULTINOMIAL, logits, np.full(len(logits), n)))
        close(found[0], np.exp(log_q) @ log_h, rtol=1e-11, atol=1e-15)
        close(found[1], -(np.exp(log_q) * log_q).sum(1), rtol=1e-11)
    logit, n = np.array(BINOMIAL_AT).T
    found = evaluate(natural(MULTINOMIAL, np.stack([logit, np.full(len(n), -800.0)], 1), n))
    expected = of_base_measure(BINOMIAL)(natural(BINOMIAL, logit, n))
    for x, y in zip((*found[:2], found[2][:, 0]), expected, strict=True):
        close(x, y, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_multinomial_entropy_with_rare_and_common_categories(dtype):
    """A category of five among a billion: the chain rule takes it out as a binomial, nearly."""
    n, p = 1e9, np.array([5e-9, 0.3, 0.7 - 5e-9])
    lam = natural(MULTINOMIAL, np.log(p[:2] / p[2]), n, dtype=dtype)
    first = stats.poisson(5.0).entropy()  # within 1e-8 of the binomial's
    second = 0.5 * np.log(2 * np.pi * np.e * n * 0.3 * 0.7)  # of the n - x others: log n is enough
    close(jitted(MULTINOMIAL.entropy)(lam), first + second, rtol=max(1e-8, bar(dtype)))


@pytest.mark.slow
def test_multinomial_base_measure_gradient_is_the_default_where_that_is_good(x64):
    logits = np.array([[0.3, -0.7], [2.0, 1.0], [-1.0, 0.4]])
    lam = natural(MULTINOMIAL, logits, np.array([5.0, 30.0, 400.0]))
    found = jax.jit(MULTINOMIAL.base_measure_gradient)(lam)
    default = jax.jit(lambda x: Family.base_measure_gradient(MULTINOMIAL, x).linear)(lam)
    close(found.linear, default, rtol=1e-9)
    assert not np.any(found.total)


@pytest.mark.slow
@pytest.mark.parametrize("family", COUNTED, ids=["binomial", "poisson", "negative"])
def test_base_measure_gradient_is_the_default_where_that_is_good(x64, family):
    known = () if family is POISSON else (np.array([3.0, 12.0, 40.0]),)
    lam = natural(family, np.array([-0.4, -1.0, -2.5]), *known)
    found = jax.jit(family.base_measure_gradient)(lam)
    default = jax.jit(lambda x: Family.base_measure_gradient(family, x).linear)(lam)
    close(found.linear, default, rtol=1e-9)
    assert not any(np.any(x) for x in found[1:])


@pytest.mark.slow
def test_second_derivatives_of_binomial_sums_also_at_one_half(x64):
    """The rarer outcome changes sides at logit 0, and nothing may be felt of it."""

    def by_sum(a):
        log_q = BINOMIAL.log_prob(BINOMIAL.Natural(a, jnp.array(6.0)), jnp.arange(7.0))
        return -jnp.sum(jnp.exp(log_q) * log_q)

    def directly(a):
        return BINOMIAL.entropy(BINOMIAL.Natural(a, jnp.array(6.0)))

    def derivatives(f):
        return jax.jit(lambda a: (f(a), *jax.jvp(jax.grad(f), (a,), (jnp.ones_like(a),))))

    found, expected = derivatives(directly), derivatives(by_sum)
    for logit in (0.0, 0.4, -3.0):
        for x, y in zip(found(jnp.array(logit)), expected(jnp.array(logit)), strict=True):
            close(x, y, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_derivatives_in_the_total_too(x64):
    """A known total may be differentiated, by whoever wants to learn it."""

    def f(r):
        lam = natural(NEGATIVE, -0.5, 1.0)._replace(total=r)
        return NEGATIVE.expected_log_base_measure(lam)

    for r in (0.7, 1.3, 5.0):
        h = 1e-4
        close(jax.grad(f)(r), (f(r + h) - f(r - h)) / (2 * h), rtol=1e-6)


@pytest.mark.slow
def test_expected_log_factorials_differentiate_in_constant_memory():
    rate = jnp.ones(10_000)
    f = jax.jit(jax.grad(lambda m: jnp.sum(lf.poisson_log_factorial(m))))
    used = f.lower(rate).compile().memory_analysis()
    assert used.temp_size_in_bytes < 20 * rate.nbytes  # 200 nodes


# --- densities ------------------------------------------------------------------------------------


def smooth(f, x, twice=True):
    """The gradient is finite, and the Hessian; in float32, where there is less room."""
    along = (lambda x: jax.jvp(jax.grad(f), (x,), (jnp.ones_like(x),))) if twice else jax.grad(f)
    if x.dtype == np.float32:
        assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(jax.jit(along)(x)))


@pytest.mark.slow
def test_logits_of_700_in_both_precisions(dtype):
    """Nothing is lost, infinite or NaN: values, gradients and Hessians."""
    logits = np.array([700.0, -700.0, 80.0, -80.0, 0.0])
    cases = [
        (BERNOULLI, natural(BERNOULLI, logits, dtype=dtype), 1.0),
        (RADEMACHER, natural(RADEMACHER, logits / 2, dtype=dtype), 1.0),
        (BINOMIAL, natural(BINOMIAL, logits, np.full(5, 4.0), dtype=dtype), 4.0),
    ]
    for family, lam, high in cases:
        n = high if family is BINOMIAL else 1.0
        low = family.support(lam)[0]
        tiny = float(np.finfo(dtype).tiny)
        for x, sign in ((jnp.full_like(low, high), -1), (low, 1)):
            close(jitted(family.log_prob)(lam, x), -n * np.logaddexp(0, sign * logits), 1e-6, tiny)
        close(jitted(family.kl)(lam, lam), 0.0, atol=0)
        flipped = lam._replace(linear=-lam.linear)
        close(jitted(family.kl)(lam, flipped), n * np.abs(logits), rtol=1e-6)

        def total(x, family=family, lam=lam, low=low, high=high):
            a = lam._replace(linear=x)
            values = (family.log_prob(a, low), family.log_prob(a, jnp.full_like(low, high)))
            return sum(jnp.sum(v) for v in (
                *values, family.entropy(a), family.kl(a, lam), family.kl(lam, a), family.mean(a),
                family.log_partition(a), family.expected_log_base_measure(a)))  # fmt: skip

        smooth(total, lam.linear)


@pytest.mark.slow
@pytest.mark.parametrize("family", [CATEGORICAL, MULTINOMIAL], ids=["categorical", "multinomial"])
def test_choices_with_logits_of_700_in_both_precisions(dtype, family):
    linear = np.array([[700.0, -700.0], [-700.0, -700.0], [700.0, 699.0], [0.0, -80.0]])
    known = (np.full(4, 3.0),) if family is MULTINOMIAL else ()
    n = 3.0 if known else 1.0
    lam = natural(family, linear, *known, dtype=dtype)
    other = lam._replace(linear=jnp.roll(lam.linear, 1, axis=0))
    full = np.concatenate([linear, np.zeros((4, 1))], 1)
    log_p = full - np.logaddexp.reduce(full, axis=1, keepdims=True)
    log_q = np.roll(log_p, 1, axis=0)
    each = jnp.eye(3)[:, None] * n if known else jnp.arange(3)[:, None]
    close(jitted(family.log_prob)(lam, each), n * log_p.T, rtol=1e-6, atol=1e-30)
    divergence = n * np.sum(np.exp(log_p) * (log_p - log_q), 1)
    close(jitted(family.kl)(lam, other), divergence, rtol=1e-6)
    close(jitted(family.kl)(lam, lam), 0.0, atol=0)

    def total(x):
        a = lam._replace(linear=x)
        values = (family.log_prob(a, each), family.entropy(a), family.kl(a, other),
                  family.kl(other, a), family.mean(a), family.log_partition(a),
                  family.expected_log_base_measure(a))  # fmt: skip
        return sum(jnp.sum(v) for v in values)

    smooth(total, lam.linear, twice=family is CATEGORICAL)


def kl_in_mpmath(p, q):
    """sum_k p_k log(p_k / q_k) from logits, with the last one 0."""
    with mpmath.workdps(200):
        p, q = ([*map(mpmath.mpf, map(float, x)), mpmath.mpf(0)] for x in (p, q))
        a, b = (mpmath.log(sum(map(mpmath.exp, x))) for x in (p, q))
        return float(sum(mpmath.exp(x - a) * (x - a - y + b) for x, y in zip(p, q, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("gap", [1e-6, 1e-2, 0.7, 1.3, 30.0])
def test_kl_keeps_its_digits_near_and_far(dtype, gap):
    at = np.array([0.0, 0.3, -0.3, 9.0, -9.0, 40.0, -40.0])
    p, q = (natural(BERNOULLI, x, dtype=dtype) for x in (at, at + gap))
    truth = np.array([kl_in_mpmath([a], [b]) for a, b in zip(p.linear, q.linear, strict=True)])
    lost = 1e-150  # of mpmath, where p and q round to the same
    close(jitted(BERNOULLI.kl)(p, q), truth, rtol=bar(dtype) / 10, atol=lost)
    p, q = (natural(RADEMACHER, x.linear / 2, dtype=dtype) for x in (p, q))
    close(jitted(RADEMACHER.kl)(p, q), truth, rtol=bar(dtype) / 10, atol=lost)
    rng = np.random.default_rng(0)
    choices = np.array([[0.0, 0.0, 0.0], [9.0, -9.0, 2.0], [-50.0, 0.3, -3.0], [45.0, 44.0, 30.0]])
    step = gap * rng.normal(size=choices.shape)
    p, q = (natural(CATEGORICAL, x, dtype=dtype) for x in (choices, choices + step))
    truth = np.array([kl_in_mpmath(a, b) for a, b in zip(p.linear, q.linear, strict=True)])
    close(jitted(CATEGORICAL.kl)(p, q), truth, rtol=bar(dtype) / 10, atol=lost)


@pytest.mark.slow
@pytest.mark.parametrize("gap", [1e-6, 1e-2, 0.7, 1.3, 30.0])
def test_kl_of_counts_keeps_its_digits_near_and_far(dtype, gap):
    def rate(x, y):
        with mpmath.workdps(200):
            x, y = mpmath.mpf(float(x)), mpmath.mpf(float(y))
            return float(mpmath.exp(y) - mpmath.exp(x) - mpmath.exp(x) * (y - x))

    def wait(x, y):
        with mpmath.workdps(200):
            x, y = mpmath.mpf(float(x)), mpmath.mpf(float(y))
            success = [mpmath.log(-mpmath.expm1(v)) for v in (x, y)]
            return float(success[0] - success[1] + mpmath.exp(x) / -mpmath.expm1(x) * (x - y))

    at = np.array([-40.0, -3.0, 0.0, 5.0, 13.0])
    p, q = (natural(POISSON, x, dtype=dtype) for x in (at, at + gap))
    close(jitted(POISSON.kl)(p, q), list(map(rate, p.linear, q.linear)), rtol=bar(dtype) / 10)
    at = -np.array([1e-7, 1e-3, 0.2, 3.0, 50.0])
    for up in (np.exp(gap), np.exp(-gap)):
        p, q = (natural(GEOMETRIC, x, dtype=dtype) for x in (at, at * up))
        truth = np.array(list(map(wait, p.linear, q.linear)))
        close(
            jitted(GEOMETRIC.kl)(p, q),
            truth,
            rtol=bar(dtype) / 10,
            atol=float(np.finfo(dtype).tiny),
        )
        r = np.array([0.1, 1.0, 3.0, 7.0, 1e4])
        p, q = (natural(NEGATIVE, x.linear, r, dtype=dtype) for x in (p, q))
        close(jitted(NEGATIVE.kl)(p, q), r * truth, rtol=bar(dtype) / 10,
              atol=float(np.finfo(dtype).tiny) * 1e4)  # fmt: skip


def mass(family, lam, x):
    """log q(x) in mpmath."""
    with mpmath.workdps(50):
        a, *known = (mpmath.mpf(float(v)) for v in lam)
        x = mpmath.mpf(float(x))
        if family is POISSON:
            return float(x * a - mpmath.exp(a) - mpmath.loggamma(x + 1))
        if family is BINOMIAL:
            (n,) = known
            chosen = mpmath.loggamma(n + 1) - mpmath.loggamma(x + 1) - mpmath.loggamma(n - x + 1)
            return float(chosen + x * a - n * mpmath.log1p(mpmath.exp(a)))
        r = known[0] if known else mpmath.mpf(1)
        orders = mpmath.loggamma(x + r) - mpmath.loggamma(r) - mpmath.loggamma(x + 1)
        return float(orders + x * a + r * mpmath.log(-mpmath.expm1(a)))


LARGE = [
    (BINOMIAL, [(-2.0, 1e4), (0.1, 1e8), (-16.0, 1e8), (0.0, 1e12)]),
    (POISSON, [(13.8,), (-8.0,), (4.0,), (25.0,)]),
    (GEOMETRIC, [(-1e-6,), (-3.0,), (-40.0,), (-1e-3,)]),
    (NEGATIVE, [(-0.01, 1e4), (-1e-3, 0.02), (-16.0, 1e8), (-0.5, 1e6)]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "points"), LARGE, ids=["binomial", "poisson", "geo", "negative"]
)
def test_log_prob_of_large_counts(dtype, family, points):
    """At the rounded lambda; each term may be a billion where their sum is ten."""
    lam = natural(family, *np.array(points).T, dtype=dtype)
    mean, sd = (
        np.asarray(f(wide(lam))) for f in (family.mean, lambda v: family.variance(v) ** 0.5)
    )
    away = np.array([-np.inf, -2.5, -0.7, 0.0, 0.3, 2.0, 30.0])[:, None]
    top = np.asarray(lam.total, np.float64) if family is BINOMIAL else np.inf
    x = np.floor(np.clip(mean + sd * away, 0.0, top))
    x = np.asarray(np.asarray(x, dtype), np.float64)  # what can be said in float32
    found = jitted(family.log_prob)(lam, jnp.asarray(x, dtype))
    assert found.dtype == dtype
    expected = [[mass(family, (v[i] for v in lam), row[i]) for i in range(4)] for row in x]
    # The mean has a relative rounding error of a few eps times log(mean): in log q that is this
    # much times x - mean, whatever the formula.
    eps = float(np.finfo(dtype).eps)
    blur = 4 * eps * (1 + np.abs(np.asarray(lam.linear))) * (np.abs(x - mean) + sd)
    relative = 1e-12 if dtype is np.float64 else 1e-5
    error = np.abs(np.asarray(found, np.float64) - expected)
    assert np.all(error <= relative * np.abs(expected) + blur), error


@pytest.mark.slow
def test_log_prob_is_minus_infinity_outside_the_support(x64):
    beyond = {"binomial": 10.0, "bernoulli": 2.0, "categorical": 3.0, "rademacher": 0.0}
    for name, row in ROWS.items():
        x = jnp.array([0.5, np.nan, np.inf, -np.inf, -2.0, beyond.get(name, -1.0)])
        if name == "multinomial":
            x = jnp.array([[-1.0, 3, 3], [0.5, 2.5, 2], [1, 2, 3], [np.nan, 5, 0], [np.inf, 0, 0]])
        lam = row.family.natural(**row.members[0])
        assert np.all(jitted(row.family.log_prob)(lam, x) == -np.inf), name


@pytest.mark.slow
def test_gradients_are_finite_where_some_points_are_outside_the_support(x64):
    for name in ("bernoulli", "binomial", "poisson", "geometric", "negative_binomial"):
        row = ROWS[name]
        lam = row.family.natural(**row.members[0])
        x = jnp.array([1.0, -3.0, 0.5, 0.0])

        def masked(a, f=row.family, x=x, lam=lam):
            log_q = f.log_prob(lam._replace(linear=a), x)
            return jnp.sum(jnp.where(log_q > -jnp.inf, log_q, 0.0))

        assert np.isfinite(jax.jit(jax.grad(masked))(lam.linear)), name


# --- maps -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_unreachable_means_are_nan_and_say_so(x64):
    for family, bad, known in [
        (BERNOULLI, [0.0, 1.0, -0.1, 1.1, np.nan], ()),
        (RADEMACHER, [-1.0, 1.0, 1.1, -2.0, np.nan], ()),
        (BINOMIAL, [0.0, 3.0, -1.0, 4.0, np.nan], (3.0,)),
        (POISSON, [0.0, -1.0, np.inf, np.nan, -np.inf], ()),
        (GEOMETRIC, [0.0, -0.5, -3.0, np.inf, np.nan], ()),
        (NEGATIVE, [0.0, -0.5, -9.0, np.inf, np.nan], (2.0,)),
    ]:
        mu = family.Expectation(jnp.array([*bad, 0.4]), *(jnp.full(6, k) for k in known))
        lam, status = family.natural_from_expectation(mu, with_status=True)
        assert status.tolist() == [False] * 5 + [True]
        assert np.isnan(lam.linear).tolist() == [True] * 5 + [False]
    for family, known in [(CATEGORICAL, ()), (MULTINOMIAL, (jnp.ones(4),))]:
        linear = jnp.array([[0.5, 0.5], [0.0, 0.4], [0.7, -0.1], [0.3, 0.2]])
        lam, status = family.natural_from_expectation(
            family.Expectation(linear, *known), with_status=True
        )
        assert status.tolist() == [False] * 3 + [True]
        assert np.isnan(lam.linear).all(1).tolist() == [True] * 3 + [False]


@pytest.mark.slow
def test_softmax_logits_are_shifted_to_the_last(x64):
    lam = CATEGORICAL.natural(logits=[1.0, 2.0, 5.0])
    close(lam.linear, [-4.0, -3.0])
    close(CATEGORICAL.standard(lam)["logits"], [-4.0, -3.0, 0.0])
    close(CATEGORICAL.mean(lam), np.exp([1.0, 2.0, 5.0]) / np.exp([1.0, 2.0, 5.0]).sum())
    same = CATEGORICAL.natural(probabilities=CATEGORICAL.mean(lam))
    close(same.linear, lam.linear, rtol=1e-14)


@pytest.mark.slow
def test_integers_and_numpy_arrays_are_floats_of_the_default_precision():
    for lam in (
        BERNOULLI.natural(logit=1),
        BINOMIAL.natural(logit=np.array([0, 1]), total=10**10),
        MULTINOMIAL.natural(logits=[0, 1], total=np.int64(3)),
        POISSON.natural(rate=3),
        NEGATIVE.natural(probability=np.float64(0.5), total=2),
        CATEGORICAL.natural(logits=np.zeros(3, int)),
    ):
        assert {x.dtype for x in lam} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_labels_need_lambda_for_their_statistics():
    with pytest.raises(ValueError, match="pass lam"):
        CATEGORICAL.sufficient_statistics(jnp.array(1))
    lam = CATEGORICAL.natural(logits=np.zeros(3))
    found = CATEGORICAL.sufficient_statistics(jnp.array([0, 1, 2]), lam)
    close(found.linear, [[1, 0], [0, 1], [0, 0]])


# --- values and draws -----------------------------------------------------------------------------


@pytest.mark.slow
def test_support_and_probabilities(x64):
    for name, row in ROWS.items():
        lams = [row.family.natural(**s) for s in row.members]
        lam = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(v) for v in x]), *lams)
        if name in ("poisson", "geometric", "negative_binomial"):
            assert not row.family.enumerable
            continue
        values = row.family.support(lam)
        points, _ = row.rule(row.members[0])
        each = np.asarray(values)[:, 0]
        if name == "multinomial":
            assert sorted(map(tuple, each)) == sorted(map(tuple, points))
        else:
            close(each, points)
        log_q = jitted(row.family.log_prob)(lam, values)
        assert log_q.shape == (len(points), len(lams))
        close(np.exp(log_q).sum(0), 1.0, rtol=1e-14)
        assert row.family.enumerable
        mu = jitted(row.family.expectation)(lam)
        close(row.family.probabilities(mu), np.exp(log_q), rtol=1e-12)
        if row.family.known:  # a total that is part of lambda is traced where a lambda is
            total = int(lam.total[0])
            close(jax.jit(row.family.support, static_argnums=1)(lam, total), values)
            assert np.all(np.isnan(row.family.probabilities(mu, total + 1)))


@pytest.mark.slow
def test_support_of_totals_that_differ_are_traced_or_are_too_many():
    lam = BINOMIAL.natural(logit=np.zeros(2), total=np.array([3, 4]))
    with pytest.raises(ValueError, match=r"common to the batch; got \[3"):
        BINOMIAL.support(lam)
    with pytest.raises(ValueError, match="concrete"):
        jax.jit(BINOMIAL.support)(lam)
    with pytest.raises(ValueError, match=f"{math.comb(91, 6)} values"):
        MULTINOMIAL.support(MULTINOMIAL.natural(logits=np.zeros(7), total=85))


def distance(draws, law):
    """The Kolmogorov-Smirnov statistic; above 1.95 once in a thousand."""
    values, counts = np.unique(np.asarray(draws, np.float64), return_counts=True)
    steps = np.cumsum(counts) / len(draws)
    below = np.concatenate([[0.0], steps[:-1]])
    gaps = np.abs([steps - law.cdf(values), below - law.cdf(values - 1)])
    return np.max(gaps) * np.sqrt(len(draws))


LAWS = [
    *((BINOMIAL, (a, n)) for a, n in [
        (0.3, 10), (3.0, 40), (-4.6, 1000), (2.0, 2000), (0.4, 1e6), (-7.0, 1e8), (-14.0, 1e8),
        (13.0, 1e6), (-10.0, 1e7), (0.0, 1e6)]),
    *((POISSON, (np.log(m),)) for m in (0.5, 9, 50, 900, 1100, 1e5, 1e6)),
    *((GEOMETRIC, (a,)) for a in (-7.0, -0.2, -1e-3)),
    *((NEGATIVE, (a, r)) for a, r in [(-2.3, 0.01), (-0.01, 0.5), (-1.0, 1000.0), (-1e-4, 2.0)]),
]  # fmt: skip


def law_of(family, lam):
    a = float(lam.linear)
    if family is BINOMIAL:
        return stats.binom(int(lam.total), 1 / (1 + np.exp(-a)))
    if family is POISSON:
        return stats.poisson(np.exp(a))
    return stats.nbinom(1.0 if family is GEOMETRIC else float(lam.total), -np.expm1(a))


@pytest.mark.slow
@pytest.mark.parametrize("family", [BINOMIAL, POISSON, GEOMETRIC, NEGATIVE],
                         ids=["binomial", "poisson", "geometric", "negative"])  # fmt: skip
def test_float32_draws_have_the_right_distribution(family):
    """Also where jax's own rejection samplers lose their digits."""
    points = [p for f, p in LAWS if f is family]
    lam = natural(family, *np.array(points).T, dtype=np.float32)
    draws = jax.jit(lambda k: family.sample(k, lam, (20_000,)))(jax.random.key(0))
    assert draws.dtype == jnp.float32 and draws.shape == (20_000, len(points))
    for i in range(len(points)):
        law = law_of(family, jax.tree.map(lambda x, i=i: x[i], lam))
        assert distance(draws[:, i], law) < 1.95, points[i]


@pytest.mark.slow
def test_enormous_rates_have_their_moments_in_float32():
    """Beyond the integers of 32 bits."""
    rate = np.array([1e7, 1e9, 3e9, 1e12])
    x = jax.jit(lambda k: POISSON.sample(k, POISSON.natural(rate=rate), (20_000,)))(
        jax.random.key(0)
    )
    mean = np.asarray(POISSON.mean(POISSON.natural(rate=rate)), np.float64)
    x = np.asarray(x, np.float64) - mean
    assert np.all(np.abs(x.mean(0)) < 5 * np.sqrt(mean / 20_000) + mean * 1e-7)
    assert np.all(np.abs(x.var(0) / mean - 1) < 5 * np.sqrt(2 / 20_000) + 1e-3)


@pytest.mark.slow
def test_multinomial_draws_add_up_and_have_the_moments():
    logits = np.array([[3.0, -60.0, 1.0], [-80.0, 70.0, -80.0], [0.1, 0.2, 0.3]])
    draw = jax.jit(lambda lam: MULTINOMIAL.sample(jax.random.key(1), lam, (20_000,)))
    for n in (30.0, 1e8):
        lam = natural(MULTINOMIAL, logits, np.full(3, n), dtype=np.float32)
        x = np.asarray(draw(lam), np.float64)
        # Counts that float32 can hold add up; others to its precision.
        close(x.sum(-1), n, rtol=0 if n < 2**24 else 1e-7)
        assert np.all(x >= 0)
        mean, v = (np.asarray(f(lam), np.float64) for f in (MULTINOMIAL.mean, MULTINOMIAL.variance))
        assert np.all(np.abs(x.mean(0) - mean) <= 5 * np.sqrt(v / 20_000) + 1e-6 * mean)
        spread = v > 1e-3
        assert np.all(np.abs(x.var(0) / np.where(spread, v, 1) - 1)[spread] < 0.06)


@pytest.mark.slow
def test_draws_are_floats_or_labels(dtype):
    for name, row in ROWS.items():
        lam = jax.tree.map(lambda x: jnp.asarray(x, dtype), row.family.natural(**row.members[0]))
        draw = jax.eval_shape(lambda lam, f=row.family: f.sample(jax.random.key(0), lam), lam)
        assert draw.dtype == (jnp.int32 if name == "categorical" else dtype)


def test_draws_resolve_rare_events(monkeypatch):
    """An event of probability p owns p 2^32 of the 2^32 values of the random bits."""
    rare = 1e-8
    owned = rare * 2.0**32

    def drawn(family, start, **standard):
        bits = int(start) + np.arange(-2000, 2000)
        monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.asarray(bits, dtype))
        lam = family.natural(**{k: np.float32(v) for k, v in standard.items()})
        return family.sample(jax.random.key(0), lam, (len(bits),))

    at_zero = drawn(BERNOULLI, 2000, probability=rare)
    assert abs(np.sum(at_zero == 1.0) - owned) < 1
    label = drawn(CATEGORICAL, 0.3 * 2.0**32, probabilities=[0.3, rare, 0.7])
    assert abs(np.sum(label == 1) - owned) < 1


@pytest.mark.parametrize("size", [3, 5000], ids=["few", "many"])
def test_labels_have_their_probabilities(size):
    logits = np.zeros(size, np.float32)
    logits[[1, -1]] = np.log(size), np.log(2.0 * size)
    lam = CATEGORICAL.natural(logits=logits)
    draws = jax.jit(lambda k: CATEGORICAL.sample(k, lam, (20_000,)))(jax.random.key(3))
    p = np.asarray(CATEGORICAL.mean(lam), np.float64)
    law = stats.rv_discrete(values=(np.arange(size), p / p.sum()))
    assert distance(draws, law) < 1.95


@pytest.mark.slow
def test_relaxed_draws_tend_to_draws_and_carry_gradients(dtype):
    for name in ("bernoulli", "rademacher", "categorical"):
        family, s = ROWS[name].family, ROWS[name].members[0]
        lam = jax.tree.map(lambda x: jnp.asarray(x, dtype), family.natural(**s))
        cold = jax.jit(lambda x, f=family: f.relaxed_sample(jax.random.key(2), x, 1e-3, (20_000,)))
        assert cold(lam).dtype == dtype
        close(cold(lam).mean(0), family.mean(lam), atol=0.02)
        flat, back = ravel_pytree(lam)

        @jax.jit
        def total(x, f=family, back=back):
            draw = lambda x: jnp.sum(f.relaxed_sample(jax.random.key(2), back(x), 0.5))  # noqa: E731
            return jax.value_and_grad(draw)(x)

        slope, h = total(flat)[1], 1e-2
        for i, e in enumerate(np.eye(len(flat))):
            step = jnp.asarray(h * e, dtype)
            rise = (total(flat + step)[0] - total(flat - step)[0]) / (2 * h)
            close(slope[i], rise, rtol=1e-3, atol=1e-3)
