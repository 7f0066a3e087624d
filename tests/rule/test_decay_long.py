"""Weight decay for some leaves: `mask=` as in `optax.adamw`, trees that are callable, and functions
that are taken for schedules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr

PARAMS = {"w": np.full((3, 2), 2.0, np.float32), "b": np.full(2, -1.0, np.float32)}
GRADS = {"w": np.full((3, 2), 0.5, np.float32), "b": np.full(2, 0.25, np.float32)}
MATRICES = {"w": True, "b": False}


def by_axes(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def by_name(params):
    return {name: name != "b" for name in params}


# Rows with a weight decay, and the decay that they are given.
ROWS = {
    "scale_by_precision": lambda d, **k: blr.scale_by_precision(
        ess=50.0, b2=0.9, weight_decay=d, **k
    ),
    "ivon": lambda d, **k: blr.ivon(0.1, ess=50.0, b2=0.9, weight_decay=d, **k),
    "soba": lambda d, **k: blr.soba(0.1, ess=50.0, b2=0.9, weight_decay=d, **k),
    "evon": lambda d, **k: blr.evon(0.1, ess=50.0, b2=0.9, weight_decay=d, **k),
    "sam": lambda d, **k: blr.sam(0.1, weight_decay=d, **k),
    "lie_additive": lambda d, **k: blr.lie_additive(0.1, weight_decay=d, **k),
    "lie_affine": lambda d, **k: blr.lie_affine(0.1, ess=50.0, weight_decay=d, **k),
    "lie_multiplicative": lambda d, **k: blr.lie_multiplicative(
        0.01, ess=50.0, weight_decay=d, **k
    ),
}
DECAYED = [
    pytest.param(name, marks=() if name in ("ivon", "sam") else pytest.mark.slow) for name in ROWS
]


def two_steps(tx, params, grads):
    """Parameters and posterior after two steps, in one program."""

    @jax.jit
    def run(params, grads):
        state = tx.init(params)
        for _ in range(2):
            extra = {"statistic": grads} if blr.state._reader.find_posterior_states(state)[
                0
            ].reader.adversarial else {}  # fmt: skip
            updates, state = tx.update(grads, state, params, **extra)
            params = jax.tree.map(jnp.add, params, updates)
        return params, blr.posterior(state, params).variance

    return jax.tree.map(np.asarray, run(params, grads))


@pytest.mark.parametrize("name", DECAYED)
def test_a_mask_leaves_its_leaves_without_decay(name):
    """In every form that optax takes, and as the partition of a row with and one without decay."""
    make = ROWS[name]
    parts = optax.partition({"w": make(0.3), "b": make(0.0)}, {"w": "w", "b": "b"})
    if name == "sam":  # two gradients: `parts` has no one state to give a statistic
        wanted = {k: two_steps(make(d), {k: PARAMS[k]}, {k: GRADS[k]}) for k, d in
                  (("w", 0.3), ("b", 0.0))}  # fmt: skip
        wanted = tuple({k: wanted[k][i][k] for k in "wb"} for i in range(2))
    else:
        wanted = two_steps(parts, PARAMS, GRADS)
    for mask in (MATRICES, by_axes, by_name):
        found = two_steps(make(0.3, mask=mask), PARAMS, GRADS)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)
    everywhere = two_steps(make(0.3), PARAMS, GRADS)
    masked = two_steps(make(0.3, mask=True), PARAMS, GRADS)
    jax.tree.map(np.testing.assert_array_equal, masked, everywhere)
    assert not np.allclose(everywhere[0]["b"], wanted[0]["b"])


def test_a_mask_goes_with_schedules_groups_and_map_params():
    """A decay of 0.3 at step 0 and 0.6 after it, by hand; and as AdamW's mask does."""
    schedule = optax.piecewise_constant_schedule(0.3, {1: 2.0})
    tx = blr.soba(0.0, ess=50.0, b2=0.5, weight_decay=schedule, mask=by_axes, hess_init=1.0)
    state = tx.init(PARAMS)
    np.testing.assert_allclose(state[0].precision["w"], np.full((3, 2), 1.3), rtol=1e-6)
    np.testing.assert_allclose(state[0].precision["b"], np.ones(2), rtol=1e-6)
    _, state = jax.jit(tx.update)(GRADS, state, PARAMS, statistic=GRADS)
    p = 1.3 + 0.5 * (0.5 + 0.3 - 1.3) + 0.5 * (0.5 * (0.5 + 0.3 - 1.3)) ** 2 / 1.3
    np.testing.assert_allclose(state[0].precision["w"], np.full((3, 2), p), rtol=1e-6)
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    group = optax.partition({"a": tx, "b": optax.set_to_zero()}, {"w": "a", "b": "b"})
    inside = blr.state._reader.posterior_states(group.init(PARAMS), "test")[0]
    np.testing.assert_allclose(inside.precision["w"], np.full((3, 2), 1.3), rtol=1e-6)


def test_equinox_trees_of_numbers_are_trees():
    """They are callable, and were taken for schedules."""
    import equinox as eqx

    class Net(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, x):
            return self.layer(x)

    params = eqx.filter(Net(eqx.nn.Linear(3, 4, key=jax.random.key(0))), eqx.is_inexact_array)
    decay = jax.tree.map(lambda x: 0.5 if x.ndim > 1 else 0.0, params)
    mask = jax.tree.map(lambda x: x.ndim > 1, params)
    first = jax.tree.map(lambda d: d + 1.0, decay)
    total = jax.tree.map(lambda d: 10.0 * (d + 1.0), decay)
    assert callable(decay)
    for tx in (
        blr.ivon(0.1, ess=10.0, weight_decay=decay, hess_init=1.0),
        blr.ivon(0.1, ess=10.0, weight_decay=0.5, mask=mask, hess_init=1.0),
        blr.evon(0.1, ess=10.0, weight_decay=decay, hess_init=1.0, max_size=1),
        blr.ivon(0.1, ess=10.0, hess_init=first, weight_decay=0.0),
        blr.vadam(0.1, ess=10.0, prior_precision=total),
        blr.ivon(0.1, ess=10.0, prior_precision=jax.tree.map(lambda d: 10 * d, decay)),
        blr.bsam(0.1, ess=10.0, prior_precision=1.0, damping=0.0, init_precision=total),
        blr.adam(0.1, ess=10.0, eps=0.0, prior_precision=1.0),
    ):
        found = jax.tree.leaves(blr.posterior(tx.init(params), params).variance)
        wanted = [1 / 15.0, 1 / 10.0]
        if tx.init(params).__class__.__name__ == "WithPosteriorState":  # adam: the prior alone
            wanted = [1.0, 1.0]
        for v, w in zip(found, wanted, strict=True):
            np.testing.assert_allclose(v, np.full(v.shape, w), rtol=1e-5)
    vogn = blr.vogn(0.1, ess=10.0, prior_precision=total).init(params)
    np.testing.assert_allclose(vogn[0].precision.layer.weight, np.full((4, 3), 2.5), rtol=1e-6)
    tree = jax.tree.map(lambda _: 0.9, params)
    with pytest.raises(ValueError, match=r"keep_rate must be one number"):
        blr.dropout(optax.sgd(0.1), tree)
    with pytest.raises(ValueError, match=r"learning_rate must be one number"):
        blr.ivon(tree, ess=10.0)


@pytest.mark.parametrize(
    "decay",
    [
        lambda params: jax.tree.map(lambda x: 1e-2 * (x.ndim > 1), params),
        lambda params: {name: 1e-2 * (name != "b") for name in params},
        by_axes,
    ],
)
@pytest.mark.parametrize("name", DECAYED)
def test_a_function_of_params_is_no_schedule(name, decay):
    """A mask in optax's place for it, or the habit of one: it became no decay at all, unsaid."""
    words = r"weight_decay.*mask=" if name != "sam" else r"weight_decay.*(mask=|one number)"
    with pytest.raises(ValueError, match=words):
        ROWS[name](decay).init(PARAMS)


@pytest.mark.parametrize(
    "bad", [lambda count: "high", lambda count: None, lambda: 0.1, lambda c: -1.0]
)
def test_a_schedule_is_called_once_and_its_number_checked(bad):
    for name, make in (
        ("learning_rate", lambda f: blr.ivon(f, ess=10.0)),
        ("ess", lambda f: blr.adam(0.1, ess=f)),
        ("weight_decay", lambda f: blr.ivon(0.1, ess=10.0, weight_decay=f)),
        ("keep_rate", lambda f: blr.dropout(optax.sgd(0.1), f)),
        ("scale_rate", lambda f: blr.lie_affine(0.1, ess=10.0, scale_rate=f)),
        ("learning_rate", lambda f: blr.blr_update("gaussian_diagonal", lambda w: w @ w, f)),
    ):
        with pytest.raises(ValueError, match=name):
            make(bad)
    with pytest.raises(ValueError, match=r"learning_rate.*one number"):
        blr.sgd(lambda count: jnp.ones(3))


@pytest.mark.parametrize("name", ["hess_init", "prior_precision", "damping", "clip_radius"])
def test_functions_where_only_numbers_go(name):
    make = blr.bsam if name == "damping" else blr.ivon
    with pytest.raises(ValueError, match=f"{name} must be a number or a tree"):
        make(0.1, ess=10.0, **{name: lambda count: 1.0})


@pytest.mark.parametrize("bad", [{"w": 1.0, "b": 0.0}, {"w": "yes", "b": "no"}, 0.5])
def test_masks_of_something_else_are_refused(bad):
    with pytest.raises(ValueError, match=r"mask has .* True or False"):
        blr.ivon(0.1, ess=10.0, mask=bad).init(PARAMS)
    with pytest.raises(ValueError, match="mask: no entry for parameter"):
        blr.ivon(0.1, ess=10.0, mask={"w": True}).init(PARAMS)
