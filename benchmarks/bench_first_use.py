"""What the first use costs: importing, the first optimizer, and compiling, beside optax's.

    python -m benchmarks.bench_first_use

Processor seconds, which a busy machine changes little. Imports are measured in fresh interpreters,
the parts of the library against those of optax; compiling on a tree of 40 leaves without jax's
cache. Results go to benchmarks/results/bench_first_use_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import blr_optax as blr
from benchmarks.measure import environment

RESULTS = Path(__file__).parent / "results"
LEAVES = 40

IMPORTS = {
    "import optax, optax.adamw(...).init": "import optax; optax.adamw(1e-3).init(weights)",
    "import blr_optax": "import blr_optax",
    "import blr_optax, ivon(...).init": (
        "import blr_optax; blr_optax.ivon(1e-3, ess=100.0).init(weights)"
    ),
}
FRESH = """
import time, jax, jax.numpy as jnp, optax
weights = {{"w": jax.random.normal(jax.random.key(0), (3, 2)), "b": jnp.zeros(2)}}
start = time.process_time()
{code}
print(time.process_time() - start)
"""


def fresh(code: str, rounds: int) -> float:
    """Median processor seconds of code in interpreters that have jax, optax and first weights.

    One run before them writes the bytecode, which an installed package brings along.
    """
    command = [sys.executable, "-c", FRESH.format(code=code)]
    with tempfile.TemporaryDirectory() as bytecode:
        variables = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
        runs = [
            subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
            for _ in range(1 + rounds)
        ]
    return statistics.median(float(run.stdout) for run in runs[1:])


def programs() -> dict[str, tuple]:
    """Name -> (function, arguments): what a user's first calls compile."""
    weights = {
        f"layer{i}": {"kernel": jnp.ones((32, 32 + i)), "bias": jnp.ones(32 + i)}
        for i in range(LEAVES // 2)
    }
    adamw, ivon = optax.adamw(1e-3), blr.ivon(1e-3, ess=100.0)
    state, key = ivon.init(weights), jax.random.key(0)
    q = blr.posterior(state, weights)

    def noise(key, weights):
        return jax.tree.map(lambda x: jax.random.normal(key, x.shape), weights)

    def with_statistic(g, s, p):
        return ivon.update(g, s, p, statistic=g)

    return {
        "optax.adamw update": (adamw.update, (weights, adamw.init(weights), weights)),
        "ivon update": (ivon.update, (weights, state, weights)),
        "ivon update, statistic given": (with_statistic, (weights, state, weights)),
        "blr.sample": (blr.sample, (state, weights)),
        "jax.random.normal for each leaf": (noise, (key, weights)),
        "q.sample(key)": (lambda q, key: q.sample(key), (q, key)),
        "q.sample(key, (64,))": (lambda q, key: q.sample(key, (64,)), (q, key)),
    }


def compiled(function, arguments) -> float:
    """Processor seconds to trace and compile."""
    start = time.process_time()
    jax.jit(lambda *a: function(*a)).lower(*arguments).compile()
    return time.process_time() - start


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    imports = {name: fresh(code, rounds) for name, code in IMPORTS.items()}
    jax.config.update("jax_enable_compilation_cache", False)
    rows = programs()
    seconds = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            seconds[name].append(compiled(*row))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians["optax.adamw update"]
    result = {
        "environment": environment(),
        "import_s": imports,
        "compile_s": medians,
        "compile_ratio": {name: value / base for name, value in medians.items()},
    }
    for name, value in imports.items():
        print(f"{name:36s} {value:6.2f} s")
    for name, value in medians.items():
        print(f"{name:36s} {value:6.2f} s  {value / base:5.2f} x adamw's update")
    path = RESULTS / f"bench_first_use_{jax.default_backend()}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
