"""What the state of an optimizer, and a few of its updates, say about its hyper-parameters.

    ess     of the state                        against the number of examples and the batch size
    1 - b2  =  dp' / dc  where  p' = p          a derivative of one step of the precision
    |g that arrives| / |g given|                a clip, scale or average in front of the rule
    rms(theta - m)  against  rms(m)             the first noise
    P(|theta - m| < s / 2)                      noise that rounding takes away, s the spacing

An update needs no evaluation of the loss; the gradient is one that the draws gave.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blr_optax import _tree
from blr_optax.state._check._report import Finding, short
from blr_optax.state._diagnostics import rounding, unmoved
from blr_optax.state._reader import draws_noise, find_posterior_states, map_posterior_states

if TYPE_CHECKING:
    from jaxtyping import Array

    from blr_optax._typing import OptState, Params, PyTree, Updates

NEARLY_ALL, MOST = 0.05, 0.5  # shares of the precision that a run can learn
LARGE, SMALL = 1e3, 1e-3  # gradients that a clip or a normalisation changes
ALTERED = 1e-3  # relative, in a gradient that arrives
UNMOVED = 0.5  # share of the weights that the noise does not move
LOST = 0.01  # of a deviation, or relative of a variance: more matters to whoever uses q
WORSE = 0.05  # relative, by which noise has to raise the loss to count as too wide


# --- ess ------------------------------------------------------------------------------------------


def sizes_of_data(states: list[PyTree]) -> list[float]:
    """Return the effective sample sizes of the posteriors, each once."""
    found = []
    for state in states:
        core = state.reader.core(state)
        ess = getattr(core, "ess", None)
        if ess is None:
            ess = getattr(core, "hyper", {}).get("ess")
        if ess is None and hasattr(core, "inner"):  # of an optimizer around another
            inner = find_posterior_states(core.inner)
            found += sizes_of_data(inner)
            continue
        if ess is not None:
            found.append(float(ess))
    return sorted(set(found))


def of_ess(sizes: list[float], size: int | None, examples: int | None, how: str) -> list[Finding]:
    """Compare `ess` with the number of examples and the size of the batch."""
    findings = []
    for ess in sizes:
        if examples is None:
            if ess == 1.0 and how == "mean" and (size or 1) > 1:
                findings.append(Finding(
                    "ess_is_one",
                    "note",
                    f"ess is 1, as for one single example, and the batch alone has {size}. (1 is "
                    "the default of adam, sgd, newton, blr_update and their kin.)",
                    "Give ess= the number of training examples, and num_examples= to check.",
                ))  # fmt: skip
            continue
        factor = np.sqrt(examples / ess)
        if np.isclose(ess, examples, rtol=1e-6) or (ess == 1.0 and how == "sum"):
            continue
        if size is not None and size != examples and np.isclose(ess, size, rtol=1e-6):
            findings.append(Finding(
                "ess_is_batch_size",
                "warning",
                f"ess is {short(ess)}, the size of the batch, and there are {examples} examples: "
                f"the deviations come out {short(factor)} times too large.",
                f"ess={examples}: the mean loss stands for all training examples, whatever the "
                "size of a batch.",
            ))  # fmt: skip
        elif ess == 1.0:
            findings.append(Finding(
                "ess_is_one",
                "warning",
                f"ess is 1, and there are {examples} examples: the deviations come out "
                f"{short(factor)} times too large. (1 is the default of adam, sgd, newton, "
                "blr_update and their kin.)",
                f"ess={examples}, the number of training examples.",
            ))  # fmt: skip
        else:
            findings.append(Finding(
                "temperature",
                "note",
                f"ess is {short(ess)}, and there are {examples} examples: the posterior is "
                f"tempered, at temperature num_examples / ess = {short(examples / ess)}.",
                f"If that is not meant, ess={examples}.",
            ))  # fmt: skip
    return findings


# --- b2 -------------------------------------------------------------------------------------------


def _precisions(opt_state: OptState) -> list[PyTree]:
    cores = [state.reader.core(state) for state in find_posterior_states(opt_state)]
    return [core.precision for core in cores if hasattr(core, "precision")]


def rates(
    tx: optax.GradientTransformationExtraArgs,
    opt_state: OptState,
    params: Params,
    grads: Updates,
    extra: dict[str, Any],
) -> list[float]:
    """1 - b2 of every posterior that keeps a precision, from one step and its derivative.

    p'(c) has the slope rho where p' = p, whatever the retraction: a first step, near there, and a
    second one from where its slope leads.
    """
    before = _precisions(opt_state)
    if not jax.tree.leaves(before):
        return []
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, _tree.statistics_dtype(p.dtype)), params)

    @jax.jit
    def step(
        start: list[PyTree], opt_state: OptState, params: Params, grads: Updates
    ) -> tuple[list[PyTree], list[PyTree]]:
        def after(statistic: PyTree) -> list[PyTree]:
            _, new = tx.update(grads, opt_state, params, statistic=statistic, **extra)
            return _precisions(new)

        whole = _tree.merge_by_path(zeros, *start)
        return jax.jvp(after, (whole,), (jax.tree.map(jnp.ones_like, whole),))

    start = jax.tree.map(lambda p: 0.9 * p, before)
    now, slope = step(start, opt_state, params, grads)
    start = jax.tree.map(lambda c, p, x, s: c + (p - x) / s, start, before, now, slope)
    found = []
    for tree in step(start, opt_state, params, grads)[1]:
        leaves = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
        found.append(float(np.mean(np.concatenate(leaves))) if leaves else 0.0)
    return [rate for rate in found if 0.0 < rate <= 1.0]


def of_rate(rate: float, steps: int | None, numbers: dict[str, float]) -> list[Finding]:
    """Compare what a run can learn of the precision with all of it."""
    b2 = 1.0 - rate
    numbers["b2"] = min(b2, numbers.get("b2", 1.0))
    if steps is None:
        return []
    share = -float(np.expm1(steps * np.log1p(-rate))) if rate < 1.0 else 1.0
    numbers["share_learnt"] = min(share, numbers.get("share_learnt", 1.0))
    if share >= MOST:
        return []
    better = f"{1.0 - 3.0 / max(steps, 4):.{max(1, int(np.ceil(np.log10(max(steps, 4)))))}f}"
    return [Finding(
        "slow_b2",
        "warning" if share < NEARLY_ALL else "note",
        f"At b2 = {b2:.7g}, {steps} steps learn {100 * share:.2g} % of the precision, "
        f"1 - b2^{steps}; the rest of every deviation is still that of the first posterior "
        "(hess_init, init_precision or init).",
        f"b2={better} learns 95 % of it; or train longer, or start from a posterior that is "
        "known, init=.",
    )]  # fmt: skip


# --- what stands in front of the rule -------------------------------------------------------------


class Arrivals:
    """Watches the gradients from which the states of an optimizer derive their statistics.

    Attributes:
        ratios: |gradient that arrived| / |gradient given|, of every posterior.
        distances: |their difference| / |gradient given|.
    """

    def __init__(self) -> None:
        self.given: PyTree = None
        self.ratios: list[float] = []
        self.distances: list[float] = []

    def watch(self, opt_state: OptState) -> OptState:
        """Return the state with readers that tell what they are asked about."""

        def watched(state: Any) -> Any:
            core = state.reader.core(state)
            reader = copy.copy(core.reader)
            for name in ("curvature", "statistic"):
                asked = getattr(core.reader, name)
                object.__setattr__(reader, name, self._telling(asked))
            return state.reader.with_core(state, core._replace(reader=reader))

        return map_posterior_states(watched, opt_state)

    def _telling(self, asked: Any) -> Any:
        def telling(state: Any, params: Any, weights: Any, grads: Any, *rest: Any) -> Any:
            given = _tree.matching_leaves(self.given, grads, "grads")
            off = _size(optax.tree.sub(optax.tree.cast_like(given, grads), grads))
            jax.debug.callback(self._note, _size(grads), off, _size(given))
            return asked(state, params, weights, grads, *rest)

        return telling

    def _note(self, arrived: Any, off: Any, given: Any) -> None:
        whole = float(given) or 1.0
        self.ratios.append(float(arrived) / whole)
        self.distances.append(float(off) / whole)


def _size(tree: PyTree) -> Array:
    """|g|, in float32 or wider, of values whose squares might leave float range."""
    wide = jax.tree.map(lambda x: x.astype(_tree.statistics_dtype(x.dtype)), tree)
    return optax.tree.norm(wide)


def in_front(
    tx: optax.GradientTransformationExtraArgs,
    opt_state: OptState,
    params: Params,
    grads: Updates,
    extra: dict[str, Any],
) -> str:
    """Say what changes gradients before the rule sees them: "nothing", "average" or "transform".

    An average answers to one gradient differently after different earlier ones; a clip or
    normalisation changes a gradient that is very large or small.
    """
    arrivals = Arrivals()

    @jax.jit
    def update(state: OptState, scale: Any, params: Params, grads: Updates) -> OptState:
        arrivals.given = jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads)
        return tx.update(arrivals.given, state, params, **extra)[1]

    def answer(*scales: float) -> tuple[float, float]:
        state = arrivals.watch(opt_state)
        for scale in scales:
            arrivals.ratios, arrivals.distances = [], []
            state = update(state, scale, params, grads)
            jax.block_until_ready(state)
            jax.effects_barrier()
        return float(np.mean(arrivals.ratios or [1.0])), max(arrivals.distances, default=0.0)

    # Of a second step sizes alone: a rule may take gradients along axes that have turned.
    second = answer(1.0, 1.0)[0]
    if abs(second - answer(-LARGE, 1.0)[0]) > ALTERED:
        return "average"
    off = abs(second - 1.0), *(answer(scale)[1] for scale in (1.0, LARGE, SMALL))
    return "transform" if max(off) > ALTERED else "nothing"


def of_front(what: str) -> list[Finding]:
    """Put what stands in front of the rule into words."""
    momentum = (
        "Put momentum inside the rule, momentum= (ivon has b1=), and clip after it: clip_radius=, "
        "or a clip behind it in the chain. With blr.make_step, or statistic= of blr.estimate, the "
        "curvature is right, and what stands in front changes the gradient alone."
    )
    if what == "average":
        return [Finding(
            "averaged_gradient",
            "warning",
            "What stands in front of the rule mixes each gradient with earlier ones (an average, "
            "a momentum, Adam): the curvature is derived from what arrives, and comes out too "
            "small, since earlier gradients know nothing of this step's noise.",
            momentum,
        )]  # fmt: skip
    if what == "transform":
        return [Finding(
            "transformed_gradient",
            "warning",
            "What stands in front of the rule changes gradients (a clip, a scale, a "
            "normalisation): it hides the raw gradient, from which the curvature is derived, and "
            "the curvature comes out wrong by the same factor.",
            momentum,
        )]  # fmt: skip
    return []


# --- digits of lambda -----------------------------------------------------------------------------


def of_rounding(states: list[PyTree], numbers: dict[str, float]) -> list[Finding]:
    """Tell where the natural parameters of `blr_update` have too few digits for their posterior."""
    findings = []
    for state in states:
        core = state.reader.core(state)
        found = jax.jit(rounding)(core)
        if found is None:
            continue
        lost = float(found)
        numbers["rounding"] = max(lost, numbers.get("rounding", lost))
        if lost <= LOST:
            continue
        dtype = jnp.result_type(*jax.tree.leaves(core.natural))
        moved = "no member of the family is left" if np.isinf(lost) else (
            f"mean or variance move by {short(lost)} of what they are told by"
        )  # fmt: skip
        findings.append(Finding(
            "lost_digits",
            "warning",
            f"The {dtype} natural parameters have lost the digits of their posterior: within their "
            f"rounding {moved} (deviations for a mean). So it is with a mean many deviations from "
            "the origin, from about 1e5 in float32, for joint families of a mean and a precision "
            "from about 100.",
            "Count the statistics from a point near the data, blr.families.Centered(family, "
            "at=...), for families with a mean; or use float64 "
            "(jax.config.update('jax_enable_x64', True)), or data minus a constant.",
        ))  # fmt: skip
    return findings


# --- the first noise ------------------------------------------------------------------------------


def keeps_weights(state: PyTree) -> bool:
    """Whether a state's samples lie around the parameters, at a scale that it was given."""
    core = state.reader.core(state)
    return draws_noise(state) and (hasattr(core, "precision") or hasattr(core, "noise_scale"))


def spread(states: list[PyTree], params: Params, draws: list[PyTree]) -> tuple[float, float]:
    """(rms of theta - m, rms of m) over the leaves whose samples lie around the parameters."""
    noise, weights, count = 0.0, 0.0, 0
    for part in (state.reader.part(state, params) for state in states if keeps_weights(state)):
        known = _tree.paths(part)
        for path, m in jax.tree_util.tree_leaves_with_path(params):
            if (name := _tree.leaf_name(path)) not in known:
                continue
            m = np.asarray(m, np.float64)
            weights, count = weights + np.sum(m * m), count + m.size
            for theta in draws:
                at = {_tree.leaf_name(k): x for k, x in jax.tree_util.tree_leaves_with_path(theta)}
                noise += np.sum(np.square(np.asarray(at[name], np.float64) - m)) / len(draws)
    size = max(count, 1)
    return float(np.sqrt(noise / size)), float(np.sqrt(weights / size))


def of_noise_scale(
    deviation: float, weights: float, at_mean: float, at_draws: float
) -> list[Finding]:
    """Compare the first noise with the weights, and what it does to the loss.

    Weights that are all zero have no size of their own: then the loss alone tells.
    """
    worse = at_draws > at_mean + (WORSE if weights else 1.0) * abs(at_mean)
    if not weights < deviation or (weights == 0.0 and not worse):
        return []
    return [Finding(
        "wide_first_noise",
        "warning" if worse else "note",
        f"The first samples are {short(deviation)} away from the parameters (root mean square), "
        f"and the parameters themselves have the size {short(weights)}: the noise drowns them. "
        f"The loss is {short(at_mean)} at the parameters and {short(at_draws)} at the samples.",
        "Raise hess_init (or init_precision; noise_scale down): the first deviation is "
        "1 / sqrt(ess * (hess_init + weight_decay)).",
    )]  # fmt: skip


# --- noise below the spacing of the weights -------------------------------------------------------


def of_narrow_noise(
    states: list[PyTree], params: Params, numbers: dict[str, float]
) -> list[Finding]:
    """Count the weights whose noise is lost in the rounding to their dtype."""

    @jax.jit
    def shares(states: list[PyTree], params: Params) -> dict[str, Array | None]:
        means: dict[str, list[Array]] = {}
        variances: dict[str, list[Array]] = {}
        for state in filter(keeps_weights, states):
            part = state.reader.part(state, params)
            variance = state.reader.variance(state, part, state.reader.posterior(state, part))
            for m, v in zip(jax.tree.leaves(part), jax.tree.leaves(variance), strict=True):
                means.setdefault(str(m.dtype), []).append(m)
                variances.setdefault(str(m.dtype), []).append(v)
        return {dtype: unmoved(part, variances[dtype]) for dtype, part in means.items()}

    shared = shares(states, params).items()
    found = {dtype: float(share) for dtype, share in shared if share is not None}
    if found:
        numbers["unmoved"] = max(found.values())
    findings = []
    for dtype, share in found.items():
        if share <= UNMOVED:
            continue
        narrow = _tree.narrow(jnp.dtype(dtype))
        what = (
            f"The posterior is narrower than the spacing of {dtype} at most of the weights of that "
            f"type ({100 * share:.3g} % of their noise "
        )
        if narrow:
            findings.append(Finding(
                "noise_below_spacing",
                "note",
                what + "is lost in rounding): there its draws equal its mean. Steps that measure "
                "the curvature by the noise draw noise as wide as rounding needs.",
                "If predictions are to show this posterior, keep the weights in float32, and cast "
                "them inside the loss.",
            ))  # fmt: skip
        else:
            findings.append(Finding(
                "noise_below_spacing",
                "warning",
                what + "is lost in rounding): there samples equal the mean, and a step measures no "
                "curvature.",
                "Look whether ess (or hess_init) is too large. Else let the weights lie near 0, "
                "adding a constant to them inside the loss, or take a wider dtype.",
            ))  # fmt: skip
    return findings


def of_steps(
    tx: optax.GradientTransformationExtraArgs,
    opt_state: OptState,
    params: Params,
    grads: Updates,
    extra: dict[str, Any],
    numbers: dict[str, float],
) -> list[Finding]:
    """Count the weights that the first step asks to move, and that rounding leaves in place."""

    @jax.jit
    def share(opt_state: OptState, params: Params, grads: Updates) -> Array:
        updates, _ = tx.update(grads, opt_state, params, **extra)
        after = optax.apply_updates(params, updates)
        asked = jax.tree.map(lambda u: u != 0, updates)
        lost = _tree.total(lambda a, x, m: jnp.sum(a & (x == m)), asked, after, params)
        return _tree.ratio(lost, _tree.total(jnp.sum, asked))

    found = float(share(opt_state, params, grads))
    numbers["steps_lost"] = found
    if found <= LOST:
        return []
    return [Finding(
        "steps_below_spacing",
        "note",
        f"The first step moves {100 * found:.3g} % of the weights by less than half of their "
        "spacing: rounding leaves them where they are, and will in every step of that size.",
        "Below float32, blr.round_stochastically() at the end of the chain takes such steps on "
        "average; or keep the weights in float32, and cast them inside the loss.",
    )]  # fmt: skip
