"""Von Mises-Fisher densities: what takes many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_rows.matrix import ROWS
from test_families_matrix import (
    check,
    conditioning_of,
    golden_fields,
    groups,
    standard,
    theta_of,
)
from tools import close, compiled

SPHERE = ROWS["von_mises_fisher"].family


@pytest.mark.parametrize("d", [2, 3, 6])
def test_sphere_draws_move_with_lambda(d):
    """d E[x] = F dlambda through the sampler, on both sides of kappa = 1 and at zero."""
    kappa = np.array([0.0, 0.8, 1.2, 40.0], np.float32)
    u, change = np.eye(d)[0] + 0.5, np.linspace(-1.0, 2.0, d)

    def evaluate(u, v, kappa):
        lam = SPHERE.natural(direction=jnp.tile(u, (4, 1)), concentration=kappa)
        v = SPHERE.Natural(jnp.tile(v, (4, 1)))
        draw = lambda lam: SPHERE.sample(jax.random.key(0), lam, (20_000,))  # noqa: E731
        moments = SPHERE.mean(lam), SPHERE.fisher_product(lam, v).linear
        return jax.jvp(draw, (lam,), (v,)), moments

    # What computes this long is worth the better program.
    run = jax.jit(evaluate, compiler_options={"xla_backend_optimization_level": "2"})
    found = run(u.astype(np.float32), change.astype(np.float32), kappa)
    (x, dx), truths = jax.tree.map(np.asarray, found)
    close(np.sum(x * x, -1), 1.0, rtol=1e-5)
    close(np.sum(x * dx, -1), 0.0, atol=1e-5)
    assert np.max(np.abs(dx)) < 4 * np.linalg.norm(change)  # bounded, also close to zero
    for values, truth in zip((x, dx), truths, strict=True):
        error = np.std(values, axis=0) / np.sqrt(len(values)) + 1e-6
        assert np.all(np.abs(values.mean(0) - truth) < 5 * error)


@pytest.mark.parametrize(("name", "cases"), groups())
def test_golden_values(name, cases, dtype):
    family = ROWS[name].family
    forward, backward = np.transpose([conditioning_of(name, c) for c in cases])
    own = standard(name, [c["params"] for c in cases], dtype)
    others = standard(name, [c["kl"]["q_params"] for c in cases], dtype)
    theta = theta_of(name, [c["log_prob"][0]["x"] for c in cases], dtype)
    mu = family.Expectation(*golden_fields(family, cases, "expectation", dtype))

    def everything(own, others, theta, mu):
        lam, other = family.natural(**own), family.natural(**others)
        values = {
            "log_partition": family.log_partition(lam),
            "entropy": family.entropy(lam),
            "log_prob": family.log_prob(lam, theta),
            "kl": family.kl(lam, other),
        }
        return lam, values, family.expectation(lam), family.natural_from_expectation(mu, True)

    found = compiled(everything, own, others, theta, mu)
    lam, values, found_mu, (back, converged) = found
    golden = golden_fields(family, cases, "natural")
    for found, expected in zip(lam, golden, strict=True):
        check(found, expected, dtype, np.sqrt(forward))
    for found, expected in zip(found_mu, golden_fields(family, cases, "expectation"), strict=True):
        check(found, expected, dtype, forward)
    expected = {
        "log_partition": [c["log_partition"] for c in cases],
        "entropy": [c["entropy"] for c in cases],
        "log_prob": [c["log_prob"][0]["value"] for c in cases],
        "kl": [c["kl"]["kl_p_q"] for c in cases],
    }
    for key, value in values.items():
        check(value, expected[key], dtype, forward)
    assert np.all(converged)
    for found, expected in zip(back, golden, strict=True):
        check(found, expected, dtype, backward)
