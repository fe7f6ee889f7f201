"""The executor that a configuration asks for."""

from __future__ import annotations

import torch

from fastssl.config import DataConfig
from fastssl_pipelines.executor import TIMEOUT_S, Executor, build_executor
from fastssl_pipelines.sources import Source


def input_executor(
    data: DataConfig, source: Source, *, device: torch.device, dtype: torch.dtype, timeout_s: float = TIMEOUT_S
) -> Executor:
    """The executor for the images of `source`, which hands over views in `dtype` on `device`."""
    return build_executor(
        data.pipeline,
        source,
        mean=data.mean,
        std=data.std,
        device=device,
        dtype=dtype,
        workers=data.workers,
        prefetch=data.prefetch,
        timeout_s=timeout_s,
        decode=data.decode,
        resident_gib=data.resident_gib,
    )
