"""Measurements beside what a user would take instead; run `python -m bench`."""
