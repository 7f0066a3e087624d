"""Recipes: what they choose, the search of the prior, and the width after training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools import assert_same

import blr_optax as blr

PARAMS = {"w": jnp.full((4, 3), 0.5), "b": jnp.zeros(3)}


@pytest.mark.parametrize("row", ["ivon", "vogn", "evon", "bsam"])
def test_a_recipe_tells_what_its_optimizer_does(row):
    recipe = getattr(blr.recipes, row)(
        PARAMS, 1000, 200, noise=0.3, prior=2.0, temperature=0.5, task="regression"
    )
    assert (recipe.ess, recipe.b2, recipe.peak) == (2000.0, 1 - 1 / 200, 0.1)
    assert max(float(recipe.learning_rate(t)) for t in range(200)) == pytest.approx(recipe.peak)
    assert float(recipe.learning_rate(200)) == pytest.approx(0.0, abs=1e-6)
    q = blr.posterior(recipe.optimizer.init(PARAMS), PARAMS)
    for leaf, name in zip(recipe.leaves, ("b", "w"), strict=True):
        assert leaf.name == f"['{name}']" and leaf.shape == PARAMS[name].shape
        np.testing.assert_allclose(leaf.deviation, 0.3 * leaf.scale)
        np.testing.assert_allclose(leaf.prior_deviation, 2.0 * leaf.scale)
        np.testing.assert_allclose(np.sqrt(q.variance[name]), leaf.deviation, rtol=1e-5)
    assert [leaf.scale for leaf in recipe.leaves] == pytest.approx([0.3, 0.5])
    for line in ("2000", "0.995", "['b']", "4x3"):
        assert line in str(recipe)


def test_the_prior_of_a_recipe_pulls_with_its_strength():
    """A loss that says nothing: the mean's gradient is the prior's, delta m."""
    recipe = blr.recipes.ivon(PARAMS, 1000, 10, prior=2.0, b1=0.0, clip_step=1e9)
    tx, delta = recipe.optimizer, 1 / (1000 * (2.0 * 0.5) ** 2)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS, statistic=zeros)
    # p <- p (1 + u + u^2 / 2) with u = (delta - p) / 10 p, and the step -lr p_0 delta m / p
    p = 1 / (1000 * (0.2 * 0.5) ** 2)
    u = 0.1 * (delta - p) / p
    wanted = -float(recipe.learning_rate(0)) * delta * 0.5 / (1 + u + u * u / 2)
    np.testing.assert_allclose(updates["w"], np.full((4, 3), wanted), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_examples": 0}, "num_examples=0"),
        ({"num_steps": 1.5}, "num_steps=1.5"),
        ({"task": "ranking"}, "known: classification, language_model, regression"),
        ({"temperature": 0.0}, "temperature"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"noise": 4.0}, "must be below"),
        ({"params": jnp.arange(3)}, "recipes.ivon"),
    ],
)
def test_mistakes_are_named(options, words):
    given = {"params": PARAMS, "num_examples": 10, "num_steps": 10, **options}
    with pytest.raises(ValueError, match=words):
        blr.recipes.ivon(**given)


def data(flip):
    """A linear rule of two inputs out of twenty, with labels of which some are wrong."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 20)).astype(np.float32)
    y = np.sign(x[:, 0] - x[:, 1]) * np.where(rng.random(200) < flip, -1, 1)
    return (x[:40], y[:40].astype(np.float32)), (x[40:], y[40:].astype(np.float32))


def logistic(w, x, y):
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))


def test_tune_is_separate_runs_and_takes_the_best():
    train, validation = data(0.25)
    start = jnp.full(20, 0.05)
    options = {"batch_size": 20, "learning_rate": 2.0, "key": 7}
    tuned = blr.recipes.tune(logistic, start, train, validation, 150, **options)
    assert list(tuned.scores) == [float(p) for p in (1.7, 3.2, 10.0)]
    assert tuned.prior == min(tuned.scores, key=tuned.scores.get)
    assert tuned.scores[1.7] < tuned.scores[10.0]  # with wrong labels the strong prior wins
    alone = blr.recipes.tune(
        logistic, start, train, validation, 150, priors=(tuned.prior,), **options
    )
    assert_same(alone.params, tuned.params, rtol=1e-4, atol=1e-5)
    best = float(logistic(tuned.params, *validation))
    assert best == pytest.approx(tuned.scores[tuned.prior], rel=1e-5)
    q = blr.posterior(tuned.opt_state, tuned.params)
    assert_same(q.mean, tuned.params, rtol=1e-6)


def test_tune_names_mistakes():
    train, validation = data(0.0)
    w = jnp.zeros(20)
    with pytest.raises(ValueError, match="no score is finite"):
        blr.recipes.tune(logistic, w, train, validation, 5, score=lambda q: jnp.nan)
    with pytest.raises(ValueError, match="differ in their leading axes"):
        blr.recipes.tune(logistic, w, (train[0], train[1][:5]), validation, 5)
    with pytest.raises(ValueError, match="at least one width"):
        blr.recipes.tune(logistic, w, train, validation, 5, priors=())
    with pytest.raises(ValueError, match="must be below"):
        blr.recipes.tune(logistic, w, train, validation, 5, priors=np.array([0.1, 3.0]))
    with pytest.raises(ValueError, match="validation= is a tuple"):
        blr.recipes.tune(logistic, w, train, {"x": validation[0]}, 5)
    with pytest.raises(ValueError, match="row='adam'"):
        blr.recipes.tune(logistic, w, train, validation, 5, row="adam")


def test_the_key_of_tune_seeds_the_noise_too():
    train, validation = data(0.0)
    keys = [
        blr.recipes.tune(logistic, jnp.full(20, 0.1), train, validation, 2, priors=(3.0,), key=k)
        for k in (0, 7)
    ]
    found = [
        jax.random.key_data(x).tolist()
        for tuned in keys
        for x in jax.tree.leaves(tuned.opt_state)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    assert found[: len(found) // 2] != found[len(found) // 2 :]


def test_a_recipe_inside_a_program_and_with_defaults_in_words():
    init = jax.jit(lambda p: blr.recipes.ivon(PARAMS, 100, 10).optimizer.init(p).scales)
    np.testing.assert_allclose(init(PARAMS), [0.3, 0.5], rtol=1e-6)
    recipe = blr.recipes.ivon(PARAMS, 100, 10, clip_step=None, b2=None)
    assert (recipe.clip_step, recipe.b2) == (0.1, 0.9) and str(recipe)
    q = blr.distribution("normal", mean=0.0, precision=1.0)
    for given in ({"prior": q}, {"init": q}):
        with pytest.raises(ValueError, match="is a width in units of the first weights"):
            blr.recipes.ivon(PARAMS, 100, 10, **given)
    with pytest.raises(ValueError, match="must be arrays"):
        blr.recipes.ivon(jax.eval_shape(lambda: PARAMS), 100, 10)


def test_temper_names_posteriors_without_powers():
    tx = blr.evon(0.1, ess=10.0)
    q = blr.posterior(tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"temper: .* no powers"):
        blr.recipes.temper(q, lambda q: 0.0)


def test_temper_finds_the_width_that_made_the_data():
    """q(w) = N(1, 1), of which a fifth of the width made the labels: y = w x, w ~ N(1, 0.2^2)."""
    q = blr.distribution("normal", mean=jnp.ones(1), precision=jnp.ones(1))

    def score(q):
        if isinstance(q, blr.Ensemble):
            deviation = 0.0
        else:
            deviation = float(np.sqrt(q.variance[0]))
        # E[-log N(y; 1, deviation^2 + 0.1^2)] over y ~ N(1, 0.2^2 + 0.1^2)
        v = deviation**2 + 0.01
        return 0.5 * (np.log(v) + 0.05 / v)

    found = blr.recipes.temper(q, score, scales=(0.0, 0.1, 0.2, 0.4, 1.0))
    assert found.scale == 0.2
    np.testing.assert_allclose(found.posterior.variance, [0.04], rtol=1e-6)
    np.testing.assert_allclose(found.posterior.mean, [1.0])
    alone = blr.recipes.temper(q, lambda q: 0.0 if isinstance(q, blr.Ensemble) else 1.0)
    assert alone.scale == 0.0
    np.testing.assert_allclose(alone.posterior.sample(jax.random.key(0), (3,)), np.ones((3, 1)))
    for scales, words in (((), "scales"), ((-1.0,), "at least 0"), ((np.nan,), "at least 0")):
        with pytest.raises(ValueError, match=words):
            blr.recipes.temper(q, score, scales=scales)
    with pytest.raises(ValueError, match="no score is finite"):
        blr.recipes.temper(q, lambda q: np.nan)
