"""The benchmark of what a posterior pays: padding, masked scores, and resuming."""

import dataclasses

import jax
import numpy as np
import pytest
from tools import close

from benchmarks.payoff import scores, tasks, training
from benchmarks.payoff.methods import METHODS, untuned

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
        train = jax.jit(training.trainer(METHODS["adamw"], kind, samples=2))
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
