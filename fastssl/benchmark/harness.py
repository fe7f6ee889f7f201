"""What the benchmark commands share: checks of their options, threads, and the files that they write."""

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
    """Raise ConfigError for a path that no file can be written to."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{option} {path} was given; it must be the name of a file in an existing folder")


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Inside the `with` block torch computes in `count` threads of the CPU; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """ConfigError about --json where it cannot be written."""
    try:
        path.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path} could not be written ({error.strerror}); give another file") from None


def write_trace(folder: Path, name: str, work: Callable[[], object]) -> Path:
    """The trace of `work` by torch.profiler for chrome://tracing or Perfetto, in `folder`, which is made if need be.

    ConfigError about --profile where it cannot be written.
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
    """The most that tensors take during `work` beyond those from before.

    On a CPU it is the running sum of torch's allocations; scratch inside of library calls is not among them.
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
