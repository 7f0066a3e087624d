"""One step of the rule on lambda: closed forms, golden numbers, and the shapes of a step."""

import functools

import jax
import numpy as np
import pytest
import tools
from family_tools import program

from blr_optax import Distribution, families, natural_step
from blr_optax.estimators import conjugate, natural_gradient
from blr_optax.families import GaussianNatural

NORMAL, GAUSSIAN = families.get("normal"), families.get("gaussian")
FIXED, DIAGONAL = families.get("gaussian_fixed"), families.get("gaussian_diagonal")
STEPS = ("auto", "plain", "improved", "improved_old", "square_root")


close = functools.partial(tools.near, rtol=1e-11, atol=1e-12)


def spd(seed, d=3):
    a = np.random.default_rng(seed).normal(size=(d, d))
    return a @ a.T / d + 0.3 * np.eye(d)


def problem(seed=0, d=3):
    """(m, S, g, H): a Gaussian, and the mean gradient and indefinite Hessian of some mean loss."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(d, d))
    return rng.normal(size=d), spd(seed), rng.normal(size=d), 0.3 * (h + h.T)


def gaussian(m, s):
    return program(GAUSSIAN.natural)(mean=m, precision=s)


def step_of(family, lam, gradient, rho, prior=None, ess=1.0, step="auto"):
    """`natural_step` as one program; the rate and ess may be traced, as here."""
    take = program(natural_step, "family", "step")
    return take(family, lam, gradient, rho, prior, ess, step)


def gradient_of(family, lam, g, h):
    """The natural gradient of a mean gradient and Hessian."""
    return program(family.gradient)(lam, g, h)


def combined(family, *terms):
    return jax.tree.map(np.asarray, program(family.combine)(*terms))


FAMILIES = ("normal", "gaussian", "gaussian_fixed", "gaussian_diagonal")


@functools.cache
def members():
    """(family, lambda, another lambda, a third) for every family, in float64."""
    with jax.enable_x64(True):
        return made_members()


def made_members():
    m, s = problem()[:2]
    trees = [{"a": m[:1] + i, "b": m[1:]} for i in range(3)]
    normal, fixed, diagonal = (program(f.natural) for f in (NORMAL, FIXED, DIAGONAL))
    return {
        "normal": (
            NORMAL,
            *(normal(mean=m - i, precision=np.diag(s) + i) for i in range(3)),
        ),
        "gaussian": (GAUSSIAN, *(gaussian(m - i, spd(i)) for i in range(3))),
        "gaussian_fixed": (FIXED, *(fixed(mean=m - i, precision=s) for i in range(3))),
        "gaussian_diagonal": (
            DIAGONAL,
            *(diagonal(mean=x, precision=1.0 + i) for i, x in enumerate(trees)),
        ),
    }


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("step", ["auto", "plain"])
def test_conjugate_bayes_in_one_step_from_any_start(x64, name, step):
    family, start, prior, site = members()[name]
    rule = jax.jit(natural_gradient(family, conjugate(site)))
    for lam in (start, prior, combined(family, (40.0, start))):
        new = step_of(family, lam, rule(None, lam)[1], 1.0, Distribution(family, prior), 5.0, step)
        close(new, combined(family, (1.0, prior), (5.0, site)))


def test_ridge_regression_in_one_step(x64):
    rng = np.random.default_rng(0)
    x, y, noise, alpha = rng.normal(size=(20, 3)), rng.normal(size=20), 0.25, 2.0
    site = GaussianNatural(x.T @ y / noise / 20, -0.5 * x.T @ x / noise / 20)
    start, prior = gaussian(*problem(4)[:2]), gaussian(np.zeros(3), alpha * np.eye(3))
    _, gradient = jax.jit(natural_gradient("gaussian", conjugate(site)))(None, start)
    new = step_of("gaussian", start, gradient, 1.0, Distribution(GAUSSIAN, prior), ess=20.0)
    precision = x.T @ x / noise + alpha * np.eye(3)
    close(program(GAUSSIAN.precision)(new), precision)
    close(program(GAUSSIAN.mean)(new), np.linalg.solve(precision, x.T @ y / noise))


@pytest.mark.parametrize("rho", [0.1, 0.7])
def test_flat_density_is_variational_online_newton(x64, rho):
    """S' = (1 - rho) S + rho ess H, m' = m - rho S'^-1 ess g."""
    (m, s, g, _), h, ess = problem(), spd(8), 6.0
    lam = gaussian(m, s)
    new = step_of("gaussian", lam, gradient_of(GAUSSIAN, lam, g, h), rho, ess=ess)
    precision = (1 - rho) * s + rho * ess * h
    close(program(GAUSSIAN.precision)(new), precision)
    close(program(GAUSSIAN.mean)(new), m - rho * np.linalg.solve(precision, ess * g))
    lam = program(NORMAL.natural)(mean=m, precision=np.diag(s))
    new = step_of("normal", lam, gradient_of(NORMAL, lam, g, np.diag(h)), rho, ess=ess)
    close(program(NORMAL.precision)(new), np.diag(precision))
    close(program(NORMAL.mean)(new), m - rho * ess * g / np.diag(precision))


@pytest.mark.parametrize("rho", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("step", ["auto", "plain", "improved"])
def test_flat_density_with_known_covariance_is_gradient_descent(x64, rho, step):
    m, s, g, _ = problem()
    lam = program(FIXED.natural)(mean=m, precision=s)
    gradient, none = (gradient_of(FIXED, lam, x, None) for x in (g, np.zeros(3)))
    new = step_of("gaussian_fixed", lam, gradient, rho, ess=6.0, step=step)
    close(program(FIXED.mean)(new), m - rho * np.linalg.solve(s, 6.0 * g))
    close(new.precision, s, rtol=0)
    still = step_of("gaussian_fixed", lam, none, rho, step=step)
    close(program(FIXED.mean)(still), m)  # no shrinkage


def test_known_covariance_with_a_prior_decays_to_it(x64):
    m, s, g, _ = problem()
    lam, prior = (program(FIXED.natural)(mean=x, precision=s) for x in (m, m + 1))
    gradient = gradient_of(FIXED, lam, g, None)
    new = step_of("gaussian_fixed", lam, gradient, 0.2, Distribution(FIXED, prior))
    close(program(FIXED.mean)(new), 0.8 * m + 0.2 * (m + 1) - 0.2 * np.linalg.solve(s, g))


HAVE = {"gaussian_fixed": STEPS[:3]}  # no scale to step in


@pytest.mark.parametrize(
    ("name", "step"), [(name, step) for name in FAMILIES for step in HAVE.get(name, STEPS)]
)
def test_the_fixed_point_is_prior_minus_gradient(x64, name, step):
    family, lam, prior, _ = members()[name]
    gradient = combined(family, (0.5, prior), (-0.5, lam))  # lam = prior - 2 gradient
    close(step_of(family, lam, gradient, 0.7, Distribution(family, prior), 2.0, step), lam)


# --- ways to move ---------------------------------------------------------------------------------


def moved(step, rho, ess=6.0):
    m, s, g, h = problem()
    lam = gaussian(m, s)
    return step_of("gaussian", lam, gradient_of(GAUSSIAN, lam, g, h), rho, ess=ess, step=step)


def inside(lam):
    return bool(program(GAUSSIAN.in_domain)(lam))


@pytest.mark.parametrize("rho", [0.3, 1.0, 5.0])
def test_improved_step_is_half_a_sum_of_squares(x64, rho):
    """S' = (S + U^T U) / 2 with S = L L^T, U = L^T + rho L^-1 G."""
    m, s, g, h = problem()
    root = np.linalg.cholesky(s)
    u = root.T + rho * np.linalg.solve(root, 6.0 * h - s)
    precision = 0.5 * (s + u.T @ u)
    for step, by in (("improved", precision), ("improved_old", s)):
        new = moved(step, rho)
        close(program(GAUSSIAN.precision)(new), precision, rtol=1e-9)
        close(program(GAUSSIAN.mean)(new), m - rho * np.linalg.solve(by, 6.0 * g), rtol=1e-9)
        assert inside(new)


@pytest.mark.parametrize("rho", [0.05, 0.3])
def test_square_root_step(x64, rho):
    """C' = C - rho C tril_half(C^T H C - I), m' = m - rho C C^T g."""
    m, s, g, h = problem()
    c = np.linalg.cholesky(np.linalg.inv(s))
    k = c.T @ (6.0 * h) @ c - np.eye(3)
    new_c = c - rho * c @ (np.tril(k, -1) + np.diag(np.diag(k)) / 2)
    new = moved("square_root", rho)
    close(program(GAUSSIAN.precision)(new), np.linalg.inv(new_c @ new_c.T), rtol=1e-9)
    close(program(GAUSSIAN.mean)(new), m - rho * c @ c.T @ (6.0 * g), rtol=1e-9)


@pytest.mark.parametrize("step", STEPS)
def test_all_steps_agree_to_first_order(x64, step):
    gaps = [
        np.abs(np.subtract(moved(step, rho).quadratic, moved("plain", rho).quadratic)).max()
        for rho in (1e-3, 1e-4)
    ]
    gaps += [
        np.abs(np.subtract(moved(step, rho).linear, moved("plain", rho).linear)).max()
        for rho in (1e-3, 1e-4)
    ]
    assert gaps[1] <= gaps[0] / 90 + 1e-14 and gaps[3] <= gaps[2] / 90 + 1e-14


def test_auto_is_plain_inside_and_improved_outside(x64):
    """To the last bit, so operation by operation: programs of their own round differently."""
    m, s, g, h = problem()
    lam = gaussian(m, s)
    gradient = gradient_of(GAUSSIAN, lam, g, h)
    eagerly = functools.partial(natural_step, "gaussian", lam, gradient, ess=6.0)
    near, far = {}, {}
    for found, rho, steps in ((near, 0.05, ("auto", "plain")), (far, 1.0, STEPS[:3])):
        found.update({step: eagerly(learning_rate=rho, step=step) for step in steps})
    close(near["auto"], near["plain"], rtol=0, atol=0)
    assert inside(near["plain"])
    assert not inside(far["plain"])
    close(far["auto"], far["improved"], rtol=0, atol=0)
    assert inside(far["auto"])


def test_under_jit_with_a_traced_rate(x64):
    m, s, g, h = problem()
    lam = gaussian(m, s)
    gradient = gradient_of(GAUSSIAN, lam, g, h)
    eager = natural_step("gaussian", lam, gradient, 0.3, ess=6.0, step="auto")
    close(moved("auto", 0.3), eager)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("gaussian", "newton", r"step='newton' is unknown; known: auto, plain, improved"),
        (
            "gaussian_fixed",
            "square_root",
            r"step='square_root' needs a Gaussian family that learns",
        ),
        ("gaussian_fixed", "improved_old", r"needs a Gaussian family .* got GaussianFixed"),
        ("gausian", "auto", r"unknown family 'gausian'"),
    ],
)
def test_errors(family, step, message):
    lam = members()["gaussian_fixed" if "fixed" in family else "gaussian"][1]
    lam = jax.tree.map(lambda x: np.asarray(x, np.float32), lam)
    with pytest.raises(ValueError, match=message):
        natural_step(family, lam, lam, 0.1, step=step)
