"""`python -m benchmarks [options]`: see `benchmarks/bench_step.py`."""

from benchmarks.bench_step import main

main()
