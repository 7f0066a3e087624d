"""Conditional families: densities, moments, and natural gradients against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tools
from family_rows._row import spd
from family_rows.conditional import (
    COVARIANCES,
    FACTOR,
    LINE,
    MEANS,
    ROWS,
    VARIANCES,
    advance,
    compiled,
    member,
    quartic,
    rule,
    trapezoid,
)
from scipy import special, stats

import blr_optax as blr
from blr_optax.estimators import delta, monte_carlo, natural_gradient, squared_gradient
from blr_optax.families import Gaussian
from blr_optax.families._conditional.low_rank import GaussianLowRank, LowRankGradient, LowRankNoise
from blr_optax.families._conditional.matrix_gaussian import MatrixGaussian, MatrixGaussianNatural
from blr_optax.families._conditional.mixture import Mixture
from blr_optax.families._conditional.skew_gaussian import SHIFT, SkewGaussian
from blr_optax.families._conditional.student_t import StudentT, StudentTNoise

KEY = jax.random.key(0)


def close(actual, expected, rtol=1e-10, atol=1e-12):
    tools.close(actual, expected, rtol, atol)


def near(actual, expected, rtol=1e-10, atol=1e-12):
    tools.near(actual, expected, rtol, atol)


every = pytest.mark.parametrize("name", ROWS)


# --- densities and moments ------------------------------------------------------------------------


def look(family, lam, theta):
    """Everything a density says about itself."""
    found = {
        "log_prob": family.log_prob(lam, theta),
        "mean": family.mean(lam),
        "variance": family.variance(lam),
        "inside": family.in_domain(lam),
        "standard": family.standard(lam),
    }
    return found if isinstance(family, Mixture) else found | {"entropy": family.entropy(lam)}


@every
@pytest.mark.usefixtures("x64")
def test_density_equals_scipy_and_a_batch_is_a_loop(name):
    family, standard, logpdf, event = ROWS[name]
    other = {k: np.asarray(v) * (1.0 if k == "weights" else 1.3) for k, v in standard.items()}
    stacked = {k: np.stack([standard[k], other[k]]) for k in standard}
    theta = np.random.default_rng(1).normal(size=(7, 2, *event)) * 2.0

    def evaluate(stacked, theta):
        lam = family.natural(**stacked)
        found = look(family, lam, theta)
        axes = {"log_prob": 1} | dict.fromkeys(set(found) - {"log_prob"}, 0)
        loop = jax.vmap(functools.partial(look, family), (0, 1), axes)(lam, theta)
        broken = jax.tree.map(lambda leaf: leaf * jnp.nan, lam)
        return found, loop, family.in_domain(broken)

    found, loop, broken = compiled(evaluate, stacked, theta)
    for i, each in enumerate((standard, other)):
        close(found["log_prob"][:, i], logpdf(each, theta[:, i]))
        for key, value in each.items():
            close(found["standard"][key][i], value)
    near(found, loop)
    assert np.all(found["inside"])
    assert not np.any(broken)
    draws = jax.eval_shape(lambda s: family.sample(KEY, family.natural(**s), (3,)), stacked)
    assert draws.shape == (3, 2, *event)


@pytest.mark.usefixtures("x64")
def test_skew_gaussian_on_the_line_is_scipys_skew_normal():
    x = np.linspace(-8, 8, 33)
    family, law = SkewGaussian(), stats.skewnorm(-2.0, 0.4, np.sqrt(5.0))
    standard = {"mean": np.array([0.4]), "skew": np.array([-2.0]), "precision": np.eye(1)}

    def evaluate(s, x):
        lam = family.natural(**s)
        return family.log_prob(lam, x), family.mean(lam)

    log_prob, mean = compiled(evaluate, standard, x[:, None])
    close(log_prob, law.logpdf(x))
    close(mean[0], law.mean())


@pytest.mark.parametrize("name", LINE)
@pytest.mark.usefixtures("x64")
def test_density_integrates_to_one_and_gives_the_moments_and_the_entropy(name):
    family = ROWS[name][0]
    u, h = np.linspace(-30, 30, 20001, retstep=True)
    x, w = np.sinh(u), h * np.cosh(u)
    evaluate = lambda s, x: look(family, family.natural(**s), x)  # noqa: E731
    found = compiled(evaluate, LINE[name], x[:, None])
    log_q = found["log_prob"]
    q = w * np.exp(log_q)
    close(q.sum(), 1.0)
    mean = (q * x).sum()
    close(found["mean"][0], mean)
    close(found["variance"][0], (q * (x - mean) ** 2).sum())
    if name != "mixture":
        close(found["entropy"], -(q * log_q).sum())


@every
def test_samples_have_the_moments_and_gradients(name):
    family, lam = member(name, np.float32)
    n = 100_000

    def draw(key, lam):
        x, back = jax.vjp(lambda lam: family.sample(key, lam, (n,)), lam)
        return (x, family.mean(lam), family.variance(lam)), back(jnp.ones_like(x))

    found, slope = compiled(draw, KEY, lam)
    x, mean, variance = (np.asarray(v, np.float64) for v in found)
    assert x.shape == (n, *ROWS[name][3])
    assert np.all(np.abs(x.mean(0) - mean) < 5 * np.sqrt(variance / n))
    squares = (x - mean) ** 2
    # The fourth moment of a Student-t of five degrees exists, that of its square does not.
    spread = 10 if name == "student_t" else 5
    assert np.all(np.abs(squares.mean(0) - variance) < spread * squares.std(0) / np.sqrt(n))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(slope))


@every
@pytest.mark.usefixtures("x64")
def test_the_density_is_differentiable_twice(name):
    family, lam = member(name)
    theta, h = np.random.default_rng(3).normal(size=ROWS[name][3]), 1e-5

    def log_prob(scale):
        return family.log_prob(jax.tree.map(lambda x: scale * x, lam), theta)

    def slope(scale):
        return jax.value_and_grad(log_prob)(scale)[::-1]

    look = jax.vmap(jax.value_and_grad(slope, has_aux=True))
    (first, value), second = compiled(look, np.array([1 - h, 1.0, 1 + h]))
    close(first[1], (value[2] - value[0]) / (2 * h), rtol=1e-6)
    close(second[1], (first[2] - first[0]) / (2 * h), rtol=1e-6)


# --- what every natural gradient does -------------------------------------------------------------


def saddle(x):
    return 20.0 * jnp.sum(jnp.cos(2.0 * x)) - 3.0 * jnp.sum(x * x)


@every
@pytest.mark.usefixtures("x64")
def test_a_move_is_first_order_right_and_inside_for_any_rate(name):
    family, lam = member(name)
    rates = np.array([1e-6, 1e-2, 1.0, 7.0, 1e3])

    def gradients(key, lam):
        curvatures = [
            squared_gradient(1) if name == "squared_gradient" else name
            for name in family.curvatures
        ]
        return [
            natural_gradient(family, saddle, monte_carlo(1, curvature=c))(key, lam)[1]
            for c in curvatures
        ]

    @jax.jit
    def moves(lam, gradient):
        forms = ("auto", "improved", "improved_old")
        each = [jax.vmap(lambda r, f=f: family.move(lam, gradient, r, f))(rates) for f in forms]
        return each, [jax.vmap(family.in_domain)(x) for x in each]

    for gradient in compiled(gradients, KEY, lam):
        moved, inside = jax.tree.map(np.asarray, moves(lam, gradient))
        assert np.all(inside)
        if name in ("gaussian_low_rank", "matrix_gaussian"):
            continue  # their parameters are not unique: compared as dense matrices below
        for new in moved:
            speed = jax.tree.map(lambda a, b: (a[0] - b) / rates[0], new, lam)
            near(speed, jax.tree.map(np.negative, gradient), rtol=1e-2, atol=1e-2)


def both_forms(name, loss, order):
    family, lam = member(name)
    forms = ("exact", "reparameterized")

    def evaluate(lam, noise, weights):
        return [family.natural_gradient_at(lam, loss, noise, weights, h) for h in forms]

    return compiled(evaluate, lam, *rule(name, order))


@pytest.mark.parametrize(
    "name", ["mixture", "mixture_diagonal", "skew_gaussian", "matrix_gaussian"]
)
@pytest.mark.usefixtures("x64")
def test_both_forms_of_the_curvature_agree_in_expectation(name):
    exact, first = both_forms(name, quartic, 3 if name == "matrix_gaussian" else 8)
    near(exact, first, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_both_forms_of_a_low_rank_curvature_agree_in_expectation():
    def quadratic(x):  # elsewhere the directions that are tried differ
        return jnp.sum(jnp.arange(1.0, 5.0) * x * x) + jnp.sum(x) ** 2

    exact, first = both_forms("gaussian_low_rank", quadratic, 3)
    close(exact[0], first[0])
    for (_, h, x), (_, h_first, x_first) in [(exact[1], first[1])]:
        close(h, h_first, 1e-8, 1e-8)
        close(x @ x.T, x_first @ x_first.T, 1e-8, 1e-8)


@every
def test_float32_stays_float32(name):
    family, lam = member(name, np.float32)

    def step(key, lam):
        value, new = advance(family, key, lam, quartic, 0.1, monte_carlo(2, antithetic=True))
        return value, new, family.in_domain(new)

    value, new, inside = jax.jit(step)(KEY, lam)
    assert {x.dtype for x in jax.tree.leaves((value, new))} == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, lam)
    assert inside
    assert jax.tree.leaves(family) == []
    with jax.enable_x64(True):  # constants must not widen what is float32
        wide = jax.eval_shape(lambda: advance(family, KEY, lam, quartic, 0.1, monte_carlo(2)))
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("curvature", ["exact", "reparameterized"])
@pytest.mark.usefixtures("x64")
def test_samples_are_averages_over_the_noise_of_the_family(curvature):
    family, lam = member("student_t")

    def evaluate(key, lam):
        noise = family.noise(key, lam, 2, True)
        expected = family.natural_gradient_at(lam, quartic, noise, jnp.full(4, 0.25), curvature)
        estimator = monte_carlo(2, antithetic=True, curvature=curvature)
        shifted = lambda x, by: quartic(x - by)  # noqa: E731
        return natural_gradient(family, shifted, estimator)(key, lam, 0.0), expected

    near(*compiled(evaluate, KEY, lam))


def test_options_are_checked():
    family, lam = member("skew_gaussian", np.float32)
    mixture, mixed = member("mixture", np.float32)
    for who, estimator, message in [
        (family, delta(), "the delta method never looks away"),
        (mixture, blr.estimators.gauss_hermite(3), r"takes monte_carlo\(...\) or delta.*, shared"),
        (family, blr.estimators.closed_form(), r"SkewGaussian .* monte_carlo\(...\) or delta"),
        (mixture, monte_carlo(2, curvature="hutchinson"), "Mixture knows exact, reparameterized"),
        (mixture, monte_carlo(2, generator="hash"), "generator='hash' is for Gaussian"),
        (MatrixGaussian(), delta(squared_gradient(3)), r"use squared_gradient\(1\)"),
        (family, blr.estimators.shared_draws(3), "SkewGaussian has no components"),
        (Gaussian(), blr.estimators.shared_draws(3), "Gaussian has no components"),
    ]:
        with pytest.raises(ValueError, match=message):
            natural_gradient(who, quartic, estimator)
    with pytest.raises(ValueError, match="one plain function"):
        natural_gradient(mixture, blr.estimators.conjugate(mixed))
    for estimator in (None, blr.estimators.shared_draws(2)):
        with pytest.raises(ValueError, match="typed key"):
            natural_gradient(mixture, quartic, estimator)(None, mixed)
    with pytest.raises(ValueError, match=r"points= are draws for estimator=shared_draws"):
        natural_gradient(mixture, quartic)(KEY, mixed, points=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="step='plain'"):
        mixture.move(mixed, mixed, 0.1, "plain")
    with pytest.raises(ValueError, match="no exponential family"):
        blr.Distribution(family, lam) * blr.Distribution(family, lam)
    with pytest.raises(ValueError, match="entropy in closed form"):
        mixture.entropy(mixed)
    with pytest.raises(ValueError, match="KL divergence in closed form"):
        mixture.kl(mixed, mixed)
    with pytest.raises(TypeError, match="no arithmetic"):
        lam + lam
    with pytest.raises(ValueError, match="must be Gaussian"):
        Mixture(blr.families.get("gaussian_diagonal"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixture", {"weights": np.array([0.5, 0.5, 0.5])}, "weights must be"),
        ("mixture", {"precision": COVARIANCES}, "covariance or precision"),
        ("mixture", {"variance": VARIANCES}, "give covariance"),
        ("mixture", {"covariance": -COVARIANCES}, "covariance must be"),
        ("mixture_diagonal", {"variance": -VARIANCES}, "variance must be"),
        ("mixture_diagonal", {"covariance": COVARIANCES}, "give variance"),
        ("skew_gaussian", {"covariance": -spd(1)}, "covariance must be"),
        ("skew_gaussian", {"skew": np.array([np.inf, 0.0])}, "skew must be"),
        ("student_t", {"degrees": 0.0}, "degrees must be"),
        ("student_t", {"degrees": 2.0, "scale": None, "covariance": spd(1)}, "above 2"),
        ("student_t", {"scale": -spd(1)}, "scale must be"),
        ("student_t", {"covariance": spd(1)}, "scale or covariance"),
        ("gaussian_low_rank", {"diagonal": np.array([1.0, 0.0, 1.0, 1.0])}, "diagonal must be"),
        ("gaussian_low_rank", {"factor": FACTOR * np.nan}, "factor must be"),
        ("matrix_gaussian", {"row_precision": -spd(6)}, "row_precision must be"),
        ("matrix_gaussian", {"column_precision": -spd(7, 3)}, "column_precision must be"),
    ],
)
def test_standard_parameters_are_checked(name, change, message):
    family, standard, _, _ = ROWS[name]
    with pytest.raises(ValueError, match=message):
        family.natural(**{**standard, **change})


# --- skew Gaussians -------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_skew_step_is_the_chain_rule_in_expectation_coordinates():
    family, lam = member("skew_gaussian")
    m, a, cov = (ROWS["skew_gaussian"][1][k] for k in ("mean", "skew", "covariance"))
    noise, w = rule("skew_gaussian", 5)
    c = SHIFT

    def standard(mu):  # E[theta], E[|w| theta], E[theta theta^T]
        one, shifted, two = mu
        m, a = (one - c * shifted) / (1 - c * c), (shifted - c * one) / (1 - c * c)
        cross = jnp.outer(m, a)
        return m, a, two - jnp.outer(m, m) - jnp.outer(a, a) - c * (cross + cross.T)

    def objective(mu):
        m, a, cov = standard(mu)
        away = noise.normal @ jnp.linalg.cholesky(cov).T
        value = w @ jax.vmap(quartic)(m + noise.shift[:, None] * a + away)
        s = jnp.linalg.inv(cov)
        return value - family.entropy(type(lam)(s @ m, s @ a, -0.5 * s))

    cross = np.outer(m, a)
    second = np.outer(m, m) + np.outer(a, a) + c * (cross + cross.T) + cov

    def evaluate(lam, mu):
        _, found = family.natural_gradient_at(lam, quartic, noise, w)
        return found, jax.grad(objective)(mu)

    found, (linear, skew, quadratic) = compiled(evaluate, lam, (m + c * a, c * m + a, second))
    close(found.linear, linear, 1e-8, 1e-8)
    close(found.skew, skew, 1e-8, 1e-8)
    close(found.quadratic, 0.5 * (quadratic + quadratic.T), 1e-8, 1e-8)


@pytest.mark.usefixtures("x64")
def test_without_skew_it_is_the_gaussian_rule():
    family, gaussian, s, m = SkewGaussian(), Gaussian(), spd(4), MEANS[0]
    noise, w = rule("skew_gaussian", 5)

    def evaluate(m, s):
        inner = gaussian.from_mean(m, s)
        lam = family.Natural(inner.linear, jnp.zeros(2), inner.quadratic)
        site = gaussian.from_mean(jnp.zeros(2), 2.0 * jnp.eye(2))
        _, gradient = family.natural_gradient_at(lam, lambda x: x @ x, noise, w)
        return (
            (family.entropy(lam), gaussian.entropy(inner)),
            (family.log_prob(lam, m + 1.0), gaussian.log_prob(inner, m + 1.0)),
            gradient,
            inner.linear - site.linear,
        )

    entropies, densities, found, linear = compiled(evaluate, m, s)
    close(*entropies)
    close(*densities)
    # The loss is a Gaussian site: its natural gradient is its own -lambda, the entropy's is lambda.
    close(found.quadratic, np.eye(2) - 0.5 * s, 1e-8)
    close(found.linear, linear, 1e-8)
    close(found.skew, np.zeros(2), atol=1e-8)


# --- Student-t ------------------------------------------------------------------------------------


def scale_nodes(a):
    """log w, its derivative in a at a fixed quantile, and weights, for w ~ inverse gamma(a, a)."""
    t, h = np.linspace(np.log(a) - 6.0, np.log(a) + 10.0, 201, retstep=True)
    t, e = t - np.log(a), 1e-4
    density = stats.invgamma(a, scale=a).pdf(np.exp(t)) * np.exp(t)
    upper = lambda a: stats.gamma(a, scale=1 / a).cdf(np.exp(-t))  # noqa: E731  P(w > e^t)
    lower = lambda a: stats.gamma(a, scale=1 / a).sf(np.exp(-t))  # noqa: E731
    tail = lambda a: np.where(t > 0, -upper(a), lower(a))  # noqa: E731
    rise = (8 * (tail(a + e) - tail(a - e)) - tail(a + 2 * e) + tail(a - 2 * e)) / (12 * e)
    return t, -rise / np.maximum(density, 1e-300), h * density


@pytest.mark.usefixtures("x64")
def test_student_blocks_are_the_natural_gradient_of_their_fisher_matrices():
    family, a = StudentT(), 3.3
    standard = {"mean": np.array([0.4]), "scale": np.array([[0.7]]), "degrees": 2 * a}
    t, slope, w = scale_nodes(a)
    keep = w > 1e-14
    t, slope, w = t[keep], slope[keep], w[keep]
    z, wz = trapezoid(401, 8.0)
    noise = StudentTNoise(np.repeat(t, len(wz)), np.repeat(slope, len(wz)), np.tile(z, (len(t), 1)))
    weights = np.outer(w, wz).reshape(-1)

    def loss(x):
        return jnp.sum(jnp.log(1 + (x - 1.0) ** 2 / 4))

    u, h = np.linspace(-24.0, 24.0, 8001, retstep=True)
    x, dx = np.sinh(u)[:, None], h * np.cosh(u)

    def objective(mu):  # E[theta / w], E[theta^2 / w], a
        cov = mu[1] - mu[0] ** 2
        lam = family.Natural(mu[:1] / cov, -0.5 / cov[None, None], mu[2])
        log_q = family.log_prob(lam, x)
        return jnp.sum(dx * jnp.exp(log_q) * (jax.vmap(loss)(x) + log_q))

    def evaluate(standard, mu, noise, weights):
        lam = family.natural(**standard)
        at = (loss, noise, weights)
        return jax.grad(objective)(mu), [
            family.natural_gradient_at(lam, *at, h) for h in ("exact", "reparameterized")
        ]

    mu = np.array([0.4, 0.7 + 0.16, a])
    expected, forms = compiled(evaluate, standard, mu, noise, weights)
    fisher = special.polygamma(1, a) - 1 / a
    for _, found in forms:
        close(found.linear, expected[:1], 1e-5, 1e-5)
        close(found.quadratic[0], expected[1:2], 1e-5, 1e-5)
        close(found.shape, expected[2] / fisher, 1e-5, 1e-5)


@pytest.mark.usefixtures("x64")
def test_many_degrees_of_freedom_are_a_gaussian():
    family, gaussian = StudentT(), Gaussian()

    def evaluate(mean, spread, degrees, x):
        lam = family.natural(mean=mean, scale=spread, degrees=degrees)
        inner = gaussian.natural(mean=mean, covariance=spread)
        densities = family.log_prob(lam, x), gaussian.log_prob(inner, x)
        return densities, (family.entropy(lam), gaussian.entropy(inner))

    densities, entropies = compiled(evaluate, MEANS[0], spd(5), 1e12, MEANS)
    close(*densities, 1e-10)
    close(*entropies, 1e-10)


# --- low rank -------------------------------------------------------------------------------------


def low_rank_precision(lam):
    return np.diag(lam.diagonal) + np.asarray(lam.factor @ lam.factor.T)


@pytest.mark.usefixtures("x64")
def test_low_rank_equals_dense_algebra():
    family, lam = member("gaussian_low_rank")
    gaussian, v = Gaussian(), np.arange(1.0, 5.0)
    other = lam._replace(
        mean=lam.mean + 0.3, diagonal=2.0 * lam.diagonal, factor=lam.factor[:, ::-1] - 0.2
    )
    noise = LowRankNoise(np.eye(6)[:, :4], np.eye(6)[:, 4:])

    def evaluate(lam, other, precisions):
        pairs = zip((lam, other), precisions, strict=True)
        p, q = (gaussian.from_mean(x.mean, s) for x, s in pairs)
        return {
            "solve": family.solve(lam, v),
            "product": family.precision_product(lam, v),
            "variance": family.variance(lam),
            "entropy": (family.entropy(lam), gaussian.entropy(p)),
            "kl": (family.kl(lam, other), gaussian.kl(p, q)),
            "none": family.kl(lam, lam),
            "root": family.displace(lam, noise),
        }

    dense = low_rank_precision(lam)
    found = compiled(evaluate, lam, other, (dense, low_rank_precision(other)))
    cov = np.linalg.inv(dense)
    close(found["solve"], cov @ v)
    close(found["product"], dense @ v)
    close(found["variance"], np.diag(cov))
    close(*found["entropy"])
    close(*found["kl"])
    close(found["none"], 0.0, atol=1e-12)
    # The columns of a root of the covariance.
    close(found["root"].T @ found["root"], cov)


@pytest.mark.usefixtures("x64")
def test_low_rank_step_adds_curvature_and_keeps_the_diagonal():
    family, lam = member("gaussian_low_rank")
    rng = np.random.default_rng(4)
    g, u, x = rng.normal(size=4), rng.uniform(0.5, 2.0, size=4), rng.normal(size=(4, 3))
    gradient = LowRankGradient(g, lam.diagonal - u, x)
    wide = lam._replace(factor=np.pad(lam.factor, ((0, 0), (0, 2))))
    rates = (0.2, 1.0)

    def evaluate(lam, wide, gradient):
        each = [
            (family.move(lam, gradient, rho), family.move(lam, gradient, rho, "improved_old"))
            for rho in rates
        ]
        return each, family.move(wide, gradient, rates[0])

    each, of_wide = compiled(evaluate, lam, wide, gradient)
    before, added = low_rank_precision(lam), np.diag(u) + x @ x.T
    for rho, (new, old) in zip(rates, each, strict=True):
        after, target = low_rank_precision(new), (1 - rho) * before + rho * added
        close(np.diag(after), np.diag(target))
        leading = np.linalg.eigvalsh(target - np.diag((1 - rho) * lam.diagonal + rho * u))[-2:]
        close(np.sort(np.sum(np.square(new.factor), 0)), leading)
        close(new.mean, lam.mean - rho * np.linalg.solve(after, g))
        close(old.mean, lam.mean - rho * np.linalg.solve(before, g))
    # With room for every column nothing is left out.
    close(low_rank_precision(of_wide), 0.8 * before + 0.2 * added)


@pytest.mark.parametrize("curvature", ["exact", "reparameterized"])
@pytest.mark.usefixtures("x64")
def test_low_rank_finds_a_quadratic_loss_of_its_kind(curvature):
    family, rng = GaussianLowRank(), np.random.default_rng(5)
    u, b, centre = rng.uniform(1.0, 3.0, size=8), rng.normal(size=(8, 2)), rng.normal(size=8)
    target = np.diag(u) + b @ b.T
    loss = lambda x: 0.5 * (x - centre) @ target @ (x - centre)  # noqa: E731
    start = {"mean": np.zeros(8), "diagonal": np.ones(8), "factor": np.zeros((8, 2))}
    exact = curvature == "exact"

    def run(start):
        def step(lam, t):
            rho = 0.7 if exact else 0.5 / (1 + t / 10)
            key = jax.random.fold_in(KEY, t)
            estimator = monte_carlo(4 if exact else 100, antithetic=True, curvature=curvature)
            return advance(family, key, lam, loss, rho, estimator)[1], None

        return jax.lax.scan(step, family.natural(**start), jnp.arange(100))[0]

    lam = compiled(run, start)
    tolerance = 1e-6 if exact else 0.1
    close(lam.mean, centre, atol=tolerance)
    close(low_rank_precision(lam), target, atol=tolerance * 5)


@pytest.mark.usefixtures("x64")
def test_low_rank_columns_are_the_gradients_of_the_terms():
    family = GaussianLowRank(known_curvature=0.25)
    standard = {"mean": np.zeros(3), "diagonal": np.ones(3), "factor": np.ones((3, 1))}
    rows = np.random.default_rng(6).normal(size=(5, 3))

    def evaluate(standard):
        loss = lambda x: (rows @ x - 1.0) ** 2  # noqa: E731
        lam = family.natural(**standard)
        return natural_gradient(family, loss, delta(squared_gradient(1)))(None, lam)

    value, gradient = compiled(evaluate, standard)
    each = -2.0 * rows
    close(value, 5.0)
    close(gradient.mean, each.sum(0))
    close(gradient.factor @ gradient.factor.T, each.T @ each)
    close(gradient.diagonal, 0.75 * np.ones(3))


def test_low_rank_never_forms_a_square_matrix():
    family, d = GaussianLowRank(), 300
    lam = family.Natural(np.zeros(d), np.ones(d), np.ones((d, 3)))

    def everything(lam):
        _, new = advance(family, KEY, lam, lambda x: jnp.sum(jnp.cos(x)), 0.1, monte_carlo(2))
        theta = family.sample(KEY, lam, (2,))
        return new, family.log_prob(lam, theta), family.variance(lam), family.kl(lam, new)

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.size for v in eqn.outvars)
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from sizes(inner)

    assert max(sizes(jax.make_jaxpr(everything)(lam).jaxpr)) < d * d / 10


# --- matrix Gaussians -----------------------------------------------------------------------------


def kron(lam):
    """The dense precision of vec(theta), rows first."""
    return np.kron(lam.row_precision, lam.column_precision)


@pytest.mark.usefixtures("x64")
def test_matrix_gaussian_equals_dense_algebra():
    family, lam = member("matrix_gaussian")
    gaussian, other = Gaussian(), MatrixGaussianNatural(lam.mean + 0.5, 2.0 * spd(8), spd(9, 3))

    def evaluate(lam, other, precisions):
        p, q = (
            gaussian.from_mean(x.mean.reshape(-1), s)
            for x, s in zip((lam, other), precisions, strict=True)
        )
        root = family.displace(lam, jnp.eye(6).reshape(6, 2, 3)).reshape(6, 6)
        return (
            (family.entropy(lam), gaussian.entropy(p)),
            (family.kl(lam, other), gaussian.kl(p, q)),
            (family.variance(lam).reshape(-1), gaussian.variance(p)),
            (root.T @ root, gaussian.covariance(p)),
        )

    for found, expected in compiled(evaluate, lam, other, (kron(lam), kron(other))):
        close(found, expected)


@pytest.mark.usefixtures("x64")
def test_matrix_blocks_are_the_natural_gradient_of_the_dense_fisher_matrix():
    family, lam = member("matrix_gaussian")
    curvature, linear = spd(10, 6), np.arange(6.0)
    noise, w = rule("matrix_gaussian", 3)

    def loss(x):
        return 0.5 * x.reshape(-1) @ curvature @ x.reshape(-1) + linear @ x.reshape(-1)

    flat, unravel = jax.flatten_util.ravel_pytree((lam.row_precision, lam.column_precision))

    def precision(flat):
        return jnp.kron(*unravel(flat))

    def objective(flat):  # E[loss] - H, up to what does not move with the precision
        s = precision(flat)
        return 0.5 * jnp.trace(curvature @ jnp.linalg.inv(s)) + 0.5 * jnp.linalg.slogdet(s)[1]

    def expected(flat):
        jacobian = jax.jacrev(precision)(flat).reshape(36, -1)
        cov = jnp.linalg.inv(precision(flat))
        fisher = 0.5 * jacobian.T @ jnp.kron(cov, cov) @ jacobian
        step = jnp.linalg.lstsq(fisher, jax.grad(objective)(flat), rcond=1e-10)[0]
        return (jacobian @ step).reshape(6, 6)

    def found(lam, hessian):
        gradient = family.natural_gradient_at(lam, loss, noise, w, hessian)[1]
        along = jax.flatten_util.ravel_pytree(gradient[1:])[0]
        return gradient.mean.reshape(-1), jax.jvp(precision, (flat,), (along,))[1]

    def evaluate(lam, flat):
        return expected(flat), [found(lam, h) for h in ("exact", "reparameterized")]

    direction, forms = compiled(evaluate, lam, flat)
    change = np.linalg.solve(kron(lam), curvature @ lam.mean.reshape(-1) + linear)
    for mean, moved in forms:
        close(moved, direction, 1e-8, 1e-8)
        close(mean, change, 1e-8, 1e-8)


@pytest.mark.usefixtures("x64")
def test_squared_gradients_of_a_matrix_are_kronecker_contractions():
    family, lam = member("matrix_gaussian")
    u, v = np.linalg.inv(lam.row_precision), np.linalg.inv(lam.column_precision)

    def evaluate(lam):
        _, gradient = natural_gradient(family, quartic, delta(squared_gradient(1)))(None, lam)
        return jax.grad(quartic)(lam.mean), gradient

    g, gradient = compiled(evaluate, lam)
    close(gradient.mean, u @ g @ v)
    row = g @ v @ g.T / 3 - lam.row_precision
    column = g.T @ u @ g / 2 - lam.column_precision
    scale = 0.5 * np.trace(u @ row) / 2
    close(scale, 0.5 * np.trace(v @ column) / 3)
    close(gradient.row_precision, scale * lam.row_precision - row)
    close(gradient.column_precision, scale * lam.column_precision - column)


@jax.jit
def settled(lam, target, rho):
    """lambda after many steps on a quadratic loss, and the slopes of the divergence there."""
    loss = lambda x: 0.5 * (x.reshape(-1) - 1.0) @ target @ (x.reshape(-1) - 1.0)  # noqa: E731

    def step(lam, _):
        return advance(MatrixGaussian(), None, lam, loss, rho, delta())[1], None

    def divergence(row, column):
        s = jnp.kron(row, column)
        return 0.5 * jnp.trace(target @ jnp.linalg.inv(s)) + 0.5 * jnp.linalg.slogdet(s)[1]

    lam, _ = jax.lax.scan(step, lam, None, 300)
    return lam, jax.grad(divergence, (0, 1))(lam.row_precision, lam.column_precision)


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.usefixtures("x64")
def test_matrix_gaussian_settles_where_the_divergence_is_least(separable):
    _, start = member("matrix_gaussian")
    target = np.kron(spd(11), spd(12, 3)) if separable else spd(13, 6)
    # A unit step on another quadratic overshoots in the mean, whose precision is approximate.
    for rho in (0.5, 1.0) if separable else (0.5,):
        lam, slopes = settled(start, target, rho)
        close(lam.mean, np.ones((2, 3)), 1e-8)
        if separable:
            close(kron(lam), target, 1e-7, 1e-9)
        for slope in slopes:
            close(slope, np.zeros(slope.shape), atol=1e-7)
        row, column = (np.linalg.slogdet(x)[1] for x in (lam.row_precision, lam.column_precision))
        close(row / 2, column / 3)
