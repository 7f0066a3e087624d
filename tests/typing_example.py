"""What users write, for the type checker: an ordinary call must be no error; test_types runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import blr_optax as blr


def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean((x @ w - y) ** 2)


# Families, by name and by class, from numbers and from arrays.
gamma = blr.families.get("gamma").natural(concentration=2.0, rate=1.0)
also_gamma = blr.families.Gamma().natural(concentration=2, rate=np.ones(3))
normal = blr.families.Normal().natural(mean=0.0, precision=jnp.ones(2))
gaussian = blr.families.Gaussian().natural(mean=np.zeros(2), covariance=np.eye(2))
student = blr.families.StudentT().natural(mean=jnp.zeros(2), degrees=3.0, scale=jnp.eye(2))
field = blr.families.MeanField("normal")
lam = field.natural(mean={"w": jnp.zeros(3), "b": 0.0}, precision=4.0)
product = blr.families.Product({"w": "normal", "tau": blr.families.Gamma()})

# Distributions are values.
prior = blr.distribution("normal", mean=0.0, precision=1.0)
q = prior * blr.Distribution(prior.family, prior.natural) / prior
draws = (q**2.0).sample(jax.random.key(0), (10,))
also_draws = q.sample(0)
density = q.log_prob(jnp.array(0.5))

# Optimizers: numbers and schedules, seeds and keys.
params = jnp.zeros(3)
rate = optax.cosine_decay_schedule(0.1, 100)
transformations: list[optax.GradientTransformationExtraArgs] = [
    blr.ivon(0.1, ess=100),
    blr.ivon(rate, ess=lambda count: 100.0, weight_decay=1e-3, prior=prior, key=jax.random.key(1)),
    blr.evon(0.1, ess=100.0, hess_init=0.1, key=3),
    blr.vogn(0.1, ess=100, prior_precision=1.0),
    blr.adam(1e-3, ess=1000),
    blr.sgd(rate, momentum=0.9, ess=1000),
    blr.newton(loss, ess=10),
    blr.online_newton(loss, 0.5, ess=10),
    blr.blr_update("gaussian", loss, 0.1, ess=100, key=0),
    blr.blr_update(
        blr.families.Gaussian(),
        blr.estimators.conjugate(gaussian) + loss,
        lambda count: 1.0 / (1.0 + count),
        prior=blr.distribution("gaussian", mean=jnp.zeros(3), precision=jnp.eye(3)),
    ),
    blr.with_posterior(optax.adam(1e-3), blr.rule.PointReader(), ess=10.0),
]

# The loop, high and low.
tx = optax.chain(optax.clip_by_global_norm(1.0), blr.ivon(0.1, ess=100))
x, y = jnp.ones((8, 3)), jnp.ones(8)
step = blr.make_step(tx, loss, samples=2)
opt_state = tx.init(params)
params, opt_state, info = step(params, opt_state, x, y)
skipped: jax.Array = info.skipped
grads = jax.grad(loss)(blr.sample(opt_state, params), x, y)
est = blr.estimate(loss, opt_state, params, x, y, samples=2)
posterior: blr.Distribution = blr.posterior(opt_state, params)

# Predictions, metrics and figures.
predictive = blr.predict(0, posterior, lambda w, x: x @ w, x, link=blr.binary_link)
accuracy = blr.metrics.accuracy(np.array([[0.9, 0.1]]), np.array([0]))
crps = blr.metrics.gaussian_crps(0.0, 1.0, np.zeros(3))
figure = blr.plots.regression_band(np.arange(3.0), np.zeros(3), np.ones(3))
statistics = blr.per_example(loss, params, x, y, statistics=("sum_squares", "norms"))
