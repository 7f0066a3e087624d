"""Every deep-learning row on four small data sets of scikit-learn, three seeds each.

Every choice, the same for all rows unless it says otherwise:

    data        digits, breast cancer, wine; diabetes as a regression. 70% of the rows, drawn by the
                seed, train; the rest only ever score. Features standardised by the training rows
    network     one hidden layer of 100 tanh units, every matrix divided by the root of its inputs,
                so that weights of size one, signs too, are the natural ones; logits times 4, so
                that the prior knows confident networks
    loss        mean cross-entropy; squared error over twice a noise variance of 0.5 (diabetes)
    prior       N(0, 1) for every weight, as an L2 term for rows without a prior of their own; even
                odds for signs
    ess         N, the number of training examples: no temperature, but for bayesbinn, whose signs
                hardly learn under their full prior (kl_weight 0.1)
    steps       `STEPS` of batches of 32, cosine rate from the learning rate to zero
    rate        the learning rate of the grid of a row with the lowest NLL on a fifth of the
                training rows, averaged over the seeds; four numbers a row. The row then trains on
                all training rows. All other hyper-parameters are those of `ROWS`, not searched
    prediction  at the parameters, and averaged over 64 draws of the posterior where a row looks at
                samples

    python -m benchmarks.real_data                # writes benchmarks/results/real_data.json
    python -m benchmarks.real_data --figure       # draws docs/real_data.png from it
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import blr_optax as blr
from benchmarks.measure import compile_step, environment, interleave, ratios

RESULTS = Path(__file__).parent / "results" / "real_data.json"
FIGURE = Path(__file__).parent.parent / "docs" / "real_data.png"
SEEDS, STEPS, BATCH, HIDDEN, SAMPLES = 3, 1500, 32, 100, 64
NOISE_VARIANCE, GAIN = 0.5, 4.0
DATA = ("digits", "breast_cancer", "wine", "diabetes")
REGRESSION = ("diabetes",)


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer of the table.

    Attributes:
        make: (learning rate or schedule, N) -> transformation.
        rates: the learning rates to choose from.
        options: of `estimate`.
        sampled: whether its posterior is averaged over.
        start: weights of N(0, 1) -> the params of the optimizer.
        point: params -> the weights of the prediction at the parameters.
        members: of a mixture: the loss is summed over a leading axis of the params.
    """

    make: Callable[[Any, int], optax.GradientTransformation]
    rates: tuple[float, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampled: bool = True
    start: Callable[[Any], Any] = lambda params: params
    point: Callable[[Any], Any] = lambda params: params
    members: int = 0


def signs(params: Any) -> Any:
    """The most likely network of signs."""
    return jax.tree.map(lambda m: jnp.where(m < 0, -1.0, 1.0), params)


def certain(params: Any) -> Any:
    """Natural parameters of size 2 with the signs of normal numbers."""
    return jax.tree.map(lambda m: 2.0 * jnp.where(m < 0, -1.0, 1.0), params)


def decayed(make: Callable) -> Callable:
    """The prior N(0, 1) as an L2 term, for rows that have none of their own."""
    return lambda lr, n: optax.chain(optax.add_decayed_weights(1.0 / n), make(lr, n))


ADAPTIVE, PLAIN = (1e-3, 3e-3, 1e-2, 3e-2), (0.03, 0.1, 0.3, 1.0)
SECOND = (3e-3, 1e-2, 3e-2, 1e-1)

ROWS: dict[str, Row] = {
    "optax.adamw": Row(
        lambda lr, n: blr.with_posterior(
            optax.adamw(lr, weight_decay=1.0 / n), blr.optimizers.gradient.StepSizeReader(),
            ess=n, step_size=1.0,
        ),
        ADAPTIVE, sampled=False,
    ),
    "sgd": Row(decayed(lambda lr, n: blr.sgd(lr, momentum=0.9, ess=n)), PLAIN, sampled=False),
    "rmsprop": Row(decayed(lambda lr, n: blr.rmsprop(lr, ess=n)), ADAPTIVE, sampled=False),
    "adam": Row(decayed(lambda lr, n: blr.adam(lr, ess=n)), ADAPTIVE, sampled=False),
    "sam": Row(
        lambda lr, n: blr.sam(lr, ess=n, rho=0.05, weight_decay=1.0 / n), PLAIN, sampled=False
    ),
    "bsam": Row(lambda lr, n: blr.bsam(lr, ess=n, b2=0.99), PLAIN),
    "vprop": Row(lambda lr, n: blr.vprop(lr, ess=n, init_precision=float(n)), PLAIN),
    "vadam": Row(lambda lr, n: blr.vadam(lr, ess=n, init_precision=float(n)), PLAIN),
    "ogn": Row(lambda lr, n: blr.ogn(lr, ess=n, b2=0.99, damping=0.01), SECOND, sampled=False),
    "vogn": Row(lambda lr, n: blr.vogn(lr, ess=n, b2=0.99, damping=0.01), SECOND),
    "soba": Row(
        lambda lr, n: blr.soba(lr, ess=n, hess_init=0.1, b2=0.999, weight_decay=1.0 / n), SECOND
    ),
    "ivon": Row(
        lambda lr, n: blr.ivon(lr, ess=n, hess_init=0.1, b2=0.999, weight_decay=1.0 / n), PLAIN
    ),
    "ivon, pairs": Row(
        lambda lr, n: blr.ivon(lr, ess=n, hess_init=0.1, b2=0.999, weight_decay=1.0 / n),
        PLAIN, {"antithetic": True},
    ),
    "mixture of 4 ivons": Row(
        lambda lr, n: blr.mixture_ivon(lr, ess=n, hess_init=0.1, b2=0.999, weight_decay=1.0 / n),
        PLAIN, members=4,
    ),
    "evon": Row(
        lambda lr, n: blr.evon(lr, ess=n, hess_init=0.1, b2=0.999, weight_decay=1.0 / n), PLAIN
    ),
    "lie_additive": Row(decayed(lambda lr, n: blr.lie_additive(lr, noise_scale=0.1)), PLAIN),
    "lie_affine": Row(
        lambda lr, n: blr.lie_affine(
            lr, ess=n, scale_rate=1e-3, noise_scale=0.1, b2=0.99, weight_decay=1.0 / n
        ),
        PLAIN,
    ),
    "lie_multiplicative": Row(
        lambda lr, n: blr.lie_multiplicative(lr, ess=n, weight_decay=1.0 / n), PLAIN
    ),
    "dropout(adam)": Row(
        decayed(
            lambda lr, n: blr.dropout(
                blr.adam(lr, ess=n), 0.8, mask={"w1": False, "b1": False, "w2": True, "b2": False}
            )
        ),
        ADAPTIVE,
        point=lambda p: {**p, "w2": 0.8 * p["w2"]},
    ),
    "ste": Row(
        lambda lr, n: blr.ste(lr), ADAPTIVE, sampled=False,
        start=lambda p: jax.tree.map(lambda m: 0.1 * m, p), point=signs,
    ),
    "bayesbinn": Row(
        lambda lr, n: blr.bayesbinn(lr, ess=n, temperature=0.3, b1=0.9, kl_weight=0.1),
        (1e-3, 3e-3, 1e-2, 3e-2), start=certain, point=signs,
    ),
}  # fmt: skip


def load(name: str, seed: int) -> dict[str, np.ndarray]:
    """Standardised features and labels of one split: train, test."""
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    cut = int(0.7 * len(x))
    x, y = x[order], y[order]
    mean, deviation = x[:cut].mean(0), x[:cut].std(0) + 1e-6
    x = ((x - mean) / np.where(deviation > 1e-3, deviation, 1.0)).astype(np.float32)
    if name in REGRESSION:
        y = ((y - y[:cut].mean()) / y[:cut].std()).astype(np.float32)
    return {"x": x[:cut], "y": y[:cut], "test_x": x[cut:], "test_y": y[cut:]}


def apply(w: Any, x: Any) -> Any:
    """The outputs of the network for one set of weights."""
    h = jnp.tanh(x @ w["w1"] / np.sqrt(x.shape[-1]) + w["b1"])
    outputs = h @ w["w2"] / np.sqrt(w["w2"].shape[0]) + w["b2"]
    return outputs if w["b2"].shape[-1] == 1 else GAIN * outputs


def initial(key: Any, inputs: int, outputs: int) -> Any:
    """Weights of N(0, 1)."""
    shapes = {"w1": (inputs, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, outputs), "b2": (outputs,)}
    keys = jax.random.split(key, len(shapes))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def loss_of(name: str) -> Callable:
    """The mean loss of a data set."""
    if name in REGRESSION:
        return lambda w, x, y: jnp.mean((apply(w, x)[:, 0] - y) ** 2) / (2 * NOISE_VARIANCE)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return lambda w, x, y: jnp.mean(cross_entropy(apply(w, x), y))


def over_members(loss: Callable, row: Row) -> Callable:
    """The sum over the members of a mixture; the loss itself for others."""
    if not row.members:
        return loss
    return lambda w, x, y: jnp.sum(jax.vmap(loss, (0, None, None))(w, x, y))


def stepper(row: Row, name: str, n: int, rate: Any) -> tuple[Any, Callable]:
    """The transformation at a rate, and one step of it."""
    tx = row.make(rate, n)
    loss = over_members(loss_of(name), row)

    def step(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
        est = blr.estimate(loss, state, params, x, y, **row.options)
        extra = {} if est.statistic is None else {"curvature": est.statistic}
        updates, state = tx.update(est.grad, state, params, **extra)
        return optax.apply_updates(params, updates), state, est.value

    return tx, step


def trainer(row: Row, name: str, outputs: int) -> Callable:
    """(rate, seed, x, y, test x) -> predictions at the parameters and averaged; jitted."""

    def train(rate: Any, seed: Any, x: Any, y: Any, test_x: Any) -> dict[str, Any]:
        n = x.shape[0]
        schedule = lambda t: rate * 0.5 * (1 + jnp.cos(jnp.pi * t / STEPS))  # noqa: E731
        tx, step = stepper(row, name, n, schedule)
        first, batches, last = jax.random.split(jax.random.key(seed), 3)
        size = max(row.members, 1)
        starts = jax.vmap(lambda k: initial(k, x.shape[1], outputs))(jax.random.split(first, size))
        params = row.start(starts if row.members else jax.tree.map(lambda s: s[0], starts))

        def body(carry: tuple, t: Any) -> tuple[tuple, None]:
            rows = jax.random.choice(jax.random.fold_in(batches, t), n, (BATCH,), replace=False)
            return step(*carry, x[rows], y[rows])[:2], None

        carry = (params, blr.reseed(tx.init(params), jax.random.key(seed)))
        params, state = jax.lax.scan(body, carry, jnp.arange(STEPS))[0]
        found = {"point": apply_point(row, params, test_x)}
        if row.sampled:
            draws = blr.posterior(state, params).sample(last, (SAMPLES,))
            found["sampled"] = jax.vmap(lambda w: apply(w, test_x))(draws)
        return found

    return jax.jit(train)


def apply_point(row: Row, params: Any, x: Any) -> Any:
    """Outputs at the parameters, one row per member of a mixture."""
    weights = row.point(params)
    if row.members:
        return jax.vmap(lambda w: apply(w, x))(weights)
    return apply(weights, x)[None]


def scores(name: str, outputs: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Accuracy, NLL, ECE of an average over the leading axis; RMSE, NLL, coverage gap."""
    if name in REGRESSION:
        f = jnp.asarray(outputs)[..., 0]
        mean, std = f.mean(0), jnp.sqrt(f.var(0) + NOISE_VARIANCE)
        inside = jnp.mean(jnp.abs(y - mean) < 1.6449 * std)
        return {
            "rmse": float(jnp.sqrt(jnp.mean((mean - y) ** 2))),
            "nll": float(jnp.mean(blr.metrics.gaussian_nll(mean, std, y))),
            "coverage_gap": float(jnp.abs(inside - 0.9)),
        }
    probs = jnp.mean(jax.nn.softmax(jnp.asarray(outputs)), axis=0)
    probs = probs / probs.sum(-1, keepdims=True)
    return {
        "accuracy": 100 * float(blr.metrics.accuracy(probs, y)),
        "nll": float(jnp.mean(blr.metrics.nll(probs, y))),
        "ece": float(blr.metrics.calibration(probs, y).ece),
    }


def run_row(label: str, name: str) -> dict[str, Any]:
    """The search over rates, then three seeds on all training rows."""
    row, splits = ROWS[label], [load(name, seed) for seed in range(SEEDS)]
    outputs = 1 if name in REGRESSION else int(max(s["y"].max() for s in splits)) + 1
    train = trainer(row, name, outputs)
    kind = "sampled" if row.sampled else "point"

    def score(rate: float, validation: bool) -> list[dict[str, Any]]:
        results = []
        for seed, split in enumerate(splits):
            x, y, test_x, test_y = split.values()
            if validation:
                cut = int(0.8 * len(x))
                x, y, test_x, test_y = x[:cut], y[:cut], x[cut:], y[cut:]
            found = train(rate, seed, x, y, test_x)
            results.append({k: scores(name, np.asarray(v), test_y) for k, v in found.items()})
        return results

    def mean(results: list[dict[str, Any]], kind: str) -> dict[str, list[float]]:
        return {
            k: [float(np.mean(v := [r[kind][k] for r in results])), float(np.std(v, ddof=1))]
            for k in results[0][kind]
        }

    searched = {rate: mean(score(rate, True), kind)["nll"][0] for rate in row.rates}
    best = min(searched, key=lambda rate: np.nan_to_num(searched[rate], nan=np.inf))
    final = score(best, False)
    return {
        "rate": best,
        "validation_nll": {str(k): v for k, v in searched.items()},
        **{k: mean(final, k) for k in final[0]},
    }


def time_steps(rounds: int) -> dict[str, float]:
    """Time of one step on digits, as a multiple of AdamW's."""
    split = load("digits", 0)
    x, y = jnp.asarray(split["x"][:BATCH]), jnp.asarray(split["y"][:BATCH])
    steps, carries = {}, {}
    for label, row in ROWS.items():
        tx, step = stepper(row, "digits", len(split["x"]), row.rates[0])
        keys = jax.random.split(jax.random.key(0), max(row.members, 1))
        params = jax.vmap(lambda k: initial(k, x.shape[1], 10))(keys)
        params = row.start(params if row.members else jax.tree.map(lambda p: p[0], params))
        carry = (params, tx.init(params))
        steps[label], _ = compile_step(step, *carry, x, y)
        carries[label] = carry
    found = ratios(interleave(steps, carries, (x, y), rounds), "optax.adamw")
    return {label: entry["ratio"] for label, entry in found.items()}


def draw(result: dict[str, Any], out: Path) -> None:
    """One figure: accuracy (or RMSE), NLL and calibration of every row on every data set."""
    import matplotlib.pyplot as plt

    labels = list(result["data"]["digits"])
    figure, axes = plt.subplots(len(DATA), 3, figsize=(11, 12), layout="constrained", sharex=True)
    for name, line in zip(DATA, axes, strict=True):
        rows = result["data"][name]
        names = (
            ("rmse", "nll", "coverage_gap") if name in REGRESSION else ("accuracy", "nll", "ece")
        )
        titles = {
            "rmse": "RMSE", "nll": "NLL", "coverage_gap": "gap of 90% coverage",
            "accuracy": "accuracy (%)", "ece": "ECE",
        }  # fmt: skip
        for ax, metric in zip(line, names, strict=True):
            for kind, colour, shift in (
                ("point", "tab:gray", -0.15),
                ("sampled", "tab:blue", 0.15),
            ):
                at = [i for i, k in enumerate(labels) if kind in rows[k]]
                value = np.array([rows[labels[i]][kind][metric] for i in at])
                ax.errorbar(
                    np.array(at) + shift, value[:, 0], value[:, 1], fmt="o", ms=4, color=colour,
                    label={"point": "at the parameters", "sampled": "64 samples"}[kind],
                )  # fmt: skip
            ax.set_title(f"{name.replace('_', ' ')}: {titles[metric]}", fontsize=10)
            ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
            ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(out, dpi=80)


def main(argv: list[str] | None = None) -> None:
    """Runs the chosen rows and data, keeps the other results of the file."""
    parser = argparse.ArgumentParser(description="Every row on four small data sets.")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--rounds", type=int, default=200, help="of the timing; 0 for none")
    parser.add_argument("--figure", action="store_true", help="only draw the figure")
    args = parser.parse_args(argv)
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"data": {}}
    if args.figure:
        draw(result, FIGURE)
        return
    result["environment"] = environment()
    result["settings"] = {
        "seeds": SEEDS, "steps": STEPS, "batch": BATCH, "hidden": HIDDEN, "samples": SAMPLES
    }  # fmt: skip
    for name in args.data:
        table = result["data"].setdefault(name, {})
        for label in args.rows:
            table[label] = run_row(label, name)
            shown = table[label].get("sampled", table[label]["point"])
            cells = "  ".join(f"{k} {m:.4f} ± {s:.4f}" for k, (m, s) in shown.items())
            print(f"{name:14} {label:14} rate {table[label]['rate']:<8} {cells}", flush=True)
        result["data"][name] = {k: table[k] for k in ROWS if k in table}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    if args.rounds:
        result["step_x_adamw"] = time_steps(args.rounds)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
