"""Discrete families: what takes a hundred million random numbers, or as long to compile."""

import jax
import numpy as np
from family_rows.discrete import ROWS
from tools import close

CATEGORICAL, MULTINOMIAL = ROWS["categorical"].family, ROWS["multinomial"].family


def test_multinomial_draws_add_up_and_have_the_moments():
    family = MULTINOMIAL
    logits = np.array([[3.0, -60.0, 1.0], [-80.0, 70.0, -80.0], [0.1, 0.2, 0.3]], np.float32)

    @jax.jit
    def draw(lam):
        x = family.sample(jax.random.key(1), lam, (20_000,))
        return x, family.mean(lam), family.variance(lam)

    for n in (30.0, 1e8):
        found = draw(family.Natural(logits, np.full(3, n, np.float32)))
        x, mean, v = (np.asarray(value, np.float64) for value in found)
        # Counts that float32 can hold add up; others to its precision.
        close(x.sum(-1), n, rtol=0 if n < 2**24 else 1e-7)
        assert np.all(x >= 0)
        assert np.all(np.abs(x.mean(0) - mean) <= 5 * np.sqrt(v / 20_000) + 1e-6 * mean)
        spread = v > 1e-3
        assert np.all(np.abs(x.var(0) / np.where(spread, v, 1) - 1)[spread] < 0.06)


def test_labels_of_many_categories_have_their_probabilities():
    size, count = 5000, 20_000
    logits = np.zeros(size, np.float32)
    logits[[1, -1]] = np.log(size), np.log(2.0 * size)

    def draw(key, logits):
        lam = CATEGORICAL.natural(logits=logits)
        return CATEGORICAL.sample(key, lam, (count,)), CATEGORICAL.mean(lam)

    # What computes this long is worth the better program: it is done in less than half the time.
    fast = jax.jit(draw, compiler_options={"xla_backend_optimization_level": "2"})
    draws, p = map(np.asarray, fast(jax.random.key(3), logits))
    assert np.all((draws >= 0) & (draws < size))
    found = np.cumsum(np.bincount(draws, minlength=size)) / count
    p = np.asarray(p, np.float64)
    # The Kolmogorov-Smirnov statistic; above 1.95 once in a thousand.
    assert np.max(np.abs(found - np.cumsum(p / p.sum()))) * np.sqrt(count) < 1.95
