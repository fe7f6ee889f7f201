"""The executor that a configuration asks for."""

from __future__ import annotations

import torch

from fastssl.config import DataConfig
from fastssl_pipelines.executor import Executor, build_executor
from fastssl_pipelines.sources import Source


def input_executor(data: DataConfig, source: Source, *, device: torch.device, dtype: torch.dtype) -> Executor:
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
        decode=data.decode,
        resident_gib=data.resident_gib,
    )
