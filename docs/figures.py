"""Draw docs/figures/posterior_band.png from the README's own code: python docs/figures.py."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import jax.numpy as jnp

import blr_optax as blr

ROOT = Path(__file__).parents[1]


def main() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(block, names)
    grid = jnp.linspace(-3.0, 3.0, 201)[:, None]
    found = blr.predict_regression(
        names["key"], names["q"], names["net"], grid, noise_variance=0.2**2, samples=256
    )
    figure = blr.plots.regression_band(
        grid[:, 0],
        found.mean[:, 0],
        found.epistemic[:, 0],
        found.aleatoric[:, 0],
        data=(names["x"][:, 0], names["y"][:, 0]),
    )
    # No version of matplotlib in the file: the same figure is the same bytes.
    figure.savefig(
        ROOT / "docs" / "figures" / "posterior_band.png", dpi=110, metadata={"Software": None}
    )


if __name__ == "__main__":
    main()
