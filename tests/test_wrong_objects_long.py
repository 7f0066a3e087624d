"""What is given in place of something else is refused in words that say what to give."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blr_optax as blr

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
TX = blr.ivon(0.1, ess=50.0)
STATE = TX.init(PARAMS)


def logits(theta, x):
    return x @ theta["w"] + theta["b"]


CASES = {
    "standard parameters for natural ones": (
        lambda: blr.Distribution("normal", mean=0.0, precision=1.0),
        [r"mean=\.\.\., precision=", r"blr\.distribution\(name, "],
    ),
    "parameters of a member for a family": (
        lambda: blr.families.Normal(0.0, 1.0),
        [r"Normal\(\) is the family", r"blr\.distribution\(name"],
    ),
    "the same by keyword": (
        lambda: blr.families.Gamma(concentration=1.0, rate=2.0),
        [r"Gamma\(\) is the family"],
    ),
    "a state for the posterior": (
        lambda: blr.predict(0, STATE, logits, jnp.ones((2, 3))),
        [r"optimizer state stands", r"posterior\(opt_state, params\)"],
    ),
    "a state for the posterior, regression": (
        lambda: blr.predict_regression(0, STATE, logits, jnp.ones((2, 3))),
        [r"optimizer state stands"],
    ),
    "a state for the posterior, distribution": (
        lambda: blr.predict_distribution(0, STATE, logits, jnp.ones((2, 3)), noise_variance=1.0),
        [r"optimizer state stands"],
    ),
    "a mask for the decay": (
        lambda: blr.ivon(0.1, ess=50.0, weight_decay={"w": True, "b": False}).init(PARAMS),
        [r"True or False", r"mask=, beside the number"],
    ),
    "a mask of numpy for the decay": (
        lambda: blr.evon(0.1, ess=50.0, weight_decay=np.bool_(True)).init(PARAMS),
        [r"mask="],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_words_say_what_to_give(name):
    call, said = CASES[name]
    with pytest.raises(ValueError) as error:
        call()
    for pattern in said:
        assert error.match(pattern)


def test_distributions_and_families_are_made_as_before():
    q = blr.distribution("normal", mean=1.0, precision=4.0)
    for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), jax.tree.map(lambda x: x, q)):
        assert again.family == q.family and float(again.mean) == 1.0
    field = blr.families.MeanField("normal")
    assert pickle.loads(pickle.dumps(field)) == field == blr.families.MeanField(family="normal")
    assert blr.families.Normal() == blr.families.get("normal")


READERS = {
    "sample": blr.sample,
    "posterior": blr.posterior,
    "estimate": lambda state, params: blr.estimate(
        lambda p: jnp.sum(p["kernel"] ** 2), state, params
    ),
    "reseed": lambda state, params: blr.reseed(state, 1),
    "diagnostics": lambda state, params: blr.diagnostics(state, state, params),
}


@pytest.mark.parametrize("name", READERS)
def test_variables_of_nnx_for_arrays(name):
    """The optimizer's own state, which is a view of it."""
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    state, mean = nnx.as_pure((optimizer.opt_state, nnx.state(model, nnx.Param)))
    READERS[name](state, mean)
    with pytest.raises(ValueError, match=rf"{name}: .*nnx\.as_pure\(optimizer\.opt_state"):
        READERS[name](optimizer.opt_state, mean)
