"""The README's Python runs as printed, in order, and says the truth."""

import re

import jax
import numpy as np
from tools import ROOT

import blr_optax as blr

README = ROOT / "README.md"


def test_the_blocks_run_and_the_posterior_is_ridge_regressions(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 14
    names = {}
    for block in blocks:
        exec(block, names)
    x, y = np.asarray(names["x"]), np.asarray(names["y"])
    exact = np.linalg.lstsq(x, y)[0]
    q = jax.device_get(moments(names["q"]))
    deviation = np.sqrt(q["variance"])
    assert np.all(np.abs(q["mean"] - exact) < 2 * deviation)
    wanted = 1 / np.sqrt(np.diag(x.T @ x))
    assert np.all(np.abs(deviation / wanted - 1) < 0.2)
    assert np.all(np.abs(np.asarray(names["worst"].mean) - exact) < 0.2)
    assert np.all(np.sign(np.asarray(names["signs"].mean)) == np.array([1.0, -1.0, 1.0]))
    assert names["est"].grad.shape == names["est"].statistic.shape == (2, 3)
    ridge = np.linalg.solve(x.T @ x + np.eye(3), x.T @ y)
    assert np.all(np.abs(np.asarray(names["curved"]) - ridge) < 0.01)
    assert 0.4 < names["step"].curvature_signal_to_noise < 0.9
    assert np.all(np.asarray(names["torch_run"].params) == np.asarray(names["trained"]))
    printed = capsys.readouterr().out
    assert "(3, 3)" in printed
    assert "Array(15., " in printed and "Array(4., " in printed  # the gamma after its counts
    assert np.all(np.abs(np.asarray(names["weights"]["w"]) - ridge) < 0.1)  # the mean field
    means, data = jax.device_get((names["means"], names["data"]))
    assert abs(means["mean"] - np.mean(data)) < 0.05  # the product
    assert abs(means["precision"] * np.var(data) - 1.0) < 0.05
    wells = np.asarray(blr.posterior(names["state"], names["theta"]).standard()["mean"])
    assert np.all(np.abs(wells - np.array([[-2.0], [2.0]])) < 0.1)  # the mixture
    singles = jax.jit(jax.vmap(jax.grad(names["mean_loss"]), (None, 0, 0)))(
        names["mlp"], x[:, None], y[:, None]
    )
    squares = jax.tree.map(lambda g: np.sum(np.asarray(g) ** 2, 0), singles)
    for found, expected in zip(
        jax.tree.leaves(names["found"].sum_squares), jax.tree.leaves(squares), strict=True
    ):
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.max())
    # VOGN: ridge regression again.
    q = jax.device_get(moments(blr.posterior(names["opt_state"], names["params"])))
    precision = np.diag(x.T @ x) + 1.0
    assert np.all(np.abs(q["variance"] * precision - 1) < 0.5)
    ridge = np.linalg.solve(x.T @ x + np.eye(3), x.T @ np.asarray(names["noisy"]))
    assert np.all(np.abs(q["mean"] - ridge) < 2 * np.sqrt(q["variance"]))


@jax.jit
def moments(q):
    return {"mean": q.mean, "variance": q.variance}
