"""Every registered family against scipy, quadrature, finite differences and the definitions.

`family_rows.ROWS` drives this battery: a new family is one row. The members of a row go through
one program together, and what is compared is compared in numpy.
"""

import functools
import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_rows import CONDITIONAL, ROWS, rows
from family_tools import (
    direction,
    flat,
    flat_learnt,
    formula,
    learnt,
    member,
    program,
    ravel_learnt,
    stacked,
    standards,
    symmetric_projector,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import close, near

from blr_optax import Distribution, families
from blr_optax.families import ExponentialFamily

every_row = pytest.mark.parametrize("row", rows())


def numbers(tree):
    return jax.tree.map(np.asarray, tree)


def rolled(lam):
    """Every member beside another one; known fields agree."""
    return jax.tree.map(lambda x: np.roll(x, 1, axis=0), lam)


def directions(row, seed=0):
    """For every member the direction that it has on its own."""
    lam = stacked(row)
    each = [numbers(direction(row.family, member(lam, i), seed)) for i in range(len(row.members))]
    return jax.tree.map(lambda *x: np.stack(x), *each)


def zeros(lam):
    return jax.tree.map(np.zeros_like, lam)


def move(family, lam, step):
    """lambda + step in numpy; known fields stay."""
    return lam._replace(**{k: getattr(lam, k) + getattr(step, k) for k in family.domains})


def scaled(a, step):
    return jax.tree.map(lambda x: a * x, step)


def average(p, tree):
    return jax.tree.map(lambda x: np.tensordot(p, np.asarray(x, float), 1), tree)


@functools.cache
def facts(row):
    """What a family says about each member of a row, along a leading axis: one program."""
    family = row.family

    def each(lam):
        mu = family.expectation(lam)
        return {
            "mu": flat_learnt(family, mu),
            "fisher": family.fisher(lam),
            "mean": family.mean(lam),
            "variance": family.variance(lam),
            "entropy": family.entropy(lam),
            "default_entropy": ExponentialFamily.entropy(family, lam),
            "expected_log_base_measure": family.expected_log_base_measure(lam),
        }

    def pairs(first, second):
        return {
            "kl": family.kl(first, second),
            "default_kl": ExponentialFamily.kl(family, first, second),
        }

    lam = stacked(row)
    # Every member with another one, then with itself.
    second = jax.tree.map(lambda a, b: np.concatenate([a, b]), rolled(lam), lam)
    first = jax.tree.map(lambda a: np.concatenate([a, a]), lam)
    with jax.enable_x64(True):
        one_program = jax.jit(lambda a, *pair: {**jax.vmap(each)(a), **pairs(*pair)})
        return numbers(one_program(lam, first, second))


@functools.cache
def integral(row, i):
    """(points, weights, log density there) of a member, by its quadrature rule."""
    points, weights = row.rule(row.members[i])
    return numbers(points), weights, row.logpdf(row.members[i], points)


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

    def each(standard):
        lam = family.natural(**standard)
        back = family.standard(lam)
        return lam, back, family.natural(**back)

    @jax.jit
    def travel(standard):
        lam = family.natural(**standard)
        mu = family.expectation(lam)
        solved, converged = family.natural_from_expectation(mu, with_status=True)
        alone = family.natural_from_expectation(mu)
        return jax.vmap(each)(standard), lam, mu, solved, converged, alone

    standard = standards(row)
    (one_by_one, back, again), lam, mu, solved, converged, alone = numbers(travel(standard))
    near(again, one_by_one, rtol=1e-11, atol=1e-12)
    near(lam, one_by_one, rtol=1e-11, atol=1e-12)
    for name in set(standard) & set(back):
        close(back[name], standard[name], rtol=1e-11, atol=1e-12)
    assert isinstance(lam, family.Natural) and isinstance(mu, family.Expectation)
    assert family.Natural is not family.Expectation
    assert family.Natural._fields == family.Expectation._fields
    assert set(family.Natural._fields) == set(family.domains) | set(family.known)
    near(solved, lam, rtol=1e-9, atol=1e-10)
    assert np.all(converged)
    near(alone, solved, rtol=0, atol=0)


@every_row
def test_mu_and_fisher_are_the_derivatives_of_the_log_partition(x64, row):
    family = row.family

    def derivatives(lam):
        vector, to_fields = ravel_learnt(family, lam)
        plain = lambda x: formula(family)(lam._replace(**to_fields(x)))  # noqa: E731
        ruled = lambda x: family.log_partition(lam._replace(**to_fields(x)))  # noqa: E731
        both = lambda f: jax.jacfwd(lambda x: (jax.grad(f)(x),) * 2, has_aux=True)  # noqa: E731
        return both(plain)(vector), both(ruled)(vector)

    lam = stacked(row)
    found = numbers(jax.jit(jax.vmap(derivatives))(lam))
    symmetric = symmetric_projector(family, member(lam, 0))
    for i in range(len(row.members)):
        for bend, slope in member(found, i):
            close(symmetric @ slope, facts(row)["mu"][i], rtol=1e-9, atol=1e-9)
            close(symmetric @ bend @ symmetric, facts(row)["fisher"][i], rtol=1e-7, atol=1e-8)


@every_row
def test_fisher_products(x64, row):
    family, lams = row.family, stacked(row)
    lam, h = member(lams, 0), 1e-5
    v, many = numbers(direction(family, lam)), numbers(direction(family, lams, 2))
    small = scaled(h, v)

    @jax.jit
    def evaluate(lam, ahead, behind, v, lams, many):
        product, products = family.fisher_product(lam, v), family.fisher_product(lams, many)
        mu = family.expectation(lams)
        zero = {name: jnp.zeros_like(getattr(mu, name)) for name in family.known}
        tangent = jax.jvp(family.natural_from_expectation, (mu,), (products._replace(**zero),))[1]
        return (
            (product, family.inverse_fisher_product(lam, product)),
            (family.expectation(ahead), family.expectation(behind)),
            (family.inverse_fisher_product(lams, products), tangent),
        )

    ahead, behind = move(family, lam, small), move(family, lam, scaled(-1.0, small))
    (product, back), mus, (backs, tangent) = numbers(evaluate(lam, ahead, behind, v, lams, many))
    close(facts(row)["fisher"][0] @ flat(family, v), flat(family, product), 1e-10, 1e-12)
    slope = (flat(family, mus[0]) - flat(family, mus[1])) / (2 * h)
    close(flat(family, product), slope, rtol=1e-5, atol=1e-5 * np.max(np.abs(slope)))
    near(learnt(family, back), learnt(family, v), rtol=1e-9, atol=1e-10)
    assert isinstance(product, family.Expectation) and isinstance(back, family.Natural)
    for name in family.known:
        assert not np.any(getattr(product, name)) and not np.any(getattr(back, name))
    # The same of a batch, and as the derivative of mu -> lambda.
    near(learnt(family, backs), learnt(family, many), rtol=1e-8, atol=1e-9)
    near(learnt(family, tangent), learnt(family, many), rtol=1e-6, atol=1e-7)


# --- densities ------------------------------------------------------------------------------------


def padded(points, size):
    """Points of a rule, the last one repeated: the rules of a row share a program."""
    return jax.tree.map(
        lambda x: np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)]), points
    )


@every_row
def test_density_moments_and_entropy_against_quadrature(x64, row):
    family = row.family

    @jax.jit
    def evaluate(lam, points):
        each = jax.vmap(lambda x: (family.log_prob(lam, x), family.log_base_measure(lam, x)))
        statistics = jax.vmap(lambda x: flat_learnt(family, family.sufficient_statistics(x, lam)))
        direct = jax.vmap(lambda x: ExponentialFamily.log_prob(family, lam, x))(points)
        return *each(points), statistics(points), direct

    size = max(len(integral(row, i)[1]) for i in range(len(row.members)))
    for i in range(len(row.members)):
        (points, weights, truth), lam = integral(row, i), member(stacked(row), i)
        said = member(facts(row), i)
        found = numbers(evaluate(lam, padded(points, size)))
        log_q, log_h, t, direct = (x[: len(weights)] for x in found)
        p = weights * np.exp(truth)
        seen = p > 1e-30
        close(log_q[seen], truth[seen], rtol=1e-9, atol=1e-9)
        close(direct[seen], truth[seen], rtol=1e-8, atol=1e-8)
        t, log_h = t[seen], log_h[seen]
        points = jax.tree.map(lambda x, seen=seen: x[seen], points)
        p, truth = p[seen], truth[seen]
        close(p.sum(), 1.0, rtol=1e-8)
        close(p @ t, said["mu"], rtol=1e-7, atol=1e-7)
        fisher = (p[:, None] * (t - p @ t)).T @ (t - p @ t)
        close(said["fisher"], fisher, rtol=1e-6, atol=1e-6)
        values = row.moment(points)
        mean = average(p, values)
        spread = average(
            p, jax.tree.map(lambda x, m: (np.asarray(x, float) - m) ** 2, values, mean)
        )
        near(said["mean"], mean, rtol=1e-7, atol=1e-8)
        near(said["variance"], spread, rtol=1e-6, atol=1e-8)
        close(said["entropy"], -p @ truth, rtol=1e-7, atol=1e-8)
        close(said["default_entropy"], said["entropy"], rtol=1e-8, atol=1e-9)
        close(said["expected_log_base_measure"], p @ log_h, rtol=1e-7, atol=1e-9)


@every_row
def test_kl_is_the_expected_log_ratio(x64, row):
    found, itself = np.split(facts(row)["kl"], 2)
    for i in range(len(row.members)):
        points, weights, log_p = integral(row, i)
        log_q = row.logpdf(row.members[i - 1], points)
        p = weights * np.exp(log_p)
        seen = p > 1e-30
        close(found[i], p[seen] @ (log_p[seen] - log_q[seen]), rtol=1e-6, atol=1e-9)
    assert np.all(found > 0)
    close(np.split(facts(row)["default_kl"], 2)[0], found, rtol=1e-7, atol=1e-9)
    close(itself, 0.0, atol=1e-14)


@every_row
def test_kl_near_the_diagonal_is_half_the_fisher_norm(x64, row):
    family, lam = row.family, stacked(row)

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0, 0))
    def bend(t, lam, v):
        along = lambda t: family.kl(lam, family.combine((1.0, lam), (t, v)))  # noqa: E731
        norm = family.inner(v, family.fisher_product(lam, v))
        return *jax.jvp(jax.value_and_grad(along), (t,), (1.0,)), norm

    lengths = [np.linalg.norm(flat(family, member(lam, i))) for i in range(len(row.members))]
    size = np.asarray(lengths) + 0.1
    v = jax.tree.map(lambda x: size.reshape(-1, *[1] * (x.ndim - 1)) * x, directions(row))
    beside, here = (numbers(bend(t, lam, v)) for t in (1e-6, 0.0))
    for i in range(len(row.members)):
        value = beside[0][0][i]
        (_, slope), (_, curvature), norm = member(here, i)
        close(slope, 0.0, atol=1e-12 * (1 + norm))
        close(curvature, norm, rtol=1e-8)
        close(value, 0.5e-12 * norm, rtol=2e-3, atol=1e-15)


# --- samples --------------------------------------------------------------------------------------


@every_row
def test_samples_have_the_moments_and_shape(x64, row):
    family = row.family

    def draw(lam, shape=()):
        return family.sample(jax.random.key(0), lam, shape)

    @jax.jit
    def measure(lam):
        many = draw(lam, (4, 5000))
        x = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), many)
        t = jax.vmap(lambda x: flat_learnt(family, family.sufficient_statistics(x, lam)))(x)
        return many, family.log_prob(lam, x), t

    draws, log_q, t = numbers(measure(member(stacked(row), 0)))
    one = jax.eval_shape(draw, member(stacked(row), 0))
    batched = jax.eval_shape(lambda lam: draw(lam, (3,)), stacked(row))
    jax.tree.map(
        lambda many, x: np.testing.assert_equal(many.shape, (4, 5000, *x.shape)), draws, one
    )
    x = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), draws)
    assert np.all(np.isfinite(log_q))
    error = np.std(t, axis=0) / np.sqrt(len(t))
    assert np.all(np.abs(t.mean(0) - facts(row)["mu"][0]) < 5 * error)
    values = row.moment(x)

    def check(v, mean):
        v = np.asarray(v, float)
        assert np.all(np.abs(v.mean(0) - mean) <= 5 * v.std(0) / np.sqrt(len(v)) + 1e-12)

    jax.tree.map(check, values, member(facts(row)["mean"], 0))
    jax.tree.map(
        lambda many, x: np.testing.assert_equal(many.shape, (3, len(row.members), *x.shape)),
        batched,
        one,
    )


@pytest.mark.parametrize("row", rows(flag="reparameterized"))
def test_samples_carry_gradients(x64, row):
    """d/d lambda E_q[<a, T(theta)>] through the sampler is F a."""
    family, lam = row.family, member(stacked(row), 0)
    a = numbers(direction(family, lam, 4))

    def drawn(key, lam):
        return family.inner(a, family.sufficient_statistics(family.sample(key, lam), lam))

    @jax.jit
    def draw(lam):
        keys = jax.random.split(jax.random.key(1), 10_000)
        one = lambda k: flat_learnt(family, jax.grad(drawn, 1)(k, lam))  # noqa: E731
        return jax.vmap(one)(keys), flat_learnt(family, family.fisher_product(lam, a))

    draws, truth = numbers(draw(lam))
    draws = draws @ symmetric_projector(family, lam)
    assert np.all(np.isfinite(draws))
    assert np.all(np.abs(draws.mean(0) - truth) < 5 * draws.std(0) / np.sqrt(len(draws)) + 1e-10)


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


@functools.cache
def compiled(row):
    return jax.jit(everything(row.family))


@functools.cache
def vmapped(row):
    return jax.jit(jax.vmap(everything(row.family)))


@functools.cache
def arguments(row):
    lam = stacked(row)
    with jax.enable_x64(True):
        theta = program(row.family.sample)(jax.random.key(3), lam)
    return lam, rolled(lam), numbers(theta)


def cast(tree, dtype):
    return jax.tree.map(
        lambda x: x if np.issubdtype(x.dtype, np.integer) else x.astype(dtype), tree
    )


# --- domains and steps ----------------------------------------------------------------------------


@every_row
def test_domain_and_bad_parameters(row):
    family = row.family
    with jax.enable_x64(True):
        near(family.natural(**standards(row)), stacked(row))
        assert np.all(program(family.in_domain)(stacked(row)))
        outside = jax.tree.map(lambda *x: np.stack(np.asarray(x, float)), *row.outside)
        assert not np.any(program(family.in_domain)(outside))
    assert row.bad
    for name, standard in row.bad:
        with pytest.raises(ValueError, match=name):
            family.natural(**standard)


FORMS = ("improved", "improved_old", "square_root")
every_retraction = pytest.mark.parametrize(
    ("row", "form"),
    rows(variants=lambda name, _: FORMS if name in ("normal", "gaussian") else (None,)),
)
exponents = st.floats(-30, 30)


def retraction(row, form):
    return partial(row.family.retract, **({"form": form} if form else {}))


@every_retraction
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_retract_stays_inside_for_steps_of_any_size(x64, row, form, dtype):
    family, lam = row.family, cast(member(stacked(row), 0), dtype)

    @jax.jit
    def moved(step):
        new = retraction(row, form)(jax.tree.map(jnp.asarray, lam), step)
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
        step = direction(family, lam, seed)._asdict()
        for name, size in zip(family.domains, sizes, strict=True):
            size = dtype(sign * 10.0 ** min(size, reach))
            step[name] = size * np.asarray(step[name])
        new, inside = moved(family.Natural(**step))
        assert bool(inside), new
        assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(dtype)}

    check()


@every_retraction
def test_retract_is_the_plain_step_to_first_order(x64, row, form):
    lam, step = stacked(row), directions(row, 1)

    @jax.jit
    @jax.vmap
    def at_zero(lam, step):
        zero = jax.tree.map(jnp.zeros_like, lam)
        return jax.jvp(partial(retraction(row, form), lam), (zero,), (step,))

    value, slope = at_zero(lam, step)
    near(value, lam, rtol=1e-11, atol=1e-12)
    near(slope, step, rtol=1e-8, atol=1e-8)


@every_row
def test_safe_step_is_plain_inside_and_retracts_outside(x64, row):
    family, lam = row.family, member(stacked(row), 0)

    @jax.jit
    def take(lam, step):
        new, count = family.safe_step(lam, step)
        plain = family.combine((1.0, lam), (1.0, step))
        inside = family.in_domain(plain), family.in_domain(new)
        return new, count, plain, family.retract(lam, step), *inside

    small = scaled(1e-3, numbers(direction(family, lam)))
    mirrored = scaled(-1e3, lam)  # far to the other side of zero
    large = mirrored._replace(**{k: -1e3 * (abs(x) + 1) * d.sign if d.event_ndim < 2 else
                                 getattr(mirrored, k) for (k, d), x in
                                 zip(family.domains.items(), learnt(family, lam).values(),
                                     strict=True)})  # fmt: skip
    new, count, plain, *_ = numbers(take(lam, small))
    near(new, plain, rtol=0)
    assert int(count) == 0
    new, count, plain, retracted, inside, safe = numbers(take(lam, large))
    bounded = not bool(inside)
    assert bounded == any(d.sign for d in family.domains.values())
    near(new, retracted if bounded else plain, rtol=0)
    assert int(count) == bounded and bool(safe)
    both = jax.tree.map(lambda a, b: np.stack([a, b]), small, large)
    twice = jax.tree.map(lambda x: np.stack([x, x]), lam)
    assert int(jax.jit(lambda *x: family.safe_step(*x)[1])(twice, both)) == bounded


@every_row
def test_base_measure_gradient_is_that_of_its_expectation(x64, row):
    family, lam = row.family, stacked(row)
    v = numbers(direction(family, lam, 5))

    @jax.jit
    def evaluate(lam, v):
        found = family.base_measure_gradient(lam)
        slope = jax.jvp(
            lambda t: family.expected_log_base_measure(family.combine((1.0, lam), (t, v))),
            (0.0,), (1.0,))[1]  # fmt: skip
        return found, slope, family.inner(found, family.fisher_product(lam, v))

    # d E[log h] along v is <grad_mu E[log h], F v>
    found, slope, actual = evaluate(lam, v)
    assert isinstance(found, family.Natural)
    close(actual, slope, rtol=1e-6, atol=1e-8)


# --- properties of random members -----------------------------------------------------------------


@every_row
def test_properties_of_random_members(x64, row):
    """Duality, positivity and posterior arithmetic at members reached by random steps."""
    family = row.family
    start = jax.tree.map(jnp.asarray, member(stacked(row), 0))
    known = learnt(family, start)

    def wander(normals, size):
        step = {}
        for name, x in known.items():
            z = normals[name] * (0.3 + jnp.abs(x))
            step[name] = size * ((z + z.T) / 2 if family.domains[name].event_ndim == 2 else z)
        return family.retract(start, jax.tree.map(jnp.zeros_like, start)._replace(**step))

    @jax.jit
    def measure(seed, normals, size):
        both = jax.vmap(wander, in_axes=(0, None))(normals, size)
        a, b = member(both, 0), member(both, 1)
        mu = family.expectation(a)
        solved, converged = family.natural_from_expectation(mu, with_status=True)
        again = family.expectation(solved)
        v = direction(family, a)
        bound = family.inner(v, family.fisher_product(a, v))
        exponent = family.inner(a, mu)
        parts = family.log_partition(a) - exponent - family.expected_log_base_measure(a)
        product = Distribution(family, a) * Distribution(family, b) / Distribution(family, b)
        return {
            "inside": family.in_domain(a) & family.in_domain(b),
            "converged": converged,
            "duality": [flat_learnt(family, x) for x in (again, mu)],
            "entropy": (family.entropy(a), parts, 1 + jnp.abs(exponent)),
            "kl": (family.kl(a, b), family.kl(a, a)),
            "fisher": bound,
            "product": (product.natural, a),
            "sample": family.log_prob(a, family.sample(jax.random.key(seed), a)),
        }

    @settings(max_examples=15)
    @given(st.integers(0, 2**16), st.floats(-2, 0.5))
    def check(seed, exponent):
        rng = np.random.default_rng(seed)
        normals = {name: rng.normal(size=(2, *x.shape)) for name, x in known.items()}
        found = measure(seed, normals, 10.0**exponent)
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
    values = jax.tree.map(jnp.asarray, tuple(member(stacked(row), 0)))
    lam, mu = (kind(*values) for kind in (row.family.Natural, row.family.Expectation))
    others = (lam, mu, 2, 2.0, (1, 2), np.float64(2.0), np.ones(2), jnp.ones(2))
    for x in (lam, mu):
        for op in BINARY:
            for other in others:
                for args in ((x, other), (other, x)):
                    with pytest.raises(TypeError):
                        op(*args)
        for op in UNARY:
            with pytest.raises(TypeError):
                op(x)
