"""`blr_update` on every registered family: every estimator, learning, conditional families."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_tools import learnt
from test_blr_families import (
    CENTRE,
    CONDITIONAL_STARTS,
    bent,
    bowl,
    conditional_start,
    every_row,
    every_rule,
    fitting,
    floats,
    free_energy,
    posterior_of,
    run,
)
from tools import close, near

import blr_optax as blr
from blr_optax import estimators, families


@every_row
def test_learning_lowers_the_free_energy(x64, row):
    """From another member towards the optimum, with the family's default estimator."""
    prior, start = posterior_of(row), posterior_of(row, 1)

    @jax.jit
    def learn(prior, start):
        tx = blr.blr_update(row.family, bent, 0.2, prior=prior, init=start, key=3)
        params, state = run(tx, start, steps=15)
        q, over = blr.posterior(state, params), state.reader.family
        log_q = over.log_prob(q.natural, blr.sample(state, params))
        return params, state, q, q.mean, over.in_domain(q.natural), log_q

    params, state, q, mean, inside, log_q = learn(prior, start)
    assert int(state.skipped) == 0 and int(state.count) == 15
    assert bool(inside)
    energy = jax.jit(lambda lam, prior: free_energy(row.family, lam, prior))
    reached = row.family.Natural(*q.natural)
    assert energy(reached, prior.natural) < energy(start.natural, prior.natural)
    near(params, mean, rtol=1e-6, atol=1e-8)
    assert np.all(np.isfinite(log_q))


@every_rule
def test_every_estimator_that_applies(x64, row, rule):
    """Under jit, scan, schedules and chain: finite steps inside the domain, one state type."""
    start = posterior_of(row, 1)
    total = int(row.members[0]["total"]) if "total" in row.family.known else None
    estimator = fitting(row.family, total)[rule]

    @jax.jit
    def learn(prior, start):
        tx = optax.chain(
            blr.blr_update(
                row.family,
                lambda theta, shift: bent(theta, shift),
                optax.linear_schedule(0.3, 0.1, 4),
                ess=optax.constant_schedule(2.0),
                prior=prior,
                init=start,
                estimator=estimator,
            )
        )

        def step(carry, shift):
            params, state = carry
            updates, state = tx.update(None, state, params, batch=(shift,))
            return (optax.apply_updates(params, updates), state), None

        params = floats(start.mean)
        carry = (params, tx.init(params))
        (params, state), _ = jax.lax.scan(step, carry, jnp.linspace(0.1, 0.4, 4))
        q = blr.posterior(state, params)
        return q.natural, q.family.in_domain(q.natural), state[0].skipped

    reached, inside, skipped = learn(posterior_of(row), start)
    assert bool(inside) and int(skipped) == 0
    moved = [
        np.any(np.asarray(a) != b)
        for a, b in zip(jax.tree.leaves(learnt(row.family, reached)),
                        jax.tree.leaves(learnt(row.family, start.natural)), strict=True)
    ]  # fmt: skip
    assert any(moved)


@pytest.mark.parametrize("name", CONDITIONAL_STARTS)
def test_conditional_families_update_through_the_same_call(x64, name):
    """The optimum is N(CENTRE, diag(1, 1/3)), which each of these families contains or borders."""

    @jax.jit
    def learn(start):
        tx = optax.chain(
            blr.blr_update(
                name,
                bowl,
                optax.linear_schedule(0.3, 0.05, 60),
                ess=10.0,
                init=start,
                estimator=estimators.monte_carlo(20, antithetic=True),
            )
        )
        params, state = run(tx, start, steps=60, batch=(10.0,))
        q = blr.posterior(state, params)
        log_q = q.log_prob(blr.sample(state, params))
        draws = q.sample(jax.random.key(0), (3,))
        return params, state[0].skipped, q.proper, q.mean, q.variance, log_q, draws

    params, skipped, proper, mean, variance, log_q, draws = learn(conditional_start(name))
    assert int(skipped) == 0 and bool(proper)
    close(np.reshape(mean, 2), CENTRE, atol=0.1)
    close(np.reshape(variance, 2), [1.0, 1 / 3], rtol=0.25)
    near(params, mean, rtol=1e-9, atol=1e-9)
    assert np.all(np.isfinite(log_q))
    assert draws.shape == (3, *params.shape)


@pytest.mark.parametrize("name", [n for n in CONDITIONAL_STARTS if n != "matrix_gaussian"])
def test_conditional_families_over_a_tree_are_those_over_its_flat_vector(x64, name):
    """The same draws and the same steps, whether theta is a vector or a tree of its parts."""
    tree = lambda theta: {"a": theta[:1].reshape(1, 1), "b": theta[1]}  # noqa: E731
    whole = lambda theta: jnp.append(theta["a"].ravel(), theta["b"])  # noqa: E731
    over_tree = lambda theta, scale: bowl(whole(theta), scale)  # noqa: E731

    @jax.jit
    def learn(start):
        flat, diagonal = floats(start.mean), families.get("gaussian_diagonal")
        prior = diagonal.natural(mean=tree(jnp.zeros(2)), precision=0.1)

        def three(params, loss, **more):
            tx = blr.blr_update(name, loss, 0.2, ess=10.0, init=start, **more)

            def step(carry, _):
                params, state = carry
                updates, state = tx.update(None, state, params, batch=(10.0,))
                return (optax.apply_updates(params, updates), state), None

            params, state = jax.lax.scan(step, (params, tx.init(params)), None, length=3)[0]
            q, draw = blr.posterior(state, params), blr.sample(state, params)
            return params, q, draw, q.variance, q.log_prob(draw)

        runs = three(flat, bowl), three(tree(flat), over_tree)
        pulled, *_ = three(tree(flat), over_tree, prior=blr.Distribution(diagonal, prior))
        (found, r, *_) = runs[1]
        again = blr.blr_update(name, bowl, 0.2, init=r)  # a posterior is a first posterior again
        return runs, pulled, again.init(found).natural

    ((vector, _, draw, spread, log_q), other_run), pulled, again = learn(conditional_start(name))
    found, r, other, other_spread, other_log_q = other_run
    near(found, tree(vector), rtol=1e-9, atol=1e-12)
    near(other, tree(draw), rtol=1e-9, atol=1e-12)
    near(other_spread, tree(spread), rtol=1e-9)
    close(other_log_q, log_q, rtol=1e-9)
    assert np.any(whole(pulled) != whole(found))
    near(again, r.natural)
