"""Every registered family: batches, jit and float32 agree; what can be differentiated twice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from family_tools import (
    learnt,
    member,
    program,
)
from jax.flatten_util import ravel_pytree
from test_families import arguments, cast, compiled, every_row, everything, facts, numbers, vmapped
from tools import close


@every_row
def test_batch_equals_loop_and_jit_equals_eager(x64, row):
    family, args = row.family, arguments(row)
    count = range(len(row.members))
    loop = jax.tree.map(lambda *x: np.stack(x), *(compiled(row)(*member(args, i)) for i in count))
    close(program(family.fisher)(args[0]), facts(row)["fisher"], rtol=1e-10, atol=1e-11)
    eager = everything(family)(*jax.tree.map(jnp.asarray, args))
    for found in (eager, vmapped(row)(*args)):
        for name in loop:
            agree = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10, err_msg=name)
            jax.tree.map(agree, found[name], loop[name])


@every_row
def test_twice_differentiable(x64, row):
    """Gradients and Hessian products are the finite differences of values and gradients."""
    family = row.family
    names = ("log_partition", "log_prob", "entropy", "kl", "mean", "variance")
    lam, other, theta = member(arguments(row), 0)
    pair = (learnt(family, lam), learnt(family, other))
    start, unravel = ravel_pytree(jax.tree.map(jnp.asarray, pair))
    start = np.asarray(start)
    weights = np.random.default_rng(0).uniform(1, 2, 64)

    def total(flat):
        x, y = unravel(flat)
        a, b = lam._replace(**x), other._replace(**y)
        values = {
            "log_partition": family.log_partition(a),
            "log_prob": family.log_prob(a, theta),
            "entropy": family.entropy(a),
            "kl": family.kl(a, b),
            "mean": family.mean(a),
            "variance": family.variance(a),
        }
        flat = ravel_pytree([values[name] for name in names])[0]
        return jnp.sum(weights[: flat.size] * flat)

    v = np.random.default_rng(1).normal(size=start.size) * (0.1 + np.abs(start))

    @jax.jit
    def at(x):
        return jax.jvp(jax.value_and_grad(total), (x,), (v,))

    h = 1e-5
    points = (start, start + h * v, start - h * v)
    (here, bends), (ahead, _), (behind, _) = (numbers(at(x)) for x in points)
    close(here[1] @ v, (ahead[0] - behind[0]) / (2 * h), rtol=1e-5, atol=1e-6)
    bent = (ahead[1] - behind[1]) / (2 * h)
    close(bends[1], bent, rtol=1e-4, atol=1e-5 * (1 + np.max(np.abs(bent))))


@every_row
def test_float32_stays_float32_and_agrees(x64, row):
    """The truth is the float64 value at the same float32 lambda."""
    family, args = row.family, arguments(row)
    narrow = cast(args, np.float32)
    found, truth = numbers((compiled(row)(*narrow), vmapped(row)(*cast(narrow, np.float64))))
    is_float = lambda x: np.issubdtype(x.dtype, np.floating)  # noqa: E731
    assert {x.dtype for x in jax.tree.leaves(found) if is_float(x)} == {np.dtype("float32")}
    for name in found:
        sizes = [
            np.max(np.abs(x), initial=0.0) for x in jax.tree.leaves(truth[name]) if is_float(x)
        ]
        scale = max(map(float, sizes), default=0.0)
        rtol = (
            1e-2 if name in ("solve", "inverse_fisher_product", "base_measure_gradient") else 1e-4
        )
        agree = partial(np.testing.assert_allclose, rtol=rtol, atol=rtol * scale, err_msg=name)
        jax.tree.map(agree, found[name], truth[name])
    drawn = jax.eval_shape(lambda lam: family.sample(jax.random.key(0), lam), narrow[0])
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(drawn))
