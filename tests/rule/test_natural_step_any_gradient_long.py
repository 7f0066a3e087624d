"""`natural_step` after any gradient: lambda stays a member; `step="plain"` is the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_rows import rows
from family_tools import member, stacked
from test_any_gradient_long import ABSURD, numbers

import blr_optax as blr
from blr_optax import families


def narrow(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("row", rows())
def test_any_gradient_leaves_a_member(row):
    family = row.family
    lam, other = (narrow(member(stacked(row), i)) for i in (0, 1))
    towards = family.combine((1.0, other), (-1.0, lam))

    @jax.jit
    @jax.vmap
    def after(scale):
        found = []
        for gradient in (lam, towards):
            gradient = jax.tree.map(lambda x: scale * x, gradient)  # no sum, infinities stay
            new = blr.natural_step(
                family, lam, gradient, 0.3, prior=blr.Distribution(family, other), ess=5.0
            )
            mean = jnp.isfinite(numbers(family.mean(new))).all() | ~jnp.all(family.has_mean(new))
            inside = jnp.all(family.in_domain(new)) & jnp.isfinite(numbers(new)).all()
            found.append(jnp.stack([inside, mean, jnp.any(numbers(new) != numbers(lam))]))
        return jnp.stack(found)

    found = np.asarray(after(jnp.concatenate([jnp.asarray(ABSURD), jnp.array([0.1])])))
    assert found[:, :, :2].all(), [ABSURD[i] for i, *_ in np.argwhere(~found[:-1, :, :2])]
    assert found[-1, :, 2].all()  # an ordinary one is a step
    assert not found[-3:-1, 0, 2].any()  # infinite, and not a number: none


def test_independent_members_are_judged_one_by_one():
    """By hand: without a gradient, of N(0, 1) half, and half of the prior."""
    field = families.MeanField("normal")
    lam = field.natural(mean={"a": jnp.zeros(3)}, precision=1.0)
    gradient = field.Natural(
        {"a": jnp.array([0.0, np.nan, np.inf])}, {"a": jnp.array([0.0, -0.5, -1e38])}
    )
    prior = blr.distribution("normal", mean=0.0, precision=3.0)
    new = blr.natural_step(field, lam, gradient, 0.5, prior=prior)
    np.testing.assert_allclose(field.precision(new)["a"], [2.0, 1.0, 1.0])
    np.testing.assert_allclose(field.mean(new)["a"], 0.0)


def test_the_plain_step_is_the_formula_wherever_it_leads():
    normal = families.get("normal")
    lam = normal.natural(mean=0.0, precision=1.0)
    away = normal.Natural(jnp.zeros(()), jnp.array(1e3))  # of precision -2000
    prior = blr.Distribution(normal, lam)
    new = blr.natural_step(normal, lam, normal.combine((-1.0, away)), 0.5, prior, step="plain")
    assert float(new.quadratic) == -0.5 + 500.0 and not normal.in_domain(new)
    guarded = blr.natural_step(normal, lam, normal.combine((-1.0, away)), 0.5, prior)
    assert normal.in_domain(guarded)
    lost = blr.natural_step(normal, lam, normal.combine((np.nan, lam)), 0.5, prior, step="plain")
    assert np.isnan(lost.quadratic)
