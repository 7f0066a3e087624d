"""EVON against IVON, rotations, quadratics in closed form, and brute-force full Gaussians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tools
from jax.sharding import AxisType, PartitionSpec
from registry import make_batch, make_params, mean_loss

import blr_optax as blr
from blr_optax.families import Basis, Rotated
from blr_optax.rule._protocol import map_posterior_states, posterior_states

NEVER = 10**9
OPTIONS = {"hess_init": 0.5, "b1": 0.8, "b2": 0.9, "weight_decay": 0.1}


close = functools.partial(tools.close, rtol=1e-9, atol=1e-12)


def orthogonal(seed, n):
    return jnp.linalg.qr(jax.random.normal(jax.random.key(seed), (n, n)))[0]


def definite(seed, n):
    q = orthogonal(seed, n)
    return (q * jnp.linspace(0.4, 4.0, n)) @ q.T


def held(state, *bases):
    """The state with given bases of the single matrix "w", and no first refresh to come."""
    basis = Basis(*bases)
    return map_posterior_states(
        lambda s: s._replace(bases={"['w']": basis}, count=jnp.ones_like(s.count)), state
    )


def moving(tx, loss, params, state, steps, batch=()):
    """Means and posterior after every step, gradients at the step's sample."""
    path = []

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(blr.sample(state, params), *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        path.append((params, state))
    return path


# --- where it is IVON -----------------------------------------------------------------------------


@pytest.mark.parametrize("debias", [True, False])
def test_without_bases_it_is_ivon(x64, debias):
    """With sides too long for a basis, on a tree with a matrix, a vector and a number."""
    params, batch = make_params(jnp.float64), make_batch(dtype=jnp.float64)
    ours = blr.evon(0.1, 50.0, max_size=1, debias=debias, **OPTIONS)
    theirs = blr.ivon(0.1, 50.0, debias=debias, **OPTIONS)
    a = moving(ours, mean_loss, params, ours.init(params), 6, batch)
    b = moving(theirs, mean_loss, params, theirs.init(params), 6, batch)
    for (m, s), (n, t) in zip(a, b, strict=True):
        jax.tree.map(close, m, n)
        jax.tree.map(close, blr.posterior(s, m).variance, blr.posterior(t, n).variance)


def test_one_by_one_matrices_and_held_identities_are_ivon(x64):
    for shape, hold in (((1, 1), False), ((3, 2), True)):
        params = {"w": jax.random.normal(jax.random.key(0), shape)}
        loss = lambda p: jnp.sum(jnp.cos(p["w"]) + p["w"] ** 2)  # noqa: E731
        ours = blr.evon(0.1, 50.0, refresh_every=NEVER if hold else 1, **OPTIONS)
        theirs = blr.ivon(0.1, 50.0, **OPTIONS)
        start, like = ours.init(params), theirs.init(params)
        if hold:
            start = held(start, jnp.eye(3), jnp.eye(2))
            like = map_posterior_states(lambda s: s._replace(count=jnp.ones_like(s.count)), like)
        a = moving(ours, loss, params, start, 5)
        b = moving(theirs, loss, params, like, 5)
        for (m, s), (n, t) in zip(a, b, strict=True):
            close(m["w"], n["w"])
            close(blr.posterior(s, m).variance["w"], blr.posterior(t, n).variance["w"])


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 2)])
def test_a_rotated_problem_in_rotated_bases_is_ivon_rotated(x64, shape):
    """loss(Q M P^T) in the bases Q^T, P^T moves as IVON moves on loss(M)."""
    rows = int(np.prod(shape[:-1]))
    q, p = orthogonal(1, rows), orthogonal(2, 2)
    weights = jax.random.normal(jax.random.key(3), shape)
    turn = lambda w: (q @ w.reshape(rows, 2) @ p.T).reshape(shape)  # noqa: E731
    back = lambda w: (q.T @ w.reshape(rows, 2) @ p).reshape(shape)  # noqa: E731
    loss = lambda w: jnp.sum(jnp.cos(w) + w**2) + jnp.sum(w) ** 2  # noqa: E731
    tx, ivon = blr.evon(0.1, 50.0, refresh_every=NEVER, **OPTIONS), blr.ivon(0.1, 50.0, **OPTIONS)
    params, like = {"w": back(weights)}, {"w": weights}
    state = held(tx.init(params), q.T, p.T)
    theirs = map_posterior_states(lambda s: s._replace(count=jnp.ones_like(s.count)),
                                  ivon.init(like))  # fmt: skip
    close(turn(blr.sample(state, params)["w"]), blr.sample(theirs, like)["w"])
    a = moving(tx, lambda w: loss(turn(w["w"])), params, state, 5)
    b = moving(ivon, lambda w: loss(w["w"]), like, theirs, 5)
    for (m, s), (n, t) in zip(a, b, strict=True):
        close(turn(m["w"]), n["w"])
        (found,), (other,) = posterior_states(s, "test"), posterior_states(t, "test")
        close(found.precision["w"], other.precision["w"])


def test_it_is_the_rule_in_the_basis(x64):
    """b1 = 0, learning rate 1 - b2: `blr_update` over the coordinates, with the same draws."""
    rho, ess, a, b = 0.1, 30.0, definite(1, 3), definite(2, 2)
    left, right = orthogonal(3, 3), orthogonal(4, 2)
    loss = lambda w: jnp.sum(jnp.cos(w)) + 0.5 * jnp.sum(w * (a @ w @ b))  # noqa: E731
    diagonal = blr.families.get("gaussian_diagonal")
    params = {"w": jax.random.normal(jax.random.key(5), (3, 2))}
    coordinates = {"w": left.T @ params["w"] @ right}
    tx = blr.evon(rho, ess, b1=0.0, b2=1 - rho, weight_decay=0.0, rescale_lr=False,
                  refresh_every=NEVER, generator="threefry")  # fmt: skip
    rule = blr.natural_step
    state = held(tx.init(params), left, right)
    q = blr.Posterior(diagonal, diagonal.natural(mean=coordinates, precision=ess))
    for _ in range(10):
        (found,) = posterior_states(state, "test")
        weights = blr.sample(state, params)["w"]
        grads = {"w": jax.grad(loss)(weights)}
        away = left.T @ (weights - params["w"]) @ right
        turned = left.T @ grads["w"] @ right
        curvature = ess * found.precision["w"] * away * turned
        # Price's theorem: grad_mu = (g - c m, c / 2) for one draw.
        m = q.mean["w"]
        grad_mu = diagonal.Natural({"w": turned - curvature * m}, {"w": 0.5 * curvature})
        lam = rule(diagonal, q.natural, grad_mu, rho, ess=ess, step="improved")
        q = blr.Posterior(diagonal, lam)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        close(left.T @ params["w"] @ right, q.mean["w"])
        variance = (left**2) @ q.variance["w"] @ (right**2).T
        close(blr.posterior(state, params).variance["w"], variance)


# --- quadratics, whose answers are known ----------------------------------------------------------


def test_the_mean_curvature_is_the_diagonal_of_the_rotated_hessian(x64):
    """Averaged over draws sqrt(d) e_k, which have the covariance of the normal."""
    left, right = orthogonal(1, 3), orthogonal(2, 2)
    h = definite(3, 6)
    loss = lambda p: 0.5 * p["w"].ravel() @ h @ p["w"].ravel() + jnp.sum(p["w"])  # noqa: E731
    params = {"w": jax.random.normal(jax.random.key(4), (3, 2))}
    tx = blr.evon(0.1, 50.0, **OPTIONS)
    precision = {"w": jnp.linspace(0.3, 2.0, 6).reshape(3, 2)}
    state = map_posterior_states(lambda s: s._replace(precision=precision),
                                 held(tx.init(params), left, right))  # fmt: skip
    noise = {"w": jnp.sqrt(6.0) * jnp.eye(6).reshape(6, 3, 2)}
    est = blr.estimate(loss, state, params, noise=noise, antithetic=True)
    whole = jnp.kron(left, right)  # row-major vec
    close(est.curvature["w"].ravel(), jnp.diagonal(whole.T @ h @ whole))
    close(est.grad["w"], jax.grad(loss)(params)["w"])


def test_the_fixed_point_of_a_kronecker_quadratic_is_the_exact_posterior(x64):
    """tr(A M B M^T) / 2 along the eigenvectors of A and B: no diagonal Gaussian reaches it."""
    ess, a, b = 40.0, definite(1, 3), definite(2, 2)
    loss = lambda p: 0.5 * jnp.sum(p["w"] * (a @ p["w"] @ b))  # noqa: E731
    params = {"w": jax.random.normal(jax.random.key(4), (3, 2))}
    exact = jnp.linalg.inv(ess * jnp.kron(a, b))
    noise = {"w": jnp.sqrt(6.0) * jnp.eye(6).reshape(6, 3, 2)}
    gaussian = blr.families.get("gaussian")
    answer = gaussian.natural(mean=jnp.zeros(6), covariance=exact)
    gaps = []
    for tx in (
        blr.evon(0.5, ess, b1=0.0, b2=0.5, weight_decay=0.0, refresh_every=NEVER),
        blr.ivon(0.5, ess, b1=0.0, b2=0.5, weight_decay=0.0),
    ):
        mean, state = params, tx.init(params)
        if not gaps:
            state = held(state, jnp.linalg.eigh(a)[1], jnp.linalg.eigh(b)[1])

        @jax.jit
        def step(mean, state, tx=tx):
            est = blr.estimate(loss, state, mean, noise=noise, antithetic=True)
            updates, state = tx.update(est.grad, state, mean, curvature=est.curvature)
            return optax.apply_updates(mean, updates), state

        for _ in range(1000):
            mean, state = step(mean, state)
        close(mean["w"], 0.0, atol=1e-10)
        q = blr.posterior(state, mean)
        basis = jax.vmap(lambda e, q=q, mean=mean: jax.grad(lambda t: q.log_prob({"w": t}))(
            mean["w"] + e.reshape(3, 2)).ravel())(jnp.eye(6))  # fmt: skip
        found = gaussian.natural(mean=jnp.zeros(6), precision=-basis)
        gaps.append(float(gaussian.kl(found, answer)))
    assert gaps[0] < 1e-9
    assert gaps[1] > 0.1
    close(jnp.linalg.inv(-basis).diagonal(), 1 / (ess * jnp.diagonal(jnp.kron(a, b))))


def test_it_finds_the_bases_itself(x64):
    """From samples alone, on the same loss: the learnt covariance is the exact one, up to noise."""
    ess, a, b = 40.0, definite(1, 3), definite(2, 2)
    loss = lambda p: 0.5 * jnp.sum(p["w"] * (a @ p["w"] @ b))  # noqa: E731
    params = {"w": jnp.ones((3, 2))}
    exact = jnp.linalg.inv(ess * jnp.kron(a, b))
    tx = blr.evon(0.05, ess, b2=0.998, weight_decay=0.0)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(blr.sample(state, params)), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda c: jax.lax.scan(step, c, length=20_000)[0])
    params, state = run((params, tx.init(params)))
    draws = blr.posterior(state, params).sample(jax.random.key(0), (50_000,))["w"]
    found = jnp.cov(draws.reshape(-1, 6).T)
    assert jnp.linalg.norm(found - exact) < 0.2 * jnp.linalg.norm(exact)
    best = jnp.diag(1 / (ess * jnp.diagonal(jnp.kron(a, b))))  # what a mean field can do
    assert jnp.linalg.norm(best - exact) > 0.5 * jnp.linalg.norm(exact)
    (reached,) = posterior_states(state, "test")
    basis = reached.bases["['w']"]
    for s, q in ((a, basis.left), (b, basis.right)):
        close(q.T @ q, jnp.eye(len(s)), atol=1e-12)
        turned = q.T @ s @ q
        assert jnp.linalg.norm(turned - jnp.diag(jnp.diagonal(turned))) < 0.15 * jnp.linalg.norm(s)


# --- the refresh ----------------------------------------------------------------------------------


def test_a_refresh_turns_momentum_and_precision_and_leaves_the_rest(x64):
    params = {"w": jax.random.normal(jax.random.key(0), (3, 2)), "b": jnp.ones(2)}
    loss = lambda p: jnp.sum(jnp.cos(p["w"]) + (p["w"] + p["b"]) ** 2)  # noqa: E731
    turning = blr.evon(0.1, 50.0, refresh_every=1, **OPTIONS)
    fixed = blr.evon(0.1, 50.0, refresh_every=NEVER, **OPTIONS)
    state = moving(turning, loss, params, turning.init(params), 3)[-1][1]
    grads = jax.grad(loss)(blr.sample(state, params))
    one, after = turning.update(grads, state, params)
    other, kept = fixed.update(grads, state, params)
    jax.tree.map(close, one, other)  # the step itself is made in the old basis
    (after,), (kept,) = (posterior_states(s, "test") for s in (after, kept))
    (left, right), (was_left, was_right) = after.bases["['w']"], kept.bases["['w']"]
    assert np.max(np.abs(left - was_left)) > 1e-3
    close(left @ after.momentum.ema["w"] @ right.T,
          was_left @ kept.momentum.ema["w"] @ was_right.T)  # fmt: skip
    close(after.momentum.ema["b"], kept.momentum.ema["b"])
    # The precision is the diagonal of the whole precision matrix in the new basis.
    old, new = jnp.kron(was_left, was_right), jnp.kron(left, right)
    whole = (old * kept.precision["w"].ravel()) @ old.T
    close(after.precision["w"].ravel(), jnp.diagonal(new.T @ whole @ new))
    close(after.precision["b"], kept.precision["b"])
    # ... which is the closest such q: no other precision in that basis has a smaller KL.
    q, p = (
        blr.Posterior(Rotated(), after.rule.posterior(s, params).natural) for s in (after, kept)
    )
    kl = lambda s: Rotated().kl(q.natural._replace(precision=s), p.natural)  # noqa: E731
    jax.tree.map(lambda g: close(g, 0.0, atol=1e-12), jax.grad(kl)(q.natural.precision))


def test_bases_are_the_eigenvectors_in_the_limit(x64):
    """Constant gradients: power iterations converge to eigenvectors, largest first."""
    g = jax.random.normal(jax.random.key(0), (3, 3))
    params = {"w": jnp.zeros((3, 3))}
    tx = blr.evon(0.0, 1e9, refresh_every=1, b2=0.9, shampoo_beta=0.0, weight_decay=0.0)
    state = held(tx.init(params), orthogonal(1, 3), orthogonal(2, 3))
    update = jax.jit(lambda s: tx.update({"w": g}, s, params)[1])
    for _ in range(100):
        state = update(state)
    (found,) = posterior_states(state, "test")
    u, _, vt = jnp.linalg.svd(g)
    close(jnp.abs(found.bases["['w']"].left.T @ u), jnp.eye(3), atol=1e-8)
    close(jnp.abs(found.bases["['w']"].right.T @ vt.T), jnp.eye(3), atol=1e-8)


def test_bases_follow_the_clock_of_steps_that_were_made():
    """A first step that is skipped leaves the eigenvectors to the second; then every third."""
    params = make_params()
    tx = blr.evon(0.1, 50.0, refresh_every=3)
    state = tx.init(params)
    changed = []

    @jax.jit
    def update(state, poison):
        grads = jax.grad(mean_loss)(blr.sample(state, params), *make_batch())
        return tx.update({**grads, "w": grads["w"] * poison}, state, params)[1]

    for t in range(8):
        after = update(state, jnp.nan if t in (0, 4) else 1.0)
        (old,), (new,) = posterior_states(state, "test"), posterior_states(after, "test")
        changed.append(bool(jnp.any(old.bases["['w']"].left != new.bases["['w']"].left)))
        state = after
    assert changed == [False, True, False, False, False, True, False, False]
    assert int(new.skipped) == 2


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e12])
def test_odd_gradients_leave_bases_orthonormal_and_precision_positive(size):
    params = {"w": jnp.ones((4, 3))}
    tx = blr.evon(0.1, 50.0, refresh_every=1, b2=0.5, shampoo_beta=0.5)
    state = tx.init(params)
    update = jax.jit(lambda g, s: tx.update(g, s, params))
    for sign in (1.0, -1.0, 1.0, -1.0):  # of rank one
        _, state = update({"w": jnp.full((4, 3), sign * size)}, state)
        (found,) = posterior_states(state, "test")
        for q in found.bases["['w']"]:
            close(q.T @ q, jnp.eye(len(q)), rtol=0, atol=1e-5)
        assert np.all(found.precision["w"] > 0) and np.all(np.isfinite(found.precision["w"]))
    assert int(found.skipped) == 0


def test_one_long_side_keeps_the_identity():
    params = {"w": jnp.ones((6, 2)), "v": jnp.ones((6, 7))}
    state = blr.evon(0.1, 50.0, max_size=5).init(params)
    (found,) = posterior_states(state, "test")
    assert found.bases["['w']"].left is None and found.bases["['w']"].right.shape == (2, 2)
    assert found.bases["['v']"] == Basis(None, None)


# --- options --------------------------------------------------------------------------------------


def test_the_curvature_is_clipped_in_units_of_the_precision(x64):
    params = {"w": jnp.ones((2, 2))}
    tx = blr.evon(0.1, 50.0, clip_curvature=2.0, b2=0.9, hess_init=0.5, weight_decay=0.0)
    for given, wanted in ((1e6, 1.0), (-1e6, -1.0), (0.3, 0.3)):
        state = tx.init(params)
        curvature = {"w": jnp.full((2, 2), given)}
        _, after = tx.update(params, state, params, curvature=curvature)
        u = 0.1 * (wanted - 0.5) / 0.5
        (found,) = posterior_states(after, "test")
        close(found.precision["w"], 0.5 * (1 + u + u * u / 2))
    _, after = tx.update(params, state, params, curvature={"w": jnp.full((2, 2), jnp.inf)})
    assert int(posterior_states(after, "test")[0].skipped) == 1


def test_squared_gradients_are_squares_in_the_basis(x64):
    left, right = orthogonal(1, 3), orthogonal(2, 2)
    params = {"w": jax.random.normal(jax.random.key(4), (3, 2))}
    tx = blr.evon(0.1, 50.0, curvature=blr.estimators.squared_gradient(8))
    state = held(tx.init(params), left, right)
    est = blr.estimate(lambda p: jnp.sum(p["w"] ** 3), state, params)
    close(est.curvature["w"], 8 * (left.T @ est.grad["w"] @ right) ** 2)


def test_whitening_leaves_directions_and_levels_sizes(x64):
    """Singular vectors stay, singular values come near one; the sign and the rest pass."""
    g = jax.random.normal(jax.random.key(0), (4, 3))
    u, _, vt = jnp.linalg.svd(g, full_matrices=False)
    tx = blr.whiten(10)
    tree = {"w": g, "k": g.reshape(2, 2, 3), "b": g[0], "z": jnp.zeros((2, 2))}
    out, _ = tx.update(tree, tx.init(tree))
    turned = u.T @ out["w"] @ vt.T
    close(turned, jnp.diag(jnp.diagonal(turned)), atol=1e-10)
    assert np.all(np.abs(jnp.diagonal(turned) - 1.0) < 0.35)
    close(out["k"].reshape(4, 3), out["w"])
    close(out["b"], g[0])
    close(out["z"], 0.0)
    scaled, _ = tx.update(jax.tree.map(lambda x: -1e-3 * x, tree), tx.init(tree))
    close(scaled["w"], -out["w"], rtol=1e-4)
    half = tx.update({"w": jnp.zeros((2, 2), jnp.float16)}, tx.init({"w": g}))[0]["w"]
    assert half.dtype == jnp.float16 and np.all(half == 0)


# --- the posterior as a value ---------------------------------------------------------------------


def dense(q, name="w"):
    """Covariance matrix of a leaf by brute force."""
    basis, s = q.natural.bases[f"['{name}']"], q.natural.precision[name]
    whole = jnp.kron(basis.left, basis.right)
    return (whole / s.ravel()) @ whole.T


def rotated(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    family = Rotated()
    return blr.Posterior(
        family,
        family.natural(
            mean={"w": jax.random.normal(keys[0], (3, 2)), "b": jnp.ones(2)},
            precision={"w": jnp.exp(jax.random.normal(keys[1], (3, 2))), "b": jnp.full(2, 4.0)},
            bases={"['w']": Basis(orthogonal(seed + 5, 3), orthogonal(seed + 6, 2))},
        ),
    )


def test_the_posterior_is_the_full_gaussian_that_it_says(x64):
    q, p = rotated(0), rotated(10)
    gaussian, normal = blr.families.get("gaussian"), blr.families.get("normal")
    full = lambda q: gaussian.natural(mean=q.mean["w"].ravel(), covariance=dense(q))  # noqa: E731
    rest = lambda q: normal.natural(mean=q.mean["b"], precision=q.natural.precision["b"])  # noqa: E731
    close(q.variance["w"].ravel(), jnp.diagonal(dense(q)))
    theta = p.mean
    wanted = gaussian.log_prob(full(q), theta["w"].ravel())
    close(q.log_prob(theta), wanted + jnp.sum(normal.log_prob(rest(q), theta["b"])))
    close(q.entropy(), gaussian.entropy(full(q)) + jnp.sum(normal.entropy(rest(q))))
    close(q.kl(p), gaussian.kl(full(q), full(p)) + jnp.sum(normal.kl(rest(q), rest(p))))
    close(q.kl(q), 0.0, atol=1e-12)
    draws = q.sample(jax.random.key(0), (40_000,))
    assert draws["w"].shape == (40_000, 3, 2)
    close(jnp.cov(draws["w"].reshape(-1, 6).T), dense(q), rtol=0.1, atol=0.1)
    close(jax.vmap(q.log_prob)(jax.tree.map(lambda x: x[:5], draws)),
          q.log_prob(jax.tree.map(lambda x: x[:5], draws)))  # fmt: skip
    assert bool(q.proper)
    with pytest.raises(ValueError, match="no arithmetic"):
        q * p


def test_samples_of_the_state_are_those_of_the_posterior(x64):
    params = {"w": jnp.zeros((3, 2))}
    tx = blr.evon(0.1, 50.0, b2=0.5, refresh_every=1)
    loss = lambda p: jnp.sum(p["w"] ** 4 + p["w"] * jnp.arange(6.0).reshape(3, 2))  # noqa: E731
    params, state = moving(tx, loss, params, tx.init(params), 5)[-1]
    q = blr.posterior(state, params)
    draw = jax.vmap(lambda k: blr.sample(blr.reseed(state, k), params)["w"])
    found = draw(jax.random.split(jax.random.key(1), 20_000)).reshape(-1, 6)
    assert jnp.linalg.norm(jnp.cov(found.T) - dense(q)) < 0.05 * jnp.linalg.norm(dense(q))


def test_posteriors_beside_other_leaves_are_merged():
    params, batch = make_params(), make_batch()
    labels = {"w": "evon", "b": "ivon", "c": "none"}
    tx = optax.partition(
        {"evon": blr.evon(0.1, 50.0), "ivon": blr.ivon(0.1, 50.0), "none": optax.sgd(0.1)}, labels
    )
    state = moving(tx, mean_loss, params, tx.init(params), 3, batch)[-1][1]
    q = blr.posterior(state, params)
    assert np.all(q.variance["w"] > 0) and np.all(q.variance["b"] > 0) and q.variance["c"] == 0
    assert q.sample(jax.random.key(0), (4,))["w"].shape == (4, 3, 2)
    assert np.isfinite(q.log_prob(params))
    apply = lambda w, x: x @ w["w"]  # noqa: E731
    found = blr.predict(jax.random.key(0), q, apply, batch[0])
    assert np.all(np.isfinite(found.probabilities))


def test_errors_name_the_way_out():
    for change, message in (
        ({"refresh_every": 0}, "refresh_every=0 must be a plain integer, at least 1"),
        ({"max_size": 0}, "max_size=0"),
        ({"shampoo_beta": 1.0}, "shampoo_beta=1.0"),
        ({"clip_curvature": -1.0}, "clip_curvature=-1.0"),
        ({"curvature": blr.estimators.per_example_squares()}, "along the weights' own axes"),
        ({"hess_init": 0.0, "weight_decay": 0.0}, "leave no first precision"),
    ):
        with pytest.raises(ValueError, match=message):
            blr.evon(0.1, 50.0, **change)
    params = make_params()
    with pytest.raises(ValueError, match=r"weight_decay: its entry for \['w'\] has shape"):
        blr.evon(0.1, 50.0, weight_decay=jax.tree.map(jnp.ones_like, params)).init(params)
    tx = blr.evon(0.1, 50.0)
    with pytest.raises(ValueError, match="update needs params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="steps=0"):
        blr.whiten(0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_bases_of_both_sides_on_a_mesh(kind):
    """Rows split over eight devices: the numbers of one device, and states that stay placed."""
    params, grads = ({"w": jax.random.normal(jax.random.key(seed), (8, 2))} for seed in (0, 1))
    tx = optax.chain(blr.evon(1.0, 50.0, refresh_every=1), blr.whiten(), optax.scale(0.1))

    @jax.jit
    def step(params, state, grads):
        weights = blr.sample(state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, weights

    wanted = step(params, tx.init(params), grads)
    with jax.set_mesh(jax.make_mesh((8,), ("d",), axis_types=(kind,))) as _:
        split = jax.tree.map(lambda x: jax.device_put(x, PartitionSpec("d")), (params, grads))
        state = tx.init(split[0])
        found = step(split[0], state, split[1])
        for before, after in zip(*map(jax.tree.leaves, (state, found[1])), strict=True):
            assert before.sharding.is_equivalent_to(after.sharding, before.ndim)
        for one, many in zip((wanted[0], wanted[2]), (found[0], found[2]), strict=True):
            close(jax.device_get(many["w"]), one["w"], rtol=1e-5, atol=1e-6)
        assert blr.posterior(found[1], found[0]).sample(jax.random.key(0))["w"].shape == (8, 2)
