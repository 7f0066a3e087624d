"""The deep-learning rows of the table, each a short composition of the rule's parts."""

from blr_optax.optimizers.adaptive import adam, rmsprop
from blr_optax.optimizers.dropout import dropout
from blr_optax.optimizers.gradient import gradient_descent, sgd
from blr_optax.optimizers.ivon import ivon, soba
from blr_optax.optimizers.mixture_ivon import mixture_ivon
from blr_optax.optimizers.multimodal import mixture_newton, multimodal
from blr_optax.optimizers.newton import newton, online_newton, variational_online_newton
from blr_optax.optimizers.per_example import ogn, vogn
from blr_optax.optimizers.vadam import vadam, vprop

__all__ = [
    "adam",
    "dropout",
    "gradient_descent",
    "ivon",
    "mixture_ivon",
    "mixture_newton",
    "multimodal",
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
]
