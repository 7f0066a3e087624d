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
# # Quickstart: from AdamW to IVON to predictions
#
# A trained network is one point in weight space. A *posterior* is a cloud around it: all the
# weights that the data cannot tell apart. `blr_optax` gives you the cloud for the price of the
# point. You keep your model, your loss and your loop, and you change the optimizer and one
# line.
#
# In this notebook we
#
# 1. train a small network with AdamW, on data that have a gap,
# 2. change it to IVON, a variational optimizer, and read off the posterior,
# 3. ask for predictions that know what they do not know,
# 4. do the same with images of digits, and measure how far the probabilities can be trusted.
#
# It takes about a minute of CPU time. What the text says about the results is `assert`ed in the
# code.

# %%
import warnings
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import blr_optax as blr
from blr_optax import metrics, plots
from blr_optax._predict import predict_regression

# %% [markdown]
# ## A curve with a hole in it
#
# Sixty noisy points on a curve, and none between -0.8 and 0.8. What should a network say there?

# %%
NOISE = 0.1


def curve(x: jax.Array) -> jax.Array:
    return jnp.sin(2.0 * x) + 0.3 * x


left, right, noise = jax.random.split(jax.random.key(0), 3)
x = jnp.concatenate(
    [
        jax.random.uniform(left, (30, 1), minval=-2.0, maxval=-0.8),
        jax.random.uniform(right, (30, 1), minval=0.8, maxval=2.0),
    ]
)
y = curve(x) + NOISE * jax.random.normal(noise, x.shape)

model = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(32), nn.tanh, nn.Dense(1)])
first_params = model.init(jax.random.key(1), x)


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of Gaussian noise, up to a constant."""
    return jnp.mean((model.apply(params, x) - y) ** 2) / (2.0 * NOISE**2)


# %% [markdown]
# ### AdamW: one curve
#
# `blr.make_step` makes the training step of any optimizer, here one of optax. Nothing here knows
# about posteriors.

# %%
tx = optax.adamw(3e-3)
step = blr.make_step(tx, loss, donate=False)
params, opt_state = first_params, tx.init(first_params)

adamw_losses = []
for _ in range(2000):
    params, opt_state, info = step(params, opt_state, x, y)
    adamw_losses.append(float(info.value))
adamw_params = params

print(f"AdamW: loss {adamw_losses[0]:.1f} -> {adamw_losses[-1]:.2f}")
assert adamw_losses[-1] < 0.05 * adamw_losses[0]

# %% [markdown]
# ### IVON: a cloud of curves
#
# One line is new: the optimizer is another one, and it wants to know how many examples the mean
# loss stands for (`ess`, the *effective sample size*): the more data, the smaller the cloud.
#
# ```diff
# - tx = optax.adamw(3e-3)
# + tx = blr.ivon(0.02, ess=len(x), hess_init=1.0, b2=0.9995, clip_radius=1.0)
# ```
#
# `params` stay what they were, the best single guess; they are now the mean of a Gaussian. Its
# width lives in the optimizer's state, where Adam keeps its second moments, in as much memory.
# What the step does differently is to take the gradient at a sample of that Gaussian,
# `blr.sample(opt_state, params)`, in place of its mean. A loop written by hand must do so too:
# with the gradient at `params` the width is wrong, and far too large.
# `blr.diagnostics` sees it: the score below is of size one then, and grows with the steps when
# all is right.

# %%
tx = blr.ivon(0.02, ess=len(x), hess_init=1.0, b2=0.9995, clip_radius=1.0)
step = blr.make_step(tx, loss, donate=False)
params, opt_state = first_params, tx.init(first_params)
diagnose = jax.jit(
    lambda old, new, params: blr.diagnostics(old, new, params, b2=0.9995, weight_decay=1e-4)[0]
)

ivon_losses, scores = [], []
for _ in range(4000):
    before = opt_state
    params, opt_state, info = step(params, opt_state, x, y)
    ivon_losses.append(float(info.value))
    if len(scores) < 200:
        scores.append(float(diagnose(before, opt_state, params).statistic_score))

print(f"IVON: loss {ivon_losses[0]:.1f} -> {np.mean(ivon_losses[-100:]):.2f}")
assert np.mean(ivon_losses[-100:]) < 0.1 * ivon_losses[0]
score = np.sum(scores) / np.sqrt(len(scores))
print(f"the statistic correlates with the noise: score {score:.0f}")
if score < 3.0:
    warnings.warn("the gradient was not taken at the sample; use blr.make_step", stacklevel=1)

# %% [markdown]
# ### The posterior is a value
#
# `blr.posterior` reads it off the optimizer's state. You can sample from it, ask for its mean,
# its variance or its entropy, save it, and hand it to the next task as a prior.

# %%
q = blr.posterior(opt_state, params)

spread = jnp.concatenate([jnp.sqrt(v).ravel() for v in jax.tree.leaves(q.variance)])
print(f"{spread.size} weights; standard deviations from {spread.min():.3f} to {spread.max():.3f}")

# Some weights matter, others do not: the posterior has found out which.
assert spread.max() > 2.0 * spread.min()
# Its mean is the parameters that we have trained.
assert jax.tree.all(jax.tree.map(partial(jnp.allclose, atol=1e-6), q.mean, params))

# %% [markdown]
# ### Predictions that know about the hole
#
# `predict_regression` averages over weights drawn from the posterior, and splits the variance
# in two: *epistemic* is what the weights disagree about, which more data would settle, and
# *aleatoric* is the noise, which they would not.

# %%
grid = jnp.linspace(-2.0, 2.0, 201)[:, None]
prediction = jax.jit(
    lambda q, x: predict_regression(
        jax.random.key(2), q, model.apply, x, noise_variance=NOISE**2, samples=128
    )
)(q, grid)

band = plots.regression_band(
    grid[:, 0],
    prediction.mean[:, 0],
    prediction.epistemic[:, 0],
    prediction.aleatoric[:, 0],
    data=(x[:, 0], y[:, 0]),
)
band

# %%
deviation = jnp.sqrt(prediction.epistemic[:, 0])
in_gap = jnp.abs(grid[:, 0]) < 0.5
near_data = (jnp.abs(grid[:, 0]) > 0.9) & (jnp.abs(grid[:, 0]) < 1.9)
print(f"epistemic standard deviation near data {deviation[near_data].mean():.3f}")
print(f"epistemic standard deviation in the gap {deviation[in_gap].mean():.3f}")

# The weights agree where there are data, and disagree where there are none.
assert deviation[in_gap].mean() > 1.5 * deviation[near_data].mean()
# The truth lies inside the band of two standard deviations almost everywhere.
error = jnp.abs(prediction.mean - curve(grid))
inside = jnp.mean(error < 2.0 * jnp.sqrt(prediction.variance))
print(f"{inside:.0%} of the true curve lies inside the band")
assert inside > 0.9

# %% [markdown]
# ## Digits: how far can the probabilities be trusted?
#
# Now a classifier: 8 x 8 images of handwritten digits, of which we use few, so that there is
# something to be unsure about. One training function serves both optimizers.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images = jnp.asarray(images[order] / 16.0, jnp.float32)
labels = jnp.asarray(labels[order])
train_x, train_y, test_x, test_y = images[:300], labels[:300], images[300:], labels[300:]

classifier = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])


def cross_entropy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = classifier.apply(params, x)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(tx: optax.GradientTransformation, steps: int = 1500) -> tuple[Any, Any, np.ndarray]:
    """Parameters, optimizer state and losses, after mini-batches of 50."""
    params = classifier.init(jax.random.key(3), train_x[:1])
    opt_state, step = tx.init(params), blr.make_step(tx, cross_entropy)
    losses = []
    for key in jax.random.split(jax.random.key(4), steps):
        batch = jax.random.randint(key, (50,), 0, len(train_x))
        params, opt_state, info = step(params, opt_state, train_x[batch], train_y[batch])
        losses.append(float(info.value))
    return params, opt_state, np.array(losses)


point, _, point_losses = train(optax.adamw(1e-3))
mean, state, cloud_losses = train(
    blr.ivon(0.1, ess=len(train_x), hess_init=0.5, b2=0.9995, clip_radius=1.0)
)
q = blr.posterior(state, mean)

# %% [markdown]
# `blr.predict` averages the class probabilities over the posterior, and splits their entropy in
# the same two parts. For AdamW there is one set of probabilities, from one set of weights.

# %%
averaged = jax.jit(lambda q, x: blr.predict(jax.random.key(5), q, classifier.apply, x, samples=64))(
    q, test_x
)
single = jax.nn.softmax(classifier.apply(point, test_x))


def report(name: str, probabilities: jax.Array) -> dict[str, float]:
    scores = {
        "accuracy": float(metrics.accuracy(probabilities, test_y)),
        "confidence": float(probabilities.max(-1).mean()),
        "NLL": float(metrics.nll(probabilities, test_y).mean()),
        "ECE": float(metrics.calibration(probabilities, test_y).ece),
    }
    print(f"{name:8s}" + "  ".join(f"{key} {value:.3f}" for key, value in scores.items()))
    return scores


adamw_scores = report("AdamW", single)
ivon_scores = report("IVON", averaged.probabilities)

# %% [markdown]
# On a task this small and clean the two are about equally accurate and equally likely: of three
# seeds that we tried, IVON had the better log-likelihood in two, and the better calibration
# error (ECE) in one. What did not depend on the seed is the *side* on which they err. AdamW
# claims more than it delivers: its mean confidence is above its accuracy. IVON, with a wide
# posterior from 300 images, promises less than it delivers. In the reliability diagram, its
# bars mostly end above the diagonal.
#
# Too cautious for your taste? A larger `ess` makes the posterior colder, and the predictions
# bolder.

# %%
assert abs(ivon_scores["accuracy"] - adamw_scores["accuracy"]) < 0.02
assert abs(ivon_scores["NLL"] - adamw_scores["NLL"]) < 0.06
assert adamw_scores["confidence"] > adamw_scores["accuracy"]
assert ivon_scores["confidence"] < ivon_scores["accuracy"]

reliability = plots.reliability_diagram(metrics.calibration(averaged.probabilities, test_y))
reliability

# %% [markdown]
# ### Where it errs, it knows
#
# A good uncertainty is large for the images that the model gets wrong. The area under the ROC
# curve of "is this an error?" is 0.5 for an uninformed uncertainty and 1 for a perfect one.

# %%
right = metrics.correct(averaged.probabilities, test_y)
separation = plots.entropy_histogram(
    averaged.total[right], averaged.total[~right], labels=("classified right", "classified wrong")
)
separation

# %%
area = metrics.auroc(averaged.total, ~right)
print(f"area under the ROC curve {area:.3f}")
assert area > 0.9

# %% [markdown]
# ### What it has never seen
#
# Noise is no digit. The classifier must answer something, but the weights need not agree on it.

# %%
strange = jax.random.uniform(jax.random.key(6), (500, 64))
on_noise = jax.jit(lambda q, x: blr.predict(jax.random.key(7), q, classifier.apply, x, samples=64))(
    q, strange
)

print(f"disagreement on digits {averaged.epistemic.mean():.3f} nats", end=", ")
print(f"on noise {on_noise.epistemic.mean():.3f} nats")
assert on_noise.epistemic.mean() > 2.0 * averaged.epistemic.mean()

# %% [markdown]
# ## Where to go from here
#
# - Another framework? `docs/recipes.md` has tested loops for plain JAX, Linen, nnx, gradient
#   accumulation, posteriors over a part of the model, and checkpoints.
# - Several samples per step: `blr.make_step(tx, loss, samples=4, antithetic=True)`.
# - Not a Gaussian, or not a network? `blr.blr_update` is the same rule for any exponential family.
#
# Three knobs are worth knowing. `learning_rate` is as in SGD, often larger than Adam's.
# `hess_init` sets the width at the start: if the loss stays high from the first step, the cloud
# is too wide, and a larger `hess_init` helps. `b2` sets how fast the width is learnt; the runs
# here are short, so it is smaller than the default, which suits runs of many epochs.
