"""Kronecker and low-rank online Newton: quadratics in closed form, and their formulas by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tools
from registry import make_batch, make_params, mean_loss
from tools import built_inside, run_steps

import blr_optax as blr
from blr_optax import families

GAUSSIAN = families.get("gaussian")


close = functools.partial(tools.close, rtol=1e-9, atol=1e-12)


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def definite(seed, n):
    q = np.linalg.qr(drawn(seed, n, n))[0]
    return (q * np.linspace(0.4, 4.0, n)) @ q.T


def run(tx, params, steps, batch=()):
    """(mean, natural parameters) after some steps."""

    def start():
        mean = jax.tree.map(jnp.asarray, params)
        return mean, tx.init(mean)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, blr.posterior(state, params).natural)

    return jax.tree.map(lambda x: x[-1], run_steps(step, start, length=steps)[1])


def covariance(member):
    """Of a matrix Gaussian, row-major."""
    return np.linalg.inv(np.kron(member.row_precision, member.column_precision))


def of_gaussian(natural):
    """Covariance of a member of "gaussian"."""
    return np.linalg.inv(jax.jit(GAUSSIAN.precision)(natural))


# --- Kronecker ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.5, 1.0])
@pytest.mark.parametrize("noisy", [False, True])
def test_a_kronecker_quadratic_has_the_exact_posterior(x64, rho, noisy):
    ess, a, b = 7.0, definite(1, 3), definite(2, 2)
    centre = drawn(3, 3, 2)
    loss = lambda w: 0.5 * jnp.sum((w - centre) * (a @ (w - centre) @ b))  # noqa: E731
    rule = blr.estimators.monte_carlo(2, antithetic=True) if noisy else None
    tx = blr.kronecker_newton(loss, rho, ess=ess, estimator=rule)
    params, natural = run(tx, np.zeros((3, 2)), 80)
    close(params, centre, rtol=1e-8)
    close(covariance(natural), np.linalg.inv(ess * np.kron(a, b)), rtol=1e-7, atol=1e-10)


def test_every_leaf_of_a_tree_gets_its_own_factors(x64):
    """A matrix, a vector (its full precision), a number and a tensor that do not interact."""
    ess, a, b, c = 7.0, definite(1, 4), definite(2, 3), definite(5, 3)
    start = {"b": np.zeros(3), "c": np.zeros(()), "k": np.zeros((2, 2, 3))}

    def loss(p):
        k = p["k"].reshape(4, 3) - 1.0
        v = p["b"] - 2.0
        return 0.5 * (jnp.sum(k * (a @ k @ b)) + v @ c @ v + 3.0 * (p["c"] - 3.0) ** 2)

    params, natural = run(blr.kronecker_newton(loss, 1.0, ess=ess), start, 80)
    for name, centre in (("k", 1.0), ("b", 2.0), ("c", 3.0)):
        close(params[name], centre, rtol=1e-8)
    vector, number, tensor = natural.members
    close(covariance(vector), np.linalg.inv(ess * c), rtol=1e-7)
    close(covariance(number), 1 / (3.0 * ess), rtol=1e-7)
    close(covariance(tensor), np.linalg.inv(ess * np.kron(a, b)), rtol=1e-7, atol=1e-10)


def test_the_kronecker_step_written_out(x64):
    """papers.md 3.14 with the full Hessian: block by block, the shared scale moved once."""
    rho, ess, (n, p) = 0.2, 9.0, (3, 2)
    loss = lambda w: jnp.sum(jnp.cosh(w)) + 0.3 * jnp.sum(w) ** 2 + jnp.sum(w[0] * w[1])  # noqa: E731
    draw = jax.jit(lambda key: jax.random.normal(key, (n, p)))  # where no step is shortened
    w = params = np.asarray(draw(jax.random.key(0)))
    tx = blr.kronecker_newton(loss, rho, ess=ess)

    def start():
        return jnp.asarray(params), tx.init(jnp.asarray(params))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params)
        params = params + updates
        return (params, state), (params, blr.posterior(state, params).natural)

    _, seen = run_steps(step, start, length=4)
    derivatives = jax.jit(lambda w: (jax.grad(loss)(w), jax.hessian(loss)(w)))
    row, column = np.eye(n), np.eye(p)
    for t in range(4):
        mean, natural = jax.tree.map(lambda x, t=t: x[t], seen)
        g, h = (ess * np.asarray(x) for x in derivatives(w))
        u, v = np.linalg.inv(row), np.linalg.inv(column)
        step_row = np.einsum("ijkl,jl->ik", h, v) / p - row
        step_column = np.einsum("ijkl,ik->jl", h, u) / n - column
        step_row -= np.trace(u @ step_row) / (2 * n) * row
        step_column -= np.trace(v @ step_column) / (2 * p) * column
        row, column = row + rho * step_row, column + rho * step_column
        w = w - rho * np.linalg.solve(row, g) @ np.linalg.inv(column)
        close(mean, w)
        close(covariance(natural), np.linalg.inv(np.kron(row, column)))


def test_a_vector_has_the_full_gaussian_of_online_newton(x64):
    """With one column the other factor is a number: the steps are those of family "gaussian"."""
    loss = lambda w: jnp.sum(jnp.cosh(w)) + 0.5 * jnp.sum(w) ** 2  # noqa: E731
    start = np.array([1.0, -0.5, 0.3])
    one, natural = run(blr.kronecker_newton(loss, 1.0, ess=5.0), start, 40)
    two, other = run(blr.online_newton(loss, 1.0, ess=5.0), start, 40)
    close(one, two, atol=1e-10)
    close(covariance(natural.members[0]), of_gaussian(other), rtol=1e-8)


# --- leaf by leaf ---------------------------------------------------------------------------------


def test_the_leafwise_posterior_is_the_product_of_its_members(x64):
    like = {"b": np.zeros(2), "w": np.zeros((3, 2))}
    matrix = families.get("matrix_gaussian")
    family = families.Leafwise.like(matrix, like)

    def member(seed):
        shapes = ((2, 1), (3, 2))
        return family.natural(members=tuple(
            matrix.natural(mean=jnp.asarray(drawn(seed, n, p)),
                           row_precision=jnp.asarray(definite(seed, n)),
                           column_precision=jnp.asarray(definite(seed + 1, p) if p > 1
                                                        else np.eye(1)))
            for n, p in shapes))  # fmt: skip

    @jax.jit
    def look(key):
        q, p = (blr.Distribution(family, member(seed)) for seed in (0, 5))
        draws = q.sample(key, (20_000,))
        few = jax.tree.map(lambda x: x[:4], draws)
        log_probs = [r.log_prob(draws) for r in (q, p)]
        pairs = jax.vmap(q.log_prob)(few), q.log_prob(few)
        return draws, q.variance, pairs, log_probs, q.entropy(), q.kl(p)

    found = jax.tree.map(np.asarray, look(jax.random.key(0)))
    draws, variance, pairs, (of_q, of_p), entropy, kl = found
    assert jax.tree.map(jnp.shape, draws) == {"b": (20_000, 2), "w": (20_000, 3, 2)}
    jax.tree.map(lambda x, v: close(np.var(x, axis=0), v, rtol=0.1), draws, variance)
    close(*pairs)
    close(-np.mean(of_q), entropy, rtol=0.02)
    close(np.mean(of_q - of_p), kl, rtol=0.05)
    with pytest.raises(ValueError, match="no matrix"):
        families.Leafwise.like(families.get("student_t"), like)


@pytest.mark.parametrize("hessian", ["exact", "reparameterized"])
def test_the_leafwise_gradient_sees_all_leaves_at_one_draw(x64, hessian):
    """Two leaves that interact: the average over draws, against quadrature over both."""
    matrix = families.get("matrix_gaussian")
    like = {"a": np.zeros(()), "b": np.zeros(())}
    family = families.Leafwise.like(matrix, like)
    loss = lambda t: jnp.cosh(t["a"] + 0.5 * t["b"]) + t["a"] ** 2  # noqa: E731
    x, w = np.polynomial.hermite_e.hermegauss(30)
    z = tuple(c.ravel()[:, None, None] for c in np.meshgrid(x, x))
    weights = np.outer(w, w).ravel() / (2 * np.pi)

    @jax.jit
    def look(z, weights):
        lam = family.natural_at({"a": jnp.asarray(0.3), "b": jnp.asarray(-0.2)})
        return family.natural_gradient_at(lam, loss, z, weights, hessian)

    value, found = jax.tree.map(np.asarray, look(z, weights))
    at = [0.3 + z[0].ravel(), -0.2 + z[1].ravel()]
    inner = at[0] + 0.5 * at[1]
    close(value, np.sum(weights * (np.cosh(inner) + at[0] ** 2)))
    close(found.members[0].mean[0, 0], np.sum(weights * (np.sinh(inner) + 2 * at[0])))
    close(found.members[1].mean[0, 0], np.sum(weights * 0.5 * np.sinh(inner)))
    # In one dimension P and Q share all: each takes half of the step of the precision.
    halves = [(m.row_precision + m.column_precision)[0, 0] for m in found.members]
    close(-halves[0], np.sum(weights * np.cosh(inner)) + 2.0 - 1.0, rtol=1e-6)
    close(-halves[1], np.sum(weights * 0.25 * np.cosh(inner)) - 1.0, rtol=1e-6)


# --- low rank -------------------------------------------------------------------------------------


def low_rank_problem(d=6, rank=2):
    rng = np.random.default_rng(0)
    x = 1.5 * rng.normal(size=(d, rank))
    h = np.diag(0.5 + rng.random(d)) + x @ x.T
    centre = rng.normal(size=d)
    return (lambda w: 0.5 * (w - centre) @ h @ (w - centre)), h, centre


def low_rank_precision(natural):
    return np.diag(natural.diagonal) + natural.factor @ natural.factor.T


@pytest.mark.parametrize("rho", [0.5, 1.0])
def test_a_diagonal_plus_low_rank_quadratic_has_the_exact_posterior(x64, rho):
    loss, h, centre = low_rank_problem()
    tx = blr.low_rank_newton(loss, rho, rank=2, ess=7.0)
    params, natural = run(tx, np.zeros(6), 2000)
    close(params, centre, rtol=1e-8)
    close(low_rank_precision(natural), 7.0 * h, rtol=1e-6, atol=1e-6)


def test_full_rank_is_online_newton(x64):
    """On a quadratic whose Hessian is above the first precision, with a column per weight."""
    h = definite(1, 3) + np.eye(3)
    loss = lambda w: 0.5 * (w - 1.0) @ h @ (w - 1.0)  # noqa: E731
    start = np.array([1.0, -0.5, 0.3])
    gaussian = families.get("gaussian_low_rank")

    def low():
        init = gaussian.natural(mean=start, diagonal=jnp.ones(3), factor=0.1 * jnp.eye(3))
        return blr.low_rank_newton(
            loss, 0.3, rank=3, init=blr.Distribution(gaussian, init), ess=2.0
        )

    def full():
        init = GAUSSIAN.natural(mean=start, precision=1.01 * jnp.eye(3))
        return blr.online_newton(loss, 0.3, ess=2.0, init=blr.Distribution(GAUSSIAN, init))

    one, natural = run(built_inside(low), start, 6)
    two, other = run(built_inside(full), start, 6)
    close(one, two, rtol=1e-8)
    close(np.linalg.inv(low_rank_precision(natural)), of_gaussian(other), rtol=1e-8)


def test_the_low_rank_step_written_out(x64):
    """One step by hand: curvature as a diagonal and columns, then the leading columns of both."""
    rho, ess, rank = 0.3, 4.0, 2
    loss = lambda w: jnp.sum(jnp.cosh(w)) + 0.5 * jnp.sum(w) ** 2 + w[0] * w[1]  # noqa: E731
    family = families.get("gaussian_low_rank")
    start, u, x = drawn(1, 5), np.linspace(0.5, 1.0, 5), 0.3 * drawn(2, 5, rank)

    @jax.jit
    def step(start):
        init = blr.Distribution(family, family.natural(mean=start, diagonal=u, factor=x))
        tx = blr.low_rank_newton(loss, rho, rank, ess=ess, init=init)
        updates, state = tx.update(None, tx.init(start), start)
        lam = blr.posterior(state, start).natural
        return updates, lam, jax.grad(loss)(start), jax.hessian(loss)(start)

    updates, lam, g, h = jax.tree.map(np.asarray, step(start))
    g, h = ess * g, ess * h
    rest = h - np.diag(u)
    q = np.linalg.qr(rest @ np.linalg.qr(np.column_stack([x, g]))[0])[0]
    values, vectors = np.linalg.eigh(q.T @ rest @ q)
    columns = q @ vectors * np.sqrt(np.maximum(values, 0))
    diagonal = np.diag(h) - np.sum(columns**2, 1)
    both = np.column_stack([np.sqrt(1 - rho) * x, np.sqrt(rho) * columns])
    left, sizes, _ = np.linalg.svd(both, full_matrices=False)
    kept = (left * sizes)[:, :rank]
    whole = (1 - rho) * np.diag(u) + rho * np.diag(diagonal) + both @ both.T
    new = kept @ kept.T + np.diag(np.diag(whole - kept @ kept.T))
    close(updates, -rho * np.linalg.solve(new, g))
    close(low_rank_precision(lam), new)


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [blr.kronecker_newton, lambda *a, **k: blr.low_rank_newton(
    *a, rank=3, **k)], ids=["kronecker", "low_rank"])  # fmt: skip
def test_they_learn_a_small_network_from_gradients_alone(make):
    params, batch = jax.tree.map(np.asarray, (make_params(), make_batch()))
    rule = blr.estimators.monte_carlo(4, antithetic=True, curvature="reparameterized")
    diagonal = families.get("gaussian_diagonal")

    @built_inside
    def tx():
        prior = blr.Distribution(diagonal, diagonal.natural(mean=params, precision=1.0))
        return make(mean_loss, 0.1, ess=20.0, estimator=rule, prior=prior)

    def start():
        mean = jax.tree.map(jnp.asarray, params)
        return mean, tx.init(mean)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    (after, state), _ = run_steps(step, start, length=40)

    @jax.jit
    def look(after, state):
        q = blr.posterior(state, after)
        again = make(mean_loss, 0.1, init=q).init(after)  # a posterior is a first posterior again
        losses = [mean_loss(p, *batch) for p in (after, params)]
        return (
            losses,
            q.proper,
            q.sample(jax.random.key(0)),
            (tuple(again.natural), tuple(q.natural)),
        )

    (last, first), proper, draw, naturals = look(after, state)
    assert last < 0.7 * first
    assert proper and int(state.skipped) == 0
    assert jax.tree.structure(draw) == jax.tree.structure(params)
    jax.tree.map(close, *naturals)


def test_errors_name_the_way_out():
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        blr.low_rank_newton(mean_loss, 0.1, rank=0)
    with pytest.raises(ValueError, match="init_precision=-1"):
        blr.low_rank_newton(mean_loss, 0.1, rank=1, init_precision=-1.0)
    with pytest.raises(ValueError, match="MatrixGaussian knows auto"):
        blr.kronecker_newton(mean_loss, 0.1, step="plain")
    matrix = families.get("matrix_gaussian")
    natural = jax.jit(matrix.natural_at)(np.zeros((2, 2), np.float32))
    init = blr.Distribution(matrix, natural)
    with pytest.raises(ValueError, match="init is a member of MatrixGaussian"):
        blr.kronecker_newton(mean_loss, 0.1, init=init).init(make_params())
