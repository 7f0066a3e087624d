"""What several tests of families need."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.flatten_util import ravel_pytree


@functools.cache
def program(function, *static):
    """A function or method as one program; the same one whenever it is asked for again."""
    return jax.jit(function, static_argnames=static)


def natural(row, standard):
    """lambda of a member of a row."""
    return program(row.family.natural)(**{k: np.asarray(v, float) for k, v in standard.items()})


def standards(row):
    """The standard parameters of all members of a row in one batch, in numpy and float64."""
    return {k: np.stack([s[k] for s in row.members]).astype(float) for k in row.members[0]}


@functools.cache
def stacked(row):
    """All members of a row in one batch, in numpy and float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, natural(row, standards(row)))


def member(tree, i):
    """One of a batch."""
    return jax.tree.map(lambda x: x[i], tree)


def learnt(family, x):
    """The fields of lambda or mu that move."""
    return {name: getattr(x, name) for name in family.domains}


def ravel_learnt(family, x):
    """The same as one vector, in the order of the fields, and the way back."""
    vector, back = ravel_pytree(list(learnt(family, x).values()))
    return vector, lambda flat: dict(zip(family.domains, back(flat), strict=True))


def flat_learnt(family, x):
    return ravel_learnt(family, x)[0]


def flat(family, x):
    """`flat_learnt` in numpy."""
    return np.concatenate([np.ravel(field) for field in learnt(family, x).values()])


def formula(family):
    """A(lambda) as written, without the derivative rule."""
    return lambda lam: getattr(type(family), "plain_log_partition", type(family).log_partition)(
        family, lam
    )


def direction(family, lam, seed=0):
    """A random change of the learnt fields, symmetric where it must be."""
    rng = np.random.default_rng(seed)
    change = jax.tree.map(lambda x: jnp.asarray(np.zeros(jnp.shape(x), jnp.result_type(x))), lam)
    fields = {}
    for name, domain in family.domains.items():
        x = getattr(lam, name)
        z = rng.normal(size=np.shape(x))
        z = (z + z.swapaxes(-1, -2)) / 2 if domain.event_ndim == 2 else z
        fields[name] = jnp.asarray(np.asarray(z, jnp.result_type(x)))
    return change._replace(**fields)


def symmetric_projector(family, lam):
    """The matrix that replaces matrix fields by their symmetric part."""

    def block(name):
        size = np.size(getattr(lam, name))
        if family.domains[name].event_ndim < 2:
            return np.eye(size)
        side = np.shape(getattr(lam, name))[-1]
        units = np.eye(size).reshape(size, side, side)
        return ((units + units.swapaxes(1, 2)) / 2).reshape(size, size)

    return scipy.linalg.block_diag(*map(block, family.domains))
