"""The `fastssl` program: what has to be settled before torch is loaded, and then the command line."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NoReturn

# By any of these a user has said how threads wait
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
_STAT = Path("/proc/stat")  # on Linux, the only system where libgomp computes for torch
_SAMPLE_S = 0.05
_ENOUGH = 0.75  # of our cores, which have to be free of other work


def command() -> NoReturn:
    """Run the command line as the whole of a process."""
    wait_asleep_beside_others()
    from fastssl.cli import command

    command()


def wait_asleep_beside_others() -> None:
    """Let threads that wait for others sleep where other work needs the cores; before torch is loaded.

    By default they spin for 15 ms, which takes a core from the very thread that they wait for where a machine has other
    work; sleeping costs up to a third on an idle one. Nothing is set where the environment says how they wait.
    """
    if not any(name in os.environ for name in _WAITING) and _STAT.exists() and _free_cores() < _ENOUGH * _our_cores():
        os.environ["GOMP_SPINCOUNT"] = "0"


def _free_cores() -> float:
    before = _idle_and_all_ticks()
    time.sleep(_SAMPLE_S)
    after = _idle_and_all_ticks()
    idle, ticks = (late - early for late, early in zip(after, before, strict=True))
    return (os.cpu_count() or 1) * idle / max(1, ticks)


def _idle_and_all_ticks() -> tuple[int, int]:
    """Of all cores since the machine's start, in hundredths of a second."""
    user, nice, system, idle, waiting, *others = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
    return idle + waiting, user + nice + system + idle + waiting + sum(others)


def _our_cores() -> int:
    return len(os.sched_getaffinity(0))
