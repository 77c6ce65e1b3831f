"""Benchmarks: images + metadata -> a table with intervals. Types: `benchmark.py`; program: `scripts/evaluate.py`."""
