"""Shapes and types are checked while tests run: `BLR_SHAPES=1 pytest tests/test_metrics.py`, say.

jaxtyping's import hook puts beartype around every function of the modules below, and an argument
or result of another shape than its annotation is an error. `test_types_long` runs tests this way.
"""

import importlib
import typing

import jax
import jaxtyping
import numpy as np

CHECKED = ["blr_optax.families", "blr_optax.metrics", "blr_optax._predict"]
# What these import, before TYPE_CHECKING is set: others' imports under it may be circular.
OTHERS = ("beartype", "jax", "optax", "matplotlib.axes", "matplotlib.figure")


def install() -> None:
    """Import blr_optax with its annotations resolved and checked."""
    for name in OTHERS:
        importlib.import_module(name)
    typing.TYPE_CHECKING = True
    jaxtyping.Array = jax.Array | np.ndarray | np.generic  # tests give numpy's, shapes are the same
    with jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
        importlib.import_module("blr_optax")
    typing.TYPE_CHECKING = False
