"""One training step: IVON against optax's AdamW and SGD, in one process.

Step time (medians of interleaved runs, as ratios to `optax.adamw`), compile time and memory, on an
MLP of 2.2 M weights, a small convnet, and a transformer of GPT-2's shape (accelerators only).
Results go to benchmarks/results/ as JSON with a stamp of the environment, and the ratios to
benchmarks/history.jsonl; rows that became slower since the last run there are printed.

    python -m benchmarks --rounds 40 --models mlp convnet
    python -m benchmarks --rounds 12 --models mlp_4096 --steps "evon sample, refresh 10"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import blr_optax as blr
from benchmarks import history
from benchmarks.measure import compile_step, environment, interleave, ratios
from benchmarks.models import PROBLEMS

RESULTS = Path(__file__).parent / "results"


def plain(tx, problem):
    """The loop that everybody has."""

    def step(params, state, *batch):
        value, grads = jax.value_and_grad(problem.loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return tx, step


def sampled(tx, problem):
    """The same loop with one line changed: gradients at a sample."""

    def step(params, state, *batch):
        weights = blr.sample(state, params)
        value, grads = jax.value_and_grad(problem.loss)(weights, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return tx, step


def estimated(tx, problem, samples):
    """Gradient and curvature over samples by `estimate`."""

    def step(params, state, *batch):
        est = blr.estimate(problem.loss, state, params, *batch, samples=samples)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        return optax.apply_updates(params, updates), state, est.value

    return tx, step


def contestants(problem):
    """Name -> (transformation, step)."""

    def ivon(**more):
        return blr.ivon(1e-3, ess=problem.examples, hess_init=0.1, **more)

    return {
        "optax.adamw": plain(optax.adamw(1e-3), problem),
        "optax.sgd": plain(optax.sgd(1e-2, momentum=0.9), problem),
        "ivon sample": sampled(ivon(), problem),
        "ivon estimate 1": estimated(ivon(), problem, 1),
        "ivon estimate 2": estimated(ivon(), problem, 2),
        "vadam sample": sampled(blr.vadam(1e-3, ess=problem.examples), problem),
        "bsam estimate 1": estimated(blr.bsam(1e-3, ess=problem.examples), problem, 1),
        "bayesbinn sample": sampled(blr.bayesbinn(1e-3, ess=problem.examples), problem),
        "evon sample, refresh 10": sampled(blr.evon(1e-3, ess=problem.examples), problem),
        "vogn estimate 1": estimated(blr.vogn(1e-3, ess=problem.examples), problem, 1),
        "ivon sample jax": sampled(ivon(generator="jax"), problem),
    }


def bench(name: str, rounds: int, only: list[str] | None = None) -> dict:
    """All contestants, or AdamW and some, on one model."""
    problem = PROBLEMS[name]()
    steps, carries, table = {}, {}, {}
    for label, (tx, step) in contestants(problem).items():
        if only and label not in (*only, "optax.adamw"):
            continue
        carry = (jax.tree.map(jnp.copy, problem.params), tx.init(problem.params))
        steps[label], table[label] = compile_step(step, *carry, *problem.batch)
        carries[label] = carry
    times = ratios(interleave(steps, carries, problem.batch, rounds), "optax.adamw")
    weights = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    base = table["optax.adamw"]
    for label, row in table.items():
        row.update(times[label])
        row["compile_ratio"] = row["compile_s"] / base["compile_s"]
        extra = row["peak_bytes"] - base["peak_bytes"]
        row["peak_over_adamw_in_parameters"] = extra / (4 * weights)
    return {"parameters": weights, "rounds": rounds, "steps": table}


def rows(models: dict[str, dict]) -> dict[str, float]:
    """Model and step -> ratio to AdamW."""
    return {
        f"{model}: {label}": row["ratio"]
        for model, found in models.items()
        for label, row in found["steps"].items()
        if label != "optax.adamw"
    }


def main(argv: list[str] | None = None) -> None:
    """Runs, prints one table per model and writes the JSON; keeps models of this environment."""
    parser = argparse.ArgumentParser(description="Step time of IVON against AdamW and SGD.")
    usual = ["convnet", "mlp", "transformer"]
    parser.add_argument("--models", nargs="+", choices=sorted(PROBLEMS), default=usual)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", nargs="+", help="only these, beside optax.adamw")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    args = parser.parse_args(argv)
    on_cpu = jax.default_backend() == "cpu"
    default = RESULTS / f"bench_step_{jax.default_backend()}.json"
    out = default if args.out is None else args.out
    stamp, old = environment(), json.loads(out.read_text()) if out.exists() else {}
    kept = old["models"] if old.get("environment") == stamp else {}
    result = {"environment": stamp, "models": kept}
    measured = {}
    for name in args.models:
        if on_cpu and name == "transformer":
            print("transformer: skipped, it needs an accelerator")
            continue
        result["models"][name] = measured[name] = found = bench(name, args.rounds, args.steps)
        print(f"\n{name}: {found['parameters']:,} parameters, medians of {args.rounds} rounds")
        print(f"{'step':24}{'x adamw':>9}{'quartiles':>16}{'compile':>9}{'peak + params':>15}")
        for label, row in found["steps"].items():
            low, high = row["ratio_quartiles"]
            print(
                f"{label:24}{row['ratio']:9.2f}{low:10.2f}-{high:.2f}"
                f"{row['compile_ratio']:9.2f}{row['peak_over_adamw_in_parameters']:15.2f}"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    history.record("step", stamp, rows(measured))


if __name__ == "__main__":
    main()
