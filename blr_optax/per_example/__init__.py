"""Statistics of the gradients of single examples, at about the price of one gradient."""

from blr_optax.per_example._explain import explain, per_example_dot
from blr_optax.per_example._statistics import PerExample, per_example
from blr_optax.per_example._taps._moments import KroneckerFactors

__all__ = ["KroneckerFactors", "PerExample", "explain", "per_example", "per_example_dot"]
