"""The deep-learning rows of the table, each a short composition of the rule's parts."""

from blr_optax.optimizers.adaptive import adam, rmsprop
from blr_optax.optimizers.evon import evon, whiten
from blr_optax.optimizers.gradient import gradient_descent, sgd
from blr_optax.optimizers.ivon import ivon, soba
from blr_optax.optimizers.newton import newton, online_newton, variational_online_newton
from blr_optax.optimizers.per_example import ogn, vogn
from blr_optax.optimizers.structured import kronecker_newton, low_rank_newton
from blr_optax.optimizers.vadam import vadam, vprop

__all__ = [
    "adam",
    "evon",
    "gradient_descent",
    "ivon",
    "kronecker_newton",
    "low_rank_newton",
    "newton",
    "ogn",
    "online_newton",
    "rmsprop",
    "sgd",
    "soba",
    "vadam",
    "variational_online_newton",
    "vogn",
    "vprop",
    "whiten",
]
