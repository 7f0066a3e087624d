"""Other libraries: models of Flax, and checkpoints of ivon-opt."""

from blr_optax.interop import linen, nnx
from blr_optax.interop.torch_ivon import TorchIvon, from_torch_ivon, to_torch_ivon

__all__ = ["TorchIvon", "from_torch_ivon", "linen", "nnx", "to_torch_ivon"]
