"""Families counted from a point near the data: float32 far from the origin is float64 there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools import close, near

import blr_optax as blr
from blr_optax import Distribution, estimators, families
from blr_optax.families import Centered, MeanField, MeanPrecision, MeanVariance

OFFSETS = (1e3, 3e3, 1e4, 1e5)
N = 1000
Z = np.random.default_rng(0).normal(size=N)
SPD = np.array([[2.0, 0.5], [0.5, 1.0]])


def exact(y, m, kappa=1.0, a=1.0, b=1.0):
    """The conjugate posterior of normal data, in float64 and from centred sums."""
    mean = y.mean()
    rate = b + 0.5 * np.sum((y - mean) ** 2) + 0.5 * kappa * N * (mean - m) ** 2 / (kappa + N)
    return {
        "mean": (kappa * m + N * mean) / (kappa + N),
        "kappa": kappa + N,
        "concentration": a + 0.5 * N,
        "rate": rate,
    }


def energy(mu, y):
    """-sum log N(y | x, 1 / tau), in expectation."""
    inner = mu.linear * y
    return jnp.sum(0.5 * (y * y * mu.precision + mu.quadratic - mu.log) - inner)


def energy_of_variance(mu, y):
    return jnp.sum(0.5 * (y * y * mu.reciprocal + mu.quadratic + mu.log) - y * mu.linear)


def energy_of_matrix(mu, y):
    return jnp.sum(0.5 * (y * y * mu.matrix[0, 0] + mu.quadratic - mu.log_det) - y * mu.linear[0])


CASES = {
    "normal_gamma": (energy, {"concentration": 1.0, "rate": 1.0}, lambda s: s["rate"]),
    "normal_inverse_gamma": (
        energy_of_variance,
        {"concentration": 1.0, "scale": 1.0},
        lambda s: s["scale"],
    ),
    # A Wishart density of a number is gamma(nu / 2, 1 / (2 W)).
    "normal_wishart": (
        energy_of_matrix,
        {"scale": np.array([[0.5]]), "degrees": 2.0},
        lambda s: 0.5 / s["scale"][0, 0],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_conjugate_posteriors_far_from_the_origin(name):
    """In float32, where the family itself is lost from an offset of 1e3 on."""
    loss, standard, rate_of = CASES[name]
    wide = name == "normal_wishart"
    for offset in OFFSETS if name == "normal_gamma" else (1e4,):
        family = Centered(name, at=offset)
        y = offset + Z
        mean = [offset] if wide else offset
        prior = Distribution(family, family.natural(mean=mean, kappa=1.0, **standard))
        rule = estimators.natural_gradient(family, loss, estimators.closed_form())

        @jax.jit
        def learn(prior, y, rule=rule):
            _, gradient = rule(jax.random.key(0), prior.natural, y)
            new = blr.natural_step(prior.family, prior.natural, gradient, 1.0, prior=prior)
            q = Distribution(prior.family, new)
            return q.standard(), q.proper, new

        found, inside, new = learn(prior, np.asarray(y - offset, np.float32))
        truth = exact(y, offset)
        assert new.linear.dtype == np.float32 and inside
        close(rate_of(found), truth["rate"], rtol=2e-6)
        close(np.ravel(found["mean"]), truth["mean"], rtol=1.2e-7)
        close(np.ravel(found["mean"]) - offset, truth["mean"] - offset, atol=offset * 1e-7 + 1e-7)
        close(found["kappa"], truth["kappa"], rtol=1e-6)


def test_blr_update_far_from_the_origin_moves_the_parameters():
    offset = 1e4
    family, y = Centered("normal_gamma", at=offset), offset + Z

    @jax.jit
    def learn(shifted):
        natural = family.natural(mean=offset, kappa=1.0, concentration=1.0, rate=1.0)
        prior = Distribution(family, natural)
        tx = blr.blr_update(family, energy, 1.0, prior=prior, estimator=estimators.closed_form())
        params = prior.mean
        updates, state = tx.update(None, tx.init(params), params, batch=(shifted,))
        q = blr.posterior(state, params)
        moved = jax.tree.map(jnp.add, params, updates)
        return q.mean, moved, state.retracted, state.skipped, q.standard()

    mean, moved, retracted, skipped, standard = learn(np.asarray(y - offset, np.float32))
    truth = exact(y, offset)
    assert retracted == 0 and skipped == 0
    close(standard["rate"], truth["rate"], rtol=2e-6)
    close(mean.mean, truth["mean"], rtol=1e-7)
    close(moved.mean, truth["mean"], rtol=1.2e-7)
    close(mean.precision, truth["concentration"] / truth["rate"], rtol=2e-6)


@pytest.mark.parametrize(
    "name, standard, theta, at",
    [
        ("normal", {"mean": 3.0, "variance": 2.0}, 2.5, 2.0),
        ("gaussian", {"mean": [1.0, 3.0], "covariance": SPD}, np.array([0.5, 2.0]), (1.0, -2.0)),
        ("gaussian_fixed", {"mean": [1.0, 3.0], "precision": SPD}, np.array([0.5, 2.0]), 1.5),
        (
            "normal_gamma",
            {"mean": 3.0, "kappa": 2.0, "concentration": 3.0, "rate": 4.0},
            MeanPrecision(2.5, 0.7),
            2.0,
        ),
        (
            "normal_inverse_gamma",
            {"mean": 3.0, "kappa": 2.0, "concentration": 3.0, "scale": 4.0},
            MeanVariance(2.5, 0.7),
            2.0,
        ),
        (
            "normal_wishart",
            {"mean": [1.0, 3.0], "kappa": 2.0, "scale": SPD, "degrees": 6.0},
            MeanPrecision(np.array([0.5, 2.0]), SPD),
            (1.0, -2.0),
        ),
    ],
)
def test_a_centred_family_is_the_same_set_of_densities(x64, name, standard, theta, at):
    """All that is said of theta agrees; statistics are those of theta - at."""
    plain, family = families.get(name), Centered(name, at)
    assert families.get(family) is family and family == Centered(plain, at) != plain
    second = {**standard, "mean": np.asarray(standard["mean"]) + 0.3}

    def said(family, statistics_at):
        first, other = family.natural(**standard), family.natural(**second)
        key = jax.random.key(0)
        statistics = family.sufficient_statistics(statistics_at, first)
        return (
            family.log_prob(first, theta),
            family.mean(first),
            family.variance(first),
            *((family.entropy(first), family.kl(first, other)) if name == "normal" else ()),
            family.sample(key, first, (3,)),
            family.standard(first),
            family.in_domain(first),
        ), statistics

    def away(theta):
        shift = np.asarray(at)
        return theta._replace(mean=theta.mean - shift) if plain.joint else theta - shift

    (expected, statistics), (found, own) = jax.jit(
        lambda: (said(plain, away(theta)), said(family, theta))
    )()
    near(found, expected, rtol=1e-12, atol=1e-12)
    near(own, statistics, rtol=1e-12)
    lam = family.natural(**standard)
    # As an exponential family in its own statistics.
    direct = families.ExponentialFamily.log_prob(plain, lam, away(theta))
    close(direct, family.log_prob(lam, theta), rtol=1e-10)
    near(family.natural_from_expectation(family.expectation(lam)), lam, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [estimators.delta(), estimators.monte_carlo(4), estimators.pathwise(4)],
    ids=["delta", "monte_carlo", "pathwise"],
)
def test_estimators_see_theta_itself(x64, rule):
    """On a loss of theta the step is that of the family itself."""
    params = {"a": jnp.array([3.0, 4.0])}

    def loss(theta):
        return jnp.sum(jnp.cosh(0.3 * theta["a"] - 1.0))

    def learn(family):
        tx = blr.blr_update(MeanField(family), loss, 0.3, estimator=rule, key=1)
        state = tx.init(params)
        updates, state = tx.update(None, state, params)
        q = blr.posterior(state, params)
        return updates, q.mean, q.variance

    expected, found = jax.jit(lambda: (learn("normal"), learn(Centered("normal", at=2.5))))()
    near(found, expected, rtol=1e-9)


def test_raveled_and_products_of_centred_families(x64):
    params = {"w": jnp.array([3.0, 4.0]), "b": jnp.array(5.0)}
    tx = blr.blr_update(Centered("gaussian", at=4.0), lambda p: jnp.sum(p["w"] ** 2), 0.1)
    near(tx.init(params).natural.linear, [1.0, -1.0, 0.0])
    product = families.Product({"x": Centered("normal", at=4.0), "tau": "gamma"})
    gamma = {"concentration": 2.0, "rate": 1.0}
    lam = product.natural(x={"mean": 5.0, "variance": 1.0}, tau=gamma)
    close(lam.parts["x"].linear, 1.0)
    close(product.mean(lam)["x"], 5.0)


def test_a_prior_that_rounding_would_lose_names_the_option():
    """Unit deviations at 1e3 leave the rate no three digits, and at 1e4 none."""
    plain = families.get("normal_gamma")
    standard = {"kappa": 1.0, "concentration": 1.0, "rate": 1.0}
    plain.natural(mean=100.0, **standard)
    for mean in (1e3, 1e4):
        with pytest.raises(ValueError, match=r"rate=1\. .*lost.*families\.Centered\(family, at="):
            plain.natural(mean=mean, **standard)
    with pytest.raises(ValueError, match=r"families\.Centered"):
        families.get("normal_wishart").natural(
            mean=[1e4, 0.0], kappa=1.0, scale=np.eye(2), degrees=4.0
        )


def test_different_points_are_refused():
    here, there = (Centered("normal_gamma", at=x) for x in (0.5, 1.5))
    standard = {"mean": 1.0, "kappa": 1.0, "concentration": 1.0, "rate": 1.0}
    p, q = (Distribution(f, f.natural(**standard)) for f in (here, there))
    with pytest.raises(ValueError, match="two members of one family"):
        p * q
    for family, prior, words in (
        ("normal_gamma", p, "counted from 0.5, the rule's from the origin"),
        (here, q, "counted from 1.5, the rule's from 0.5"),
    ):
        tx = blr.blr_update(family, energy, 1.0, prior=prior, estimator=estimators.closed_form())
        with pytest.raises(ValueError, match=words):
            tx.init(prior.mean)


def test_wrong_centres_are_refused():
    with pytest.raises(ValueError, match="gamma has no standard parameter `mean`"):
        Centered("gamma", at=1.0)
    for at in (np.nan, [[1.0]], np.inf):
        with pytest.raises(ValueError, match=r"at=.* must be a finite number"):
            Centered("normal", at=at)
    with pytest.raises(ValueError, match="known outside jit"):
        jax.jit(lambda x: Centered("normal", at=x).natural(mean=1.0, variance=1.0))(1.0)
    with pytest.raises(ValueError, match=r"normal\.natural: mean must be"):
        Centered("normal", at=1.0).natural(mean="two", variance=1.0)
    with pytest.raises(ValueError, match=r"normal\.natural: mean is missing"):
        Centered("normal", at=1.0).natural(variance=1.0)
