"""Record a benchmark run: its environment, its JSON file, and the tables of the loss benchmark."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fastssl.environment import commit, installed_version, output, processor
from fastssl.errors import ConfigError
from fastssl.observe.screen import open_screen
from fastssl.observe.table import Table
from fastssl_pipelines.errors import DISTRIBUTION
from fastssl_pipelines.files import write_atomic

PACKAGES = (DISTRIBUTION, "torch", "triton", "numpy", "lightly", "pytorch-metric-learning")


@dataclass(frozen=True)
class Row:
    """One column in one mode; what was not measured is None, and the note says why."""

    shape: str
    loss: str
    column: str
    launch: str
    """"plain", or "graph": the replay of a CUDA graph."""
    cache: str
    """"warm" or "cold": whether the queue is in L2. "interleaved": as the previous column left the caches."""
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    loss_error: float | None
    """Relative, of the mean loss."""
    gradient_error: float | None
    """Relative, of the query's gradient."""
    memory_bytes: int | None
    """Peak during a step, above the memory in use before it."""
    ratio_to_ours: float | None
    """Above 1: slower than fastssl."""
    note: str


def environment(command: Sequence[str], device: torch.device) -> dict[str, Any]:
    """What the results depend on: command, device and its state, versions, commit, date."""
    return {
        "command": " ".join(command),
        "device": _device_name(device),
        "device_state": _device_state(device),
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": commit(),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def _device_state(device: torch.device) -> str:
    """Driver and clocks, or how busy the CPU was before the run."""
    if device.type == "cpu":
        return f"load average {os.getloadavg()[0]:.2f} of {os.cpu_count()}"
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    return output("nvidia-smi", f"--query-gpu={query}", "--format=csv")


def write(folder: Path, name: str, facts: dict[str, Any], rows: Sequence[Any]) -> Path:
    """Write the run to <name>-<device>-<date>.json and return the path; `rows` are dataclasses."""
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = folder / f"{name}-{device}-{re.sub('[^0-9T]', '', facts['date'])}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=2).encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); change --out") from None
    return path


def show(rows: Sequence[Row]) -> None:
    """Print a table per mode, and the notes below."""
    screen = open_screen(least_width=100)
    for launch, cache in dict.fromkeys((row.launch, row.cache) for row in rows):
        own = [row for row in rows if (row.launch, row.cache) == (launch, cache)]
        headings = ("column", "ms", "p20 p80", "to ours", "loss err", "grad err", "MiB")
        table = Table(headings, "lrrrrrr", f"{own[0].loss} {own[0].shape}, {launch} launch, {cache} cache")
        for row in own:
            table.add_row(row.column, *_cells(row))
        screen.table(table)
    for name, note in dict.fromkeys((row.column, row.note) for row in rows if row.note):
        screen.line(f"  {name}: {note}")


def _cells(row: Row) -> list[str]:
    """Empty for what was not measured."""
    return [
        _text(row.median_ms, ".3f"),
        f"{row.p20_ms:.3f} {row.p80_ms:.3f}" if row.p20_ms is not None else "",
        _text(row.ratio_to_ours, ".2f"),
        _text(row.loss_error, ".0e"),
        _text(row.gradient_error, ".0e"),
        _text(row.memory_bytes and row.memory_bytes / 2**20, ".1f"),
    ]


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
