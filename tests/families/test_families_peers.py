"""Families against the libraries that have them too: numpyro and efax, one row each.

Densities, moments and entropies of single members are checked against scipy elsewhere; here are
batches, divergences, and the maps between lambda and mu. Everything is in float64.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as npd
import pytest
from family_tools import program

from blr_optax import families

MOMENTS = ("mean", "variance")
ALL = (*MOMENTS, "entropy", "kl")
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A family that a peer has too.

    Attributes:
        p, q: standard parameters of two batches of members (which share the known fields).
        build: the peer's distribution from them.
        has: what the peer has besides log_prob.
        theta: the peer's points as ours.
        rtol: larger where the peer itself is less accurate.
    """

    p: dict
    q: dict
    build: Callable[[dict], Any]
    has: tuple[str, ...] = ALL
    theta: Callable[[Any], Any] = lambda x: x
    rtol: float = 1e-11


def batch(*rows):
    return np.array(rows, float)


def matrices(seed, count=3, size=2):
    """Random symmetric positive definite matrices."""
    a = np.random.default_rng(seed).normal(size=(count, size, size))
    return a @ a.swapaxes(-1, -2) + 0.5 * np.eye(size)


def tril(x):
    return jnp.linalg.cholesky(jnp.asarray(x))


MEANS = (batch([0.3, -1.0], [0.0, 2.0], [4.0, 1.0]), batch([1.0, 0.5], [0.0, 0.0], [-3.0, 1.5]))
REALS = (batch(-2.0, 0.3, 5.0), batch(0.4, 0.1, -1.0))
RATES = (batch(0.2, 1.5, 30.0), batch(0.7, 1.6, 11.0))
SHAPES = (batch(0.4, 3.0, 60.0), batch(1.7, 2.5, 45.0))
CHANCES = (batch(0.1, 0.5, 0.93), batch(0.3, 0.45, 0.8))
LOGITS = (batch([1.0, -1.0, 0.3], [0.0, 5.0, 2.0]), batch([0.0, 0.5, 0.3], [1.0, -2.0, 0.0]))
PARTS = (batch([0.4, 3.0, 1.0], [20.0, 7.0, 50.0]), batch([2.0, 1.0, 0.6], [25.0, 6.0, 40.0]))
COUNTS = batch(4, 20, 50)
SHARED = matrices(9)


def pairs(**columns):
    """Two sets of standard parameters from pairs of batches."""
    return tuple({name: pair[i] for name, pair in columns.items()} for i in (0, 1))


def multivariate(s):
    return npd.MultivariateNormal(s["mean"], precision_matrix=s["precision"])


def low_rank(s):
    u, w = s["diagonal"], s["factor"]
    return multivariate({"mean": s["mean"], "precision": u[..., None] * np.eye(2) + w @ w.mT})


def mixture(s):
    parts = npd.MultivariateNormal(s["mean"], s["covariance"])
    return npd.MixtureSameFamily(npd.CategoricalProbs(s["weights"]), parts)


NUMPYRO = {
    "normal": Peer(
        *pairs(mean=REALS, variance=RATES), lambda s: npd.Normal(s["mean"], s["variance"] ** 0.5)
    ),
    "gaussian": Peer(*pairs(mean=MEANS, precision=(matrices(1), matrices(2))), multivariate),
    "gaussian_diagonal": Peer(
        *pairs(mean=MEANS, precision=(SHAPES[0][:, None], RATES[1][:, None])),
        lambda s: npd.Normal(s["mean"], s["precision"] ** -0.5).to_event(2),
    ),
    "gaussian_fixed": Peer(*pairs(mean=MEANS, precision=(SHARED, SHARED)), multivariate),
    "gaussian_low_rank": Peer(
        *pairs(
            mean=MEANS,
            diagonal=(np.exp(MEANS[1]), np.exp(MEANS[0])),
            factor=(matrices(3)[..., :1], matrices(4)[..., :1]),
        ),
        low_rank,
    ),
    "matrix_gaussian": Peer(
        *pairs(
            mean=(matrices(1, 3, 3)[:, :2], matrices(2, 3, 3)[:, :2]),
            row_precision=(matrices(5), matrices(6)),
            column_precision=(matrices(7, 3, 3), matrices(8, 3, 3)),
        ),
        lambda s: npd.MatrixNormal(
            s["mean"],
            tril(np.linalg.inv(s["row_precision"])),
            tril(np.linalg.inv(s["column_precision"])),
        ),
        ("mean",),
    ),
    "mixture": Peer(
        *pairs(
            weights=(batch(0.2, 0.5, 0.3), batch(0.6, 0.3, 0.1)),
            mean=MEANS,
            covariance=(matrices(1), matrices(2)),
        ),
        mixture,
        MOMENTS,
    ),
    "student_t": Peer(
        *pairs(mean=MEANS, degrees=(batch(2.5, 4.0, 30.0),) * 2, scale=(matrices(1), matrices(2))),
        lambda s: npd.MultivariateStudentT(s["degrees"], s["mean"], tril(s["scale"])),
        MOMENTS,
    ),
    "laplace": Peer(
        *pairs(location=(REALS[0], REALS[0]), scale=RATES),
        lambda s: npd.Laplace(s["location"], s["scale"]),
        (*MOMENTS, "entropy"),
    ),
    "log_normal": Peer(
        *pairs(location=REALS, variance=CHANCES),
        lambda s: npd.LogNormal(s["location"], s["variance"] ** 0.5),
        (*MOMENTS, "entropy"),
    ),
    "weibull": Peer(
        *pairs(scale=RATES, shape=(SHAPES[1], SHAPES[1])),
        lambda s: npd.Weibull(s["scale"], s["shape"]),
        (*MOMENTS, "entropy"),
    ),
    "exponential": Peer(
        *pairs(rate=RATES), lambda s: npd.Exponential(s["rate"]), (*MOMENTS, "entropy")
    ),
    "gamma": Peer(
        *pairs(concentration=SHAPES, rate=RATES), lambda s: npd.Gamma(s["concentration"], s["rate"])
    ),
    "inverse_gamma": Peer(
        *pairs(concentration=SHAPES, scale=RATES),
        lambda s: npd.InverseGamma(s["concentration"], s["scale"]),
        (*MOMENTS, "entropy"),
    ),
    "beta": Peer(
        *pairs(alpha=SHAPES, beta=RATES),
        lambda s: npd.Beta(s["alpha"], s["beta"]),
        rtol=1e-8,  # jax.scipy.special.betaln is off by 3e-9 at (60, 30)
    ),
    "dirichlet": Peer(*pairs(concentration=PARTS), lambda s: npd.Dirichlet(s["concentration"])),
    "wishart": Peer(
        *pairs(scale=(matrices(1), matrices(2)), degrees=(batch(2.5, 4.0, 30.0), COUNTS)),
        lambda s: npd.Wishart(s["degrees"], s["scale"]),
        (*MOMENTS, "entropy"),
    ),
    # Off the diagonal its variance is not the one of scipy and of samples.
    "inverse_wishart": Peer(
        *pairs(scale=(matrices(1), matrices(2)), degrees=(batch(6.5, 7.0, 30.0), 3 + COUNTS)),
        lambda s: npd.InverseWishart(s["degrees"], s["scale"]),
        ("mean",),
    ),
    "von_mises_fisher": Peer(
        *pairs(direction=(MEANS[0], 1.0 - MEANS[0]), concentration=RATES),
        lambda s: npd.VonMises(
            np.arctan2(s["direction"][..., 1], s["direction"][..., 0]), s["concentration"]
        ),
        (),
        lambda angle: jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1),
    ),
    "bernoulli": Peer(
        *pairs(logit=REALS), lambda s: npd.BernoulliLogits(s["logit"]), (*MOMENTS, "entropy")
    ),
    "binomial": Peer(
        *pairs(logit=REALS, total=(COUNTS, COUNTS)),
        lambda s: npd.BinomialLogits(s["logit"], s["total"].astype(int)),
        MOMENTS,
    ),
    "categorical": Peer(  # its moments are NaN: those of labels
        *pairs(logits=LOGITS),
        lambda s: npd.CategoricalProbs(jax.nn.softmax(s["logits"])),
        ("entropy", "kl"),
    ),
    "multinomial": Peer(
        *pairs(logits=LOGITS, total=(COUNTS[:2], COUNTS[:2])),
        lambda s: npd.MultinomialLogits(s["logits"], s["total"].astype(int)),
        MOMENTS,
    ),
    "poisson": Peer(*pairs(rate=RATES), lambda s: npd.Poisson(s["rate"]), MOMENTS),
    "geometric": Peer(
        *pairs(probability=CHANCES),
        lambda s: npd.GeometricProbs(s["probability"]),
        (*MOMENTS, "entropy"),
    ),
    "negative_binomial": Peer(
        *pairs(probability=CHANCES, total=(SHAPES[1], SHAPES[1])),
        lambda s: npd.NegativeBinomialProbs(s["total"], 1.0 - s["probability"]),
        MOMENTS,
        rtol=1e-6,  # betaln again: off by 4e-8 at p = 0.1, r = 1.7, x = 20
    ),
}
# Joint densities are no distributions there.
NOT_IN_NUMPYRO = {"normal_gamma", "normal_inverse_gamma", "normal_wishart"}
NOT_IN_NUMPYRO |= {"inverse_gaussian", "rademacher", "skew_gaussian"}


def agree(what, ours, theirs, rtol):
    assert np.shape(ours) == np.shape(theirs), what
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol, err_msg=what)


def test_every_family_has_a_row_or_no_peer():
    # Other tests of the same process register families of their own.
    ours = {name for name in families.names() if not name.startswith("test_")}
    assert NUMPYRO.keys() | NOT_IN_NUMPYRO == ours


@pytest.mark.parametrize("name", NUMPYRO)
def test_numpyro(x64, name):
    family, row = families.get(name), NUMPYRO[name]
    lam, other = (program(family.natural)(**s) for s in (row.p, row.q))
    peer, peer_other = row.build(row.p), row.build(row.q)
    calls = {
        "log_prob": (lambda x: family.log_prob(lam, row.theta(x)), lambda x: peer.log_prob(x)),
        "mean": (lambda _: family.mean(lam), lambda _: peer.mean),
        "variance": (lambda _: family.variance(lam), lambda _: peer.variance),
        "entropy": (lambda _: family.entropy(lam), lambda _: peer.entropy()),
        "kl": (lambda _: family.kl(lam, other), lambda _: npd.kl_divergence(peer, peer_other)),
    }

    @jax.jit
    def say():
        x = peer.sample(KEY, (5,))
        return {what: [call(x) for call in calls[what]] for what in ("log_prob", *row.has)}

    for what, (ours, theirs) in say().items():
        agree(what, ours, theirs, row.rtol)


# name -> efax's class, its arguments from lambda, and mu from its expectation parameters.
EFAX = {
    "normal": ("Normal", lambda lam: lam, lambda e: (e.mean, e.second_moment)),
    "gaussian": ("MultivariateNormal", lambda lam: lam, lambda e: (e.mean, e.second_moment)),
    "log_normal": ("LogNormal", lambda lam: lam, lambda e: (e.mean, e.second_moment)),
    "exponential": ("Exponential", lambda lam: lam, lambda e: (e.mean,)),
    "gamma": ("Gamma", lambda lam: (lam.linear, lam.log), lambda e: (e.mean_log, e.mean)),
    "inverse_gamma": (  # in the logarithm of 1 / x
        "InverseGamma",
        lambda lam: (lam.reciprocal, -lam.log - 2.0),
        lambda e: (-e.base_mean_log, e.base_mean),
    ),
    "beta": (
        "Beta",
        lambda lam: (jnp.stack(lam, -1),),
        lambda e: tuple(jnp.moveaxis(e.mean_log_probability, -1, 0)),
    ),
    "dirichlet": ("Dirichlet", lambda lam: lam, lambda e: (e.mean_log_probability,)),
    "weibull": ("Weibull", lambda lam: (lam.shape, lam.power), lambda e: (e.chi, e.concentration)),
    "inverse_gaussian": ("InverseGaussian", lambda lam: lam, lambda e: (e.mean, e.mean_reciprocal)),
    "wishart": (
        "Wishart",
        lambda lam: (lam.matrix, lam.log_det),
        lambda e: (e.expected_log_det, e.mean),
    ),
    "von_mises_fisher": ("VonMisesFisher", lambda lam: lam, lambda e: (e.mean,)),
    "bernoulli": ("Bernoulli", lambda lam: lam, lambda e: (e.probability,)),
    "categorical": ("Categorical", lambda lam: lam, lambda e: (e.probability,)),
    "poisson": ("Poisson", lambda lam: lam, lambda e: (e.mean,)),
    "geometric": ("Geometric", lambda lam: lam, lambda e: (e.mean,)),
    "negative_binomial": ("NegativeBinomial", lambda lam: lam, lambda e: (e.mean, e.failures)),
}
WITHOUT_ENTROPY = {"inverse_gaussian", "poisson", "negative_binomial"}


@pytest.mark.parametrize("name", EFAX)
def test_efax(x64, name):
    if sys.version_info < (3, 12):
        pytest.skip("efax needs Python 3.12; test_workflows.py sees to it that one job has it")
    import efax

    family, (kind, arguments, mu_of) = families.get(name), EFAX[name]
    row = NUMPYRO.get(name)
    both = (row.p, row.q) if row else pairs(mean=RATES, shape=SHAPES)
    lam, other = (program(family.natural)(**s) for s in both)
    peer, peer_other = (getattr(efax, kind + "NP")(*arguments(x)) for x in (lam, other))
    mu = family.Expectation(*mu_of(peer.to_exp()))
    for ours, theirs in zip(program(family.expectation)(lam), mu, strict=True):
        agree("expectation", ours, theirs, 1e-11)
    for back, given in zip(program(family.natural_from_expectation)(mu), lam, strict=True):
        agree("natural", back, given, 1e-9)  # mu of one at lambda of 60 determines no more
    agree("kl", program(family.kl)(lam, other), peer.kl_divergence(peer_other), 1e-11)
    if name not in WITHOUT_ENTROPY:
        agree("entropy", program(family.entropy)(lam), peer.entropy(), 1e-11)
