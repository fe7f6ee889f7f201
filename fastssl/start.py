"""The `fastssl` program: what has to be settled before torch is loaded, and then the command line."""

from __future__ import annotations

import os
from typing import NoReturn

# By any of these a user has said how threads wait
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def command() -> NoReturn:
    """Run the command line as the whole of a process."""
    wait_asleep()
    from fastssl.cli import command

    command()


def wait_asleep() -> None:
    """Let threads that wait for others sleep, unless the environment says how they wait; before torch is loaded.

    They spin by default, which takes a core from the very thread that they wait for where a machine has other work:
    with a core's worth of it, training was seen to be ten times slower.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = "0"
