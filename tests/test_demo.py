"""The demo: its table and files, its flags, and going on; `test_demo_long.py` kills it."""

import io
import json
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tools import ROOT

from blr_optax._demo import cli, folder, report
from blr_optax._demo import run as experiment

SEARCH = json.loads((ROOT / "benchmarks" / "results" / "search_demo.json").read_text())
ROWS = ["SGD", "AdamW", "IVON at its mean", "IVON, 3 samples"]
METRICS = ("accuracy", "nll", "ece", "brier", "auroc")
QUICK = ["--optimizer", "sgd", "--seed", "0", "--epochs", "2"]


def demo(out: Path, *arguments: str) -> dict:
    assert cli.main(["demo", "--out", str(out), *arguments]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def no_figures(monkeypatch):
    """For tests of flags and of going on: the figures of `small` are enough."""
    monkeypatch.setattr(report, "draw", lambda *_: {})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A demo of all optimizers: output folder, results, what was printed."""
    out = tmp_path_factory.mktemp("demo")
    stdout, sys.stdout = sys.stdout, io.StringIO()
    try:
        results = demo(out, "--seed", "0,1", "--epochs", "2", "--samples", "3")
        return out, results, sys.stdout.getvalue()
    finally:
        sys.stdout = stdout


# --- data and choices -----------------------------------------------------------------------------


def test_the_halves_are_disjoint_and_the_shift_is_a_shift():
    data = experiment.load_data()
    assert (len(data.train_x), len(data.test_x)) == (898, 899)
    from sklearn.datasets import load_digits

    np.testing.assert_allclose(data.train_x.mean(axis=0), 0, atol=1e-6)
    parts = (data.train_x, data.test_x, data.shifted_x)
    train, test, moved = (np.round((part + data.mean) * 16).reshape(-1, 8, 8) for part in parts)
    both = {image.tobytes() for image in np.concatenate([train, test])}
    assert both == {image.tobytes() for image in load_digits().images.astype(np.float32)}
    np.testing.assert_array_equal(moved[:, 2:, 2:], test[:, :-2, :-2])
    assert not moved[:, :2].any() and not moved[:, :, :2].any()


def test_the_defaults_are_the_choices_of_the_search():
    assert SEARCH["choices"] == experiment.DEFAULTS
    assert (SEARCH["epochs"], SEARCH["batch"]) == (experiment.EPOCHS, experiment.BATCH)
    assert SEARCH["fixed"] == {
        "momentum": experiment.MOMENTUM,
        "ivon_b2": experiment.IVON_B2,
        "samples": experiment.SAMPLES,
    }


def test_the_search_was_fair():
    assert len({len(trials) for trials in SEARCH["trials"].values()}) == 1
    for name, trials in SEARCH["trials"].items():
        best = min((t for t in trials if t["mean_nll"] is not None), key=lambda t: t["mean_nll"])
        assert {key: best[key] for key in SEARCH["choices"][name]} == SEARCH["choices"][name]


def test_the_search_sees_the_training_half_only(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import search_demo

    data = experiment.load_data()
    for name, trials in SEARCH["trials"].items():
        points = [{key: t[key] for key in search_demo.GRIDS[name]} for t in trials]
        assert points == search_demo.configurations(name)
    held = []
    for x, y, val_x, val_y in search_demo.folds():
        assert len(x) + len(val_x) == len(y) + len(val_y) == len(data.train_x)
        # Up to what each fold subtracts, the rows are those of the training half, each one once.
        rows = np.concatenate([x, val_x])
        rows, known = (
            np.sort((part - part.mean(axis=0)) @ np.arange(64.0)) for part in (rows, data.train_x)
        )
        np.testing.assert_allclose(rows, known, atol=1e-3)
        held.append(len(val_x))
    assert sum(held) >= len(data.train_x) - len(held)


# --- table and files ------------------------------------------------------------------------------


def test_the_results_hold_every_number(small):
    _, results, _ = small
    assert [entry["prediction"] for entry in results["table"]] == ROWS
    assert set(results["versions"]) == {"jax", "optax", "flax", "blr_optax"}
    assert results["settings"]["seeds"] == [0, 1]
    assert results["settings"]["hyperparameters"] == experiment.DEFAULTS
    for entry in results["table"]:
        runs = [run for run in results["runs"] if run["prediction"] == entry["prediction"]]
        assert [run["seed"] for run in runs] == [0, 1]
        for name in METRICS:
            values = [run[name] for run in runs]
            assert entry[name]["mean"] == pytest.approx(np.mean(values))
            assert entry[name]["spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_the_results_name_no_place(small):
    out, _, _ = small
    text = (out / "results.json").read_text()
    assert str(out) not in text and not re.search(r'"/', text)


def test_one_line_per_run_and_the_table_are_printed(small):
    _, results, text = small
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert [line.split(":")[0] for line in lines[:6]] == [
        f"{label} seed {seed}" for label in ("SGD", "AdamW", "IVON") for seed in (0, 1)
    ]
    cells = {line[: len(row)]: line for row in ROWS for line in lines if line.startswith(row)}
    for entry in results["table"]:
        nll = entry["nll"]
        assert f"{nll['mean']:.4f} ± {nll['spread']:.4f}" in cells[entry["prediction"]]


def test_the_figures_are_images(small):
    out, _, _ = small
    assert {path.name for path in out.glob("*.png")} == set(report.FIGURES)
    for name in report.FIGURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.partial"))


def test_the_scores_of_a_known_prediction():
    data = experiment.Data(*[None] * 3, jnp.array([0, 1]), None, None)
    sure, unsure = jnp.log(jnp.array([[0.75, 0.25]] * 2)), jnp.log(jnp.full((2, 2), 0.5))
    scores = report.scores(report.Prediction("row", "sgd", 0, sure, unsure), data)
    expected = {
        "accuracy": 0.5,
        "nll": -np.log(0.75 * 0.25) / 2,
        "ece": 0.25,
        "brier": (2 * 0.25**2 + 2 * 0.75**2) / 2,
        "auroc": 1.0,
    }
    assert scores == pytest.approx(expected)


def test_the_comparison_says_what_the_table_says():
    def entry(optimizer, accuracy, nll, ece):
        row = {"accuracy": accuracy, "nll": nll, "ece": ece}
        return {"optimizer": optimizer, **{key: {"mean": value} for key, value in row.items()}}

    table = [entry("adamw", 0.97, 0.1, 0.02), entry("ivon", 0.9, 9, 9), entry("ivon", 0.96, 0.2, 0)]
    said = report.comparison(table)
    assert said.pop("accuracy_points_behind_best") == pytest.approx(1.0)
    assert said == {
        "lower_nll_than_adamw": False,
        "lower_ece_than_adamw": True,
        "accuracy_within_half_a_point": False,
    }
    assert report.comparison(table[1:]) is None


def test_a_terminal_gets_a_bar_instead_of_lines(capsys):
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    with report.progress(screen, 4) as (advance, finished):
        advance("SGD seed 0", 3)
        finished("a line")
    assert "SGD seed 0" in screen.file.getvalue() and "75%" in screen.file.getvalue()
    assert capsys.readouterr().out == ""


# --- flags ----------------------------------------------------------------------------------------


def test_optimizers_seeds_and_epochs_are_chosen(tmp_path):
    results = demo(tmp_path, "--optimizer", "adamw,sgd", "--seed", "4", "--epochs", "1")
    assert [(run["optimizer"], run["seed"]) for run in results["runs"]] == [
        ("adamw", 4),
        ("sgd", 4),
    ]
    assert [len(run["training_loss"]) for run in results["runs"]] == [1, 1]
    assert results["table"][0]["nll"]["spread"] is None
    assert results["comparison"] is None


@pytest.mark.parametrize(
    "arguments", [["--optimizer", "sgd,ivon"], ["--optimizer", "sgd", "--optimizer", "ivon"],
                  ["--optimizer", "sgd", "ivon", "sgd"]]
)  # fmt: skip
def test_a_list_can_be_written_in_three_ways(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "demo", lambda settings, *_: seen.append(settings))
    assert cli.main(["demo", *arguments, "--seed", "3,1"]) == 0
    assert (seen[0].optimizers, seen[0].seeds) == (("sgd", "ivon"), (3, 1))


@pytest.mark.usefixtures("no_figures")
def test_samples_matter_to_the_averaged_prediction_only(small, tmp_path):
    _, results, _ = small
    other = demo(tmp_path, "--optimizer", "ivon", "--seed", "0", "--epochs", "2", "--samples", "2")
    mean, averaged = [
        run for run in results["runs"] if (run["optimizer"], run["seed"]) == ("ivon", 0)
    ]
    assert other["runs"][0] == mean
    assert other["runs"][1]["prediction"] == "IVON, 2 samples"
    assert other["runs"][1]["nll"] != averaged["nll"]


@pytest.mark.usefixtures("no_figures")
def test_starting_afresh_says_so_and_spares_foreign_files(tmp_path, capsys):
    first = demo(tmp_path, *QUICK)
    (tmp_path / "mine.txt").write_text("keep")
    assert "starting afresh" not in capsys.readouterr().out
    assert demo(tmp_path, *QUICK) == first
    assert "starting afresh" in capsys.readouterr().out
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "sgd,lion"], "'lion' is unknown; known: sgd, adamw, ivon"),
        (["--optimizer", ","], "argument --optimizer: names nothing"),
        (["--seed", "-1"], "--seed: '-1' is not a whole number from 0"),
        (["--seed", "one"], "'one' is not a whole number"),
        (["--epochs", "0"], "--epochs: '0' is not a whole number from 1"),
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
    monkeypatch.setattr(experiment, "_train_epoch", None)
    assert demo(tmp_path, *QUICK, "--resume") == first


def test_resume_without_anything_to_go_on_from_starts(tmp_path, small):
    results = demo(tmp_path / "new", *QUICK, "--resume")
    assert results["runs"][0] == small[1]["runs"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "3"], "epochs = 2, this is epochs = 3"),
        (["--seed", "1"], "seeds = [0], this is seeds = [1]"),
        (["--samples", "5"], "samples = 64, this is samples = 5"),
        (["--optimizer", "adamw"], "optimizers = ['sgd'], this is optimizers = ['sgd', 'adamw']"),
    ],
)
def test_resume_with_other_settings_is_an_error(arguments, message, tmp_path, capsys):
    record = experiment.Settings(("sgd",), (0,), 2).record()
    (tmp_path / folder.STATE).mkdir()
    folder.write_json(tmp_path / folder.STATE / "settings.json", record)
    quick = QUICK if arguments[0] != "--seed" else QUICK[:2] + QUICK[4:]
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *quick, *arguments, "--resume", "--out", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.usefixtures("no_figures")
def test_an_interrupted_epoch_is_made_again(tmp_path, monkeypatch, small):
    monkeypatch.setattr(experiment, "CHECKPOINT_EVERY", 1)
    train_epoch, calls = experiment._train_epoch, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    monkeypatch.setattr(experiment, "_train_epoch", stops)
    ivon = ["--optimizer", "ivon", "--seed", "1", "--epochs", "2", "--samples", "3"]
    with pytest.raises(SystemExit) as stop:
        demo(tmp_path, *ivon)
    assert stop.value.code == 130
    results = demo(tmp_path, *ivon, "--resume")
    assert len(calls) == 3  # epochs 0, 1 (interrupted) and 1 again
    mine = [run for run in small[1]["runs"] if (run["optimizer"], run["seed"]) == ("ivon", 1)]
    assert results["runs"] == mine


def test_a_posterior_that_is_not_learnt_is_warned_of():
    from blr_optax._demo.run import warn_of_scores

    warn_of_scores(np.array([4.0, 5.0]))
    with pytest.warns(UserWarning, match=r"score 0\.4.*blr\.make_step"):
        warn_of_scores(np.array([1.5, -0.9]))
