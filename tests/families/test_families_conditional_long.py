"""Conditional families: what takes many draws or many steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_rows._row import spd
from family_rows.conditional import advance
from scipy import special
from tools import close

from blr_optax.estimators import monte_carlo
from blr_optax.families._conditional.student_t import StudentT

KEY = jax.random.key(0)


def test_draws_of_the_hidden_scale_carry_the_derivative_in_the_degrees():
    family, a = StudentT(), 2.5
    standard = {"mean": np.array([0.8, 0.0]), "scale": spd(5), "degrees": np.array(2 * a)}

    @jax.jit
    def draw(key, standard):
        return family.noise(key, family.natural(**standard), 200_000)

    noise = draw(KEY, jax.tree.map(np.float32, standard))
    log_scale, slope = (np.asarray(x, np.float64) for x in (noise.log_scale, noise.slope))
    # E[log w] = log a - psi(a) and E[1 / w] = 1 for every a.
    for value, expected in [
        (slope, 1 / a - special.polygamma(1, a)),
        (-np.exp(-log_scale) * slope, 0.0),
    ]:
        assert abs(value.mean() - expected) < 4 * value.std() / np.sqrt(value.size)


@pytest.mark.usefixtures("x64")
def test_student_learns_a_student():
    family = StudentT()
    true = {"mean": np.array([1.0, -1.0]), "scale": spd(5), "degrees": 4.0}
    start = {"mean": np.zeros(2), "scale": np.eye(2), "degrees": 15.0}

    @jax.jit
    def run(true, start):
        truth = family.natural(**true)
        loss = lambda x: -family.log_prob(truth, x)  # noqa: E731

        def step(lam, t):
            key, rho = jax.random.fold_in(KEY, t), jnp.where(t < 300, 0.5, 0.05)
            estimator = monte_carlo(400, antithetic=True)
            return advance(family, key, lam, loss, rho, estimator)[1], None

        lam, _ = jax.lax.scan(step, family.natural(**start), jnp.arange(500))
        return family.standard(lam)

    found = run(true, start)
    close(found["mean"], true["mean"], rtol=1e-10, atol=0.03)
    close(found["scale"], true["scale"], 0.1, 0.02)
    close(found["degrees"], 4.0, 0.1, 1e-12)
