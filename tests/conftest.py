"""What every test relies on: eight devices, deterministic examples, and the fixtures of all."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any


def release(package: str) -> tuple[int, ...]:
    """The first three numbers of the installed version, without an import."""
    return tuple(int(re.match(r"\d*", part)[0] or 0) for part in version(package).split(".")[:3])


# These are read once, when jax starts; setting them later does nothing, and says nothing.
assert "jax" not in sys.modules, "a pytest plugin imported jax before tests/conftest.py"
ON_DEVICE = os.environ.get("BLR_DEVICE") == "1"
if not ON_DEVICE:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Eight devices for the sharding tests; everything else runs on the first one.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
    # The suite compiles far more than it computes, and these halve the time that XLA takes. What
    # users run is compiled with XLA's own choices: BLR_XLA=default tests that.
    if os.environ.get("BLR_XLA") != "default":
        os.environ["XLA_FLAGS"] += (
            " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
        )
        # XLA ends the process at a flag that it no longer has.
        if release("jaxlib") < (0, 11):
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("MPLBACKEND", "agg")
# A program is compiled once by a worker and the interpreters that it starts, and kept for the next
# run. Workers have a folder each, as jax does not write its files at once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache"))
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] += "/" + os.environ["PYTEST_XDIST_WORKER"]
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from tools import load_golden  # noqa: E402

# The shapes that signatures state are checked at every call (tests/test_shapes_long.py).
if os.environ.get("BLR_SHAPES") == "1":
    import shapes  # noqa: F401

settings.register_profile(
    "blr_optax",
    deadline=None,  # the first example of a shape pays for its compilation
    derandomize=True,  # a red run must be red again
    max_examples=25,
    # `x64` and `strict` set a mode and nothing else: sharing them between examples is right.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("blr_optax")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the files `*_long.py` as slow; rows are marked by their registries."""
    if item.path.stem.endswith("_long"):
        item.add_marker(pytest.mark.slow)


# Files over a registry or over the notebooks, whose ids begin with the name of what is tested.
BY_ROW = (
    "test_contract.py",
    "test_families.py",
    "test_families_long.py",
    "test_blr_families.py",
    "test_blr_families_long.py",
    "test_notebooks_long.py",
)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all tests of a file, or of a row in a file over a registry, to one worker.

    They share programs, which no other worker then compiles again.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            row = re.search(r"\[([^]-]+)", test) if file.endswith(BY_ROW) else None
            return f"{file}::{row[1]}" if row else file

    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what cannot run: device tests unless they are asked for, whatever -m says; nnx."""
    if release("flax") < (0, 12, 7):  # the newest flax that jax 0.9 can have is 0.12.6
        old_flax = pytest.mark.skip(reason="nnx.as_pure came with flax 0.12.7")
        for item in items:
            if "nnx" in item.nodeid:
                item.add_marker(old_flax)
    if not ON_DEVICE:
        needs_device = pytest.mark.skip(reason="needs an accelerator and BLR_DEVICE=1")
        for item in items:
            if item.get_closest_marker("device"):
                item.add_marker(needs_device)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict]:
    """`golden(name)` is `load_golden(name)`."""
    return load_golden


@pytest.fixture(autouse=True, scope="module")
def free_memory() -> Iterator[None]:
    """Compiled functions of a module are not used by the next one; kept, they are gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float64", "float32"])
def dtype(request: pytest.FixtureRequest, x64: None) -> type:
    """Both precisions, where float64 is allowed."""
    return getattr(np, request.param)


@pytest.fixture
def strict() -> Iterator[None]:
    """Jax's strict modes for one test: no silent broadcast, no key used twice, no leaked tracer.

    They cannot be global: optax itself relies on rank promotion, many a test draws twice from
    one key on purpose, and the leak check switches caches off.
    """
    with (
        jax.numpy_rank_promotion("raise"),
        jax.debug_key_reuse(True),
        jax.checking_leaks(),
    ):
        yield
