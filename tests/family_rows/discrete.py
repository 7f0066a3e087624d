"""The discrete families."""

import itertools

import numpy as np
from scipy import stats

from blr_optax.families._discrete.bernoulli import (
    Bernoulli,
    BernoulliNatural,
    Rademacher,
    RademacherNatural,
)
from blr_optax.families._discrete.categorical import (
    Categorical,
    CategoricalNatural,
)
from blr_optax.families._discrete.counts import (
    Binomial,
    BinomialNatural,
    Geometric,
    GeometricNatural,
    NegativeBinomial,
    NegativeBinomialNatural,
    Poisson,
    PoissonNatural,
)
from blr_optax.families._discrete.multinomial import Multinomial, MultinomialNatural
from family_rows._row import Row


def logistic(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def values(*x):
    """A rule that sums over these values."""
    points = np.array(x)
    return lambda s: (points, np.ones(len(points)))


def counts(size):
    return values(*np.arange(float(size)))


COUNTS = [x for x in itertools.product(range(6), repeat=3) if sum(x) == 5]
LOGITS = tuple({"logits": np.array(x)} for x in ([0.7, -0.4, 0.0], [-1.5, 0.3, 0.0], [2.0, 1.0, 0]))
NOT_FINITE = (np.nan, np.inf, -np.inf)
BAD_CHOICE = (
    ("logit", {"logit": np.inf}),
    ("probability", {"probability": 1.0}),
    ("probability", {"probability": np.array([0.5, -0.1])}),
    ("logit or probability", {}),
    ("logit or probability", {"logit": 0.0, "probability": 0.5}),
)
BAD_CHOICES = (
    ("logits", {"logits": np.array([0.0, np.nan])}),
    ("logits", {"logits": 1.0}),
    ("probabilities", {"probabilities": np.array([1.0])}),
    ("probabilities", {"probabilities": np.array([0.5, 0.6])}),
    ("probabilities", {"probabilities": np.array([1.5, -0.5])}),
    ("logits or probabilities", {}),
)
BAD_WAIT = tuple(("probability", {"probability": p}) for p in (0.0, 1.0, np.nan))


def with_total(bad, total=3):
    """The same bad parameters with a good total, and bad totals."""
    good = {"logit": 0.0} if bad is BAD_CHOICE else {"logits": np.zeros(2)}
    totals = tuple(("total", {**good, "total": n}) for n in (-1, 2.5, np.nan))
    return (*((name, {**s, "total": total}) for name, s in bad), *totals)


ROWS = {
    "bernoulli": Row(
        Bernoulli(),
        "binary",
        ({"logit": 0.7}, {"logit": -2.0}, {"logit": 0.1}),
        lambda s, x: stats.bernoulli(logistic(s["logit"])).logpmf(x),
        values(0.0, 1.0),
        BAD_CHOICE,
        tuple(BernoulliNatural(x) for x in NOT_FINITE),
    ),
    "rademacher": Row(
        Rademacher(),
        "binary",
        ({"logit": 0.7}, {"logit": -2.0}, {"logit": 0.1}),
        lambda s, x: stats.bernoulli(logistic(s["logit"])).logpmf((np.asarray(x) + 1) / 2),
        values(-1.0, 1.0),
        BAD_CHOICE,
        tuple(RademacherNatural(x) for x in NOT_FINITE),
    ),
    "categorical": Row(
        Categorical(),
        "categories",
        LOGITS,
        lambda s, x: np.log(softmax(s["logits"]))[np.asarray(x)],
        values(0, 1, 2),
        BAD_CHOICES,
        tuple(CategoricalNatural(np.array([0.5, x])) for x in NOT_FINITE),
        moment=lambda labels: np.eye(3)[np.asarray(labels)],
    ),
    "multinomial": Row(
        Multinomial(),
        "categories",
        tuple({**s, "total": 5.0} for s in LOGITS),
        lambda s, x: stats.multinomial(int(s["total"]), softmax(s["logits"])).logpmf(x),
        values(*np.array(COUNTS, float)),
        with_total(BAD_CHOICES),
        tuple(MultinomialNatural(np.array([0.5, x]), np.array(5.0)) for x in NOT_FINITE),
    ),
    "binomial": Row(
        Binomial(),
        "counts",
        tuple({"logit": x, "total": 9.0} for x in (0.7, -2.0, 0.1)),
        lambda s, x: stats.binom(int(s["total"]), logistic(s["logit"])).logpmf(x),
        counts(10),
        with_total(BAD_CHOICE),
        tuple(BinomialNatural(x, 9.0) for x in NOT_FINITE),
    ),
    "poisson": Row(
        Poisson(),
        "counts",
        ({"rate": 0.6}, {"rate": 7.0}, {"rate": 2.5}),
        lambda s, x: stats.poisson(s["rate"]).logpmf(x),
        counts(80),
        tuple(("rate", {"rate": x}) for x in (0.0, -1.0, np.nan, np.inf)),
        tuple(PoissonNatural(x) for x in NOT_FINITE),
    ),
    "geometric": Row(
        Geometric(),
        "counts",
        ({"probability": 0.3}, {"probability": 0.8}, {"probability": 0.15}),
        lambda s, x: stats.geom(s["probability"], loc=-1).logpmf(x),
        counts(400),
        BAD_WAIT,
        tuple(GeometricNatural(x) for x in (0.0, 0.5, *NOT_FINITE)),
    ),
    "negative_binomial": Row(
        NegativeBinomial(),
        "counts",
        tuple({"probability": p, "total": 2.7} for p in (0.3, 0.8, 0.15)),
        lambda s, x: stats.nbinom(s["total"], s["probability"]).logpmf(x),
        counts(500),
        (
            *((name, {**s, "total": 2.7}) for name, s in BAD_WAIT),
            *(("total", {"probability": 0.5, "total": r}) for r in (0.0, -1.0, np.inf)),
        ),
        tuple(NegativeBinomialNatural(x, 2.7) for x in (0.0, 0.5, *NOT_FINITE)),
    ),
}
