"""The deep-learning rows of the table, each a short composition of the rule's parts."""

from blr_optax.optimizers._first_weights import relative_noise, relative_prior
from blr_optax.optimizers.adam import adam, rmsprop
from blr_optax.optimizers.bayesbinn import bayesbinn, random_signs, ste
from blr_optax.optimizers.dropout import dropout
from blr_optax.optimizers.evon import evon, orthogonalize
from blr_optax.optimizers.ivon import ivon, soba
from blr_optax.optimizers.ivon_lora import ivon_lora, signal_to_noise
from blr_optax.optimizers.lie_group import lie_additive, lie_affine, lie_multiplicative
from blr_optax.optimizers.mixture_ivon import mixture_ivon
from blr_optax.optimizers.mixture_newton import mixture_newton, mixture_vi
from blr_optax.optimizers.newton import newton, online_newton, variational_online_newton
from blr_optax.optimizers.round_stochastically import round_stochastically
from blr_optax.optimizers.sam import bsam, sam
from blr_optax.optimizers.sgd import gradient_descent, sgd
from blr_optax.optimizers.structured_newton import kronecker_newton, low_rank_newton
from blr_optax.optimizers.vadam import vadam, vprop
from blr_optax.optimizers.vogn import ogn, vogn

__all__ = [
    "adam",
    "bayesbinn",
    "bsam",
    "dropout",
    "evon",
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
    "mixture_vi",
    "newton",
    "ogn",
    "online_newton",
    "random_signs",
    "relative_noise",
    "relative_prior",
    "rmsprop",
    "round_stochastically",
    "sam",
    "sgd",
    "signal_to_noise",
    "soba",
    "ste",
    "vadam",
    "variational_online_newton",
    "vogn",
    "vprop",
    "orthogonalize",
]
