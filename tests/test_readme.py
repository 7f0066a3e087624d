"""The README's Python runs as printed, in order, and says the truth."""

import re
from pathlib import Path

import jax.numpy as jnp

README = Path(__file__).parents[1] / "README.md"


def test_the_blocks_run_and_the_posterior_is_ridge_regressions(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(block, names)
    exact = jnp.linalg.lstsq(names["x"], names["y"])[0]
    q = names["q"]
    deviation = jnp.sqrt(q.variance)
    assert jnp.all(jnp.abs(q.mean - exact) < 2 * deviation)
    wanted = 1 / jnp.sqrt(jnp.diag(names["x"].T @ names["x"]))
    assert jnp.all(jnp.abs(deviation / wanted - 1) < 0.2)
    printed = capsys.readouterr().out
    assert "(3, 3)" in printed
    assert "Array(15., " in printed and "Array(4., " in printed  # the gamma after its counts
