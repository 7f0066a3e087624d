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
bare = time.thread_time() - start
[getattr(blr_optax, name) for name in blr_optax.__all__]
print(bare, time.thread_time() - start)
"""


def main(rounds: int = 7) -> None:
    """Print the medians for the bare import and for every public name."""
    runs = [
        subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
        for _ in range(rounds)
    ]
    bare, everything = zip(*(map(float, run.stdout.split()) for run in runs), strict=True)
    print(f"import blr_optax: {statistics.median(bare):.3f} s")
    print(f"every public name: {statistics.median(everything):.3f} s")


if __name__ == "__main__":
    main()
