"""What a family gets from its log-partition alone; domains and the registry."""

import collections
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_rows import spd
from family_rows.gaussian import FIXED, GAUSSIAN, INDEFINITE, MEAN, NORMAL, SHARED
from family_tools import direction, formula, program
from scipy.special import expit
from tools import USERS, close, near

from blr_optax import families
from blr_optax.families import Domain, ExponentialFamily, GaussianExpectation, GaussianNatural
from blr_optax.families._base import domain, registry


def solved(family, mu):
    """(lambda, converged) of mu, in numpy."""
    solve = program(family.natural_from_expectation, "with_status")
    return jax.tree.map(np.asarray, solve(mu, with_status=True))


@families.parameters
class TwoNatural(NamedTuple):
    shape: Any
    rate: Any


@families.parameters
class TwoExpectation(NamedTuple):
    shape: Any
    rate: Any


@families.parameters
class OneNatural(NamedTuple):
    log_rate: Any


@families.parameters
class OneExpectation(NamedTuple):
    log_rate: Any


@dataclasses.dataclass(frozen=True)
class PlainGamma(ExponentialFamily):
    """T = (log x, x), lambda = (a - 1, -b), and nothing but the log-partition."""

    Natural: ClassVar[type] = TwoNatural
    Expectation: ClassVar[type] = TwoExpectation
    domains: ClassVar[dict] = {"shape": domain.above(-1.0), "rate": domain.negative()}

    def log_partition(self, lam):
        a = lam.shape + 1.0
        return jax.scipy.special.gammaln(a) - a * jnp.log(-lam.rate)


@dataclasses.dataclass(frozen=True)
class PlainPoisson(ExponentialFamily):
    Natural: ClassVar[type] = OneNatural
    Expectation: ClassVar[type] = OneExpectation
    domains: ClassVar[dict] = {"log_rate": domain.real()}

    def log_partition(self, lam):
        return jnp.exp(lam.log_rate)


@dataclasses.dataclass(frozen=True)
class PlainGaussian(ExponentialFamily):
    Natural: ClassVar[type] = GaussianNatural
    Expectation: ClassVar[type] = GaussianExpectation
    domains: ClassVar[dict] = {"linear": domain.real(1), "quadratic": domain.negative_definite()}
    event_ndim: ClassVar[int] = 1

    def log_partition(self, lam):
        return formula(GAUSSIAN)(lam)


CONCENTRATIONS = np.array([1e-3, 1e-2, 0.3, 1.0, 7.0, 1e3, 1e6])


def test_solve_gamma_at_extreme_concentrations(x64):
    gamma = PlainGamma()
    for rate in (1e-3, 1.0, 1e4):
        lam = TwoNatural(CONCENTRATIONS - 1, np.full(CONCENTRATIONS.size, -rate))
        back, converged = solved(gamma, program(gamma.expectation)(lam))
        assert converged.tolist() == [True] * CONCENTRATIONS.size, (rate, converged)
        # What rounding mu costs grows like the concentration.
        error = np.abs(np.asarray(back.shape + 1) / CONCENTRATIONS - 1)
        assert np.all(error < 1e-10 + 2e-14 * CONCENTRATIONS), (rate, error)
        error = np.abs(np.asarray(back.rate) / -rate - 1)
        assert np.all(error < 1e-10 + 2e-14 * CONCENTRATIONS), (rate, error)


def test_solve_in_float32_reports_where_mu_carries_no_concentration(x64):
    gamma, a = PlainGamma(), np.array([1e-2, 3.0, 1e2, 1e6])
    lam = TwoNatural(np.asarray(a - 1, np.float32), np.full(a.size, -2.0, np.float32))
    # Whether the last one converges hangs on rounding, so on the version of XLA too; and the cheap
    # XLA of the tests rounds differently: there the solver did not end in a minute.
    both = jax.jit(
        lambda lam: gamma.natural_from_expectation(gamma.expectation(lam), with_status=True),
        compiler_options=USERS,
    )
    back, converged = jax.tree.map(np.asarray, both(lam))
    assert converged[:3].all()
    close(back.shape[:3] + 1, a[:3], rtol=1e-3)
    assert converged[3] == np.isfinite(back.shape[3])  # NaN, never a guess


def test_solve_poisson_over_its_whole_range(x64):
    mean = np.array([1e-12, 1e-3, 1.0, 30.0, 1e6, 1e12])
    lam, converged = solved(PlainPoisson(), OneExpectation(mean))
    assert bool(converged.all()), converged
    close(lam.log_rate, np.log(mean), rtol=1e-9)


def test_solve_gaussian_with_a_matrix_field(x64):
    plain = PlainGaussian()
    lam = program(GAUSSIAN.natural)(
        mean=np.array([[1.0, 2.0], [30.0, -4.0]]), covariance=np.stack([spd(0), 10 * spd(1)])
    )
    mu = program(plain.expectation)(lam)
    near(mu, program(GAUSSIAN.expectation)(lam))
    back, converged = solved(plain, mu)
    assert converged.tolist() == [True, True]
    near(back, lam, rtol=1e-8)


@pytest.mark.parametrize(
    ("family", "lam"),
    [
        (PlainGamma(), TwoNatural(np.array(1.5), np.array(-0.7))),
        (PlainPoisson(), OneNatural(np.array(0.4))),
        (PlainGaussian(), GaussianNatural(MEAN, -0.5 * spd(2))),
    ],
)
def test_derivative_of_the_solve_is_the_inverse_fisher(x64, family, lam):
    solve, v = family.natural_from_expectation, direction(family, lam, 3)

    @jax.jit
    def derivatives(lam, v):
        mu, dmu = family.expectation(lam), family.fisher_product(lam, v)
        pulled = jax.vjp(solve, mu)[1](v)[0]  # F^-1 is symmetric
        products = family.inner(pulled, dmu), family.inner(v, v)
        return jax.jvp(solve, (mu,), (dmu,)), products

    pushed, (one, other) = derivatives(lam, v)
    near(pushed, (lam, v), rtol=1e-7, atol=1e-8)
    close(one, other, rtol=1e-7)


@pytest.mark.parametrize(
    ("family", "mu"),
    [
        (PlainGamma(), TwoExpectation(0.1, 1.0)),  # E log x > log E x
        (PlainGamma(), TwoExpectation(0.0, -1.0)),
        (PlainGamma(), TwoExpectation(np.nan, 1.0)),
        (PlainPoisson(), OneExpectation(-1.0)),
        (PlainPoisson(), OneExpectation(np.nan)),
        (PlainPoisson(), OneExpectation(np.inf)),
        (PlainGaussian(), GaussianExpectation(MEAN, np.outer(MEAN, MEAN) + INDEFINITE)),
        (NORMAL, GaussianExpectation(2.0, 4.0)),
        (NORMAL, GaussianExpectation(2.0, 3.0)),
        (NORMAL, GaussianExpectation(np.nan, 1.0)),
        (NORMAL, GaussianExpectation(0.0, np.inf)),
        (NORMAL, GaussianExpectation(np.inf, np.inf)),
        (GAUSSIAN, GaussianExpectation(MEAN, np.outer(MEAN, MEAN) + INDEFINITE)),
        (GAUSSIAN, GaussianExpectation(MEAN, np.outer(MEAN, MEAN))),
        (GAUSSIAN, GaussianExpectation(MEAN, np.full((2, 2), np.nan))),
        (FIXED, families.FixedExpectation(MEAN * np.nan, SHARED)),
    ],
)
def test_unreachable_mu_is_reported_and_never_a_guess(x64, family, mu):
    mu = jax.tree.map(lambda x: np.asarray(x, np.float64), mu)
    lam, status = solved(family, mu)
    assert not bool(status)
    assert not bool(program(family.in_domain)(lam))


def test_one_bad_element_of_a_batch_leaves_the_others(x64):
    mu = TwoExpectation(np.array([0.1, -0.5]), np.array([1.0, 1.0]))
    lam, status = solved(PlainGamma(), mu)
    assert status.tolist() == [False, True]
    near(
        program(PlainGamma().expectation)(jax.tree.map(lambda x: x[1], lam)),
        jax.tree.map(lambda x: x[1], mu),
        rtol=1e-10,
    )


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (domain.real(), [-1e30, 0.0, 1e30], [np.nan, np.inf]),
        (domain.positive(), [1e-30, 1.0], [0.0, -1.0, np.nan, np.inf]),
        (domain.negative(), [-1e-30, -1.0], [0.0, 1.0, np.nan, -np.inf]),
        (domain.above(-1.0), [-0.999, 5.0], [-1.0, -2.0]),
        (
            domain.positive_definite(),
            [spd(0)],
            [INDEFINITE, -np.eye(2), np.zeros((2, 2)), np.eye(2) * np.nan],
        ),
        (domain.negative_definite(), [-spd(0)], [INDEFINITE, np.eye(2)]),
    ],
)
def test_domains(x64, domain, inside, outside):
    contains = program(domain.contains)

    def held(x):
        return bool(contains(np.asarray(x, float)))

    assert all(held(x) for x in inside)
    assert not any(held(x) for x in outside)
    x = np.asarray(inside[-1], float)
    d = 0.1 * np.asarray(outside[0] if np.all(np.isfinite(outside[0])) else inside[0], float)

    @jax.jit
    def retracted(like, x, d):
        along = lambda d: domain.retract(x, d)  # noqa: E731
        zero = jnp.zeros_like(d)
        return domain.inside(like), along(d), jax.jvp(along, (zero,), (d,))[1]

    for t in (-1e3, -1.0, 1.0, 1e3):
        start, moved, slope = retracted(np.asarray(inside[0], float), x, t * d)
        assert held(start) and held(moved)
        close(slope, t * d, atol=1e-12)


# --- known fields and batches through the defaults ------------------------------------------------


@families.register("test_binomial")
class KnownTotal(families.ExponentialFamily):
    """A binomial that overrides nothing: total is known, and the base measure is left out."""

    Natural = collections.namedtuple("KnownTotalNatural", ["logit", "total"])
    Expectation = collections.namedtuple("KnownTotalExpectation", ["logit", "total"])
    domains: ClassVar[dict] = {"logit": families.Domain()}
    known = ("total",)

    def log_partition(self, lam):
        return lam.total * jax.nn.softplus(lam.logit)


def test_known_fields_pass_through_the_defaults(x64):
    family = families.get("test_binomial")
    lam = family.Natural(np.array([0.3, -2.0]), np.array([7.0, 3.0]))
    p = expit(lam.logit)
    mu = program(family.expectation)(lam)
    np.testing.assert_allclose(mu.logit, lam.total * p, rtol=1e-12)
    np.testing.assert_array_equal(mu.total, lam.total)
    back, converged = solved(family, mu)
    assert np.all(converged)
    np.testing.assert_allclose(back.logit, lam.logit, rtol=1e-9)
    np.testing.assert_array_equal(back.total, lam.total)
    change = program(family.fisher_product)(lam, family.Natural(np.ones(2), np.ones(2)))
    np.testing.assert_allclose(change.logit, lam.total * p * (1 - p), rtol=1e-12)
    np.testing.assert_array_equal(change.total, np.zeros(2))


def test_the_solve_is_differentiable_for_batches(x64):
    family = families.get("test_binomial")
    mu = family.Expectation(np.array([2.0, 1.0]), np.array([7.0, 3.0]))

    def total(x):
        return jnp.sum(family.natural_from_expectation(mu._replace(logit=x)).logit)

    p = mu.logit / mu.total
    slope = jax.jit(jax.grad(total))(mu.logit)
    np.testing.assert_allclose(slope, 1 / (mu.total * p * (1 - p)), rtol=1e-9)


def test_families_are_static_and_hashable():
    for name in families.names():
        family = families.get(name)
        assert jax.tree.leaves(family) == []
        assert hash(family) == hash(families.get(name)) and family == families.get(name)
        assert not callable(family)
        assert families.get(family) is family


def test_registry_errors_list_what_is_known():
    with pytest.raises(ValueError, match=r"unknown family 'gausian'; known: .*gaussian.*normal"):
        families.get("gausian")
    with pytest.raises(ValueError, match="'normal' is taken"):
        families.register("normal")


def test_a_definition_that_is_run_again_takes_the_place_of_the_one_before(monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    code = "class Own(Base):\n    def __init__(self, scale=%d): self.scale = scale"
    for scale in (1, 2):  # the same cell, edited
        names = {"Base": families.Normal, "__name__": "cell"}
        exec(code % scale, names)
        families.register("own")(names["Own"])
        assert families.get("own").scale == scale
    with pytest.raises(ValueError, match=r"'own' is taken by .*Own"):
        families.register("own")(PlainGamma)
    families.register("built")(functools.partial(families.Normal))
    with pytest.raises(ValueError, match="'built' is taken"):
        families.register("built")(functools.partial(families.Gamma))


def test_no_location_says_what_to_pass():
    with pytest.raises(ValueError, match="PlainGamma has no location: pass init="):
        PlainGamma().natural_at(jnp.zeros(()))


def test_tracing_checks_nothing_and_returns_nan_free_errors_only_eagerly():
    lam = jax.jit(lambda v: NORMAL.natural(mean=0.0, variance=v))(-1.0)
    assert not bool(NORMAL.in_domain(lam))


def test_domain_is_a_value():
    assert Domain(2, -1) == domain.negative_definite() and Domain() == domain.real()
