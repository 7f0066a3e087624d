"""Measuring: interleaved medians in one process, compile time, memory, environment stamp."""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib.metadata import version
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """What the numbers were measured on; no names of machines or paths."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "x64": bool(jax.config.jax_enable_x64),
        **{name: version(name) for name in ("jax", "jaxlib", "optax", "numpy", "blr_optax")},
    }


def compile_step(step, *args) -> tuple[Any, dict[str, float]]:
    """The compiled step, with seconds to compile and bytes of memory."""
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return compiled, {
        "compile_s": seconds,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    }


def interleave(
    steps: dict[str, Any], carries: dict[str, tuple], batch: tuple, rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of every step in every round, the steps taking turns; order alternates."""
    seconds = {name: [] for name in steps}
    names = list(steps)
    for index in range(warmup + rounds):
        for name in names if index % 2 else reversed(names):
            start = time.perf_counter()
            *carry, _ = steps[name](*carries[name], *batch)
            jax.block_until_ready(carry)
            carries[name] = tuple(carry)
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Medians, as multiples of the base's too, with quartiles of the per-round ratio."""
    reference = statistics.median(seconds[base])
    table = {}
    for name, values in seconds.items():
        per_round = sorted(a / b for a, b in zip(values, seconds[base], strict=True))
        quarter = len(per_round) // 4
        table[name] = {
            "median_s": statistics.median(values),
            "ratio": statistics.median(values) / reference,
            # Of what happens in some steps only, such as a refresh, the median knows nothing.
            "ratio_of_means": statistics.fmean(values) / statistics.fmean(seconds[base]),
            "ratio_quartiles": [per_round[quarter], per_round[-1 - quarter]],
        }
    return table
