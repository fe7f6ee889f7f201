"""Input executor of a configuration."""

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

_FEWEST_FOR_CPU, _MOST = 2, 12  # Default numbers of workers


def input_executor(
    data: DataConfig, source: Source, *, device: torch.device, dtype: torch.dtype, timeout_s: float = TIMEOUT_S
) -> Executor:
    """Build the executor for the images of `source`, with views in `dtype` on `device`.

    Logs the number of workers on a GPU if --data.workers is not given.
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
    """--data.workers, or a default that fits the cores of each process on this machine."""
    if data.workers is not None:
        return data.workers
    own = cores() // local_ranks()
    if device.type == "cuda":
        return min(max(1, own - 1), _MOST)  # One core trains
    return min(max(_FEWEST_FOR_CPU, own // 4), _MOST)  # The other cores train
