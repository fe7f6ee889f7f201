"""Benchmarks next to what a user would use instead; run `python -m bench`."""
