"""The deep-learning rows of the table, each a short composition of the rule's parts."""

from blr_optax.optimizers.adaptive import adam, rmsprop
from blr_optax.optimizers.checkpoint import TorchIvon, from_torch_ivon, to_torch_ivon
from blr_optax.optimizers.gradient import gradient_descent, sgd
from blr_optax.optimizers.ivon import ivon, soba
from blr_optax.optimizers.lora import ivon_lora, signal_to_noise
from blr_optax.optimizers.newton import newton, online_newton, variational_online_newton
from blr_optax.optimizers.per_example import ogn, vogn
from blr_optax.optimizers.vadam import vadam, vprop

__all__ = [
    "TorchIvon",
    "adam",
    "from_torch_ivon",
    "gradient_descent",
    "ivon",
    "ivon_lora",
    "newton",
    "ogn",
    "online_newton",
    "rmsprop",
    "sgd",
    "signal_to_noise",
    "soba",
    "to_torch_ivon",
    "vadam",
    "variational_online_newton",
    "vogn",
    "vprop",
]
