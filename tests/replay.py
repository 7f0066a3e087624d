"""Replay of recorded trajectories: the golden problems, their flat vectors, and all their steps.

A trajectory is one program (`tools.run_steps`); what it saw is compared step by step in numpy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import blr_optax as blr

RELATIVE = {"float64": 1e-9, "float32": 1e-3}


def problem_loss(problem):
    """loss(theta, batch indices) of a golden problem; theta is a dict of the named leaves."""
    kind = problem["kind"]
    if kind == "quadratic":
        a, b = np.array(problem["A"]), np.array(problem["b"])
        return lambda w, _: 0.5 * (w["theta"] - b) @ a @ (w["theta"] - b)
    if kind == "doublewell":
        a, c = np.array(problem["a"]), np.array(problem["c"])
        return lambda w, _: (
            jnp.sum(0.25 * w["theta"] ** 4 - 0.5 * a * w["theta"] ** 2 + c * w["theta"])
            + 0.1 * jnp.sum(w["theta"]) ** 2
        )
    x, y = jnp.array(problem["X"]), jnp.array(problem["y"])
    if kind == "logreg":

        def logistic(w, index):
            z = x[index] @ w["theta"]
            return jnp.mean(jax.nn.softplus(z) - y[index] * z)

        return logistic

    def mlp(w, index):
        hidden = jnp.tanh(x[index] @ w["W1"].T + w["b1"])
        logits = hidden @ w["W2"].T + w["b2"]
        chosen = jnp.take_along_axis(logits, y[index][:, None].astype(int), axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    return mlp


def unflatten(flat, names, shapes):
    """A dict of leaves from the file's flat vector(s), in numpy; leading axes stay."""
    flat, leaves, start = np.asarray(flat), {}, 0
    for name, shape in zip(names, shapes, strict=True):
        size = int(np.prod(shape))
        leaves[name] = flat[..., start : start + size].reshape(*flat.shape[:-1], *shape)
        start += size
    assert start == flat.shape[-1]
    return leaves


def flatten(tree, names):
    """One flat vector for every step of a dict of stacked leaves."""
    return np.concatenate([np.reshape(tree[name], (len(tree[name]), -1)) for name in names], 1)


def recorded(case, name):
    """One entry of every step of a case, stacked; None where the file has none."""
    steps = [step[name] for step in case["steps"]]
    return None if steps[0] is None else np.array(steps)


def noise_and_batches(case, names, shapes):
    """What `estimate` gets at every step: the recorded noise, as leaves, and the indices."""
    return unflatten(recorded(case, "eps"), names, shapes), recorded(case, "batch")


def follows(actual, expected, relative, what):
    """Relative to the largest entry of the recorded vector."""
    expected = np.asarray(expected)
    error = np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-300)
    assert error <= relative, f"{what}: relative error {error:.2e}"


def follow(actual, expected, relative, what):
    """Every step of a trajectory."""
    for t, (found, wanted) in enumerate(zip(actual, expected, strict=True)):
        follows(found, wanted, relative, f"{what}, step {t}")


def keywords(hyper, **more):
    """Our names for the official constructor arguments."""
    price = hyper.get("hess_approx", "price") == "price"
    return {
        "ess": hyper["ess"],
        "hess_init": hyper["hess_init"],
        "b1": hyper["beta1"],
        "b2": hyper["beta2"],
        "weight_decay": hyper.get("weight_decay", 0.0),
        "clip_radius": hyper["clip_radius"],
        "rescale_lr": hyper["rescale_lr"],
        "debias": hyper["debias"],
        "curvature": "reparameterized" if price else blr.estimators.squared_gradient(official=True),
        **more,
    }


def recorded_rates(case):
    """The recorded learning rates as a schedule."""
    rates = jnp.array(recorded(case, "lr"))
    return lambda count: rates[count]


def averaged(loss, state, params, noise, batches, **options):
    """One estimate per recorded sample, each on its own batch, averaged."""

    def one(noise, batch):
        noise = jax.tree.map(lambda x: x[None], noise)
        return blr.estimate(loss, state, params, batch, noise=noise, **options)

    return jax.tree.map(lambda x: jnp.mean(x, 0), jax.vmap(one)(noise, batches))


def leaves_of(state, field):
    """The leaves of a field by name, of all groups of a partition."""
    return {
        name: x
        for _, tree in optax.tree.get_all_with_path(state, field)
        for name, x in tree.items()
        if isinstance(x, jax.Array)
    }


def step_of(tx, loss, **options):
    """One step of IVON on recorded noise, and what is compared of it."""

    def step(carry, given):
        params, state = carry
        est = averaged(loss, state, params, *given, **options)
        updates, state = tx.update(est.grad, state, params, statistic=est.statistic)
        params = optax.apply_updates(params, updates)
        return (params, state), {
            "gradient": est.grad,
            "mean": params,
            "precision": leaves_of(state, "precision"),
            "momentum": leaves_of(state, "ema"),
        }

    return step


def start_of(tx, params):
    """The first carry of a trajectory: parameters in jax's own dtypes, and their state."""

    def start():
        mean = jax.tree.map(jnp.asarray, params)
        return mean, tx.init(mean)

    return start


def check_steps(seen, case, names, relative, weight_decay):
    """Parameters, h and momentum follow the recorded ones after every step."""
    follow(flatten(seen["mean"], names), recorded(case, "mean"), relative, "mean")
    # h may pass through zero; its natural scale is the precision h + delta.
    hess, wanted = flatten(seen["precision"], names) - weight_decay, recorded(case, "hess")
    scale = np.max(np.abs(wanted + weight_decay), axis=1)
    error = np.max(np.abs(hess - wanted), axis=1)
    assert np.all(error <= relative * scale), f"h: relative errors {error / scale}"
    follow(flatten(seen["momentum"], names), recorded(case, "momentum"), relative, "momentum")
