"""Benchmarks; `python -m benchmarks` runs the step benchmark."""
