"""The Gaussian families: golden numbers, published retractions, float32, trees of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_rows import ROWS, spd
from family_rows.gaussian import FIXED, GAUSSIAN, MEAN, NORMAL, SHARED
from family_tools import natural
from jax.flatten_util import ravel_pytree
from scipy import stats
from tools import close, load_golden, near

from blr_optax import families
from blr_optax.families import Family, GaussianNatural

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


@pytest.mark.parametrize("form", FORMS)
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


def test_base_measure_gradient_of_the_fixed_gaussian_is_minus_lambda(x64):
    lam = natural(ROWS["gaussian_fixed"], ROWS["gaussian_fixed"].members[0])
    near(FIXED.base_measure_gradient(lam).linear, -lam.linear)
    near(Family.base_measure_gradient(FIXED, lam).linear, -lam.linear)
    assert not FIXED.base_measure_gradient(lam).precision.any()


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
