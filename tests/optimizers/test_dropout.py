"""Dropout as the rule: by enumeration of masks, against the mixture, layers, and the inner row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy.special import ndtri
from registry import make_batch, make_params, mean_loss

import blr_optax as blr
from blr_optax.families._mixture import Mixture

close = np.testing.assert_allclose
PI = 0.7


def all_masks(params, units):
    """Normals of every mask of the units of every leaf, stacked, and each mask's probability."""
    names = [name for name, n in units.items() if n]
    choices = list(itertools.product([1.0, 0.0], repeat=sum(units.values())))
    noise = {name: [] for name in params}
    for z in choices:
        rest = list(z)
        for name, p in params.items():
            u = jnp.zeros(p.shape)
            if name in names:
                mine, rest = rest[: units[name]], rest[units[name] :]
                # Anything below the quantile is kept.
                sign = jnp.where(jnp.array(mine) > 0, -1.0, 1.0)
                u = jnp.broadcast_to((ndtri(PI) + sign)[:, None], p.shape)
            noise[name].append(u)
    weight = [PI ** sum(z) * (1 - PI) ** (len(z) - sum(z)) for z in choices]
    noise = {name: jnp.stack(x) for name, x in noise.items()}
    return noise, jnp.array(weight), np.array(choices)


def quartic(p):
    h = jnp.array([0.3, -1.2, 0.8]) @ p["a"]
    return jnp.sum(h**2) + 0.5 * jnp.sum(jnp.tanh(h) @ p["b"]) ** 2 + jnp.sum(p["c"] * h)


def small():
    return {
        "a": jnp.array([[0.5, -1.0], [0.2, 0.7], [-0.4, 1.1]]),
        "b": jnp.array([[0.9, 0.1], [-0.6, 0.3]]),
        "c": jnp.array([0.3, -0.8]),
    }


def responsible(params, units):
    """(z / pi) g of every mask, by `estimate` with recorded noise; and what it enumerates."""
    tx = blr.dropout(optax.sgd(0.1), PI)
    state = tx.init(params)
    noise, weight, z = all_masks(params, units)
    each = jax.jit(
        jax.vmap(
            lambda n: (
                blr.estimate(
                    quartic, state, params, noise=jax.tree.map(lambda x: x[None], n)
                ).curvature
            )
        )
    )(noise)
    return each, weight, z


def test_gradients_given_that_a_unit_is_kept(x64):
    """E[grad_j l | z_j = 1] = E[(z_j / pi) grad_j l(z o m)], and the vector is always kept."""
    params, units = small(), {"a": 3, "b": 2, "c": 0}
    each, weight, z = responsible(params, units)
    assert float(weight.sum()) == pytest.approx(1.0)
    column = 0
    for name in ("a", "b"):
        for j in range(units[name]):
            total, mass = 0.0, 0.0
            for row, w in zip(z, weight, strict=True):
                if row[column]:
                    masked = {
                        "a": row[:3, None] * params["a"],
                        "b": row[3:, None] * params["b"],
                        "c": params["c"],
                    }
                    total += w * jax.grad(quartic)(masked)[name][j]
                    mass += w
            close(jnp.tensordot(weight, each[name], 1)[j], total / mass, rtol=1e-10)
            column += 1


def test_the_rule_for_a_unit_is_the_mixtures_with_a_responsibility_of_one(x64):
    """One step of the mixture family for unit j, its zero component wide, others' masks averaged:
    S <- (1 - rho) S + rho E[hess_j | z_j = 1], m <- m - rho S^-1 E[(z_j / pi) grad_j]."""
    params, units, rho = small(), {"a": 3, "b": 2, "c": 0}, 0.2
    each, weight, z = responsible(params, units)
    given = weight * z[:, 1] / PI  # of the masks, given that the second input is kept
    masks = [jnp.asarray(z[:, :3, None]), jnp.asarray(z[:, 3:, None])]

    def loss(row):
        def one(za, zb):
            a = za * params["a"].at[1].set(row)
            return quartic({"a": a, "b": zb * params["b"], "c": params["c"]})

        return given @ jax.vmap(one)(*masks)

    mixture, m = Mixture(), params["a"][1]
    precision = jnp.stack([2e3 * jnp.eye(2), 1e-4 * jnp.eye(2)])
    # The dropped component holds next to nothing at m, so that r = 1 there to 1e-8.
    lam = mixture.natural(
        weights=jnp.array([PI, 1 - PI]), mean=jnp.stack([m, 0 * m]), precision=precision
    )
    _, gradient = mixture.natural_gradient(None, lam, loss, delta=True)
    moved = mixture.standard(mixture.move(lam, gradient, rho))
    s = (1 - rho) * precision[0] + rho * jax.hessian(loss)(m)
    close(jnp.linalg.inv(moved["covariance"][0]), s, rtol=1e-5)
    step = jnp.tensordot(weight, each["a"], 1)[1]
    close(moved["mean"][0] - m, -rho * jnp.linalg.solve(s, step), rtol=1e-4)


def test_sgd_moves_by_the_rules_gradient(x64):
    """S = I fixed: SGD with dropout, up to 1 / pi on what is kept; dropped units stay."""
    params = small()
    tx = blr.dropout(optax.sgd(0.1), PI, key=3)
    state = tx.init(params)
    for _ in range(4):
        theta = blr.sample(state, params)
        g = jax.grad(quartic)(theta)
        updates, state = tx.update(g, state, params)
        for name in "ab":
            kept = jnp.any(theta[name] != 0, axis=1, keepdims=True)
            np.testing.assert_array_equal(theta[name], jnp.where(kept, params[name], 0.0))
            close(updates[name], jnp.where(kept, -0.1 * g[name] / PI, 0.0), rtol=1e-12)
        close(updates["c"], -0.1 * g["c"], rtol=1e-12)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("inner", [optax.sgd(0.1, 0.9), optax.adamw(0.01)], ids=["sgd", "adamw"])
def test_a_keep_rate_of_one_is_the_inner_optimizer(inner):
    params, batch = make_params(), make_batch()
    found = []
    for tx in (blr.dropout(inner, 1.0), inner):
        p, state = params, tx.init(params)
        for _ in range(3):
            weights = p if tx is inner else blr.sample(state, p)
            updates, state = tx.update(jax.grad(mean_loss)(weights, *batch), state, p)
            p = optax.apply_updates(p, updates)
        found.append(p)
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_inverted_dropout_is_the_same_in_scaled_parameters(x64):
    """A layer's dropout at m' = pi m has the same outputs, and its gradient is what inner gets."""
    keys = jax.random.split(jax.random.key(0), 4)
    m = {
        "in": {"kernel": jax.random.normal(keys[0], (3, 5)), "bias": jnp.ones(5)},
        "out": {"kernel": jax.random.normal(keys[1], (5, 2)), "bias": jnp.zeros(2)},
    }
    x, y = jax.random.normal(keys[2], (8, 3)), jax.random.normal(keys[3], (8, 2))

    def plain(p, x):
        h = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"])
        return h @ p["out"]["kernel"] + p["out"]["bias"]

    def with_layer(p, x, z):
        h = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"])
        return (h * z / PI) @ p["out"]["kernel"] + p["out"]["bias"]

    mask = {"in": False, "out": True}
    tx = blr.dropout(optax.trace(0.0), PI, mask=mask)  # passes gradients on
    state = tx.init(m)
    theta = blr.sample(state, m)
    z = jnp.any(theta["out"]["kernel"] != 0, axis=1).astype(float)
    assert 0 < z.sum() < 5
    np.testing.assert_array_equal(theta["in"]["kernel"], m["in"]["kernel"])
    scaled = {"in": m["in"], "out": {**m["out"], "kernel": PI * m["out"]["kernel"]}}
    close(plain(theta, x), with_layer(scaled, x, z), rtol=1e-12)
    inverted = jax.grad(lambda p: jnp.mean((with_layer(p, x, z) - y) ** 2))(scaled)
    ours = jax.grad(lambda p: jnp.mean((plain(p, x) - y) ** 2))(theta)
    updates, _ = tx.update(ours, state, m)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-11), updates, inverted)
    # Test-time scaling.
    q = blr.posterior(state, m)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-12), q.mean, scaled)


def test_several_draws_average_the_weighted_gradient(x64):
    params = small()
    tx = blr.dropout(optax.sgd(0.1), PI)
    state = tx.init(params)
    est = blr.estimate(quartic, state, params, samples=2, antithetic=True)
    updates, _ = tx.update(est.grad, state, params, curvature=est.curvature)
    jax.tree.map(lambda u, c: close(u, -0.1 * c, rtol=1e-12), updates, est.curvature)
    one = blr.estimate(quartic, state, params)
    given, _ = tx.update(one.grad, state, params, curvature=one.curvature)
    derived, _ = tx.update(one.grad, state, params)
    jax.tree.map(np.testing.assert_array_equal, given, derived)


def test_a_unit_of_zeros_is_kept_as_often_as_others(x64):
    """Kept or dropped it looks the same: the mask comes from the noise, not from the weights."""
    params = {"w": jnp.zeros((4000, 2))}
    tx = blr.dropout(optax.sgd(1.0), PI)
    step = tx.update({"w": jnp.ones((4000, 2))}, tx.init(params), params)[0]["w"]
    assert set(np.unique(step)) == {-1 / PI, 0.0} and jnp.all(step[:, 0] == step[:, 1])
    close(step.mean(), -1.0, atol=0.1)


def test_the_posterior_has_the_moments_of_its_draws():
    params = small()
    tx = blr.dropout(blr.sgd(0.1, ess=2.0), PI, mask={"a": True, "b": False, "c": True},
                     dropped_variance=0.3)  # fmt: skip
    q = blr.posterior(tx.init(params), params)
    draws = q.sample(jax.random.key(0), (40_000,))
    for name, m in params.items():
        close(draws[name].mean(0), q.mean[name], atol=0.03)
        close(draws[name].var(0), q.variance[name], atol=0.05)
        close(q.mean[name], PI * m if name == "a" else m, rtol=1e-6)
    close(q.variance["b"], 0.05, rtol=1e-6)  # learning rate / ess, of the inner posterior
    # A unit is kept as a whole; the density is normal where nothing is dropped.
    alone = blr.posterior(blr.dropout(blr.sgd(0.1), 1.0, mask=False).init(params), params)
    normal = blr.posterior(blr.sgd(0.1).init(params), params)
    at = jax.tree.map(lambda p: p + 0.1, params)
    close(alone.log_prob(at), normal.log_prob(at), rtol=1e-5)
    grid = jnp.linspace(-8, 8, 4001)
    one = {"w": jnp.array([[0.8]])}
    q = blr.posterior(blr.dropout(blr.sgd(0.1), PI, dropped_variance=0.5).init(one), one)
    density = jnp.exp(q.log_prob({"w": grid[:, None, None]}))
    close(jnp.sum(density) * (grid[1] - grid[0]), 1.0, rtol=1e-4)
    close(jnp.sum(density * grid) * (grid[1] - grid[0]), q.mean["w"][0, 0], rtol=1e-4)


def test_predictions_are_monte_carlo_dropout():
    params, (x, _) = make_params(), make_batch()
    tx = blr.dropout(optax.adam(0.1), 0.5)
    state = tx.init(params)
    q = blr.posterior(state, params)
    w = q.sample(jax.random.key(0), (50,))["w"]
    whole = jnp.all(jnp.all(w == params["w"], -1) | jnp.all(w == 0, -1))
    assert whole and 0.3 < jnp.mean(jnp.any(w[:, 1:] != 0, -1)) < 0.7
    apply = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
    p = jax.jit(lambda q: blr.predict(jax.random.key(1), q, apply, x, samples=16))(q)
    assert jnp.all(jnp.isfinite(p.epistemic)) and jnp.max(p.epistemic) > 0


def test_other_rates_for_other_leaves():
    params = small()
    tx = optax.partition(
        {"lo": blr.dropout(optax.sgd(0.1), 1e-6), "hi": blr.dropout(optax.sgd(0.1), 1 - 1e-6)},
        {"a": "lo", "b": "hi", "c": "hi"},
    )
    state = tx.init(params)
    theta = blr.sample(state, params)
    assert not jnp.any(theta["a"]) and jnp.all(theta["b"] == params["b"])
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert not jnp.any(updates["a"]) and jnp.all(updates["b"] < 0)
    q = blr.posterior(state, params)  # joined, each leaf by its own rate
    close(q.mean["a"], 1e-6 * params["a"], rtol=1e-6)
    close(q.mean["b"], params["b"], rtol=1e-5)
    drawn = q.sample(jax.random.key(0), (5,))
    assert not jnp.any(drawn["a"]) and jnp.all(drawn["b"] == params["b"])
    part = optax.masked(blr.dropout(optax.sgd(0.1), 0.5), {"a": True, "b": False, "c": False})
    q = blr.posterior(part.init(params), params)
    close(q.mean["a"], 0.5 * params["a"], rtol=1e-6)
    close(q.mean["b"], params["b"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, q.sample(jax.random.key(0))["c"], params["c"])


def test_units_of_convolutions_are_input_channels():
    params = {"conv": jnp.ones((3, 3, 8, 16)), "scale": jnp.ones(8)}
    tx = blr.dropout(optax.sgd(0.1), 0.5)
    theta = blr.sample(tx.init(params), params)
    assert set(jnp.sum(theta["conv"], (0, 1, 3)).tolist()) == {0.0, 144.0}
    assert jnp.all(theta["scale"] == 1)
    other = blr.dropout(optax.sgd(0.1), 0.5, unit_axis=-1, mask=lambda p: {"conv": 1, "scale": 0})
    theta = blr.sample(other.init(params), params)
    assert set(jnp.sum(theta["conv"], (0, 1, 2)).tolist()) == {0.0, 72.0}


def test_what_is_wrong_is_said():
    params = small()
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="keep_rate"):
            blr.dropout(optax.sgd(0.1), rate)
    with pytest.raises(ValueError, match="samples its weights"):
        blr.dropout(blr.ivon(0.1, 10.0), 0.5).init(params)
    with pytest.raises(ValueError, match="unit_axis=2"):
        blr.dropout(optax.sgd(0.1), 0.5, unit_axis=2).init(params)
    tx = blr.dropout(optax.sgd(0.1), 0.5)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, tx.init(params))
