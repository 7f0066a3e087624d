"""Estimators for any family against quadrature and golden numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_rows import ROWS, rows
from family_tools import (
    direction,
    flat,
    flat_learnt,
    learnt,
    member,
    natural,
    program,
    stacked,
)
from scipy.special import expit
from tools import assert_same, close, load_golden, near

from blr_optax import estimators, families, natural_step
from blr_optax.estimators import natural_gradient


def smooth(theta):
    """Neither linear nor separable, on any support."""
    total = sum(jnp.sum(jnp.cos(0.7 * x + 0.3)) for x in jax.tree.leaves(theta))
    return total + 0.3 * total**2


@functools.cache
def truth(row, i=0, loss=smooth):
    """(E[l], grad_mu E[l]) by quadrature in numpy: F^{-1} Cov(T, l)."""
    family, standard = row.family, row.members[i]
    points, weights = row.rule(standard)
    p = weights * np.exp(row.logpdf(standard, points))

    @jax.jit
    def evaluate(lam, points):
        statistics = jax.vmap(lambda x: flat_learnt(family, family.sufficient_statistics(x, lam)))
        return statistics(points), jax.vmap(loss)(points), family.fisher(lam)

    points = jax.tree.map(np.asarray, points)
    t, values, fisher = map(np.asarray, evaluate(member(stacked(row), i), points))
    seen = p > 1e-30
    p, t, values = p[seen], t[seen], values[seen]
    value = p @ values
    covariance = (p * (values - value)) @ t
    return value, np.linalg.lstsq(fisher, covariance, rcond=1e-12)[0]


def of_rows(flag=None):
    """All families, or those with a flag."""
    return pytest.mark.parametrize("row", rows(flag))


every_row = of_rows()


def first(row):
    """lambda of the first member."""
    return member(stacked(row), 0)


def gradient_of(family, loss, estimator):
    """The natural gradient as one program."""
    return jax.jit(natural_gradient(family, loss, estimator))


def estimates(row, estimator, repeats, loss=smooth):
    """Independent estimates of value and natural gradient, one per row."""
    gradient = natural_gradient(row.family, loss, estimator)

    @jax.jit
    def run(lam):
        def one(key):
            value, found = gradient(key, lam)
            return jnp.append(flat_learnt(row.family, found), value)

        return jax.lax.map(one, jax.random.split(jax.random.key(5), repeats))

    return np.asarray(run(first(row)))


def unbiased(row, estimator, repeats=400):
    value, gradient = truth(row)
    draws = estimates(row, estimator, repeats)
    expected = np.append(gradient, value)
    error = draws.std(0) / np.sqrt(repeats)
    assert np.all(np.isfinite(draws))
    assert np.all(np.abs(draws.mean(0) - expected) < 5 * error + 1e-9), (draws.mean(0), expected)


def test_score_function_without_a_baseline_is_unbiased_and_worse(x64):
    gamma, lifted = ROWS["gamma"], lambda x: 10 + smooth(x)
    unbiased(gamma, estimators.score_function(50, baseline="none"))
    spread = [
        estimates(gamma, estimators.score_function(50, b), 200, lifted).std(0)
        for b in ("mean", "none")
    ]
    assert np.all(spread[0][:-1] < spread[1][:-1])


@of_rows("enumerable")
def test_enumeration_is_exact(x64, row):
    totals = {s.get("total") for s in row.members}
    assert len(totals) == 1
    (total,) = totals
    rule = natural_gradient(row.family, smooth, estimators.enumeration(total and int(total)))
    each = jax.jit(lambda lam: rule(None, lam))
    for i in range(len(row.members)):
        value, gradient = truth(row, i)
        found_value, found = each(member(stacked(row), i))
        close(found_value, value, rtol=1e-10)
        close(flat(row.family, found), gradient, rtol=1e-8, atol=1e-10)


def test_enumeration_of_counts_needs_their_total():
    for family in ("binomial", families.MeanField("binomial"), "multinomial"):
        with pytest.raises(ValueError, match=r"name it, enumeration\(total=n\)"):
            natural_gradient(family, smooth, estimators.enumeration())
    for total in (-1, 2.0, True):
        with pytest.raises(ValueError, match=rf"total={total!r} must be an integer, at least 0"):
            estimators.enumeration(total)
    lam = families.get("binomial").natural(logit=0.3, total=5)
    found = natural_gradient("binomial", smooth, estimators.enumeration(4))(None, lam)
    assert np.isnan(found[0]) and np.isnan(found[1].linear)
    lam = families.get("binomial").natural(logit=jnp.float32(0.3), total=200)
    with pytest.raises(ValueError, match="too large for float32"):
        natural_gradient("binomial", smooth, estimators.enumeration(200))(None, lam)


def test_enumeration_keeps_its_digits_where_probabilities_are_zero_or_one(x64):
    """grad_mu is l(1) - l(0) at any logit, and l(k) - l(K) for labels."""
    natural_of = program(families.get("bernoulli").natural)
    binary = gradient_of("bernoulli", lambda x: (x - 3.0) ** 2 / 7, estimators.enumeration())
    for logit in (0.0, 40.0, 700.0, -700.0):
        close(binary(None, natural_of(logit=logit))[1].linear, (4 - 9) / 7)
    logits = np.array([700.0, -700.0, 0.0])
    lam = program(families.get("categorical").natural)(logits=logits)
    found = gradient_of("categorical", lambda k: 1.0 * k**2, estimators.enumeration())(None, lam)
    close(found[1].linear, [-4.0, -3.0])


def test_enumeration_over_a_tree_sums_over_all_combinations(x64):
    family = families.MeanField(families.get("rademacher"))
    logit = {"a": np.array([0.3, -1.0]), "b": np.array([[2.0]])}
    lam = program(family.natural)(logit=logit)

    def loss(w):
        return jnp.tanh(w["a"] @ np.array([1.0, 2.0]) - w["b"][0, 0]) + w["a"][0] * w["b"][0, 0]

    value, found = gradient_of(family, loss, estimators.enumeration())(None, lam)
    p = expit(np.array([0.3, -1.0, 2.0]))
    signs = np.stack(np.meshgrid(*[[-1, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
    chance = np.prod(np.where(signs > 0, p, 1 - p), axis=1)
    states = {"a": signs[:, :2] * 1.0, "b": signs[:, None, 2:] * 1.0}
    losses = np.asarray(jax.jit(jax.vmap(loss))(states))
    close(value, chance @ losses)
    found = jax.tree.map(np.asarray, found.linear)
    for j, got in enumerate(np.concatenate([found["a"], found["b"][0]])):
        up = signs[:, j] > 0  # half the difference of the conditional means
        means = [chance[s] @ losses[s] / chance[s].sum() for s in (up, ~up)]
        close(got, 0.5 * (means[0] - means[1]))


@every_row
def test_least_squares_is_exact_for_linear_losses(x64, row):
    a = jax.tree.map(np.asarray, direction(row.family, first(row), 3))

    @jax.jit
    def run(lam):
        loss = lambda x: row.family.inner(a, row.family.sufficient_statistics(x, lam)) + 2.0  # noqa: E731
        rule = natural_gradient(row.family, loss, estimators.least_squares(200))
        return rule(jax.random.key(1), lam)[1]

    found = run(first(row))
    near(learnt(row.family, found), learnt(row.family, a), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["gamma", "bernoulli", "dirichlet", "normal"])
def test_least_squares_is_consistent_and_its_bias_falls(x64, name):
    value, gradient = truth(ROWS[name])
    many = estimates(ROWS[name], estimators.least_squares(4000), 25)
    error = many.std(0) / 5.0
    expected = np.append(gradient, value)
    assert np.all(np.abs(many.mean(0) - expected) < 5 * error + 0.02 * np.abs(expected) + 1e-9)


@pytest.mark.parametrize(
    ("temperature", "factor"), [(2.0, 0.44), (1.0, 0.68), (0.5, 0.87), (0.1, 0.99)]
)
def test_concrete_has_the_bias_that_its_docstring_states(x64, temperature, factor):
    lam = program(families.get("rademacher").natural)(probability=0.6)  # mean 0.2
    rule = gradient_of("rademacher", lambda w: w, estimators.concrete(temperature, 40_000))
    found = rule(jax.random.key(2), lam)[1].linear
    assert abs(float(found) - factor) < 0.05


@of_rows("relaxable")
def test_concrete_tends_to_the_truth(x64, row):
    lam = first(row)
    k = 1 if type(row.family) is not families.Categorical else np.size(lam.linear) + 1
    slope = np.arange(1.0, k + 1)
    relaxed = lambda w: jnp.sum(slope * w)  # noqa: E731
    labels = relaxed if k == 1 else lambda label: jnp.asarray(slope)[label]
    exact = gradient_of(row.family, labels, estimators.enumeration())(None, lam)[1].linear
    rule = gradient_of(row.family, relaxed, estimators.concrete(0.1, 40_000))
    found, exact = np.asarray(rule(jax.random.key(2), lam)[1].linear), np.asarray(exact)
    assert np.all(np.abs(found - exact) < 0.12 * (1 + np.abs(exact)))


@every_row
def test_closed_form_differentiates_a_loss_of_mu(x64, row):
    family = row.family
    a = jax.tree.map(np.asarray, direction(family, first(row), 3))

    @jax.jit
    def run(lam):
        rule = natural_gradient(
            family, lambda mu: jnp.sin(family.inner(a, mu)), estimators.closed_form()
        )
        return *rule(None, lam), family.inner(a, family.expectation(lam))

    value, found, inner = run(first(row))
    inner = np.asarray(inner)
    close(value, np.sin(inner))
    near(learnt(family, found), jax.tree.map(lambda x: np.cos(inner) * x, learnt(family, a)))
    assert isinstance(found, family.Natural)


def test_cubature_is_exact_to_its_degree_and_is_quadrature_for_polynomials(x64):
    lam = program(families.get("gaussian").natural)(
        mean=np.array([0.3, -1.0, 0.5]), covariance=np.diag([0.5, 2.0, 1.0]) + 0.2
    )

    def cubic(x):
        return x[0] * x[1] * x[2] + x[0] ** 3 - x[1] ** 2 + x @ x

    def quintic(x):
        return cubic(x) + x[0] ** 5 + x[1] ** 2 * x[2] ** 2 * x[0]

    for degree, loss in [(3, cubic), (5, quintic)]:
        found = gradient_of("gaussian", loss, estimators.cubature(degree))(None, lam)
        exact = gradient_of("gaussian", loss, estimators.gauss_hermite(6))(None, lam)
        close(found[0], exact[0], rtol=1e-10)
        if degree == 3:  # the Hessian is linear there
            near(tuple(found[1]), tuple(exact[1]), rtol=1e-10, atol=1e-10)


# --- golden numbers -------------------------------------------------------------------------------

LOSSES = {
    "quartic": lambda x: (x - 0.5) ** 4 / 10 + x / 3,
    "logistic": lambda x: jax.nn.softplus(-2 * x + 0.2),
    "cosine": lambda x: jnp.cos(3 * x),
    "pow15": lambda x: 0.3 * x**1.5 + 1 / (1 + x),
    "log1p_sq": lambda x: jnp.log1p(x * x),
    "neg_loglik_exp": lambda x: 5 * x - 3 * jnp.log(x),
    "sin5": lambda x: jnp.sin(5 * x),
    "conj_beta": lambda x: -3 * jnp.log(x) - jnp.log1p(-x),
    "circle": lambda x: x[1] + (x[0] ** 2 - x[1] ** 2) / 2,
    # A categorical sample is an int32 label, whose quotient JAX gives in float32 even under x64.
    "square_shift": lambda x: (jnp.asarray(x, float) - 3) ** 2 / 7,
    "sqrtabs": lambda x: jnp.sqrt(x + 0.25),
    "quadratic_simplex": lambda x: x[0] ** 2 + 2 * x[0] * x[1] - x[2],
}
RENAMED = {"categorical_minimal": "categorical"}
CASES = [
    pytest.param(RENAMED.get(c["family"], c["family"]), c, id=f"{c['family']}-{c['loss']}-{index}")
    for index, c in enumerate(load_golden("natgrad_blr_step")["cases"])
]


def as_fields(family, numbers, like):
    """A golden list of numbers as a lambda: one per field, or one vector."""
    fields = list(family.domains)
    parts = [numbers] if len(fields) == 1 and np.ndim(getattr(like, fields[0])) else numbers
    values = [np.asarray(x, np.float64) for x in parts]
    return like._replace(**dict(zip(fields, values, strict=True)))


def golden_lambda(name, case):
    family = families.get(name)
    params = dict(case["params"])
    if name == "binomial":
        return natural(ROWS[name], {"logit": params["logit"], "total": params["n"]})
    return as_fields(family, case["natural"], first(ROWS[name]))


def test_all_golden_cases_are_found():
    assert len(CASES) == 35
    assert {case.values[0] for case in CASES} <= set(ROWS)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_golden_inverse_fisher_and_step(x64, name, case):
    """F^{-1} of the recorded covariance is the recorded natural gradient, and so is the step."""
    family, lam = families.get(name), golden_lambda(name, case)
    slope = as_fields(family, case["grad_lambda_E_loss"], lam)
    expected = as_fields(family, case["grad_mu_E_loss"], lam)
    step_size, has_base = case["rho"], "grad_mu_E_log_h" in case
    found, step, inside, gradient = golden_program(family, has_base)(
        lam, slope, expected, step_size
    )
    scale = max(np.max(np.abs(x)) for x in learnt(family, expected).values())
    near(learnt(family, found), learnt(family, expected), rtol=1e-8, atol=1e-8 * scale)
    wanted = as_fields(family, case["blr_step_natural"], lam)
    near(learnt(family, step), learnt(family, wanted), rtol=1e-8, atol=1e-8)
    assert bool(inside)
    if has_base:
        log_h = as_fields(family, case["grad_mu_E_log_h"], lam)
        near(learnt(family, gradient), learnt(family, log_h), rtol=1e-7)


@functools.cache
def golden_program(family, has_base):
    @jax.jit
    def run(lam, slope, expected, rho):
        step = natural_step(family, lam, expected, rho, step="plain")
        inside = family.in_domain(natural_step(family, lam, expected, rho))
        base = family.base_measure_gradient(lam) if has_base else ()
        return family.gradient_in_lambda(lam, slope), step, inside, base

    return run


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: estimators.score_function(0), "samples=0"),
        (lambda: estimators.score_function(1), "no other sample"),
        (lambda: estimators.score_function(5, "median"), "baseline='median'; known: mean, none"),
        (lambda: estimators.least_squares(0), "samples=0"),
        (lambda: estimators.pathwise(0), "samples=0"),
        (lambda: estimators.concrete(0.0), "temperature=0.0 must be positive"),
        (lambda: estimators.cubature(4), "degree=4 must be 3 or 5"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_combinations():
    gamma = families.get("gamma").natural(concentration=2.0, rate=1.0)
    for name, estimator, message in [
        ("gamma", estimators.enumeration(), "Gamma has no finite support"),
        ("gamma", estimators.concrete(), "Gamma has no relaxation"),
        ("poisson", estimators.pathwise(3), "samples of Poisson have no gradient"),
        ("poisson", estimators.cubature(), "Cubature is for Gaussian families"),
    ]:
        with pytest.raises(ValueError, match=message):
            natural_gradient(name, smooth, estimator)
    with pytest.raises(ValueError, match="least_squares: samples=3 must exceed the 2 statistics"):
        natural_gradient("gamma", smooth, estimators.least_squares(3))(jax.random.key(0), gamma)
    with pytest.raises(ValueError, match="pass a typed key"):
        natural_gradient("gamma", smooth, estimators.score_function(3))(None, gamma)
    many = families.get("bernoulli").natural(logit=jnp.zeros(21))
    with pytest.raises(ValueError, match="2097152 values are too many"):
        natural_gradient("bernoulli", jnp.sum, estimators.enumeration())(None, many)


@pytest.mark.parametrize("family", ["gamma", "gaussian", "student_t"])
def test_an_integer_is_a_seed(family):
    family = families.get(family)
    starts = {
        "Gamma": {"concentration": 3.0, "rate": 2.0},
        "Gaussian": {"mean": np.ones(2), "precision": np.eye(2)},
        "StudentT": {"mean": np.ones(2), "scale": np.eye(2), "degrees": 5.0},
    }
    lam = family.natural(**starts[type(family).__name__])
    gradient = jax.jit(natural_gradient(family, lambda x: jnp.sum(x**2)), static_argnums=0)
    seeded = gradient(3, lam)
    keyed = jax.jit(natural_gradient(family, lambda x: jnp.sum(x**2)))(jax.random.key(3), lam)
    assert_same(seeded, keyed)
