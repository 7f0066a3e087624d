"""The notebooks run as plain scripts, and keep their promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

from test_notebooks import each
from tools import ROOT

SECONDS = 280  # generous, for a loaded machine; pytest's own limit is 300


@each
def test_runs_as_a_script(path: Path, tmp_path: Path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    # A reader has no eight devices; what compiles cheaply stays (tests/conftest.py).
    flags = environment.get("XLA_FLAGS", "")
    environment["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(path)],
        cwd=tmp_path,  # it must not depend on where it is started
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout
