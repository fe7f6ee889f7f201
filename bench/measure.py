"""Time steps in turn, and measure the rate of the device's matrix product."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[], Any]


class Times(NamedTuple):
    """Milliseconds."""

    median: float
    p20: float
    p80: float


def spread(milliseconds: Sequence[float]) -> Times:
    """Median and the quantiles around it."""
    low, *_, high = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Times(statistics.median(milliseconds), low, high)


def time_cpu(steps: Mapping[str, Step], repeats: int, warm_ups: int) -> dict[str, Times]:
    """Time steps in turn, so that a busy moment affects all; caches are as the previous step left them."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-warm_ups, repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 0:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: spread(values) for name, values in taken.items()}


def time_cuda(steps: Mapping[str, Sequence[Step]], repeats: int, warm_ups: int, wait: bool) -> dict[str, Times]:
    """Time steps in turn, between two events on the device.

    Each name has one step per clone of the queue. Before a timed step, the step of another clone runs: with a
    single clone L2 is then warm; with clones that exceed L2 together it is cold. `wait`: wait for an idle device
    before the timed step, whose time then includes its launches; without, the untimed step hides them.
    """
    for turn in range(warm_ups):
        for clones in steps.values():
            clones[turn % len(clones)]()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
    for turn in range(repeats):
        for name, clones in steps.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            timed = clones[(2 * turn + 1) % len(clones)]
            clones[2 * turn % len(clones)]()
            if wait:
                torch.cuda.synchronize()
            start.record()
            timed()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: spread([start.elapsed_time(end) for start, end in pairs]) for name, pairs in events.items()}


def clones_beyond_cache(queue: Tensor) -> int:
    """Clones of a CUDA `queue` to rotate through so that 3 x L2 is read between two reads of the same clone."""
    cache = torch.cuda.get_device_properties(queue.device).L2_cache_size
    return math.ceil(3 * cache / (queue.numel() * queue.element_size())) + 1


def captured(step: Step, pool: Any) -> Step:
    """`step` as the replay of a CUDA graph; graphs of one pool must not run at the same time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of an 8192 x 8192 x 8192 product."""
    size = 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = time_cuda({"matmul": [lambda: left @ right]}, repeats=20, warm_ups=20, wait=False)
    return 2 * size**3 / (1e-3 * times["matmul"].median)
