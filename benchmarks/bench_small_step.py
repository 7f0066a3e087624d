"""Step time of every deep-learning row on a small network, as multiples of AdamW's.

    python -m benchmarks.bench_small_step

One hidden layer of 100 units over 64 inputs, batches of 32: here the arithmetic of the optimizer
itself counts, and not the network's. Results go to benchmarks/results/small_network_steps.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import blr_optax as blr
from benchmarks.measure import compile_step, environment, interleave, ratios

RESULT = Path(__file__).parent / "results" / "small_network_steps.json"
EXAMPLES, INPUTS, HIDDEN, CLASSES, BATCH, MEMBERS = 1250, 64, 100, 10, 32, 4

# Name -> transformation, as it is called in docs/benchmarks.md; the numbers do not change the cost.
ROWS: dict[str, Callable[[], Any]] = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "sgd": lambda: blr.sgd(1e-2, momentum=0.9, ess=EXAMPLES),
    "rmsprop": lambda: blr.rmsprop(1e-3, ess=EXAMPLES),
    "adam": lambda: blr.adam(1e-3, ess=EXAMPLES),
    "sam": lambda: blr.sam(1e-2, ess=EXAMPLES, rho=0.05, weight_decay=1e-3),
    "bsam": lambda: blr.bsam(1e-2, ess=EXAMPLES),
    "vprop": lambda: blr.vprop(1e-3, ess=EXAMPLES, init_precision=float(EXAMPLES)),
    "vadam": lambda: blr.vadam(1e-3, ess=EXAMPLES, init_precision=float(EXAMPLES)),
    "ogn": lambda: blr.ogn(1e-2, ess=EXAMPLES, damping=0.01),
    "vogn": lambda: blr.vogn(1e-2, ess=EXAMPLES, damping=0.01),
    "soba": lambda: blr.soba(1e-2, ess=EXAMPLES, hess_init=0.1),
    "ivon": lambda: blr.ivon(1e-2, ess=EXAMPLES, hess_init=0.1),
    "ivon, antithetic": lambda: blr.ivon(1e-2, ess=EXAMPLES, hess_init=0.1),
    "ivon, num_steps": lambda: blr.ivon(ess=EXAMPLES, num_steps=2000),
    "mixture_ivon, 4": lambda: blr.mixture_ivon(1e-2, ess=EXAMPLES, hess_init=0.1),
    "evon": lambda: blr.evon(1e-2, ess=EXAMPLES, hess_init=0.1),
    "lie_additive": lambda: blr.lie_additive(1e-2, noise_scale=0.1),
    "lie_affine": lambda: blr.lie_affine(1e-2, ess=EXAMPLES, scale_rate=1e-3, noise_scale=0.1),
    "lie_multiplicative": lambda: blr.lie_multiplicative(1e-2, ess=EXAMPLES),
    "dropout(adam)": lambda: blr.dropout(
        blr.adam(1e-3, ess=EXAMPLES), 0.8, mask={"w1": False, "b1": False, "w2": True, "b2": False}
    ),
    "ste": lambda: blr.ste(1e-3),
    "bayesbinn": lambda: blr.bayesbinn(1e-3, ess=EXAMPLES, temperature=0.3, b1=0.9),
}
OPTIONS: dict[str, dict[str, Any]] = {"ivon, antithetic": {"samples": 2, "antithetic": True}}


def loss(w: Any, x: Any, y: Any) -> Any:
    """Mean cross-entropy of the network."""
    outputs = jnp.tanh(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


def of_members(w: Any, x: Any, y: Any) -> Any:
    """The sum of the losses of networks side by side."""
    return jnp.sum(jax.vmap(loss, (0, None, None))(w, x, y))


def measure(rounds: int) -> dict[str, float]:
    """Ratio of medians to AdamW's, all rows taking turns."""
    keys = jax.random.split(jax.random.key(0), 4)
    one = {
        "w1": jax.random.normal(keys[0], (INPUTS, HIDDEN)) / INPUTS**0.5,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(keys[1], (HIDDEN, CLASSES)) / HIDDEN**0.5,
        "b2": jnp.zeros(CLASSES),
    }
    batch = (
        jax.random.normal(keys[2], (BATCH, INPUTS)),
        jax.random.randint(keys[3], (BATCH,), 0, CLASSES),
    )
    steps, carries = {}, {}
    for name, make in ROWS.items():
        tx, mixture = make(), name.startswith("mixture")
        params = jax.tree.map(lambda x: jnp.stack([x] * MEMBERS), one) if mixture else one
        step = blr.make_step(
            tx, of_members if mixture else loss, jit=False, **OPTIONS.get(name, {})
        )
        carry = (jax.tree.map(jnp.copy, params), tx.init(params))
        steps[name], _ = compile_step(step, *carry, *batch)
        carries[name] = carry
    found = ratios(interleave(steps, carries, batch, rounds), "optax.adamw")
    return {name: round(entry["ratio"], 4) for name, entry in found.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    found = measure(parser.parse_args().rounds)
    for name, ratio in found.items():
        print(f"{name:20} {ratio:6.2f} x optax.adamw")
    network = f"one hidden layer of {HIDDEN} units over {INPUTS} inputs, batches of {BATCH}"
    result = {"environment": environment(), "network": network, "step_x_adamw": found}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
