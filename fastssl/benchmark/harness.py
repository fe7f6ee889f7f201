"""Shared by the benchmark commands: option checks, threads, memory measurement and output files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastssl.errors import ConfigError


def require_file(option: str, path: Path | None) -> None:
    """Raise ConfigError for a path where no file can be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{option} {path} was given; it must be the name of a file in an existing folder")


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set torch's number of CPU threads inside the `with` block; None keeps it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Write `facts` as JSON; ConfigError about --json if the file cannot be written."""
    try:
        path.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path} could not be written ({error.strerror}); give another file") from None


def write_trace(folder: Path, name: str, work: Callable[[], object]) -> Path:
    """Write a torch.profiler trace of `work`, for chrome://tracing or Perfetto, to FOLDER/NAME.json; returns that path.

    Creates the folder if necessary; ConfigError about --profile if it cannot be written.
    """
    path = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ConfigError(f"--profile {folder} cannot be written to ({error.strerror}); give another folder") from None
    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        work()
    profiler.export_chrome_trace(str(path))
    return path


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Peak memory of tensors during `work`, beyond what was allocated before.

    On a CPU it is computed from torch's allocations and excludes scratch memory inside library calls.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    peak = held = 0
    for _, change in events:
        held += change
        peak = max(peak, held)
    return peak
