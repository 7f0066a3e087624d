"""The deep-learning rows of the table, each a short composition of the rule's parts."""

from blr_optax.optimizers.adaptive import adam, rmsprop
from blr_optax.optimizers.binary import bayesbinn, random_signs, ste
from blr_optax.optimizers.checkpoint import TorchIvon, from_torch_ivon, to_torch_ivon
from blr_optax.optimizers.dropout import dropout
from blr_optax.optimizers.evon import evon, whiten
from blr_optax.optimizers.gradient import gradient_descent, sgd
from blr_optax.optimizers.ivon import ivon, soba
from blr_optax.optimizers.lie_group import lie_additive, lie_affine
from blr_optax.optimizers.lie_multiplicative import lie_multiplicative
from blr_optax.optimizers.lora import ivon_lora, signal_to_noise
from blr_optax.optimizers.mixture_ivon import mixture_ivon
from blr_optax.optimizers.multimodal import mixture_newton, multimodal
from blr_optax.optimizers.newton import newton, online_newton, variational_online_newton
from blr_optax.optimizers.per_example import ogn, vogn
from blr_optax.optimizers.sam import bsam, sam
from blr_optax.optimizers.structured import kronecker_newton, low_rank_newton
from blr_optax.optimizers.vadam import vadam, vprop

__all__ = [
    "TorchIvon",
    "adam",
    "bayesbinn",
    "bsam",
    "dropout",
    "evon",
    "from_torch_ivon",
    "gradient_descent",
    "ivon",
    "ivon_lora",
    "kronecker_newton",
    "lie_additive",
    "lie_affine",
    "lie_multiplicative",
    "low_rank_newton",
    "mixture_ivon",
    "mixture_newton",
    "multimodal",
    "newton",
    "ogn",
    "online_newton",
    "random_signs",
    "rmsprop",
    "sam",
    "sgd",
    "signal_to_noise",
    "soba",
    "ste",
    "to_torch_ivon",
    "vadam",
    "variational_online_newton",
    "vogn",
    "vprop",
    "whiten",
]
