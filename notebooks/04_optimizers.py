# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Optimizers: one rule, many posteriors
#
# Every optimizer here is the Bayesian learning rule with a choice of posterior family, of where
# the loss is looked at, and of how the step is made; `print(blr.table())` lists them. In this
# notebook the choice of posterior becomes visible:
#
# 1. two moons with bSAM (a Gaussian), BayesBiNN and STE (signs): decision boundaries,
# 2. dropout, whose posterior is a mixture for every unit,
# 3. a mixture of Gaussians that finds all modes of a target where one Gaussian finds one,
# 4. flat minima: as the posterior grows wider the solution moves from a sharp minimum to a flat
#    one, and so does SGD as its steps grow.
#
# What the text says about the results is `assert`ed in the code.

# %%
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import make_moons

import blr_optax as blr
from blr_optax import metrics

points, labels = make_moons(400, noise=0.25, random_state=0)
centre, scale = points.mean(0), points.std(0)
points = ((points - centre) / scale).astype(np.float32)
train_x, train_y = jnp.asarray(points[:200]), jnp.asarray(labels[:200])
# So many that accuracies are known to half a percent.
points, labels = make_moons(4000, noise=0.25, random_state=1)
points = ((points - centre) / scale).astype(np.float32)
test_x, test_y = jnp.asarray(points), jnp.asarray(labels)

# %% [markdown]
# ## 1. Two moons
#
# One network for all: two hidden layers of 32 tanh units, every matrix divided by the root of its
# number of inputs, so that weights of size one are natural, and signs can be weights too.

# %%
WIDTH, STEPS = 32, 2000
SHAPES = {
    "w0": (2, WIDTH), "b0": (WIDTH,), "w1": (WIDTH, WIDTH), "b1": (WIDTH,), "w2": (WIDTH, 1),
    "b2": (1,),
}  # fmt: skip
keys = jax.random.split(jax.random.key(0), len(SHAPES))
first = {
    name: jax.random.normal(key, shape)
    for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
}


def logits(w: Any, x: jax.Array) -> jax.Array:
    h = x
    for layer in range(2):
        h = jnp.tanh(2.0 * (h @ w[f"w{layer}"] / np.sqrt(h.shape[1]) + w[f"b{layer}"]))
    return 4.0 * (h @ w["w2"][:, 0] / np.sqrt(WIDTH) + w["b2"][0])


def loss(w: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(logits(w, x), y))


def fit(tx: optax.GradientTransformation, params: Any, **options: Any) -> tuple[Any, Any]:
    """The same loop for every optimizer: estimate, update, apply."""

    def step(carry: tuple, key: jax.Array) -> tuple:
        params, state = carry
        rows = jax.random.choice(key, len(train_x), (40,), replace=False)
        est = blr.estimate(loss, state, params, train_x[rows], train_y[rows], **options)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), keys)[0])
    return run(params)


def cosine(rate: float) -> Callable:
    return optax.cosine_decay_schedule(rate, STEPS)


# %% [markdown]
# bSAM takes two gradients a step: one at a sample of its posterior, one at the worst point nearby.
# `split=True` gives each of five samples its own fifth of the batch (m-sharpness). BayesBiNN's
# parameters are the natural parameters of a distribution over signs; STE looks at the most likely
# signs only, and has no posterior worth averaging.

# %%
bsam, bsam_state = fit(blr.bsam(cosine(0.5), ess=200, rho=0.05), first, samples=5, split=True)
binary, binary_state = fit(
    blr.bayesbinn(cosine(0.01), ess=200, temperature=0.5, b1=0.9, kl_weight=0.1),
    blr.random_signs(jax.random.key(2), first, 1.0),
    samples=5,
)
latent, latent_state = fit(blr.ste(cosine(0.01)), jax.tree.map(lambda m: 0.1 * m, first))


def averaged(q: Any) -> Callable:
    """Probability of class 1 and its epistemic part, averaged over 64 draws of q."""

    @jax.jit
    def probability(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = blr.predict(jax.random.key(3), q, logits, x, link=blr.binary_link)
        return found.probabilities[:, 1], found.epistemic

    return probability


def single(w: Any) -> Callable:
    """Probability of class 1 of one network."""
    return jax.jit(lambda x: (jax.nn.sigmoid(logits(w, x)), jnp.zeros(len(x))))


models = {
    "bSAM, 64 samples": averaged(blr.posterior(bsam_state, bsam)),
    "BayesBiNN, 64 binary networks": averaged(blr.posterior(binary_state, binary)),
    "STE, one binary network": single(blr.sample(latent_state, latent)),
}
grid = jnp.stack(jnp.meshgrid(jnp.linspace(-3, 3, 61), jnp.linspace(-3, 3, 61)), -1)


def boundaries(models: dict[str, Callable]) -> dict[str, float]:
    """One panel per model; returns the accuracies on the test half."""
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.8))
    accuracies = {}
    for ax, (name, model) in zip(axes, models.items(), strict=True):
        p, _ = model(grid.reshape(-1, 2))
        shown = ax.contourf(
            *grid.T, p.reshape(61, 61).T, np.linspace(0, 1, 21), cmap="RdBu_r", alpha=0.7
        )
        ax.contour(*grid.T, p.reshape(61, 61).T, [0.5], colors="k")
        ax.scatter(
            *test_x[:200].T, c=test_y[:200], cmap="RdBu_r", s=8, edgecolors="k", linewidths=0.3
        )
        p = model(test_x)[0]
        probs = jnp.stack([1 - p, p], -1)
        accuracies[name] = float(metrics.accuracy(probs, test_y))
        nll = float(jnp.mean(metrics.nll(probs, test_y)))
        ax.set_title(f"{name}\naccuracy {accuracies[name]:.3f}, NLL {nll:.2f}", fontsize=10)
    figure.colorbar(shown, ax=axes, label="probability of class 1")
    plt.show()
    return accuracies


accuracies = boundaries(models)
assert accuracies["bSAM, 64 samples"] > 0.9
assert min(accuracies.values()) > 0.8

# %% [markdown]
# All weights of a binary network are signs, yet BayesBiNN's average has soft boundaries: it knows
# which signs the data leave open. Far from the data it is less sure of itself than its own most
# likely network, and bSAM's average is less sure than bSAM's mean.

# %%
far = jnp.array([[3.0, -3.0], [-3.0, 3.0], [3.0, 3.0], [-3.0, -3.0]])
alone = {
    "bSAM, its mean": single(bsam),
    "BayesBiNN, most likely network": single(jax.tree.map(jnp.sign, binary)),
}
confidence = {
    name: float(jnp.mean(jnp.maximum(p := model(far)[0], 1 - p)))
    for name, model in (models | alone).items()
}
for name, value in confidence.items():
    print(f"{name:30} mean confidence at the corners {value:.3f}")
assert all(np.all(np.abs(w) == 1) for w in jax.tree.leaves(blr.sample(latent_state, latent)))
signs = blr.posterior(binary_state, binary).sample(jax.random.key(6), (2,))
assert all(np.all(np.abs(w) == 1) for w in jax.tree.leaves(signs))
assert confidence["bSAM, 64 samples"] < confidence["bSAM, its mean"]
average, one = "BayesBiNN, 64 binary networks", "BayesBiNN, most likely network"
assert confidence[average] < confidence[one]

# %% [markdown]
# ## 2. Dropout is a mixture
#
# `blr.dropout` goes around any optimizer. Weights of a unit are either kept, or dropped to zero:
# the posterior is a mixture of two Gaussians for every unit, one of them fixed. The network needs
# no dropout layers, the weights at which the loss is looked at have their units dropped. The mean
# of that mixture, keep rate times the weights, is what "test-time scaling" uses.

# %%
keep = 0.8
dropped, dropped_state = fit(
    blr.dropout(
        optax.adam(cosine(0.01)), keep, mask={name: name in ("w1", "w2") for name in SHAPES}
    ),
    first,
)
q = blr.posterior(dropped_state, dropped)
np.testing.assert_allclose(q.mean["w1"], keep * dropped["w1"], rtol=1e-5)
np.testing.assert_allclose(q.mean["w0"], dropped["w0"], rtol=1e-5)
draws = q.sample(jax.random.key(4), (2000,))["w2"][:, :, 0]
unit = int(jnp.argmax(jnp.abs(dropped["w2"][:, 0])))
share = float(jnp.mean(draws[:, unit] != 0))
print(f"unit {unit}: kept in {share:.1%} of the draws")
assert abs(share - keep) < 0.05

accuracies = boundaries(
    {
        "dropout, posterior mean": single(q.mean),
        "dropout, 64 masks": averaged(q),
        "all units kept": single(dropped),
    }
)
assert accuracies["dropout, posterior mean"] > 0.9

# %% [markdown]
# ## 3. Mixtures find all modes
#
# A target with four modes. One Gaussian settles on one mode or stretches over several; a mixture
# has a component for each: the entropy of the mixture pushes components apart where they overlap
# (`mixture_vi`; `mixture_newton` is the same with the delta method, Khan and Rue's multimodal
# optimisation). Mixing weights are learnt too.

# %%
centres = jnp.array([[-2.5, 0.0], [2.5, 0.5], [0.0, 2.5], [0.5, -2.5]])
parts = jnp.array([0.4, 0.3, 0.2, 0.1])
deviations = jnp.array([[0.5, 0.9], [0.5, 0.5], [0.9, 0.4], [0.6, 0.4]])


def log_target(theta: jax.Array) -> jax.Array:
    scaled = (theta - centres) / deviations
    log_p = -0.5 * jnp.sum(scaled**2, 1) - jnp.sum(jnp.log(deviations), 1) - jnp.log(2 * jnp.pi)
    return jax.nn.logsumexp(log_p + jnp.log(parts))


def approximate(components: int) -> Any:
    tx = blr.mixture_vi(lambda theta: -log_target(theta), 0.05, components, scale=2.0, key=2)

    def step(carry: tuple, _: Any) -> tuple:
        params, state = carry
        updates, state = tx.update(None, state, params)
        return (params + updates, state), None

    start = jnp.zeros(2)
    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, 600)[0])
    params, state = run(start)
    return blr.posterior(state, params)


@jax.jit
def divergence(q: Any) -> jax.Array:
    """KL(q || target) from 4000 draws."""
    theta = q.sample(jax.random.key(5), (4000,))
    return jnp.mean(q.log_prob(theta) - jax.vmap(log_target)(theta))


found = {count: approximate(count) for count in (1, 4, 8)}
plane = jnp.stack(jnp.meshgrid(jnp.linspace(-5, 5, 101), jnp.linspace(-5, 5, 101)), -1)
density = jnp.exp(jax.jit(jax.vmap(jax.vmap(log_target)))(plane))
figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), sharey=True)
axes[0].contourf(*plane.T, density.T, 20, cmap="Greys")
axes[0].set_title("target")
gaps = {}
for ax, (count, q) in zip(axes[1:], found.items(), strict=True):
    gaps[count] = float(divergence(q))
    ax.contourf(*plane.T, jnp.exp(jax.jit(q.log_prob)(plane)).T, 20, cmap="Greys")
    ax.plot(*q.standard()["mean"].T, "r+")
    ax.set_title(f"{count} component{'s' if count > 1 else ''}: KL {gaps[count]:.2f}")
plt.show()
print({count: round(gap, 3) for count, gap in gaps.items()})
assert gaps[4] < 0.5 * gaps[1]
assert np.ptp(found[8].standard()["weights"]) > 0.02  # they started equal
assert gaps[8] < 0.2
nearest = jnp.linalg.norm(found[8].standard()["mean"][:, None] - centres, axis=-1).min(0)
assert float(nearest.max()) < 1.0, "every mode has a component"

# %% [markdown]
# ## 4. Flat minima
#
# A loss with a deep sharp minimum at -0.5 and a shallower flat one at 0.7. The rule minimises
# $E_q[\ell]$, the loss smoothed by the posterior. With a narrow posterior of known variance the
# sharp minimum stays where it is; as the variance grows it vanishes and the solution moves to the
# flat minimum. Here $E_q[\ell]$ is known in closed form, as a function of $\mu$ (`closed_form()`).

# %%
SHARP, FLAT = (1.2, -0.5, 0.06), (1.0, 0.7, 0.6)  # depth, centre, width


def smoothed(m: jax.Array, variance: Any) -> jax.Array:
    """E_q[loss] for q = N(m, variance); the loss itself at variance 0."""

    def bump(depth: float, centre: float, width: float) -> jax.Array:
        total = width**2 + variance
        return depth * width / jnp.sqrt(total) * jnp.exp(-0.5 * (m - centre) ** 2 / total)

    return 0.02 * (m**2 + variance) - bump(*SHARP) - bump(*FLAT)


family = blr.families.get("gaussian_fixed")
start = jnp.array([-0.5])


def settle(deviation: jax.Array) -> jax.Array:
    """Where gradient descent on the smoothed loss ends that starts in the sharp minimum."""
    precision = 1 / deviation**2
    tx = blr.blr_update(
        "gaussian_fixed",
        lambda mu: smoothed(mu.linear[0], deviation**2),
        0.002 * precision,
        init=blr.Distribution(family, family.natural(mean=start, precision=precision * jnp.eye(1))),
        estimator=blr.estimators.closed_form(),
    )

    def step(carry: tuple, _: Any) -> tuple:
        m, state = carry
        updates, state = tx.update(None, state, m)
        return (m + updates, state), None

    return jax.lax.scan(step, (start, tx.init(start)), None, 8000)[0][0][0]


def sgd(rate: jax.Array, key: jax.Array) -> jax.Array:
    """Where SGD with noisy gradients ends."""
    tx = blr.sgd(rate)

    def step(carry: tuple, key: jax.Array) -> tuple:
        m, state = carry
        grad = jax.grad(smoothed)(m, 0.0) + 0.3 * jax.random.normal(key)
        updates, state = tx.update(grad, state, m)
        return (m + updates, state), None

    m = jnp.asarray(-0.5)
    return jax.lax.scan(step, (m, tx.init(m)), jax.random.split(key, 2000))[0][0]


widths = jnp.linspace(0.02, 0.8, 27)
solutions = jax.jit(jax.vmap(settle))(widths)
rates = jnp.geomspace(0.003, 0.3, 15)
seeds = jax.random.split(jax.random.key(0), 50)
ends = jax.jit(jax.vmap(lambda rate: jax.vmap(lambda key: sgd(rate, key))(seeds)))(rates)

figure, axes = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
line = jnp.linspace(-1.5, 2.5, 400)
for deviation in (0.0, 0.1, 0.2, 0.4):
    axes[0].plot(line, smoothed(line, deviation**2), label=f"deviation {deviation}")
axes[0].set(title="the loss, smoothed by the posterior", xlabel="mean")
axes[0].legend()
axes[1].plot(widths, solutions, "o-")
axes[1].set(title="the rule", xlabel="deviation of the posterior", ylabel="solution")
axes[2].semilogx(jnp.repeat(rates, len(seeds)), ends.ravel(), ".", alpha=0.1)
axes[2].semilogx(rates, jnp.median(ends, 1), "o-")
axes[2].set(title="SGD, 50 runs each", xlabel="step size", ylabel="end")
for ax in axes[1:]:
    ax.axhline(-0.5, ls=":", color="tab:red")
    ax.axhline(0.7, ls=":", color="tab:green")
plt.show()

change = float(widths[jnp.argmax(solutions > 0)])
print(f"the rule leaves the sharp minimum at a deviation of {change:.2f}")
assert jnp.all(solutions[widths < 0.15] < -0.4)
assert jnp.all(solutions[widths > 0.3] > 0.4)
share = jnp.mean(ends > 0, 1)
print(f"SGD's share of runs in the flat minimum: {share[0]:.2f} at the smallest step, "
      f"{share[-1]:.2f} at the largest")  # fmt: skip
assert share[0] == 0.0
assert share[-1] == 1.0

# %% [markdown]
# The posterior that the rule assigns to SGD has the variance step size over `ess`: a larger step
# goes with a wider posterior. (What drives SGD out here is the step itself, too large for the
# curvature of the sharp minimum, helped by the noise of its gradients.)
