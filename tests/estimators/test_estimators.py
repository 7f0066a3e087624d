"""Estimators of the natural gradient against derivative-free quadrature and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tools
from family_tools import program
from scipy import stats

from blr_optax import families
from blr_optax.estimators import (
    conjugate,
    cubature,
    delta,
    exact,
    gauss_hermite,
    glm,
    hutchinson,
    monte_carlo,
    natural_gradient,
    reparameterized,
    shared_draws,
    squared_gradient,
)
from blr_optax.estimators._quadrature import hermite_rule

NORMAL, GAUSSIAN = families.get("normal"), families.get("gaussian")
FIXED, DIAGONAL = families.get("gaussian_fixed"), families.get("gaussian_diagonal")

M, COV = np.array([0.4, -0.7]), np.array([[0.6, 0.25], [0.25, 0.4]])
EYE = np.eye(2)
LAM = {
    "gaussian": lambda: program(GAUSSIAN.natural)(mean=M, covariance=COV),
    "normal": lambda: program(NORMAL.natural)(mean=M, variance=np.diag(COV)),
    "gaussian_fixed": lambda: program(FIXED.natural)(mean=M, covariance=COV),
}


close = functools.partial(tools.close, rtol=1e-10, atol=1e-10)


def gradient_of(family, loss, estimator=None):
    """The natural gradient as one program: (key, lambda, *batch) -> (value, gradient), in numpy."""
    rule = jax.jit(natural_gradient(family, loss, estimator))
    return lambda *args: jax.tree.map(np.asarray, rule(*args))


def smooth(x):
    """Neither quadratic nor separable."""
    return jax.nn.softplus(2 * x[0] - x[1]) + 0.1 * (x[0] - 0.5) ** 4 + jnp.cos(x[1])


def stein(loss, m, cov):
    """(E[l], g, H) from values of the loss alone, by quadrature in numpy."""
    z, w = np.polynomial.hermite_e.hermegauss(80)
    w = w / w.sum()
    z = np.stack(np.meshgrid(z, z, indexing="ij"), -1).reshape(-1, 2)
    w = np.outer(w, w).ravel()
    d, s = z @ np.linalg.cholesky(cov).T, np.linalg.inv(cov)
    values = w * np.asarray(jax.jit(jax.vmap(loss))(m + d))
    u = d @ s
    return values.sum(), values @ u, np.einsum("k,ki,kj->ij", values, u, u) - values.sum() * s


@functools.cache
def truth(name, loss=smooth):
    """(E[l], grad_mu E[l]) as flat arrays: (g - H m, H / 2)."""
    if name == "normal":
        value, g, h = stein(loss, M, np.diag(np.diag(COV)))
        return value, g - np.diag(h) * M, np.diag(h) / 2
    value, g, h = stein(loss, M, COV)
    return (value, g - h @ M, h / 2) if name == "gaussian" else (value, g, np.zeros((2, 2)))


def draws(name, loss, estimator, count=3000, seed=0):
    """Independent estimates (value, linear, quadratic), leading axis the repetition."""
    rule = natural_gradient(name, loss, estimator)

    @jax.jit
    def run(lam):
        keys = jax.random.split(jax.random.key(seed), count)
        return jax.vmap(lambda key: rule(key, lam))(keys)

    value, gradient = jax.tree.map(np.asarray, run(LAM[name]()))
    return value, *gradient


def assert_unbiased(found, expected):
    for x, y in zip(found, expected, strict=True):
        error = np.std(x, axis=0) / np.sqrt(len(x))
        assert np.all(np.abs(np.mean(x, axis=0) - y) < 5 * error + 1e-9), (
            np.mean(x, axis=0),
            y,
            error,
        )


# --- every rule against quadrature ----------------------------------------------------------------

UNBIASED = {
    "exact": monte_carlo(1),
    "exact antithetic": monte_carlo(2, antithetic=True),
    "exact hash": monte_carlo(1, generator="hash"),
    "reparameterized": monte_carlo(3, curvature=reparameterized()),
    "reparameterized antithetic": monte_carlo(1, antithetic=True, curvature=reparameterized()),
    "reparameterized hash": monte_carlo(1, curvature=reparameterized(), generator="hash"),
    "hutchinson": monte_carlo(1, curvature=hutchinson()),
    "hutchinson 2": monte_carlo(1, antithetic=True, curvature=hutchinson(2)),
}


@pytest.mark.parametrize(
    ("name", "rule"),
    [("normal", rule) for rule in UNBIASED]
    + [("gaussian", rule) for rule in UNBIASED if "hutchinson" not in rule],
)
def test_unbiased(x64, name, rule):
    assert_unbiased(draws(name, smooth, UNBIASED[rule]), truth(name))


@pytest.mark.parametrize("estimator", [monte_carlo(1), None])
def test_unbiased_with_known_covariance(x64, estimator):
    assert_unbiased(
        draws("gaussian_fixed", smooth, estimator, 2000), (*truth("gaussian_fixed")[:2], 0.0)
    )


@pytest.mark.parametrize("name", ["gaussian", "normal", "gaussian_fixed"])
def test_quadrature_converges(x64, name):
    for curvature in (exact(), reparameterized()):
        value, gradient = gradient_of(name, smooth, gauss_hermite(40, curvature))(None, LAM[name]())
        for x, y in zip((value, *gradient), truth(name), strict=True):
            if name != "gaussian_fixed" or np.ndim(x) < 2:
                close(x, y, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("order", [1, 2, 3, 7, 20, 64, 200])
def test_hermite_rule_is_exact_up_to_its_degree(order):
    z, w = hermite_rule(order)
    for degree in range(0, min(2 * order, 40)):
        moment = np.prod(np.arange(1, degree, 2, dtype=float)) if degree % 2 == 0 else 0.0
        scale = max(1.0, np.sum(w * np.abs(z) ** degree))
        assert abs(np.sum(w * z**degree) - moment) < 1e-11 * scale, degree
    if order <= 64:
        nodes, weights = np.polynomial.hermite_e.hermegauss(order)
        close(z, nodes, atol=1e-12)
        close(w, weights / weights.sum(), rtol=1e-8, atol=1e-300)


def test_quadrature_is_exact_for_polynomials(x64):
    """Degree 7 in a coordinate needs order 4 (2 order - 1); the gradient has one degree less."""

    def loss(x):
        return x[0] ** 7 / 50 + x[0] ** 3 * x[1] ** 2 - x[1] ** 4

    for curvature in (exact(), reparameterized()):
        value, gradient = gradient_of("gaussian", loss, gauss_hermite(5, curvature))(
            None, LAM["gaussian"]()
        )
        for x, y in zip((value, *gradient), truth("gaussian", loss), strict=True):
            close(x, y, rtol=1e-9, atol=1e-9)


def test_delta_looks_at_the_mean(x64):
    value, gradient = gradient_of("gaussian", smooth, delta())(None, LAM["gaussian"]())
    derivatives = jax.jit(lambda x: (smooth(x), jax.grad(smooth)(x), jax.hessian(smooth)(x)))
    loss, g, h = map(np.asarray, derivatives(M))
    close(value, loss)
    close(gradient.linear, g - h @ M)
    close(gradient.quadratic, h / 2)
    diagonal = gradient_of("normal", smooth, delta())(None, LAM["normal"]())[1]
    close(diagonal.quadratic, np.diag(h) / 2)


def test_a_curvature_is_its_name():
    """By name or as an object: the estimators are equal."""
    for make in (monte_carlo, gauss_hermite, cubature):
        assert make(curvature="reparameterized") == make(curvature=reparameterized())
        assert make(curvature="exact") == make()
    assert delta("hutchinson") == delta(hutchinson())
    assert delta("per_example_squares").curvature.name == "per_example_squares"
    assert shared_draws(3, "reparameterized") == shared_draws(3, reparameterized())


# --- properties -----------------------------------------------------------------------------------


def test_piecewise_linear_loss_needs_the_reparameterized_curvature(x64):
    """E|x| of N(m, v) has second derivative 2 N(0; m, v) in m; the Hessian of |x| is zero."""
    m, v = 0.3, 0.49
    lam = program(NORMAL.natural)(mean=np.array([m]), variance=np.array([v]))

    def curvature(estimator):
        rule = natural_gradient("normal", lambda x: jnp.abs(x[0]), estimator)

        @jax.jit
        def run(lam):
            keys = jax.random.split(jax.random.key(0), 20_000)
            return jax.vmap(lambda k: rule(k, lam)[1].quadratic[0])(keys)

        return 2 * np.asarray(run(lam))

    expected = 2 * stats.norm(m, np.sqrt(v)).pdf(0.0)
    for antithetic in (False, True):
        h = curvature(monte_carlo(1, antithetic, reparameterized()))
        assert abs(h.mean() - expected) < 5 * h.std() / np.sqrt(h.size), (h.mean(), expected)
    np.testing.assert_array_equal(curvature(monte_carlo(1)), 0.0)


@pytest.mark.parametrize("name", ["gaussian", "normal"])
def test_one_antithetic_pair_is_exact_for_a_quadratic(x64, name):
    a, c = np.array([[2.0, 0.7], [0.7, -1.0]]), np.array([1.0, 2.0])

    def loss(x):
        return 0.5 * (x - c) @ a @ (x - c)

    _, gradient = gradient_of(name, loss, monte_carlo(1, antithetic=True))(
        jax.random.key(5), LAM[name]()
    )
    for x, y in zip(gradient, truth(name, loss)[1:], strict=True):
        close(x, y)


@pytest.mark.parametrize("curvature", [exact(), reparameterized()])
def test_pairs_have_less_variance_than_as_many_independent_samples(x64, curvature):
    """For a narrow q, where the odd terms dominate, such as the noise g(m) z / sigma."""
    lam = program(GAUSSIAN.natural)(mean=M, covariance=COV / 100)

    def spread(estimator):
        rule = natural_gradient("gaussian", smooth, estimator)

        @jax.jit
        def run(lam):
            keys = jax.random.split(jax.random.key(0), 1000)
            return jax.vmap(lambda key: rule(key, lam)[1])(keys)

        fields = run(lam)
        return sum(np.sum(np.var(np.asarray(x), axis=0)) for x in fields)

    paired, single = (spread(monte_carlo(*x, curvature)) for x in ((1, True), (2, False)))
    assert paired < 0.2 * single, (paired, single)


def test_antithetic_nodes_mirror_each_other():
    like = {"a": np.zeros(3, np.float32), "b": np.zeros((), np.float32)}

    def nodes(estimator):
        found = jax.jit(lambda like: estimator.nodes(jax.random.key(0), like))(like)
        return jax.tree.map(np.asarray, found)

    z, w = nodes(monte_carlo(4, antithetic=True))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[:4], -x[4:]), z)
    close(w, np.full(8, 0.125))
    one, _ = nodes(monte_carlo(4))
    np.testing.assert_array_equal(one["a"], z["a"][:4])
    assert len(np.unique(one["a"])) == 12


@pytest.mark.parametrize("batch_size", [1, 10, 100])
def test_squared_gradient_is_the_gauss_newton_diagonal_at_the_optimum(x64, batch_size):
    """With labels from the model E[B g^2] = mean_i p_i (1 - p_i) x_i^2, whatever B (P2)."""
    rng = np.random.default_rng(0)
    x, theta = rng.normal(size=(200, 2)), np.array([0.8, -0.5])
    p = 1 / (1 + np.exp(-x @ theta))
    expected = np.mean((p * (1 - p))[:, None] * x**2, axis=0)
    pick = rng.integers(0, 200, (6000, batch_size))
    labels = rng.random(pick.shape) < p[pick]

    def loss(theta, x, y):
        f = x @ theta
        return jnp.mean(jax.nn.softplus(f) - y * f)

    for name in ("normal", "gaussian"):
        family = families.get(name)
        rule = natural_gradient(name, loss, delta(squared_gradient(batch_size)))

        @jax.jit
        def run(theta, x, y, family=family, rule=rule):
            lam = family.natural_at(theta)
            return jax.vmap(lambda x, y: rule(None, lam, x, y)[1].quadratic)(x, y)

        h = 2 * np.asarray(run(theta, x[pick], labels))
        full = np.mean((p * (1 - p))[:, None, None] * x[:, :, None] * x[:, None, :], axis=0)
        assert_unbiased([h], [expected if name == "normal" else full])


def test_squared_gradient_without_replacement_has_the_known_bias(x64):
    """E[g^2] = w mean_i g_i^2 + (1 - w) (mean g)^2, w = (N - B) / (B (N - 1))."""
    n, b = 5, 2
    g = np.random.default_rng(3).normal(size=n)
    lam = program(NORMAL.natural_at)(np.zeros(1))
    rule = gradient_of("normal", lambda x, g: x[0] * jnp.mean(g), delta(squared_gradient(b)))
    pairs = [(i, j) for i in range(n) for j in range(i)]
    h = np.mean([2 * rule(None, lam, g[[i, j]])[1].quadratic[0] for i, j in pairs])
    w = (n - b) / (b * (n - 1))
    close(h, b * (w * np.mean(g**2) + (1 - w) * np.mean(g) ** 2))


def test_hutchinson_is_exact_for_a_diagonal_hessian(x64):
    def separable(x):
        return jnp.sum(jnp.cosh(np.array([1.0, 2.0]) * x))

    rule = gradient_of("normal", separable, delta(hutchinson()))
    gradient = rule(jax.random.key(0), LAM["normal"]())[1]
    close(2 * gradient.quadratic, np.array([1.0, 4.0]) * np.cosh(np.array([1.0, 2.0]) * M))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_trees_are_flat_vectors(x64):
    mean = {"a": M[:1], "b": M[1]}
    precision = {"a": 1 / COV[0, :1], "b": 1 / COV[1, 1]}
    lam = program(DIAGONAL.natural)(mean=mean, precision=precision)

    def loss(x):
        return smooth(jnp.array([x["a"][0], x["b"]]))

    for curvature in (exact(), reparameterized()):
        value, gradient = gradient_of(DIAGONAL, loss, gauss_hermite(40, curvature))(None, lam)
        expected = truth("normal")
        close(value, expected[0], rtol=1e-7)
        close(flat(gradient.linear), expected[1], rtol=1e-6, atol=1e-7)
        close(flat(gradient.quadratic), expected[2], rtol=1e-6, atol=1e-7)
    raveled = families.Raveled.like(GAUSSIAN, mean)
    _, gradient = gradient_of(raveled, loss, gauss_hermite(40))(None, LAM["gaussian"]())
    close(gradient.linear, truth("gaussian")[1], rtol=1e-6, atol=1e-7)
    close(gradient.quadratic, truth("gaussian")[2], rtol=1e-6, atol=1e-7)


# --- terms ----------------------------------------------------------------------------------------

X = np.array([[1.0, 0.5], [-0.3, 2.0], [0.7, -1.1]])
Y = np.array([1.0, 0.0, 1.0])


def pointwise(f, y):
    return jax.nn.softplus(f) - y * f


def linear_model(theta, y):
    return jnp.mean(pointwise(jnp.asarray(X) @ theta, y))


@pytest.mark.parametrize("name", ["gaussian", "normal", "gaussian_fixed"])
def test_glm_is_the_same_function_without_its_structure(x64, name):
    lam, y = LAM[name](), Y
    term = gradient_of(name, glm(X, pointwise, order=40))(None, lam, y)
    for features in (lambda y: jnp.asarray(X),):
        called = gradient_of(name, glm(features, pointwise, order=40))(None, lam, y)
        jax.tree.map(close, called, term)
    value, gradient = gradient_of(name, linear_model, gauss_hermite(40))(None, lam, y)
    close(term[0], value, rtol=1e-7)
    close(term[1].linear, gradient.linear, rtol=1e-6, atol=1e-8)
    close(term[1][1], gradient[1], rtol=1e-6, atol=1e-8)
    for x, z in zip((term[0], *term[1]), truth(name, lambda t: linear_model(t, y)), strict=True):
        close(x, z, rtol=1e-6, atol=1e-8)


def test_glm_agrees_with_sampling(x64):
    expected = gradient_of("gaussian", glm(X, lambda f: pointwise(f, Y)))(None, LAM["gaussian"]())
    found = draws(
        "gaussian", lambda t: linear_model(t, Y), monte_carlo(1, curvature=reparameterized())
    )
    assert_unbiased(found, (expected[0], *expected[1]))


def test_glm_over_a_tree_follows_the_order_of_ravel(x64):
    lam = program(DIAGONAL.natural)(mean={"b": M[1], "a": M[0]}, precision=2.0)
    flat_lam = program(NORMAL.natural)(mean=M, precision=2.0)
    loss = glm(X, lambda f: pointwise(f, Y))
    value, gradient = gradient_of(DIAGONAL, loss)(None, lam)
    expected = gradient_of("normal", loss)(None, flat_lam)
    close(value, expected[0])
    close(gradient.linear["b"], expected[1].linear[1])
    close(gradient.quadratic["a"], expected[1].quadratic[0])


@pytest.mark.parametrize("name", LAM)
def test_conjugate_term_is_exact(x64, name):
    family, lam = families.get(name), LAM[name]()
    spread = {"variance": np.diag(COV)} if name == "normal" else {"covariance": COV}
    site = program(family.natural)(mean=M + 1, **spread)
    value, gradient = gradient_of(name, conjugate(site))(None, lam)
    for field in family.domains:
        close(getattr(gradient, field), -np.asarray(getattr(site, field)))
    s = np.diag(1 / np.diag(COV)) if name == "normal" else np.linalg.inv(COV)
    cov = np.diag(np.diag(COV)) if name == "normal" else COV
    expected = -(s @ (M + 1)) @ M  # -<S m0, E theta> + <S, E theta theta^T> / 2
    if name != "gaussian_fixed":
        expected += 0.5 * np.sum(s * (cov + np.outer(M, M)))
    close(value, expected)


def test_a_sum_is_the_sum_of_its_terms(x64):
    lam, y = LAM["gaussian"](), Y
    site = program(GAUSSIAN.natural)(mean=np.zeros(2), precision=3.0 * EYE)
    model = glm(X, pointwise)

    def extra(theta, y):
        return y[0] * smooth(theta)

    rule = gauss_hermite(12)
    parts = [
        gradient_of("gaussian", p, rule)(None, lam, y) for p in (conjugate(site), model, extra)
    ]
    expected = jax.tree.map(lambda *x: sum(x), *((v, *g) for v, g in parts))
    for loss in (
        conjugate(site) + model + extra,
        extra + (model + conjugate(site)),
        (extra + model) + conjugate(site),
    ):
        value, gradient = gradient_of("gaussian", loss, rule)(None, lam, y)
        for x, z in zip((value, *gradient), expected, strict=True):
            close(x, z)


def test_a_function_gets_ten_antithetic_pairs_by_default(x64):
    key, lam = jax.random.key(2), LAM["gaussian"]()
    found = gradient_of("gaussian", smooth)(key, lam)
    expected = gradient_of("gaussian", smooth, monte_carlo(10, antithetic=True))(key, lam)
    jax.tree.map(lambda x, y: close(x, y, rtol=0, atol=0), found, expected)


def test_float32_stays_float32():
    lam = program(GAUSSIAN.natural)(mean=M.astype("f"), covariance=COV.astype("f"))
    loss = conjugate(lam) + glm(X.astype("f"), lambda f: f**2) + smooth
    for estimator in (monte_carlo(2), gauss_hermite(3), delta()):
        value, gradient = gradient_of("gaussian", loss, estimator)(jax.random.key(0), lam)
        assert {x.dtype for x in jax.tree.leaves((value, gradient))} == {jnp.dtype("float32")}


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: monte_carlo(0), r"monte_carlo: samples=0"),
        (lambda: monte_carlo(1, generator="philox"), r"generator='philox'.*hash, jax"),
        (lambda: gauss_hermite(0), r"gauss_hermite: order=0"),
        (lambda: gauss_hermite(20).nodes(None, jnp.zeros(6)), r"20\*\*6 nodes. Use monte_carlo"),
        (
            lambda: monte_carlo(1, curvature="price"),
            r"curvature='price'.*exact, reparameterized, sq",
        ),
        (lambda: cubature(curvature=None), r"curvature=None is unknown; known: exact"),
        (lambda: monte_carlo(1, curvature="squared_gradient"), r"give batch_size=.*official"),
        (lambda: delta("reparameterized"), r"delta: reparameterized\(\) needs displacements"),
        (
            lambda: natural_gradient("gaussian", smooth, delta("absolute_gradient")),
            r"absolute_gradient\(\) estimates a diagonal",
        ),
        (lambda: delta(reparameterized()), r"delta: reparameterized\(\) needs displacements"),
        (lambda: squared_gradient(), r"give batch_size=.*or official=True"),
        (lambda: squared_gradient(3, official=True), r"batch_size=3, official=True"),
        (lambda: squared_gradient(0), r"batch_size=0"),
        (lambda: hutchinson(0), r"hutchinson: samples=0"),
        (lambda: glm(jnp.eye(2), jnp.square, order=0), r"glm: order=0"),
        (lambda: natural_gradient("gausian", smooth), r"unknown family 'gausian'; known:"),
        (lambda: natural_gradient("gaussian", 3.0), r"loss must be a function.*got float"),
        (lambda: natural_gradient("gaussian", conjugate(None) + 3.0), r"loss must be a function"),
        (lambda: natural_gradient("gaussian", smooth, "delta"), r"estimator='delta' is unknown"),
        (
            lambda: natural_gradient("gaussian", smooth, delta(hutchinson())),
            r"hutchinson\(\) estimates a diagonal",
        ),
        (
            lambda: natural_gradient("gaussian", smooth, delta(squared_gradient(official=True))),
            r"official=True\) is scaled by ess",
        ),
    ],
)
def test_bad_input_is_a_value_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
