"""What importing costs: processor seconds of `import blr_optax` after optax, in fresh interpreters.

python -m benchmarks.bench_import
"""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = """
import time, jax, optax
start = time.thread_time()
import blr_optax
print(time.thread_time() - start)
"""


def main(rounds: int = 7) -> None:
    """Print the median."""
    runs = [
        subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
        for _ in range(rounds)
    ]
    print(f"import blr_optax: {statistics.median(float(run.stdout) for run in runs):.3f} s")


if __name__ == "__main__":
    main()
