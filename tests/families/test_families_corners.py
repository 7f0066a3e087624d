"""Corners of the registry: derivatives at rest, huge steps, lifts of several kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_rows.conditional import advance
from family_tools import program
from tools import close

import blr_optax as blr
from blr_optax import Distribution, estimators, families
from blr_optax.families._base import domain

SPD = np.array([[2.0, 0.5], [0.5, 1.0]])


def test_a_matrix_step_is_differentiable_where_it_is_zero(x64):
    """At the fixed point of a conjugate problem the step vanishes; S + t D has slope D there."""
    change = np.array([[0.3, -0.2], [-0.2, 0.1]])
    retract = domain.positive_definite().retract

    def along(t):
        return retract(jnp.asarray(SPD), t * change)

    slopes = jax.jit(lambda t: (jax.jacrev(along)(t), jax.jacrev(jax.jacrev(along))(t)))
    for t in (0.0, 1e-3):  # S + t D + t^2 D S^{-1} D / 2
        bent = change @ np.linalg.inv(SPD) @ change
        first, second = slopes(t)
        close(first, change + t * bent)
        close(second, bent)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("spread", [(1.0, 1.0), (1e-18, 1e-18), (1e8, 1e-8)])
def test_a_matrix_stays_definite_up_to_the_largest_number(x64, dtype, spread):
    s = np.diag(np.array(spread, dtype))
    direction = np.array([[1.0, 0.3], [0.3, -0.5]], dtype)
    for power in (0.5, 0.8, 0.95, 1.0):
        step = direction * dtype(float(jnp.finfo(dtype).max) ** power)
        new = program(domain.positive_definite().retract)(s, step)
        assert new.dtype == dtype
        assert np.all(np.linalg.eigvalsh(np.asarray(new)) > 0)


def test_a_product_of_located_factors_is_centred_at_the_parameters(x64):
    """Newton's step on a quadratic loss lands in its minimum, factor by factor."""
    product = families.Product({"a": "normal", "b": "gaussian"})
    params = {"a": np.zeros(()), "b": np.zeros(2)}

    def loss(theta):
        away = theta["b"] - 2.0
        return 1.5 * (theta["a"] - 1.0) ** 2 + 0.5 * away @ SPD @ away

    def expected(mu):  # E_q of it, of second moments
        a, b = mu.parts["a"], mu.parts["b"]
        first = 1.5 * (a.quadratic - 2.0 * a.linear)
        return first + 0.5 * jnp.sum(SPD * b.quadratic) - 2.0 * jnp.sum(SPD @ b.linear)

    @jax.jit
    def learn(params):
        tx = blr.blr_update(product, expected, 1.0, estimator=estimators.closed_form())
        updates, state = tx.update(None, tx.init(params), params)
        sampled = blr.blr_update(product, loss, 0.1, estimator=estimators.pathwise(4))
        drawn = sampled.update(None, sampled.init(params), params)[0]
        return updates, blr.posterior(state, params).variance, drawn

    updates, variance, drawn = learn(params)
    close(updates["a"], 1.0)
    close(updates["b"], [2.0, 2.0])
    close(variance["a"], 1 / 3)
    close(variance["b"], np.diag(np.linalg.inv(SPD)))
    assert np.isfinite(drawn["b"]).all()


def test_a_raveled_family_takes_a_flat_vector_of_any_kind(x64):
    tree = {"b": 0.0, "w": jnp.zeros(2)}
    raveled = families.Raveled.like(families.get("gaussian"), tree)
    flat = [1.0, 2.0, 3.0]
    for mean in (jnp.array(flat), np.array(flat)):
        lam = raveled.natural(mean=mean, precision=np.eye(3))
        close(raveled.mean(lam)["w"], flat[1:])


def test_points_around_the_mean_are_for_one_gaussian():
    gaussian = families.get("gaussian")
    lam = gaussian.natural(mean=np.zeros((3, 2)), precision=np.eye(2))
    for rule in (estimators.delta(), estimators.cubature(3), None):
        gradient = estimators.natural_gradient("gaussian", jnp.sum, rule)
        with pytest.raises(ValueError, match=r"one gaussian; .*\(3, 2, 2\).*jax.vmap"):
            gradient(jax.random.key(0), lam)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_rank_above_the_dimension_keeps_its_shape(x64, rank):
    """A step at rate 1 makes the diagonal of the precision that of the Hessian."""
    family = families.get("gaussian_low_rank")
    lam = family.natural(mean=np.zeros(2), diagonal=np.ones(2), factor=np.ones((2, rank)))

    def loss(x):
        return 0.5 * (x - 1.0) @ SPD @ (x - 1.0)

    step = jax.jit(lambda lam: advance(family, None, lam, loss, 1.0, estimators.delta())[1])
    for _ in range(3):
        new = jax.tree.map(np.asarray, step(lam))
        assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, lam)
        lam = new
        close(lam.diagonal + np.sum(lam.factor**2, axis=-1), np.diag(SPD))


def test_a_product_differentiates_known_fields_like_its_factors(x64):
    """A = m^T S m / 2 = l^T S^{-1} l / 2, so dA / dS = -m m^T / 2."""
    product = families.Product({"g": "gaussian_fixed", "n": "poisson"})
    lam = product.natural(g={"mean": [1.0, 2.0], "precision": SPD}, n={"rate": 3.0})
    found = jax.jit(jax.grad(product.log_partition))(lam).parts
    close(found["g"].precision, -0.5 * np.outer([1.0, 2.0], [1.0, 2.0]))
    close(found["g"].linear, [1.0, 2.0])
    close(found["n"].linear, 3.0)


def test_conditional_families_refuse_what_needs_a_common_mu():
    family = families.get("student_t")
    lam = family.natural(mean=np.zeros(2), scale=np.eye(2), degrees=3.0)
    with pytest.raises(ValueError, match=r"StudentT is a conditional family .* move"):
        blr.natural_step("student_t", lam, lam, 0.5)
    with pytest.raises(ValueError, match="no expectation parameters"):
        Distribution(family, lam).expectation()


@pytest.mark.parametrize("name", ["dirichlet", "beta"])
def test_an_empty_batch_has_an_empty_answer(name):
    empty = {
        "dirichlet": {"concentration": np.ones((0, 3))},
        "beta": {"alpha": np.ones(0), "beta": np.ones(0)},
    }
    family = families.get(name)
    lam = family.natural(**empty[name])
    back, found = jax.jit(
        lambda lam: family.natural_from_expectation(family.expectation(lam), with_status=True)
    )(lam)
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, lam)
    assert found.shape == (0,)


def test_a_prior_of_one_number_holds_in_every_factor():
    product = families.Product({"w": families.MeanField("normal"), "tau": "gamma"})
    tau = {"concentration": 2.0, "rate": 1.0}
    w = {"mean": {"a": np.zeros(3)}, "variance": {"a": np.ones(3)}}

    @jax.jit
    def step(w, tau):
        lam = product.natural(w=w, tau=tau)
        prior = Distribution(product, product.natural(w={"mean": 1.0, "variance": 4.0}, tau=tau))
        new = blr.natural_step(product, lam, product.combine((0.0, lam)), 1.0, prior=prior)
        return product.variance(new)["w"]["a"], product.mean(new)["w"]["a"]

    variance, mean = step(w, tau)
    close(variance, np.full(3, 4.0), 1e-6)
    close(mean, np.ones(3), 1e-6)


def test_members_of_different_sizes_are_refused():
    gaussian = families.get("gaussian")
    small, large = (gaussian.natural(mean=jnp.zeros(d), covariance=jnp.eye(d)) for d in (1, 3))
    with pytest.raises(ValueError, match=r"different sizes; .* \(3,\), \(1,\)"):
        blr.natural_step(gaussian, large, large, 0.5, prior=Distribution(gaussian, small))
    product = families.Product({"a": gaussian})
    for family, of in ((gaussian, lambda x: x), (product, lambda x: product.natural(a=x))):
        p, q = Distribution(family, of(large)), Distribution(family, of(small))
        for ask in (lambda p=p, q=q: p * q, lambda p=p, q=q: p.kl(q)):
            with pytest.raises(ValueError, match="different sizes"):
                ask()
