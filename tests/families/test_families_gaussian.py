"""The Gaussian families: golden numbers, published retractions, float32, trees of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_rows import ROWS, spd
from family_rows.gaussian import FIXED, GAUSSIAN, MEAN, NORMAL, SHARED
from family_tools import member, program, stacked
from jax.flatten_util import ravel_pytree
from scipy import stats
from tools import close, load_golden, near

from blr_optax import families
from blr_optax.families import ExponentialFamily, GaussianNatural

LOG_2PI = np.log(2 * np.pi)
DIAGONAL = families.get("gaussian_diagonal")
FORMS = ("improved", "improved_old", "square_root")


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
@pytest.mark.parametrize("form", FORMS)
def test_retract_forms_are_the_published_formulas(x64, form, rho):
    rng = np.random.default_rng(7)
    m, s, g = rng.normal(size=3), spd(4, 3), rng.normal(size=3)
    h = rng.normal(size=(3, 3))
    h = 0.3 * (h + h.T)  # indefinite
    step = GaussianNatural(-rho * (s @ m + g - h @ m), -0.5 * rho * (h - s))
    found_mean, found_precision = retracted(form)(m, s, step)
    if form == "square_root":
        mean, precision = square_root_in_mean_and_factor(m, s, g, h, rho)
    else:
        mean, precision = improved_in_mean_and_precision(
            m, s, g, h - s, rho, form == "improved_old"
        )
    close(found_precision, precision, rtol=1e-10, atol=1e-10)
    close(found_mean, mean, rtol=1e-10, atol=1e-10)


@functools.cache
def retracted(form):
    """(mean, precision) of a Gaussian after a step."""

    @jax.jit
    def run(m, s, step):
        new = GAUSSIAN.retract(GAUSSIAN.natural(mean=m, precision=s), step, form=form)
        return GAUSSIAN.mean(new), GAUSSIAN.precision(new)

    return run


@pytest.mark.parametrize("form", FORMS)
def test_normal_retracts_like_a_gaussian_of_one_dimension(x64, form):
    @jax.jit
    def both(lam, step):
        one = (GaussianNatural(x.linear[None], x.quadratic[None, None]) for x in (lam, step))
        return GAUSSIAN.retract(*one, form=form), NORMAL.retract(lam, step, form=form)

    lam = GaussianNatural(np.array(0.7), np.array(-1.2))
    full, single = both(lam, GaussianNatural(np.array(-0.4), np.array(0.9)))
    near(jax.tree.map(np.ravel, full), jax.tree.map(np.ravel, single))


def test_square_root_steps_fall_back_before_the_factor_changes_sign(x64):
    normal, full = families.get("normal"), families.get("gaussian")

    def precision_after(family, lam, step):
        return family.precision(family.retract(lam, step, form="square_root"))

    after = program(precision_after, "family")
    lam = normal.Natural(np.array(0.0), np.array(-0.5))
    for d, wanted in ((1.0, 4.0), (3.0, 1 + 3 + 4.5), (100.0, 1 + 100 + 5000.0)):
        new = after(family=normal, lam=lam, step=normal.Natural(np.array(0.0), np.array(-0.5 * d)))
        np.testing.assert_allclose(new, wanted, rtol=1e-12)
    lam = full.Natural(np.zeros(2), -0.5 * np.eye(2))
    new = after(family=full, lam=lam, step=full.Natural(np.zeros(2), -0.5 * 100.0 * np.eye(2)))
    np.testing.assert_allclose(new, 5101.0 * np.eye(2), rtol=1e-12)


def test_gaussian_broadcasts_means_against_precisions(x64):
    full = families.get("gaussian")
    lam = full.natural(mean=jnp.ones((4, 2)), precision=jnp.eye(2))
    assert full.mean(lam).shape == (4, 2)
    assert full.entropy(lam).shape == (4,)
    with pytest.raises(ValueError, match="precision must be symmetric"):
        full.natural(mean=jnp.zeros(2), precision=jnp.array([[1.0, 0.5], [0.0, 1.0]]))


def test_base_measure_gradient_of_the_fixed_gaussian_is_minus_lambda(x64):
    lam = member(stacked(ROWS["gaussian_fixed"]), 0)
    own = program(FIXED.base_measure_gradient)(lam)
    default = jax.jit(lambda lam: ExponentialFamily.base_measure_gradient(FIXED, lam))(lam)
    near(own.linear, -lam.linear)
    near(default.linear, -lam.linear)
    assert not np.any(own.precision)


# --- float32 --------------------------------------------------------------------------------------


def wide(lam):
    """The same lambda in float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), lam)


def float32(natural, **standard):
    return natural(**{k: jnp.asarray(np.asarray(v, np.float32)) for k, v in standard.items()})


SAID = {"mean": 1e-6, "variance": 1e-6, "entropy": 1e-6, "log_partition": 2e-6}


def say(family, lam):
    return {f: getattr(family, f)(lam) for f in SAID}


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
    lam = float32(family.natural, **standard)  # eagerly: its checks accept these
    assert {x.dtype for x in jax.tree.leaves(lam)} == {jnp.dtype("float32")}
    said = program(say, "family")
    found, truth = said(family=family, lam=lam), said(family=family, lam=wide(lam))
    for f, rtol in SAID.items():
        assert found[f].dtype == jnp.float32
        close(found[f], truth[f], rtol=rtol, atol=1e-6)
    sd = np.sqrt(truth["variance"])
    theta = np.asarray(truth["mean"] + sd, np.float32)
    # The mean is known to half a unit in its last place, in units of sd:
    blur = np.max(np.abs(np.spacing(np.asarray(found["mean"]))) / sd)
    log_prob = program(family.log_prob)
    close(
        log_prob(lam, theta),
        log_prob(wide(lam), wide(theta)),
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
        lam_p, lam_q = (float32(program(family.natural), **s) for s in (p, q))
        if family is NORMAL:  # the means differ by rounding: their term is judged on its own
            lam_q = lam_q._replace(linear=np.asarray(lam_q.quadratic) * 0)
            lam_p = lam_p._replace(linear=np.asarray(lam_p.quadratic) * 0)
        precisions = [program(family.precision)(x) for x in (lam_p, lam_q)]
        truth = kl_in_numpy(lam_p, lam_q, *precisions)
        blur = 0.0 if family is not FIXED else 20 * np.spacing(np.float32(2.0)) / gap
        close(program(family.kl)(lam_p, lam_q), truth, rtol=2e-5 + blur)


def kl_in_numpy(lam_p, lam_q, *precisions):
    """KL in float64 from the eigenvalues of S_q S_p^-1 by a series, so that nothing cancels."""
    sp, sq = (np.atleast_2d(np.asarray(x, np.float64)) for x in precisions)
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
    for family, mean, unit in [(NORMAL, 0.0, 1.0), (GAUSSIAN, np.zeros(2), np.eye(2))]:
        p, q = (
            float32(program(family.natural), mean=mean, precision=s * unit) for s in (1.0, 1e-9)
        )
        close(program(family.kl)(p, q), np.size(mean) * expected, rtol=1e-6)


def test_kl_between_two_known_precisions(x64):
    p, q = (program(FIXED.natural)(mean=MEAN, precision=s) for s in (SHARED, 2 * SHARED))
    close(program(FIXED.kl)(p, q), 2 - 1 - np.log(2))


# --- golden numbers -------------------------------------------------------------------------------

GOLDEN = load_golden("expfam_values")["families"]
NAMES = {"normal": "normal", "multivariate_normal": "gaussian"}  # golden name -> registered name
CASES = [
    pytest.param(NAMES[name], case, id=f"{name}-{i}")
    for name, table in GOLDEN.items()
    if name in NAMES
    for i, case in enumerate(table["cases"])
]


def cases_of(name):
    return next(table["cases"] for key, table in GOLDEN.items() if NAMES.get(key, key) == name)


def golden_natural(name, params):
    spread = {"variance": params["var"]} if name == "normal" else {"covariance": params["cov"]}
    standard = {"mean": params["mean"], **spread}
    return program(families.get(name).natural)(**{k: np.asarray(v) for k, v in standard.items()})


@functools.cache
def golden_program(family):
    @jax.jit
    def evaluate(lam, points, other, v, mu):
        return {
            "mu": family.expectation(lam),
            "log_partition": family.log_partition(lam),
            "entropy": family.entropy(lam),
            "log_prob": jax.vmap(lambda x: family.log_prob(lam, x))(points),
            "kl": family.kl(lam, other),
            "fisher": family.fisher(lam),
            "product": family.fisher_product(lam, v),
            "solved": family.natural_from_expectation(mu),
        }

    return lambda *args: jax.tree.map(np.asarray, evaluate(*args))


def test_golden_rows_of_both_gaussians_are_found():
    assert [case.values[0] for case in CASES] == ["normal"] * 5 + ["gaussian"] * 5


@pytest.mark.parametrize(("name", "case"), CASES)
def test_golden_values(x64, name, case):
    family = families.get(name)
    lam = family.Natural(*map(np.asarray, case["natural"]))
    other = next(c for c in cases_of(name) if c["params"] == case["kl"]["q_params"])["natural"]
    action = case.get("fisher_action", {"dlam": case["natural"]})
    said = golden_program(family)(
        lam,
        np.asarray([point["x"] for point in case["log_prob"]]),
        family.Natural(*map(np.asarray, other)),
        family.Natural(*map(np.asarray, action["dlam"])),
        family.Expectation(*map(np.asarray, case["expectation"])),
    )
    d = np.size(case["params"]["mean"])
    # covariance -> precision costs the condition number; from lambda on we compare at 1e-12.
    condition = np.linalg.cond(np.atleast_2d(np.asarray(case["natural"][1])))
    rtol = 1e-12 + 1e-15 * condition
    scale = [np.max(np.abs(x)) for x in case["natural"]]
    for found, expected, unit in zip(
        golden_natural(name, case["params"]), case["natural"], scale, strict=True
    ):
        close(found, expected, rtol, atol=rtol * unit)
    for found, expected in zip(said["mu"], case["expectation"], strict=True):
        close(found, expected, rtol, atol=rtol * np.max(np.abs(expected)))
    close(said["log_partition"] + d / 2 * LOG_2PI, case["log_partition"], rtol)
    close(said["entropy"], case["entropy"], rtol, atol=rtol)
    # theta - m is known to a rounding of m, in units of the smallest sd.
    for found, point in zip(said["log_prob"], case["log_prob"], strict=True):
        blur = (
            1e-16
            * np.max(np.abs(case["params"]["mean"]))
            * np.sqrt(np.max(np.abs(case["natural"][1])))
        )
        close(found, point["value"], 10 * rtol, atol=rtol + 20 * blur)
    close(said["kl"], case["kl"]["kl_p_q"], 10 * rtol)
    if "fisher" in case:
        close(said["fisher"], case["fisher"], rtol)
    else:
        for found, expected in zip(said["product"], action["dmu"], strict=True):
            close(found, expected, 10 * rtol, atol=10 * rtol * np.max(np.abs(expected)))
    amplified = case.get("mu_to_lambda_relative_amplification")
    if amplified is None:
        amplified = condition * (1 + np.max(np.abs(case["expectation"][0])) ** 2)
    if amplified < 1e10:
        for found, expected, unit in zip(said["solved"], case["natural"], scale, strict=True):
            close(found, expected, atol=1e-14 * amplified * unit)


# --- trees ----------------------------------------------------------------------------------------

TREE = {"b": np.array([0.5, -1.0]), "w": np.array([[1.0, 2.0, 3.0]])}
PRECISION = {"b": np.array([4.0, 0.5]), "w": np.array([[1.0, 2.0, 9.0]])}
HOLE = optax.MaskedNode()


def tree_natural(hole=False):
    more = {"h": HOLE} if hole else {}
    return program(DIAGONAL.natural)(mean={**TREE, **more}, precision={**PRECISION, **more})


def flat_reference():
    mean, precision = (np.concatenate([x["b"].ravel(), x["w"].ravel()]) for x in (TREE, PRECISION))
    return stats.multivariate_normal(mean, np.diag(1 / precision))


@pytest.mark.parametrize("hole", [False, True])
def test_mean_field_is_a_diagonal_gaussian(x64, hole):
    more = {"h": HOLE} if hole else {}

    def full(x):
        mean, precision = (ravel_pytree(f(x))[0] for f in (DIAGONAL.mean, DIAGONAL.precision))
        return GAUSSIAN.natural(mean=mean, precision=jnp.diag(precision))

    @jax.jit
    def say(lam):
        other = DIAGONAL.combine((0.7, lam))
        full_lam, full_other = full(lam), full(other)
        theta = DIAGONAL.sample(jax.random.key(0), lam, (3, 7))
        one = jax.tree.map(lambda x: x[0, 0], theta)
        back, status = DIAGONAL.natural_from_expectation(
            DIAGONAL.expectation(lam), with_status=True
        )
        return {
            "mean": DIAGONAL.mean(lam),
            "variance": DIAGONAL.variance(lam),
            "precision": DIAGONAL.precision(lam),
            "entropy": DIAGONAL.entropy(lam),
            "theta": theta,
            "log_q": DIAGONAL.log_prob(lam, theta),
            "default_log_q": ExponentialFamily.log_prob(DIAGONAL, lam, one),
            "kl": (DIAGONAL.kl(lam, other), GAUSSIAN.kl(full_lam, full_other)),
            "log_partition": (DIAGONAL.log_partition(lam), GAUSSIAN.log_partition(full_lam)),
            "slope": (jax.grad(DIAGONAL.log_partition)(lam), DIAGONAL.expectation(lam)),
            "back": (back, DIAGONAL.natural(**DIAGONAL.standard(lam)),
                     DIAGONAL.natural_at(DIAGONAL.mean(lam), lam)),
            "inside": (status, DIAGONAL.in_domain(lam)),
            "outside": DIAGONAL.in_domain(DIAGONAL.combine((-1.0, lam))),
            "fresh": DIAGONAL.natural_at(DIAGONAL.mean(lam)).quadratic["b"],
        }  # fmt: skip

    lam = tree_natural(hole)
    assert isinstance(lam, GaussianNatural)
    said = jax.tree.map(np.asarray, say(lam))
    near(said["mean"], {**TREE, **more})
    near(said["variance"]["w"], 1 / PRECISION["w"])
    near(said["precision"]["b"], PRECISION["b"])
    reference = flat_reference()
    close(said["entropy"], reference.entropy())
    theta = said["theta"]
    assert jax.tree.map(np.shape, theta) == {"b": (3, 7, 2), "w": (3, 7, 1, 3), **more}
    flat = np.concatenate([theta["b"], theta["w"][..., 0, :]], -1)
    close(said["log_q"], reference.logpdf(flat))
    close(said["default_log_q"], said["log_q"][0, 0])
    close(*said["kl"])
    close(*said["log_partition"])
    slope, mu = said["slope"]
    near(slope, GaussianNatural(*mu))
    for back in said["back"]:
        near(back, lam)
    assert all(said["inside"]) and not said["outside"]
    near(said["fresh"], np.full(2, -0.5))


def test_mean_field_moves_leaf_by_leaf(x64):
    lam = tree_natural(hole=True)
    step = GaussianNatural(
        {"b": np.ones(2), "w": np.ones((1, 3)), "h": HOLE},
        {"b": np.array([10.0, 0.01]), "w": np.full((1, 3), 0.2), "h": HOLE},
    )
    leaves = ("b", "w")

    @jax.jit
    def move(lam, step):
        alone = {}
        for leaf in leaves:
            one, d = (GaussianNatural(x.linear[leaf], x.quadratic[leaf]) for x in (lam, step))
            alone[leaf] = NORMAL.retract(one, d), NORMAL.safe_step(one, d)[0]
        return DIAGONAL.safe_step(lam, step), DIAGONAL.retract(lam, step), alone

    (new, count), bent, alone = move(lam, step)
    assert int(count) == 1  # the first number of b
    for leaf in leaves:
        near(GaussianNatural(bent.linear[leaf], bent.quadratic[leaf]), alone[leaf][0])
        near(GaussianNatural(new.linear[leaf], new.quadratic[leaf]), alone[leaf][1])

    @jax.jit
    def fisher(plain):
        flat = GaussianNatural(*(ravel_pytree(x)[0] for x in plain))
        return DIAGONAL.fisher(plain), jax.vmap(NORMAL.fisher)(flat)

    whole, blocks = map(np.asarray, fisher(tree_natural()))
    close(whole.sum(), blocks.sum())


def test_mean_field_draws_differ_between_leaves_and_follow_the_path(x64):
    @jax.jit
    def draw(mean):
        q = DIAGONAL.natural(mean=mean, precision=1.0)
        return DIAGONAL.sample(jax.random.key(0), q)

    both = draw({"a": np.zeros(50), "b": np.zeros(50)})
    assert not np.any(np.asarray(both["a"]) == np.asarray(both["b"]))
    alone = draw({"a": HOLE, "b": np.zeros(50)})
    np.testing.assert_array_equal(alone["b"], both["b"])


def test_leaves_of_other_mean_fields_draw_differently():
    family = families.MeanField(families.get("gamma"))
    ones = {"a": np.ones(9), "b": np.ones(9)}
    found = family.sample(jax.random.key(0), family.natural(concentration=ones, rate=ones))
    assert not np.any(np.asarray(found["a"]) == np.asarray(found["b"]))


def test_mean_field_refuses_vector_families():
    with pytest.raises(ValueError, match="Gaussian is not elementwise"):
        families.MeanField(GAUSSIAN)


def test_a_family_beside_a_point_is_that_family_and_a_point(x64):
    points = families.MeanField(families.Point())
    beside = families.SideBySide((DIAGONAL, points))

    @jax.jit
    def say(mean, point):
        free = DIAGONAL.natural(mean=mean, precision=4.0)
        lam = beside.natural(free, points.natural(value=point))
        draw = beside.sample(jax.random.key(0), lam, (5,))
        twice = beside.combine((1.0, lam), (1.0, lam))
        return {
            "mean": beside.mean(lam),
            "variance": beside.variance(lam),
            "draw": draw,
            "log_prob": (
                beside.log_prob(lam, draw),
                DIAGONAL.log_prob(free, {"w": draw["w"], "b": HOLE}),
            ),
            "entropy": beside.entropy(lam),
            "points": (twice.parts[1].value, lam.parts[1].value),
            "twice": beside.variance(twice)["w"],
            "kl": (beside.kl(lam, twice), DIAGONAL.kl(lam.parts[0], twice.parts[0])),
            "mu": (beside.expectation(lam).parts[0], DIAGONAL.expectation(free)),
            "inside": beside.in_domain(lam),
            "standard": beside.standard(lam),
        }

    said = say({"w": np.ones(2), "b": HOLE}, {"w": HOLE, "b": np.array([7.0])})
    near(said["mean"], {"w": np.ones(2), "b": np.array([7.0])})
    near(said["variance"], {"w": np.full(2, 0.25), "b": np.zeros(1)})
    draw = jax.tree.map(np.asarray, said["draw"])
    assert draw["b"].shape == (5, 1) and np.all(draw["b"] == 7.0) and draw["w"].shape == (5, 2)
    log_prob, free_part = said["log_prob"]
    close(log_prob, free_part)
    close(log_prob, stats.norm(1, 0.5).logpdf(draw["w"]).sum(-1))
    close(said["entropy"], 2 * stats.norm(1, 0.5).entropy())
    near(*said["points"])
    near(said["twice"], np.full(2, 0.125))
    close(*said["kl"])
    near(*said["mu"])
    assert bool(said["inside"]) and said["standard"].keys() == {"parts"}


def test_raveled_is_a_gaussian_over_the_flat_vector(x64):
    theta = {"b": np.array(0.5), "w": np.array([[1.0, 2.0]])}
    raveled, cov = families.Raveled.like(GAUSSIAN, theta), spd(9, 3)
    flat = np.array([0.5, 1.0, 2.0])

    @jax.jit
    def say(theta, flat, cov):
        lam = raveled.natural(mean=theta, covariance=cov)
        draw = raveled.sample(jax.random.key(0), lam, (4, 6))
        eye = np.eye(3)
        return {
            "naturals": (raveled.natural(mean=flat, covariance=cov), lam),
            "mean": raveled.mean(lam),
            "variance": raveled.variance(lam),
            "fresh": raveled.natural_at(theta).linear,
            "draw": draw,
            "log_prob": raveled.log_prob(lam, draw),
            "default_log_prob": ExponentialFamily.log_prob(raveled, lam, theta),
            "entropy": raveled.entropy(lam),
            "displaced": (raveled.displace(lam, theta)["w"], GAUSSIAN.displace(lam, flat)),
            "gradients": (raveled.gradient(lam, theta, eye), GAUSSIAN.gradient(lam, flat, eye)),
            "mus": (raveled.expectation(lam), GAUSSIAN.expectation(lam)),
        }

    said = jax.tree.map(np.asarray, say(theta, flat, cov))
    near(*said["naturals"])
    near(said["mean"], theta)
    near(said["variance"], {"b": cov[0, 0], "w": np.diag(cov)[None, 1:]})
    near(said["fresh"], flat)
    draw = said["draw"]
    assert jax.tree.map(np.shape, draw) == {"b": (4, 6), "w": (4, 6, 1, 2)}
    rows = np.concatenate([draw["b"][..., None], draw["w"][..., 0, :]], -1)
    reference = stats.multivariate_normal(flat, cov)
    close(said["log_prob"], reference.logpdf(rows), rtol=1e-10)
    close(said["default_log_prob"], reference.logpdf(flat), rtol=1e-10)
    close(said["entropy"], reference.entropy())
    over_tree, over_vector = said["displaced"]
    close(over_tree, over_vector[None, 1:])
    near(*said["gradients"])
    near(*said["mus"])


def test_raveled_log_prob_of_a_batch_of_scalars_keeps_the_sample_axes(x64):
    theta = {"a": np.array(0.0), "b": np.array(1.0)}
    raveled = families.Raveled.like(GAUSSIAN, theta)

    def log_prob(theta):
        lam = raveled.natural_at(theta)
        return raveled.log_prob(lam, raveled.sample(jax.random.key(0), lam, (5,)))

    assert jax.jit(log_prob)(theta).shape == (5,)
