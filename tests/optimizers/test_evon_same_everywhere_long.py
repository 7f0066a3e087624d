"""EVON gives one answer, whatever the rounding of a program and wherever the weights lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import blr_optax as blr
from blr_optax.optimizers._posteriors.rotated import by_eigenvectors, by_power

SHAPE = (6, 4)


def gradients(rank, steps, seed=0):
    """Matrices of low rank, whose factors leave most directions open."""
    r = np.random.default_rng(seed)
    rows = r.normal(size=(SHAPE[0], rank))
    return [(rows @ r.normal(size=(rank, SHAPE[1]))).astype(np.float32) for _ in range(steps)]


@jax.jit
def run(grads):
    tx = blr.evon(0.05, ess=10.0, b2=0.9, refresh_every=2)
    params = jnp.full(SHAPE, 0.1)

    def step(carry, g):
        params, state = carry
        moved = blr.sample(state, params) - params
        updates, state = tx.update(g + 0.3 * moved[0, 0] * g, state, params)
        return (optax.apply_updates(params, updates), state), moved

    (params, _), moved = jax.lax.scan(step, (params, tx.init(params)), grads)
    return params, moved


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_rounding_does_not_choose_the_basis(rank):
    """What differs between two compilations: gradients that agree to their last digits."""
    g = np.stack(gradients(rank, 6))
    noise = np.random.default_rng(9).normal(size=g.shape)
    near = (g * (1 + 2e-7 * noise)).astype(np.float32)
    assert (near != g).any()
    for x, y in zip(run(g), run(near), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


def symmetric(values, seed=3):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))[0]
    return (q * values) @ q.T


def test_eigenvectors_are_eigenvectors_and_open_ones_a_basis_of_the_rest(x64):
    values = np.array([3.0, 1.0, 0.0, 0.0, 0.0])
    a = symmetric(values)
    q = np.asarray(jax.jit(by_eigenvectors)(a, np.eye(5)))
    np.testing.assert_allclose(q.T @ q, np.eye(5), atol=1e-13)
    np.testing.assert_allclose(q.T @ a @ q, np.diag(values), atol=1e-13)
    # A factor without any direction: the axes themselves.
    none = np.asarray(jax.jit(by_eigenvectors)(np.zeros((3, 3)), np.eye(3)))
    np.testing.assert_allclose(np.abs(none), np.eye(3)[:, ::-1], atol=1e-14)


def test_signs_follow_one_direction(x64):
    a = symmetric(np.array([4.0, 2.0, 1.0]))
    q = np.asarray(jax.jit(by_eigenvectors)(a, np.eye(3)))
    assert (np.cos(np.arange(3)) @ q > 0).all()


def test_power_iterations_leave_open_directions_where_they_are(x64):
    a = symmetric(np.array([2.0, 0.0, 0.0, 0.0]))
    basis = np.asarray(jax.jit(by_eigenvectors)(a, np.eye(4)))
    again = np.asarray(jax.jit(by_power)(a, basis))
    np.testing.assert_allclose(again, basis, atol=1e-12)


@pytest.mark.parametrize("spec", [P(), P(None, "d"), P("d", None)])
@pytest.mark.parametrize("jitted", [False, True])
def test_an_explicit_mesh_needs_no_set_mesh(spec, jitted):
    """`jax.make_mesh` makes explicit meshes: weights on one, and nothing else said."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    tx = blr.evon(0.05, ess=10.0, refresh_every=1)
    update = jax.jit(tx.update) if jitted else tx.update

    def learn(put):
        params = put(np.full(SHAPE, 0.1, np.float32))
        state = tx.init(params)
        for g in gradients(4, 2):
            updates, state = update(put(g), state, params)
            params = optax.apply_updates(params, updates)
        return params, blr.sample(state, params), state

    found, drawn, state = learn(lambda x: jax.device_put(x, NamedSharding(mesh, spec)))
    expected, expected_draw, _ = learn(jnp.asarray)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(drawn, expected_draw, rtol=2e-4, atol=1e-4)
    assert jax.typeof(found).sharding.spec == jax.typeof(drawn).sharding.spec
    variance = blr.posterior(state, found).variance
    assert np.isfinite(np.asarray(variance)).all()
