"""Run parts as processes with a time-out, and record their results; no process outlives its part."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from .part_context import NUMBERS
from .part_process import EXIT_SKIPPED
from .parts import FAILED, PASSED, SKIPPED, TIMEOUT, Part

Record = dict[str, Any]

GRACE_S = 2.0  # Between SIGTERM and SIGKILL
TAIL = 6000  # Characters of the output that are kept


def command(part: Part, folder: Path, device: str, data: Path | None) -> list[str]:
    """The command line of a part's process."""
    words = [sys.executable, "-m", "bench.gpu.part_process", part.function, "--folder", str(folder), "--device", device]
    return [*words, *(["--data", str(data)] if data else [])]


def run_part(
    part: Part,
    device: str,
    data: Path | None,
    *,
    seconds: float,
    earlier: Record | None = None,
    command: Callable[[Part, Path, str, Path | None], list[str]] = command,
) -> Record:
    """Run a part for at most `seconds` and return its record.

    `earlier`: the record of an interrupted try on the same device, whose results are not measured again.
    """
    with TemporaryDirectory(prefix=f"bench-gpu-{part.name}-") as name:
        folder = Path(name)
        if earlier:
            (folder / NUMBERS).write_text(json.dumps({"numbers": earlier["numbers"]}))
        words, started = command(part, folder, device, data), time.monotonic()
        with (folder / "output").open("w+b") as output:
            # A rehearsal is too small for several threads, which would wait for one another on a busy machine
            threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
            code = _run(words, threads | os.environ, output.fileno(), seconds)
            taken_s = time.monotonic() - started
            output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL))
            tail = output.read().decode(errors="replace")
        found = json.loads((folder / NUMBERS).read_text()) if (folder / NUMBERS).exists() else {}
    status = {0: PASSED, EXIT_SKIPPED: SKIPPED, None: TIMEOUT}.get(code, FAILED)
    return {
        "part": part.name,
        "title": part.title,
        "status": status,
        "device": device,
        "seconds": round(taken_s, 2),
        "allowed_s": round(seconds, 2),
        "command": " ".join(words),
        "exit_code": code,
        "reason": found.get("skipped"),
        "numbers": found.get("numbers", {}),
        "errors": found.get("errors", {}),
        "tail": tail,
    }


def _run(words: list[str], environment: dict[str, str], output: int, seconds: float) -> int | None:
    """The exit code, or None after the time-out; the process and its children have ended then."""
    # A new session, so that the process and its children can be ended together
    process = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(max(0.0, seconds - GRACE_S))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process group, which may outlive the process."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_S if sent == signal.SIGTERM else None)
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit inside the `with` block, so that a running part is ended too."""

    def stop(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
