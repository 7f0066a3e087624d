"""The Python of the README and of every page runs as printed, and what the pages say is true.

Each page is one namespace, its blocks in order; a recipe of recipes.md is one for itself, and so is
the README's only block. `FACTS` holds what is asserted about each. A page or recipe takes 1 to 10
seconds, most of it compiling, and all of them about a minute: keep a new block as small.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tools import ROOT, assert_same, near

import blr_optax as blr
from blr_optax.families._base import registry
from blr_optax.state._reader import posterior_states

DOCS = ROOT / "docs"
RECIPES = DOCS / "recipes.md"
BLOCK = re.compile(r"^## ([^\n]+)$|^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Names = dict[str, Any]


def programs() -> dict[str, tuple[Path, list[tuple[int, str]]]]:
    """What runs together: the page, and each block with the line that it begins at."""
    found: dict[str, tuple[Path, list[tuple[int, str]]]] = {}
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        if "_build" in path.parts:
            continue
        text, title = path.read_text(), ""
        for match in BLOCK.finditer(text):
            title = match[1] or title
            if match[2]:
                name = title if path == RECIPES else str(path.relative_to(ROOT))
                blocks = found.setdefault(name, (path, []))[1]
                blocks.append((text.count("\n", 0, match.start(2)), match[2]))
    return found


# --- the README and the guide ---------------------------------------------------------------------


@jax.jit
def moments(q: Any) -> Any:
    return {"mean": q.mean, "variance": q.variance}


def ridge(x: Any, y: Any) -> np.ndarray:
    """The mean of the posterior under the prior N(0, 1) and noise of one."""
    x = np.asarray(x)
    return np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ np.asarray(y))


def readme(names: Names) -> None:
    left, gap, right = np.sqrt(np.asarray(names["found"].epistemic[:, 0]))
    assert gap > 2 * max(left, right)
    assert np.all(np.abs(np.asarray(names["found"].mean[:, 0]) - np.sin([-3.0, 0.0, 3.0])) < 0.3)
    assert int(names["info"].skipped) == 0


def getting_started(names: Names) -> None:
    labels = names["test_y"]
    for probabilities in (names["point"], names["found"].probabilities):
        assert blr.metrics.accuracy(probabilities, labels) > 0.94
    assert names["found"].epistemic.mean() > 0.01
    assert Path("reliability.png").exists() and Path("entropy.png").exists()
    # The posterior is that of ridge regression.
    x, y = np.asarray(names["x"]), np.asarray(names["y"])
    exact = np.linalg.lstsq(x, y)[0]
    q = jax.device_get(moments(names["q"]))
    deviation = np.sqrt(q["variance"])
    assert np.all(np.abs(q["mean"] - exact) < 2 * deviation)
    wanted = 1 / np.sqrt(np.diag(x.T @ x))
    assert np.all(np.abs(deviation / wanted - 1) < 0.2)


def optimizers(names: Names) -> None:
    x, y = np.asarray(names["x"]), np.asarray(names["y"])
    exact = np.linalg.lstsq(x, y)[0]
    assert np.all(np.abs(np.asarray(names["worst"].mean) - exact) < 0.2)
    assert np.all(np.sign(np.asarray(names["signs"].mean)) == np.array([1.0, -1.0, 1.0]))
    assert names["est"].grad.shape == names["est"].statistic.shape == (2, 3)
    assert np.all(np.abs(np.asarray(names["curved"]) - ridge(x, y)) < 0.01)
    assert 0.4 < names["step"].curvature_signal_to_noise < 0.9
    assert np.all(np.asarray(names["torch_run"].params) == np.asarray(names["trained"]))


def families(names: Names) -> None:
    # The gamma after its counts.
    assert "Array(15., " in names["printed"] and "Array(4., " in names["printed"]
    assert np.all(np.abs(np.asarray(names["weights"]["w"]) - ridge(names["x"], names["y"])) < 0.1)
    means, data = jax.device_get((names["means"], names["data"]))
    assert abs(means["mean"] - np.mean(data)) < 0.05  # the product
    assert abs(means["precision"] * np.var(data) - 1.0) < 0.05
    wells = np.asarray(blr.posterior(names["state"], names["theta"]).standard()["mean"])
    assert np.all(np.abs(wells - np.array([[-2.0], [2.0]])) < 0.1)  # the mixture


def estimators(names: Names) -> None:
    assert "(3, 3)" in names["printed"]
    slopes = np.asarray(names["params"])
    assert np.all(np.sign(slopes) == np.array([1.0, -1.0, 1.0])) and abs(slopes[1]) > 2
    assert float(names["value"]) == 4.5
    found = names["normal"].standard(names["lam"])
    assert (float(found["mean"]), float(found["variance"])) == (3.0, 0.25)


def your_own_estimator(names: Names) -> None:
    mean, precision = 12.0 / 5.0, 5.0  # of four observations whose sum is 12, and one of zero
    assert abs(float(names["theta"]) - mean) < 0.2
    variance = float(blr.posterior(names["state"], names["theta"]).variance)
    assert abs(variance * precision - 1.0) < 0.3
    assert np.all(np.abs(np.asarray(names["slope"]) - np.array([3.0, 5.0])) < 0.5)
    # H / 2 = 6 E[theta^2] of theta^4, exactly: theta ~ N(m, 1 / 4)
    exact = 6.0 * (np.array([1.0, -2.0]) ** 2 + 0.25)
    assert np.allclose(np.asarray(names["known"].quadratic), exact, rtol=1e-4)
    assert np.allclose(np.asarray(names["mine"].quadratic), exact, rtol=0.2)
    assert names["refused"] == "Evolution: needs a mean field of normals, not Gamma."


def per_example(names: Names) -> None:
    x, y = np.asarray(names["x"]), np.asarray(names["y"])
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
    assert np.all(np.abs(q["mean"] - ridge(x, names["noisy"])) < 2 * np.sqrt(q["variance"]))


def faq(names: Names) -> None:
    deviations = np.sqrt(np.asarray(names["once"].variance) / np.asarray(names["four"].variance))
    assert np.all(np.abs(deviations - 2.0) < 0.1)
    wrong = np.sqrt(np.asarray(names["wrong"].variance) / np.asarray(names["once"].variance))
    assert np.all(wrong > 5.0)
    assert abs(sum(names["scores"])) / len(names["scores"]) ** 0.5 < 4.0


def checking(names: Names) -> None:
    assert names["report"].ok and names["report"].evaluations <= 14
    mistakes = ["sum_loss", "ess_is_batch_size", "slow_b2", "transformed_gradient"]
    assert sorted(one.name for one in names["found"].warnings) == sorted(mistakes)
    assert all(name in names["printed"] for name in mistakes)
    assert [one.name for one in names["stepped"].warnings] == ["gradient_at_params"]
    assert [one.name for one in names["later"].warnings] == ["precision_disagrees"]
    assert names["later"].numbers["statistic_over_precision"] > 10.0


def composition(names: Names) -> None:
    assert float(names["train_state"].params["w"]) > 0.0
    assert int(names["train_state"].step) == 1


# --- the recipes ----------------------------------------------------------------------------------


def learnt(names: Names) -> None:
    """The loss fell to less than half, and the posterior moved from where it began."""
    assert np.mean(names["losses"][-5:]) < 0.5 * np.mean(names["losses"][:5])
    assert bool(names["q"].proper)
    deviations = jax.tree.leaves(names["q"].variance)
    assert all(bool(jnp.all(jnp.isfinite(v))) for v in deviations)
    assert len({float(v) for v in deviations[-1].ravel()}) > 1


def classifies(names: Names) -> None:
    learnt(names)
    probabilities, epistemic = names["prediction"].probabilities, names["prediction"].epistemic
    assert blr.metrics.accuracy(probabilities, names["y"]) > 0.9
    assert bool(jnp.all(epistemic >= 0)) and float(epistemic.max()) > 0.01


def linen(names: Names) -> None:
    classifies(names)
    assert int(names["state"].step) == len(names["losses"])


def linen_batch_norm(names: Names) -> None:
    linen(names)
    stats = names["state"].batch_stats["BatchNorm_0"]
    assert float(jnp.abs(stats["mean"]).max()) > 0.1
    assert stats["mean"].shape == (32,)


def transfer(names: Names) -> None:
    learnt_head = {**names, "q": names["head"]}
    learnt(learnt_head)
    assert float(names["printed"].split("new images")[1].split()[0]) > 0.8
    # The backbone is where it was, and a point; what stands in the head is what `part` returned.
    assert_same(jax.device_get(names["state"].params["backbone"]), names["backbone"])
    assert (
        float(jax.tree.reduce(jnp.maximum, jax.tree.map(jnp.max, names["q"].variance["backbone"])))
        == 0
    )
    assert_same(names["head"].variance, names["q"].variance["head"])
    # First precisions: ess (hess_init + weight_decay) of kernels, ess hess_init of the rest.
    first = blr.posterior(names["tx"].init(names["state"].params), names["state"].params)
    norm, dense = (first.variance["head"][f"layers_{i}"] for i in (0, 1))
    near(1 / dense["kernel"], np.full((64, 5), 300 * 0.11), rtol=1e-5)
    for flat in (norm["scale"], norm["bias"], dense["bias"]):
        near(1 / flat, np.full(flat.shape, 300 * 0.1), rtol=1e-5)


def continued(names: Names) -> None:
    x, y = np.asarray(names["x"], np.float64), np.asarray(names["y"], np.float64)
    precision = x.T @ x + np.eye(4)
    exact = np.linalg.solve(precision, x.T @ y)
    near(names["exact"], exact, rtol=1e-4)
    deviation = np.sqrt(np.asarray(names["q"].variance))
    assert np.all(np.abs(np.asarray(names["q"].mean) - exact) < 2 * deviation)
    near(deviation**2 * np.diag(precision), np.ones(4), rtol=0.25)


def half_normal(names: Names) -> None:
    """Against scipy's half-normal, and the conjugate answer 1 / s^2 = 1 + 4 + 1 + 4."""
    scale, nodes = 10**-0.5, np.linspace(0.0, 6.0, 60_001)
    q, exact = names["q"], stats.halfnorm(scale=scale)
    near(q.standard()["scale"], scale, rtol=1e-6)
    near(q.log_prob(0.7), exact.logpdf(0.7), rtol=1e-5)
    near([q.mean, q.variance, q.entropy()], [*exact.stats(), exact.entropy()], rtol=1e-5)
    p, log_ratio = exact.pdf(nodes), exact.logpdf(nodes) - stats.halfnorm().logpdf(nodes)
    unit = blr.distribution(q.family, scale=1.0)  # of the family that `blr_update` lifted
    near(q.kl(unit), np.trapezoid(p * log_ratio, nodes), rtol=1e-5)
    sampled = blr.posterior(names["opt_state"], names["params"])
    near(sampled.standard()["scale"], scale, rtol=0.1)


def nnx_batch_norm(names: Names) -> None:
    classifies(names)
    assert float(jnp.abs(names["model"].norm.mean[...]).max()) > 0.1
    assert int(names["optimizer"].step[...]) == len(names["losses"])


def nnx_samples(names: Names) -> None:
    learnt(names)
    assert float(jnp.abs(names["model"].norm.mean[...]).max()) > 0.01
    assert int(names["model"].drop.rngs.count[...]) == len(names["losses"])
    residual = names["prediction"].mean - names["y"]
    assert float(jnp.mean(residual**2)) < names["losses"][0]


def accumulation(names: Names) -> None:
    learnt(names)
    drawn = jnp.stack(names["drawn"]).reshape(-1, 4, 4)  # optimizer step, micro-step, weight
    assert bool(jnp.all(drawn == drawn[:, :1]))
    assert len(np.unique(drawn[:, 0, 0])) == len(drawn)
    near(names["params"], np.array([1.0, -2.0, 0.5, 0.0]), rtol=1e-5, atol=0.1)


def outstanding(names: Names) -> None:
    assert set(names["suspects"].tolist()) == set(names["flipped"].tolist())


def lora(names: Names) -> None:
    """Learnt, with ess the tokens: the precision of b is ess times (statistic + decay)."""
    assert names["losses"][-1] < 0.3 * names["losses"][0]
    variance = names["q"].variance
    assert float(jnp.max(variance["frozen"]["head"])) == 0
    assert bool(jnp.all(variance["adapter"]["b"] > 0))
    (state,) = posterior_states(names["opt_state"], "test")
    ess = names["tokens"] ** 0.5 * np.sqrt(names["tokens"])
    near(1 / (ess * variance["adapter"]["b"]), state.precision["adapter"]["b"], rtol=1e-4)


def from_torch_and_back(names: Names) -> None:
    group, (saved,) = names["group"], names["saved"]["param_groups"]
    near([saved["hess"], saved["momentum"]], [group["hess"], group["momentum"]], rtol=1e-5)
    near(names["back"], names["weights"], rtol=1e-6)
    deviation = (100.0 * (group["hess"][:6].reshape(3, 2).T + 1e-3)) ** -0.5
    near(np.sqrt(names["q"].variance["kernel"]), deviation, rtol=1e-5)


def numpyro_svi(names: Names) -> None:
    """The conjugate answer: precision 50 + 1 / 0.5^2, mean 150 over it."""
    near(names["mean"], 150 / 54, rtol=0.01)
    near(names["deviation"], 54**-0.5, rtol=0.1)


def partitioned(names: Names) -> None:
    assert np.mean(names["losses"][-5:]) < 0.2 * names["losses"][0]
    q, theta = names["q"], names["theta"]
    assert float(jnp.abs(q.variance["body"]["w"]).max()) == 0.0
    assert float(q.variance["head"].min()) > 0.0
    np.testing.assert_array_equal(
        theta["body"]["w"], jnp.broadcast_to(names["params"]["body"]["w"], (8, 1, 32))
    )
    assert float(jnp.std(theta["head"], axis=0).min()) > 0.0


def orbax(names: Names) -> None:
    assert names["latest"] == 9
    assert_same(names["resumed"], names["params"])
    assert_same(names["resumed_state"], names["opt_state"])


def msgpack(names: Names) -> None:
    assert_same(names["restored"], names["opt_state"])


def watched(names: Names) -> None:
    learnt(names)
    reports = names["reports"]
    assert len(reports) == 4 and all(int(report.skipped) == 0 for report in reports)
    assert all(0.0 <= float(report.correction_of_precision) < 0.2 for report in reports)
    assert float(reports[-1].curvature_signal_to_noise) > 0.5
    assert names["clipped"][0] > 0.2 and names["clipped"][-1] == 0.0


def hetero(names: Names) -> None:
    quiet, loud = np.sqrt(names["moments"].aleatoric)
    assert 0.02 < quiet < 0.2 and 0.25 < loud < 0.6  # 0.05 and 0.35
    assert 0.8 < names["coverage"] < 0.98


def ensemble(names: Names) -> None:
    assert names["all_four"].epistemic.mean() > 1.05 * names["one"].epistemic.mean()
    assert float(names["printed"].split()[-1]) > 0.85


def tempered(names: Names) -> None:
    nll, cold, q = names["nll"], names["cold"], names["q"]
    test = names["test_x"], names["test_y"]
    assert nll(cold, *test) < nll(q, *test)
    assert names["held"][1.0] > min(names["held"].values())
    near(cold.mean["w1"], q.mean["w1"], rtol=1e-5)
    assert np.isfinite(names["temperature"])


def saved(names: Names) -> None:
    for same in (names["pickled"], names["arrays"], names["restored"]):
        assert same.family == names["q"].family
        assert_same(same, names["q"])


def padded(names: Names) -> None:
    assert names["losses"][0] > 2 and names["losses"][-1] < 0.7
    assert names["accuracy"] > 0.95 and np.isfinite(names["nll"])


def from_two_counts(names: Names) -> None:
    assert names["tuned"].prior in (1.7, 3.2, 10.0)
    assert float(names["info"].skipped) == 0
    # Labels of which 15 % are random: nobody can do better than about 0.8, and guessing is 2.3.
    at_mean = names["loss"](names["params"], names["test_x"], names["test_y"])
    assert names["nll"](names["tempered"].posterior, names["test_x"], names["test_y"]) < 1.4
    scores = names["tempered"].scores
    assert scores[names["tempered"].scale] <= min(scores[0.0], scores[1.0])
    assert np.isfinite(at_mean) and 2 < float(names["health"].growth) < 10


FACTS: dict[str, Callable[[Names], None]] = {
    "README.md": readme,
    "docs/checking.md": checking,
    "docs/composition.md": composition,
    "docs/estimators.md": estimators,
    "docs/families.md": families,
    "docs/faq.md": faq,
    "docs/getting_started.md": getting_started,
    "docs/optimizers.md": optimizers,
    "docs/per_example.md": per_example,
    "docs/your_own_estimator.md": your_own_estimator,
    "Raw JAX": classifies,
    "Nothing to search: an optimizer from two counts": from_two_counts,
    "Linen TrainState": linen,
    "Linen with BatchNorm, dropout and several samples": linen_batch_norm,
    "Transfer: a frozen backbone, and no decay on biases and norms": transfer,
    "A convnet in nnx: the loop changes in one line": nnx_batch_norm,
    "nnx with several samples and dropout": nnx_samples,
    "VOGN: squares of the gradients of single examples": classifies,
    "Gradient accumulation with optax.MultiSteps": accumulation,
    "Which examples stand out": outstanding,
    "LoRA: what ess means for tokens": lora,
    "From PyTorch and back": from_torch_and_back,
    "numpyro's SVI": numpyro_svi,
    "A posterior over a part of the model with optax.partition": partitioned,
    "Checkpoints with orbax": orbax,
    "Checkpoints with flax msgpack": msgpack,
    "Diagnostics of a training step": watched,
    "Regression with noise that depends on the input": hetero,
    "An ensemble by vmap": ensemble,
    "One task after another: a posterior as the prior": continued,
    "Cold posteriors and temperature scaling": tempered,
    "A family of your own": half_normal,
    "Saving a posterior": saved,
    "Sequences with padding": padded,
}


def test_every_page_with_code_has_its_facts():
    found = programs()
    assert sorted(found) == sorted(FACTS)
    for name, (path, blocks) in found.items():
        if path in (RECIPES, ROOT / "README.md"):
            assert len(blocks) == 1, f"{name} has several blocks; it is one complete block"


@pytest.mark.parametrize("name", FACTS)
def test_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)  # pages save figures
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.setattr(registry, "REGISTRY", {**registry.REGISTRY})  # pages register families
    path, blocks = programs()[name]
    names: Names = {"__name__": "page"}
    for line, code in blocks:
        # Empty lines in front, so that a traceback names the line of the document.
        exec(compile("\n" * line + code, str(path), "exec"), names)
    names["printed"] = capsys.readouterr().out
    FACTS[name](names)
    source = "".join(code for _, code in blocks)
    assert "import blr_optax as blr" in source
    assert names["printed"] or "print" not in source
