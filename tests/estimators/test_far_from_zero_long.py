"""Gaussians far from zero in float32: E[theta^2] has lost the variance, natural gradients have not.

The loss is quadratic, a (theta - b)^2 / 2, so that the natural gradient is known: (-a b, a / 2).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blr_optax as blr
from blr_optax import estimators, families

MADE = {
    "pathwise": estimators.pathwise(64),
    "score_function": estimators.score_function(64),
    "least_squares": estimators.least_squares(64),
}


def slopes(name, estimator, centre, dtype):
    """Return g = E[grad loss] and H = E[hess loss] as the estimator has them."""
    family = families.get(name)
    size = () if name == "normal" else (2,)
    eye = 1.0 if name == "normal" else np.eye(2, dtype=dtype)
    mean = np.full(size, centre, dtype)
    lam = family.natural(mean=mean, precision=np.asarray(4.0 * eye, dtype))

    def loss(theta):
        return 0.5 * jnp.sum(jnp.square(theta - mean - jnp.asarray(0.5, dtype)))

    gradient = estimators.natural_gradient(family, loss, estimator)

    @jax.jit
    def run(lam):
        return gradient(jax.random.key(3), lam)[1]

    # g and H from (g - H m, H / 2), in float64: what the step makes of them is not tested.
    n = jax.tree.map(lambda x: np.asarray(x, np.float64), run(lam))
    h = 2.0 * n.quadratic
    g = n.linear + (h * mean if name == "normal" else h @ mean.astype(np.float64))
    return g, h


@pytest.mark.parametrize("estimator", MADE)
@pytest.mark.parametrize("name", ["normal", "gaussian"])
def test_natural_gradients_are_those_at_zero(name, estimator):
    """The same draws at 1000 and at 0: translation changes nothing but rounding of the loss."""
    near = slopes(name, MADE[estimator], 0.0, np.float32)
    far = slopes(name, MADE[estimator], 1024.0, np.float32)
    # theta is rounded to 1e-4 of its deviation, and g is a difference of numbers 1000 times larger.
    np.testing.assert_allclose(far[1], near[1], atol=5e-3)
    np.testing.assert_allclose(far[0], near[0], atol=5e-3)


@pytest.mark.parametrize("name", ["normal", "gaussian"])
def test_least_squares_is_exact_far_away(name):
    """A quadratic loss is linear in T: g = m - b = -1/2 and H = 1."""
    g, h = slopes(name, MADE["least_squares"], 1024.0, np.float32)
    np.testing.assert_allclose(g, np.full(np.shape(g), -0.5), atol=5e-3)
    np.testing.assert_allclose(h, np.eye(2) if name == "gaussian" else 1.0, atol=5e-3)


@pytest.mark.parametrize("name", ["normal", "gaussian"])
def test_the_inverse_fisher_product_is_the_inverse(x64, name):
    """By the definition: F of (F^{-1} v) is v, F being the Jacobian of mu."""
    family = families.get(name)
    if name == "normal":
        lam = family.natural(mean=1.5, precision=3.0)
        v = family.Expectation(jnp.asarray(0.4), jnp.asarray(-1.1))
    else:
        s = np.array([[2.0, 0.3], [0.3, 1.0]])
        lam = family.natural(mean=np.array([1.5, -0.7]), precision=s)
        v = family.Expectation(jnp.array([0.4, -0.2]), jnp.array([[1.0, 0.3], [0.3, -0.5]]))

    @jax.jit
    def back(lam, v):
        n = family.inverse_fisher_product(lam, v)
        return jax.jvp(family.expectation, (lam,), (n,))[1]

    for x, y in zip(back(lam, v), v, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)


# --- ordinary data, many data sets ----------------------------------------------------------------


@pytest.mark.parametrize("samples", [20, 100])
def test_no_ordinary_data_set_freezes_the_score_function(samples):
    """theta ~ N(0, 1), y_i ~ N(theta, 1): the posterior is N(sum y / (n + 1), 1 / (n + 1))."""
    r, n, runs = np.random.default_rng(7), 5, 400
    y = (r.normal(size=(runs, 1)) + r.normal(size=(runs, n))).astype(np.float32)
    tx = blr.blr_update(
        "normal",
        lambda x, y: 0.5 * jnp.mean((x - y) ** 2),
        lambda t: 1.0 / (t + 4.0) ** 0.75,
        ess=float(n),
        prior=blr.distribution("normal", mean=0.0, precision=1.0),
        estimator=estimators.score_function(samples),
    )

    @jax.jit
    @jax.vmap
    def learn(y, key):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(None, state, params, batch=(y,))
            return (params + updates, state), None

        params = jnp.zeros(())
        start = params, blr.reseed(tx.init(params), key)
        params, state = jax.lax.scan(step, start, None, length=600)[0]
        return params, state.skipped

    params, skipped = learn(y, jax.random.split(jax.random.key(0), runs))
    error = np.abs(np.asarray(params) - y.sum(1) / (n + 1)) * np.sqrt(n + 1.0)
    assert skipped.max() < 30 and np.median(error) < 0.1 and error.max() < 4.0
