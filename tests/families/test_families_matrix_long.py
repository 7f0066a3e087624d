"""Von Mises-Fisher densities: what takes many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_rows.matrix import ROWS
from tools import close

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
