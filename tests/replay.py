"""Replay of recorded trajectories: the golden problems, their flat vectors, and one step each."""

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
        a, b = jnp.array(problem["A"]), jnp.array(problem["b"])
        return lambda w, _: 0.5 * (w["theta"] - b) @ a @ (w["theta"] - b)
    if kind == "doublewell":
        a, c = jnp.array(problem["a"]), jnp.array(problem["c"])
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
    """A dict of leaves from the file's flat vector(s); leading axes stay."""
    flat, leaves, start = np.asarray(flat), {}, 0
    for name, shape in zip(names, shapes, strict=True):
        size = int(np.prod(shape))
        leaves[name] = jnp.array(flat[..., start : start + size].reshape(*flat.shape[:-1], *shape))
        start += size
    assert start == flat.shape[-1]
    return leaves


def flatten(tree, names):
    return np.concatenate([np.ravel(tree[name]) for name in names])


def follows(actual, expected, relative, what):
    """Relative to the largest entry of the recorded vector."""
    expected = np.asarray(expected)
    error = np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-300)
    assert error <= relative, f"{what}: relative error {error:.2e}"


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
    rates = jnp.array([step["lr"] for step in case["steps"]])
    return lambda count: rates[count]


def averaged(loss, state, params, noise, batches):
    """One estimate per recorded sample, each on its own batch, averaged."""
    estimates = []
    for s, batch in enumerate(batches):
        one = jax.tree.map(lambda x, s=s: x[s : s + 1], noise)
        estimates.append(blr.estimate(loss, state, params, batch, noise=one))
    return jax.tree.map(lambda *x: sum(x) / len(x), *estimates)


def batches_of(step):
    samples = len(step["eps"])
    return [None] * samples if step["batch"] is None else [jnp.array(b) for b in step["batch"]]


def check_step(state, params, step, names, relative, weight_decay):
    inner = optax.tree.get_all_with_path(state, "precision")
    precision = {k: v for _, tree in inner for k, v in tree.items() if isinstance(v, jax.Array)}
    momentum = {
        k: v
        for _, tree in optax.tree.get_all_with_path(state, "ema")
        for k, v in tree.items()
        if isinstance(v, jax.Array)
    }
    follows(flatten(params, names), step["mean"], relative, "mean")
    # h may pass through zero; its natural scale is the precision h + delta.
    hess = flatten(precision, names) - weight_decay
    scale = np.max(np.abs(np.asarray(step["hess"]) + weight_decay))
    assert np.max(np.abs(hess - np.asarray(step["hess"]))) <= relative * scale
    follows(flatten(momentum, names), step["momentum"], relative, "momentum")
