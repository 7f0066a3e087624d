"""Conditional families: densities, moments, and natural gradients against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tools
from family_rows._row import spd
from scipy import special, stats
from tools import load_golden

import blr_optax as blr
from blr_optax.families import Gaussian, Normal
from blr_optax.families._low_rank import GaussianLowRank, LowRankGradient, LowRankNoise
from blr_optax.families._matrix_gaussian import MatrixGaussian, MatrixGaussianNatural
from blr_optax.families._mixture import Mixture, MixtureNatural
from blr_optax.families._skew_gaussian import SHIFT, SkewGaussian, SkewNoise
from blr_optax.families._student_t import StudentT, StudentTNoise

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
COVARIANCES = np.stack([spd(1), spd(2), spd(3)])
MEANS = np.array([[-1.0, 0.5], [0.8, 0.0], [0.2, 1.4]])
WEIGHTS = np.array([0.2, 0.5, 0.3])
FACTOR = RNG.normal(size=(4, 2))


close = functools.partial(tools.close, rtol=1e-10, atol=1e-12)
near = functools.partial(tools.near, rtol=1e-10, atol=1e-12)


def hermite(order, d):
    """(z [n, d], w [n]): a tensor-product rule for standard normal numbers."""
    x, w = np.polynomial.hermite_e.hermegauss(order)
    z = np.stack(np.meshgrid(*[x] * d, indexing="ij"), -1).reshape(-1, d)
    weights = np.prod(np.stack(np.meshgrid(*[w] * d, indexing="ij"), -1), -1).reshape(-1)
    return jnp.asarray(z), jnp.asarray(weights / weights.sum())


def half_normal(order=50):
    """(|w|, weights) for w standard normal."""
    x, w = np.polynomial.legendre.leggauss(order)
    x, w = 4.5 * (x + 1.0), 4.5 * w
    return x, w * 2 * stats.norm.pdf(x)


def skew_logpdf(s, x):
    omega = s["covariance"] + np.outer(s["skew"], s["skew"])
    pull = np.linalg.solve(omega, s["skew"])
    along = (x - s["mean"]) @ pull / np.sqrt(1 - s["skew"] @ pull)
    normal = stats.multivariate_normal(s["mean"], omega).logpdf(x)
    return np.log(2) + normal + stats.norm.logcdf(along)


def mixture_logpdf(s, x):
    parts = [
        stats.multivariate_normal(m, c).logpdf(x) for m, c in zip(s["mean"], s["c"], strict=True)
    ]
    return special.logsumexp(np.stack(parts, -1), axis=-1, b=s["weights"])


def low_rank_dense(s):
    return np.linalg.inv(np.diag(s["diagonal"]) + s["factor"] @ s["factor"].T)


MIXED = {"weights": WEIGHTS, "mean": MEANS}
VARIANCES = np.array([[0.5, 1.0], [0.2, 2.0], [1.0, 0.3]])
# name: family, standard parameters, log density by scipy or numpy, shape of one event
ROWS = {
    "mixture": (
        Mixture(),
        {**MIXED, "covariance": COVARIANCES},
        lambda s, x: mixture_logpdf({**s, "c": s["covariance"]}, x),
        (2,),
    ),
    "mixture_diagonal": (
        Mixture(Normal()),
        {**MIXED, "variance": VARIANCES},
        lambda s, x: mixture_logpdf({**s, "c": [np.diag(v) for v in s["variance"]]}, x),
        (2,),
    ),
    "skew_gaussian": (
        SkewGaussian(),
        {"mean": MEANS[0], "skew": np.array([1.5, -0.7]), "covariance": spd(4)},
        skew_logpdf,
        (2,),
    ),
    "student_t": (
        StudentT(),
        {"mean": MEANS[1], "degrees": 5.0, "scale": spd(5)},
        lambda s, x: stats.multivariate_t(s["mean"], s["scale"], df=s["degrees"]).logpdf(x),
        (2,),
    ),
    "gaussian_low_rank": (
        GaussianLowRank(),
        {"mean": np.arange(4.0), "diagonal": np.array([1.0, 0.3, 2.0, 0.7]), "factor": FACTOR},
        lambda s, x: stats.multivariate_normal(s["mean"], low_rank_dense(s)).logpdf(x),
        (4,),
    ),
    "matrix_gaussian": (
        MatrixGaussian(),
        {
            "mean": RNG.normal(size=(2, 3)),
            "row_precision": spd(6),
            "column_precision": spd(7, 3),
        },
        lambda s, x: stats.matrix_normal(
            s["mean"], np.linalg.inv(s["row_precision"]), np.linalg.inv(s["column_precision"])
        ).logpdf(x),
        (2, 3),
    ),
}
every = pytest.mark.parametrize("name", ROWS)


@functools.cache
def member(name, dtype=np.float64):
    family, standard, _, _ = ROWS[name]
    return family, natural(family, {k: np.asarray(v, dtype) for k, v in standard.items()})


def natural(family, standard):
    """lambda, compiled at once."""
    return jax.jit(lambda s: family.natural(**s))(standard)


def quartic(x):
    """A potential that couples its coordinates, with a bounded start and polynomial growth."""
    flat = x.reshape(-1)
    return jnp.sum(0.1 * (flat - 0.5) ** 4 + flat**2) + 0.3 * flat[0] * flat[1] + flat[0]


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
    lam = natural(family, stacked)
    theta = jnp.asarray(np.random.default_rng(1).normal(size=(7, 2, *event))) * 2.0
    found = jax.jit(functools.partial(look, family))(lam, theta)
    for i, each in enumerate((standard, other)):
        close(found["log_prob"][:, i], logpdf(each, theta[:, i]))
        for key, value in each.items():
            close(found["standard"][key][i], value)
    loop = jax.jit(
        jax.vmap(
            functools.partial(look, family),
            (0, 1),
            {"log_prob": 1} | dict.fromkeys(set(found) - {"log_prob"}, 0),
        )
    )
    near(found, loop(lam, theta))
    assert bool(jnp.all(found["inside"]))
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, lam)
    assert not bool(jnp.any(family.in_domain(broken)))
    assert family.sample(KEY, lam, (3,)).shape == (3, 2, *event)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_skew_gaussian_on_the_line_is_scipys_skew_normal():
    x = np.linspace(-8, 8, 33)
    lam = SkewGaussian().natural(mean=np.array([0.4]), skew=np.array([-2.0]), precision=np.eye(1))
    expected = stats.skewnorm(-2.0, 0.4, np.sqrt(5.0)).logpdf(x)
    close(SkewGaussian().log_prob(lam, jnp.asarray(x)[:, None]), expected)
    close(SkewGaussian().mean(lam)[0], stats.skewnorm(-2.0, 0.4, np.sqrt(5.0)).mean())


LINE = {
    "mixture": {
        "weights": WEIGHTS,
        "mean": MEANS[:, :1],
        "covariance": COVARIANCES[:, :1, :1],
    },
    "skew_gaussian": {"mean": MEANS[0, :1], "skew": np.array([2.5]), "covariance": np.eye(1)},
    "student_t": {"mean": MEANS[0, :1], "degrees": 4.5, "scale": 2.0 * np.eye(1)},
    "gaussian_low_rank": {
        "mean": np.array([0.3]),
        "diagonal": np.array([0.5]),
        "factor": np.array([[1.5]]),
    },
}


def on_the_line(name):
    family = ROWS[name][0]
    return family, natural(family, LINE[name])


@pytest.mark.parametrize("name", LINE)
@pytest.mark.usefixtures("x64")
def test_density_integrates_to_one_and_gives_the_moments_and_the_entropy(name):
    family, lam = on_the_line(name)
    u, h = np.linspace(-30, 30, 20001, retstep=True)
    x, w = np.sinh(u), h * np.cosh(u)
    found = jax.jit(functools.partial(look, family))(lam, jnp.asarray(x)[:, None])
    log_q = np.asarray(found["log_prob"])
    q = w * np.exp(log_q)
    close(q.sum(), 1.0)
    mean = (q * x).sum()
    close(found["mean"][0], mean)
    close(found["variance"][0], (q * (x - mean) ** 2).sum())
    if name != "mixture":
        close(found["entropy"], -(q * log_q).sum())


@pytest.mark.slow
@every
def test_samples_have_the_moments_and_gradients(name):
    family, lam = member(name, jnp.float32)
    n = 100_000

    @jax.jit
    def draw(key, lam):
        return family.sample(key, lam, (n,)), family.mean(lam), family.variance(lam)

    x, mean, variance = (np.asarray(v, np.float64) for v in draw(KEY, lam))
    assert x.shape == (n, *ROWS[name][3])
    assert np.all(np.abs(x.mean(0) - mean) < 5 * np.sqrt(variance / n))
    squares = (x - mean) ** 2
    # The fourth moment of a Student-t of five degrees exists, that of its square does not.
    spread = 10 if name == "student_t" else 5
    assert np.all(np.abs(squares.mean(0) - variance) < spread * squares.std(0) / np.sqrt(n))
    slope = jax.jit(jax.grad(lambda lam: jnp.sum(family.sample(KEY, lam, (5,)))))(lam)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(slope))


@pytest.mark.slow
@every
@pytest.mark.usefixtures("x64")
def test_the_density_is_differentiable_twice(name):
    family, lam = member(name)
    theta = jnp.asarray(np.random.default_rng(3).normal(size=ROWS[name][3]))

    def log_prob(scale):
        return family.log_prob(jax.tree.map(lambda x: scale * x, lam), theta)

    h, slope = 1e-5, jax.grad(log_prob)
    look = jax.jit(jax.vmap(lambda scale: (log_prob(scale), slope(scale), jax.grad(slope)(scale))))
    value, first, second = look(jnp.array([1 - h, 1.0, 1 + h]))
    close(first[1], (value[2] - value[0]) / (2 * h), rtol=1e-6)
    close(second[1], (first[2] - first[0]) / (2 * h), rtol=1e-6)


# --- what every natural gradient does -------------------------------------------------------------


def saddle(x):
    return 20.0 * jnp.sum(jnp.cos(2.0 * x)) - 3.0 * jnp.sum(x * x)


@pytest.mark.slow
@every
@pytest.mark.usefixtures("x64")
def test_a_move_is_first_order_right_and_inside_for_any_rate(name):
    family, lam = member(name)
    rates = jnp.array([1e-6, 1e-2, 1.0, 7.0, 1e3])

    @jax.jit
    def gradients(key):
        return [family.natural_gradient(key, lam, saddle, 1, hessian=h)[1] for h in family.hessians]

    @jax.jit
    def moves(gradient):
        each = {
            form: jax.vmap(lambda rho, form=form: family.move(lam, gradient, rho, form))(rates)
            for form in ("auto", "improved", "improved_old")
        }
        return each, [jax.vmap(family.in_domain)(x) for x in each.values()]

    for gradient in gradients(KEY):
        moved, inside = moves(gradient)
        assert bool(jnp.all(jnp.stack(inside)))
        if name in ("gaussian_low_rank", "matrix_gaussian"):
            continue  # their parameters are not unique: compared as dense matrices below
        for new in moved.values():
            speed = jax.tree.map(lambda a, b: (a[0] - b) / rates[0], new, lam)
            near(speed, jax.tree.map(jnp.negative, gradient), rtol=1e-2, atol=1e-2)


def rule(name, order):
    """A quadrature rule as noise and weights, exact for polynomials."""
    if name.startswith("mixture"):
        z, w = hermite(order, 2)
        return jnp.repeat(z[:, None], 3, axis=1), w
    if name == "skew_gaussian":
        (z, w), (shift, ws) = hermite(order, 2), half_normal()
        noise = SkewNoise(jnp.repeat(jnp.asarray(shift), len(w)), jnp.tile(z, (len(ws), 1)))
        return noise, jnp.outer(ws, w).reshape(-1)
    z, w = hermite(order, 6)
    return (
        z.reshape(-1, 2, 3) if name == "matrix_gaussian" else LowRankNoise(z[:, :4], z[:, 4:])
    ), w


def both_forms(name, loss, order):
    family, lam = member(name)
    noise, w = rule(name, order)
    return jax.jit(
        lambda lam: [
            family.natural_gradient_at(lam, loss, noise, w, h) for h in ("exact", "reparameterized")
        ]
    )(lam)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mixture", "mixture_diagonal", "skew_gaussian", "matrix_gaussian"]
)
@pytest.mark.usefixtures("x64")
def test_both_forms_of_the_curvature_agree_in_expectation(name):
    exact, first = both_forms(name, quartic, 3 if name == "matrix_gaussian" else 8)
    near(exact, first, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_both_forms_of_a_low_rank_curvature_agree_in_expectation():
    def quadratic(x):  # elsewhere the directions that are tried differ
        return jnp.sum(jnp.arange(1.0, 5.0) * x * x) + jnp.sum(x) ** 2

    exact, first = both_forms("gaussian_low_rank", quadratic, 3)
    close(exact[0], first[0])
    for (_, h, x), (_, h_first, x_first) in [(exact[1], first[1])]:
        close(h, h_first, 1e-8, 1e-8)
        close(x @ x.T, x_first @ x_first.T, 1e-8, 1e-8)


@pytest.mark.slow
@every
def test_float32_stays_float32(name):
    family, lam = member(name, jnp.float32)
    value, new = jax.jit(lambda k, lam: family.step(k, lam, quartic, 0.1, 2, antithetic=True))(
        KEY, lam
    )
    assert {x.dtype for x in jax.tree.leaves((value, new))} == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, lam)
    assert bool(family.in_domain(new))
    assert jax.tree.leaves(family) == []
    with jax.enable_x64(True):  # constants must not widen what is float32
        wide = jax.eval_shape(lambda: family.step(KEY, lam, quartic, 0.1, 2))
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_options_are_checked():
    family, lam = member("skew_gaussian", np.float32)
    mixture, mixed = member("mixture", np.float32)
    with pytest.raises(ValueError, match="delta=True would never look away"):
        family.natural_gradient(None, lam, quartic, delta=True)
    with pytest.raises(ValueError, match="needs displacements"):
        mixture.natural_gradient(None, mixed, quartic, delta=True, hessian="reparameterized")
    with pytest.raises(ValueError, match="typed key"):
        mixture.natural_gradient(None, mixed, quartic)
    with pytest.raises(ValueError, match="samples=0"):
        mixture.natural_gradient(KEY, mixed, quartic, 0)
    with pytest.raises(ValueError, match="form='plain'"):
        mixture.move(mixed, mixed, 0.1, "plain")
    with pytest.raises(ValueError, match="no exponential family"):
        blr.Posterior(family, lam) * blr.Posterior(family, lam)
    with pytest.raises(ValueError, match="entropy in closed form"):
        mixture.entropy(mixed)
    with pytest.raises(ValueError, match="KL divergence in closed form"):
        mixture.kl(mixed, mixed)
    with pytest.raises(TypeError, match="no arithmetic"):
        lam + lam
    with pytest.raises(ValueError, match="must be Gaussian"):
        Mixture(blr.families.get("gaussian_diagonal"))


@pytest.mark.slow
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


# --- mixtures -------------------------------------------------------------------------------------


def bimodal(x):
    return 0.25 * jnp.sum((x**2 - 1.5) ** 2) - 0.3 * jnp.sum(x)


def trapezoid(count=801, reach=10.0):
    """A rule for standard normal numbers, spectral for anything smooth on the line."""
    z, h = jnp.linspace(-reach, reach, count, retstep=True)
    return z[:, None], h * jnp.exp(-0.5 * z * z) / jnp.sqrt(2 * jnp.pi)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_mixture_blocks_are_the_natural_gradient_of_the_joint_fisher_matrix():
    family, lam = on_the_line("mixture")
    z, w = trapezoid()
    flat, unravel = jax.flatten_util.ravel_pytree(lam)

    def points(lam):
        m, s = Gaussian().mean(lam.components), Gaussian().precision(lam.components)[..., 0]
        return m + z[:, None] / jnp.sqrt(s)  # [n, K, 1]

    def objective(flat):
        lam = unravel(flat)
        f = jax.vmap(jax.vmap(lambda x: bimodal(x) + family.log_prob(lam, x)))(points(lam))
        return jnp.exp(family.log_weights(lam)) @ (w @ f)

    def joint(flat, x):  # log q(k, x) for every k
        lam = unravel(flat)
        return family.log_weights(lam) + family.component_log_prob(lam, x)

    @jax.jit
    def expected(flat):
        lam = unravel(flat)
        scores = jax.vmap(jax.vmap(jax.jacrev(joint), (None, 0)), (None, 0))(flat, points(lam))
        own = jnp.einsum("nkkp->nkp", scores)
        share = w[:, None] * jnp.exp(family.log_weights(lam))
        fisher = jnp.einsum("nk,nkp,nkq->pq", share, own, own)
        return jnp.linalg.solve(fisher, jax.grad(objective)(flat))

    noise = jnp.repeat(z[:, None], 3, axis=1)
    _, gradient = jax.jit(lambda lam: family.natural_gradient_at(lam, bimodal, noise, w))(lam)
    close(jax.flatten_util.ravel_pytree(gradient)[0], expected(flat), 1e-8, 1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_log_density_of_a_mixture_has_the_derivatives_of_the_closed_form():
    family, lam = member("mixture")
    x = jnp.array([0.3, -0.4])
    slope, bend = jax.jit(
        lambda x: (jax.grad(family.log_prob, 1)(lam, x), jax.hessian(family.log_prob, 1)(lam, x))
    )(x)
    r = family.responsibilities(lam, x)
    s, d = Gaussian().precision(lam.components), x - Gaussian().mean(lam.components)
    pull = jnp.einsum("kde,ke->kd", s, d)
    grad = -r @ pull
    outer = jnp.einsum("k,kd,ke->de", r, pull, pull) - jnp.tensordot(r, s, 1)
    close(slope, grad)
    close(bend, outer - jnp.outer(grad, grad))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["auto", "improved", "improved_old"])
@pytest.mark.usefixtures("x64")
def test_one_component_makes_the_plain_gaussian_step(form):
    family = Mixture()
    lam = family.natural(
        weights=jnp.ones(1), mean=jnp.asarray(MEANS[:1]), covariance=jnp.asarray(COVARIANCES[:1])
    )
    single = jax.tree.map(lambda x: x[0], lam.components)
    rule = blr.estimators.natural_gradient("gaussian", quartic, blr.estimators.gauss_hermite(9))
    value, gradient = rule(None, single)
    z, w = hermite(9, 2)
    found, moved = jax.jit(lambda lam: family.natural_gradient_at(lam, quartic, z[:, None], w))(lam)
    new = blr.natural_step("gaussian", single, gradient, 0.7, step=form)
    close(found, value)
    near(jax.tree.map(lambda x: x[0], family.move(lam, moved, 0.7, form).components), new)
    diagonal = Mixture(Normal())
    lam = diagonal.natural(
        weights=jnp.ones(1), mean=jnp.asarray(MEANS[:1]), variance=jnp.asarray(VARIANCES[:1])
    )
    mean_field = blr.families.get("gaussian_diagonal")
    single = jax.tree.map(lambda x: x[0], lam.components)
    rule = blr.estimators.natural_gradient(mean_field, quartic, blr.estimators.gauss_hermite(9))
    value, gradient = rule(None, single)
    found, moved = jax.jit(lambda lam: diagonal.natural_gradient_at(lam, quartic, z[:, None], w))(
        lam
    )
    close(found, value)
    new = blr.natural_step(mean_field, single, gradient, 0.7, step=form)
    near(jax.tree.map(lambda x: x[0], diagonal.move(lam, moved, 0.7, form).components), new)


MOG = load_golden("mog_iblr")


@pytest.mark.slow
@pytest.mark.parametrize("case", MOG["cases"], ids=lambda case: case["name"])
@pytest.mark.usefixtures("x64")
def test_recorded_trajectories_of_the_improved_rule_are_reproduced(case):
    problem = {k: jnp.asarray(v) for k, v in MOG["problem"].items() if k != "kind"}
    target = Mixture()
    truth = target.natural(
        weights=problem["weights"], mean=problem["means"], precision=problem["precs"]
    )

    def loss(x):
        return -target.log_prob(truth, x)

    def as_lambda(means, precisions, log_odds):
        components = Gaussian().from_mean(jnp.asarray(means), jnp.asarray(precisions))
        return MixtureNatural(components, jnp.asarray(log_odds, dtype=jnp.float64))

    start, hyper = case["init"], case["hyper"]
    lam = as_lambda(start["means"], start["precs"], start["logits"])
    hessian = {"hess": "exact", "first": "reparameterized"}[case["option"]]

    @jax.jit
    def step(lam, theta):
        _, gradient = target.natural_gradient_from(lam, loss, theta, hessian)
        new = target.move(
            lam,
            gradient,
            hyper["lr"],
            "improved_old",
            weight_learning_rate=hyper["lr"] * hyper["decay_mix"],
        )
        return gradient, new

    for record in case["steps"]:
        theta = jnp.asarray(record["z"])
        close(jnp.log(target.responsibilities(lam, theta)).T, record["log_resp"], 1e-9, 1e-9)
        gradient, new = step(lam, theta)
        close(gradient.components.quadratic, -np.asarray(record["gV"]), 1e-9, 1e-9)
        means, precisions = Gaussian().mean(new.components), Gaussian().precision(new.components)
        close(means, record["means"], 1e-9, 1e-9)
        close(precisions, record["precs"], 1e-9, 1e-9)
        close(new.log_odds, record["logits"], 1e-9, 1e-9)
        lam = new


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_draws_of_the_mixture_and_of_its_components_agree_in_expectation():
    family, lam = on_the_line("mixture")

    @jax.jit
    @jax.vmap
    def drawn(key):
        theta = family.sample(key, lam, (500,))
        return family.natural_gradient_from(lam, bimodal, theta)

    @jax.jit
    @jax.vmap
    def stratified(key):
        return family.natural_gradient(key, lam, bimodal, 170)

    keys = jax.random.split(KEY, 100)
    for a, b in zip(jax.tree.leaves(drawn(keys)), jax.tree.leaves(stratified(keys)), strict=True):
        error = jnp.sqrt((a.var(0) + b.var(0)) / 100)
        assert bool(jnp.all(jnp.abs(a.mean(0) - b.mean(0)) < 4 * error))


@pytest.mark.slow
def test_at_the_means_distant_components_are_independent_newton_iterations():
    family = Mixture()
    lam = family.natural(
        weights=np.array([0.5, 0.5]), mean=np.array([[-9.0], [9.0]]), covariance=np.ones((2, 1, 1))
    )

    def loss(x):
        return 2.0 * jnp.sum((jnp.abs(x) - 8.0) ** 2)

    _, new = jax.jit(lambda lam: family.step(None, lam, loss, 1.0, delta=True))(lam)
    close(Gaussian().mean(new.components), [[-8.0], [8.0]], 1e-5)
    close(Gaussian().precision(new.components), np.full((2, 1, 1), 4.0), 1e-5)
    close(new.log_odds, [0.0], atol=1e-5)


def beta_binomial(y, n):
    """Minus the log density of `mixture_ncvi_targets`; where q looks, log Gamma is good enough."""

    def log_beta(a, b):
        return (
            jax.scipy.special.gammaln(a)
            + jax.scipy.special.gammaln(b)
            - jax.scipy.special.gammaln(a + b)
        )

    def loss(x):
        e, total = jax.nn.sigmoid(x[0]), jnp.exp(x[1])
        a, b = total * e, total * (1.0 - e)
        prior = x[1] - 2.0 * jax.nn.softplus(x[1])
        return -jnp.sum(log_beta(a + y, b + n - y) - log_beta(a, b)) - prior

    return loss


TARGETS = {problem["name"]: problem for problem in load_golden("mixture_ncvi_targets")["problems"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "order", "steps"),
    [
        ("sign-ambiguous scalar", 2, 24, 60),
        ("sign-ambiguous scalar", 3, 24, 150),
        pytest.param("beta-binomial cancer mortality", 2, 12, 80, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("x64")
def test_mixtures_reach_the_best_elbo_on_record(name, count, order, steps):
    problem, family = TARGETS[name], Mixture()
    if problem["dim"] == 1:
        loss = lambda x: jnp.sum((1.5 - x**2) ** 2 / 0.5 + (x - 0.3) ** 2 / 4.5)  # noqa: E731
        mean, scale = jnp.linspace(-1.0, 1.0, count)[:, None], 1.0
    else:
        loss = beta_binomial(jnp.asarray(problem["y"]), jnp.asarray(problem["n"]))
        mean, scale = jnp.array([[-7.0, 9.0], [-6.7, 7.0]]), 0.3
    points = jnp.array([at["x"] for at in problem["log_density_at"] if max(at["x"]) < 12.0])
    values = np.array([at["value"] for at in problem["log_density_at"] if max(at["x"]) < 12.0])
    close(jax.jit(jax.vmap(loss))(points), -values, 1e-9)
    lam = family.natural(
        weights=jnp.full(count, 1.0 / count),
        mean=mean,
        covariance=scale
        * jnp.broadcast_to(jnp.eye(problem["dim"]), (count,) + (problem["dim"],) * 2),
    )
    z, w = hermite(order, problem["dim"])
    noise = jnp.repeat(z[:, None], count, axis=1)

    def elbo(lam):
        z, w = hermite(2 * order, problem["dim"])
        theta = Gaussian().mean(lam.components) + Gaussian().displace(
            lam.components, jnp.repeat(z[:, None], count, axis=1)
        )
        f = jax.vmap(jax.vmap(lambda x: -loss(x) - family.log_prob(lam, x)))(theta)
        return jnp.exp(family.log_weights(lam)) @ (w @ f)

    @jax.jit
    def run(lam):
        def step(lam, _):
            _, gradient = family.natural_gradient_at(lam, loss, noise, w)
            return family.move(lam, gradient, 0.3), None

        return jax.lax.scan(step, lam, None, steps)[0]

    fit = next(fit for fit in problem["fits"] if fit["K"] == count)
    found = jax.jit(elbo)(run(lam))
    assert fit["elbo_with_more_nodes"] - 0.002 < found < problem["log_normaliser"]


# --- skew Gaussians -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_skew_step_is_the_chain_rule_in_expectation_coordinates():
    family, lam = member("skew_gaussian")
    m, a, cov = (jnp.asarray(ROWS["skew_gaussian"][1][k]) for k in ("mean", "skew", "covariance"))
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

    cross = jnp.outer(m, a)
    mu = (
        m + c * a,
        c * m + a,
        jnp.outer(m, m) + jnp.outer(a, a) + c * (cross + cross.T) + cov,
    )
    _, found = jax.jit(lambda lam: family.natural_gradient_at(lam, quartic, noise, w))(lam)
    linear, skew, quadratic = jax.jit(jax.grad(objective))(mu)
    close(found.linear, linear, 1e-8, 1e-8)
    close(found.skew, skew, 1e-8, 1e-8)
    close(found.quadratic, 0.5 * (quadratic + quadratic.T), 1e-8, 1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_without_skew_it_is_the_gaussian_rule():
    family = SkewGaussian()
    s, m = jnp.asarray(spd(4)), jnp.asarray(MEANS[0])
    inner = Gaussian().from_mean(m, s)
    lam = family.Natural(inner.linear, jnp.zeros(2), inner.quadratic)
    close(family.entropy(lam), Gaussian().entropy(inner))
    close(family.log_prob(lam, m + 1.0), Gaussian().log_prob(inner, m + 1.0))
    noise, w = rule("skew_gaussian", 5)
    _, found = jax.jit(lambda lam: family.natural_gradient_at(lam, lambda x: x @ x, noise, w))(lam)
    # The loss is a Gaussian site: its natural gradient is its own -lambda, the entropy's is lambda.
    close(found.quadratic, jnp.eye(2) - 0.5 * s, 1e-8)
    site = Gaussian().from_mean(jnp.zeros(2), 2.0 * jnp.eye(2))
    close(found.linear, inner.linear - site.linear, 1e-8)
    close(found.skew, jnp.zeros(2), atol=1e-8)


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


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_student_blocks_are_the_natural_gradient_of_their_fisher_matrices():
    family, a = StudentT(), 3.3
    standard = {"mean": np.array([0.4]), "scale": np.array([[0.7]]), "degrees": 2 * a}
    lam = natural(family, standard)
    t, slope, w = scale_nodes(a)
    keep = w > 1e-14
    t, slope, w = t[keep], slope[keep], w[keep]
    z, wz = trapezoid(401, 8.0)
    noise = StudentTNoise(
        jnp.repeat(t, len(wz)), jnp.repeat(slope, len(wz)), jnp.tile(z, (len(t), 1))
    )
    weights = jnp.outer(w, wz).reshape(-1)

    def loss(x):
        return jnp.sum(jnp.log(1 + (x - 1.0) ** 2 / 4))

    u, h = jnp.linspace(-24.0, 24.0, 8001, retstep=True)
    x, dx = jnp.sinh(u)[:, None], h * jnp.cosh(u)

    def objective(mu):  # E[theta / w], E[theta^2 / w], a
        cov = mu[1] - mu[0] ** 2
        log_q = family.log_prob(
            type(lam)(mu[:1] / cov, -0.5 / cov[None, None] + 0 * lam.quadratic, mu[2]), x
        )
        return jnp.sum(dx * jnp.exp(log_q) * (jax.vmap(loss)(x) + log_q))

    expected = jax.jit(jax.grad(objective))(jnp.array([0.4, 0.7 + 0.16, a]))
    forms = [
        jax.jit(lambda lam, h=h: family.natural_gradient_at(lam, loss, noise, weights, h))(lam)
        for h in ("exact", "reparameterized")
    ]
    fisher = special.polygamma(1, a) - 1 / a
    for _, found in forms:
        close(found.linear, expected[:1], 1e-5, 1e-5)
        close(found.quadratic[0], expected[1:2], 1e-5, 1e-5)
        close(found.shape, expected[2] / fisher, 1e-5, 1e-5)


@pytest.mark.slow
def test_draws_of_the_hidden_scale_carry_the_derivative_in_the_degrees():
    family, lam = member("student_t", np.float32)
    noise = jax.jit(lambda key: family.noise(key, lam, 200_000))(KEY)
    a = 2.5
    # E[log w] = log a - psi(a) and E[1 / w] = 1 for every a.
    for value, expected in [
        (noise.slope, 1 / a - special.polygamma(1, a)),
        (-jnp.exp(-noise.log_scale) * noise.slope, 0.0),
    ]:
        value = np.asarray(value, np.float64)
        assert abs(value.mean() - expected) < 4 * value.std() / np.sqrt(value.size)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_student_learns_a_student():
    family = StudentT()
    truth = natural(family, {"mean": np.array([1.0, -1.0]), "scale": spd(5), "degrees": 4.0})
    start = natural(family, {"mean": np.zeros(2), "scale": np.eye(2), "degrees": 15.0})

    @jax.jit
    def run(lam):
        def step(lam, t):
            key, rho = jax.random.fold_in(KEY, t), jnp.where(t < 300, 0.5, 0.05)
            loss = lambda x: -family.log_prob(truth, x)  # noqa: E731
            return family.step(key, lam, loss, rho, 400, antithetic=True)[1], None

        return jax.lax.scan(step, lam, jnp.arange(500))[0]

    found, true = family.standard(run(start)), family.standard(truth)
    close(found["mean"], true["mean"], atol=0.03)
    close(found["scale"], true["scale"], 0.1, 0.02)
    close(found["degrees"], 4.0, 0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_many_degrees_of_freedom_are_a_gaussian():
    family, gaussian = StudentT(), Gaussian()
    lam = family.natural(mean=MEANS[0], scale=spd(5), degrees=1e12)
    inner = gaussian.natural(mean=jnp.asarray(MEANS[0]), covariance=jnp.asarray(spd(5)))
    x = jnp.asarray(MEANS)
    close(family.log_prob(lam, x), gaussian.log_prob(inner, x), 1e-10)
    close(family.entropy(lam), gaussian.entropy(inner), 1e-10)


# --- low rank -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_low_rank_equals_dense_algebra():
    family, lam = member("gaussian_low_rank")
    dense = np.diag(lam.diagonal) + np.asarray(lam.factor @ lam.factor.T)
    other = lam._replace(
        mean=lam.mean + 0.3, diagonal=2.0 * lam.diagonal, factor=lam.factor[:, ::-1] - 0.2
    )
    dense_other = np.diag(other.diagonal) + np.asarray(other.factor @ other.factor.T)
    cov = np.linalg.inv(dense)
    v = jnp.arange(1.0, 5.0)
    close(family.solve(lam, v), cov @ v)
    close(family.precision_product(lam, v), dense @ v)
    close(family.variance(lam), np.diag(cov))
    p, q = (
        Gaussian().from_mean(x.mean, jnp.asarray(s))
        for x, s in ((lam, dense), (other, dense_other))
    )
    close(family.entropy(lam), Gaussian().entropy(p))
    close(family.kl(lam, other), Gaussian().kl(p, q))
    close(family.kl(lam, lam), 0.0, atol=1e-12)
    z = LowRankNoise(jnp.eye(6)[:, :4], jnp.eye(6)[:, 4:])
    root = np.asarray(family.displace(lam, z))  # the columns of a root of the covariance
    close(root.T @ root, cov)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_low_rank_step_adds_curvature_and_keeps_the_diagonal():
    family, lam = member("gaussian_low_rank")
    rng = np.random.default_rng(4)
    g, u, x = rng.normal(size=4), rng.uniform(0.5, 2.0, size=4), rng.normal(size=(4, 3))
    gradient = LowRankGradient(*map(jnp.asarray, (g, lam.diagonal - u, x)))

    def dense(lam):
        return np.diag(lam.diagonal) + np.asarray(lam.factor @ lam.factor.T)

    for rho in (0.2, 1.0):
        new = family.move(lam, gradient, rho)
        target = (1 - rho) * dense(lam) + rho * (np.diag(u) + x @ x.T)
        close(np.diag(dense(new)), np.diag(target))
        leading = np.linalg.eigvalsh(target - np.diag((1 - rho) * lam.diagonal + rho * u))[-2:]
        close(np.sort(np.sum(np.square(new.factor), 0)), leading)
        close(new.mean, lam.mean - rho * np.linalg.solve(dense(new), g))
        old = family.move(lam, gradient, rho, "improved_old")
        close(old.mean, lam.mean - rho * np.linalg.solve(dense(lam), g))
    wide = lam._replace(factor=jnp.pad(lam.factor, ((0, 0), (0, 2))))  # nothing is left out
    new = family.move(wide, gradient, 0.2)
    close(dense(new), 0.8 * dense(lam) + 0.2 * (np.diag(u) + x @ x.T))


@pytest.mark.slow
@pytest.mark.parametrize("hessian", ["exact", "reparameterized"])
@pytest.mark.usefixtures("x64")
def test_low_rank_finds_a_quadratic_loss_of_its_kind(hessian):
    family, rng = GaussianLowRank(), np.random.default_rng(5)
    u, b, centre = rng.uniform(1.0, 3.0, size=8), rng.normal(size=(8, 2)), rng.normal(size=8)
    target = np.diag(u) + b @ b.T
    loss = lambda x: 0.5 * (x - centre) @ target @ (x - centre)  # noqa: E731
    start = family.natural(mean=np.zeros(8), diagonal=np.ones(8), factor=np.zeros((8, 2)))
    exact = hessian == "exact"

    @jax.jit
    def run(lam):
        def step(lam, t):
            rho = 0.7 if exact else 0.5 / (1 + t / 10)
            key = jax.random.fold_in(KEY, t)
            _, lam = family.step(
                key, lam, loss, rho, 4 if exact else 100, hessian=hessian, antithetic=True
            )
            return lam, None

        return jax.lax.scan(step, lam, jnp.arange(100))[0]

    lam = run(start)
    found = np.diag(lam.diagonal) + np.asarray(lam.factor @ lam.factor.T)
    tolerance = 1e-6 if exact else 0.1
    close(lam.mean, centre, atol=tolerance)
    close(found, target, atol=tolerance * 5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_low_rank_columns_are_the_gradients_of_the_terms():
    family = GaussianLowRank(known_curvature=0.25)
    lam = family.natural(mean=np.zeros(3), diagonal=np.ones(3), factor=np.ones((3, 1)))
    rows = jnp.asarray(np.random.default_rng(6).normal(size=(5, 3)))
    value, gradient = jax.jit(
        lambda lam: family.natural_gradient(
            None, lam, lambda x: (rows @ x - 1.0) ** 2, hessian="squared_gradient", delta=True
        )
    )(lam)
    each = -2.0 * rows
    close(value, 5.0)
    close(gradient.mean, each.sum(0))
    close(gradient.factor @ gradient.factor.T, each.T @ each)
    close(gradient.diagonal, 0.75 * jnp.ones(3))


@pytest.mark.slow
def test_low_rank_never_forms_a_square_matrix():
    family, d = GaussianLowRank(), 300
    lam = family.natural(mean=jnp.zeros(d), diagonal=jnp.ones(d), factor=jnp.ones((d, 3)))

    def everything(lam):
        _, new = family.step(KEY, lam, lambda x: jnp.sum(jnp.cos(x)), 0.1, 2)
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
    return jnp.kron(lam.row_precision, lam.column_precision)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_matrix_gaussian_equals_dense_algebra():
    family, lam = member("matrix_gaussian")
    other = MatrixGaussianNatural(lam.mean + 0.5, 2.0 * jnp.asarray(spd(8)), jnp.asarray(spd(9, 3)))
    p, q = (Gaussian().from_mean(x.mean.reshape(-1), kron(x)) for x in (lam, other))
    close(family.entropy(lam), Gaussian().entropy(p))
    close(family.kl(lam, other), Gaussian().kl(p, q))
    close(family.variance(lam).reshape(-1), Gaussian().variance(p))
    root = family.displace(lam, jnp.eye(6).reshape(6, 2, 3)).reshape(6, 6)
    close(root.T @ root, Gaussian().covariance(p))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_matrix_blocks_are_the_natural_gradient_of_the_dense_fisher_matrix():
    family, lam = member("matrix_gaussian")
    curvature, linear = jnp.asarray(spd(10, 6)), jnp.arange(6.0)

    def loss(x):
        return 0.5 * x.reshape(-1) @ curvature @ x.reshape(-1) + linear @ x.reshape(-1)

    flat, unravel = jax.flatten_util.ravel_pytree((lam.row_precision, lam.column_precision))

    def precision(flat):
        return jnp.kron(*unravel(flat))

    def objective(flat):  # E[loss] - H, up to what does not move with the precision
        s = precision(flat)
        return 0.5 * jnp.trace(curvature @ jnp.linalg.inv(s)) + 0.5 * jnp.linalg.slogdet(s)[1]

    @jax.jit
    def expected(flat):
        jacobian = jax.jacrev(precision)(flat).reshape(36, -1)
        cov = jnp.linalg.inv(precision(flat))
        fisher = 0.5 * jacobian.T @ jnp.kron(cov, cov) @ jacobian
        step = jnp.linalg.lstsq(fisher, jax.grad(objective)(flat), rcond=1e-10)[0]
        return (jacobian @ step).reshape(6, 6)

    @jax.jit
    def found(lam):
        z, w = rule("matrix_gaussian", 3)
        out = [
            family.natural_gradient_at(lam, loss, z, w, h)[1] for h in ("exact", "reparameterized")
        ]
        return out, [
            jax.jvp(precision, (flat,), (jax.flatten_util.ravel_pytree(g[1:])[0],))[1] for g in out
        ]

    gradients, moved = found(lam)
    change = jnp.linalg.solve(kron(lam), curvature @ lam.mean.reshape(-1) + linear)
    for gradient, direction in zip(gradients, moved, strict=True):
        close(direction, expected(flat), 1e-8, 1e-8)
        close(gradient.mean.reshape(-1), change, 1e-8, 1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_squared_gradients_of_a_matrix_are_kronecker_contractions():
    family, lam = member("matrix_gaussian")
    u, v = jnp.linalg.inv(lam.row_precision), jnp.linalg.inv(lam.column_precision)
    g = jax.grad(quartic)(lam.mean)
    _, gradient = family.natural_gradient(
        None, lam, quartic, hessian="squared_gradient", delta=True
    )
    close(gradient.mean, u @ g @ v)
    row = g @ v @ g.T / 3 - lam.row_precision
    column = g.T @ u @ g / 2 - lam.column_precision
    scale = 0.5 * jnp.trace(u @ row) / 2
    close(scale, 0.5 * jnp.trace(v @ column) / 3)
    close(gradient.row_precision, scale * lam.row_precision - row)
    close(gradient.column_precision, scale * lam.column_precision - column)


@pytest.mark.slow
@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.usefixtures("x64")
def test_matrix_gaussian_settles_where_the_divergence_is_least(separable):
    family, start = member("matrix_gaussian")
    rows, columns = jnp.asarray(spd(11)), jnp.asarray(spd(12, 3))
    target = jnp.kron(rows, columns) if separable else jnp.asarray(spd(13, 6))
    loss = lambda x: 0.5 * (x.reshape(-1) - 1.0) @ target @ (x.reshape(-1) - 1.0)  # noqa: E731

    @jax.jit
    def run(lam, rho):
        def step(lam, _):
            return family.step(None, lam, loss, rho, delta=True)[1], None

        return jax.lax.scan(step, lam, None, 300)[0]

    def divergence(row, column):
        s = jnp.kron(row, column)
        return 0.5 * jnp.trace(target @ jnp.linalg.inv(s)) + 0.5 * jnp.linalg.slogdet(s)[1]

    # A unit step on another quadratic overshoots in the mean, whose precision is approximate.
    for rho in (0.5, 1.0) if separable else (0.5,):
        lam = run(start, rho)
        close(lam.mean, jnp.ones((2, 3)), 1e-8)
        if separable:
            close(kron(lam), target, 1e-7, 1e-9)
        for slope in jax.grad(divergence, (0, 1))(lam.row_precision, lam.column_precision):
            close(slope, jnp.zeros_like(slope), atol=1e-7)
        close(
            jnp.linalg.slogdet(lam.row_precision)[1] / 2,
            jnp.linalg.slogdet(lam.column_precision)[1] / 3,
        )
