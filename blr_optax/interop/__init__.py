"""Checkpoints of other libraries."""

from blr_optax.interop.torch_ivon import TorchIvon, from_torch_ivon, to_torch_ivon

__all__ = ["TorchIvon", "from_torch_ivon", "to_torch_ivon"]
