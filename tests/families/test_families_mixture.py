"""Mixtures of Gaussians: natural gradients, recorded trajectories, bounds on record."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tools
from family_rows.conditional import (
    COVARIANCES,
    LINE,
    MEANS,
    VARIANCES,
    advance,
    compiled,
    hermite,
    member,
    natural,
    quartic,
    trapezoid,
)
from tools import load_golden

import blr_optax as blr
from blr_optax.estimators import monte_carlo, shared_draws
from blr_optax.families import Gaussian, Normal
from blr_optax.families._conditional.mixture import Mixture, MixtureNatural

KEY = jax.random.key(0)


def close(actual, expected, rtol=1e-10, atol=1e-12):
    tools.close(actual, expected, rtol, atol)


def near(actual, expected, rtol=1e-10, atol=1e-12):
    tools.near(actual, expected, rtol, atol)


# --- mixtures -------------------------------------------------------------------------------------


def bimodal(x):
    return 0.25 * jnp.sum((x**2 - 1.5) ** 2) - 0.3 * jnp.sum(x)


@pytest.mark.usefixtures("x64")
def test_mixture_blocks_are_the_natural_gradient_of_the_joint_fisher_matrix():
    family, (z, w) = Mixture(), trapezoid()
    lam = natural(family, LINE["mixture"])
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

    def evaluate(flat):
        lam = unravel(flat)
        scores = jax.vmap(jax.vmap(jax.jacrev(joint), (None, 0)), (None, 0))(flat, points(lam))
        own = jnp.einsum("nkkp->nkp", scores)
        share = w[:, None] * jnp.exp(family.log_weights(lam))
        fisher = jnp.einsum("nk,nkp,nkq->pq", share, own, own)
        _, found = family.natural_gradient_at(lam, bimodal, np.repeat(z[:, None], 3, axis=1), w)
        expected = jnp.linalg.solve(fisher, jax.grad(objective)(flat))
        return jax.flatten_util.ravel_pytree(found)[0], expected

    close(*compiled(evaluate, flat), 1e-8, 1e-9)


@pytest.mark.usefixtures("x64")
def test_log_density_of_a_mixture_has_the_derivatives_of_the_closed_form():
    family, lam = member("mixture")
    x = np.array([0.3, -0.4])

    def evaluate(lam, x):
        derivatives = (f(family.log_prob, 1)(lam, x) for f in (jax.grad, jax.hessian))
        mean, precision = Gaussian().mean(lam.components), Gaussian().precision(lam.components)
        return *derivatives, family.responsibilities(lam, x), mean, precision

    slope, bend, r, mean, s = compiled(evaluate, lam, x)
    pull = np.einsum("kde,ke->kd", s, x - mean)
    grad = -r @ pull
    outer = np.einsum("k,kd,ke->de", r, pull, pull) - np.tensordot(r, s, 1)
    close(slope, grad)
    close(bend, outer - np.outer(grad, grad))


FORMS = ("auto", "improved", "improved_old")


@functools.cache
def of_one_component(mixture, single, spread):
    """Values and the steps of every form: of a mixture of one, and of the Gaussian itself."""
    estimate = blr.estimators.natural_gradient(single, quartic, blr.estimators.gauss_hermite(9))
    z, w = hermite(9, 2)
    widths = {"covariance": COVARIANCES, "variance": VARIANCES}[spread]

    def evaluate(standard):
        lam = mixture.natural(**standard)
        alone = jax.tree.map(lambda x: x[0], lam.components)
        value, gradient = estimate(None, alone)
        found, moved = mixture.natural_gradient_at(lam, quartic, z[:, None], w)
        steps = {}
        for form in FORMS:
            new = mixture.move(lam, moved, 0.7, form).components
            expected = blr.natural_step(single, alone, gradient, 0.7, step=form)
            steps[form] = jax.tree.map(lambda x: x[0], new), expected
        return (found, value), steps

    return compiled(evaluate, {"weights": np.ones(1), "mean": MEANS[:1], spread: widths[:1]})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("x64")
def test_one_component_makes_the_plain_gaussian_step(form):
    mean_field = blr.families.get("gaussian_diagonal")
    for case in (
        (Mixture(), "gaussian", "covariance"),
        (Mixture(Normal()), mean_field, "variance"),
    ):
        values, steps = of_one_component(*case)
        close(*values)
        near(*steps[form])


MOG = load_golden("mog_iblr")


@functools.partial(jax.jit, static_argnames="curvature")
def recorded_step(truth, rates, lam, theta, curvature):
    """What is on record of a step, and the lambda after it."""
    family = Mixture()
    loss = lambda x: -family.log_prob(truth, x)  # noqa: E731
    _, gradient = family.natural_gradient_from(lam, loss, theta, curvature)
    rate, of_weights = rates
    new = family.move(lam, gradient, rate, "improved_old", weight_learning_rate=of_weights)
    return {
        "log_resp": jnp.log(family.responsibilities(lam, theta)).T,
        "gV": -gradient.components.quadratic,
        "means": Gaussian().mean(new.components),
        "precs": Gaussian().precision(new.components),
        "logits": new.log_odds,
    }, new


@pytest.mark.parametrize("case", MOG["cases"], ids=lambda case: case["name"])
@pytest.mark.usefixtures("x64")
def test_recorded_trajectories_of_the_improved_rule_are_reproduced(case):
    problem, names = MOG["problem"], {"weights": "weights", "mean": "means", "precision": "precs"}
    truth = natural(Mixture(), {k: np.array(problem[name]) for k, name in names.items()})
    start, hyper = case["init"], case["hyper"]
    means, precisions, log_odds = (np.array(start[k]) for k in ("means", "precs", "logits"))
    components = compiled(Gaussian().from_mean, means, precisions)
    lam = MixtureNatural(components, np.asarray(log_odds, np.float64))
    rates = hyper["lr"], hyper["lr"] * hyper["decay_mix"]
    curvature = {"hess": "exact", "first": "reparameterized"}[case["option"]]
    for record in case["steps"]:
        found, lam = recorded_step(truth, rates, lam, np.array(record["z"]), curvature)
        for key, value in found.items():
            close(value, record[key], 1e-9, 1e-9)


@pytest.mark.usefixtures("x64")
def test_draws_of_the_mixture_and_of_its_components_agree_in_expectation():
    family = Mixture()

    def evaluate(standard, keys):
        lam = family.natural(**standard)

        def drawn(key):
            return blr.estimators.natural_gradient(family, bimodal, shared_draws(500))(key, lam)

        def stratified(key):
            return blr.estimators.natural_gradient(family, bimodal, monte_carlo(170))(key, lam)

        return jax.vmap(drawn)(keys), jax.vmap(stratified)(keys)

    one, other = compiled(evaluate, LINE["mixture"], jax.random.split(KEY, 100))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        error = np.sqrt((a.var(0) + b.var(0)) / 100)
        assert np.all(np.abs(a.mean(0) - b.mean(0)) < 4 * error)


def test_at_the_means_distant_components_are_independent_newton_iterations():
    family = Mixture()
    standard = {
        "weights": np.array([0.5, 0.5], np.float32),
        "mean": np.array([[-9.0], [9.0]], np.float32),
        "covariance": np.ones((2, 1, 1), np.float32),
    }

    def loss(x):
        return 2.0 * jnp.sum((jnp.abs(x) - 8.0) ** 2)

    def evaluate(standard):
        lam = family.natural(**standard)
        _, new = advance(family, None, lam, loss, 1.0, blr.estimators.delta())
        inner = new.components
        return Gaussian().mean(inner), Gaussian().precision(inner), new.log_odds

    mean, precision, log_odds = compiled(evaluate, standard)
    close(mean, [[-8.0], [8.0]], 1e-5)
    close(precision, np.full((2, 1, 1), 4.0), 1e-5)
    close(log_odds, [0.0], atol=1e-5)


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


@pytest.mark.parametrize(
    ("name", "count", "order", "steps"),
    [
        ("sign-ambiguous scalar", 2, 24, 60),
        ("sign-ambiguous scalar", 3, 24, 150),
        ("beta-binomial cancer mortality", 2, 12, 80),
    ],
)
@pytest.mark.usefixtures("x64")
def test_mixtures_reach_the_best_elbo_on_record(name, count, order, steps):
    problem, family = TARGETS[name], Mixture()
    if problem["dim"] == 1:
        loss = lambda x: jnp.sum((1.5 - x**2) ** 2 / 0.5 + (x - 0.3) ** 2 / 4.5)  # noqa: E731
        mean, scale = np.linspace(-1.0, 1.0, count)[:, None], 1.0
    else:
        loss = beta_binomial(np.array(problem["y"]), np.array(problem["n"]))
        mean, scale = np.array([[-7.0, 9.0], [-6.7, 7.0]]), 0.3
    d, seen = problem["dim"], [at for at in problem["log_density_at"] if max(at["x"]) < 12.0]
    covariance = scale * np.broadcast_to(np.eye(d), (count, d, d))
    standard = {"weights": np.full(count, 1.0 / count), "mean": mean, "covariance": covariance}

    def nodes(order):
        z, w = hermite(order, d)
        return np.repeat(z[:, None], count, axis=1), w

    def elbo(lam):
        noise, w = nodes(2 * order)
        theta = Gaussian().mean(lam.components) + Gaussian().displace(lam.components, noise)
        f = jax.vmap(jax.vmap(lambda x: -loss(x) - family.log_prob(lam, x)))(theta)
        return jnp.exp(family.log_weights(lam)) @ (w @ f)

    def evaluate(standard, points):
        def step(lam, _):
            _, gradient = family.natural_gradient_at(lam, loss, *nodes(order))
            return family.move(lam, gradient, 0.3), None

        lam, _ = jax.lax.scan(step, family.natural(**standard), None, steps)
        return jax.vmap(loss)(points), elbo(lam)

    values, found = compiled(evaluate, standard, np.array([at["x"] for at in seen]))
    close(values, [-at["value"] for at in seen], 1e-9)
    fit = next(fit for fit in problem["fits"] if fit["K"] == count)
    assert fit["elbo_with_more_nodes"] - 0.002 < found < problem["log_normaliser"]
