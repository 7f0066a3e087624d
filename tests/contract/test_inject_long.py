"""`optax.inject_hyperparams` around every optimizer, given nothing but what it must be given."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import blr_optax as blr

PARAMS = {"w": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}


def loss(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


RATE, SIZE = {"learning_rate": 0.1}, {"ess": 10.0}
CASES = {
    **dict.fromkeys(
        ("sgd", "gradient_descent", "rmsprop", "adam", "sam", "ste", "lie_additive"), RATE
    ),
    **dict.fromkeys(
        ("soba", "ivon", "evon", "vadam", "vprop", "vogn", "ogn", "bsam", "bayesbinn"), RATE | SIZE
    ),
    **dict.fromkeys(("lie_affine", "lie_multiplicative", "mixture_ivon"), RATE | SIZE),
    "ivon_lora": {**RATE, "examples": 10.0},
    "dropout": {"keep_rate": 0.9},
    "scale_by_precision": SIZE,
    "orthogonalize": {},
    "newton": {},
    **dict.fromkeys(
        ("online_newton", "kronecker_newton", "variational_online_newton", "blr_update"), RATE
    ),
    "low_rank_newton": {**RATE, "rank": 1},
    "mixture_newton": {**RATE, "components": 2},
    "mixture_vi": {**RATE, "components": 2},
}
FIRST = {
    "dropout": (optax.sgd(0.1),),
    "blr_update": ("gaussian_diagonal", loss),
    **dict.fromkeys(
        ("newton", "online_newton", "kronecker_newton", "variational_online_newton",
         "low_rank_newton", "mixture_newton", "mixture_vi"),
        (loss,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_required_arguments_alone_work_or_name_what_is_static(name):
    """Following the errors, one `static_args=` after another, ends in a state."""
    make, static = functools.partial(getattr(blr, name), *FIRST.get(name, ())), set()
    for _ in range(6):
        tx = optax.inject_hyperparams(make, static_args=static)(**CASES[name])
        try:
            jax.eval_shape(tx.init, PARAMS)
            break
        except ValueError as error:
            named = re.findall(r"static_args=\((.*?),?\)", str(error))
            assert named, f"{name}: {error}"
            new = set(re.findall(r'"(\w+)"', named[0])) - static
            assert new, f"{name}: {error}"
            static |= new
    else:
        raise AssertionError(f"{name}: no end of static arguments, {static}")
    wanted = {"vadam": {"batch_size"}, "vprop": {"batch_size"}, "dropout": {"unit_axis"}}
    assert static >= wanted.get(name, set())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["ivon", "vogn", "adam", "rmsprop", "sgd", "lie_affine"])
def test_numbers_below_float32_are_refused(name, dtype):
    """b2 = 0.999 is 1 in bfloat16: the precision never moved, without a word."""
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS)
    inject = functools.partial(optax.inject_hyperparams, getattr(blr, name))
    with pytest.raises(ValueError, match=r"hyperparam_dtype=jnp\.float32"):
        inject()(**CASES[name]).init(params)
    with pytest.raises(ValueError, match=r"hyperparam_dtype=jnp\.float32"):
        jax.eval_shape(inject()(**CASES[name]).init, params)
    inject(hyperparam_dtype=jnp.float32)(**CASES[name]).init(params)


@pytest.mark.parametrize("static", [(), ("b2",)])
def test_the_precision_of_bfloat16_weights_follows_the_rule(static):
    """h <- h (1 + u + u^2 / 2), in Python's float64; exact with b2 static, else by 0.14 percent."""
    params, steps, h = jnp.ones(4, jnp.bfloat16), 2000, 0.1
    tx = optax.inject_hyperparams(blr.ivon, hyperparam_dtype=jnp.float32, static_args=static)(
        0.0, ess=1281167.0, b2=0.99999, hess_init=0.1, weight_decay=0.0
    )

    @jax.jit
    def run(params):
        def step(state, _):
            grads = jnp.zeros_like(params)
            return tx.update(grads, state, params, statistic=jnp.full(4, 5.0))[1], None

        state, _ = jax.lax.scan(step, tx.init(params), length=steps)
        return blr.posterior(state, params).variance

    for _ in range(steps):
        u = 1e-5 * (5.0 - h) / h
        h *= 1 + u + u * u / 2
    tolerance = 2e-5 if static else 0.0014
    np.testing.assert_allclose(run(params), np.full(4, 1 / (h * 1281167.0)), rtol=tolerance)
