"""`check` names the mistakes of a first day, each with its right number, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr

RNG = np.random.default_rng(0)
N, EXAMPLES, STEPS = 64, 1000, 500
X = RNG.normal(size=(N, 3)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5]) + RNG.normal(size=N)).astype(np.float32)
START = np.array([0.5, 0.3, -0.4], np.float32)
GIVEN = {"num_examples": EXAMPLES, "num_steps": STEPS}


def mean(w, x, y):
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def ivon(**more):
    return blr.ivon(0.1, **{"ess": EXAMPLES, "b2": 0.99, **more})


def found(tx, loss=mean, params=START, batch=(X, Y), **more):
    return blr.check(tx, loss, params, *batch, **{**GIVEN, **more})


def names(report):
    return [one.name for one in report.warnings]


def test_a_right_set_up_has_no_warning_and_right_numbers():
    report = found(ivon())
    assert report and report.ok and names(report) == []
    numbers = report.numbers
    np.testing.assert_allclose(numbers["b2"], 0.99, atol=1e-6)
    np.testing.assert_allclose(numbers["share_learnt"], 1 - 0.99**STEPS, rtol=1e-5)
    assert numbers["ess"] == EXAMPLES
    np.testing.assert_allclose(numbers["weight_size"], np.sqrt(np.mean(START**2)), rtol=1e-6)
    # Four draws of three weights, of deviation 1 / sqrt(ess (hess_init + weight_decay)).
    np.testing.assert_allclose(numbers["first_deviation"], 1 / np.sqrt(1000.1), rtol=0.6)
    np.testing.assert_allclose(numbers["noise_variance"], 1.0, rtol=1e-5)
    residuals = X @ START - Y
    np.testing.assert_allclose(numbers["loss_at_params"], 0.5 * np.mean(residuals**2), rtol=1e-5)
    text = str(report)
    assert "nothing wrong found" in text and "step=" in text and "numbers: " in text


def test_evaluations_are_counted_and_few():
    ran = []

    def counting(w, x, y):
        jax.debug.callback(lambda: ran.append(1))
        return mean(w, x, y)

    report = found(ivon(), counting)
    jax.effects_barrier()
    assert report.evaluations == len(ran) <= 14


MISTAKES = {
    "sum_loss": {"tx": ivon(), "loss": lambda w, x, y: N * mean(w, x, y) * len(x) / N},
    "loss_depends_on_batch_size": {
        "tx": ivon(),
        "loss": lambda w, x, y: mean(w, x, y) * len(x) ** 0.5,
    },
    "ess_is_batch_size": {"tx": ivon(ess=N)},
    "ess_is_one": {"tx": blr.adam(1e-3)},
    "slow_b2": {"tx": blr.ivon(0.1, ess=EXAMPLES)},
    "transformed_gradient": {"tx": optax.chain(optax.clip_by_global_norm(1e6), ivon())},
    "averaged_gradient": {"tx": optax.chain(optax.ema(0.9), ivon())},
    "wide_first_noise": {"tx": ivon(hess_init=1e-3)},
    "not_finite": {"tx": ivon(), "loss": lambda w, x, y: mean(w, x, y) + jnp.log(w[2])},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_what_to_write_instead(name):
    if name == "transformed_gradient":  # beyond the size that is tried, a clip does nothing
        assert found(**MISTAKES[name])
        report = found(optax.chain(optax.clip_by_global_norm(10.0), ivon()))
    else:
        report = found(**MISTAKES[name])
    assert not report and names(report) == [name] and name in report
    (one,) = report.warnings
    assert one.severity == "warning" and f"warning [{name}]" in str(report)
    assert " ".join(one.fix.split())[:40] in " ".join(str(report).split())


def test_weights_that_are_zero_have_no_size_but_a_loss():
    zeros = np.zeros(3, np.float32)
    assert found(ivon(), params=zeros).ok
    assert names(found(ivon(hess_init=1e-4), params=zeros)) == ["wide_first_noise"]


def test_numbers_of_the_mistakes():
    (one,) = found(**MISTAKES["ess_is_batch_size"]).warnings
    assert f"ess={EXAMPLES}" in one.fix and "3.95 times" in one.what  # sqrt(1000 / 64)
    slow = found(**MISTAKES["slow_b2"])
    np.testing.assert_allclose(slow.numbers["share_learnt"], -np.expm1(5e2 * np.log1p(-1e-5)), 1e-4)
    assert "b2=0.994" in slow.warnings[0].fix  # 1 - 3 / 500


STEPS_OF_USERS = {
    "": lambda update, theta, params: update(theta, params, params),
    "gradient_at_params": lambda update, theta, params: update(params, params, params),
    "sample_as_params": lambda update, theta, params: update(theta, theta, theta),
}


def user_step(tx, kind, loss=mean):
    @jax.jit
    def step(params, opt_state, x, y):
        def update(at, given, applied):
            updates, state = tx.update(jax.grad(loss)(at, x, y), opt_state, given)
            return optax.apply_updates(applied, updates), state

        return STEPS_OF_USERS[kind](update, blr.sample(opt_state, params), params)

    return step


@pytest.mark.parametrize("kind", STEPS_OF_USERS)
def test_the_users_own_step_is_run_and_compared(kind):
    tx = ivon()
    report = found(tx, step=user_step(tx, kind))
    assert names(report) == ([kind] if kind else [])
    assert not any("step=" in text for text in report.unchecked)


def test_a_state_that_is_not_returned_is_named():
    tx = ivon()
    kept = user_step(tx, "")
    report = found(tx, step=lambda p, s, *batch: (kept(p, s, *batch)[0], s))
    assert names(report) == ["state_not_kept"]
    with pytest.raises(ValueError, match=r"return \(params, opt_state, ...\)"):
        found(tx, step=lambda p, s, *batch: p)
    with pytest.raises(ValueError, match="does not have the structure of params"):
        found(tx, step=lambda p, s, *batch: (s, p))


OTHERS = {
    "a chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "a partition": lambda tx: optax.partition({"all": tx}, "all"),
    "a wrapper": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_of_another_optimizer_is_refused_in_words(name):
    tx, step = OTHERS[name](ivon()), user_step(ivon(), "")
    with pytest.raises(ValueError, match=r"step= failed on the first state of tx .* same tx"):
        found(tx, step=step)
    with pytest.raises(ValueError, match=r"step\(params, opt_state, \*batch\)\. It said TypeErr"):
        found(ivon(), step=lambda params, opt_state: (params, opt_state))


def test_the_noise_of_a_squared_loss_is_proved_or_not_told():
    """1 / (2 a) of a mean of a (y - f)^2; of K outputs averaged K times that."""
    w = jnp.asarray(RNG.normal(size=(3, 2)).astype(np.float32))
    y = RNG.normal(size=(N, 2)).astype(np.float32)
    point = blr.adam(0.1, ess=EXAMPLES)

    def variance(loss, target=y):
        report = blr.check(point, loss, w, X, target, **GIVEN)
        assert report.ok and ("noise_variance" in report) == ("noise_variance" in report.numbers)
        return report.numbers.get("noise_variance")

    square = lambda f, y: (f - y) ** 2  # noqa: E731
    assert variance(lambda w, x, y: jnp.mean(jnp.sum(square(x @ w, y), 1))) == pytest.approx(0.5)
    assert variance(lambda w, x, y: 4 * jnp.mean(square(x @ w, y))) == pytest.approx(0.25)
    # Huber, a learnt variance, and weights per example are not this error.
    assert variance(lambda w, x, y: jnp.mean(optax.huber_loss(x @ w, y))) is None
    heads = lambda w, x, y: jnp.mean(  # noqa: E731
        0.5 * square(x @ w, y) * jnp.exp(-w[0, 0]) + w[0, 0]
    )
    assert variance(heads) is None
    weighted = lambda w, x, y: jnp.mean(square(x @ w, y) * jnp.abs(x[:, :1]))  # noqa: E731
    assert variance(weighted) is None


def test_a_total_loss_with_ess_of_one_is_right_on_all_of_the_data():
    total = lambda w, x, y: N * mean(w, x, y) * len(x) / N  # noqa: E731
    tx = blr.newton(total)
    whole = blr.check(tx, total, START, X, Y, num_examples=N)
    assert whole.ok and "total_loss" in whole and whole.numbers["ess"] == 1.0
    assert names(blr.check(tx, total, START, X, Y, num_examples=EXAMPLES)) == ["sum_loss"]


def test_a_plain_optimizer_is_told_to_have_no_posterior():
    report = found(optax.adam(1e-3))
    assert report.ok and "no_posterior" in report


def test_what_cannot_be_looked_at_is_said():
    report = blr.check(ivon(), lambda w: mean(w, X, Y), START)
    assert report.ok and len(report.unchecked) == 4
    said = " ".join(report.unchecked)
    assert "num_examples=" in said and "num_steps=" in said and "axis of examples" in said
    fixed = found(ivon(), lambda w, x, y: mean(w, x.reshape(N, 3), y))
    assert fixed.ok and "one size" in " ".join(fixed.unchecked)


def test_wrong_calls_of_check():
    with pytest.raises(ValueError, match=r"num_examples=1\.5 must be a plain whole number"):
        found(ivon(), num_examples=1.5)
    with pytest.raises(ValueError, match="must be a transformation"):
        found(blr.ivon)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda w: found(ivon(), params=w))(START)
    with pytest.raises(ValueError, match="returned a tuple of 2"):
        found(ivon(), lambda w, x, y: (mean(w, x, y), w))
    assert found(ivon(), lambda w, x, y: (mean(w, x, y), w), has_aux=True).ok


@pytest.mark.parametrize("kind", ["", "gradient_at_params"])
def test_a_trained_state_tells_what_its_steps_were(kind):
    tx = ivon(ess=N, b2=0.998)
    step, params = user_step(tx, kind), jnp.asarray(START)

    @jax.jit
    def train(params, state):
        body = lambda _, carry: step(*carry, X, Y)  # noqa: E731
        return jax.lax.fori_loop(0, 3000, body, (params, state))

    params, state = train(params, tx.init(params))
    report = found(tx, params=params, num_examples=N, opt_state=state, draws=16)
    ratio = report.numbers["statistic_over_precision"]
    if kind:
        assert names(report) == ["precision_disagrees"] and ratio > 10.0
    else:
        assert report.ok and 0.5 < ratio < 1.5
