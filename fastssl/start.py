"""The `fastssl` program: settings that must precede the import of torch, then the command line."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NoReturn

# If any of these is set, the user has decided how threads wait
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
_STAT = Path("/proc/stat")  # Linux only, as is torch's use of libgomp
_SAMPLE_S = 0.05
_ENOUGH = 0.75  # Of our cores; if fewer are idle, waiting threads sleep


def command() -> NoReturn:
    """Run the command line and exit the process."""
    let_waiting_threads_sleep()
    from fastssl.cli import command

    command()


def let_waiting_threads_sleep() -> None:
    """On a busy machine, let OpenMP threads sleep instead of spin while they wait; call it before torch is loaded.

    By default they spin for 15 ms, which on a busy machine takes a core from the very thread that they wait for; on an
    idle one, sleeping costs up to a third of the speed. Changes nothing if the environment sets how threads wait.
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
    """Over all cores since boot, in hundredths of a second."""
    user, nice, system, idle, waiting, *others = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
    return idle + waiting, user + nice + system + idle + waiting + sum(others)


def _our_cores() -> int:
    return len(os.sched_getaffinity(0))
