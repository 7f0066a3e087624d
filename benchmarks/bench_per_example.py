"""Statistics of per-example gradients: `per_example` against one plain gradient, in one process.

Medians of interleaved runs as ratios to `value_and_grad` of the same mean loss (to `vmap(grad)` for
tied and looped parameters), compile time, and temporary memory. Results go to
benchmarks/results/ as JSON with a stamp of the environment, and the ratios to
benchmarks/history.jsonl; rows that became slower since the last run there are printed.

    python -m benchmarks.bench_per_example --rounds 20 --models mlp_64 conv_8
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import blr_optax as blr
from benchmarks import history
from benchmarks.layers import PROBLEMS, TIED, transformer
from benchmarks.measure import environment

RESULTS = Path(__file__).parent / "results"


def compiled(f, *args):
    """The compiled function, its seconds to compile and peak bytes."""
    start = time.perf_counter()
    run = jax.jit(f).lower(*args).compile()
    seconds, memory = time.perf_counter() - start, run.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return run, seconds, peak


def contestants(problem):
    """Name -> function of (params, *batch)."""
    loss = problem.loss

    def statistic(*names):
        return lambda params, *batch: blr.per_example(loss, params, *batch, statistics=names)

    def singles(params, *batch):
        examples = jax.tree.map(lambda x: x[:, None], batch)
        return jax.vmap(jax.grad(loss), (None, *(0 for _ in batch)))(params, *examples)

    def squares(params, *batch):
        return jax.tree.map(lambda g: jnp.sum(g * g, 0), singles(params, *batch))

    return {
        "gradient": jax.value_and_grad(loss),
        "squares": statistic("sum_squares"),
        "squares, norms": statistic("sum_squares", "norms"),
        "vmap(grad)": squares,
    }


def bench(problem, rounds: int) -> dict:
    """All contestants on one model: seconds as ratios, compile time and memory."""
    args = (problem.params, *problem.batch)
    weights = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    table, runs = {}, {}
    for name, f in contestants(problem).items():
        runs[name], seconds, memory = compiled(f, *args)
        table[name] = {"compile_s": seconds, "peak_bytes": memory}
    times = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            if index >= 2:
                times[name].append(time.perf_counter() - start)
    base = statistics.median(times["gradient"])
    for name, row in table.items():
        row["ratio"] = statistics.median(times[name]) / base
        row["compile_ratio"] = row["compile_s"] / table["gradient"]["compile_s"]
        statistic = 0 if name == "gradient" else 4 * weights  # not counted
        row["memory_ratio"] = (row["peak_bytes"] - statistic) / table["gradient"]["peak_bytes"]
    return {"parameters": weights, "gradient_s": base, "statistics": table}


def tracing(rounds: int = 5) -> dict:
    """A transformer of 12 layers: seconds of `explain`, of tracing, and compile ratios."""
    problem = transformer(layers=12)
    args = (problem.params, *problem.batch)
    explain, trace = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            blr.explain(problem.loss, *args)
        explain.append(time.perf_counter() - start)
        start = time.perf_counter()
        jax.jit(lambda *a: jax.value_and_grad(problem.loss)(*a)).trace(*args)
        trace.append(time.perf_counter() - start)
    plain = compiled(jax.value_and_grad(problem.loss), *args)[1]
    taps = compiled(contestants(problem)["squares"], *args)[1]
    return {
        "explain_over_tracing_the_gradient": statistics.median(explain) / statistics.median(trace),
        "compile_ratio": taps / plain,
    }


def rows(models: dict[str, dict]) -> dict[str, float]:
    """Model and statistic -> ratio to the gradient."""
    return {
        f"{model}: {name}": row["ratio"]
        for model, found in models.items()
        for name, row in found["statistics"].items()
        if name != "gradient"
    }


def main(argv: list[str] | None = None) -> None:
    """Runs, prints one line per model and writes the JSON."""
    every = sorted(PROBLEMS)
    parser = argparse.ArgumentParser(description="Cost of per-example statistics.")
    parser.add_argument("--models", nargs="+", choices=every, default=every)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    args = parser.parse_args(argv)
    result = {"environment": environment(), "rounds": args.rounds, "models": {}}
    names = ("squares", "squares, norms", "vmap(grad)")
    print(
        f"{'x gradient':16}" + "".join(f"{n:>16}" for n in names) + f"{'compile':>9}{'memory':>8}"
    )
    for model in args.models:
        result["models"][model] = found = bench(PROBLEMS[model](), args.rounds)
        table = found["statistics"]
        line = "".join(f"{table[n]['ratio']:16.2f}" for n in names)
        extra = table["squares"]["compile_ratio"], table["squares"]["memory_ratio"]
        note = " (tied or looped)" if model in TIED else ""
        print(f"{model:16}{line}{extra[0]:9.2f}{extra[1]:8.2f}{note}", flush=True)
    result["tracing"] = tracing()
    print(result["tracing"])
    default = RESULTS / f"bench_per_example_{jax.default_backend()}.json"
    out = default if args.out is None else args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    history.record("per_example", result["environment"], rows(result["models"]))


if __name__ == "__main__":
    main()
