"""The `fastssl` program: what has to be settled before torch is loaded, and then the command line."""

from __future__ import annotations

import os
from typing import NoReturn

# By any of these a user has said how threads wait
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
_SPINS = 30_000  # about 1.5 ms


def command() -> NoReturn:
    """Run the command line as the whole of a process."""
    wait_briefly()
    from fastssl.cli import command

    command()


def wait_briefly() -> None:
    """Let threads that wait for others sleep soon, unless the environment says how they wait; before torch is loaded.

    By default they spin for 15 ms, which takes a core from the very thread that they wait for where a machine has other
    work: training was seen to be a hundred times slower beside two busy processes. Threads that sleep at once lost a
    third on an idle machine.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = f"{_SPINS}"
