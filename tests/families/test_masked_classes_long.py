"""Classes that are masked away by a large negative logit, and integers of few bits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import blr_optax as blr

CATEGORICAL, MULTINOMIAL = (blr.families.get(name) for name in ("categorical", "multinomial"))
DEPTHS = (1e2, 1e4, 1e6, 1e9)


def log_p(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def pairs():
    """Logits of p and q [n, 3] whose class 0, 1 or 2 is masked in p, or in both."""
    free = [(0.0, 0.0, 0.0), (0.0, 1.0, 2.0), (3.0, -1.0, 0.5)]
    for depth, hidden, (a, b) in itertools.product(DEPTHS, range(3), itertools.product(free, free)):
        mask = -depth * (np.arange(3) == hidden)
        yield a + mask, b + 0 * mask
        yield a + mask, b + mask


P, Q = (np.array(x) for x in zip(*pairs(), strict=True))


def test_divergences_and_entropies_do_not_see_what_is_masked(dtype):
    def numbers(family, p, q, **known):
        lam, other = (family.natural(logits=x, **known) for x in (p, q))
        return family.kl(lam, other), family.mean(lam)

    run = jax.jit(
        lambda p, q: (
            *numbers(CATEGORICAL, p, q),
            CATEGORICAL.entropy(CATEGORICAL.natural(logits=p)),
            numbers(MULTINOMIAL, p, q, total=4)[0],
        )
    )
    kl, mean, entropy, of_counts = run(P.astype(dtype), Q.astype(dtype))
    log, other = log_p(P), log_p(Q)
    prob = np.exp(log)
    want = np.sum(np.where(prob > 0, prob * (log - other), 0.0), -1)
    tolerance = (
        {"rtol": 1e-4, "atol": 3e-5} if dtype == np.float32 else {"rtol": 1e-9, "atol": 1e-10}
    )
    np.testing.assert_allclose(kl, want, **tolerance)
    np.testing.assert_allclose(
        of_counts, 4 * want, rtol=tolerance["rtol"], atol=4 * tolerance["atol"]
    )
    np.testing.assert_allclose(mean, prob, **tolerance)
    np.testing.assert_allclose(
        entropy, -np.sum(prob * np.where(prob > 0, log, 0.0), -1), **tolerance
    )


def test_a_mask_in_the_second_alone_is_far_away():
    kl = lambda a, b: CATEGORICAL.kl(*(CATEGORICAL.natural(logits=x) for x in (a, b)))  # noqa: E731
    for hidden in (0, 1):
        q = np.where(np.arange(3) == hidden, -1e6, 0.0).astype(np.float32)
        np.testing.assert_allclose(kl(np.zeros(3, np.float32), q), 1e6 / 3, rtol=1e-4)
    last = np.array([0.0, 0.0, -1e6], np.float32)  # the last logit is what others are relative to
    assert kl(np.zeros(3, np.float32), last) > 100


def test_densities_and_draws_beside_a_masked_class():
    logits = np.array([0.0, 1.0, -1e9], np.float32)
    for order in itertools.permutations(range(3)):
        lam = CATEGORICAL.natural(logits=logits[list(order)])
        found = np.asarray(CATEGORICAL.log_prob(lam, np.argsort(order)))
        np.testing.assert_allclose(found[:2], log_p(logits[:2]), atol=3e-5)
        assert found[2] < -100
        draws = np.asarray(CATEGORICAL.sample(jax.random.key(0), lam, (500,)))
        assert not np.any(draws == order.index(2))


def test_estimators_see_the_two_classes_that_are_left():
    """The natural gradient by enumeration is that of the two classes alone."""
    loss = lambda label: jnp.array([1.0, 4.0, 100.0])[label]  # noqa: E731
    masked = CATEGORICAL.natural(logits=np.array([0.0, 1.0, -1e9], np.float32))
    q, other = (blr.Distribution(CATEGORICAL, lam) for lam in (masked, masked))
    np.testing.assert_allclose(q.kl(other), 0.0, atol=1e-6)
    estimate = blr.estimators.natural_gradient(CATEGORICAL, loss, blr.estimators.enumeration())
    value, gradient = jax.jit(estimate)(jax.random.key(0), masked)
    p = np.exp(log_p(np.array([0.0, 1.0])))
    np.testing.assert_allclose(value, p @ [1.0, 4.0], rtol=1e-4)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
    difference = np.diff(np.asarray(jax.tree.leaves(gradient)[0]))
    np.testing.assert_allclose(difference, 3.0, rtol=1e-4)  # of the losses, in lambda


# --- integers of few bits -------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "dtype"), [(200, jnp.int8), (259, jnp.uint8), (259, jnp.int16)])
def test_labels_of_few_bits(k, dtype):
    logits, labels = np.arange(k) / 100, np.array([0, 5, 100, 127])
    lam = CATEGORICAL.natural(logits=np.float32(logits))
    small = jnp.asarray(labels, dtype)
    np.testing.assert_allclose(CATEGORICAL.log_prob(lam, small), log_p(logits)[labels], rtol=1e-4)
    chosen = np.asarray(CATEGORICAL.sufficient_statistics(small, lam).linear)
    np.testing.assert_array_equal(chosen.argmax(-1), labels)
    np.testing.assert_array_equal(chosen.sum(-1), 1)


def test_statistics_of_small_integers_do_not_wrap():
    normal, gaussian = blr.families.get("normal"), blr.families.get("gaussian")
    for dtype in (jnp.int8, jnp.uint8, jnp.int16):
        x = jnp.asarray([100, 120], dtype)
        mu = normal.sufficient_statistics(x)
        np.testing.assert_array_equal(mu.quadratic, [1e4, 1.44e4])
        mu = gaussian.sufficient_statistics(x)
        np.testing.assert_array_equal(mu.quadratic, [[1e4, 1.2e4], [1.2e4, 1.44e4]])
        lam = gaussian.natural(mean=np.zeros(2), covariance=np.eye(2))
        found = gaussian.log_base_measure(lam, x)
        np.testing.assert_allclose(found, -np.log(2 * np.pi), rtol=1e-6)
        counts = jnp.asarray([60, 50, 90], dtype)
        lam = MULTINOMIAL.natural(probabilities=np.float32([0.3, 0.25, 0.45]), total=200)
        want = stats.multinomial(200, [0.3, 0.25, 0.45]).logpmf([60, 50, 90])
        np.testing.assert_allclose(MULTINOMIAL.log_prob(lam, counts), want, rtol=1e-3)
