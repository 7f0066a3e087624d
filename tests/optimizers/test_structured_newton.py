"""Kronecker and low-rank online Newton: quadratics in closed form, and their formulas by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tools
from registry import make_batch, make_params, mean_loss

import blr_optax as blr
from blr_optax import families

GAUSSIAN = families.get("gaussian")


close = functools.partial(tools.close, rtol=1e-9, atol=1e-12)


def definite(seed, n):
    q = jnp.linalg.qr(jax.random.normal(jax.random.key(seed), (n, n)))[0]
    return (q * jnp.linspace(0.4, 4.0, n)) @ q.T


def run(tx, params, steps, batch=()):
    """(params, state) after some steps, in one compiled loop."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0])((params, tx.init(params)))


def covariance(member):
    """Of a matrix Gaussian, row-major."""
    return jnp.linalg.inv(jnp.kron(member.row_precision, member.column_precision))


# --- Kronecker ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.5, 1.0])
@pytest.mark.parametrize("noisy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_kronecker_quadratic_has_the_exact_posterior(x64, rho, noisy):
    ess, a, b = 7.0, definite(1, 3), definite(2, 2)
    centre = jax.random.normal(jax.random.key(3), (3, 2))
    loss = lambda w: 0.5 * jnp.sum((w - centre) * (a @ (w - centre) @ b))  # noqa: E731
    rule = blr.estimators.monte_carlo(2, antithetic=True) if noisy else None
    tx = blr.kronecker_newton(loss, rho, ess=ess, estimator=rule)
    params, state = run(tx, jnp.zeros((3, 2)), 80)
    close(params, centre, rtol=1e-8)
    q = blr.posterior(state, params)
    close(covariance(q.natural), jnp.linalg.inv(ess * jnp.kron(a, b)), rtol=1e-7, atol=1e-10)


def test_every_leaf_of_a_tree_gets_its_own_factors(x64):
    """A matrix, a vector (its full precision), a number and a tensor that do not interact."""
    ess, a, b, c = 7.0, definite(1, 4), definite(2, 3), definite(5, 3)
    start = {"b": jnp.zeros(3), "c": jnp.zeros(()), "k": jnp.zeros((2, 2, 3))}

    def loss(p):
        k = p["k"].reshape(4, 3) - 1.0
        v = p["b"] - 2.0
        return 0.5 * (jnp.sum(k * (a @ k @ b)) + v @ c @ v + 3.0 * (p["c"] - 3.0) ** 2)

    params, state = run(blr.kronecker_newton(loss, 1.0, ess=ess), start, 80)
    for name, centre in (("k", 1.0), ("b", 2.0), ("c", 3.0)):
        close(params[name], centre, rtol=1e-8)
    vector, number, tensor = blr.posterior(state, params).natural.members
    close(covariance(vector), jnp.linalg.inv(ess * c), rtol=1e-7)
    close(covariance(number), 1 / (3.0 * ess), rtol=1e-7)
    close(covariance(tensor), jnp.linalg.inv(ess * jnp.kron(a, b)), rtol=1e-7, atol=1e-10)


def test_the_kronecker_step_written_out(x64):
    """papers.md 3.14 with the full Hessian: block by block, the shared scale moved once."""
    rho, ess, (n, p) = 0.2, 9.0, (3, 2)
    loss = lambda w: jnp.sum(jnp.cosh(w)) + 0.3 * jnp.sum(w) ** 2 + jnp.sum(w[0] * w[1])  # noqa: E731
    params = jax.random.normal(jax.random.key(0), (n, p))
    tx = blr.kronecker_newton(loss, rho, ess=ess)
    state = tx.init(params)
    row, column = jnp.eye(n), jnp.eye(p)
    update = jax.jit(lambda s, w: tx.update(None, s, w))
    w = params
    for _ in range(4):
        g, h = ess * jax.grad(loss)(w), ess * jax.hessian(loss)(w)
        u, v = jnp.linalg.inv(row), jnp.linalg.inv(column)
        step_row = jnp.einsum("ijkl,jl->ik", h, v) / p - row
        step_column = jnp.einsum("ijkl,ik->jl", h, u) / n - column
        step_row -= jnp.trace(u @ step_row) / (2 * n) * row
        step_column -= jnp.trace(v @ step_column) / (2 * p) * column
        row, column = row + rho * step_row, column + rho * step_column
        w = w - rho * jnp.linalg.solve(row, g) @ jnp.linalg.inv(column)
        updates, state = update(state, params)
        params = params + updates
        close(params, w)
        close(covariance(blr.posterior(state, params).natural),
              jnp.linalg.inv(jnp.kron(row, column)))  # fmt: skip


def test_a_vector_has_the_full_gaussian_of_online_newton(x64):
    """With one column the other factor is a number: the steps are those of family "gaussian"."""
    loss = lambda w: jnp.sum(jnp.cosh(w)) + 0.5 * jnp.sum(w) ** 2  # noqa: E731
    start = jnp.array([1.0, -0.5, 0.3])
    one, state = run(blr.kronecker_newton(loss, 1.0, ess=5.0), start, 40)
    two, other = run(blr.online_newton(loss, 1.0, ess=5.0), start, 40)
    close(one, two, atol=1e-10)
    close(covariance(blr.posterior(state, one).natural.members[0]),
          blr.posterior(other, two).standard()["covariance"], rtol=1e-8)  # fmt: skip


# --- leaf by leaf ---------------------------------------------------------------------------------


def test_the_leafwise_posterior_is_the_product_of_its_members(x64):
    like = {"b": jnp.zeros(2), "w": jnp.zeros((3, 2))}
    matrix = families.get("matrix_gaussian")
    family = families.Leafwise.like(matrix, like)

    def member(seed):
        shapes = ((2, 1), (3, 2))
        return family.natural(members=tuple(
            matrix.natural(mean=jax.random.normal(jax.random.key(seed), (n, p)),
                           row_precision=definite(seed, n),
                           column_precision=definite(seed + 1, p) if p > 1 else jnp.eye(1))
            for n, p in shapes))  # fmt: skip

    q, p = (blr.Posterior(family, member(seed)) for seed in (0, 5))
    draws = q.sample(jax.random.key(0), (20_000,))
    assert jax.tree.map(jnp.shape, draws) == {"b": (20_000, 2), "w": (20_000, 3, 2)}
    jax.tree.map(lambda x, v: close(jnp.var(x, axis=0), v, rtol=0.1), draws, q.variance)
    few = jax.tree.map(lambda x: x[:4], draws)
    close(jax.vmap(q.log_prob)(few), q.log_prob(few))
    close(-jnp.mean(q.log_prob(draws)), q.entropy(), rtol=0.02)
    close(jnp.mean(q.log_prob(draws) - p.log_prob(draws)), q.kl(p), rtol=0.05)
    with pytest.raises(ValueError, match="no matrix"):
        families.Leafwise.like(families.get("student_t"), like)


@pytest.mark.parametrize("hessian", ["exact", "reparameterized"])
def test_the_leafwise_gradient_sees_all_leaves_at_one_draw(x64, hessian):
    """Two leaves that interact: the average over draws, against quadrature over both."""
    matrix = families.get("matrix_gaussian")
    like = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    family = families.Leafwise.like(matrix, like)
    lam = family.natural_at({"a": jnp.asarray(0.3), "b": jnp.asarray(-0.2)})
    loss = lambda t: jnp.cosh(t["a"] + 0.5 * t["b"]) + t["a"] ** 2  # noqa: E731
    x, w = np.polynomial.hermite_e.hermegauss(30)
    z = [jnp.asarray(c.ravel())[:, None, None] for c in np.meshgrid(x, x)]
    weights = jnp.asarray(np.outer(w, w).ravel() / (2 * np.pi))
    value, found = family.natural_gradient_at(lam, loss, tuple(z), weights, hessian)
    at = [0.3 + z[0].ravel(), -0.2 + z[1].ravel()]
    inner = at[0] + 0.5 * at[1]
    close(value, jnp.sum(weights * (jnp.cosh(inner) + at[0] ** 2)))
    close(found.members[0].mean[0, 0], jnp.sum(weights * (jnp.sinh(inner) + 2 * at[0])))
    close(found.members[1].mean[0, 0], jnp.sum(weights * 0.5 * jnp.sinh(inner)))
    # In one dimension P and Q share all: each takes half of the step of the precision.
    halves = [(m.row_precision + m.column_precision)[0, 0] for m in found.members]
    close(-halves[0], jnp.sum(weights * jnp.cosh(inner)) + 2.0 - 1.0, rtol=1e-6)
    close(-halves[1], jnp.sum(weights * 0.25 * jnp.cosh(inner)) - 1.0, rtol=1e-6)


# --- low rank -------------------------------------------------------------------------------------


def low_rank_problem(d=6, rank=2):
    keys = jax.random.split(jax.random.key(0), 3)
    x = 1.5 * jax.random.normal(keys[0], (d, rank))
    diagonal = 0.5 + jax.random.uniform(keys[1], (d,))
    h = jnp.diag(diagonal) + x @ x.T
    centre = jax.random.normal(keys[2], (d,))
    return (lambda w: 0.5 * (w - centre) @ h @ (w - centre)), h, centre


@pytest.mark.parametrize("rho", [0.5, 1.0])
def test_a_diagonal_plus_low_rank_quadratic_has_the_exact_posterior(x64, rho):
    loss, h, centre = low_rank_problem()
    tx = blr.low_rank_newton(loss, rho, rank=2, ess=7.0)
    params, state = run(tx, jnp.zeros(6), 2000)
    close(params, centre, rtol=1e-8)
    q = blr.posterior(state, params)
    u, x = q.natural.diagonal, q.natural.factor
    close(jnp.diag(u) + x @ x.T, 7.0 * h, rtol=1e-6, atol=1e-6)


def test_full_rank_is_online_newton(x64):
    """On a quadratic whose Hessian is above the first precision, with a column per weight."""
    h = definite(1, 3) + jnp.eye(3)
    loss = lambda w: 0.5 * (w - 1.0) @ h @ (w - 1.0)  # noqa: E731
    start = jnp.array([1.0, -0.5, 0.3])
    gaussian = families.get("gaussian_low_rank")
    init = blr.Posterior(gaussian, gaussian.natural(
        mean=start, diagonal=jnp.ones(3), factor=0.1 * jnp.eye(3)))  # fmt: skip
    full = blr.Posterior(GAUSSIAN, GAUSSIAN.natural(mean=start, precision=1.01 * jnp.eye(3)))
    one, state = run(blr.low_rank_newton(loss, 0.3, rank=3, init=init, ess=2.0), start, 6)
    two, other = run(blr.online_newton(loss, 0.3, ess=2.0, init=full), start, 6)
    close(one, two, rtol=1e-8)
    u, x = (getattr(blr.posterior(state, one).natural, name) for name in ("diagonal", "factor"))
    close(jnp.linalg.inv(jnp.diag(u) + x @ x.T),
          blr.posterior(other, two).standard()["covariance"], rtol=1e-8)  # fmt: skip


def test_the_low_rank_step_written_out(x64):
    """One step by hand: curvature as a diagonal and columns, then the leading columns of both."""
    rho, ess, rank = 0.3, 4.0, 2
    loss = lambda w: jnp.sum(jnp.cosh(w)) + 0.5 * jnp.sum(w) ** 2 + w[0] * w[1]  # noqa: E731
    start = jax.random.normal(jax.random.key(1), (5,))
    family = families.get("gaussian_low_rank")
    u, x = jnp.linspace(0.5, 1.0, 5), 0.3 * jax.random.normal(jax.random.key(2), (5, rank))
    init = blr.Posterior(family, family.natural(mean=start, diagonal=u, factor=x))
    tx = blr.low_rank_newton(loss, rho, rank, ess=ess, init=init)
    updates, state = tx.update(None, tx.init(start), start)
    g, h = ess * jax.grad(loss)(start), ess * jax.hessian(loss)(start)
    rest = h - jnp.diag(u)
    q = np.linalg.qr(rest @ np.linalg.qr(jnp.column_stack([x, g]))[0])[0]
    values, vectors = np.linalg.eigh(q.T @ rest @ q)
    columns = q @ vectors * np.sqrt(np.maximum(values, 0))
    diagonal = np.diag(h) - np.sum(columns**2, 1)
    both = np.column_stack([np.sqrt(1 - rho) * x, np.sqrt(rho) * columns])
    left, sizes, _ = np.linalg.svd(both, full_matrices=False)
    kept = (left * sizes)[:, :rank]
    whole = (1 - rho) * np.diag(u) + rho * np.diag(diagonal) + both @ both.T
    new = kept @ kept.T + np.diag(np.diag(whole - kept @ kept.T))
    close(updates, -rho * np.linalg.solve(new, g))
    lam = blr.posterior(state, start).natural
    close(jnp.diag(lam.diagonal) + lam.factor @ lam.factor.T, new)


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [blr.kronecker_newton, lambda *a, **k: blr.low_rank_newton(
    *a, rank=3, **k)], ids=["kronecker", "low_rank"])  # fmt: skip
def test_they_learn_a_small_network_from_gradients_alone(make):
    params, batch = make_params(), make_batch()
    rule = blr.estimators.monte_carlo(
        4, antithetic=True, curvature=blr.estimators.reparameterized()
    )
    diagonal = families.get("gaussian_diagonal")
    prior = blr.Posterior(diagonal, diagonal.natural(mean=params, precision=1.0))
    tx = make(mean_loss, 0.1, ess=20.0, estimator=rule, prior=prior)
    after, state = run(tx, params, 40, batch)
    assert mean_loss(after, *batch) < 0.7 * mean_loss(params, *batch)
    q = blr.posterior(state, after)
    assert q.proper and int(state.skipped) == 0
    assert jax.tree.structure(q.sample(jax.random.key(0))) == jax.tree.structure(params)
    again = make(mean_loss, 0.1, init=q).init(after)  # a posterior is a first posterior again
    jax.tree.map(close, tuple(again.natural), tuple(q.natural))


def test_errors_name_the_way_out():
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        blr.low_rank_newton(mean_loss, 0.1, rank=0)
    with pytest.raises(ValueError, match="init_precision=-1"):
        blr.low_rank_newton(mean_loss, 0.1, rank=1, init_precision=-1.0)
    with pytest.raises(ValueError, match="MatrixGaussian knows auto"):
        blr.kronecker_newton(mean_loss, 0.1, step="plain")
    matrix = families.get("matrix_gaussian")
    init = blr.Posterior(matrix, matrix.natural_at(jnp.zeros((2, 2))))
    with pytest.raises(ValueError, match="init is a member of MatrixGaussian"):
        blr.kronecker_newton(mean_loss, 0.1, init=init).init(make_params())
