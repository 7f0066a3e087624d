"""The predictive mixture and ensembles, against scipy's mixtures of the same draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats
from test_predict_programs_long import Q, X, head, outputs

import blr_optax as blr

SAMPLES = 5
Z = outputs(SAMPLES)  # [samples, examples, 4]
TRUTH = stats.norm(Z[..., 0], np.exp(0.5 * Z[..., 1]))  # of `head`: mean, log of the variance
TARGETS = np.linspace(-2.0, 2.0, 7)
P = np.array([0.025, 0.5, 0.9])


@functools.cache
def mixture():
    return blr.predict_distribution(0, Q, head, X, samples=SAMPLES, chunk=2)


def quantile_by_scipy(p):
    def excess(y, i):
        return stats.norm.cdf(y, Z[:, i, 0], np.exp(0.5 * Z[:, i, 1])).mean() - p

    return [optimize.brentq(excess, -50, 50, args=(i,)) for i in range(7)]


def test_moments_density_and_quantiles_are_those_of_the_mixture():
    m = mixture()
    found = jax.jit(lambda m: (m.log_prob(TARGETS), m.cdf(TARGETS), m.icdf(P), m.interval(0.8)))(m)
    log_prob, cdf, icdf, (low, high) = jax.device_get(found)
    want = special.logsumexp(TRUTH.logpdf(TARGETS), axis=0) - np.log(SAMPLES)
    np.testing.assert_allclose(log_prob, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cdf, TRUTH.cdf(TARGETS).mean(0), rtol=1e-4, atol=1e-6)
    want = np.array([quantile_by_scipy(p) for p in P])
    np.testing.assert_allclose(icdf, want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(low, quantile_by_scipy(0.1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(high, quantile_by_scipy(0.9), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(m.mean, Z[..., 0].mean(0), rtol=1e-4, atol=1e-6)
    variance = Z[..., 0].var(0, ddof=1) + np.exp(Z[..., 1]).mean(0)
    np.testing.assert_allclose(m.variance, variance, rtol=1e-4)


def test_it_agrees_with_the_two_moments():
    by_moments = blr.predict_regression(0, Q, head, X, samples=SAMPLES)
    for name in ("mean", "epistemic", "aleatoric", "variance"):
        np.testing.assert_allclose(
            getattr(mixture(), name), getattr(by_moments, name), rtol=2e-4, atol=1e-6
        )


def test_draws_have_the_quantiles_and_are_of_one_network_each():
    draws = np.asarray(mixture().sample(1, 4000))
    assert draws.shape == (4000, 7)
    below = np.mean(draws <= np.asarray(mixture().icdf(0.9)), axis=0)
    np.testing.assert_allclose(below, 0.9, atol=4 * np.sqrt(0.09 / 4000))
    still = blr.predict_distribution(
        0, Q, lambda w, x: (x @ w)[:, 0], X, noise_variance=1e-8, samples=SAMPLES
    ).sample(2, 50)
    near = np.abs(np.asarray(still)[:, None] - Z[..., 0]).max(-1).min(-1)
    assert near.max() < 1e-3  # every draw is one of the five functions, at all inputs


def test_any_likelihood_a_scan_and_a_call_inside_jit():
    """Gamma observations of shape 3 and rate exp(z)."""
    apply = lambda w, x: blr.distribution(  # noqa: E731
        "gamma", concentration=3.0, rate=jnp.exp((x @ w)[:, 0])
    )
    run = lambda x: blr.predict_distribution(0, Q, apply, x, samples=SAMPLES, chunk=2)  # noqa: E731
    truth = stats.gamma(3.0, scale=np.exp(-Z[..., 0]))
    targets = np.linspace(0.1, 5.0, 7)
    want = np.log(truth.pdf(targets).mean(0))
    for m in (run(X), jax.jit(run)(X)):
        np.testing.assert_allclose(m.log_prob(targets), want, rtol=1e-3, atol=1e-4)
        cdf = truth.cdf(np.asarray(m.icdf(0.3))).mean(0)
        np.testing.assert_allclose(cdf, np.full(7, 0.3), rtol=1e-3)


def test_learnt_and_given_noise():
    mean = lambda w, x: (x @ w)[:, 0]  # noqa: E731
    given = blr.predict_distribution(0, Q, mean, X, noise_variance=0.25, samples=SAMPLES)
    want = np.log(stats.norm(Z[..., 0], 0.5).pdf(TARGETS).mean(0))
    np.testing.assert_allclose(given.log_prob(TARGETS), want, rtol=1e-4, atol=1e-5)
    learnt = blr.predict_distribution(
        0, Q, mean, X, noise_variance=lambda w, x: jnp.float32(0.25), samples=SAMPLES
    )
    np.testing.assert_allclose(learnt.log_prob(TARGETS), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("apply", "options", "message"),
    [
        (lambda w, x: x @ w, {}, r"nothing says how an observation differs.*noise_variance="),
        (head, {"noise_variance": 1.0}, r"apply returns the variance"),
        (
            lambda w, x: blr.distribution("normal", mean=x, variance=1.0),
            {"noise_variance": 1.0},
            r"returns a distribution, and noise_variance= gives another",
        ),
        (lambda w, x: x @ w, {"noise_variance": 0.0}, r"noise_variance must be positive"),
    ],
)
def test_what_has_no_clear_noise_is_refused(apply, options, message):
    with pytest.raises(ValueError, match=message):
        blr.predict_distribution(0, Q, apply, X, samples=2, **options)


# --- batches --------------------------------------------------------------------------------------


def counts(w, x):
    return blr.distribution("poisson", rate=jnp.exp((x @ w)[:, 0]))


BATCHED = {
    "a network that says its noise": (head, None, 3),
    "one noise": (lambda w, x: x @ w, 0.25, 2),
    "a noise per output": (lambda w, x: x @ w, np.arange(1.0, 5.0), 3),
    "a noise per example": (lambda w, x: x @ w, np.arange(1.0, 8.0)[:, None], 50),
    "learnt noise": (lambda w, x: x @ w, lambda w, x: jnp.exp(x[:, :1]), 4),
    "counts": (counts, None, 3),
}


@pytest.mark.parametrize("name", BATCHED)
def test_batches_give_the_components_of_the_whole(name):
    apply, noise, batch_size = BATCHED[name]
    run = functools.partial(
        blr.predict_distribution, 0, Q, apply, X, noise_variance=noise, samples=SAMPLES, chunk=2
    )
    whole, batched = run(), run(batch_size=batch_size)
    assert batched.components.family == whole.components.family
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), batched, whole)
    if name == "counts":
        want = stats.poisson(np.exp(Z[..., 0])).pmf(3).mean(0)
        np.testing.assert_allclose(np.exp(batched.log_prob(3.0)), want, rtol=1e-4)
    if name == "a noise per output":
        want = stats.norm(Z, np.sqrt(noise)).logpdf(0.5)
        want = special.logsumexp(want, axis=0) - np.log(SAMPLES)
        np.testing.assert_allclose(batched.log_prob(0.5), want, rtol=1e-4, atol=1e-5)


def test_batches_of_a_distribution_compile_once():
    calls = []

    def counted(w, x):
        calls.append(1)
        return (x @ w)[:, 0], jnp.ones(len(x))

    made = blr.predict_distribution(0, Q, counted, X, samples=3, batch_size=2)
    assert len(calls) == 1 and made.mean.shape == (7,)


@pytest.mark.parametrize(
    ("apply", "options", "message"),
    [
        (lambda w, x: (x @ w).sum(0), {"batch_size": 2}, r"leading axis of examples.*\(4,\)"),
        (lambda w, x: x @ w, {"batch_size": 0}, "batch_size=0"),
        (lambda w, x: x @ w, {"progress": True}, "give batch_size="),
        (
            lambda w, x: x @ w,
            {"noise_variance": np.ones(7)},
            r"noise_variance has the shape \(7,\), and the outputs of apply \(7, 4\)",
        ),
    ],
)
def test_batches_that_cannot_be_are_refused(apply, options, message):
    options = {"noise_variance": 1.0, "samples": SAMPLES, **options}
    with pytest.raises(ValueError, match=message):
        blr.predict_distribution(0, Q, apply, X, **options)


def test_a_noise_that_does_not_fit_is_refused_by_the_moments_too():
    with pytest.raises(ValueError, match=r"predict_regression: noise_variance has the shape \(7,"):
        blr.predict_regression(0, Q, lambda w, x: x @ w, X, samples=2, noise_variance=np.ones(7))


# --- ensembles ------------------------------------------------------------------------------------


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


WEIGHTS = np.random.default_rng(1).normal(size=(3, 3, 4)).astype(np.float32)
LINEAR = lambda w, x: x @ w["w"]  # noqa: E731


@pytest.mark.parametrize("kind", ["list", "stack", "tuple"])
def test_an_ensemble_of_networks_is_the_mean_of_their_probabilities(kind):
    members = [{"w": jnp.asarray(w)} for w in WEIGHTS]
    q = {"list": members, "tuple": tuple(members), "stack": blr.Ensemble({"w": WEIGHTS})}[kind]
    want = softmax(np.einsum("nf,mfk->mnk", X.astype(float), WEIGHTS))
    found = blr.predict(0, q, LINEAR, X)
    np.testing.assert_allclose(found.probabilities, want.mean(0), rtol=2e-5)
    entropy = -(want * np.log(want)).sum(-1).mean(0)
    np.testing.assert_allclose(found.aleatoric, entropy, rtol=2e-5)


def test_every_member_has_its_share_of_the_samples():
    """Posteriors so narrow that a draw is the mean; 4 samples by 3 members become 6."""
    members = [blr.distribution("normal", mean={"w": w}, precision=1e12) for w in WEIGHTS]
    draws = blr.ensemble(members).draws(4)
    assert draws == 6
    want = softmax(np.einsum("nf,mfk->mnk", X.astype(float), WEIGHTS)).mean(0)
    stack = blr.Ensemble(jax.tree.map(lambda *x: jnp.stack(x), *members))
    for q in (members, stack):
        found = blr.predict(0, q, LINEAR, X, samples=4).probabilities
        np.testing.assert_allclose(found, want, rtol=1e-4)
    regression = blr.predict_regression(0, stack, LINEAR, X, samples=4)
    means = np.einsum("nf,mfk->mnk", X.astype(float), WEIGHTS)
    np.testing.assert_allclose(regression.mean, means.mean(0), rtol=1e-4, atol=1e-5)


def test_posteriors_trained_by_vmap_are_a_stack():
    tx = blr.ivon(0.1, ess=10.0, hess_init=1e6)
    params = {"w": jnp.asarray(WEIGHTS)}
    stack = jax.vmap(blr.posterior)(jax.vmap(tx.init)(params), params)
    found = blr.predict(0, blr.Ensemble(stack), LINEAR, X, samples=3).probabilities
    want = softmax(np.einsum("nf,mfk->mnk", X.astype(float), WEIGHTS)).mean(0)
    np.testing.assert_allclose(found, want, rtol=0.05, atol=2e-3)


def test_members_that_do_not_fit_are_refused():
    normal = functools.partial(blr.distribution, "normal")
    for members, message in (
        ([], "no members"),
        ([normal(mean=0.0, variance=1.0), {"w": 1.0}], "2 structures"),
        ([{"w": jnp.zeros(2)}, {"w": jnp.zeros(3)}], "2 sets of shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            blr.predict(0, members, LINEAR, X)
    with pytest.raises(ValueError, match="same leading axis"):
        blr.predict(0, blr.Ensemble({"w": jnp.zeros((2, 1)), "b": jnp.zeros(3)}), LINEAR, X)
    improper = [normal(mean=0.0, variance=1.0) ** -1.0] * 2
    with pytest.raises(ValueError, match="outside the domain"):
        blr.predict(0, improper, LINEAR, X)
