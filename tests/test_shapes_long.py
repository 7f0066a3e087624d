"""Signatures tell the truth about shapes: beartype checks jaxtyping's at every call of other tests.

About a minute: the fast tests of these files once more, in a process that imports the package with
the checks (tests/shapes.py).
"""

import os
import subprocess
import sys

from tools import ROOT

FILES = ["test_metrics.py", "test_predict.py", "families/test_families.py"]
LEFT_OUT = "not bad_input"  # wrong calls on purpose
PROBES = """
import jax.numpy as jnp, jaxtyping, shapes, blr_optax as blr
from blr_optax.families._continuous.gaussian import solve
p = jnp.full((3, 2), 0.5)
calls = {
    "metrics": lambda: blr.metrics.nll(p, jnp.zeros(3)),
    "predict": lambda: blr.binary_link("a"),
    "families": lambda: solve(jnp.eye(2), "a"),
}
for name, call in calls.items():
    try:
        call()
    except jaxtyping.TypeCheckError:
        print(name)
"""


def checked(*arguments):
    """What a process with the checks prints."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "BLR_SHAPES": "1", "PYTHONPATH": path}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_wrong_types_are_caught_at_the_call():
    code, printed = checked("-c", PROBES)
    assert code == 0 and printed.split() == ["metrics", "predict", "families"], printed


def test_every_shape_of_metrics_predictions_and_families_is_as_it_says():
    files = [f"tests/{name}" for name in FILES]
    options = ["-q", "-n", "0", "-m", "not slow", "-k", LEFT_OUT]
    code, printed = checked("-m", "pytest", *options, *files)
    assert code == 0 and " passed" in printed, printed[-4000:]
