"""Errors of the input path that the user can act on."""

from __future__ import annotations


class DataError(ValueError):
    """The data cannot be used: what was found, what is allowed and which option to change, in a sentence."""
