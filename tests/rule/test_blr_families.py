"""`blr_update` on every registered family: conjugate Bayes, every estimator, jit, scan, vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_rows import ROWS, rows
from family_tools import member, program, stacked
from tools import close, near

import blr_optax as blr
from blr_optax import estimators, families

every_row = pytest.mark.parametrize("row", rows())


def posterior_of(row, index=0):
    return blr.Distribution(row.family, member(stacked(row), index))


def floats(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), tree)


def run(tx, q, steps=1, batch=()):
    """Params and state after a few updates, starting at the mean of q; for use in a program."""
    params = floats(q.mean)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[0]


def arrays(standard):
    return {k: np.asarray(v, float) for k, v in standard.items()}


# --- conjugate Bayes: one step from any start is the textbook answer ------------------------------

COUNTS = np.array([3.0, 5.0, 0.0, 2.0])
REALS = np.array([1.2, -0.4, 0.7, 2.5])
PLANE = np.array([[1.0, 0.3], [0.2, -1.0], [2.0, 0.5], [-0.3, 0.1], [0.4, 1.2]])


def beta_bernoulli():
    """Three successes in four trials."""
    loss = lambda mu, y: -jnp.sum(y * mu.log + (1 - y) * mu.log1m)  # noqa: E731
    prior, data = {"alpha": 2.0, "beta": 3.0}, jnp.array([1.0, 0.0, 1.0, 1.0])
    return "beta", prior, {"alpha": 0.3, "beta": 9.0}, loss, data, {"alpha": 5.0, "beta": 4.0}


def gamma_poisson():
    loss = lambda mu, y: -jnp.sum(y * mu.log - mu.linear)  # noqa: E731
    answer = {"concentration": 2.0 + COUNTS.sum(), "rate": 0.5 + len(COUNTS)}
    start = {"concentration": 40.0, "rate": 7.0}
    return "gamma", {"concentration": 2.0, "rate": 0.5}, start, loss, COUNTS, answer


def gamma_exponential():
    loss = lambda mu, y: -jnp.sum(mu.log - y * mu.linear)  # noqa: E731
    y = np.exp(REALS)
    answer = {"concentration": 2.0 + len(y), "rate": 0.5 + y.sum()}
    start = {"concentration": 0.1, "rate": 7.0}
    return "gamma", {"concentration": 2.0, "rate": 0.5}, start, loss, y, answer


def dirichlet_categorical():
    loss = lambda mu, n: -jnp.sum(n * mu.log)  # noqa: E731
    prior = np.array([1.0, 0.5, 2.0, 1.0])
    start = {"concentration": np.array([9.0, 0.1, 1.0, 3.0])}
    answer = {"concentration": prior + COUNTS}
    return "dirichlet", {"concentration": prior}, start, loss, COUNTS, answer


def normal_gamma():
    """Unknown mean and precision (Murphy 2007, Sec. 3)."""

    def loss(mu, y):
        square = y**2 * mu.precision - 2 * y * mu.linear + mu.quadratic
        return -jnp.sum(0.5 * mu.log - 0.5 * square)

    prior = {"mean": 0.5, "kappa": 2.0, "concentration": 3.0, "rate": 1.5}
    start = {"mean": -4.0, "kappa": 0.1, "concentration": 1.0, "rate": 9.0}
    n, mean = len(REALS), REALS.mean()
    kappa = 2.0 + n
    rate = 1.5 + 0.5 * np.sum((REALS - mean) ** 2) + 2.0 * n * (mean - 0.5) ** 2 / (2 * kappa)
    answer = {
        "mean": (2.0 * 0.5 + REALS.sum()) / kappa,
        "kappa": kappa,
        "concentration": 3.0 + n / 2,
        "rate": rate,
    }
    return "normal_gamma", prior, start, loss, REALS, answer


def normal_wishart():
    """Unknown mean vector and precision matrix (Murphy 2007, Sec. 8)."""

    def loss(mu, x):
        second = jnp.einsum("ni,ij,nj->", x, mu.matrix, x)
        cross = jnp.sum(x @ mu.linear)
        return -(0.5 * len(x) * (mu.log_det - mu.quadratic) + cross - 0.5 * second)

    m0, w0 = np.array([0.5, -0.5]), np.array([[1.0, 0.2], [0.2, 0.5]])
    prior = {"mean": m0, "kappa": 2.0, "scale": w0, "degrees": 4.0}
    start = {"mean": 3 * m0, "kappa": 0.3, "scale": np.eye(2), "degrees": 9.0}
    n, mean = len(PLANE), PLANE.mean(0)
    scatter = (PLANE - mean).T @ (PLANE - mean)
    shift = (2.0 * n / (2.0 + n)) * np.outer(mean - m0, mean - m0)
    answer = {
        "mean": (2.0 * m0 + n * mean) / (2.0 + n),
        "kappa": 2.0 + n,
        "scale": np.linalg.inv(np.linalg.inv(w0) + scatter + shift),
        "degrees": 4.0 + n,
    }
    return "normal_wishart", prior, start, loss, PLANE, answer


CONJUGATE = [
    beta_bernoulli,
    gamma_poisson,
    gamma_exponential,
    dirichlet_categorical,
    normal_gamma,
    normal_wishart,
]


@pytest.mark.parametrize("problem", CONJUGATE, ids=lambda f: f.__name__)
def test_one_step_is_the_textbook_posterior(x64, problem):
    name, prior, start, loss, data, answer = problem()
    family = families.get(name)
    prior, start, answer = (
        blr.Distribution(family, program(family.natural)(**arrays(s)))
        for s in (prior, start, answer)
    )

    @jax.jit
    def learn(prior, start, answer, data):
        tx = blr.blr_update(
            name,
            loss,
            1.0,
            prior=prior,
            init=start,
            estimator=estimators.closed_form(),
            step="plain",
        )
        params, state = run(tx, start, batch=(data,))
        # The same data as a conjugate term, shared out over `ess` examples.
        term = estimators.conjugate(((answer / prior) ** 0.25).natural)
        tx = blr.blr_update(name, term, 1.0, ess=4.0, prior=prior, init=start)
        other = blr.posterior(run(tx, start)[1], params)
        return params, blr.posterior(state, params), other, answer.mean

    params, found, other, mean = learn(prior, start, answer, np.asarray(data))
    near(tuple(found.natural), tuple(answer.natural), rtol=1e-12, atol=1e-12)
    near(params, mean, rtol=1e-10, atol=1e-11)
    near(tuple(other.natural), tuple(answer.natural), rtol=1e-12, atol=1e-12)


@every_row
def test_conjugate_terms_and_posterior_arithmetic(x64, row):
    """prior * site from any start in one step, and the site back out of it."""
    prior, start = posterior_of(row, 0), posterior_of(row, 1)
    known = {k: getattr(prior.natural, k) for k in row.family.known}
    site = posterior_of(row, -1)
    site = blr.Distribution(row.family, site.natural._replace(**known))

    @jax.jit
    def learn(prior, start, site, outside):
        answer = prior * site
        tx = blr.blr_update(
            row.family, estimators.conjugate(site.natural), 1.0, prior=prior, init=start,
            step="plain")  # fmt: skip
        params = floats(start.mean)
        _, state = tx.update(None, tx.init(params), params)
        roots = prior**0.5 * prior**0.5
        return state.natural, answer, answer / prior, roots, prior.proper, outside.proper

    outside = blr.Distribution(row.family, jax.tree.map(np.asarray, row.outside[0]))
    reached, answer, back, roots, proper, improper = learn(prior, start, site, outside)
    near(tuple(reached), tuple(answer.natural), rtol=1e-11, atol=1e-11)
    near(tuple(back.natural), tuple(site.natural), rtol=1e-9, atol=1e-9)
    near(tuple(roots.natural), tuple(prior.natural), rtol=1e-12)
    assert bool(proper)
    assert not bool(improper)


# --- every family learns --------------------------------------------------------------------------


def bent(theta, shift=0.2):
    """A mean loss that is not linear in any statistic."""
    total = sum(jnp.sum(jnp.sin(0.5 * x + shift)) for x in jax.tree.leaves(theta))
    return total + 0.1 * total**2


def free_energy(family, lam, prior):
    """E_q[loss] + KL(q || prior) by a large common sample, for comparing members."""
    draws = family.sample(jax.random.key(9), lam, (20_000,))
    return jnp.mean(jax.vmap(bent)(draws)) + family.kl(lam, prior)


def fitting(family, total=None):
    """All estimators that apply to a family, for a loss of theta."""
    found = {"score_function": estimators.score_function(20)}
    found["least_squares"] = estimators.least_squares(30)
    if family.reparameterized:
        found["pathwise"] = estimators.pathwise(3)
    if family.enumerable:
        found["enumeration"] = estimators.enumeration(total)
    if family.relaxable:
        found["concrete"] = estimators.concrete(0.5, 3)
    if getattr(family, "curvature", None):
        found["monte_carlo"] = estimators.monte_carlo(2)
        found["delta"] = estimators.delta()
        found["gauss_hermite"] = estimators.gauss_hermite(3)
        found["cubature"] = estimators.cubature()
    return found


every_rule = pytest.mark.parametrize(
    ("row", "rule"), rows(variants=lambda _, row: tuple(fitting(row.family)))
)


@pytest.mark.parametrize("name", ["gamma", "bernoulli", "dirichlet"])
def test_an_ensemble_under_vmap_is_its_members(x64, name):
    row = ROWS[name]
    double = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)  # noqa: E731

    @jax.jit
    def learn(prior, start):
        tx = blr.blr_update(row.family, bent, 0.2, prior=prior, init=start)
        update = lambda s, p: tx.update(None, s, p)  # noqa: E731
        params = floats(start.mean)
        states = blr.reseed(jax.vmap(tx.init)(double(params)), jax.random.key(4))
        alone = [update(member(states, i), params) for i in range(2)]
        return jax.vmap(update)(states, double(params)), alone

    (updates, after), alone = learn(posterior_of(row), posterior_of(row, 1))
    for i, (update, state) in enumerate(alone):
        near(member(updates, i), update, rtol=1e-9, atol=1e-10)
        near(tuple(member(after.natural, i)), tuple(state.natural), rtol=1e-9, atol=1e-10)
    assert not np.allclose(*jax.tree.leaves(after.natural)[0])


def test_elementwise_families_act_on_pytrees(x64):
    """Weights in {-1, +1}, as a binary network has them: a mean field over the tree."""
    zeros = {"w": np.zeros((2, 3)), "b": np.zeros(2)}
    family = families.MeanField(families.get("rademacher"))
    wanted = {"w": np.array([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]]), "b": np.array([1.0, -1.0])}

    def loss(theta):
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), theta, wanted)))

    @jax.jit
    def learn(zeros):
        prior = blr.Distribution(family, family.natural(logit=zeros))
        tx = blr.blr_update(
            "rademacher", loss, 0.5, prior=prior, estimator=estimators.concrete(0.5, 10)
        )
        params, state = run(tx, prior, steps=20)
        return params, blr.sample(state, params)

    params, drawn = learn(zeros)
    near(jax.tree.map(np.sign, params), wanted)
    assert {float(x) for leaf in jax.tree.leaves(drawn) for x in np.ravel(leaf)} <= {-1.0, 1.0}


def test_a_product_is_variational_message_passing(x64):
    """Unknown mean and precision under a factorised q: the fixed point is that of VMP."""
    family = families.Product({"mean": families.get("normal"), "precision": families.get("gamma")})
    factors = {
        "mean": {"mean": 0.5, "precision": 0.1},
        "precision": {"concentration": 2.0, "rate": 1.0},
    }
    y = REALS

    def energy(mu):
        m, t = mu.parts["mean"], mu.parts["precision"]
        square = jnp.sum(y**2 - 2 * y * m.linear + m.quadratic)
        return -(0.5 * len(y) * t.log - 0.5 * t.linear * square)

    @jax.jit
    def learn(factors):
        prior = blr.Distribution(family, family.natural(**factors))
        tx = blr.blr_update(family, energy, 0.5, prior=prior, estimator=estimators.closed_form())
        params, state = run(tx, prior, steps=120)
        return params, blr.posterior(state, params).variance

    params, spread = learn(factors)
    # Coordinate ascent by hand (papers.md 3.13).
    precision, mean, variance = 1.0, 0.0, 1.0
    for _ in range(300):
        s = 0.1 + len(REALS) * precision
        mean, variance = (0.1 * 0.5 + precision * REALS.sum()) / s, 1 / s
        rate = 1.0 + 0.5 * np.sum((REALS - mean) ** 2 + variance)
        precision = (2.0 + len(REALS) / 2) / rate
    close(params["mean"], mean, rtol=1e-9)
    close(params["precision"], precision, rtol=1e-9)
    close(spread["mean"], variance, rtol=1e-9)


def test_errors_name_the_way_out():
    gamma = families.get("gamma")
    start = blr.Distribution(gamma, gamma.natural(concentration=2.0, rate=1.0))
    with pytest.raises(ValueError, match=r"Gamma has no location .* pass init= or prior="):
        blr.blr_update("gamma", bent, 0.1).init(jnp.ones(()))
    with pytest.raises(ValueError, match=r"params must be like the mean of q"):
        blr.blr_update("gamma", bent, 0.1, init=start).init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"Gamma has no finite support"):
        blr.blr_update("gamma", bent, 0.1, init=start, estimator=estimators.enumeration())
    tx = blr.blr_update("gamma", bent, 0.1, init=start, estimator=estimators.closed_form())
    with pytest.raises(ValueError, match=r"needs a Gaussian family that learns its precision"):
        blr.blr_update("gamma", bent, 0.1, init=start, step="square_root")
    assert tx.init(jnp.asarray(2.0)).natural.log == 1.0
    tree = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"Bernoulli has no location.*MeanField\(Bernoulli"):
        blr.blr_update("bernoulli", bent, 0.1).init(tree)
    with pytest.raises(ValueError, match=r"Distribution: family='gamma' is a name"):
        blr.Distribution("gamma", start.natural)
    with pytest.raises(ValueError, match=r"factor 't' is a dict .* GammaNatural; got float"):
        families.Product({"t": gamma}).natural(t=1.0)
    wrong = blr.blr_update("gamma", jnp.log, 0.1, init=start, estimator=estimators.closed_form())
    with pytest.raises(TypeError) as caught:
        wrong.update(None, wrong.init(start.mean), start.mean)
    assert "calls the loss with mu" in str(caught.value.__notes__)


# --- conditional families: block updates through the same call ------------------------------------

CENTRE = np.array([1.0, -0.5])
CONDITIONAL_STARTS = {
    "mixture": {
        "weights": np.array([0.3, 0.7]),
        "mean": np.array([[0.5, 0.0], [-0.5, 0.3]]),
        "precision": np.stack([np.eye(2), 2 * np.eye(2)]),
    },
    "skew_gaussian": {"mean": np.zeros(2), "skew": np.array([0.1, 0.2]), "precision": np.eye(2)},
    "student_t": {"mean": np.zeros(2), "scale": np.eye(2), "degrees": 5.0},
    "gaussian_low_rank": {
        "mean": np.zeros(2),
        "diagonal": np.ones(2),
        "factor": np.array([[0.3], [0.1]]),
    },
    "matrix_gaussian": {
        "mean": np.zeros((2, 1)),
        "row_precision": np.eye(2),
        "column_precision": np.eye(1),
    },
}


def bowl(theta, scale):
    """Half a squared distance to CENTRE, per unit of scale."""
    return 0.5 * jnp.sum((theta.reshape(2) - CENTRE) ** 2 * jnp.array([1.0, 3.0])) / scale


def conditional_start(name):
    family = families.get(name)
    return blr.Distribution(family, program(family.natural)(**arrays(CONDITIONAL_STARTS[name])))


@pytest.mark.parametrize("name", ["gaussian", "student_t"])
def test_the_first_posterior_may_be_a_function_of_the_parameters(name):
    family, start = families.get(name), np.array([0.3, -1.0], np.float32)
    spread = {"gaussian": {"precision": 4.0 * np.eye(2, dtype="f")}}
    spread["student_t"] = {"scale": np.eye(2, dtype="f"), "degrees": 5.0}

    def centred(params):
        return blr.Distribution(family, family.natural(mean=params["x"], **spread[name]))

    tx = blr.blr_update(family, lambda p: jnp.sum(p["x"] ** 2), 0.1, init=centred)

    @jax.jit
    def run(params):
        state = tx.init(params)
        first = blr.posterior(state, params)
        updates, _ = tx.update(None, state, params)
        return first.mean["x"], first.variance["x"], updates["x"]

    mean, variance, updates = map(np.asarray, run({"x": start}))
    close(mean, start, rtol=1e-6)
    close(variance, 0.25 if name == "gaussian" else 5 / 3, rtol=1e-6)
    assert np.all(updates * start < 0)


def test_matrix_gaussian_over_a_tree_is_refused():
    family = families.get("matrix_gaussian")
    with pytest.raises(ValueError, match="not the flat vector"):
        families.Raveled.like(family, {"a": jnp.ones(2), "b": jnp.ones(2)})


def test_conditional_families_refuse_what_they_cannot_do():
    mixture = families.get("mixture")
    start = blr.Distribution(mixture, mixture.natural(**CONDITIONAL_STARTS["mixture"]))
    cases = [
        ({"estimator": estimators.enumeration()}, r"takes monte_carlo\(...\) or delta"),
        (
            {
                "family": "matrix_gaussian",
                "estimator": estimators.delta(estimators.squared_gradient(1)),
            },
            "would be squared with it",
        ),
        ({"estimator": estimators.monte_carlo(2, generator="hash")}, "'hash' is for Gaussian"),
        ({"step": "plain"}, "Mixture knows auto, improved"),
        ({"loss": estimators.conjugate(start.natural)}, "one plain function"),
        ({"family": "student_t", "estimator": estimators.delta()}, "never looks away"),
    ]
    for change, message in cases:
        given = {"family": "mixture", "loss": bowl, "learning_rate": 0.1, "init": start, **change}
        with pytest.raises(ValueError, match=message):
            blr.blr_update(
                given.pop("family"), given.pop("loss"), given.pop("learning_rate"), **given
            )
    with pytest.raises(ValueError, match="no location"):
        blr.blr_update("mixture", bowl, 0.1).init(jnp.zeros(2))
    with pytest.raises(ValueError, match="is no exponential family"):
        start * start
