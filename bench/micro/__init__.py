"""Micro-benchmarks of pytest-benchmark; bench/README.md says how to run and compare them."""
