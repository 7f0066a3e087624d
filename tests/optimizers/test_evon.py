"""EVON against IVON, rotations, quadratics in closed form, and brute-force full Gaussians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tools
from jax.sharding import AxisType, PartitionSpec
from registry import core, make_batch, make_params, mean_loss, with_core
from tools import run_steps

import blr_optax as blr
from blr_optax.optimizers._posteriors.rotated import Basis, Rotated
from blr_optax.state._reader import map_posterior_states, posterior_states

NEVER = 10**9
OPTIONS = {"hess_init": 0.5, "b1": 0.8, "b2": 0.9, "weight_decay": 0.1}


close = functools.partial(tools.close, rtol=1e-9, atol=1e-12)


@functools.cache
def orthogonal(seed, n):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def definite(seed, n):
    q = orthogonal(seed, n)
    return (q * np.linspace(0.4, 4.0, n)) @ q.T


def drawn(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


def held(state, *bases):
    """The state with given bases of the single matrix "w", and no first refresh to come."""
    basis = Basis(*map(jnp.asarray, bases))
    return map_posterior_states(lambda s: s._replace(bases={"['w']": basis}), begun(state))


def begun(state):
    """The state after a first step, as `held` has it."""
    return with_core(state, count=jnp.ones((), jnp.int32))


def the(state):
    """The only posterior state of an optimizer state."""
    (found,) = posterior_states(state, "test")
    return found


def moved(tx, loss, params, state, batch=()):
    """One step, with the gradient at the step's sample."""
    grads = jax.grad(loss)(blr.sample(state, params), *batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def moving(tx, loss, params, steps, batch=()):
    """Mean and state after some steps."""

    def start():
        mean = jax.tree.map(jnp.asarray, params)
        return mean, tx.init(mean)

    return run_steps(lambda c, _: (moved(tx, loss, *c, batch), None), start, length=steps)[0]


def side_by_side(ways, steps, look):
    """What is looked at of (mean, state) after every step of two ways, in one program.

    A way is (transformation, loss, first mean, what becomes of the first state).
    """

    def start():
        carry = []
        for tx, _, params, prepare in ways:
            mean = jax.tree.map(jnp.asarray, params)
            carry.append((mean, prepare(tx.init(mean))))
        return carry

    def step(carry, _):
        carry = [moved(tx, loss, *one) for (tx, loss, *_), one in zip(ways, carry, strict=True)]
        return carry, [look(*one) for one in carry]

    return run_steps(step, start, length=steps, fused=True)[1]


def mean_and_variance(params, state):
    return params, blr.posterior(state, params).variance


def same(x):
    return x


# --- where it is IVON -----------------------------------------------------------------------------


@pytest.mark.parametrize("debias", [True, False])
def test_without_bases_it_is_ivon(x64, debias):
    """With sides too long for a basis, on a tree with a matrix, a vector and a number."""
    params, batch = jax.tree.map(np.asarray, (make_params(np.float64), make_batch()))
    loss = lambda p: mean_loss(p, *batch)  # noqa: E731
    ours = blr.evon(0.1, ess=50.0, max_size=1, debias=debias, **OPTIONS)
    theirs = blr.ivon(0.1, ess=50.0, debias=debias, **OPTIONS)
    ways = [(tx, loss, params, same) for tx in (ours, theirs)]
    jax.tree.map(close, *side_by_side(ways, 6, mean_and_variance))


def test_one_by_one_matrices_and_held_identities_are_ivon(x64):
    loss = lambda p: jnp.sum(jnp.cos(p["w"]) + p["w"] ** 2)  # noqa: E731
    for shape, hold in (((1, 1), False), ((3, 2), True)):
        params = {"w": drawn(0, shape)}
        ours = blr.evon(0.1, ess=50.0, refresh_every=NEVER if hold else 1, **OPTIONS)
        theirs = blr.ivon(0.1, ess=50.0, **OPTIONS)
        ways = [
            (ours, loss, params, (lambda s: held(s, np.eye(3), np.eye(2))) if hold else same),
            (theirs, loss, params, begun if hold else same),
        ]
        jax.tree.map(close, *side_by_side(ways, 5, mean_and_variance))


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 2)])
def test_a_rotated_problem_in_rotated_bases_is_ivon_rotated(x64, shape):
    """loss(Q M P^T) in the bases Q^T, P^T moves as IVON moves on loss(M)."""
    rows = int(np.prod(shape[:-1]))
    q, p = orthogonal(1, rows), orthogonal(2, 2)
    weights = drawn(3, shape)
    turn = lambda w: (q @ w.reshape(rows, 2) @ p.T).reshape(shape)  # noqa: E731
    back = lambda w: (q.T @ w.reshape(rows, 2) @ p).reshape(shape)  # noqa: E731
    loss = lambda w: jnp.sum(jnp.cos(w) + w**2) + jnp.sum(w) ** 2  # noqa: E731
    tx, ivon = (
        blr.evon(0.1, ess=50.0, refresh_every=NEVER, **OPTIONS),
        blr.ivon(0.1, ess=50.0, **OPTIONS),
    )
    ways = [
        (tx, lambda w: loss(turn(w["w"])), {"w": back(weights)}, lambda s: held(s, q.T, p.T)),
        (ivon, lambda w: loss(w["w"]), {"w": weights}, begun),
    ]

    def look(params, state):
        return params["w"], core(state).precision["w"], blr.sample(state, params)["w"]

    (means, precision, samples), others = side_by_side(ways, 5, look)
    close([turn(m) for m in means], others[0])
    close(precision, others[1])
    close([turn(w) for w in samples], others[2])


def test_it_is_the_rule_in_the_basis(x64):
    """b1 = 0, learning rate 1 - b2: `blr_update` over the coordinates, with the same draws."""
    rho, ess, a, b = 0.1, 30.0, definite(1, 3), definite(2, 2)
    left, right = orthogonal(3, 3), orthogonal(4, 2)
    loss = lambda w: jnp.sum(jnp.cos(w)) + 0.5 * jnp.sum(w * (a @ w @ b))  # noqa: E731
    diagonal = blr.families.get("gaussian_diagonal")
    first = drawn(5, (3, 2))
    tx = blr.evon(rho, ess=ess, b1=0.0, b2=1 - rho, weight_decay=0.0, rescale_lr=False,
                  refresh_every=NEVER, generator="jax")  # fmt: skip

    def start():
        params = {"w": jnp.asarray(first)}
        coordinates = {"w": jnp.asarray(left.T @ first @ right)}
        q = diagonal.natural(mean=coordinates, precision=ess)
        return params, held(tx.init(params), left, right), q

    def step(carry, _):
        params, state, natural = carry
        q = blr.Distribution(diagonal, natural)
        weights = blr.sample(state, params)["w"]
        grads = {"w": jax.grad(loss)(weights)}
        away = left.T @ (weights - params["w"]) @ right
        turned = left.T @ grads["w"] @ right
        curvature = ess * core(state).precision["w"] * away * turned
        # Price's theorem: grad_mu = (g - c m, c / 2) for one draw.
        m = q.mean["w"]
        grad_mu = diagonal.Natural({"w": turned - curvature * m}, {"w": 0.5 * curvature})
        lam = blr.natural_step(diagonal, natural, grad_mu, rho, ess=ess, step="improved")
        q = blr.Distribution(diagonal, lam)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found = params["w"], blr.posterior(state, params).variance["w"]
        return (params, state, lam), (found, (q.mean["w"], q.variance["w"]))

    _, ((mean, variance), (wanted, of_rule)) = run_steps(step, start, length=10)
    close(left.T @ mean @ right, wanted)
    close(variance, (left**2) @ of_rule @ (right**2).T)


# --- quadratics, whose answers are known ----------------------------------------------------------


def test_the_mean_curvature_is_the_diagonal_of_the_rotated_hessian(x64):
    """Averaged over draws sqrt(d) e_k, which have the covariance of the normal."""
    left, right = orthogonal(1, 3), orthogonal(2, 2)
    h = definite(3, 6)
    loss = lambda p: 0.5 * p["w"].ravel() @ h @ p["w"].ravel() + jnp.sum(p["w"])  # noqa: E731
    tx = blr.evon(0.1, ess=50.0, **OPTIONS)
    noise = {"w": np.sqrt(6.0) * np.eye(6).reshape(6, 3, 2)}

    @jax.jit
    def look(params, noise):
        precision = {"w": jnp.linspace(0.3, 2.0, 6).reshape(3, 2)}
        state = held(tx.init(params), left, right)
        state = with_core(state, precision=precision)
        return blr.estimate(loss, state, params, noise=noise, antithetic=True)

    w = drawn(4, (3, 2))
    est = look({"w": w}, noise)
    whole = np.kron(left, right)  # row-major vec
    close(np.ravel(est.statistic["w"]), np.diagonal(whole.T @ h @ whole))
    close(est.grad["w"], (h @ w.ravel()).reshape(3, 2) + 1.0)


def test_the_fixed_point_of_a_kronecker_quadratic_is_the_exact_posterior(x64):
    """tr(A M B M^T) / 2 along the eigenvectors of A and B: no diagonal Gaussian reaches it."""
    ess, a, b = 40.0, definite(1, 3), definite(2, 2)
    loss = lambda p: 0.5 * jnp.sum(p["w"] * (a @ p["w"] @ b))  # noqa: E731
    params = {"w": drawn(4, (3, 2))}
    exact = np.linalg.inv(ess * np.kron(a, b))
    noise = {"w": np.sqrt(6.0) * np.eye(6).reshape(6, 3, 2)}
    gaussian = blr.families.get("gaussian")
    txs = (
        blr.evon(0.5, ess=ess, b1=0.0, b2=0.5, weight_decay=0.0, refresh_every=NEVER),
        blr.ivon(0.5, ess=ess, b1=0.0, b2=0.5, weight_decay=0.0),
    )

    def start():
        mean = jax.tree.map(jnp.asarray, params)
        evon, ivon = (tx.init(mean) for tx in txs)
        return [(mean, held(evon, np.linalg.eigh(a)[1], np.linalg.eigh(b)[1])), (mean, ivon)]

    def step(carry, _):
        new = []
        for tx, (mean, state) in zip(txs, carry, strict=True):
            est = blr.estimate(loss, state, mean, noise=noise, antithetic=True)
            updates, state = tx.update(est.grad, state, mean, statistic=est.statistic)
            new.append((optax.apply_updates(mean, updates), state))
        return new, None

    @jax.jit
    def gap(mean, state):
        """KL to the exact posterior, of the Gaussian whose precision is read off the density."""
        q = blr.posterior(state, mean)
        slope = jax.grad(lambda t: q.log_prob({"w": t}))
        basis = jax.vmap(lambda e: slope(mean["w"] + e.reshape(3, 2)).ravel())(jnp.eye(6))
        found = gaussian.natural(mean=jnp.zeros(6), precision=-basis)
        answer = gaussian.natural(mean=jnp.zeros(6), covariance=exact)
        return -basis, gaussian.kl(found, answer)

    carry, _ = run_steps(step, start, length=1000)
    for mean, _ in carry:
        close(mean["w"], 0.0, atol=1e-10)
    (_, of_evon), (precision, of_ivon) = (gap(*one) for one in carry)
    assert float(of_evon) < 1e-9
    assert float(of_ivon) > 0.1
    close(np.linalg.inv(precision).diagonal(), 1 / (ess * np.diagonal(np.kron(a, b))))


def test_it_finds_the_bases_itself(x64):
    """From samples alone, on the same loss: the learnt covariance is the exact one, up to noise."""
    ess, a, b = 40.0, definite(1, 3), definite(2, 2)
    loss = lambda p: 0.5 * jnp.sum(p["w"] * (a @ p["w"] @ b))  # noqa: E731
    exact = np.linalg.inv(ess * np.kron(a, b))
    tx = blr.evon(0.05, ess=ess, b2=0.998, weight_decay=0.0)
    params, state = moving(tx, loss, {"w": np.ones((3, 2))}, 20_000)
    draw = jax.jit(lambda p, s, key: blr.posterior(s, p).sample(key, (50_000,))["w"])
    found = np.cov(np.reshape(draw(params, state, jax.random.key(0)), (-1, 6)).T)
    assert np.linalg.norm(found - exact) < 0.2 * np.linalg.norm(exact)
    best = np.diag(1 / (ess * np.diagonal(np.kron(a, b))))  # what a mean field can do
    assert np.linalg.norm(best - exact) > 0.5 * np.linalg.norm(exact)
    basis = the(state).bases["['w']"]
    for s, q in ((a, np.asarray(basis.left)), (b, np.asarray(basis.right))):
        close(q.T @ q, np.eye(len(s)), atol=1e-12)
        turned = q.T @ s @ q
        assert np.linalg.norm(turned - np.diag(np.diagonal(turned))) < 0.15 * np.linalg.norm(s)


# --- the refresh ----------------------------------------------------------------------------------


def test_a_refresh_turns_momentum_and_precision_and_leaves_the_rest(x64):
    params = {"w": drawn(0, (3, 2)), "b": np.ones(2)}
    loss = lambda p: jnp.sum(jnp.cos(p["w"]) + (p["w"] + p["b"]) ** 2)  # noqa: E731
    turning = blr.evon(0.1, ess=50.0, refresh_every=1, **OPTIONS)
    fixed = blr.evon(0.1, ess=50.0, refresh_every=NEVER, **OPTIONS)
    _, state = moving(turning, loss, params, 3)

    @jax.jit
    def both(params, state):
        grads = jax.grad(loss)(blr.sample(state, params))
        steps = [tx.update(grads, state, params) for tx in (turning, fixed)]
        after, kept = (the(s) for _, s in steps)
        # The precision of the new basis is the closest such q: no other one has a smaller KL.
        q, p = (
            blr.Distribution(Rotated(), after.reader.posterior(s, params).natural)
            for s in (after, kept)
        )
        kl = lambda s: Rotated().kl(q.natural._replace(precision=s), p.natural)  # noqa: E731
        parts = [
            (s.bases["['w']"], s.gaussian.momentum.ema, s.gaussian.precision) for s in (after, kept)
        ]
        return [updates for updates, _ in steps], parts, jax.grad(kl)(q.natural.precision)

    updates, (after, kept), slope = jax.tree.map(np.asarray, both(params, state))
    jax.tree.map(close, *updates)  # the step itself is made in the old basis
    (left, right), momentum, precision = after
    (was_left, was_right), old_momentum, old_precision = kept
    assert np.max(np.abs(left - was_left)) > 1e-3
    close(left @ momentum["w"] @ right.T, was_left @ old_momentum["w"] @ was_right.T)
    close(momentum["b"], old_momentum["b"])
    # The precision is the diagonal of the whole precision matrix in the new basis.
    old, new = np.kron(was_left, was_right), np.kron(left, right)
    whole = (old * old_precision["w"].ravel()) @ old.T
    close(precision["w"].ravel(), np.diagonal(new.T @ whole @ new))
    close(precision["b"], old_precision["b"])
    jax.tree.map(lambda g: close(g, 0.0, atol=1e-12), slope)


def test_bases_are_the_eigenvectors_in_the_limit(x64):
    """Constant gradients: power iterations converge to eigenvectors, largest first."""
    g = np.asarray(jax.jit(lambda key: jax.random.normal(key, (3, 3)))(jax.random.key(0)))
    tx = blr.evon(0.0, ess=1e9, refresh_every=1, b2=0.9, shampoo_beta=0.0, weight_decay=0.0)
    params = {"w": np.zeros((3, 3))}

    def start():
        return held(tx.init(jax.tree.map(jnp.asarray, params)), orthogonal(1, 3), orthogonal(2, 3))

    state, _ = run_steps(
        lambda s, _: (tx.update({"w": jnp.asarray(g)}, s, params)[1], None), start, length=100
    )
    left, right = map(np.asarray, the(state).bases["['w']"])
    u, _, vt = np.linalg.svd(g)
    close(np.abs(left.T @ u), np.eye(3), atol=1e-8)
    close(np.abs(right.T @ vt.T), np.eye(3), atol=1e-8)


def test_bases_follow_the_clock_of_steps_that_were_made():
    """A first step that is skipped leaves the eigenvectors to the second; then every third."""
    params, batch = jax.tree.map(np.asarray, (make_params(), make_batch()))
    tx = blr.evon(0.1, ess=50.0, refresh_every=3)

    def step(state, poison):
        grads = jax.grad(mean_loss)(blr.sample(state, params), *batch)
        _, after = tx.update({**grads, "w": grads["w"] * poison}, state, params)
        old, new = the(state), the(after)
        changed = jnp.any(old.bases["['w']"].left != new.bases["['w']"].left)
        return after, (changed, new.gaussian.skipped)

    poison = np.where(np.isin(np.arange(8), (0, 4)), np.nan, 1.0).astype(np.float32)
    start = lambda: tx.init(jax.tree.map(jnp.asarray, params))  # noqa: E731
    _, (changed, skipped) = run_steps(step, start, poison)
    assert changed.tolist() == [False, True, False, False, False, True, False, False]
    assert int(skipped[-1]) == 2


@functools.cache
def flat_gradients():
    """Bases, precision and skipped steps, after every step of gradients of rank one."""
    tx = blr.evon(0.1, ess=50.0, refresh_every=1, b2=0.5, shampoo_beta=0.5)
    params = {"w": np.ones((4, 3), np.float32)}

    def step(state, size):
        _, state = tx.update({"w": jnp.full((4, 3), size)}, state, params)
        found = the(state)
        return state, (found.bases["['w']"], found.gaussian.precision["w"], found.gaussian.skipped)

    start = lambda: tx.init(jax.tree.map(jnp.asarray, params))  # noqa: E731
    return jax.jit(lambda sizes: jax.lax.scan(step, start(), sizes)[1])


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e12])
def test_odd_gradients_leave_bases_orthonormal_and_precision_positive(size):
    sizes = np.float32(size) * np.array([1.0, -1.0, 1.0, -1.0], np.float32)
    bases, precision, skipped = jax.tree.map(np.asarray, flat_gradients()(sizes))
    for q in bases:
        close(np.swapaxes(q, 1, 2) @ q, np.stack([np.eye(q.shape[-1])] * 4), rtol=0, atol=1e-5)
    assert np.all(precision > 0) and np.all(np.isfinite(precision))
    assert int(skipped[-1]) == 0


def test_one_long_side_keeps_the_identity():
    params = {"w": np.ones((6, 2), np.float32), "v": np.ones((6, 7), np.float32)}
    found = the(jax.jit(blr.evon(0.1, ess=50.0, max_size=5).init)(params))
    assert found.bases["['w']"].left is None and found.bases["['w']"].right.shape == (2, 2)
    assert found.bases["['v']"] == Basis(None, None)


# --- options --------------------------------------------------------------------------------------


def test_the_curvature_is_clipped_in_units_of_the_precision(x64):
    params = {"w": np.ones((2, 2))}
    tx = blr.evon(0.1, ess=50.0, clip_curvature=2.0, b2=0.9, hess_init=0.5, weight_decay=0.0)

    @jax.jit
    def after(given):
        state = tx.init(jax.tree.map(jnp.asarray, params))
        curvature = {"w": jnp.full((2, 2), given)}
        found = core(tx.update(params, state, params, statistic=curvature)[1])
        return found.precision["w"], found.skipped

    for given, wanted in ((1e6, 1.0), (-1e6, -1.0), (0.3, 0.3)):
        u = 0.1 * (wanted - 0.5) / 0.5
        close(after(given)[0], np.full((2, 2), 0.5 * (1 + u + u * u / 2)))
    assert int(after(np.inf)[1]) == 1


def test_squared_gradients_are_squares_in_the_basis(x64):
    left, right = orthogonal(1, 3), orthogonal(2, 2)
    tx = blr.evon(0.1, ess=50.0, curvature=blr.estimators.squared_gradient(8))

    @jax.jit
    def look(params):
        state = held(tx.init(params), left, right)
        return blr.estimate(lambda p: jnp.sum(p["w"] ** 3), state, params)

    est = look({"w": drawn(4, (3, 2))})
    close(est.statistic["w"], 8 * (left.T @ np.asarray(est.grad["w"]) @ right) ** 2)


def test_whitening_leaves_directions_and_levels_sizes(x64):
    """Singular vectors stay, singular values come near one; the sign and the rest pass."""
    g = np.asarray(jax.jit(lambda key: jax.random.normal(key, (4, 3)))(jax.random.key(0)))
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    tx = blr.orthogonalize(10)
    tree = {"w": g, "k": g.reshape(2, 2, 3), "b": g[0], "z": np.zeros((2, 2))}

    @jax.jit
    def whitened(tree):
        return tx.update(tree, tx.init(tree))[0]

    out = jax.tree.map(np.asarray, whitened(tree))
    turned = u.T @ out["w"] @ vt.T
    close(turned, np.diag(np.diagonal(turned)), atol=1e-10)
    assert np.all(np.abs(np.diagonal(turned) - 1.0) < 0.35)
    close(out["k"].reshape(4, 3), out["w"])
    close(out["b"], g[0])
    close(out["z"], 0.0)
    scaled = whitened(jax.tree.map(lambda x: -1e-3 * x, tree))
    close(scaled["w"], -out["w"], rtol=1e-4)
    half = np.asarray(whitened({"w": np.zeros((2, 2), np.float16)})["w"])
    assert half.dtype == np.float16 and np.all(half == 0)


# --- the posterior as a value ---------------------------------------------------------------------


def dense(natural, name="w"):
    """Covariance matrix of a leaf by brute force."""
    basis, s = natural.bases[f"['{name}']"], natural.precision[name]
    whole = jnp.kron(basis.left, basis.right)
    return (whole / s.ravel()) @ whole.T


def rotated(seed):
    rng, family = np.random.default_rng(seed), Rotated()
    mean, log_precision = rng.normal(size=(2, 3, 2))
    return blr.Distribution(
        family,
        family.natural(
            mean={"w": jnp.asarray(mean), "b": jnp.ones(2)},
            precision={"w": jnp.exp(log_precision), "b": jnp.full(2, 4.0)},
            bases={
                "['w']": Basis(
                    jnp.asarray(orthogonal(seed + 5, 3)), jnp.asarray(orthogonal(seed + 6, 2))
                )
            },
        ),
    )


def test_the_posterior_is_the_full_gaussian_that_it_says(x64):
    gaussian, normal = blr.families.get("gaussian"), blr.families.get("normal")

    def parts(q):
        """Its matrix as a full Gaussian, its vector as normals."""
        full = gaussian.natural(mean=q.mean["w"].ravel(), covariance=dense(q.natural))
        return full, normal.natural(mean=q.mean["b"], precision=q.natural.precision["b"])

    @jax.jit
    def look(key):
        q, p = rotated(0), rotated(10)
        (full, rest), (other, others) = parts(q), parts(p)
        theta, draws = p.mean, q.sample(key, (40_000,))
        few = jax.tree.map(lambda x: x[:5], draws)
        log_prob = gaussian.log_prob(full, theta["w"].ravel())
        pairs = {
            "variance": (q.variance["w"].ravel(), jnp.diagonal(dense(q.natural))),
            "log_prob": (q.log_prob(theta), log_prob + jnp.sum(normal.log_prob(rest, theta["b"]))),
            "entropy": (q.entropy(), gaussian.entropy(full) + jnp.sum(normal.entropy(rest))),
            "kl": (q.kl(p), gaussian.kl(full, other) + jnp.sum(normal.kl(rest, others))),
            "batch": (jax.vmap(q.log_prob)(few), q.log_prob(few)),
        }
        return pairs, q.kl(q), draws["w"], dense(q.natural), q.proper, (q, p)

    pairs, zero, draws, covariance, proper, (q, p) = look(jax.random.key(0))
    for name, (found, wanted) in pairs.items():
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12, err_msg=name)
    close(zero, 0.0, atol=1e-12)
    assert draws.shape == (40_000, 3, 2)
    close(np.cov(np.reshape(draws, (-1, 6)).T), covariance, rtol=0.1, atol=0.1)
    assert bool(proper)
    with pytest.raises(ValueError, match="no arithmetic"):
        q * p


def test_samples_of_the_state_are_those_of_the_posterior(x64):
    tx = blr.evon(0.1, ess=50.0, b2=0.5, refresh_every=1)
    slopes = np.arange(6.0).reshape(3, 2)
    loss = lambda p: jnp.sum(p["w"] ** 4 + p["w"] * slopes)  # noqa: E731
    params, state = moving(tx, loss, {"w": np.zeros((3, 2))}, 5)

    @jax.jit
    def look(params, state, key):
        keys = jax.random.split(key, 20_000)
        draws = jax.vmap(lambda k: blr.sample(blr.reseed(state, k), params)["w"])(keys)
        return draws.reshape(-1, 6), dense(blr.posterior(state, params).natural)

    found, covariance = map(np.asarray, look(params, state, jax.random.key(1)))
    assert np.linalg.norm(np.cov(found.T) - covariance) < 0.05 * np.linalg.norm(covariance)


def test_posteriors_beside_other_leaves_are_merged():
    params, batch = jax.tree.map(np.asarray, (make_params(), make_batch()))
    labels = {"w": "evon", "b": "ivon", "c": "none"}
    tx = optax.partition(
        {"evon": blr.evon(0.1, ess=50.0), "ivon": blr.ivon(0.1, ess=50.0), "none": optax.sgd(0.1)},
        labels,
    )
    mean, state = moving(tx, mean_loss, params, 3, batch)

    @jax.jit
    def look(mean, state):
        q = blr.posterior(state, mean)
        found = blr.predict(jax.random.key(0), q, lambda w, x: x @ w["w"], batch[0])
        draws = q.sample(jax.random.key(0), (4,))
        return q.variance, draws, q.log_prob(params), found.probabilities

    variance, draws, log_prob, probabilities = jax.tree.map(np.asarray, look(mean, state))
    assert np.all(variance["w"] > 0) and np.all(variance["b"] > 0) and variance["c"] == 0
    assert draws["w"].shape == (4, 3, 2)
    assert np.isfinite(log_prob)
    assert np.all(np.isfinite(probabilities))


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
            blr.evon(0.1, ess=50.0, **change)
    params = jax.tree.map(np.asarray, make_params())
    with pytest.raises(ValueError, match=r"weight_decay: its entry for \['w'\] has shape"):
        blr.evon(0.1, ess=50.0, weight_decay=jax.tree.map(np.ones_like, params)).init(params)
    tx = blr.evon(0.1, ess=50.0)
    with pytest.raises(ValueError, match="update needs params"):
        tx.update(params, jax.jit(tx.init)(params))
    with pytest.raises(ValueError, match="steps=0"):
        blr.orthogonalize(0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_bases_of_both_sides_on_a_mesh(kind):
    """Rows split over eight devices: the numbers of one device, and states that stay placed."""
    params, grads = ({"w": drawn(seed, (8, 2)).astype(np.float32)} for seed in (0, 1))
    tx = optax.chain(
        blr.evon(1.0, ess=50.0, refresh_every=1), blr.orthogonalize(), optax.scale(0.1)
    )

    @jax.jit
    def step(params, state, grads):
        weights = blr.sample(state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, weights

    wanted = step(params, jax.jit(tx.init)(params), grads)
    with jax.set_mesh(jax.make_mesh((8,), ("d",), axis_types=(kind,))) as _:
        split = jax.tree.map(lambda x: jax.device_put(x, PartitionSpec("d")), (params, grads))
        state = jax.jit(tx.init)(split[0])
        found = step(split[0], state, split[1])
        for before, after in zip(*map(jax.tree.leaves, (state, found[1])), strict=True):
            assert before.sharding.is_equivalent_to(after.sharding, before.ndim)
        for one, many in zip((wanted[0], wanted[2]), (found[0], found[2]), strict=True):
            close(jax.device_get(many["w"]), one["w"], rtol=1e-5, atol=1e-6)
        draw = jax.jit(lambda state, mean: blr.posterior(state, mean).sample(jax.random.key(0)))
        assert draw(found[1], found[0])["w"].shape == (8, 2)
