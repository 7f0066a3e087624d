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
from scipy import special, stats
from tools import close, compiled, load_golden

from blr_optax.families import ExponentialFamily
from blr_optax.families._discrete.bernoulli import softplus
from blr_optax.families._numerics import log_factorial as lf

ROUNDINGS = 100  # the accuracy bar, in roundings of what is given
BERNOULLI, RADEMACHER = ROWS["bernoulli"].family, ROWS["rademacher"].family
CATEGORICAL, MULTINOMIAL = ROWS["categorical"].family, ROWS["multinomial"].family
BINOMIAL, POISSON = ROWS["binomial"].family, ROWS["poisson"].family
GEOMETRIC, NEGATIVE = ROWS["geometric"].family, ROWS["negative_binomial"].family
COUNTED = (BINOMIAL, POISSON, NEGATIVE)  # those whose base measure is not constant


def bar(dtype):
    return 1e-10 if dtype is np.float64 else 1e-4


def natural(family, linear, *known, dtype=np.float64):
    return family.Natural(*(np.asarray(x, dtype) for x in (linear, *known)))


@functools.cache
def jitted(f):
    """One compilation of a method for all tests: operation by operation would take minutes."""
    return jax.jit(f)


@functools.cache
def member(name):
    """lambda of the first member of a row."""
    return compiled(lambda s: ROWS[name].family.natural(**s), ROWS[name].members[0])


def inverse(family, mu):
    """lambda(mu), and whether there is one."""
    return compiled(lambda mu: family.natural_from_expectation(mu, with_status=True), mu)


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
    owners, points = zip(*((i, p) for i, c in enumerate(cases) for p in c["log_prob"]), strict=True)
    at = jax.tree.map(lambda x: x[list(owners)], lam)

    def evaluate(lam, other, at, x):
        mu = family.expectation(lam)
        eye = jnp.eye(size, dtype=dtype)
        fisher = jax.vmap(
            lambda e: family.fisher_product(lam, lam._replace(
                linear=jnp.broadcast_to(e if family.domains["linear"].event_ndim else e[0],
                                        lam.linear.shape))).linear, out_axes=-1
        )(eye)  # fmt: skip
        return (
            {
                "expectation": mu.linear,
                "fisher": fisher,
                "log_partition": family.log_partition(lam),
                "entropy": family.entropy(lam),
                "E_log_h": family.expected_log_base_measure(lam),
                "kl": family.kl(lam, other),
            },
            family.natural_from_expectation(mu, with_status=True),
            family.log_prob(at, x),
        )

    x = np.array([p["x"] for p in points])
    found, (back, reached), log_p = compiled(evaluate, lam, other, at, x)
    tiny = float(np.finfo(dtype).tiny)
    for key, values in found.items():
        assert values.dtype == dtype
        expected = np.array([c["kl"]["kl_p_q"] if key == "kl" else c[key] for c in cases])
        close(values, expected.reshape(values.shape), rtol=bar(dtype), atol=max(LOST, tiny))
    assert log_p.dtype == dtype
    close(log_p, [p["value"] for p in points], rtol=bar(dtype), atol=max(LOST, tiny))
    for i, case in enumerate(cases):
        amplified = case["mu_to_lambda_relative_amplification"]
        slack = max(bar(dtype), ROUNDINGS * float(np.finfo(dtype).eps) * amplified)
        mu = found["expectation"][i]
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


def test_multinomial_entropy_with_rare_and_common_categories(dtype):
    """A category of five among a billion: the chain rule takes it out as a binomial, nearly."""
    n, p = 1e9, np.array([5e-9, 0.3, 0.7 - 5e-9])
    lam = natural(MULTINOMIAL, np.log(p[:2] / p[2]), n, dtype=dtype)
    first = stats.poisson(5.0).entropy()  # within 1e-8 of the binomial's
    second = 0.5 * np.log(2 * np.pi * np.e * n * 0.3 * 0.7)  # of the n - x others: log n is enough
    close(jitted(MULTINOMIAL.entropy)(lam), first + second, rtol=max(1e-8, bar(dtype)))


def both_gradients(family):
    """grad_mu E log h as the family has it, and as the base class finds it."""
    return lambda lam: (
        family.base_measure_gradient(lam),
        ExponentialFamily.base_measure_gradient(family, lam).linear,
    )


def test_multinomial_base_measure_gradient_is_the_default_where_that_is_good(x64):
    logits = np.array([[0.3, -0.7], [2.0, 1.0], [-1.0, 0.4]])
    lam = natural(MULTINOMIAL, logits, np.array([5.0, 30.0, 400.0]))
    found, default = compiled(both_gradients(MULTINOMIAL), lam)
    close(found.linear, default, rtol=1e-9)
    assert not np.any(found.total)


@pytest.mark.parametrize("family", COUNTED, ids=["binomial", "poisson", "negative"])
def test_base_measure_gradient_is_the_default_where_that_is_good(x64, family):
    known = () if family is POISSON else (np.array([3.0, 12.0, 40.0]),)
    lam = natural(family, np.array([-0.4, -1.0, -2.5]), *known)
    found, default = compiled(both_gradients(family), lam)
    close(found.linear, default, rtol=1e-9)
    assert not any(np.any(x) for x in found[1:])


def test_second_derivatives_of_binomial_sums_also_at_one_half(x64):
    """The rarer outcome changes sides at logit 0, and nothing may be felt of it."""

    total = np.array(6.0)

    def by_sum(a):
        log_q = BINOMIAL.log_prob(BINOMIAL.Natural(a, total), np.arange(7.0))
        return -jnp.sum(jnp.exp(log_q) * log_q)

    def directly(a):
        return BINOMIAL.entropy(BINOMIAL.Natural(a, total))

    def derivatives(f):
        return lambda a: (f(a), *jax.jvp(jax.grad(f), (a,), (jnp.ones_like(a),)))

    both = jax.jit(lambda a: (derivatives(directly)(a), derivatives(by_sum)(a)))
    for logit in (0.0, 0.4, -3.0):
        for x, y in zip(*both(np.array(logit)), strict=True):
            close(x, y, rtol=1e-11, atol=1e-13)


def test_derivatives_in_the_total_too(x64):
    """A known total may be differentiated, by whoever wants to learn it."""

    def f(r):
        lam = natural(NEGATIVE, -0.5, 1.0)._replace(total=r)
        return NEGATIVE.expected_log_base_measure(lam)

    h, both = 1e-4, jax.jit(jax.value_and_grad(f))
    for r in (0.7, 1.3, 5.0):
        low, high = both(r - h)[0], both(r + h)[0]
        close(both(r)[1], (np.asarray(high) - low) / (2 * h), rtol=1e-6)


def test_expected_log_factorials_differentiate_in_constant_memory():
    rate = jnp.ones(10_000)
    f = jax.jit(jax.grad(lambda m: jnp.sum(lf.poisson_log_factorial(m))))
    used = f.lower(rate).compile().memory_analysis()
    assert used.temp_size_in_bytes < 20 * rate.nbytes  # 200 nodes


# --- densities ------------------------------------------------------------------------------------


def slopes(f, x, twice=True):
    """The gradient, and the Hessian along ones; in float32, where there is less room."""
    if x.dtype != np.float32:
        return ()
    return jax.jvp(jax.grad(f), (x,), (jnp.ones_like(x),)) if twice else jax.grad(f)(x)


def check_finite(tree):
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


def test_logits_of_700_in_both_precisions(dtype):
    """Nothing is lost, infinite or NaN: values, gradients and Hessians."""
    logits = np.array([700.0, -700.0, 80.0, -80.0, 0.0])
    cases = [
        (BERNOULLI, natural(BERNOULLI, logits, dtype=dtype), 0.0, 1.0),
        (RADEMACHER, natural(RADEMACHER, logits / 2, dtype=dtype), -1.0, 1.0),
        (BINOMIAL, natural(BINOMIAL, logits, np.full(5, 4.0), dtype=dtype), 0.0, 4.0),
    ]
    for family, lam, *ends in cases:
        low, high = (np.full_like(lam.linear, x) for x in ends)

        def evaluate(lam, family=family, low=low, high=high):
            def total(x):
                a = lam._replace(linear=x)
                values = (family.log_prob(a, low), family.log_prob(a, high))
                return sum(jnp.sum(v) for v in (
                    *values, family.entropy(a), family.kl(a, lam), family.kl(lam, a),
                    family.mean(a), family.log_partition(a),
                    family.expected_log_base_measure(a)))  # fmt: skip

            return {
                "ends": [family.log_prob(lam, x) for x in (high, low)],
                "none": family.kl(lam, lam),
                "kl": family.kl(lam, lam._replace(linear=-lam.linear)),
                "slopes": slopes(total, lam.linear),
            }

        found, n = compiled(evaluate, lam), ends[1] if family is BINOMIAL else 1.0
        tiny = float(np.finfo(dtype).tiny)
        for log_q, sign in zip(found["ends"], (-1, 1), strict=True):
            close(log_q, -n * np.logaddexp(0, sign * logits), 1e-6, tiny)
        close(found["none"], 0.0, atol=0)
        close(found["kl"], n * np.abs(logits), rtol=1e-6)
        check_finite(found["slopes"])


@pytest.mark.parametrize("family", [CATEGORICAL, MULTINOMIAL], ids=["categorical", "multinomial"])
def test_choices_with_logits_of_700_in_both_precisions(dtype, family):
    linear = np.array([[700.0, -700.0], [-700.0, -700.0], [700.0, 699.0], [0.0, -80.0]])
    known = (np.full(4, 3.0),) if family is MULTINOMIAL else ()
    n = 3.0 if known else 1.0
    lam = natural(family, linear, *known, dtype=dtype)
    other = lam._replace(linear=np.roll(lam.linear, 1, axis=0))
    full = np.concatenate([linear, np.zeros((4, 1))], 1)
    log_p = full - np.logaddexp.reduce(full, axis=1, keepdims=True)
    log_q = np.roll(log_p, 1, axis=0)
    each = np.eye(3)[:, None] * n if known else np.arange(3)[:, None]

    def evaluate(lam, other):
        def total(x):
            a = lam._replace(linear=x)
            values = (family.log_prob(a, each), family.entropy(a), family.kl(a, other),
                      family.kl(other, a), family.mean(a), family.log_partition(a),
                      family.expected_log_base_measure(a))  # fmt: skip
            return sum(jnp.sum(v) for v in values)

        return {
            "log_prob": family.log_prob(lam, each),
            "kl": family.kl(lam, other),
            "none": family.kl(lam, lam),
            "slopes": slopes(total, lam.linear, twice=family is CATEGORICAL),
        }

    found = compiled(evaluate, lam, other)
    close(found["log_prob"], n * log_p.T, rtol=1e-6, atol=1e-30)
    divergence = n * np.sum(np.exp(log_p) * (log_p - log_q), 1)
    close(found["kl"], divergence, rtol=1e-6)
    close(found["none"], 0.0, atol=0)
    check_finite(found["slopes"])


def test_softplus_and_its_derivatives_keep_their_digits_in_float32():
    x = np.linspace(-80.0, 80.0, 2001, dtype=np.float32)
    wide = x.astype(np.float64)
    p, not_p = special.expit(wide), special.expit(-wide)

    @jax.jit
    def derivatives(x):
        slope = jax.grad(softplus)
        return [jax.vmap(f)(x) for f in (softplus, slope, jax.grad(slope))]

    for found, wanted in zip(derivatives(x), (np.logaddexp(0, wide), p, p * not_p), strict=True):
        close(found, wanted, rtol=4e-7)


def kl_in_mpmath(p, q):
    """sum_k p_k log(p_k / q_k) from logits, with the last one 0."""
    with mpmath.workdps(200):
        p, q = ([*map(mpmath.mpf, map(float, x)), mpmath.mpf(0)] for x in (p, q))
        a, b = (mpmath.log(sum(map(mpmath.exp, x))) for x in (p, q))
        return float(sum(mpmath.exp(x - a) * (x - a - y + b) for x, y in zip(p, q, strict=True)))


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


@functools.cache
def moments(family):
    return jax.jit(lambda lam: (family.mean(lam), family.variance(lam) ** 0.5))


@pytest.mark.parametrize(
    ("family", "points"), LARGE, ids=["binomial", "poisson", "geo", "negative"]
)
def test_log_prob_of_large_counts(dtype, family, points):
    """At the rounded lambda; each term may be a billion where their sum is ten."""
    lam = natural(family, *np.array(points).T, dtype=dtype)
    wide = jax.tree.map(np.float64, lam)
    mean, sd = map(np.asarray, moments(family)(wide))
    away = np.array([-np.inf, -2.5, -0.7, 0.0, 0.3, 2.0, 30.0])[:, None]
    top = np.asarray(lam.total, np.float64) if family is BINOMIAL else np.inf
    x = np.floor(np.clip(mean + sd * away, 0.0, top))
    x = np.asarray(np.asarray(x, dtype), np.float64)  # what can be said in float32
    found = jitted(family.log_prob)(lam, np.asarray(x, dtype))
    assert found.dtype == dtype
    expected = [[mass(family, (v[i] for v in lam), row[i]) for i in range(4)] for row in x]
    # The mean has a relative rounding error of a few eps times log(mean): in log q that is this
    # much times x - mean, whatever the formula.
    eps = float(np.finfo(dtype).eps)
    blur = 4 * eps * (1 + np.abs(np.asarray(lam.linear))) * (np.abs(x - mean) + sd)
    relative = 1e-12 if dtype is np.float64 else 1e-5
    error = np.abs(np.asarray(found, np.float64) - expected)
    assert np.all(error <= relative * np.abs(expected) + blur), error


def test_log_prob_is_minus_infinity_outside_the_support(x64):
    beyond = {"binomial": 10.0, "bernoulli": 2.0, "categorical": 3.0, "rademacher": 0.0}
    for name, row in ROWS.items():
        x = np.array([0.5, np.nan, np.inf, -np.inf, -2.0, beyond.get(name, -1.0)])
        if name == "multinomial":
            x = np.array([[-1.0, 3, 3], [0.5, 2.5, 2], [1, 2, 3], [np.nan, 5, 0], [np.inf, 0, 0]])
        assert np.all(jitted(row.family.log_prob)(member(name), x) == -np.inf), name


def test_gradients_are_finite_where_some_points_are_outside_the_support(x64):
    for name in ("bernoulli", "binomial", "poisson", "geometric", "negative_binomial"):
        x, lam = np.array([1.0, -3.0, 0.5, 0.0]), member(name)

        def masked(a, f=ROWS[name].family, x=x, lam=lam):
            log_q = f.log_prob(lam._replace(linear=a), x)
            return jnp.sum(jnp.where(log_q > -jnp.inf, log_q, 0.0))

        assert np.isfinite(jax.jit(jax.grad(masked))(lam.linear)), name


# --- maps -----------------------------------------------------------------------------------------


def test_unreachable_means_are_nan_and_say_so(x64):
    for family, bad, known in [
        (BERNOULLI, [0.0, 1.0, -0.1, 1.1, np.nan], ()),
        (RADEMACHER, [-1.0, 1.0, 1.1, -2.0, np.nan], ()),
        (BINOMIAL, [0.0, 3.0, -1.0, 4.0, np.nan], (3.0,)),
        (POISSON, [0.0, -1.0, np.inf, np.nan, -np.inf], ()),
        (GEOMETRIC, [0.0, -0.5, -3.0, np.inf, np.nan], ()),
        (NEGATIVE, [0.0, -0.5, -9.0, np.inf, np.nan], (2.0,)),
    ]:
        mu = family.Expectation(np.array([*bad, 0.4]), *(np.full(6, k) for k in known))
        lam, status = inverse(family, mu)
        assert status.tolist() == [False] * 5 + [True]
        assert np.isnan(lam.linear).tolist() == [True] * 5 + [False]
    for family, known in [(CATEGORICAL, ()), (MULTINOMIAL, (np.ones(4),))]:
        linear = np.array([[0.5, 0.5], [0.0, 0.4], [0.7, -0.1], [0.3, 0.2]])
        mu = family.Expectation(linear, *known)
        lam, status = inverse(family, mu)
        assert status.tolist() == [False] * 3 + [True]
        assert np.isnan(lam.linear).all(1).tolist() == [True] * 3 + [False]


def test_softmax_logits_are_shifted_to_the_last(x64):
    lam = CATEGORICAL.natural(logits=[1.0, 2.0, 5.0])
    close(lam.linear, [-4.0, -3.0])

    def evaluate(lam):
        mean = CATEGORICAL.mean(lam)
        same = CATEGORICAL.natural(probabilities=mean)
        return CATEGORICAL.standard(lam)["logits"], mean, same.linear

    logits, mean, same = compiled(evaluate, lam)
    close(logits, [-4.0, -3.0, 0.0])
    close(mean, np.exp([1.0, 2.0, 5.0]) / np.exp([1.0, 2.0, 5.0]).sum())
    close(same, lam.linear, rtol=1e-14)


def test_integers_and_numpy_arrays_are_floats_of_the_default_precision():
    for family, standard in (
        (BERNOULLI, {"logit": 1}),
        (BINOMIAL, {"logit": np.array([0, 1]), "total": 10**10}),
        (MULTINOMIAL, {"logits": [0, 1], "total": np.int64(3)}),
        (POISSON, {"rate": 3}),
        (NEGATIVE, {"probability": np.float64(0.5), "total": 2}),
        (CATEGORICAL, {"logits": np.zeros(3, int)}),
    ):
        # Concrete values in a trace: they are checked, and nothing else is computed.
        lam = jax.eval_shape(lambda f=family, s=standard: f.natural(**s))
        assert {x.dtype for x in lam} == {jnp.dtype("float32")}, family


def test_labels_need_lambda_for_their_statistics():
    with pytest.raises(ValueError, match="pass lam"):
        CATEGORICAL.sufficient_statistics(np.array(1))
    lam = natural(CATEGORICAL, np.zeros(2), dtype=np.float32)
    found = jitted(CATEGORICAL.sufficient_statistics)(np.array([0, 1, 2]), lam)
    close(found.linear, [[1, 0], [0, 1], [0, 0]])


# --- values and draws -----------------------------------------------------------------------------


def test_support_and_probabilities(x64):
    for name, row in ROWS.items():
        family = row.family
        if name in ("poisson", "geometric", "negative_binomial"):
            assert not family.enumerable
            continue
        members = {k: np.stack([s[k] for s in row.members]) for k in row.members[0]}
        lam = jitted(family.natural)(**members)
        known = lam[1:]  # concrete, as outside of any trace

        def evaluate(linear, family=family, known=known):
            lam = family.Natural(linear, *known)
            values, mu = family.support(lam), family.expectation(lam)
            one = family.Expectation(mu.linear, *known)
            return values, family.log_prob(lam, values), family.probabilities(one)

        values, log_q, p = compiled(evaluate, lam.linear)
        points, _ = row.rule(row.members[0])
        each = values[:, 0]
        if name == "multinomial":
            assert sorted(map(tuple, each)) == sorted(map(tuple, points))
        else:
            close(each, points)
        assert log_q.shape == (len(points), len(row.members))
        close(np.exp(log_q).sum(0), 1.0, rtol=1e-14)
        assert family.enumerable
        close(p, np.exp(log_q), rtol=1e-12)
        if family.known:  # a total that is part of lambda is traced where a lambda is
            total = int(lam.total[0])

            def traced(lam, family=family, total=total):
                mu = family.expectation(lam)
                return family.support(lam, total), family.probabilities(mu, total + 1)

            again, other = compiled(traced, lam)
            close(again, values)
            assert np.all(np.isnan(other))


def test_support_of_totals_that_differ_are_traced_or_are_too_many():
    lam = natural(BINOMIAL, np.zeros(2), np.array([3, 4]), dtype=np.float32)
    with pytest.raises(ValueError, match=r"common to the batch; got \[3"):
        BINOMIAL.support(lam)
    with pytest.raises(ValueError, match="concrete"):
        jax.jit(BINOMIAL.support)(lam)
    with pytest.raises(ValueError, match=f"{math.comb(91, 6)} values"):
        MULTINOMIAL.support(natural(MULTINOMIAL, np.zeros(6), 85.0, dtype=np.float32))


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


@pytest.mark.parametrize("family", [BINOMIAL, POISSON, GEOMETRIC, NEGATIVE],
                         ids=["binomial", "poisson", "geometric", "negative"])  # fmt: skip
def test_float32_draws_have_the_right_distribution(family):
    """Also where jax's own rejection samplers lose their digits."""
    points = [p for f, p in LAWS if f is family]
    lam = natural(family, *np.array(points).T, dtype=np.float32)
    draws = compiled(lambda k: family.sample(k, lam, (20_000,)), jax.random.key(0))
    assert draws.dtype == jnp.float32 and draws.shape == (20_000, len(points))
    for i in range(len(points)):
        law = law_of(family, jax.tree.map(lambda x, i=i: x[i], lam))
        assert distance(draws[:, i], law) < 1.95, points[i]


def test_enormous_rates_have_their_moments_in_float32():
    """Beyond the integers of 32 bits."""
    rate = np.array([1e7, 1e9, 3e9, 1e12], np.float32)

    def draw(key, rate):
        lam = POISSON.natural(rate=rate)
        return POISSON.sample(key, lam, (20_000,)), POISSON.mean(lam)

    found = compiled(draw, jax.random.key(0), rate)
    x, mean = (np.asarray(v, np.float64) for v in found)
    x = x - mean
    assert np.all(np.abs(x.mean(0)) < 5 * np.sqrt(mean / 20_000) + mean * 1e-7)
    assert np.all(np.abs(x.var(0) / mean - 1) < 5 * np.sqrt(2 / 20_000) + 1e-3)


def test_draws_are_floats_or_labels(dtype):
    for name, row in ROWS.items():
        # Concrete values in a trace: they are checked, and nothing else is computed.
        lam = jax.eval_shape(lambda row=row: row.family.natural(**row.members[0]))
        lam = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), lam)
        draw = jax.eval_shape(lambda lam, f=row.family: f.sample(jax.random.key(0), lam), lam)
        assert draw.dtype == (jnp.int32 if name == "categorical" else dtype)


def test_draws_resolve_rare_events(monkeypatch):
    """An event of probability p owns p 2^32 of the 2^32 values of the random bits."""
    rare = 1e-8
    owned = rare * 2.0**32

    def drawn(family, start, **standard):
        bits = int(start) + np.arange(-2000, 2000)
        monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.asarray(bits, dtype))
        draw = lambda s: family.sample(jax.random.key(0), family.natural(**s), (len(bits),))  # noqa: E731
        return compiled(draw, {k: np.float32(v) for k, v in standard.items()})

    at_zero = drawn(BERNOULLI, 2000, probability=rare)
    assert abs(np.sum(at_zero == 1.0) - owned) < 1
    label = drawn(CATEGORICAL, 0.3 * 2.0**32, probabilities=[0.3, rare, 0.7])
    assert abs(np.sum(label == 1) - owned) < 1


def test_labels_have_their_probabilities():
    logits = np.log([1.0, 3.0, 6.0]).astype(np.float32)

    def draw(key, logits):
        lam = CATEGORICAL.natural(logits=logits)
        return CATEGORICAL.sample(key, lam, (20_000,)), CATEGORICAL.mean(lam)

    draws, p = compiled(draw, jax.random.key(3), logits)
    p = np.asarray(p, np.float64)
    law = stats.rv_discrete(values=(np.arange(3), p / p.sum()))
    assert distance(draws, law) < 1.95


def test_relaxed_draws_tend_to_draws_and_carry_gradients(dtype):
    for name in ("bernoulli", "rademacher", "categorical"):
        family, lam = ROWS[name].family, jax.tree.map(lambda x: np.asarray(x, dtype), member(name))

        @jax.jit
        def cold(lam, family=family):
            draws = family.relaxed_sample(jax.random.key(2), lam, 1e-3, (20_000,))
            return draws, family.mean(lam)

        draws, mean = map(np.asarray, cold(lam))
        assert draws.dtype == dtype
        close(draws.mean(0), mean, atol=0.02)

        @jax.jit
        @jax.value_and_grad
        def total(x, family=family):
            return jnp.sum(family.relaxed_sample(jax.random.key(2), family.Natural(x), 0.5))

        flat, h = lam.linear.reshape(-1), 1e-2
        slope = np.asarray(total(lam.linear)[1]).reshape(-1)
        for i, e in enumerate(np.eye(len(flat))):
            step = np.asarray(h * e, dtype).reshape(lam.linear.shape)
            high, low = (np.asarray(total(lam.linear + x)[0]) for x in (step, -step))
            close(slope[i], (high - low) / (2 * h), rtol=1e-3, atol=1e-3)
