"""The demo: its tables and files, its flags, and going on; `test_demo_long.py` kills it."""

import io
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from tools import ROOT

import blr_optax as blr
from blr_optax._demo import cli, folder, outcome, report, tasks
from blr_optax._demo import run as experiment

ROWS = [
    "AdamW",
    "IVON at its mean",
    "IVON, 3 samples",
    "AdamW, stopped early",
    "AdamW, tuned",
    "AdamW, tuned and stopped",
    "IVON, its width fitted",
]
SCORES = {
    "a": ("coverage", "nll", "rmse"),
    "b": ("accuracy", "nll", "ece"),
    "c": ("accuracy", "nll", "ece", "auroc"),
}
# The programs of `small`, compiled once.
QUICK = ["--part", "b", "--seed", "0,1", "--steps", "4", "--samples", "3"]


def demo(out: Path, *arguments: str) -> dict:
    assert cli.main(["demo", "--out", str(out), *arguments]) == 0
    return json.loads((out / "results.json").read_text())


class NoFigure:
    def savefig(self, path, **_):
        path.write_text("figure")


@pytest.fixture
def no_figures(monkeypatch):
    """For tests of flags and of going on: the figures of `small` are enough."""
    monkeypatch.setattr(report.figures, "FIGURES", dict.fromkeys("abc", lambda *_: NoFigure()))


@pytest.fixture(autouse=True, scope="module")
def often():
    """Scores and checkpoints after every second step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "EVERY", 2)
        patch.setattr(experiment, "CHECKPOINT_EVERY", 2)
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory, often):
    """A demo of all parts: output folder, results, what was printed."""
    out = tmp_path_factory.mktemp("demo")
    stdout, sys.stdout = sys.stdout, io.StringIO()
    try:
        results = demo(out, *QUICK[2:])
        return out, results, sys.stdout.getvalue()
    finally:
        sys.stdout = stdout


# --- data and choices -----------------------------------------------------------------------------


def pixels(data: tasks.Data, part: str, seed: int) -> np.ndarray:
    """The images of a part again, up to one offset per pixel and one factor for all."""
    return np.asarray(getattr(data, f"{part}_x")[seed])


def test_every_seed_draws_its_own_disjoint_parts():
    data = tasks.load_digits((0, 5), 0.0)
    assert data.train_x.shape == (2, 809, 64)
    assert data.val_x.shape == (2, 179, 64) and data.test_x.shape == (2, 809, 64)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    known = sorted(zip(images.sum(axis=1).tolist(), labels.tolist(), strict=True))
    for seed in range(2):
        x = np.concatenate([pixels(data, part, seed) for part in ("train", "val", "test")])
        y = np.concatenate([data.train_y[seed], data.val_y[seed], data.test_y[seed]])
        np.testing.assert_allclose(pixels(data, "train", seed).mean(axis=0), 0, atol=1e-5)
        # The sum of all pixels is known but for an offset and a factor.
        total = x.astype(np.float64).sum(axis=1)
        total = (total - total.min()) / (total.max() - total.min())
        low, high = known[0][0], known[-1][0]
        back = sorted(zip(np.round(low + total * (high - low)).tolist(), y.tolist(), strict=True))
        assert back == known
    assert not np.allclose(pixels(data, "train", 0), pixels(data, "train", 1))


def test_the_shift_is_a_shift():
    data = tasks.load_digits((0,), 0.0)
    test, moved = (np.asarray(x[0]).reshape(-1, 8, 8) for x in (data.test_x, data.shifted_x))
    # A pixel of the moved image is one of the image, but for what was subtracted at both places.
    difference = moved[:, 2:, 2:] - test[:, :-2, :-2]
    np.testing.assert_allclose(difference, difference[:1].repeat(len(test), axis=0), atol=1e-5)
    assert np.ptp(moved[:, :2], axis=0).max() == np.ptp(moved[:, :, :2], axis=0).max() == 0


def test_noisy_labels_are_in_all_parts_and_images_are_as_before():
    clean, noisy = (tasks.load_digits((0, 1, 2), share) for share in (0.0, tasks.NOISY))
    np.testing.assert_array_equal(clean.train_x, noisy.train_x)
    for name in ("train_y", "val_y", "test_y"):
        wrong = np.mean(np.asarray(getattr(clean, name)) != np.asarray(getattr(noisy, name)))
        assert abs(wrong - 0.9 * tasks.NOISY) < 0.03  # a tenth of the draws hit the label
    assert noisy.shifted_x is None


def test_diabetes_is_standardised_by_its_training_part():
    data = tasks.load_diabetes((0, 1), 0.0)
    assert [x.shape[1] for x in (data.train_y, data.val_y, data.test_y)] == [265, 44, 133]
    for x in (data.train_x, data.train_y):
        np.testing.assert_allclose(np.mean(x, axis=1), 0, atol=1e-5)
        np.testing.assert_allclose(np.std(x, axis=1), 1, atol=1e-5)
    from sklearn.datasets import load_diabetes

    y = [np.asarray(part[1]) for part in (data.train_y, data.val_y, data.test_y)]
    back = data.origin[1] + data.unit[1] * np.concatenate(y)
    np.testing.assert_allclose(np.sort(back), np.sort(load_diabetes().target), atol=1e-3)


def test_ivon_is_its_recipe_and_adamw_untuned():
    params = tasks.start_regression(experiment.stream(0, 0))
    made = experiment.recipe("regression", params, 265, 3000)
    named = blr.recipes.ivon(params, num_examples=265, num_steps=3000, task="regression")
    assert str(made) == str(named)
    assert (experiment.RATE, experiment.DECAYS[0]) == (1e-3, 1e-4)
    found = experiment.cases("adamw", (4, 7))
    assert found.decay.tolist() == pytest.approx([1e-4, 1e-4, 0.1, 0.1, 1.0, 1.0])
    assert found.seed.tolist() == [4, 7] * 3 and found.row.tolist() == [0, 1] * 3


# --- scores ---------------------------------------------------------------------------------------


def test_the_scores_of_a_known_classification():
    sure, unsure = jnp.log(jnp.array([[0.75, 0.25]] * 2)), jnp.log(jnp.full((2, 2), 0.5))
    scores = tasks.classification_scores(sure, jnp.array([0, 1]))
    expected = {"accuracy": 0.5, "nll": -np.log(0.75 * 0.25) / 2, "ece": 0.25}
    assert {name: float(x) for name, x in scores.items()} == pytest.approx(expected)
    assert float(tasks.auroc(sure, unsure)) == 1.0


def test_the_scores_of_a_known_regression():
    """Two networks of equal weight, against scipy's normals."""
    means, deviation, y = np.array([-0.5, 1.0]), 0.7, np.array([-2.0, -1.2, 0.3, 1.9, 2.4])
    q = blr.Ensemble(jnp.asarray(means, jnp.float32))
    found = blr.predict_distribution(
        0, q, lambda w, x: (w + 0 * x, deviation**2 + 0 * x), jnp.zeros(5), samples=2
    )
    scores = tasks.regression_scores(found, jnp.asarray(y, jnp.float32))
    density = np.mean([stats.norm.pdf(y, m, deviation) for m in means], axis=0)
    levels = np.mean([stats.norm.cdf(y, m, deviation) for m in means], axis=0)
    expected = {
        "nll": -np.mean(np.log(density)),
        "coverage": np.mean((levels >= 0.05) & (levels <= 0.95)),
        "rmse": np.sqrt(np.mean((y - means.mean()) ** 2)),
    }
    assert {name: float(x) for name, x in scores.items()} == pytest.approx(expected, rel=1e-5)


def test_the_regression_loss_is_the_likelihood_of_its_observation():
    params = tasks.start_regression(experiment.stream(3, 0))
    params["log_noise"] = jnp.asarray(-0.4)
    x, y = jnp.ones((4, 10)), jnp.arange(4.0)
    mean, variance = tasks.observation(params, x)
    assert float(variance) == pytest.approx(np.exp(-0.8))
    expected = -stats.norm.logpdf(np.arange(4.0), np.asarray(mean), np.exp(-0.4)).mean()
    found = float(tasks.regression_loss(params, x, y)) + 0.5 * np.log(2 * np.pi)
    assert found == pytest.approx(expected, rel=1e-5)


def test_wins_are_counted_seed_by_seed():
    def runs(row: str, pairs: list[tuple[float, float]]) -> list[dict]:
        keys = ("coverage", "nll")
        return [
            {"prediction": row, "seed": seed, **dict(zip(keys, pair, strict=True))}
            for seed, pair in enumerate(pairs)
        ]

    both = runs("AdamW", [(0.5, 1.0), (0.95, 2.0)]) + runs("x", [(0.7, 2.0), (0.84, 1.0)])
    adamw, other = outcome.summary(both)
    assert adamw["nll"] == {"mean": 1.5, "spread": pytest.approx(0.5**0.5), "wins": 0}
    # Coverage is the better the nearer to 90 %: 0.7 is nearer than 0.5, 0.84 not than 0.95.
    assert (other["coverage"]["wins"], other["nll"]["wins"]) == (1, 1)


def test_what_validation_chooses_is_what_it_scores_best():
    # One seed of two; for the three decays, NLL on validation at three times.
    found = np.array([[3, 1, 4], [2, 9, 2], [0.5, 5, 3.0]])
    both = jnp.asarray(np.repeat(found, 2, axis=0) + np.array([[0.0], [10.0]] * 3))
    params, best = jnp.arange(6.0), 10.0 + jnp.arange(6.0)
    runs = experiment.Run(params, None, best, both, None)
    settings = experiment.Settings(("b",), (0, 1), steps=5)
    rows = outcome._adamw("b", settings, runs, 1)
    assert {name: (float(x), chosen) for name, (x, chosen) in rows.items()} == {
        "AdamW": (1.0, {}),
        "AdamW, stopped early": (11.0, {"step": 4}),
        "AdamW, tuned": (3.0, {"weight_decay": 0.1}),
        "AdamW, tuned and stopped": (15.0, {"weight_decay": 1.0, "step": 2}),
    }


def test_the_best_parameters_are_those_of_the_lowest_validation_nll():
    settings = experiment.Settings(("b",), (0, 1), 4, 3)
    made, cases = report.program(settings, "b", "adamw"), experiment.cases("adamw", (0, 1))
    data = tasks.load_digits((0, 1), tasks.NOISY)
    runs = experiment.start(made, data.train_x.shape[1], cases)
    # As if the first time had been the best for the first run.
    runs = experiment.advance(made, runs, cases, 0, data)
    first = jax.device_get(runs.params)
    runs = runs._replace(validation=runs.validation.at[0, 0].set(0.0))
    runs = experiment.advance(made, runs, cases, 1, data)
    assert np.all(runs.validation[1:, 1] < runs.validation[1:, 0])  # they still learn
    for best, then, last in zip(
        *(jax.tree.leaves(tree) for tree in (runs.best, first, runs.params)), strict=True
    ):
        np.testing.assert_array_equal(best[0], then[0])
        np.testing.assert_array_equal(best[1:], last[1:])
    logits = np.asarray(tasks.logits(jax.tree.map(lambda x: x[1], runs.params), data.val_x[1]))
    nll = -logits + np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = np.mean(nll[np.arange(len(nll)), data.val_y[1]])
    assert float(runs.validation[1, 1]) == pytest.approx(expected, rel=1e-4)


def test_a_posterior_that_is_not_learnt_and_steps_that_grow_are_warned_of():
    assert experiment.warnings_of(0.06, 9.0) == []
    (said,) = experiment.warnings_of(0.001, 3.0)
    assert "0.1 % of IVON's deviations, less than 5 %" in said and "temperature" in said
    (said,) = experiment.warnings_of(0.5, 40.0)
    assert "40 times as long" in said and "learning rate" in said


# --- tables and files -----------------------------------------------------------------------------


def test_the_results_hold_every_number(small):
    _, results, _ = small
    assert set(results["versions"]) == {"jax", "optax", "flax", "sklearn", "blr_optax"}
    assert results["settings"]["seeds"] == [0, 1]
    assert results["settings"]["steps"] == {"a": 4, "b": 4, "c": 4}
    for part, scores in SCORES.items():
        found = results["parts"][part]
        assert [entry["prediction"] for entry in found["table"]] == ROWS
        assert found["curves"]["steps"] == [2, 4]
        for entry in found["table"]:
            runs = [run for run in found["runs"] if run["prediction"] == entry["prediction"]]
            assert [run["seed"] for run in runs] == [0, 1]
            assert set(scores) == set(entry) - {"prediction"}
            for name in scores:
                values = [run[name] for run in runs]
                assert entry[name]["mean"] == pytest.approx(np.mean(values))
                spread = pytest.approx(abs(values[0] - values[1]) / 2**0.5)
                assert entry[name]["spread"] == spread


def test_the_last_of_a_curve_is_the_table(small):
    """Scores during training and those of the finished runs are of the same predictions."""
    for part in small[1]["parts"].values():
        for entry in part["table"][:3]:
            curve = part["curves"][entry["prediction"]]
            for name, values in curve.items():
                assert values[-1] == pytest.approx(entry[name]["mean"], rel=1e-4), name


def test_the_width_that_is_fitted_is_one_of_those_tried(small):
    for part in small[1]["parts"].values():
        runs = {(run["prediction"], run["seed"]): run for run in part["runs"]}
        for seed in (0, 1):
            fitted = runs[ROWS[-1], seed]
            assert fitted["scale"] in blr.recipes._temper.SCALES
            if fitted["scale"] in (0.0, 1.0):
                same = runs[ROWS[2] if fitted["scale"] else ROWS[1], seed]
                assert fitted["nll"] == pytest.approx(same["nll"], rel=1e-5)


def test_the_results_name_no_place(small):
    out, _, _ = small
    text = (out / "results.json").read_text()
    assert str(out) not in text and not re.search(r'"/', text)


def test_one_line_per_method_and_the_tables_are_printed(small):
    _, results, text = small
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert [line.split(":")[0] for line in lines[:6]] == [
        f"part {part}, {label}" for part in "abc" for label in ("AdamW", "IVON")
    ]
    for name, part in results["parts"].items():
        assert f"{name}: {part['title']}" in text
        for entry in part["table"]:
            nll = entry["nll"]
            cell = f"{nll['mean']:.3f} ± {nll['spread']:.3f}"
            assert any(line.startswith(entry["prediction"]) and cell in line for line in lines)
        for said in part["closing"]:
            assert said in lines
        for said in part["warnings"]:
            assert f"warning: {said}" in lines
    assert "…" not in text  # no column is cut off


def test_the_closing_lines_say_what_the_table_says(small):
    for part in small[1]["parts"].values():
        table = {entry["prediction"]: entry for entry in part["table"]}
        untuned, validated, fitted = part["closing"]
        assert f"NLL {table[ROWS[2]]['nll']['mean']:.3f}" in untuned
        for row in ROWS[3:6]:
            assert f"NLL {table[row]['nll']['mean']:.3f}" in validated
        assert f"NLL {table[ROWS[6]]['nll']['mean']:.3f}" in fitted
        worse = untuned.partition("Not better: ")[2]
        better = table[ROWS[2]]["nll"]["mean"] < table[ROWS[0]]["nll"]["mean"]
        assert ("NLL" in worse) != better


def test_a_part_that_taught_nothing_says_so(small):
    parts = small[1]["parts"].values()
    said = ["the data have moved" in " ".join(part["warnings"]) for part in parts]
    assert said == [min(part["learnt"]) < experiment.LEAST_LEARNT for part in parts]


def test_the_figures_are_images(small):
    out, _, _ = small
    assert {path.name for path in out.glob("*.png")} == {p.figure for p in tasks.PARTS.values()}
    for part in tasks.PARTS.values():
        assert (out / part.figure).read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.partial"))


def test_the_committed_results_are_of_the_defaults():
    """And of what the demo says now: what is in the documentation is made from them."""
    found = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "EVERY", found["settings"]["every"])
        assert found["settings"] == experiment.Settings().record()["settings"]
    for part, result in found["parts"].items():
        assert outcome.summary(result["runs"]) == result["table"]
        samples = found["settings"]["samples"]
        assert outcome.closing(part, result, samples) == result["closing"]


def test_the_documentation_has_the_committed_numbers():
    found = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["parts"]
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    columns: dict[tuple[str, str], list[str]] = {}
    for part, result in found.items():
        for entry in result["table"]:
            names = [name for name in outcome.HEADINGS if name in entry]
            row = " | ".join([entry["prediction"], *(report._cell(n, entry[n]) for n in names)])
            assert f"| {row} |" in page
            if entry["prediction"] in ("AdamW", "IVON, 64 samples", "AdamW, tuned and stopped"):
                for name in names:
                    cell = outcome.format_number(name, entry[name]["mean"])
                    columns.setdefault((part, name), []).append(cell)
    readme = (ROOT / "README.md").read_text()
    for line in (("a", "coverage"), ("a", "nll"), ("b", "nll"), ("c", "nll"), ("c", "auroc")):
        assert f" | {' | '.join(columns[line])} |" in readme, line
    ten = json.loads((ROOT / "benchmarks" / "results" / "demo_ten_seeds.json").read_text())
    rows = {entry["prediction"]: entry["auroc"] for entry in ten["parts"]["c"]["table"]}
    for row, texts in (("AdamW", (page, readme)), ("IVON, 64 samples", (page, readme))):
        assert all(report._cell("auroc", rows[row]) in text for text in texts)
    assert report._cell("auroc", rows["AdamW, tuned and stopped"]) in page
    assert rows["IVON, 64 samples"]["wins"] == 8


def test_a_terminal_gets_a_bar_instead_of_lines(capsys):
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    with report.progress(screen, 4) as (advance, finished):
        advance("part a, IVON", 3)
        finished("a line")
    assert "part a, IVON" in screen.file.getvalue() and "75%" in screen.file.getvalue()
    assert capsys.readouterr().out == ""


# --- flags ----------------------------------------------------------------------------------------


def test_the_help_names_the_parts_and_their_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "b is digits with 15 % random labels" in said and "3000 in a, 2000 in b" in said


@pytest.mark.parametrize(
    "arguments", [["--part", "c,a"], ["--part", "c", "--part", "a"], ["--part", "c", "a", "c"]]
)
def test_a_list_can_be_written_in_three_ways(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "demo", lambda settings, *_: seen.append(settings))
    assert cli.main(["demo", *arguments, "--seed", "3,1", "--steps", "9"]) == 0
    assert (seen[0].parts, seen[0].seeds, seen[0].steps) == (("c", "a"), (3, 1), 9)


@pytest.mark.usefixtures("no_figures")
def test_starting_afresh_says_so_and_spares_foreign_files(small, tmp_path, capsys):
    first = demo(tmp_path, *QUICK)
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / tasks.PARTS["a"].figure).write_text("of an earlier demo of other parts")
    assert "starting afresh" not in capsys.readouterr().out
    assert demo(tmp_path, *QUICK) == first
    assert first["parts"] == {"b": small[1]["parts"]["b"]}
    assert "starting afresh" in capsys.readouterr().out
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert [path.name for path in tmp_path.glob("*.png")] == [tasks.PARTS["b"].figure]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "a,d"], "'d' is unknown; known: a, b, c"),
        (["--part", ","], "argument --part: names nothing"),
        (["--seed", "-1"], "--seed: '-1' is not a whole number from 0"),
        (["--seed", "one"], "'one' is not a whole number"),
        (["--steps", "1"], "--steps: '1' is not a whole number from 2"),
        (["--samples", "2.5"], "'2.5' is not a whole number"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.count("\n") == 1 and error.startswith("blr-optax")


def test_an_output_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *QUICK, "--out", str(tmp_path / "file")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["flax", "matplotlib", "orbax.checkpoint", "rich", "sklearn"])
def test_a_missing_extra_is_named(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, name, None)  # what makes an import fail
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *QUICK, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"needs {name.partition('.')[0]}: pip install 'blr_optax[demo]'" in error
    assert not (tmp_path / "out").exists()


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_resume_trains_no_finished_run_again(tmp_path, monkeypatch):
    first = demo(tmp_path, *QUICK)
    monkeypatch.setattr(experiment, "advance", None)
    assert demo(tmp_path, *QUICK, "--resume") == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "steps = {'b': 4}, this is steps = {'b': 3}"),
        (["--seed", "2"], "seeds = [0, 1], this is seeds = [0, 1, 2]"),
        (["--samples", "5"], "samples = 3, this is samples = 5"),
        (["--part", "a"], "parts = ['b'], this is parts = ['b', 'a']"),
    ],
)
def test_resume_with_other_settings_is_an_error(arguments, message, tmp_path, capsys):
    record = experiment.Settings(("b",), (0, 1), 4, 3).record()
    (tmp_path / folder.STATE).mkdir()
    folder.write_json(tmp_path / folder.STATE / "settings.json", record)
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *QUICK, *arguments, "--resume", "--out", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.usefixtures("no_figures")
def test_steps_that_were_interrupted_are_made_again(tmp_path, monkeypatch, small):
    advance, calls = experiment.advance, []

    def stops(program, *arguments):
        calls.append((program.method, arguments[2]))
        if calls[-1] == ("ivon", 1) and len(calls) == 4:
            raise KeyboardInterrupt
        return advance(program, *arguments)

    monkeypatch.setattr(experiment, "advance", stops)
    with pytest.raises(SystemExit) as stop:
        demo(tmp_path, *QUICK)
    assert stop.value.code == 130
    results = demo(tmp_path, *QUICK, "--resume")
    assert calls[3:] == [("ivon", 1), ("ivon", 1)]  # nothing but what was not finished
    assert results["parts"]["b"] == small[1]["parts"]["b"]
