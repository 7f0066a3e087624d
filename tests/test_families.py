"""Families against scipy, quadrature, finite differences, definitions and golden numbers.

`ROWS` drives the contract: a new family is one row.
"""

import collections
import dataclasses
import operator
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_golden
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from scipy import stats

from blr_optax import families
from blr_optax.families import Domain, Family, GaussianExpectation, GaussianNatural, _domain

LOG_2PI = np.log(2 * np.pi)
NORMAL, GAUSSIAN = families.get("normal"), families.get("gaussian")
FIXED, DIAGONAL = families.get("gaussian_fixed"), families.get("gaussian_diagonal")


def close(actual, expected, rtol=1e-12, atol=0.0):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def near(a, b, rtol=1e-12, atol=1e-14):
    """All leaves of two trees are close."""
    jax.tree.map(lambda x, y: close(x, y, rtol, atol), a, b)


def spd(seed, d=2):
    a = np.random.default_rng(seed).normal(size=(d, d))
    return a @ a.T / d + 0.3 * np.eye(d)


# --- the table ------------------------------------------------------------------------------------


def line(m, v):
    """A quadrature rule for densities that look like N(m, v): trapezes over twelve sds."""
    z, h = np.linspace(-12, 12, 2001, retstep=True)
    return m + np.sqrt(v) * z, np.full(z.size, h * np.sqrt(v))


def plane(m, cov):
    """The same in two dimensions."""
    z, h = np.linspace(-9, 9, 121, retstep=True)
    root = np.linalg.cholesky(cov)
    points = np.stack(np.meshgrid(z, z), -1).reshape(-1, 2) @ root.T + m
    return points, np.full(len(points), h * h * np.linalg.det(root))


@dataclasses.dataclass(frozen=True)
class Row:
    """What the tests know about a family from elsewhere.

    Attributes:
        family: the family.
        members: standard parameters of a few members; all share the known fields.
        reference: standard parameters -> the frozen scipy distribution.
        rule: standard parameters -> (points, weights) of a quadrature rule over the support.
        bad: standard parameters that must be refused, by the name in the error.
        outside: natural parameters that are no member.
    """

    family: Family
    members: tuple[dict, ...]
    reference: Callable
    rule: Callable
    bad: tuple[tuple[str, dict], ...]
    outside: tuple[Any, ...]


SHARED = spd(3)
MEAN = np.array([0.3, -1.0])
INDEFINITE = np.array([[1.0, 2.0], [2.0, 1.0]])
ROWS = {
    "normal": Row(
        NORMAL,
        (
            {"mean": 0.3, "variance": 0.8},
            {"mean": -2.0, "variance": 4.0},
            {"mean": 0.0, "variance": 0.1},
        ),
        lambda s: stats.norm(s["mean"], np.sqrt(s["variance"])),
        lambda s: line(s["mean"], s["variance"]),
        (
            ("variance", {"mean": 0.0, "variance": -1.0}),
            ("variance", {"mean": 0.0, "variance": np.array([1.0, np.nan])}),
            ("precision", {"mean": 0.0, "precision": 0.0}),
            ("variance or precision", {"mean": 0.0}),
            ("variance or precision", {"mean": 0.0, "variance": 1.0, "precision": 1.0}),
        ),
        tuple(
            GaussianNatural(*x)
            for x in [(0.0, 0.0), (0.0, 1.0), (np.nan, -1.0), (0.0, -np.inf), (np.inf, -1.0)]
        ),
    ),
    "gaussian": Row(
        GAUSSIAN,
        (
            {"mean": MEAN, "covariance": spd(0)},
            {"mean": np.array([1.0, 0.5]), "covariance": spd(1)},
            {"mean": np.zeros(2), "covariance": np.array([[1.0, 0.9], [0.9, 1.0]])},
        ),
        lambda s: stats.multivariate_normal(s["mean"], s["covariance"]),
        lambda s: plane(s["mean"], s["covariance"]),
        (
            ("covariance", {"mean": MEAN, "covariance": INDEFINITE}),
            ("precision", {"mean": MEAN, "precision": np.zeros((2, 2))}),
            ("covariance or precision", {"mean": MEAN}),
        ),
        tuple(
            GaussianNatural(np.asarray(a), np.asarray(b))
            for a, b in [
                (MEAN, -INDEFINITE),
                (MEAN, np.eye(2)),
                (MEAN, np.zeros((2, 2))),
                (MEAN, np.full((2, 2), np.nan)),
                (MEAN, -np.diag([1.0, np.inf])),
                (MEAN * np.nan, -np.eye(2)),
            ]
        ),
    ),
    "gaussian_fixed": Row(
        FIXED,
        ({"mean": MEAN, "precision": SHARED}, {"mean": np.array([1.0, 0.5]), "precision": SHARED}),
        lambda s: stats.multivariate_normal(s["mean"], np.linalg.inv(s["precision"])),
        lambda s: plane(s["mean"], np.linalg.inv(s["precision"])),
        (("precision", {"mean": MEAN, "precision": INDEFINITE}),),
        tuple(families.FixedNatural(MEAN * x, SHARED) for x in (np.nan, np.inf)),
    ),
}
MEMBERS = [
    pytest.param(row, s, id=f"{name}-{i}")
    for name, row in ROWS.items()
    for i, s in enumerate(row.members)
]
PAIRS = [
    pytest.param(row, p, q, id=f"{name}-{i}{j}")
    for name, row in ROWS.items()
    for i, p in enumerate(row.members)
    for j, q in enumerate(row.members)
]
every_member = pytest.mark.parametrize(("row", "standard"), MEMBERS)
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def natural(row, standard):
    return row.family.natural(**{k: jnp.asarray(v) for k, v in standard.items()})


def learnt(family, x):
    return {name: getattr(x, name) for name in family.domains}


def flat_learnt(family, x):
    return ravel_pytree(learnt(family, x))[0]


def formula(family):
    """A(lambda) as written, without the derivative rule."""
    return lambda lam: getattr(type(family), "plain_log_partition", type(family).log_partition)(
        family, lam
    )


def direction(family, lam, seed=0):
    """A random change of the learnt fields, symmetric where it must be."""
    rng = np.random.default_rng(seed)
    change = {}
    for name, domain in family.domains.items():
        x = rng.normal(size=np.shape(getattr(lam, name)))
        change[name] = jnp.asarray((x + x.swapaxes(-1, -2)) / 2 if domain.event_ndim == 2 else x)
    return jax.tree.map(jnp.zeros_like, lam)._replace(**change)


def test_every_registered_family_has_a_row():
    assert {type(families.get(name)) for name in families.names() if name in ROWS} == {
        type(row.family) for row in ROWS.values()
    }
    assert set(families.names()) >= set(ROWS) | {"gaussian_diagonal"}


# --- maps -----------------------------------------------------------------------------------------


@every_member
def test_standard_round_trip(x64, row, standard):
    lam = natural(row, standard)
    back = row.family.standard(lam)
    for name in standard:
        close(back[name], standard[name], atol=1e-14)
    near(row.family.natural(**back), lam)


@every_member
def test_expectation_round_trip(x64, row, standard):
    lam = natural(row, standard)
    back, converged = row.family.natural_from_expectation(
        row.family.expectation(lam), with_status=True
    )
    near(back, lam, rtol=1e-11)
    assert bool(converged)
    near(row.family.natural_from_expectation(row.family.expectation(lam)), back)


@every_member
def test_mu_is_the_gradient_of_the_log_partition_and_the_mean_of_the_statistics(x64, row, standard):
    family, lam = row.family, natural(row, standard)
    mu = learnt(family, family.expectation(lam))
    near(learnt(family, jax.grad(formula(family))(lam)), mu)
    near(learnt(family, jax.grad(family.log_partition)(lam)), mu)
    points, weights = row.rule(standard)
    p = weights * np.exp(row.reference(standard).logpdf(points))
    statistics = learnt(family, jax.vmap(family.sufficient_statistics)(jnp.asarray(points)))
    near(jax.tree.map(lambda t: np.tensordot(p, t, 1), statistics), mu, rtol=1e-9, atol=1e-9)


def symmetric_projector(family, lam):
    """The matrix that replaces matrix fields by their symmetric part."""
    vector, to_fields = ravel_pytree(learnt(family, lam))

    def project(x):
        is_matrix = {name: family.domains[name].event_ndim == 2 for name in family.domains}
        fields = to_fields(x).items()
        return ravel_pytree({k: (v + v.T) / 2 if is_matrix[k] else v for k, v in fields})[0]

    return jax.vmap(project)(jnp.eye(vector.size))


@every_member
def test_fisher_is_the_hessian_and_the_covariance_of_the_statistics(x64, row, standard):
    family, lam = row.family, natural(row, standard)
    fisher, symmetric = family.fisher(lam), symmetric_projector(family, lam)
    vector, to_fields = ravel_pytree(learnt(family, lam))
    hessian = jax.hessian(lambda x: formula(family)(lam._replace(**to_fields(x))))(vector)
    close(fisher, symmetric @ hessian @ symmetric, rtol=1e-9, atol=1e-9)
    points, weights = row.rule(standard)
    p = weights * np.exp(row.reference(standard).logpdf(points))
    statistics = jax.vmap(lambda x: flat_learnt(family, family.sufficient_statistics(x)))
    t = np.asarray(statistics(jnp.asarray(points)))
    t = t - p @ t
    close(fisher, (p[:, None] * t).T @ t, rtol=1e-8, atol=1e-8)


@every_member
def test_fisher_product_is_the_slope_of_mu(x64, row, standard):
    family, lam = row.family, natural(row, standard)
    v, h = direction(family, lam), 1e-5
    ahead, behind = (family.expectation(family.combine((1.0, lam), (t, v))) for t in (h, -h))
    slope = jax.tree.map(
        lambda a, b: (a - b) / (2 * h), learnt(family, ahead), learnt(family, behind)
    )
    near(learnt(family, family.fisher_product(lam, v)), slope, rtol=1e-6, atol=1e-6)
    close(
        family.fisher(lam) @ flat_learnt(family, v),
        flat_learnt(family, family.fisher_product(lam, v)),
    )


# --- densities ------------------------------------------------------------------------------------


@every_member
def test_density_moments_and_entropy_against_scipy_and_quadrature(x64, row, standard):
    family, lam, reference = row.family, natural(row, standard), row.reference(standard)
    points, weights = row.rule(standard)
    log_q = family.log_prob(lam, jnp.asarray(points))
    close(log_q, reference.logpdf(points), rtol=1e-10, atol=1e-10)
    close(Family.log_prob(family, lam, jnp.asarray(points)), log_q, rtol=1e-10, atol=1e-10)
    p = weights * np.exp(log_q)
    close(p.sum(), 1.0, rtol=1e-10)
    mean = np.tensordot(p, points, 1)
    close(family.mean(lam), mean, atol=1e-9)
    close(family.variance(lam), np.tensordot(p, (points - mean) ** 2, 1), rtol=1e-8)
    close(family.entropy(lam), -p @ reference.logpdf(points), rtol=1e-9)
    close(Family.entropy(family, lam), family.entropy(lam), rtol=1e-10)
    log_h = jax.vmap(lambda x: family.log_base_measure(lam, x))(jnp.asarray(points))
    close(family.expected_log_base_measure(lam), p @ np.asarray(log_h), rtol=1e-9)


@pytest.mark.parametrize(("row", "p", "q"), PAIRS)
def test_kl_is_the_expected_log_ratio(x64, row, p, q):
    points, weights = row.rule(p)
    log_p, log_q = (row.reference(s).logpdf(points) for s in (p, q))
    expected = weights * np.exp(log_p) @ (log_p - log_q)
    lam_p, lam_q = natural(row, p), natural(row, q)
    actual = row.family.kl(lam_p, lam_q)
    close(actual, expected, rtol=1e-8, atol=1e-12)
    close(Family.kl(row.family, lam_p, lam_q), expected, rtol=1e-8, atol=1e-12)
    assert actual == 0 if p is q else actual > 0, actual


@every_member
def test_kl_near_the_diagonal_is_half_the_fisher_norm(x64, row, standard):
    family, lam = row.family, natural(row, standard)
    v = direction(family, lam)

    def along(t):
        return family.kl(lam, family.combine((1.0, lam), (t, v)))

    norm = family.inner(v, family.fisher_product(lam, v))
    slope, curvature = jax.jit(lambda: jax.jvp(jax.grad(along), (0.0,), (1.0,)))()
    close(slope, 0.0, atol=1e-14)
    close(curvature, norm, rtol=1e-10)
    t = 1e-7
    close(along(t), 0.5 * t**2 * norm, rtol=1e-5)


@every_member
def test_samples_have_the_moments_and_shape(x64, row, standard):
    family, lam = row.family, natural(row, standard)
    draws = family.sample(jax.random.key(0), lam, (4, 5000))
    event = np.shape(family.mean(lam))
    assert draws.shape == (4, 5000, *event)
    assert family.sample(jax.random.key(0), lam).shape == event
    x = draws.reshape(-1, *event)
    t = jax.vmap(lambda x: flat_learnt(family, family.sufficient_statistics(x)))(x)
    error = np.std(t, axis=0) / np.sqrt(len(t))
    assert np.all(np.abs(t.mean(0) - flat_learnt(family, family.expectation(lam))) < 5 * error)
    assert np.all(np.abs(x.mean(0) - family.mean(lam)) < 5 * x.std(0) / np.sqrt(len(x)))
    assert np.all(np.abs(x.var(0) / family.variance(lam) - 1) < 5 * np.sqrt(2 / len(x)))


# --- as arrays and functions ----------------------------------------------------------------------


def functions(row):
    """Functions of one lambda, another one and a theta: the interface that must batch."""
    f = row.family
    return {
        "log_partition": lambda a, b, x: f.log_partition(a),
        "expectation": lambda a, b, x: f.expectation(a),
        "log_prob": lambda a, b, x: f.log_prob(a, x),
        "entropy": lambda a, b, x: f.entropy(a),
        "expected_log_base_measure": lambda a, b, x: f.expected_log_base_measure(a),
        "kl": lambda a, b, x: f.kl(a, b),
        "mean": lambda a, b, x: f.mean(a),
        "variance": lambda a, b, x: f.variance(a),
        "standard": lambda a, b, x: f.standard(a),
        "statistics": lambda a, b, x: f.sufficient_statistics(x),
        "inner": lambda a, b, x: f.inner(a, b),
        "solve": lambda a, b, x: f.natural_from_expectation(f.expectation(a), with_status=True),
        "fisher": lambda a, b, x: f.fisher(a),
        "fisher_product": lambda a, b, x: f.fisher_product(a, b),
        "in_domain": lambda a, b, x: f.in_domain(a),
        "retract": lambda a, b, x: f.retract(a, b),
        "safe_step": lambda a, b, x: f.safe_step(a, b)[0],
        "base_measure_gradient": lambda a, b, x: f.base_measure_gradient(a),
        "natural_at": lambda a, b, x: f.natural_at(x, a) if f.location else x,
    }


@every_row
def test_batch_equals_loop_and_jit_equals_eager(x64, row):
    def everything(*args):
        return {name: f(*args) for name, f in functions(row).items()}

    lams = [natural(row, s) for s in row.members]
    thetas = [jnp.asarray(row.reference(s).rvs(random_state=0)) for s in row.members]
    singles = list(zip(lams, [lams[-1], *lams[:-1]], thetas, strict=True))
    batched = jax.tree.map(lambda *x: jnp.stack(x), *singles)
    one_by_one = [jax.jit(everything)(*one) for one in singles]
    loop = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    for found in (
        everything(*batched),
        jax.jit(everything)(*batched),
        jax.jit(jax.vmap(everything))(*batched),
    ):
        for name in loop:
            jax.tree.map(lambda x, y, name=name: np.testing.assert_allclose(
                x, y, rtol=1e-11, atol=1e-12, err_msg=name), found[name], loop[name])  # fmt: skip


@every_row
def test_twice_differentiable(x64, row):
    """Gradients and Hessian products are the finite differences of values and gradients."""
    names = ("log_partition", "log_prob", "entropy", "kl", "mean", "variance")
    a, b = (natural(row, s) for s in row.members[:2])
    theta = jnp.asarray(row.reference(row.members[0]).rvs(random_state=0))
    start, unravel = ravel_pytree((learnt(row.family, a), learnt(row.family, b), theta))
    weights = iter(np.random.default_rng(0).uniform(1, 2, 20))
    functions_of = {name: (functions(row)[name], next(weights)) for name in names}

    def total(flat):
        x, y, theta = unravel(flat)
        values = (
            jnp.sum(w * f(a._replace(**x), b._replace(**y), theta))
            for f, w in functions_of.values()
        )
        return sum(values)

    direction = jnp.asarray(np.random.default_rng(1).normal(size=start.size))
    line = jax.jit(lambda t: jax.value_and_grad(total)(start + t * direction))
    curvature = jax.jit(lambda: jax.jvp(jax.grad(total), (start,), (direction,))[1])()
    h = 1e-5
    (ahead, slope_ahead), (behind, slope_behind) = line(h), line(-h)
    close(line(0.0)[1] @ direction, (ahead - behind) / (2 * h), rtol=1e-6)
    close(curvature, (slope_ahead - slope_behind) / (2 * h), rtol=1e-5, atol=1e-5)


@every_row
def test_samples_carry_gradients(x64, row):
    """d/d lambda E_q[sum theta^2] through the sampler is that of the closed form."""
    family, lam = row.family, natural(row, row.members[0])

    def closed(lam):
        return jnp.sum(family.variance(lam) + family.mean(lam) ** 2)

    def drawn(key, lam):
        return jnp.sum(family.sample(key, lam) ** 2)

    keys = jax.random.split(jax.random.key(1), 10_000)
    draws = jax.jit(jax.vmap(lambda k: flat_learnt(family, jax.grad(drawn, 1)(k, lam))))(keys)
    truth = symmetric_projector(family, lam) @ flat_learnt(family, jax.grad(closed)(lam))
    draws = draws @ symmetric_projector(family, lam)
    assert np.all(np.abs(draws.mean(0) - truth) < 5 * draws.std(0) / np.sqrt(len(keys)) + 1e-12)


# --- domains and steps ----------------------------------------------------------------------------


@every_row
def test_in_domain(x64, row):
    assert all(bool(row.family.in_domain(natural(row, s))) for s in row.members)
    assert not any(bool(row.family.in_domain(lam)) for lam in row.outside)
    mixed = jax.tree.map(
        lambda *x: jnp.stack([jnp.asarray(v) for v in x]),
        natural(row, row.members[0]),
        *row.outside,
    )
    assert row.family.in_domain(mixed).tolist() == [True] + [False] * len(row.outside)


@every_row
def test_bad_standard_parameters_name_themselves(row):
    for name, standard in row.bad:
        with pytest.raises(ValueError, match=name):
            row.family.natural(**standard)


FORMS = {
    "normal": ("improved", "improved_old", "square_root"),
    "gaussian": ("improved", "improved_old", "square_root"),
}
RETRACTIONS = [(name, form) for name in ROWS for form in FORMS.get(name, (None,))]
exponents = st.floats(-30, 30)


def retract(row_name, form):
    family = ROWS[row_name].family
    return lambda lam, step: family.retract(lam, step, **({"form": form} if form else {}))


@pytest.mark.parametrize(("name", "form"), RETRACTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_retract_stays_inside_for_steps_of_any_size(x64, name, form, dtype):
    row = ROWS[name]
    lam = jax.tree.map(lambda x: jnp.asarray(x, dtype), natural(row, row.members[0]))
    one = jax.tree.map(lambda x: x.astype(dtype), direction(row.family, lam))

    @jax.jit
    def move(seed, linear, size):
        rng = jax.random.split(jax.random.key(seed), len(row.family.domains))
        step = {}
        for key, (field, domain) in zip(rng, row.family.domains.items(), strict=True):
            x = jax.random.normal(key, getattr(one, field).shape, dtype)
            x = (x + x.T) / 2 if domain.event_ndim == 2 else x
            step[field] = x * (linear if field == "linear" else size)
        new = retract(name, form)(lam, jax.tree.map(jnp.zeros_like, lam)._replace(**step))
        return new, row.family.in_domain(new)

    # With the old precision the mean itself leaves the range of float32.
    reach = 12 if dtype == jnp.float32 and form in ("improved_old", "square_root") else 30

    @given(st.integers(0, 2**16), exponents, exponents, st.sampled_from([-1, 1]))
    def check(seed, linear, size, sign):
        linear, size = (10.0 ** min(x, reach) for x in (linear, size))
        new, inside = move(seed, jnp.asarray(linear, dtype), jnp.asarray(sign * size, dtype))
        assert bool(inside), new
        assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(dtype)}

    check()


@pytest.mark.parametrize(("name", "form"), RETRACTIONS)
def test_retract_is_the_plain_step_to_first_order(x64, name, form):
    row = ROWS[name]
    for standard in row.members:
        lam = natural(row, standard)
        step = direction(row.family, lam, 1)
        zero = jax.tree.map(jnp.zeros_like, lam)
        value, slope = jax.jvp(lambda d, lam=lam: retract(name, form)(lam, d), (zero,), (step,))
        near(value, lam, atol=1e-13)
        near(slope, step, rtol=1e-9, atol=1e-9)


def improved_in_mean_and_precision(m, s, g, big_g, rho, old):
    """In numpy: the authors' coordinates (m, S)."""
    new = s + rho * big_g + 0.5 * rho**2 * big_g @ np.linalg.solve(s, big_g)
    return m - rho * np.linalg.solve(s if old else new, g), new


def square_root_in_mean_and_factor(m, s, g, h, rho):
    """In numpy: Sigma = C C^T."""
    c = np.linalg.cholesky(np.linalg.inv(s))
    k = c.T @ h @ c - np.eye(len(m))
    new = c - rho * c @ (np.tril(k, -1) + 0.5 * np.diag(np.diag(k)))
    return m - rho * c @ c.T @ g, np.linalg.inv(new @ new.T)


@pytest.mark.parametrize("rho", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("form", FORMS["gaussian"])
def test_retract_forms_are_the_published_formulas(x64, form, rho):
    rng = np.random.default_rng(7)
    m, s, g = rng.normal(size=3), spd(4, 3), rng.normal(size=3)
    h = rng.normal(size=(3, 3))
    h = 0.3 * (h + h.T)  # indefinite
    step = GaussianNatural(
        jnp.asarray(-rho * (s @ m + g - h @ m)), jnp.asarray(-0.5 * rho * (h - s))
    )
    lam = GAUSSIAN.natural(mean=jnp.asarray(m), precision=jnp.asarray(s))
    new = GAUSSIAN.retract(lam, step, form=form)
    if form == "square_root":
        mean, precision = square_root_in_mean_and_factor(m, s, g, h, rho)
    else:
        mean, precision = improved_in_mean_and_precision(
            m, s, g, h - s, rho, form == "improved_old"
        )
    close(GAUSSIAN.precision(new), precision, rtol=1e-10, atol=1e-10)
    close(GAUSSIAN.mean(new), mean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS["normal"])
def test_normal_retracts_like_a_gaussian_of_one_dimension(x64, form):
    lam, step = (
        GaussianNatural(jnp.array(0.7), jnp.array(-1.2)),
        GaussianNatural(jnp.array(-0.4), jnp.array(0.9)),
    )
    full = GAUSSIAN.retract(
        *(GaussianNatural(x.linear[None], x.quadratic[None, None]) for x in (lam, step)), form=form
    )
    near(
        jax.tree.map(jnp.ravel, full), jax.tree.map(jnp.ravel, NORMAL.retract(lam, step, form=form))
    )


@every_row
def test_safe_step_is_plain_inside_and_retracts_outside(x64, row):
    family, lam = row.family, natural(row, row.members[0])
    small = family.combine((1e-3, direction(family, lam)))
    new, count = family.safe_step(lam, small)
    near(new, family.combine((1.0, lam), (1.0, small)), rtol=0)
    assert int(count) == 0
    bounded = any(d.sign for d in family.domains.values())
    large = family.combine((-2.0, lam))  # to the mirror image, outside a bounded domain
    new, count = family.safe_step(lam, large)
    expected = family.retract(lam, large) if bounded else family.combine((1.0, lam), (1.0, large))
    near(new, expected, rtol=0)
    assert int(count) == bounded and bool(family.in_domain(new))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), small, large)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), lam)
    _, count = family.safe_step(twice, both)
    assert int(count) == bounded


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (_domain.real(), [-1e30, 0.0, 1e30], [np.nan, np.inf]),
        (_domain.positive(), [1e-30, 1.0], [0.0, -1.0, np.nan, np.inf]),
        (_domain.negative(), [-1e-30, -1.0], [0.0, 1.0, np.nan, -np.inf]),
        (_domain.above(-1.0), [-0.999, 5.0], [-1.0, -2.0]),
        (
            _domain.positive_definite(),
            [spd(0)],
            [INDEFINITE, -np.eye(2), np.zeros((2, 2)), np.eye(2) * np.nan],
        ),
        (_domain.negative_definite(), [-spd(0)], [INDEFINITE, np.eye(2)]),
    ],
)
def test_domains(x64, domain, inside, outside):
    assert all(bool(domain.contains(jnp.asarray(x))) for x in inside)
    assert not any(bool(domain.contains(jnp.asarray(x))) for x in outside)
    assert bool(domain.contains(domain.inside(jnp.asarray(inside[0]))))
    x, d = (
        jnp.asarray(inside[-1]),
        0.1 * jnp.asarray(outside[0] if np.all(np.isfinite(outside[0])) else inside[0]),
    )
    for t in (-1e3, -1.0, 1.0, 1e3):
        assert bool(domain.contains(domain.retract(x, t * d)))
    zero = jnp.zeros_like(d)
    close(jax.jvp(lambda d: domain.retract(x, d), (zero,), (d,))[1], d, atol=1e-12)


# --- float32 --------------------------------------------------------------------------------------


def wide(lam):
    """The same lambda in float64."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), lam)


def float32(family, **standard):
    return family.natural(**{k: jnp.asarray(v, jnp.float32) for k, v in standard.items()})


@pytest.mark.parametrize(
    ("family", "standard"),
    [
        (NORMAL, {"mean": 1e4, "precision": 1e4}),
        (NORMAL, {"mean": 3.0, "precision": 1e8}),
        (NORMAL, {"mean": 1e-3, "precision": 1e-8}),
        (GAUSSIAN, {"mean": [1e4, -1e4], "precision": 1e4 * spd(0)}),
        (GAUSSIAN, {"mean": [1.0, 2.0], "precision": 1e8 * spd(1)}),
        (GAUSSIAN, {"mean": [1.0, 2.0], "precision": np.diag([1e8, 1e-8])}),
        (FIXED, {"mean": [1e4, -1e4], "precision": 1e4 * spd(0)}),
        (FIXED, {"mean": [1.0, 2.0], "precision": 1e8 * spd(1)}),
    ],
)
def test_float32_at_hard_points(x64, family, standard):
    """As good as float32 allows: the truth is the float64 value at the same float32 lambda."""
    lam = float32(family, **standard)
    assert {x.dtype for x in jax.tree.leaves(lam)} == {jnp.dtype("float32")}
    for f, rtol in [("mean", 1e-6), ("variance", 1e-6), ("entropy", 1e-6), ("log_partition", 2e-6)]:
        found = getattr(family, f)(lam)
        assert found.dtype == jnp.float32
        close(found, getattr(family, f)(wide(lam)), rtol=rtol, atol=1e-6)
    sd = np.sqrt(family.variance(wide(lam)))
    theta = jnp.asarray(np.asarray(family.mean(wide(lam)) + sd), jnp.float32)
    # The mean is known to half a unit in its last place, in units of sd:
    blur = np.max(np.abs(np.spacing(np.asarray(family.mean(lam)))) / sd)
    close(
        family.log_prob(lam, theta),
        family.log_prob(wide(lam), wide(theta)),
        rtol=1e-6,
        atol=1e-5 + 10 * blur,
    )


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_kl_of_nearby_gaussians_keeps_its_digits_in_float32(x64, gap, scale):
    mean = np.array([1.0, -2.0])
    for family, p, q in [
        (NORMAL, {"mean": 1e2, "precision": scale}, {"mean": 1e2, "precision": scale * (1 + gap)}),
        (
            GAUSSIAN,
            {"mean": 0 * mean, "precision": scale * spd(0)},
            {"mean": 0 * mean, "precision": scale * (spd(0) + gap * spd(1))},
        ),
        (
            FIXED,
            {"mean": mean, "precision": scale * spd(0)},
            {"mean": mean + gap, "precision": scale * spd(0)},
        ),
    ]:
        lam_p, lam_q = float32(family, **p), float32(family, **q)
        truth = kl_in_numpy(family, lam_p, lam_q)
        if family is NORMAL:  # the means differ by rounding: their term is judged on its own
            lam_q = lam_q._replace(linear=lam_q.quadratic * 0)
            lam_p = lam_p._replace(linear=lam_p.quadratic * 0)
            truth = kl_in_numpy(family, lam_p, lam_q)
        blur = 0.0 if family is not FIXED else 20 * np.spacing(np.float32(2.0)) / gap
        close(family.kl(lam_p, lam_q), truth, rtol=2e-5 + blur)


def kl_in_numpy(family, lam_p, lam_q):
    """KL in float64 from the eigenvalues of S_q S_p^-1 by a series, so that nothing cancels."""
    sp, sq = (np.atleast_2d(np.asarray(family.precision(x), np.float64)) for x in (lam_p, lam_q))
    lp, lq = (np.atleast_1d(np.asarray(x.linear, np.float64)) for x in (lam_p, lam_q))
    r = np.linalg.eigvals(np.linalg.solve(sp, sq - sp)).real
    gaps = [
        sum((-x) ** k / k for k in range(2, 60)) if abs(x) < 0.3 else x - np.log1p(x) for x in r
    ]
    d = np.linalg.solve(sp, lp) - np.linalg.solve(sq, lq)
    return 0.5 * (sum(gaps) + d @ sq @ d)


def test_kl_to_a_vague_prior_is_finite_in_float32():
    """1 + ratio rounds to 0 here, the quotient of the precisions does not."""
    expected = 0.5 * (1e-9 - 1 - np.log(1e-9))
    p, q = (float32(NORMAL, mean=0.0, precision=s) for s in (1.0, 1e-9))
    close(NORMAL.kl(p, q), expected, rtol=1e-6)
    p, q = (float32(GAUSSIAN, mean=np.zeros(2), precision=s * np.eye(2)) for s in (1.0, 1e-9))
    close(GAUSSIAN.kl(p, q), 2 * expected, rtol=1e-6)


def test_kl_between_two_known_precisions(x64):
    p, q = (
        FIXED.natural(mean=jnp.asarray(MEAN), precision=jnp.asarray(s))
        for s in (SHARED, 2 * SHARED)
    )
    close(FIXED.kl(p, q), 2 - 1 - np.log(2))


# --- the solver -----------------------------------------------------------------------------------


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
class PlainGamma(Family):
    """T = (log x, x), lambda = (a - 1, -b), and nothing but the log-partition."""

    Natural: ClassVar[type] = TwoNatural
    Expectation: ClassVar[type] = TwoExpectation
    domains: ClassVar[dict] = {"shape": _domain.above(-1.0), "rate": _domain.negative()}

    def log_partition(self, lam):
        a = lam.shape + 1.0
        return jax.scipy.special.gammaln(a) - a * jnp.log(-lam.rate)


@dataclasses.dataclass(frozen=True)
class PlainPoisson(Family):
    Natural: ClassVar[type] = OneNatural
    Expectation: ClassVar[type] = OneExpectation
    domains: ClassVar[dict] = {"log_rate": _domain.real()}

    def log_partition(self, lam):
        return jnp.exp(lam.log_rate)


@dataclasses.dataclass(frozen=True)
class PlainGaussian(Family):
    Natural: ClassVar[type] = GaussianNatural
    Expectation: ClassVar[type] = GaussianExpectation
    domains: ClassVar[dict] = {"linear": _domain.real(1), "quadratic": _domain.negative_definite()}
    event_ndim: ClassVar[int] = 1

    def log_partition(self, lam):
        return formula(GAUSSIAN)(lam)


CONCENTRATIONS = np.array([1e-3, 1e-2, 0.3, 1.0, 7.0, 1e3, 1e6])


def test_solve_gamma_at_extreme_concentrations(x64):
    gamma = PlainGamma()
    for rate in (1e-3, 1.0, 1e4):
        lam = TwoNatural(jnp.asarray(CONCENTRATIONS - 1), jnp.full(CONCENTRATIONS.size, -rate))
        mu = gamma.expectation(lam)
        back, converged = gamma.natural_from_expectation(mu, with_status=True)
        assert converged.tolist() == [True] * CONCENTRATIONS.size, (rate, converged)
        # What rounding mu costs grows like the concentration.
        error = np.abs(np.asarray(back.shape + 1) / CONCENTRATIONS - 1)
        assert np.all(error < 1e-10 + 2e-14 * CONCENTRATIONS), (rate, error)
        error = np.abs(np.asarray(back.rate) / -rate - 1)
        assert np.all(error < 1e-10 + 2e-14 * CONCENTRATIONS), (rate, error)


def test_solve_in_float32_reports_where_mu_carries_no_concentration(x64):
    gamma, a = PlainGamma(), np.array([1e-2, 3.0, 1e2, 1e6])
    lam = TwoNatural(jnp.asarray(a - 1, jnp.float32), jnp.full(a.size, -2.0, jnp.float32))
    back, converged = gamma.natural_from_expectation(gamma.expectation(lam), with_status=True)
    assert converged.tolist() == [True, True, True, False]
    close(back.shape[:3] + 1, a[:3], rtol=1e-3)
    assert np.isnan(back.shape[3])


def test_solve_poisson_over_its_whole_range(x64):
    mean = jnp.asarray([1e-12, 1e-3, 1.0, 30.0, 1e6, 1e12])
    lam, converged = PlainPoisson().natural_from_expectation(OneExpectation(mean), with_status=True)
    assert bool(converged.all()), converged
    close(lam.log_rate, np.log(mean), rtol=1e-9)


def test_solve_gaussian_with_a_matrix_field(x64):
    plain = PlainGaussian()
    lam = GAUSSIAN.natural(
        mean=jnp.asarray([[1.0, 2.0], [30.0, -4.0]]), covariance=jnp.stack([spd(0), 10 * spd(1)])
    )
    mu = plain.expectation(lam)
    near(mu, GAUSSIAN.expectation(lam))
    back, converged = plain.natural_from_expectation(mu, with_status=True)
    assert converged.tolist() == [True, True]
    near(back, lam, rtol=1e-8)


@pytest.mark.parametrize(
    ("family", "lam"),
    [
        (PlainGamma(), TwoNatural(jnp.array(1.5), jnp.array(-0.7))),
        (PlainPoisson(), OneNatural(jnp.array(0.4))),
        (PlainGaussian(), GaussianNatural(jnp.asarray(MEAN), -0.5 * jnp.asarray(spd(2)))),
    ],
)
def test_derivative_of_the_solve_is_the_inverse_fisher(x64, family, lam):
    lam = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), lam)
    mu, v = family.expectation(lam), direction(family, lam, 3)
    dmu = family.fisher_product(lam, v)
    solve = family.natural_from_expectation
    pushed = jax.jit(lambda mu, dmu: jax.jvp(solve, (mu,), (dmu,)))(mu, dmu)
    near(pushed, (lam, v), rtol=1e-7, atol=1e-8)
    pulled = jax.jit(lambda mu, v: jax.vjp(solve, mu)[1](v)[0])(mu, v)  # F^-1 is symmetric
    close(family.inner(pulled, dmu), family.inner(v, v), rtol=1e-7)


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
    mu = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), mu)
    lam, status = family.natural_from_expectation(mu, with_status=True)
    assert not bool(status)
    assert not bool(family.in_domain(lam))


def test_one_bad_element_of_a_batch_leaves_the_others(x64):
    mu = TwoExpectation(jnp.array([0.1, -0.5]), jnp.array([1.0, 1.0]))
    lam, status = PlainGamma().natural_from_expectation(mu, with_status=True)
    assert status.tolist() == [False, True]
    near(
        PlainGamma().expectation(jax.tree.map(lambda x: x[1], lam)),
        jax.tree.map(lambda x: x[1], mu),
        rtol=1e-10,
    )


# --- golden numbers -------------------------------------------------------------------------------

GOLDEN = load_golden("expfam_values")["families"]
NAMES = {"normal": "normal", "multivariate_normal": "gaussian"}  # golden name -> registered name
CASES = [
    pytest.param(NAMES[name], case, id=f"{name}-{i}")
    for name, table in GOLDEN.items() if NAMES.get(name, name) in families.names()
    and NAMES.get(name, name) in ROWS for i, case in enumerate(table["cases"])
]  # fmt: skip


def cases_of(name):
    return next(table["cases"] for key, table in GOLDEN.items() if NAMES.get(key, key) == name)


def golden_natural(name, params):
    spread = (
        {"variance": params["var"]}
        if name == "normal"
        else {"covariance": jnp.asarray(params["cov"])}
    )
    return families.get(name).natural(mean=jnp.asarray(params["mean"]), **spread)


def test_golden_rows_of_both_gaussians_are_found():
    assert [case.values[0] for case in CASES] == ["normal"] * 5 + ["gaussian"] * 5


@pytest.mark.parametrize(("name", "case"), CASES)
def test_golden_values(x64, name, case):
    family = families.get(name)
    lam = family.Natural(*(jnp.asarray(x) for x in case["natural"]))
    d = np.size(case["params"]["mean"])
    # covariance -> precision costs the condition number; from lambda on we compare at 1e-12.
    condition = np.linalg.cond(np.atleast_2d(np.asarray(case["natural"][1])))
    rtol = 1e-12 + 1e-15 * condition
    scale = [np.max(np.abs(x)) for x in case["natural"]]
    for found, expected, unit in zip(
        golden_natural(name, case["params"]), case["natural"], scale, strict=True
    ):
        close(found, expected, rtol, atol=rtol * unit)
    mu = family.expectation(lam)
    for found, expected in zip(mu, case["expectation"], strict=True):
        close(found, expected, rtol, atol=rtol * np.max(np.abs(expected)))
    close(family.log_partition(lam) + d / 2 * LOG_2PI, case["log_partition"], rtol)
    close(family.entropy(lam), case["entropy"], rtol, atol=rtol)
    # theta - m is known to a rounding of m, in units of the smallest sd.
    for point in case["log_prob"]:
        x = jnp.asarray(point["x"])
        blur = (
            1e-16
            * np.max(np.abs(case["params"]["mean"]))
            * np.sqrt(np.max(np.abs(case["natural"][1])))
        )
        close(family.log_prob(lam, x), point["value"], 10 * rtol, atol=rtol + 20 * blur)
    other = next(c for c in cases_of(name) if c["params"] == case["kl"]["q_params"])["natural"]
    other = family.Natural(*(jnp.asarray(x) for x in other))
    close(family.kl(lam, other), case["kl"]["kl_p_q"], 10 * rtol)
    if "fisher" in case:
        close(family.fisher(lam), case["fisher"], rtol)
    else:
        action = case["fisher_action"]
        v = family.Natural(*(jnp.asarray(x) for x in action["dlam"]))
        for found, expected in zip(family.fisher_product(lam, v), action["dmu"], strict=True):
            close(found, expected, 10 * rtol, atol=10 * rtol * np.max(np.abs(expected)))
    solved = family.natural_from_expectation(
        family.Expectation(*(jnp.asarray(x) for x in case["expectation"]))
    )
    amplified = case.get("mu_to_lambda_relative_amplification")
    if amplified is None:
        amplified = condition * (1 + np.max(np.abs(case["expectation"][0])) ** 2)
    if amplified < 1e10:
        for found, expected, unit in zip(solved, case["natural"], scale, strict=True):
            close(found, expected, atol=1e-14 * amplified * unit)


# --- base measure ---------------------------------------------------------------------------------


@every_member
def test_base_measure_gradient_is_that_of_its_expectation(x64, row, standard):
    family, lam = row.family, natural(row, standard)
    found = family.base_measure_gradient(lam)
    assert isinstance(found, family.Natural)
    v, h = direction(family, lam, 5), 1e-6
    # d E[log h] along v is <grad_mu E[log h], F v>
    ahead, behind = (
        family.expected_log_base_measure(family.combine((1.0, lam), (t, v))) for t in (h, -h)
    )
    close(
        family.inner(found, family.fisher_product(lam, v)),
        (ahead - behind) / (2 * h),
        rtol=1e-6,
        atol=1e-7,
    )


def test_base_measure_gradient_of_the_fixed_gaussian_is_minus_lambda(x64):
    lam = natural(ROWS["gaussian_fixed"], ROWS["gaussian_fixed"].members[0])
    near(FIXED.base_measure_gradient(lam).linear, -lam.linear)
    near(Family.base_measure_gradient(FIXED, lam).linear, -lam.linear)
    assert not FIXED.base_measure_gradient(lam).precision.any()


# --- trees ----------------------------------------------------------------------------------------

TREE = {"b": np.array([0.5, -1.0]), "w": np.array([[1.0, 2.0, 3.0]])}
PRECISION = {"b": np.array([4.0, 0.5]), "w": np.array([[1.0, 2.0, 9.0]])}
HOLE = optax.MaskedNode()


def tree_natural(hole=False):
    mean, precision = (jax.tree.map(jnp.asarray, x) for x in (TREE, PRECISION))
    if hole:
        mean, precision = {**mean, "h": HOLE}, {**precision, "h": HOLE}
    return DIAGONAL.natural(mean=mean, precision=precision)


def flat_reference():
    mean, precision = (np.concatenate([x["b"].ravel(), x["w"].ravel()]) for x in (TREE, PRECISION))
    return stats.multivariate_normal(mean, np.diag(1 / precision))


@pytest.mark.parametrize("hole", [False, True])
def test_mean_field_is_a_diagonal_gaussian(x64, hole):
    lam = tree_natural(hole)
    other = DIAGONAL.combine((0.7, lam))
    assert isinstance(lam, GaussianNatural)
    near(DIAGONAL.mean(lam), {**TREE, **({"h": HOLE} if hole else {})})
    near(DIAGONAL.variance(lam)["w"], 1 / PRECISION["w"])
    near(DIAGONAL.precision(lam)["b"], PRECISION["b"])
    reference = flat_reference()
    close(DIAGONAL.entropy(lam), reference.entropy())
    theta = DIAGONAL.sample(jax.random.key(0), lam, (3, 7))
    assert jax.tree.map(jnp.shape, theta) == {
        "b": (3, 7, 2),
        "w": (3, 7, 1, 3),
        **({"h": HOLE} if hole else {}),
    }
    flat = jnp.concatenate([theta["b"], theta["w"][..., 0, :]], -1)
    log_q = DIAGONAL.log_prob(lam, theta)
    close(log_q, reference.logpdf(flat))
    close(Family.log_prob(DIAGONAL, lam, jax.tree.map(lambda x: x[0, 0], theta)), log_q[0, 0])

    def full(x):
        mean, precision = (ravel_pytree(f(x))[0] for f in (DIAGONAL.mean, DIAGONAL.precision))
        return GAUSSIAN.natural(mean=mean, precision=jnp.diag(precision))

    full_lam, full_other = full(lam), full(other)
    close(DIAGONAL.kl(lam, other), GAUSSIAN.kl(full_lam, full_other))
    close(DIAGONAL.log_partition(lam), GAUSSIAN.log_partition(full_lam))
    near(jax.grad(DIAGONAL.log_partition)(lam), GaussianNatural(*DIAGONAL.expectation(lam)))
    back, status = DIAGONAL.natural_from_expectation(DIAGONAL.expectation(lam), with_status=True)
    near(back, lam)
    assert bool(status) and bool(DIAGONAL.in_domain(lam))
    assert not bool(DIAGONAL.in_domain(DIAGONAL.combine((-1.0, lam))))
    near(DIAGONAL.natural(**DIAGONAL.standard(lam)), lam)
    near(DIAGONAL.natural_at(DIAGONAL.mean(lam), lam), lam)
    near(DIAGONAL.natural_at(DIAGONAL.mean(lam)).quadratic["b"], np.full(2, -0.5))


def test_mean_field_moves_leaf_by_leaf(x64):
    lam = tree_natural(hole=True)
    step = GaussianNatural(
        {"b": jnp.ones(2), "w": jnp.ones((1, 3)), "h": HOLE},
        {"b": jnp.array([10.0, 0.01]), "w": jnp.full((1, 3), 0.2), "h": HOLE},
    )
    new, count = DIAGONAL.safe_step(lam, step)
    assert int(count) == 1  # the first number of b
    bent = DIAGONAL.retract(lam, step)
    for leaf in ("b", "w"):
        one, d = (GaussianNatural(x.linear[leaf], x.quadratic[leaf]) for x in (lam, step))
        near(GaussianNatural(bent.linear[leaf], bent.quadratic[leaf]), NORMAL.retract(one, d))
        near(GaussianNatural(new.linear[leaf], new.quadratic[leaf]), NORMAL.safe_step(one, d)[0])
    plain = tree_natural()
    pairs = zip(ravel_pytree(plain.linear)[0], ravel_pytree(plain.quadratic)[0], strict=True)
    blocks = [NORMAL.fisher(GaussianNatural(*pair)).sum() for pair in pairs]
    close(DIAGONAL.fisher(plain).sum(), sum(blocks))


def test_mean_field_draws_differ_between_leaves_and_follow_the_path(x64):
    q = DIAGONAL.natural(mean={"a": jnp.zeros(50), "b": jnp.zeros(50)}, precision=1.0)
    draw = DIAGONAL.sample(jax.random.key(0), q)
    assert not np.any(draw["a"] == draw["b"])
    alone = DIAGONAL.natural(mean={"a": HOLE, "b": jnp.zeros(50)}, precision=1.0)
    np.testing.assert_array_equal(DIAGONAL.sample(jax.random.key(0), alone)["b"], draw["b"])


def test_mean_field_refuses_vector_families():
    with pytest.raises(ValueError, match="Gaussian is not elementwise"):
        families.MeanField(GAUSSIAN)


def test_pinned_is_its_free_part_and_a_point(x64):
    free = DIAGONAL.natural(mean={"w": jnp.ones(2), "b": HOLE}, precision=4.0)
    pinned = families.Pinned(DIAGONAL)
    lam = pinned.natural(free=free, point={"w": HOLE, "b": jnp.array([7.0])})
    near(pinned.mean(lam), {"w": np.ones(2), "b": np.array([7.0])})
    near(pinned.variance(lam), {"w": np.full(2, 0.25), "b": np.zeros(1)})
    draw = pinned.sample(jax.random.key(0), lam, (5,))
    assert draw["b"].shape == (5, 1) and np.all(draw["b"] == 7.0) and draw["w"].shape == (5, 2)
    close(pinned.log_prob(lam, draw), pinned.log_prob(lam, {**draw, "b": HOLE}))
    close(pinned.log_prob(lam, draw), DIAGONAL.log_prob(free, {"w": draw["w"], "b": HOLE}))
    close(pinned.log_prob(lam, draw), stats.norm(1, 0.5).logpdf(draw["w"]).sum(-1))
    close(pinned.entropy(lam), 2 * stats.norm(1, 0.5).entropy())
    twice = pinned.combine((1.0, lam), (1.0, lam))
    near(twice.point, lam.point)
    near(pinned.variance(twice)["w"], np.full(2, 0.125))
    close(pinned.kl(lam, twice), DIAGONAL.kl(lam.free, twice.free))
    near(pinned.expectation(lam), DIAGONAL.expectation(free))
    assert bool(pinned.in_domain(lam)) and pinned.standard(lam).keys() == {"free", "point"}


def test_raveled_is_a_gaussian_over_the_flat_vector(x64):
    theta = {"b": jnp.array(0.5), "w": jnp.array([[1.0, 2.0]])}
    raveled, cov = families.Raveled.like(GAUSSIAN, theta), spd(9, 3)
    lam = raveled.natural(mean=theta, covariance=jnp.asarray(cov))
    flat = np.array([0.5, 1.0, 2.0])
    near(raveled.natural(mean=jnp.asarray(flat), covariance=jnp.asarray(cov)), lam)
    near(raveled.mean(lam), theta)
    near(raveled.variance(lam), {"b": cov[0, 0], "w": np.diag(cov)[None, 1:]})
    near(raveled.natural_at(theta).linear, flat)
    draw = raveled.sample(jax.random.key(0), lam, (4, 6))
    assert jax.tree.map(jnp.shape, draw) == {"b": (4, 6), "w": (4, 6, 1, 2)}
    rows = np.concatenate([draw["b"][..., None], draw["w"][..., 0, :]], -1)
    reference = stats.multivariate_normal(flat, cov)
    close(raveled.log_prob(lam, draw), reference.logpdf(rows), rtol=1e-10)
    close(Family.log_prob(raveled, lam, theta), reference.logpdf(flat), rtol=1e-10)
    close(raveled.entropy(lam), reference.entropy())
    close(raveled.displace(lam, theta)["w"], GAUSSIAN.displace(lam, jnp.asarray(flat))[None, 1:])
    near(
        raveled.gradient(lam, theta, jnp.eye(3)),
        GAUSSIAN.gradient(lam, jnp.asarray(flat), jnp.eye(3)),
    )
    near(raveled.expectation(lam), GAUSSIAN.expectation(lam))


def test_raveled_log_prob_of_a_batch_of_scalars_keeps_the_sample_axes(x64):
    theta = {"a": jnp.array(0.0), "b": jnp.array(1.0)}
    raveled = families.Raveled.like(GAUSSIAN, theta)
    lam = raveled.natural_at(theta)
    assert raveled.log_prob(lam, raveled.sample(jax.random.key(0), lam, (5,))).shape == (5,)


# --- values that cannot be mixed up, and the registry ---------------------------------------------

NAMES_OF_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
IN_PLACE = ("iadd", "isub", "imul", "itruediv")
BINARY = [*(getattr(operator, name) for name in NAMES_OF_BINARY + IN_PLACE), divmod]
UNARY = (operator.neg, operator.pos, abs)


@every_row
def test_parameters_have_no_arithmetic(row):
    lam = natural(row, row.members[0])
    mu = row.family.expectation(lam)
    for x in (lam, mu):
        for op in BINARY:
            for other in (lam, mu, 2, 2.0, (1, 2), np.float64(2.0), np.ones(2), jnp.ones(2)):
                for args in ((x, other), (other, x)):
                    with pytest.raises(TypeError):
                        op(*args)
        for op in UNARY:
            with pytest.raises(TypeError):
                op(x)


def test_natural_and_expectation_types_differ_but_share_fields():
    for row in ROWS.values():
        assert row.family.Natural is not row.family.Expectation
        assert row.family.Natural._fields == row.family.Expectation._fields
        assert set(row.family.Natural._fields) == set(row.family.domains) | set(row.family.known)


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


def test_no_location_says_what_to_pass():
    with pytest.raises(ValueError, match="PlainGamma has no location: pass init="):
        PlainGamma().natural_at(jnp.zeros(()))


def test_tracing_checks_nothing_and_returns_nan_free_errors_only_eagerly():
    lam = jax.jit(lambda v: NORMAL.natural(mean=0.0, variance=v))(-1.0)
    assert not bool(NORMAL.in_domain(lam))


def test_domain_is_a_value():
    assert Domain(2, -1) == _domain.negative_definite() and Domain() == _domain.real()


# --- known fields and batches through the defaults ------------------------------------------------


@families.register("test_binomial")
class KnownTotal(families.Family):
    """A binomial that overrides nothing: total is known, and the base measure is left out."""

    Natural = collections.namedtuple("KnownTotalNatural", ["logit", "total"])
    Expectation = collections.namedtuple("KnownTotalExpectation", ["logit", "total"])
    domains: ClassVar[dict] = {"logit": families.Domain()}
    known = ("total",)

    def log_partition(self, lam):
        return lam.total * jax.nn.softplus(lam.logit)


def test_known_fields_pass_through_the_defaults(x64):
    family = families.get("test_binomial")
    lam = family.Natural(jnp.array([0.3, -2.0]), jnp.array([7.0, 3.0]))
    mu = family.expectation(lam)
    np.testing.assert_allclose(mu.logit, lam.total * jax.nn.sigmoid(lam.logit), rtol=1e-12)
    np.testing.assert_array_equal(mu.total, lam.total)
    back, converged = family.natural_from_expectation(mu, with_status=True)
    assert np.all(converged)
    np.testing.assert_allclose(back.logit, lam.logit, rtol=1e-9)
    np.testing.assert_array_equal(back.total, lam.total)
    change = family.fisher_product(lam, family.Natural(jnp.ones(2), jnp.ones(2)))
    p = jax.nn.sigmoid(lam.logit)
    np.testing.assert_allclose(change.logit, lam.total * p * (1 - p), rtol=1e-12)
    np.testing.assert_array_equal(change.total, np.zeros(2))


def test_the_solve_is_differentiable_for_batches(x64):
    family = families.get("test_binomial")
    mu = family.Expectation(jnp.array([2.0, 1.0]), jnp.array([7.0, 3.0]))

    def total(x):
        return jnp.sum(family.natural_from_expectation(mu._replace(logit=x)).logit)

    p = mu.logit / mu.total
    np.testing.assert_allclose(jax.grad(total)(mu.logit), 1 / (mu.total * p * (1 - p)), rtol=1e-9)


def test_square_root_steps_fall_back_before_the_factor_changes_sign(x64):
    normal = families.get("normal")
    lam = normal.natural(mean=0.0, precision=1.0)
    for d, wanted in ((1.0, 4.0), (3.0, 1 + 3 + 4.5), (100.0, 1 + 100 + 5000.0)):
        step = normal.Natural(jnp.array(0.0), jnp.array(-0.5 * d))
        new = normal.precision(normal.retract(lam, step, form="square_root"))
        np.testing.assert_allclose(new, wanted, rtol=1e-12)
    full = families.get("gaussian")
    lam = full.natural(mean=jnp.zeros(2), precision=jnp.eye(2))
    step = full.Natural(jnp.zeros(2), -0.5 * 100.0 * jnp.eye(2))
    new = full.precision(full.retract(lam, step, form="square_root"))
    np.testing.assert_allclose(new, 5101.0 * np.eye(2), rtol=1e-12)


def test_gaussian_broadcasts_means_against_precisions(x64):
    full = families.get("gaussian")
    lam = full.natural(mean=jnp.ones((4, 2)), precision=jnp.eye(2))
    assert full.mean(lam).shape == (4, 2)
    assert full.entropy(lam).shape == (4,)
    with pytest.raises(ValueError, match="precision must be symmetric"):
        full.natural(mean=jnp.zeros(2), precision=jnp.array([[1.0, 0.5], [0.0, 1.0]]))
