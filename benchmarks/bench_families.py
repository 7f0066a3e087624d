"""Families at a million elements against numpyro, distrax and efax, in one process.

Every contestant is one jitted function of the standard parameters (and of points, a key, or a
second member), interleaved; ratios of medians, ours over theirs: below 1 we are faster. A library
that is not installed, or lacks the family or the function, is left out. efax needs Python 3.12.
The ratios go to benchmarks/history.jsonl too; rows that became slower since the last run there are
printed.

    python -m benchmarks.bench_families --rounds 15
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import history
from benchmarks.measure import environment
from blr_optax import families

RESULTS = Path(__file__).parent / "results"
COUNT = 1_000_000
DIMENSION = 10  # of simplex families: COUNT / DIMENSION members


def _load(name):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None


def parameters(key):
    """name -> two sets of standard parameters, random and moderate."""
    keys = iter(jax.random.split(key, 40))

    def positive(shape=(COUNT,)):
        return jnp.exp(jax.random.normal(next(keys), shape))

    def real(shape=(COUNT,)):
        return jax.random.normal(next(keys), shape)

    simplex = (COUNT // DIMENSION, DIMENSION)
    makers = {
        "normal": lambda: {"mean": real(), "variance": positive()},
        "exponential": lambda: {"rate": positive()},
        "gamma": lambda: {"concentration": positive(), "rate": positive()},
        "beta": lambda: {"alpha": positive(), "beta": positive()},
        "dirichlet": lambda: {"concentration": positive(simplex)},
        "bernoulli": lambda: {"logit": real()},
        "categorical": lambda: {"logits": real(simplex)},
        "poisson": lambda: {"rate": positive()},
        "inverse_gaussian": lambda: {"mean": positive(), "shape": positive()},
    }
    return {name: (make(), make()) for name, make in makers.items()}


def numpyro_of(library):
    d = library
    return {
        "normal": lambda p: d.Normal(p["mean"], jnp.sqrt(p["variance"])),
        "exponential": lambda p: d.Exponential(p["rate"]),
        "gamma": lambda p: d.Gamma(p["concentration"], p["rate"]),
        "beta": lambda p: d.Beta(p["alpha"], p["beta"]),
        "dirichlet": lambda p: d.Dirichlet(p["concentration"]),
        "bernoulli": lambda p: d.BernoulliLogits(p["logit"]),
        "categorical": lambda p: d.CategoricalLogits(p["logits"]),
        "poisson": lambda p: d.Poisson(p["rate"]),
    }


def distrax_of(library):
    d = library
    return {
        "normal": lambda p: d.Normal(p["mean"], jnp.sqrt(p["variance"])),
        "gamma": lambda p: d.Gamma(p["concentration"], p["rate"]),
        "beta": lambda p: d.Beta(p["alpha"], p["beta"]),
        "dirichlet": lambda p: d.Dirichlet(p["concentration"]),
        "bernoulli": lambda p: d.Bernoulli(logits=p["logit"]),
        "categorical": lambda p: d.Categorical(logits=p["logits"]),
    }


def efax_of(library):
    e = library

    return {
        "normal": lambda p: e.NormalNP(p["mean"] / p["variance"], -0.5 / p["variance"]),
        "exponential": lambda p: e.ExponentialNP(-p["rate"]),
        "gamma": lambda p: e.GammaNP(-p["rate"], p["concentration"] - 1.0),
        "beta": lambda p: e.BetaNP(jnp.stack([p["alpha"], p["beta"]], -1) - 1.0),
        "dirichlet": lambda p: e.DirichletNP(p["concentration"] - 1.0),
        "bernoulli": lambda p: e.BernoulliNP(p["logit"]),
        "poisson": lambda p: e.PoissonNP(jnp.log(p["rate"])),
    }


def ours(name):
    """Our functions of standard parameters."""
    family = families.get(name)
    natural = lambda p: family.natural(**p)  # noqa: E731
    return {
        "log_prob": lambda p, q, x, k: family.log_prob(natural(p), x),
        "sample": lambda p, q, x, k: family.sample(k, natural(p)),
        "kl": lambda p, q, x, k: family.kl(natural(p), natural(q)),
        "expectation": lambda p, q, x, k: family.expectation(natural(p)),
    }


def theirs(name, library, make):
    """A peer's functions, those it has."""
    if library == "numpyro":
        kl = importlib.import_module("numpyro.distributions").kl_divergence
        return {
            "log_prob": lambda p, q, x, k: make(p).log_prob(x),
            "sample": lambda p, q, x, k: make(p).sample(k),
            "kl": lambda p, q, x, k: kl(make(p), make(q)),
        }
    if library == "distrax":
        return {
            "log_prob": lambda p, q, x, k: make(p).log_prob(x),
            "sample": lambda p, q, x, k: make(p).sample(seed=k),
            "kl": lambda p, q, x, k: make(p).kl_divergence(make(q)),
        }
    return {
        "log_prob": lambda p, q, x, k: make(p).log_pdf(x),
        "sample": lambda p, q, x, k: make(p).sample(k),
        "kl": lambda p, q, x, k: make(p).kl_divergence(make(q)),
        "expectation": lambda p, q, x, k: make(p).to_exp(),
    }


def peers():
    """(library, its constructors) of those that are installed."""
    tables = {"numpyro": numpyro_of, "distrax": distrax_of, "efax": efax_of}
    modules = {"numpyro": "numpyro.distributions", "distrax": "distrax", "efax": "efax"}
    found = {name: _load(module) for name, module in modules.items()}
    return {name: tables[name](module) for name, module in found.items() if module}


def medians(functions, arguments, rounds):
    """Seconds of every function, the functions taking turns after one call each."""
    seconds = {name: [] for name in functions}
    for index in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if index:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bench(rounds):
    """family -> function -> library -> ratio of medians, ours over theirs."""
    table, libraries = {}, peers()
    for name, (p, q) in parameters(jax.random.key(0)).items():
        family = families.get(name)
        x = family.sample(jax.random.key(1), family.natural(**p))
        arguments = (p, q, x, jax.random.key(2))
        table[name] = {}
        for what, mine in ours(name).items():
            contestants = {"blr_optax": jax.jit(mine)}
            for library, constructors in libraries.items():
                if name not in constructors:
                    continue
                their = theirs(name, library, constructors[name]).get(what)
                if their is None:
                    continue
                compiled = jax.jit(their)
                try:
                    jax.block_until_ready(compiled(*arguments))
                except (NotImplementedError, AttributeError, TypeError) as error:
                    print(f"{library} {name} {what}: left out, {type(error).__name__}")
                    continue
                contestants[library] = compiled
            found = medians(contestants, arguments, rounds)
            mine_s = found.pop("blr_optax")
            table[name][what] = {"median_s": mine_s} | {k: mine_s / v for k, v in found.items()}
            ratios = "  ".join(f"{k} {mine_s / v:.2f}" for k, v in found.items())
            print(f"{name:18}{what:12}{1e3 * mine_s:9.2f} ms   {ratios}", flush=True)
    return table


def rows(table):
    """ExponentialFamily, function and library -> ratio, ours over theirs."""
    return {
        f"{family}: {what} / {library}": ratio
        for family, functions in table.items()
        for what, found in functions.items()
        for library, ratio in found.items()
        if library != "median_s"
    }


def main(argv: list[str] | None = None) -> None:
    """Runs, prints ratios and writes the JSON."""
    parser = argparse.ArgumentParser(description="Families against their peers.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    args = parser.parse_args(argv)
    table = bench(args.rounds)
    stamp = environment() | {name: _load(name).__version__ for name in peers() if _load(name)}
    default = RESULTS / f"bench_families_{jax.default_backend()}.json"
    out = default if args.out is None else args.out
    out.write_text(json.dumps({"environment": stamp, "elements": COUNT, "ratios": table}, indent=1))
    history.record("families", stamp, rows(table))


if __name__ == "__main__":
    main()
