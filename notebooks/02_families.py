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
# # Families: one rule for any exponential family
#
# The Bayesian learning rule
#
# $$\lambda \leftarrow \lambda - \rho\, \nabla_\mu \left\{ E_q[\text{loss}] - H(q) \right\}$$
#
# knows nothing about Gaussians. It needs a family $q(\theta) = h(\theta) \exp(\langle \lambda,
# T(\theta) \rangle - A(\lambda))$ and its two coordinate systems, natural parameters $\lambda$ and
# expectation parameters $\mu = E_q[T]$. In this notebook we
#
# 1. look at a family from both sides,
# 2. get Bayes' theorem from one step of the rule,
# 3. fit where there is no conjugacy, with several estimators of the same natural gradient,
# 4. add a family of our own, and use it at once,
# 5. leave the exponential families: a mixture that finds two modes.
#
# What the text says about the results is `assert`ed in the code.

# %%
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import blr_optax as blr
from blr_optax import estimators, families

print(", ".join(families.names()))

# %% [markdown]
# ## Two coordinate systems
#
# A gamma density in standard, natural and expectation parameters. `natural_from_expectation` has
# no closed form here; it is solved to the last digit the expectation parameters carry.

# %%
gamma = families.get("gamma")
lam = gamma.natural(concentration=3.0, rate=2.0)
mu = gamma.expectation(lam)
print("lambda =", lam)
print("mu     =", mu)
back, converged = gamma.natural_from_expectation(mu, with_status=True)
assert bool(converged)
assert jnp.allclose(jnp.stack(back), jnp.stack(lam), rtol=1e-4)

# %% [markdown]
# The two types do not mix: adding a $\mu$ to a $\lambda$ is an error, not a number.

# %%
try:
    lam + mu
except TypeError as error:
    print(error)
else:
    raise AssertionError("natural and expectation parameters must not add")

# %% [markdown]
# ## Bayes' theorem is one step
#
# Counts from a Poisson distribution, a gamma prior on its rate. The expected loss is linear in
# $\mu = (E[\log r], E[r])$, so we write it as a function of $\mu$ and let `closed_form()`
# differentiate it. With learning rate 1, one step from *any* start is the posterior.

# %%
counts = jnp.array([4.0, 2.0, 7.0, 3.0, 5.0])


def energy(mu: Any, y: jax.Array) -> jax.Array:
    """-E_q[log p(y | rate)] up to a constant."""
    return -jnp.sum(y * mu.log - mu.linear)


prior = blr.Distribution(gamma, gamma.natural(concentration=2.0, rate=1.0))
start = blr.Distribution(gamma, gamma.natural(concentration=0.3, rate=5.0))
bayes = blr.blr_update(
    "gamma", energy, 1.0, prior=prior, init=start, estimator=estimators.closed_form()
)
rate = start.mean
updates, state = bayes.update(None, bayes.init(rate), rate, batch=(counts,))
posterior = blr.posterior(state, rate + updates)
print(posterior.standard())
assert jnp.allclose(posterior.standard()["concentration"], 2.0 + counts.sum(), rtol=1e-5)
assert jnp.allclose(posterior.standard()["rate"], 1.0 + counts.size, rtol=1e-5)

# %%
grid = jnp.linspace(0.01, 10, 400)
figure, axis = plt.subplots(layout="constrained", figsize=(6, 3.2))
for name, q in [("prior", prior), ("start", start), ("posterior", posterior)]:
    axis.plot(grid, jnp.exp(q.log_prob(grid)), label=name)
axis.set(xlabel="rate", ylabel="density", ylim=(0, 1.0))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Without conjugacy
#
# A loss that is not linear in the statistics. Its natural gradient can be estimated from samples
# with gradients, from values only by covariances, or by regressing the values on $T$. All three
# aim at the same direction; they differ in noise, and gradients know most.


# %%
def bent(rate: jax.Array) -> jax.Array:
    return jnp.log1p((rate - 3.0) ** 2)


ways = {
    "pathwise": estimators.pathwise(100),
    "least squares": estimators.least_squares(100),
    "score function": estimators.score_function(100),
}
keys = jax.random.split(jax.random.key(0), 200)
figure, axes = plt.subplots(1, 3, layout="constrained", figsize=(9, 3), sharex=True, sharey=True)
spread = {}
for axis, (name, way) in zip(axes, ways.items(), strict=True):
    gradient = jax.jit(jax.vmap(estimators.natural_gradient("gamma", bent, way), (0, None)))
    found = gradient(keys, lam)[1]
    spread[name] = float(jnp.std(found.log))
    axis.scatter(found.log, found.linear, s=4)
    axis.set(title=name, xlabel="gradient in E[log r]")
axes[0].set(ylabel="gradient in E[r]")
plt.show()
print(spread)
assert spread["pathwise"] == min(spread.values())

# %% [markdown]
# ## A family of our own
#
# The Rayleigh distribution (the length of a vector of two normal numbers) is not in the registry.
# What a family must say about itself is its statistic, log-partition, base measure, standard
# parameters, samples and first moments, and the domain of $\lambda$. With
#
# $$q(x) = \frac{x}{s^2} e^{-x^2 / 2 s^2}, \quad T = x^2, \quad \lambda = -\tfrac{1}{2 s^2}, \quad
# A = -\log(-2 \lambda), \quad h = x$$


# %%
@families.parameters
class RayleighNatural(NamedTuple):
    """lambda = -1 / (2 s^2)."""

    square: Any


@families.parameters
class RayleighExpectation(NamedTuple):
    """mu = E[x^2]."""

    square: Any


@families.register("rayleigh")
@dataclasses.dataclass(frozen=True)
class Rayleigh(families.ExponentialFamily):
    """log q(x) = log x - 2 log s - x^2 / (2 s^2)."""

    Natural: ClassVar[type] = RayleighNatural
    Expectation: ClassVar[type] = RayleighExpectation
    domains: ClassVar[dict] = {"square": families.Domain(sign=-1)}
    constant_base_measure: ClassVar[bool] = False

    def natural(self, *, scale: Any) -> RayleighNatural:
        return RayleighNatural(-0.5 / jnp.square(jnp.asarray(scale)))

    def standard(self, lam: RayleighNatural) -> dict[str, jax.Array]:
        return {"scale": jnp.sqrt(-0.5 / lam.square)}

    def log_partition(self, lam: RayleighNatural) -> jax.Array:
        return -jnp.log(-2.0 * lam.square)

    def sufficient_statistics(self, theta: jax.Array, lam: Any = None) -> RayleighExpectation:
        return RayleighExpectation(theta * theta)

    def log_base_measure(self, lam: RayleighNatural, theta: jax.Array) -> jax.Array:
        return jnp.log(theta) + 0.0 * lam.square

    def expected_log_base_measure(self, lam: RayleighNatural) -> jax.Array:
        return 0.5 * (jnp.log(-1.0 / lam.square) - np.euler_gamma)

    def sample(self, key: jax.Array, lam: RayleighNatural, shape: tuple = ()) -> jax.Array:
        scale = self.standard(lam)["scale"]
        return scale * jax.random.rayleigh(key, 1.0, shape + scale.shape)

    def mean(self, lam: RayleighNatural) -> jax.Array:
        return jnp.sqrt(jnp.pi / 2) * self.standard(lam)["scale"]

    def variance(self, lam: RayleighNatural) -> jax.Array:
        return (2 - jnp.pi / 2) * jnp.square(self.standard(lam)["scale"])


# %% [markdown]
# Everything else follows: $\mu$, the map back, entropy, divergences, the Fisher matrix, steps that
# stay in the domain, posteriors as values, and the rule.

# %%
rayleigh = families.get("rayleigh")
one, two = rayleigh.natural(scale=1.0), rayleigh.natural(scale=2.0)
x = jnp.linspace(1e-4, 30, 200_001)
p, q = (jnp.exp(rayleigh.log_prob(lam, x)) for lam in (one, two))
by_hand = jnp.trapezoid(p * (rayleigh.log_prob(one, x) - rayleigh.log_prob(two, x)), x)
print("KL", rayleigh.kl(one, two), "by quadrature", by_hand)
assert jnp.allclose(rayleigh.kl(one, two), by_hand, rtol=1e-3)
assert jnp.allclose(rayleigh.expectation(two).square, 8.0)
assert jnp.allclose(rayleigh.natural_from_expectation(rayleigh.expectation(two)).square, two.square)
assert jnp.allclose(rayleigh.fisher(two), 64.0)
assert bool(rayleigh.in_domain(rayleigh.retract(one, RayleighNatural(jnp.array(1e6)))))

# %% [markdown]
# And it learns. The optimum of $E_q[(x - 2)^2] - H(q)$ over all Rayleigh densities, by the rule
# with samples, beside a scan over the scale:

# %%
tx = blr.blr_update(
    "rayleigh",
    lambda x: (x - 2.0) ** 2,
    optax.exponential_decay(0.3, 50, 0.3),
    init=blr.Distribution(rayleigh, one),
    estimator=estimators.pathwise(200),
)
params = rayleigh.mean(one)
state = tx.init(params)
step = jax.jit(lambda s, p: tx.update(None, s, p))
for _ in range(150):
    updates, state = step(state, params)
    params = params + updates
scale = float(blr.posterior(state, params).standard()["scale"])

scales = jnp.linspace(0.3, 3, 500)
lams = rayleigh.natural(scale=scales)
free_energy = (
    rayleigh.expectation(lams).square - 4 * rayleigh.mean(lams) + 4 - rayleigh.entropy(lams)
)
best = float(scales[jnp.argmin(free_energy)])
print(f"by the rule {scale:.3f}, by the scan {best:.3f}")
assert abs(scale - best) < 0.03

# %% [markdown]
# ## Beyond exponential families
#
# A mixture of Gaussians is no exponential family, but its joint density with the component is one
# conditionally, and the rule updates it block by block. Two modes, two components:


# %%
def two_modes(theta: jax.Array) -> jax.Array:
    """-log of an even mixture of two round Gaussians at (-2, 0) and (2, 0)."""
    centres = jnp.array([[-2.0, 0.0], [2.0, 0.0]])
    return -jax.nn.logsumexp(-0.5 * jnp.sum((theta - centres) ** 2, axis=-1) / 0.3)


mixture = families.get("mixture", family=families.get("gaussian"))
first = blr.Distribution(
    mixture,
    mixture.natural(
        weights=jnp.array([0.5, 0.5]),
        mean=jnp.array([[-0.5, 0.5], [0.5, -0.5]]),
        precision=jnp.stack([jnp.eye(2)] * 2),
    ),
)
tx = blr.blr_update(mixture, two_modes, 0.1, init=first)
params = first.mean
state = tx.init(params)
step = jax.jit(lambda s, p: tx.update(None, s, p))
for _ in range(150):
    updates, state = step(state, params)
    params = params + updates
q = blr.posterior(state, params)
means = q.standard()["mean"]
print(means)
assert jnp.allclose(jnp.sort(means[:, 0]), jnp.array([-2.0, 2.0]), atol=0.2)

axes_x, axes_y = jnp.meshgrid(jnp.linspace(-4, 4, 120), jnp.linspace(-2.5, 2.5, 80))
points = jnp.stack([axes_x, axes_y], -1)
figure, axes = plt.subplots(1, 3, layout="constrained", figsize=(9, 2.6), sharex=True, sharey=True)
panels = {
    "target": jnp.exp(-jax.vmap(jax.vmap(two_modes))(points)),
    "first": jnp.exp(first.log_prob(points)),
    "learnt": jnp.exp(q.log_prob(points)),
}
for axis, (name, density) in zip(axes, panels.items(), strict=True):
    axis.contourf(axes_x, axes_y, density, levels=12, cmap="Blues")
    axis.set_title(name)
plt.show()
