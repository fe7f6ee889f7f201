"""The DALI executor: each image is decoded once by NVIDIA DALI, on the GPU where there is one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor

from fastssl_pipelines.executor import Executor
from fastssl_pipelines.plan import BatchPlan
from fastssl_pipelines.sources import Source


class DaliExecutor(Executor):
    """For data sets that do not fit on the device; a GPU shares the decoding and does the resizing.

    The pixels are torchvision's within one grey level, except along the border of a box that is made smaller:
    there DALI repeats the last pixel and torchvision narrows the filter.
    """

    name = "dali"

    def __init__(self, source: Source, **options: Any) -> None:
        super().__init__(source, **options)
        self._readers = ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="fastssl-read")
        self._pipelines: dict[tuple[int, ...], Pipeline] = {}

    def crops(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        sizes = tuple(view.size for view in plan.views)
        inputs = {"encoded": self._encoded(plan.ids)}
        for number, view in enumerate(plan.views):
            inputs[f"start_{number}"] = list(view.boxes[:, :2])
            inputs[f"shape_{number}"] = list(view.boxes[:, 2:])
        pipeline = self._pipeline(sizes, len(plan.ids))
        try:
            outputs = pipeline.run(**inputs)
        except RuntimeError:
            # DALI names no file and the pipeline is of no use after an error.
            del self._pipelines[sizes]
            for index in plan.ids.tolist():
                self.source.pixels(index)
            raise
        return tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)

    def _encoded(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        def read(part: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
            return [np.frombuffer(self.source.encoded(index), np.uint8) for index in part.tolist()]

        parts = np.array_split(ids, max(1, self.workers))
        return [encoded for part in self._readers.map(read, parts) for encoded in part]

    def _pipeline(self, sizes: tuple[int, ...], batch_size: int) -> Pipeline:
        pipeline = self._pipelines.get(sizes)
        if pipeline is None or pipeline.max_batch_size < batch_size:
            pipeline = self._pipelines[sizes] = self._build(sizes, batch_size)
        return pipeline

    def _build(self, sizes: tuple[int, ...], batch_size: int) -> Pipeline:
        on_gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=max(1, self.workers),
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=DALIImageType.RGB,
                adjust_orientation=False,
            )
            views = []
            for number, size in enumerate(sizes):
                start = fn.external_source(name=f"start_{number}", dtype=DALIDataType.INT32, ndim=1)
                shape = fn.external_source(name=f"shape_{number}", dtype=DALIDataType.INT32, ndim=1)
                # resize has a region of interest of its own, but lets the filter see the pixels around it.
                cut = fn.slice(images, start=start, shape=shape, axes=(0, 1))
                views.append(
                    fn.resize(cut, size=[size, size], interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
                )
            pipeline.set_outputs(*views)
        pipeline.build()
        return pipeline
