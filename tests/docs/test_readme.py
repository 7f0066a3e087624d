"""The README's Python runs as printed, in order, and says the truth."""

import re

import jax
import jax.numpy as jnp
from tools import ROOT

import blr_optax as blr

README = ROOT / "README.md"


def test_the_blocks_run_and_the_posterior_is_ridge_regressions(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 14
    names = {}
    for block in blocks:
        exec(block, names)
    exact = jnp.linalg.lstsq(names["x"], names["y"])[0]
    q = names["q"]
    deviation = jnp.sqrt(q.variance)
    assert jnp.all(jnp.abs(q.mean - exact) < 2 * deviation)
    wanted = 1 / jnp.sqrt(jnp.diag(names["x"].T @ names["x"]))
    assert jnp.all(jnp.abs(deviation / wanted - 1) < 0.2)
    assert jnp.all(jnp.abs(names["worst"].mean - exact) < 0.2)
    assert jnp.all(jnp.sign(names["signs"].mean) == jnp.array([1.0, -1.0, 1.0]))
    assert names["est"].grad.shape == names["est"].curvature.shape == (2, 3)
    ridge = jnp.linalg.solve(names["x"].T @ names["x"] + jnp.eye(3), names["x"].T @ names["y"])
    assert jnp.all(jnp.abs(names["curved"] - ridge) < 0.01)
    assert 0.4 < names["step"].signal_to_noise < 0.9
    assert jnp.all(names["torch_run"].params == names["trained"])
    printed = capsys.readouterr().out
    assert "(3, 3)" in printed
    assert "Array(15., " in printed and "Array(4., " in printed  # the gamma after its counts
    ridge = jnp.linalg.solve(names["x"].T @ names["x"] + jnp.eye(3), names["x"].T @ names["y"])
    assert jnp.all(jnp.abs(names["weights"]["w"] - ridge) < 0.1)  # the mean field
    means, data = names["means"], names["data"]
    assert abs(means["mean"] - jnp.mean(data)) < 0.05  # the product
    assert abs(means["precision"] * jnp.var(data) - 1.0) < 0.05
    wells = blr.posterior(names["state"], names["theta"]).standard()["mean"]
    assert jnp.all(jnp.abs(wells - jnp.array([[-2.0], [2.0]])) < 0.1)  # the mixture
    x, y = names["x"], names["noisy"]
    singles = jax.vmap(jax.grad(names["mean_loss"]), (None, 0, 0))(
        names["mlp"], x[:, None], names["y"][:, None]
    )
    squares = jax.tree.map(lambda g: jnp.sum(g**2, 0), singles)
    for found, expected in zip(
        jax.tree.leaves(names["found"].sum_squares), jax.tree.leaves(squares), strict=True
    ):
        assert jnp.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.max())
    q = blr.posterior(names["opt_state"], names["params"])  # VOGN: ridge regression again
    precision = jnp.diag(x.T @ x) + 1.0
    assert jnp.all(jnp.abs(q.variance * precision - 1) < 0.5)
    ridge = jnp.linalg.solve(x.T @ x + jnp.eye(3), x.T @ y)
    assert jnp.all(jnp.abs(q.mean - ridge) < 2 * jnp.sqrt(q.variance))
