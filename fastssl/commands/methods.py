"""`fastssl methods`: the methods and their papers."""

from __future__ import annotations

from fastssl.errors import no_arguments
from fastssl.methods import METHODS


def main(arguments: list[str]) -> int:
    """`fastssl methods`."""
    no_arguments(arguments)
    width = max(map(len, METHODS))
    for name, cls in sorted(METHODS.items()):
        summary = (cls.__doc__ or "").partition("\n")[0]
        print(f"{name:<{width}}  {cls.Config.paper:<18} {summary}".rstrip())
    return 0
