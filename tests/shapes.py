"""Check the shapes of signatures at every call: import this before the package.

The package imports the names of its annotations for type checkers only, so it is imported as a type
checker sees it; what other packages do for type checkers only must be over before.
"""

import importlib
import typing

import jaxtyping

PARTS = ("_continuous", "_discrete", "_matrix", "_conditional", "_lifts", "_numerics")
CHECKED = ["blr_optax.metrics", "blr_optax._predict"]
CHECKED += [f"blr_optax.families.{part}" for part in PARTS]  # their bases make classes of their own
OTHERS = (
    "beartype.door", "chex", "equinox", "flax.linen", "flax.nnx", "hypothesis",
    "matplotlib.pyplot", "mpmath", "numpyro.distributions", "optax.contrib", "orbax.checkpoint",
    "scipy.special", "scipy.stats", "sklearn",
)  # fmt: skip

for name in OTHERS:
    importlib.import_module(name)
typing.TYPE_CHECKING = True
with jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
    importlib.import_module("blr_optax")
typing.TYPE_CHECKING = False
