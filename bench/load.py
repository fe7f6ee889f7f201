"""`python -m bench load`: images/s of the quickstart next to busy processes, and in percent of an idle machine's."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastssl.arguments import parse
from fastssl.benchmark.harness import require_file, write_json
from fastssl.environment import measured_on
from fastssl.errors import TrainingError
from fastssl.validation import Checked, Count

WARM_UP = 2  # Log lines during which threads are chosen and caches filled


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Measure `fastssl pretrain` next to 0, 1, 2 and 4 processes that only compute."""

    steps: Count = 240
    """steps of each run"""
    loops: tuple[int, ...] = (0, 1, 2, 4)
    """busy processes next to each run"""
    repeats: Count = 3
    """rounds; each runs every count of busy processes once"""
    json: Path | None = None
    """JSON file for the settings and results"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_file("--json", self.json)


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    options = parse(Options, arguments, prog="python -m bench load")
    facts = measured_on(torch.device("cpu"))
    rates: dict[int, list[float]] = {count: [] for count in options.loops}
    for turn in range(1, options.repeats + 1):
        for count in options.loops:
            print(f"round {turn} of {options.repeats}: {count} busy processes", file=sys.stderr)
            with busy(count):
                rates[count].append(images_per_s(options.steps))
    idle = median(rates.get(0) or [float("nan")])
    print(f"{facts['device']}, {facts['cores']} cores; medians of {options.repeats} runs of {options.steps} steps")
    print(f"{'busy processes':>14} {'images/s':>9} {'of idle':>8}   each run")
    for count, values in rates.items():
        each = " ".join(f"{value:.0f}" for value in values)
        print(f"{count:>14} {median(values):>9.0f} {median(values) / idle:>8.0%}   {each}")
    if options.json is not None:
        write_json(options.json, {**facts, "settings": asdict(options), "images_per_s": rates})
    return 0


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` processes computing inside the `with` block."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    time.sleep(0.5 if loops else 0)
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def images_per_s(steps: int) -> float:
    """Median over the log lines of a quickstart run, without the first two."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "fastssl", "pretrain", "--train.steps", str(steps), "--run.dir", str(run)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TrainingError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        records: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [record["images_per_s"] for record in records if record["event"] == "train"]
    return median(lines[WARM_UP:] or lines)
