"""The contract with optax: two processes with a device each take the steps of one."""

import re
import socket
import subprocess
import sys

import numpy as np
from registry import ROWS, make_batch, make_params, train
from tools import ROOT

import blr_optax as blr

TWO_PROCESSES = """
import sys, os
rank, port = int(sys.argv[1]), sys.argv[2]
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, sys.argv[3])
import jax, jax.numpy as jnp, numpy as np, optax
jax.distributed.initialize(f"localhost:{port}", 2, rank)
import blr_optax as blr
from registry import make_batch, make_params, mean_loss
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
x, y = map(np.asarray, make_batch(8))
put = lambda a, s: jax.make_array_from_callback(a.shape, NamedSharding(mesh, s), lambda i: a[i])
batch = put(x, P("d")), put(y, P("d"))
params = jax.tree.map(lambda p: put(np.asarray(p), P()), make_params())
tx = blr.ivon(0.1, ess=50.0, b2=0.95)
state = jax.jit(tx.init, out_shardings=NamedSharding(mesh, P()))(params)
@jax.jit
def step(params, state, x, y):
    grads = jax.grad(mean_loss)(blr.sample(state, params), x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state
for _ in range(3):
    params, state = step(params, state, *batch)
print("RESULT", np.asarray(params["w"].addressable_data(0)).ravel().tolist(), flush=True)
"""


def test_two_processes_agree_with_one():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    here = str(ROOT / "tests")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), port, here],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [run.communicate(timeout=240) for run in runs]
    assert all(run.returncode == 0 for run in runs), outputs
    lines = [re.search(r"RESULT \[(.*)\]", out).group(1) for out, _ in outputs]
    assert lines[0] == lines[1]
    (row,) = [r for r in ROWS if r.name == "ivon"]
    alone = train(row, blr.ivon(0.1, ess=50.0, b2=0.95), make_params(), make_batch(8), 3)[0]["w"]
    found = np.array([float(v) for v in lines[0].split(",")])
    np.testing.assert_allclose(found, np.ravel(alone), rtol=1e-5, atol=1e-6)
