"""The executor that a configuration asks for."""

from __future__ import annotations

import logging

import torch

from fastssl.config import DataConfig
from fastssl.distributed import local_ranks
from fastssl_pipelines.executors.base import TIMEOUT_S, Executor, build_executor
from fastssl_pipelines.executors.turns import cores
from fastssl_pipelines.names import printable
from fastssl_pipelines.sources.base import Source

_log = logging.getLogger(__name__)

_FEWEST_FOR_CPU, _MOST = 2, 12  # Workers that nobody asked for


def input_executor(
    data: DataConfig, source: Source, *, device: torch.device, dtype: torch.dtype, timeout_s: float = TIMEOUT_S
) -> Executor:
    """The executor for the images of `source`, which hands over views in `dtype` on `device`.

    Its notes say how many workers a GPU gets where --data.workers does not.
    """
    workers = worker_count(data, device)
    executor = build_executor(
        data.pipeline,
        source,
        mean=data.mean,
        std=data.std,
        device=device,
        dtype=dtype,
        workers=workers,
        prefetch=data.prefetch,
        timeout_s=timeout_s,
        decode=data.decode,
        resident_gib=data.resident_gib,
    )
    if data.workers is None and device.type == "cuda":
        _log.info(printable(f"{workers} of {cores()} cores decode {source.name}; --data.workers chooses"))
    return executor


def worker_count(data: DataConfig, device: torch.device) -> int:
    """--data.workers, or what suits the cores that each process of this machine has."""
    if data.workers is not None:
        return data.workers
    own = cores() // local_ranks()
    if device.type == "cuda":
        return min(max(1, own - 1), _MOST)  # One trains
    return min(max(_FEWEST_FOR_CPU, own // 4), _MOST)  # The others train
