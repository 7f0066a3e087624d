"""Bad input gets one clear error: the argument, its value, the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import make_batch, make_params, mean_loss

import blr_optax as blr

DIAGONAL = blr.families.get("gaussian_diagonal")


def ivon_state(params=None):
    params = make_params() if params is None else params
    tx = blr.ivon(0.1, ess=50.0)
    return tx, tx.init(params), params


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: blr.families.get("gausian"), ["gausian", "gaussian_diagonal", "known"]),
        (lambda: blr.blr_update("gausian", mean_loss, 0.1), ["gausian", "known"]),
        (lambda: blr.blr_update("normal", 3.0, 0.1), ["loss", "function", "float"]),
        (lambda: blr.blr_update("normal", mean_loss, -0.1), ["learning_rate", "-0.1", "positive"]),
        (lambda: blr.blr_update("normal", mean_loss, 0.1, ess=0.0), ["ess", "0.0", "positive"]),
        (lambda: blr.blr_update("normal", mean_loss, 0.1, step="auot"), ["auot", "improved"]),
        (
            lambda: blr.blr_update("gaussian_fixed", mean_loss, 0.1, step="square_root"),
            ["square_root", "GaussianFixed"],
        ),
        (
            lambda: blr.blr_update("normal", mean_loss, 0.1, estimator="delta"),
            ["estimator", "delta()", "monte_carlo"],
        ),
        (lambda: blr.ivon(0.1, ess=-5.0), ["ess", "-5.0", "positive"]),
        (lambda: blr.ivon(-0.1, ess=5.0), ["learning_rate", "-0.1"]),
        (lambda: blr.ivon(0.1, ess=5.0, b1=1.0), ["b1", "1.0", "[0, 1)"]),
        (lambda: blr.ivon(0.1, ess=5.0, b2=1.5), ["b2", "1.5", "[0, 1)"]),
        (lambda: blr.ivon(0.1, ess=5.0, hess_init=-1.0), ["hess_init", "-1.0"]),
        (lambda: blr.ivon(0.1, ess=5.0, weight_decay=-1.0), ["weight_decay", "-1.0"]),
        (lambda: blr.ivon(0.1, ess=5.0, clip_radius=-1.0), ["clip_radius", "-1.0"]),
        (
            lambda: blr.ivon(0.1, ess=5.0, hess_init=0.0, weight_decay=0.0),
            ["hess_init", "weight_decay"],
        ),
        (lambda: blr.ivon(0.1, ess=5.0, curvature="price"), ["price", "reparameterized"]),
        (lambda: blr.ivon(0.1, ess=5.0, curvature="squared_gradient"), ["batch_size"]),
        (
            lambda: blr.ivon(0.1, ess=5.0, curvature=blr.estimators.exact()),
            ["loss", "reparameterized"],
        ),
        (lambda: blr.ivon(0.1, ess=5.0, generator="philox"), ["philox", "hash", "jax"]),
        (lambda: blr.scale_by_precision(ess=5.0, step="auto"), ["auto", "improved"]),
        (lambda: blr.sgd(0.1, ess=-1.0), ["ess", "-1.0"]),
        (lambda: blr.adam(0.1, ess=0.0), ["ess", "0.0"]),
        (lambda: blr.adam(0.1, prior_precision=-1.0), ["prior_precision", "-1.0"]),
        (lambda: blr.rmsprop(0.1, ess=-2), ["ess", "-2"]),
        (lambda: blr.estimators.monte_carlo(0), ["samples", "0"]),
        (lambda: blr.estimators.squared_gradient(), ["batch_size", "official"]),
        (lambda: blr.estimators.delta(blr.estimators.reparameterized()), ["delta", "displacement"]),
        (lambda: blr.sam(jnp.array([0.1, 0.0])), ["learning_rate", "(2,)", "partition"]),
        (lambda: blr.bayesbinn({"w": 0.1}, ess=10.0), ["learning_rate", "{'w': 0.1}"]),
        (lambda: blr.mixture_ivon([0.1], ess=10.0), ["learning_rate", "[0.1]"]),
        (lambda: blr.sam(0.1, ess={"w": 1.0}), ["ess", "{'w': 1.0}"]),
        (lambda: blr.sam(0.1, momentum="x"), ["momentum='x'"]),
        (lambda: blr.bsam(0.1, ess=10.0, b1=None), ["b1=None"]),
        (lambda: blr.dropout(blr.sgd(0.1), {"w": 0.5}), ["keep_rate", "partition"]),
        (lambda: blr.dropout(optax.adam, 0.5), ["dropout", "optax.adam(1e-3)"]),
        (lambda: blr.ste(0.1, inner=0.1), ["ste", "optax.adam(1e-3)", "0.1"]),
        (lambda: blr.low_rank_newton(mean_loss, 0.1, "2"), ["rank='2'", "whole number"]),
        (lambda: blr.ivon("x", ess=10.0), ["learning_rate='x'", "schedule"]),
        (lambda: blr.mixture_newton(mean_loss, 0.1, 2.5), ["components=2.5", "whole number"]),
        (lambda: blr.low_rank_newton(mean_loss, 0.1, 2, init_precision={}), ["init_precision"]),
        (lambda: blr.random_signs(jax.random.key(0), make_params(), abs), ["scale", "schedule"]),
        (lambda: blr.random_signs(make_params(), jax.random.key(0)), ["key", "dict"]),
        (
            lambda: blr.ste(0.1, inner=blr.ivon(0.1, ess=5.0)).init(make_params()),
            ["PrecisionReader"],
        ),
        (lambda: blr.dropout(blr.sam(0.1), 0.5).init(make_params()), ["dropout", "SamReader"]),
        (lambda: blr.dropout(blr.sgd(0.1), 0.5, mask="b").init(make_params()), ["mask", "'b'"]),
        (lambda: blr.predict(jax.random.key(0), make_params(), lambda p, x: x, 1.0), ["sample("]),
    ],
)
def test_arguments(call, words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value), f"{word!r} not in {error.value}"


@pytest.mark.parametrize(
    "make",
    [
        lambda: blr.ivon(0.1, ess=5.0),
        lambda: blr.sgd(0.1),
        lambda: blr.adam(0.1),
        lambda: blr.blr_update("gaussian_diagonal", mean_loss, 0.1),
    ],
)
def test_integer_parameters(make):
    with pytest.raises(ValueError, match=r"int32.*(masked|partition)"):
        make().init({"w": jnp.ones(2), "steps": jnp.arange(3)})


def test_raw_keys():
    with pytest.raises(ValueError, match=r"jax\.random\.key"):
        blr.ivon(0.1, ess=5.0, key=jax.random.PRNGKey(0)).init(make_params())


@pytest.mark.parametrize(
    "tx", [blr.ivon(0.1, ess=5.0), blr.blr_update("gaussian_diagonal", mean_loss, 0.1)]
)
def test_missing_params(tx):
    state = tx.init(make_params())
    with pytest.raises(ValueError, match="params"):
        tx.update(make_params(), state)


@pytest.mark.parametrize("name", ["statistic", "noise", "prior", "init"])
@pytest.mark.parametrize("how", ["missing", "shape"])
def test_wrong_trees(name, how):
    tx, state, params = ivon_state()
    wrong = {k: v for k, v in params.items() if k != "b"}
    if how == "shape":
        wrong = {**params, "b": jnp.ones(7)}
    with pytest.raises(ValueError, match=name) as error:
        if name == "statistic":
            tx.update(params, state, params, statistic=wrong)
        elif name == "noise":
            noise = jax.tree.map(lambda x: jnp.asarray(x)[None], wrong)
            blr.estimate(mean_loss, state, params, *make_batch(), noise=noise)
        else:
            q = blr.Distribution(DIAGONAL, DIAGONAL.natural(mean=wrong, precision=1.0))
            blr.ivon(0.1, ess=5.0, **{name: q}).init(params)
    assert "'b'" in str(error.value)


@pytest.mark.parametrize("name", ["statistic", "weight_decay"])
def test_entries_that_stand_at_no_parameter_are_named(name):
    params = make_params()
    more = {**params, "gain": params["c"]}
    if name == "statistic":
        tx = blr.ivon(0.1, ess=10.0)
        state = tx.init(params)
        with pytest.raises(ValueError, match=r"statistic: entries .*gain.* at no parameter"):
            tx.update(params, state, params, statistic=more)
    else:
        with pytest.raises(ValueError, match=r"weight_decay.*: entries .*gain.* at no"):
            blr.ivon(0.1, ess=10.0, weight_decay=more).init(params)


@pytest.mark.parametrize("name", ["hess_init", "weight_decay"])
def test_prefix_trees_must_reach_every_leaf(name):
    with pytest.raises(ValueError, match=f"{name}.*'b'"):
        blr.ivon(0.1, ess=5.0, **{name: {"w": 1.0, "c": 2.0}}).init(make_params())


def test_priors_of_another_kind():
    gaussian = blr.families.get("gaussian")
    full = blr.Distribution(gaussian, gaussian.natural(mean=jnp.zeros(2), precision=jnp.eye(2)))
    with pytest.raises(ValueError, match=r"prior.*mean-field"):
        blr.ivon(0.1, ess=5.0, prior=full).init(jnp.zeros(2))
    with pytest.raises(ValueError, match=r"prior.*Distribution"):
        blr.ivon(0.1, ess=5.0, prior=1.0).init(jnp.zeros(2))
    with pytest.raises(ValueError, match="prior"):
        blr.blr_update("gaussian", lambda w: w @ w, 0.1, prior=full).init(jnp.zeros(3))


@pytest.mark.parametrize("read", [blr.sample, blr.posterior])
def test_states_without_a_posterior(read):
    params = make_params()
    with pytest.raises(ValueError, match="no posterior"):
        read(optax.adam(0.1).init(params), params)
    with pytest.raises(ValueError, match="no posterior"):
        blr.estimate(mean_loss, optax.adam(0.1).init(params), params, *make_batch())
    with pytest.raises(ValueError, match="no posterior"):
        blr.reseed(optax.adam(0.1).init(params), jax.random.key(0))


@pytest.mark.parametrize("second", [lambda: blr.ivon(0.1, ess=5.0), lambda: blr.sgd(0.1)])
def test_two_posteriors_over_one_leaf(second):
    params = make_params()
    state = optax.chain(blr.ivon(0.1, ess=5.0), second()).init(params)
    for read in (blr.sample, blr.posterior):
        with pytest.raises(ValueError, match="two posteriors over one leaf"):
            read(state, params)


def test_estimate_refuses_what_it_cannot_do():
    tx, state, params = ivon_state()
    batch = make_batch()
    with pytest.raises(ValueError, match=r"MultiSteps.*microbatch"):
        blr.estimate(mean_loss, optax.MultiSteps(tx, 2).init(params), params, *batch)
    rule = blr.blr_update("gaussian_diagonal", mean_loss, 0.1)
    with pytest.raises(ValueError, match=r"evaluates the loss itself"):
        blr.estimate(mean_loss, rule.init(params), params, *batch)
    with pytest.raises(ValueError, match="samples=0"):
        blr.estimate(mean_loss, state, params, *batch, samples=0)
    with pytest.raises(ValueError, match=r"microbatch=3.*8"):
        blr.estimate(mean_loss, state, params, *batch, microbatch=3)
    noise = jax.tree.map(lambda p: jnp.zeros((2, *p.shape)), params)
    with pytest.raises(ValueError, match="2 samples"):
        blr.estimate(mean_loss, state, params, *batch, noise=noise, samples=3)
    ragged = {**noise, "b": jnp.zeros((3, 2))}
    with pytest.raises(ValueError, match="leading axis"):
        blr.estimate(mean_loss, state, params, *batch, noise=ragged)


def test_joint_posterior_beside_others():
    params = make_params()
    tx = optax.chain(blr.ivon(0.1, ess=5.0), blr.blr_update("gaussian", mean_loss, 0.1))
    with pytest.raises(ValueError, match="two posteriors"):
        blr.posterior(tx.init(params), params)


def test_functions_under_families_without_an_estimator():
    @blr.families.register("test_errors_poisson_like")
    class PoissonLike(blr.families.ExponentialFamily):
        """A family that is not Gaussian."""

        Natural = blr.families.GaussianNatural
        Expectation = blr.families.GaussianExpectation
        domains = blr.families.Normal.domains

    for estimator, message in [
        (blr.estimators.monte_carlo(3), "MonteCarlo is for Gaussian families"),
        (blr.estimators.delta(), "Delta is for Gaussian families"),
        (blr.estimators.enumeration(), "no finite support"),
        (blr.estimators.concrete(), "no relaxation"),
        (
            blr.estimators.reparameterized(),
            r"Reparameterized\(\) is a curvature; an estimator takes it",
        ),
        ("exact", "estimator='exact' is unknown; known: delta"),
    ]:
        with pytest.raises(ValueError, match=message):
            blr.estimators.natural_gradient("test_errors_poisson_like", mean_loss, estimator)
    glm = blr.estimators.glm(jnp.eye(2), jnp.square)
    with pytest.raises(ValueError, match=r"glm: PoissonLike is not Gaussian"):
        blr.estimators.natural_gradient("test_errors_poisson_like", glm)


def test_wrong_gradients_and_logits_say_what_is_wrong():
    tx, state, params = ivon_state()
    grads = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(ValueError, match=r"grads: wrong tree structure, nothing at .*b"):
        tx.update({"w": grads["w"], "c": grads["c"]}, state, params)
    with pytest.raises(ValueError, match=r"grads: leaf .*w.* has shape \(2,\)"):
        tx.update({**grads, "w": jnp.zeros(2)}, state, params)
    with pytest.raises(ValueError, match=r"probs must be in .*softmax"):
        blr.metrics.calibration(jnp.array([[3.0, -1.0]]), jnp.array([0]))


@pytest.mark.parametrize(
    "make", [blr.kronecker_newton, lambda f, r, **k: blr.low_rank_newton(f, r, 1, **k)]
)
def test_priors_of_rows_that_take_the_loss(make):
    """One number for all is the tree of it; what does not fit is said at init."""
    loss = lambda p: 0.5 * jnp.sum((p["w"] - 1.0) ** 2) + jnp.sum(p["b"] ** 2)  # noqa: E731
    params = {"w": np.zeros((2, 2), np.float32), "b": np.ones(2, np.float32)}
    normal = blr.families.get("normal")
    one = blr.Distribution(normal, normal.natural(mean=0.0, precision=2.0))
    tree = blr.Distribution(
        DIAGONAL, DIAGONAL.natural(mean=jax.tree.map(np.zeros_like, params), precision=2.0)
    )
    steps = []
    for prior in (one, tree):
        tx = make(loss, 0.3, prior=prior)
        steps.append(jax.jit(lambda p, tx=tx: tx.update(None, tx.init(p), p)[0])(params))
    jax.tree.map(np.testing.assert_array_equal, *steps)
    part = blr.Distribution(DIAGONAL, DIAGONAL.natural(mean={"w": params["w"]}, precision=2.0))
    stacked = jax.tree.map(lambda x: np.stack([x, x]), params)
    many = blr.Distribution(DIAGONAL, DIAGONAL.natural(mean=stacked, precision=2.0))
    for wrong, words in (
        (part, r"prior.*\(2, 2\)"),
        (many, r"prior.*\(2, 2, 2\)"),
        (1.0, "prior.*float"),
    ):
        with pytest.raises(ValueError, match=words):
            make(loss, 0.3, prior=wrong).init(params)


@pytest.mark.parametrize(
    "tx",
    [
        blr.sgd(0.1),
        blr.adam(0.1),
        blr.rmsprop(0.1),
        blr.ste(0.1),
        blr.sam(0.1),
        blr.gradient_descent(0.1),
    ],
)
def test_points_skip_what_is_not_finite(tx):
    params = jax.device_get(make_params())
    update = jax.jit(tx.update)
    state = jax.jit(tx.init)(params)
    good = jax.tree.map(np.ones_like, params)
    bad = {**good, "b": good["b"] * np.float32(np.nan)}
    extra = {"statistic": good} if state.reader.adversarial else {}
    _, state = update(good, state, params, **extra)
    updates, after = update(bad, state, params, **extra)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert int(after.skipped) == 1 and int(after.count) == 1
    jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)
    variance = jax.jit(lambda state: blr.posterior(state, params).variance)
    variances = [variance(s) for s in (state, after)]
    jax.tree.map(np.testing.assert_array_equal, *variances)
    # From then on as if it had never been.
    wanted, _ = update(good, state, params, **extra)
    updates, after = update(good, after, params, **extra)
    jax.tree.map(np.testing.assert_array_equal, updates, wanted)
    assert int(after.skipped) == 1 and int(after.count) == 2


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float16, 16.0), (jnp.float32, 1e38)])
def test_points_take_whatever_is_finite(dtype, size):
    """Sums of these gradients are not."""
    params = np.ones((8192, 2), dtype)
    grads = np.full_like(params, size)
    step = lambda tx: jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(grads, params)  # noqa: E731
    updates, state = step(blr.sgd(0.1))
    wanted, _ = step(optax.sgd(0.1))
    np.testing.assert_array_equal(updates, wanted)
    assert int(state.skipped) == 0
