"""The recipes of the documentation run as printed, and their facts hold."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools import ROOT, assert_same, near

import blr_optax as blr

RECIPES = ROOT / "docs" / "recipes.md"


def recipes() -> dict[str, tuple[int, str]]:
    """The code of each section of recipes.md that has some, and the line it begins at."""
    found, title = {}, ""
    text = RECIPES.read_text()
    for match in re.finditer(
        r"^## ([^\n]+)$|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        if match[1]:
            title = match[1]
        else:
            assert title not in found, f"{title} has two blocks; a recipe is one complete block"
            found[title] = (text.count("\n", 0, match.start(2)), match[2])
    return found


def learnt(names: dict[str, Any]) -> None:
    """The loss fell to less than half, and the posterior moved from where it began."""
    assert np.mean(names["losses"][-5:]) < 0.5 * np.mean(names["losses"][:5])
    assert bool(names["q"].proper)
    deviations = jax.tree.leaves(names["q"].variance)
    assert all(bool(jnp.all(jnp.isfinite(v))) for v in deviations)
    assert len({float(v) for v in deviations[-1].ravel()}) > 1


def classifies(names: dict[str, Any]) -> None:
    learnt(names)
    probabilities, epistemic = names["prediction"].probabilities, names["prediction"].epistemic
    assert blr.metrics.accuracy(probabilities, names["y"]) > 0.9
    assert bool(jnp.all(epistemic >= 0)) and float(epistemic.max()) > 0.01


def linen(names: dict[str, Any]) -> None:
    classifies(names)
    assert int(names["state"].step) == len(names["losses"])


def linen_batch_norm(names: dict[str, Any]) -> None:
    linen(names)
    stats = names["state"].batch_stats["BatchNorm_0"]
    assert float(jnp.abs(stats["mean"]).max()) > 0.1
    assert stats["mean"].shape == (32,)


def nnx_batch_norm(names: dict[str, Any]) -> None:
    classifies(names)
    assert float(jnp.abs(names["model"].norm.mean[...]).max()) > 0.1
    assert int(names["optimizer"].step[...]) == len(names["losses"])


def nnx_samples(names: dict[str, Any]) -> None:
    learnt(names)
    assert float(jnp.abs(names["model"].norm.mean[...]).max()) > 0.01


def accumulation(names: dict[str, Any]) -> None:
    learnt(names)
    drawn = jnp.stack(names["drawn"]).reshape(-1, 4, 4)  # optimizer step, micro-step, weight
    assert bool(jnp.all(drawn == drawn[:, :1]))
    assert len(np.unique(drawn[:, 0, 0])) == len(drawn)
    near(names["params"], np.array([1.0, -2.0, 0.5, 0.0]), rtol=1e-5, atol=0.1)


def partitioned(names: dict[str, Any]) -> None:
    assert np.mean(names["losses"][-5:]) < 0.2 * names["losses"][0]
    q, theta = names["q"], names["theta"]
    assert float(jnp.abs(q.variance["body"]["w"]).max()) == 0.0
    assert float(q.variance["head"].min()) > 0.0
    np.testing.assert_array_equal(
        theta["body"]["w"], jnp.broadcast_to(names["params"]["body"]["w"], (8, 1, 32))
    )
    assert float(jnp.std(theta["head"], axis=0).min()) > 0.0


def orbax(names: dict[str, Any]) -> None:
    assert names["latest"] == 9
    assert_same(names["resumed"], names["params"])
    assert_same(names["resumed_state"], names["opt_state"])


def msgpack(names: dict[str, Any]) -> None:
    assert_same(names["restored"], names["opt_state"])


def watched(names: dict[str, Any]) -> None:
    learnt(names)
    reports = names["reports"]
    assert len(reports) == 4 and all(int(report.skipped) == 0 for report in reports)
    assert all(0.0 <= float(report.correction_of_precision) < 0.2 for report in reports)
    assert float(reports[-1].curvature_signal_to_noise) > 0.5
    assert names["clipped"][0] > 0.2 and names["clipped"][-1] == 0.0


FACTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "Raw JAX": classifies,
    "Linen TrainState": linen,
    "Linen with BatchNorm and several samples": linen_batch_norm,
    "nnx Optimizer with BatchNorm": nnx_batch_norm,
    "nnx with several samples": nnx_samples,
    "VOGN: squares of the gradients of single examples": classifies,
    "Gradient accumulation with optax.MultiSteps": accumulation,
    "A posterior over a part of the model with optax.partition": partitioned,
    "Checkpoints with orbax": orbax,
    "Checkpoints with flax msgpack": msgpack,
    "Diagnostics of a training step": watched,
}


def test_every_recipe_has_its_facts():
    assert list(recipes()) == list(FACTS)


@pytest.mark.parametrize("title", FACTS)
def test_recipe(title: str, capsys: pytest.CaptureFixture[str]):
    line, code = recipes()[title]
    names: dict[str, Any] = {"__name__": "recipe"}
    # Empty lines in front, so that a traceback names the line of the document.
    exec(compile("\n" * line + code, str(RECIPES), "exec"), names)
    FACTS[title](names)
    assert "import blr_optax as blr" in code
    assert capsys.readouterr().out or "print" not in code
