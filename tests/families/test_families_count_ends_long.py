"""Counts at their ends: rows without trials, counts beyond 32 bits, and what is certain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as ss
from mpmath import mp
from tools import close

import blr_optax as blr
from blr_optax import Distribution, estimators, families

N = 3_000_000_000  # above 2^31, and a number of float32
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def facts(family, lam, x):
    """What must be finite, derivatives in all fields included."""

    def numbers(lam):
        return (
            family.log_prob(lam, x),
            family.entropy(lam),
            family.log_partition(lam),
            family.kl(lam, lam),
            family.expected_log_base_measure(lam),
        )

    slopes = jax.grad(lambda lam: sum(jnp.sum(v) for v in numbers(lam)))(lam)
    mu = family.expectation(lam)
    still = jax.tree.map(jnp.zeros_like, mu)
    return {
        "numbers": numbers(lam),
        "slopes": slopes,
        "mean": family.mean(lam),
        "variance": family.variance(lam),
        "base": family.base_measure_gradient(lam).linear,
        "turned": family.inverse_fisher_product(lam, still).linear,
        "solved": family.natural_from_expectation(mu, with_status=True)[1],
        "draws": family.sample(jax.random.key(0), lam, (50,)),
        "inside": family.in_domain(lam),
    }


@DTYPES
def test_binomial_rows_without_trials(x64, dtype):
    family = families.get("binomial")
    total, x, p = np.array([0, 0, 5, 5]), np.array([0, 1, 2, 6]), 0.3

    @jax.jit
    def evaluate(total, x):
        return facts(family, family.natural(probability=jnp.asarray(p, dtype), total=total), x)

    found = evaluate(total.astype(dtype), x.astype(dtype))
    log_q, entropy, log_a, kl, log_h = found["numbers"]
    digits = 3e-6 if dtype == np.float32 else 1e-12
    close(log_q, ss.binom(total, p).logpmf(x), rtol=digits, atol=digits)
    close(entropy[:2], [0, 0])
    close(entropy[2:], [ss.binom(5, p).entropy()] * 2, rtol=10 * digits)
    for nothing in (log_a, log_h, kl, found["mean"], found["variance"], found["base"]):
        close(nothing[:2], [0, 0])
    close(found["turned"], np.zeros(4))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found["slopes"]))
    assert list(found["inside"]) == [True] * 4 and list(found["solved"]) == [False] * 2 + [True] * 2
    assert not found["draws"][:, :2].any() and found["draws"][:, 2:].any()


@DTYPES
def test_multinomial_rows_without_trials(x64, dtype):
    family, p = families.get("multinomial"), np.array([0.2, 0.3, 0.5])
    total, x = np.array([0, 0, 5]), np.array([[0, 0, 0], [0, 1, 0], [2, 3, 0]])

    @jax.jit
    def evaluate(total, x):
        return facts(family, family.natural(probabilities=jnp.asarray(p, dtype), total=total), x)

    found = evaluate(total.astype(dtype), x.astype(dtype))
    log_q, entropy, log_a, kl, log_h = found["numbers"]
    digits = 3e-6 if dtype == np.float32 else 1e-12
    expected = [ss.multinomial(n, p).logpmf(row) for n, row in zip(total, x, strict=True)]
    close(log_q, expected, rtol=digits, atol=digits)
    close(entropy, [0, 0, ss.multinomial(5, p).entropy()], rtol=digits)
    for nothing in (log_a, log_h, kl):
        close(nothing[:2], [0, 0])
    for nothing in (found["mean"], found["variance"], found["base"]):
        close(nothing[:2], np.zeros_like(nothing[:2]))
    close(found["turned"], np.zeros((3, 2)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found["slopes"]))
    assert not found["draws"][:, :2].any()


def test_a_row_without_trials_learns_nothing_and_harms_no_other(x64):
    """Its posterior is its prior; of the other, lambda moves by the exact natural gradient."""
    family = families.get("binomial")

    @jax.jit
    def learn(total):
        prior = Distribution(family, family.natural(logit=[0.5, 0.5], total=total))
        rule = estimators.score_function(64)
        gradient = estimators.natural_gradient(family, lambda x: jnp.sum(x), rule)
        _, change = gradient(jax.random.key(0), prior.natural)
        new = blr.natural_step(family, prior.natural, change, 0.5, prior=prior)
        alone = family.natural(logit=0.5, total=0)
        listed = lambda mu: family.probabilities(mu, 0)[0] * 3.0  # noqa: E731
        exact = estimators.natural_gradient(family, lambda x: x, estimators.enumeration(total=0))
        _, still = exact(jax.random.key(0), alone)
        return new.linear, jax.grad(listed)(family.expectation(alone)).linear + still.linear

    new, listed = learn(np.array([0.0, 5.0]))
    assert new[0] == 0.5 and new[1] != 0.5 and np.isfinite(new).all()
    assert listed == 0.0


@functools.cache
def exact_log_probs():
    """Those of the test below, in 60 digits: scipy's differences of log Gamma have none here."""
    with mp.workdps(60):
        p, f = mp.mpf("0.3"), lambda n: mp.loggamma(n + 1)

        def multinomial(counts, parts):
            terms = (x * mp.log(q) - f(x) for x, q in zip(counts, parts, strict=True))
            return f(sum(counts)) + mp.fsum(terms)

        x, y = 900_000_000, 7_000_000_000
        choose = f(N + y - 1) - f(N - 1) - f(y)
        return [
            float(v)
            for v in (
                multinomial((x, N - x), (p, 1 - p)),
                multinomial((x + 25600, N - x - 25600), (p, 1 - p)),
                N * mp.log(N) - N - f(N),
                choose + N * mp.log(p) + y * mp.log(1 - p),
                multinomial((600_000_000, x, 1_500_000_000), (mp.mpf("0.2"), p, mp.mpf("0.5"))),
            )
        ]


@DTYPES
@pytest.mark.parametrize("total", [N, float(N), np.int64(N)], ids=["int", "float", "int64"])
def test_counts_beyond_32_bits(x64, dtype, total):
    """In float32 they are multiples of 256 there, which is their rounding and no other error."""
    x, p = np.int64(900_000_000), 0.3
    binomial, poisson, waiting = map(families.get, ("binomial", "poisson", "negative_binomial"))
    many = families.get("multinomial")
    with jax.enable_x64(dtype == np.float64):
        first = binomial.natural(probability=p, total=total)
        found = [
            binomial.log_prob(first, x),
            binomial.log_prob(first, int(x) + 25600),
            poisson.log_prob(poisson.natural(rate=total), total),
            waiting.log_prob(waiting.natural(probability=p, total=total), 7_000_000_000),
            many.log_prob(
                many.natural(probabilities=[0.2, 0.3, 0.5], total=total),
                np.array([600_000_000, 900_000_000, 1_500_000_000]),
            ),
        ]
        assert all(one.dtype == dtype for one in found)
    # lambda's own rounding: log(3e9) in float32 is a rate off by 3000, where a deviation is 55000.
    close(found, exact_log_probs(), rtol=4e-4 if dtype == np.float32 else 1e-9)


@DTYPES
def test_draws_beyond_32_bits(x64, dtype):
    p = np.array([0.2, 0.3, 0.5])
    binomial, many = families.get("binomial"), families.get("multinomial")

    @jax.jit
    def draw(p, total):
        first = binomial.natural(probability=p[1], total=total)
        second = many.natural(probabilities=p, total=total)
        x = many.sample(jax.random.key(1), second, (500,))
        return binomial.sample(jax.random.key(0), first, (500,)), x, many.log_prob(second, x)

    one, three, log_q = (np.asarray(v, float) for v in draw(p.astype(dtype), dtype(N)))
    for x, q in ((one, 0.3), *zip(three.T, p, strict=True)):
        sd = np.sqrt(N * q * (1 - q))
        assert abs(x.mean() - N * q) < 5 * sd / np.sqrt(500)
        close(x.std(), sd, rtol=0.2)
    assert np.isfinite(log_q).all()
    np.testing.assert_allclose(three.sum(1), N, atol=0 if dtype == np.float64 else 3 * 256)


def test_sums_of_counts_are_exact_where_numbers_are():
    many = families.get("multinomial")
    lam = many.natural(probabilities=[0.5, 0.25, 0.25], total=2**24)
    one_off = np.array([[2**23, 2**22, 2**22], [2**23, 2**22, 2**22 - 1]])
    assert list(np.isfinite(many.log_prob(lam, one_off))) == [True, False]


@pytest.mark.parametrize(
    "name, standard, words",
    [
        ("bernoulli", {"probability": 0.0}, "at 0 or 1, a certain outcome, lambda is infinite"),
        ("binomial", {"probability": 1.0, "total": 3}, "a certain outcome"),
        ("geometric", {"probability": 1.0}, "a certain outcome"),
        ("poisson", {"rate": 0.0}, r"lambda = log\(rate\) is infinite"),
        ("multinomial", {"probabilities": [0.0, 1.0], "total": 3}, "leave the category out"),
        ("negative_binomial", {"probability": 0.5, "total": 0}, "nothing to count"),
        ("binomial", {"probability": 0.5, "total": -1}, "a whole number of at least zero"),
    ],
)
def test_what_is_certain_is_refused_with_the_reason(name, standard, words):
    with pytest.raises(ValueError, match=words):
        families.get(name).natural(**standard)
