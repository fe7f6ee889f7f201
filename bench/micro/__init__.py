"""Micro-benchmarks with pytest-benchmark; bench/README.md says how to run and compare them."""
