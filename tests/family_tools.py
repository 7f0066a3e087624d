"""What several tests of families need."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def natural(row, standard):
    """lambda of a member of a row."""
    return row.family.natural(**{k: jnp.asarray(v) for k, v in standard.items()})


def learnt(family, x):
    """The fields of lambda or mu that move."""
    return {name: getattr(x, name) for name in family.domains}


def ravel_learnt(family, x):
    """The same as one vector, in the order of the fields, and the way back."""
    vector, back = ravel_pytree(list(learnt(family, x).values()))
    return vector, lambda flat: dict(zip(family.domains, back(flat), strict=True))


def flat_learnt(family, x):
    return ravel_learnt(family, x)[0]


def formula(family):
    """A(lambda) as written, without the derivative rule."""
    return lambda lam: getattr(type(family), "plain_log_partition", type(family).log_partition)(
        family, lam
    )


def direction(family, lam, seed=0):
    """A random change of the learnt fields, symmetric where it must be."""
    rng = np.random.default_rng(seed)
    change = {}
    for name, domain in family.domains.items():
        x = getattr(lam, name)
        z = rng.normal(size=np.shape(x))
        z = (z + z.swapaxes(-1, -2)) / 2 if domain.event_ndim == 2 else z
        change[name] = jnp.asarray(z, jnp.asarray(x).dtype)
    return jax.tree.map(jnp.zeros_like, lam)._replace(**change)


def symmetric_projector(family, lam):
    """The matrix that replaces matrix fields by their symmetric part."""
    vector, to_fields = ravel_learnt(family, lam)

    def project(x):
        is_matrix = {name: family.domains[name].event_ndim == 2 for name in family.domains}
        fields = to_fields(x).items()
        return ravel_pytree([(v + v.T) / 2 if is_matrix[k] else v for k, v in fields])[0]

    return jax.vmap(project)(jnp.eye(vector.size, dtype=vector.dtype))
