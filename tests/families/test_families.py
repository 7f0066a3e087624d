"""Every registered family against scipy, quadrature, finite differences and the definitions.

`family_rows.ROWS` drives this battery: a new family is one row.
"""

import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_rows import CONDITIONAL, CORE, ROWS, mark_slow, rows
from family_tools import (
    direction,
    flat_learnt,
    formula,
    learnt,
    natural,
    ravel_learnt,
    symmetric_projector,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from tools import close, near

from blr_optax import Posterior, families
from blr_optax.families import Family

every_row = pytest.mark.parametrize("row", rows())
# What compiles much: on a few families in every run, on all of them in the slow one.
every_row_heavy = pytest.mark.parametrize("row", rows(CORE))


def as_arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def stacked(row):
    """All members of a row in one batch."""
    return jax.tree.map(lambda *x: jnp.stack(x), *(natural(row, s) for s in row.members))


def rolled(lam):
    """Every member beside another one; known fields agree."""
    return jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), lam)


def member(lam, i):
    return jax.tree.map(lambda x: x[i], lam)


def average(p, tree):
    return jax.tree.map(lambda x: np.tensordot(p, np.asarray(x, float), 1), tree)


def test_every_registered_family_has_a_row():
    assert set(ROWS) | {"gaussian_diagonal"} | set(CONDITIONAL) == {
        name for name in families.names() if not name.startswith(("test_", "wide_"))
    }
    for name, row in ROWS.items():
        assert type(families.get(name)) is type(row.family)
        assert not row.family.location or row.family.natural_at


# --- maps -----------------------------------------------------------------------------------------


@every_row
def test_round_trips(x64, row):
    family = row.family
    for standard in row.members:
        lam = natural(row, standard)
        back = family.standard(lam)
        near(family.natural(**back), lam, rtol=1e-11, atol=1e-12)
        for name in set(standard) & set(back):
            close(back[name], standard[name], rtol=1e-11, atol=1e-12)
    lam = stacked(row)
    mu = family.expectation(lam)
    assert isinstance(lam, family.Natural) and isinstance(mu, family.Expectation)
    assert family.Natural is not family.Expectation
    assert family.Natural._fields == family.Expectation._fields
    assert set(family.Natural._fields) == set(family.domains) | set(family.known)
    solved, converged = family.natural_from_expectation(mu, with_status=True)
    near(solved, lam, rtol=1e-9, atol=1e-10)
    assert np.all(converged)
    near(family.natural_from_expectation(mu), solved, rtol=0, atol=0)


@every_row
def test_mu_and_fisher_are_the_derivatives_of_the_log_partition(x64, row):
    family = row.family

    @jax.jit
    def derivatives(lam):
        vector, to_fields = ravel_learnt(family, lam)
        plain = lambda x: formula(family)(lam._replace(**to_fields(x)))  # noqa: E731
        ruled = lambda x: family.log_partition(lam._replace(**to_fields(x)))  # noqa: E731
        first = flat_learnt(family, family.expectation(lam))
        return (
            (jax.grad(plain)(vector), jax.grad(ruled)(vector), first),
            (jax.hessian(plain)(vector), jax.hessian(ruled)(vector), family.fisher(lam)),
        )

    for standard in row.members:
        lam = natural(row, standard)
        (slope, ruled, mu), (bend, bent, fisher) = derivatives(lam)
        symmetric = symmetric_projector(family, lam)
        close(symmetric @ slope, mu, rtol=1e-9, atol=1e-9)
        close(symmetric @ ruled, mu, rtol=1e-9, atol=1e-9)
        for found in (bend, bent):
            close(symmetric @ found @ symmetric, fisher, rtol=1e-7, atol=1e-8)


@every_row
def test_fisher_products(x64, row):
    family = row.family
    lam = natural(row, row.members[0])
    v, h = direction(family, lam), 1e-5
    product = family.fisher_product(lam, v)
    close(family.fisher(lam) @ flat_learnt(family, v), flat_learnt(family, product), 1e-10, 1e-12)
    small = family.combine((h, v))
    ahead, behind = (family.expectation(family.combine((1.0, lam), (t, small))) for t in (1, -1))
    slope = (flat_learnt(family, ahead) - flat_learnt(family, behind)) / (2 * h)
    close(flat_learnt(family, product), slope, rtol=1e-5, atol=1e-5 * np.max(np.abs(slope)))
    back = family.inverse_fisher_product(lam, product)
    near(learnt(family, back), learnt(family, v), rtol=1e-9, atol=1e-10)
    assert isinstance(product, family.Expectation) and isinstance(back, family.Natural)
    for name in family.known:
        assert not np.any(getattr(product, name)) and not np.any(getattr(back, name))
    # The same of a batch, and as the derivative of mu -> lambda.
    lams, many = stacked(row), direction(family, stacked(row), 2)
    products = family.fisher_product(lams, many)
    near(
        learnt(family, family.inverse_fisher_product(lams, products)),
        learnt(family, many),
        rtol=1e-8,
        atol=1e-9,
    )
    mu = family.expectation(lams)
    zero = {name: jnp.zeros_like(getattr(mu, name)) for name in family.known}
    tangent = jax.jvp(family.natural_from_expectation, (mu,), (products._replace(**zero),))[1]
    near(learnt(family, tangent), learnt(family, many), rtol=1e-6, atol=1e-7)


# --- densities ------------------------------------------------------------------------------------


@every_row
def test_density_moments_and_entropy_against_quadrature(x64, row):
    family = row.family

    @jax.jit
    def evaluate(lam, points):
        each = jax.vmap(lambda x: (family.log_prob(lam, x), family.log_base_measure(lam, x)))
        statistics = jax.vmap(lambda x: flat_learnt(family, family.sufficient_statistics(x, lam)))
        direct = jax.vmap(lambda x: Family.log_prob(family, lam, x))(points)
        return *each(points), statistics(points), direct

    for standard in row.members:
        lam = natural(row, standard)
        points, weights = row.rule(standard)
        truth = row.logpdf(standard, points)
        log_q, log_h, t, direct = map(np.asarray, evaluate(lam, as_arrays(points)))
        p = weights * np.exp(truth)
        seen = p > 1e-30
        close(log_q[seen], truth[seen], rtol=1e-9, atol=1e-9)
        close(direct[seen], truth[seen], rtol=1e-8, atol=1e-8)
        t, log_h = t[seen], log_h[seen]
        points = jax.tree.map(lambda x, seen=seen: np.asarray(x)[seen], points)
        p, truth = p[seen], truth[seen]
        close(p.sum(), 1.0, rtol=1e-8)
        mu = flat_learnt(family, family.expectation(lam))
        close(p @ t, mu, rtol=1e-7, atol=1e-7)
        fisher = (p[:, None] * (t - p @ t)).T @ (t - p @ t)
        close(family.fisher(lam), fisher, rtol=1e-6, atol=1e-6)
        values = row.moment(points)
        mean = average(p, values)
        spread = average(
            p, jax.tree.map(lambda x, m: (np.asarray(x, float) - m) ** 2, values, mean)
        )
        near(family.mean(lam), mean, rtol=1e-7, atol=1e-8)
        near(family.variance(lam), spread, rtol=1e-6, atol=1e-8)
        close(family.entropy(lam), -p @ truth, rtol=1e-7, atol=1e-8)
        close(Family.entropy(family, lam), family.entropy(lam), rtol=1e-8, atol=1e-9)
        close(family.expected_log_base_measure(lam), p @ log_h, rtol=1e-7, atol=1e-9)


@every_row
def test_kl_is_the_expected_log_ratio(x64, row):
    family, lam = row.family, stacked(row)
    others = rolled(lam)
    found = family.kl(lam, others)
    for i, standard in enumerate(row.members):
        points, weights = row.rule(standard)
        log_p, log_q = (row.logpdf(s, points) for s in (standard, row.members[i - 1]))
        p = weights * np.exp(log_p)
        seen = p > 1e-30
        close(found[i], p[seen] @ (log_p[seen] - log_q[seen]), rtol=1e-6, atol=1e-9)
    assert np.all(found > 0)
    close(Family.kl(family, lam, others), found, rtol=1e-7, atol=1e-9)
    close(family.kl(lam, lam), 0.0, atol=1e-14)


@every_row
def test_kl_near_the_diagonal_is_half_the_fisher_norm(x64, row):
    family = row.family

    @jax.jit
    def bend(lam, v):
        along = lambda t: family.kl(lam, family.combine((1.0, lam), (t, v)))  # noqa: E731
        norm = family.inner(v, family.fisher_product(lam, v))
        return along(1e-6), jax.jvp(jax.grad(along), (0.0,), (1.0,)), norm

    for standard in row.members:
        lam = natural(row, standard)
        size = np.sqrt(sum(jnp.sum(x**2) for x in learnt(family, lam).values())) + 0.1
        v = family.combine((size, direction(family, lam)))
        value, (slope, curvature), norm = bend(lam, v)
        close(slope, 0.0, atol=1e-12 * (1 + norm))
        close(curvature, norm, rtol=1e-8)
        close(value, 0.5e-12 * norm, rtol=2e-3, atol=1e-15)


# --- samples --------------------------------------------------------------------------------------


@every_row
def test_samples_have_the_moments_and_shape(x64, row):
    family, lam = row.family, natural(row, row.members[0])
    draws = jax.jit(lambda k: family.sample(k, lam, (4, 5000)))(jax.random.key(0))
    one = jax.jit(lambda k: family.sample(k, lam))(jax.random.key(0))
    jax.tree.map(
        lambda many, x: np.testing.assert_equal(many.shape, (4, 5000, *x.shape)), draws, one
    )
    x = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), draws)
    assert np.all(np.isfinite(family.log_prob(lam, x)))
    t = jax.vmap(lambda x: flat_learnt(family, family.sufficient_statistics(x, lam)))(x)
    error = np.std(t, axis=0) / np.sqrt(len(t))
    assert np.all(np.abs(t.mean(0) - flat_learnt(family, family.expectation(lam))) < 5 * error)
    values = row.moment(x)

    def check(v, mean):
        v = np.asarray(v, float)
        assert np.all(np.abs(v.mean(0) - mean) <= 5 * v.std(0) / np.sqrt(len(v)) + 1e-12)

    jax.tree.map(check, values, family.mean(lam))
    batched = family.sample(jax.random.key(1), stacked(row), (3,))
    event = jax.tree.map(jnp.shape, one)
    assert jax.tree.map(lambda v: v.shape, batched) == jax.tree.map(
        lambda s: (3, len(row.members), *s), event, is_leaf=lambda s: type(s) is tuple
    )


@pytest.mark.parametrize("row", rows(flag="reparameterized"))
def test_samples_carry_gradients(x64, row):
    """d/d lambda E_q[<a, T(theta)>] through the sampler is F a."""
    family, lam = row.family, natural(row, row.members[0])
    a = direction(family, lam, 4)

    def drawn(key, lam):
        return family.inner(a, family.sufficient_statistics(family.sample(key, lam), lam))

    keys = jax.random.split(jax.random.key(1), 10_000)
    draws = jax.jit(jax.vmap(lambda k: flat_learnt(family, jax.grad(drawn, 1)(k, lam))))(keys)
    truth = flat_learnt(family, family.fisher_product(lam, a))
    draws = np.asarray(draws @ symmetric_projector(family, lam))
    assert np.all(np.isfinite(draws))
    assert np.all(np.abs(draws.mean(0) - truth) < 5 * draws.std(0) / np.sqrt(len(keys)) + 1e-10)


# --- as arrays and functions ----------------------------------------------------------------------


def everything(family):
    """All functions of one lambda, another one and a theta: what must batch, trace and narrow."""

    def evaluate(a, b, x):
        mu = family.expectation(a)
        return {
            "log_partition": family.log_partition(a),
            "expectation": learnt(family, mu),
            "log_prob": family.log_prob(a, x),
            "entropy": family.entropy(a),
            "expected_log_base_measure": family.expected_log_base_measure(a),
            "kl": family.kl(a, b),
            "mean": family.mean(a),
            "variance": family.variance(a),
            "standard": family.standard(a),
            "statistics": family.sufficient_statistics(x, a),
            "inner": family.inner(a, b),
            "solve": family.natural_from_expectation(mu, with_status=True),
            "fisher_product": family.fisher_product(a, b),
            "inverse_fisher_product": family.inverse_fisher_product(a, family.fisher_product(a, b)),
            "in_domain": family.in_domain(a),
            "retract": family.retract(a, b),
            "base_measure_gradient": family.base_measure_gradient(a),
            "natural_at": family.natural_at(x, a) if family.location else (),
        }

    return evaluate


def arguments(row):
    lam = stacked(row)
    return lam, rolled(lam), row.family.sample(jax.random.key(3), lam)


@every_row_heavy
def test_batch_equals_loop_and_jit_equals_eager(x64, row):
    family, args = row.family, arguments(row)
    evaluate = everything(family)
    one_by_one = jax.jit(evaluate)
    loop = jax.tree.map(
        lambda *x: jnp.stack(x), *(one_by_one(*member(args, i)) for i in range(len(row.members)))
    )
    fisher = jnp.stack([family.fisher(member(args[0], i)) for i in range(len(row.members))])
    close(family.fisher(args[0]), fisher, rtol=1e-10, atol=1e-11)
    for found in (evaluate(*args), jax.jit(jax.vmap(evaluate))(*args)):
        for name in loop:
            agree = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10, err_msg=name)
            jax.tree.map(agree, found[name], loop[name])


@every_row_heavy
def test_float32_stays_float32_and_agrees(x64, row):
    """The truth is the float64 value at the same float32 lambda."""
    family, args = row.family, arguments(row)
    narrow = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.integer)
                          else x.astype(jnp.float32), args)  # fmt: skip
    wide = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.integer)
                        else x.astype(jnp.float64), narrow)  # fmt: skip
    found = jax.jit(everything(family))(*narrow)
    truth = jax.jit(everything(family))(*wide)
    floats = [x.dtype for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
    for name in found:
        scale = max((float(jnp.max(jnp.abs(x), initial=0.0)) for x in jax.tree.leaves(truth[name])
                     if jnp.issubdtype(x.dtype, jnp.floating)), default=0.0)  # fmt: skip
        rtol = (
            1e-2 if name in ("solve", "inverse_fisher_product", "base_measure_gradient") else 1e-4
        )
        agree = partial(np.testing.assert_allclose, rtol=rtol, atol=rtol * scale, err_msg=name)
        jax.tree.map(agree, found[name], truth[name])
    drawn = family.sample(jax.random.key(0), narrow[0])
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(drawn))


@every_row_heavy
def test_twice_differentiable(x64, row):
    """Gradients and Hessian products are the finite differences of values and gradients."""
    family = row.family
    names = ("log_partition", "log_prob", "entropy", "kl", "mean", "variance")
    lam, other, theta = member(arguments(row), 0)
    start, unravel = ravel_pytree((learnt(family, lam), learnt(family, other)))
    weights = jnp.asarray(np.random.default_rng(0).uniform(1, 2, 64))

    def total(flat):
        x, y = unravel(flat)
        a, b = lam._replace(**x), other._replace(**y)
        values = {
            "log_partition": family.log_partition(a),
            "log_prob": family.log_prob(a, theta),
            "entropy": family.entropy(a),
            "kl": family.kl(a, b),
            "mean": family.mean(a),
            "variance": family.variance(a),
        }
        flat = ravel_pytree([values[name] for name in names])[0]
        return jnp.sum(weights[: flat.size] * flat)

    v = jnp.asarray(np.random.default_rng(1).normal(size=start.size)) * (0.1 + jnp.abs(start))
    both = jax.jit(lambda t: jax.value_and_grad(total)(start + t * v))
    curvature = jax.jit(lambda: jax.jvp(jax.grad(total), (start,), (v,))[1])()
    h = 1e-5
    (ahead, slope_ahead), (behind, slope_behind) = both(h), both(-h)
    slope = both(0.0)[1]
    close(slope @ v, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)
    bent = (slope_ahead - slope_behind) / (2 * h)
    close(curvature, bent, rtol=1e-4, atol=1e-5 * (1 + np.max(np.abs(bent))))


# --- domains and steps ----------------------------------------------------------------------------


@every_row
def test_domain_and_bad_parameters(row):
    with jax.enable_x64(True):
        assert all(bool(row.family.in_domain(natural(row, s))) for s in row.members)
        assert not any(bool(row.family.in_domain(as_arrays(lam))) for lam in row.outside)
    assert row.bad
    for name, standard in row.bad:
        with pytest.raises(ValueError, match=name):
            row.family.natural(**standard)


FORMS = ("improved", "improved_old", "square_root")
RETRACTIONS = [
    pytest.param(name, form, id=f"{name}-{form}" if form else name, marks=mark_slow(name, CORE))
    for name in ROWS
    for form in (FORMS if name in ("normal", "gaussian") else (None,))
]
exponents = st.floats(-30, 30)


def retraction(name, form):
    return partial(ROWS[name].family.retract, **({"form": form} if form else {}))


@pytest.mark.parametrize(("name", "form"), RETRACTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_retract_stays_inside_for_steps_of_any_size(x64, name, form, dtype):
    row = ROWS[name]
    family = row.family
    lam = jax.tree.map(lambda x: jnp.asarray(x, dtype), natural(row, row.members[0]))

    @jax.jit
    def move(seed, sizes):
        step = {}
        keys = jax.random.split(jax.random.key(seed), len(family.domains))
        for key, size, (field, domain) in zip(keys, sizes, family.domains.items(), strict=True):
            x = jax.random.normal(key, jnp.shape(getattr(lam, field)), dtype)
            x = (x + x.T) / 2 if domain.event_ndim == 2 else x
            step[field] = x * size.astype(dtype)
        new = retraction(name, form)(lam, jax.tree.map(jnp.zeros_like, lam)._replace(**step))
        return new, family.in_domain(new)

    # With the old precision the mean itself leaves the range of float32.
    reach = 12 if dtype == jnp.float32 and form in ("improved_old", "square_root") else 30
    count = len(family.domains)

    @given(
        st.integers(0, 2**16),
        st.lists(exponents, min_size=count, max_size=count),
        st.sampled_from([-1.0, 1.0]),
    )
    def check(seed, sizes, sign):
        sizes = sign * 10.0 ** jnp.minimum(jnp.asarray(sizes), reach)
        new, inside = move(seed, sizes)
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
        value, slope = jax.jvp(partial(retraction(name, form), lam), (zero,), (step,))
        near(value, lam, rtol=1e-11, atol=1e-12)
        near(slope, step, rtol=1e-8, atol=1e-8)


@every_row
def test_safe_step_is_plain_inside_and_retracts_outside(x64, row):
    family, lam = row.family, natural(row, row.members[0])
    small = family.combine((1e-3, direction(family, lam)))
    new, count = family.safe_step(lam, small)
    near(new, family.combine((1.0, lam), (1.0, small)), rtol=0)
    assert int(count) == 0
    mirrored = family.combine((-1e3, lam))  # far to the other side of zero
    large = mirrored._replace(**{k: -1e3 * (abs(x) + 1) * d.sign if d.event_ndim < 2 else
                                 getattr(mirrored, k) for (k, d), x in
                                 zip(family.domains.items(), learnt(family, lam).values(),
                                     strict=True)})  # fmt: skip
    plain = family.combine((1.0, lam), (1.0, large))
    bounded = not bool(family.in_domain(plain))
    assert bounded == any(d.sign for d in family.domains.values())
    new, count = family.safe_step(lam, large)
    near(new, family.retract(lam, large) if bounded else plain, rtol=0)
    assert int(count) == bounded and bool(family.in_domain(new))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), small, large)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), lam)
    _, count = family.safe_step(twice, both)
    assert int(count) == bounded


@every_row
def test_base_measure_gradient_is_that_of_its_expectation(x64, row):
    family, lam = row.family, stacked(row)
    found = family.base_measure_gradient(lam)
    assert isinstance(found, family.Natural)
    v = direction(family, lam, 5)
    # d E[log h] along v is <grad_mu E[log h], F v>
    slope = jax.jvp(
        lambda t: family.expected_log_base_measure(family.combine((1.0, lam), (t, v))),
        (0.0,), (1.0,))[1]  # fmt: skip
    actual = family.inner(found, family.fisher_product(lam, v))
    close(actual, slope, rtol=1e-6, atol=1e-8)


# --- properties of random members -----------------------------------------------------------------


@every_row_heavy
def test_properties_of_random_members(x64, row):
    """Duality, positivity and posterior arithmetic at members reached by random steps."""
    family = row.family
    start = natural(row, row.members[0])
    known = learnt(family, start)

    def wander(key, size):
        keys = jax.random.split(key, len(known))
        step = {}
        for k, (name, x) in zip(keys, known.items(), strict=True):
            z = jax.random.normal(k, x.shape) * (0.3 + jnp.abs(x))
            step[name] = size * ((z + z.T) / 2 if family.domains[name].event_ndim == 2 else z)
        return family.retract(start, jax.tree.map(jnp.zeros_like, start)._replace(**step))

    @jax.jit
    def measure(seed, size):
        k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
        a, b = wander(k1, size), wander(k2, size)
        mu = family.expectation(a)
        solved, converged = family.natural_from_expectation(mu, with_status=True)
        again = family.expectation(solved)
        v = direction(family, a)
        bound = family.inner(v, family.fisher_product(a, v))
        exponent = family.inner(a, mu)
        parts = family.log_partition(a) - exponent - family.expected_log_base_measure(a)
        product = Posterior(family, a) * Posterior(family, b) / Posterior(family, b)
        return {
            "inside": family.in_domain(a) & family.in_domain(b),
            "converged": converged,
            "duality": [flat_learnt(family, x) for x in (again, mu)],
            "entropy": (family.entropy(a), parts, 1 + jnp.abs(exponent)),
            "kl": (family.kl(a, b), family.kl(a, a)),
            "fisher": bound,
            "product": (product.natural, a),
            "sample": family.log_prob(a, family.sample(k3, a)),
        }

    @settings(max_examples=15)
    @given(st.integers(0, 2**16), st.floats(-2, 0.5))
    def check(seed, exponent):
        found = measure(seed, 10.0**exponent)
        assert bool(found["inside"]) and bool(found["converged"])
        again, mu = found["duality"]
        close(again, mu, rtol=1e-7, atol=1e-8 * (1 + np.max(np.abs(mu))))
        entropy, parts, scale = found["entropy"]
        close(entropy, parts, rtol=1e-8, atol=1e-9 * scale)
        assert found["kl"][0] >= 0 and abs(found["kl"][1]) < 1e-10
        assert found["fisher"] > 0
        near(*found["product"], rtol=1e-9, atol=1e-9)
        assert np.isfinite(found["sample"])

    check()


# --- values that cannot be mixed up ---------------------------------------------------------------

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
