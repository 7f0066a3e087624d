"""Dropout as the rule: by enumeration of masks, against the mixture, layers, and the inner row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from registry import make_batch, make_params, mean_loss
from tools import run_steps

import blr_optax as blr
from blr_optax.families._conditional.mixture import Mixture

close = np.testing.assert_allclose
PI = 0.7


QUANTILE = scipy.special.ndtri(PI)


def all_masks(params, units):
    """Normals of every mask of the units of every leaf, stacked, and each mask's probability."""
    names = [name for name, n in units.items() if n]
    choices = list(itertools.product([1.0, 0.0], repeat=sum(units.values())))
    noise = {name: [] for name in params}
    for z in choices:
        rest = list(z)
        for name, p in params.items():
            u = np.zeros(p.shape)
            if name in names:
                mine, rest = rest[: units[name]], rest[units[name] :]
                # Anything below the quantile is kept.
                sign = np.where(np.array(mine) > 0, -1.0, 1.0)
                u = np.broadcast_to((QUANTILE + sign)[:, None], p.shape)
            noise[name].append(u)
    weight = [PI ** sum(z) * (1 - PI) ** (len(z) - sum(z)) for z in choices]
    noise = {name: np.stack(x) for name, x in noise.items()}
    return noise, np.array(weight), np.array(choices)


def quartic(p):
    h = np.array([0.3, -1.2, 0.8]) @ p["a"]
    return jnp.sum(h**2) + 0.5 * jnp.sum(jnp.tanh(h) @ p["b"]) ** 2 + jnp.sum(p["c"] * h)


def small(dtype=float):
    return {
        "a": np.array([[0.5, -1.0], [0.2, 0.7], [-0.4, 1.1]], dtype),
        "b": np.array([[0.9, 0.1], [-0.6, 0.3]], dtype),
        "c": np.array([0.3, -0.8], dtype),
    }


def responsible(params, units):
    """(z / pi) g of every mask, by `estimate` with recorded noise; and what it enumerates."""
    tx = blr.dropout(optax.sgd(0.1), PI)
    noise, weight, z = all_masks(params, units)

    @jax.jit
    def estimates(params, noise):
        state = tx.init(params)

        def one(n):
            n = jax.tree.map(lambda x: x[None], n)
            return blr.estimate(quartic, state, params, noise=n).statistic

        return jax.vmap(one)(noise)

    return jax.tree.map(np.asarray, estimates(params, noise)), weight, z


def test_gradients_given_that_a_unit_is_kept(x64):
    """E[grad_j l | z_j = 1] = E[(z_j / pi) grad_j l(z o m)], and the vector is always kept."""
    params, units = small(), {"a": 3, "b": 2, "c": 0}
    each, weight, z = responsible(params, units)
    assert float(weight.sum()) == pytest.approx(1.0)
    masked = {
        "a": z[:, :3, None] * params["a"],
        "b": z[:, 3:, None] * params["b"],
        "c": np.broadcast_to(params["c"], (len(z), 2)),
    }
    slopes = jax.tree.map(np.asarray, jax.jit(jax.vmap(jax.grad(quartic)))(masked))
    column = 0
    for name in ("a", "b"):
        for j in range(units[name]):
            kept = weight * z[:, column]
            wanted = kept @ slopes[name][:, j] / kept.sum()
            found = np.tensordot(weight, each[name], 1)[j]
            close(found, wanted, rtol=1e-10, err_msg=f"{name}, unit {j}")
            column += 1


def test_the_rule_for_a_unit_is_the_mixtures_with_a_responsibility_of_one(x64):
    """One step of the mixture family for unit j, its zero component wide, others' masks averaged:
    S <- (1 - rho) S + rho E[hess_j | z_j = 1], m <- m - rho S^-1 E[(z_j / pi) grad_j]."""
    params, units, rho = small(), {"a": 3, "b": 2, "c": 0}, 0.2
    each, weight, z = responsible(params, units)
    given = weight * z[:, 1] / PI  # of the masks, given that the second input is kept
    masks = z[:, :3, None], z[:, 3:, None]

    def loss(row):
        def one(za, zb):
            a = za * jnp.asarray(params["a"]).at[1].set(row)
            return quartic({"a": a, "b": zb * params["b"], "c": params["c"]})

        return given @ jax.vmap(one)(*masks)

    mixture = Mixture()
    precision = np.stack([2e3 * np.eye(2), 1e-4 * np.eye(2)])

    @jax.jit
    def step(m):
        # The dropped component holds next to nothing at m, so that r = 1 there to 1e-8.
        lam = mixture.natural(
            weights=jnp.array([PI, 1 - PI]), mean=jnp.stack([m, 0 * m]), precision=precision
        )
        estimate = blr.estimators.natural_gradient(mixture, loss, blr.estimators.delta())
        _, gradient = estimate(None, lam)
        return mixture.standard(mixture.move(lam, gradient, rho)), jax.hessian(loss)(m)

    m = params["a"][1]
    moved, hessian = jax.tree.map(np.asarray, step(m))
    s = (1 - rho) * precision[0] + rho * hessian
    close(np.linalg.inv(moved["covariance"][0]), s, rtol=1e-5)
    slope = np.tensordot(weight, each["a"], 1)[1]
    close(moved["mean"][0] - m, -rho * np.linalg.solve(s, slope), rtol=1e-4)


def test_sgd_moves_by_the_rules_gradient(x64):
    """S = I fixed: SGD with dropout, up to 1 / pi on what is kept; dropped units stay."""
    tx = blr.dropout(optax.sgd(0.1), PI, key=3)

    def start():
        params = jax.tree.map(jnp.asarray, small())
        return params, tx.init(params)

    def step(carry, _):
        params, state = carry
        theta = blr.sample(state, params)
        g = jax.grad(quartic)(theta)
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), (params, theta, g, updates)

    _, (params, theta, g, updates) = run_steps(step, start, length=4)
    for name in "ab":
        kept = np.any(theta[name] != 0, axis=2, keepdims=True)
        np.testing.assert_array_equal(theta[name], np.where(kept, params[name], 0.0))
        close(updates[name], np.where(kept, -0.1 * g[name] / PI, 0.0), rtol=1e-12)
    close(updates["c"], -0.1 * g["c"], rtol=1e-12)


@pytest.mark.parametrize("inner", [optax.sgd(0.1, 0.9), optax.adamw(0.01)], ids=["sgd", "adamw"])
def test_a_keep_rate_of_one_is_the_inner_optimizer(inner):
    """To the bit, so the arithmetic is eager: in one program equal things may round otherwise."""
    params, batch = jax.tree.map(np.asarray, (make_params(), make_batch()))
    grad, found = jax.jit(jax.grad(mean_loss)), []
    for tx in (blr.dropout(inner, 1.0), inner):
        p, state = jax.tree.map(jnp.asarray, params), jax.jit(tx.init)(params)
        weights_of = (lambda s, p: p) if tx is inner else jax.jit(blr.sample)
        for _ in range(3):
            updates, state = tx.update(grad(weights_of(state, p), *batch), state, p)
            p = optax.apply_updates(p, updates)
        found.append(p)
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_inverted_dropout_is_the_same_in_scaled_parameters(x64):
    """A layer's dropout at m' = pi m has the same outputs, and its gradient is what inner gets."""
    rng = np.random.default_rng(0)
    m = {
        "in": {"kernel": rng.normal(size=(3, 5)), "bias": np.ones(5)},
        "out": {"kernel": rng.normal(size=(5, 2)), "bias": np.zeros(2)},
    }
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))

    def plain(p, x):
        h = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"])
        return h @ p["out"]["kernel"] + p["out"]["bias"]

    def with_layer(p, x, z):
        h = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"])
        return (h * z / PI) @ p["out"]["kernel"] + p["out"]["bias"]

    mask = {"in": False, "out": True}
    tx = blr.dropout(optax.trace(0.0), PI, mask=mask)  # passes gradients on
    scaled = {"in": m["in"], "out": {**m["out"], "kernel": PI * m["out"]["kernel"]}}

    @jax.jit
    def look(m, scaled):
        state = tx.init(m)
        theta = blr.sample(state, m)
        z = jnp.any(theta["out"]["kernel"] != 0, axis=1).astype(float)
        outputs = plain(theta, x), with_layer(scaled, x, z)
        inverted = jax.grad(lambda p: jnp.mean((with_layer(p, x, z) - y) ** 2))(scaled)
        ours = jax.grad(lambda p: jnp.mean((plain(p, x) - y) ** 2))(theta)
        updates, _ = tx.update(ours, state, m)
        return theta, z, outputs, (updates, inverted), blr.posterior(state, m).mean

    theta, z, outputs, gradients, mean = look(m, scaled)
    assert 0 < z.sum() < 5
    np.testing.assert_array_equal(theta["in"]["kernel"], m["in"]["kernel"])
    close(*outputs, rtol=1e-12)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-11), *gradients)
    # Test-time scaling.
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-12), mean, scaled)


def test_several_draws_average_the_weighted_gradient(x64):
    tx = blr.dropout(optax.sgd(0.1), PI)

    @jax.jit
    def look(params):
        state = tx.init(params)
        est = blr.estimate(quartic, state, params, samples=2, antithetic=True)
        updates, _ = tx.update(est.grad, state, params, statistic=est.statistic)
        one = blr.estimate(quartic, state, params)
        given, _ = tx.update(one.grad, state, params, statistic=one.statistic)
        derived, _ = tx.update(one.grad, state, params)
        return updates, est.statistic, given, derived

    updates, curvature, given, derived = jax.tree.map(np.asarray, look(small()))
    jax.tree.map(lambda u, c: close(u, -0.1 * c, rtol=1e-12), updates, curvature)
    jax.tree.map(np.testing.assert_array_equal, given, derived)


def test_a_unit_of_zeros_is_kept_as_often_as_others(x64):
    """Kept or dropped it looks the same: the mask comes from the noise, not from the weights."""
    tx = blr.dropout(optax.sgd(1.0), PI)
    ones = {"w": np.ones((4000, 2))}
    update = jax.jit(lambda p: tx.update(ones, tx.init(p), p)[0]["w"])
    step = np.asarray(update({"w": np.zeros((4000, 2))}))
    assert set(np.unique(step)) == {-1 / PI, 0.0} and np.all(step[:, 0] == step[:, 1])
    close(step.mean(), -1.0, atol=0.1)


def test_the_posterior_has_the_moments_of_its_draws():
    params, one = small(np.float32), {"w": np.array([[0.8]], np.float32)}
    tx = blr.dropout(blr.sgd(0.1, ess=2.0), PI, mask={"a": True, "b": False, "c": True},
                     dropped_variance=0.3)  # fmt: skip
    whole, plain = blr.dropout(blr.sgd(0.1), 1.0, mask=False), blr.sgd(0.1)
    wide = blr.dropout(blr.sgd(0.1), PI, dropped_variance=0.5)
    grid = np.linspace(-8, 8, 4001, dtype=np.float32)

    @jax.jit
    def look(params, one):
        q = blr.posterior(tx.init(params), params)
        at = jax.tree.map(lambda p: p + 0.1, params)
        dense = [blr.posterior(t.init(params), params).log_prob(at) for t in (whole, plain)]
        r = blr.posterior(wide.init(one), one)
        draws = q.sample(jax.random.key(0), (40_000,))
        return draws, q.mean, q.variance, dense, r.log_prob({"w": grid[:, None, None]}), r.mean

    draws, mean, variance, dense, log_density, r_mean = jax.tree.map(np.asarray, look(params, one))
    for name, m in params.items():
        close(draws[name].mean(0), mean[name], atol=0.03)
        close(draws[name].var(0), variance[name], atol=0.05)
        close(mean[name], PI * m if name == "a" else m, rtol=1e-6)
    close(variance["b"], 0.05, rtol=1e-6)  # learning rate / ess, of the inner posterior
    # A unit is kept as a whole; the density is normal where nothing is dropped.
    close(*dense, rtol=1e-5)
    density, width = np.exp(log_density), grid[1] - grid[0]
    close(np.sum(density) * width, 1.0, rtol=1e-4)
    close(np.sum(density * grid) * width, r_mean["w"][0, 0], rtol=1e-4)


def test_predictions_are_monte_carlo_dropout():
    params, (x, _) = jax.tree.map(np.asarray, (make_params(), make_batch()))
    tx = blr.dropout(optax.adam(0.1), 0.5)
    apply = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731

    @jax.jit
    def look(params):
        q = blr.posterior(tx.init(params), params)
        w = q.sample(jax.random.key(0), (50,))["w"]
        return w, blr.predict(jax.random.key(1), q, apply, x, samples=16).epistemic

    w, epistemic = map(np.asarray, look(params))
    whole = np.all(np.all(w == params["w"], -1) | np.all(w == 0, -1))
    assert whole and 0.3 < np.mean(np.any(w[:, 1:] != 0, -1)) < 0.7
    assert np.all(np.isfinite(epistemic)) and np.max(epistemic) > 0


def test_other_rates_for_other_leaves():
    params = small(np.float32)
    tx = optax.partition(
        {"lo": blr.dropout(optax.sgd(0.1), 1e-6), "hi": blr.dropout(optax.sgd(0.1), 1 - 1e-6)},
        {"a": "lo", "b": "hi", "c": "hi"},
    )
    part = optax.masked(blr.dropout(optax.sgd(0.1), 0.5), {"a": True, "b": False, "c": False})

    @jax.jit
    def look(params):
        state = tx.init(params)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        q, r = blr.posterior(state, params), blr.posterior(part.init(params), params)
        key = jax.random.key(0)
        weights = blr.sample(state, params)
        return weights, updates, (q.mean, q.sample(key, (5,))), (r.mean, r.sample(key))

    theta, updates, (mean, drawn), (of_part, one) = jax.tree.map(np.asarray, look(params))
    assert not np.any(theta["a"]) and np.all(theta["b"] == params["b"])
    assert not np.any(updates["a"]) and np.all(updates["b"] < 0)
    close(mean["a"], 1e-6 * params["a"], rtol=1e-6)  # joined, each leaf by its own rate
    close(mean["b"], params["b"], rtol=1e-5)
    assert not np.any(drawn["a"]) and np.all(drawn["b"] == params["b"])
    close(of_part["a"], 0.5 * params["a"], rtol=1e-6)
    close(of_part["b"], params["b"], rtol=1e-6)
    np.testing.assert_array_equal(one["c"], params["c"])


def test_units_of_convolutions_are_input_channels():
    params = {"conv": np.ones((3, 3, 8, 16), np.float32), "scale": np.ones(8, np.float32)}
    tx = blr.dropout(optax.sgd(0.1), 0.5)
    other = blr.dropout(optax.sgd(0.1), 0.5, unit_axis=-1, mask=lambda p: {"conv": 1, "scale": 0})
    both = jax.jit(lambda p: [blr.sample(t.init(p), p) for t in (tx, other)])
    inputs, outputs = jax.tree.map(np.asarray, both(params))
    assert set(np.sum(inputs["conv"], (0, 1, 3)).tolist()) == {0.0, 144.0}
    assert np.all(inputs["scale"] == 1)
    assert set(np.sum(outputs["conv"], (0, 1, 2)).tolist()) == {0.0, 72.0}


def test_what_is_wrong_is_said():
    params = small(np.float32)
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="keep_rate"):
            blr.dropout(optax.sgd(0.1), rate)
    with pytest.raises(ValueError, match="samples its weights"):
        blr.dropout(blr.ivon(0.1, ess=10.0), 0.5).init(params)
    with pytest.raises(ValueError, match="unit_axis=2"):
        blr.dropout(optax.sgd(0.1), 0.5, unit_axis=2).init(params)
    tx = blr.dropout(optax.sgd(0.1), 0.5)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, jax.jit(tx.init)(params))
