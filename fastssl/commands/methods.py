"""`fastssl methods`: the methods and their papers."""

from __future__ import annotations

from fastssl.errors import no_arguments
from fastssl.methods import METHODS


def main(arguments: list[str]) -> int:
    """`fastssl methods`."""
    no_arguments(arguments)
    for name, cls in sorted(METHODS.items()):
        print(f"{name:<12} {cls.Config.paper:<18} {(cls.__doc__ or '').splitlines()[0]}")
    return 0
