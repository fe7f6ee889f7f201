"""DALI executor: NVIDIA DALI decodes each image once, on the GPU where that is faster."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future
from itertools import repeat
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor

from fastssl_pipelines.batch import Batch
from fastssl_pipelines.errors import DataError, UnreadableImages
from fastssl_pipelines.executors.base import THREADS_NAME, Executor
from fastssl_pipelines.executors.dali_graph import Boxes, Decoder, region_of, within
from fastssl_pipelines.executors.pixels import resized_boxes
from fastssl_pipelines.executors.threads import DaemonThreads
from fastssl_pipelines.plan import BatchPlan
from fastssl_pipelines.sampler import Sampler
from fastssl_pipelines.sources.base import Source
from fastssl_pipelines.sources.headers import well_formed

_log = logging.getLogger(__name__)

_MEASURED_S = 0.3  # For each decoder that "auto" compares

DECODES = ("gpu", "gpu-region", "cpu", "cpu-region")


class DaliExecutor(Executor):
    """Executor for data sets that do not fit on the device.

    `decode`: "gpu" (with its JPEG engine, if any) or "cpu", or either with "-region", which decodes only the part of
    an image that its views need; or "auto", which on a GPU measures all four with the first batch and logs its choice.
    On a GPU, DALI crops and resizes. Its pixels are within one gray level of torchvision's, except along the border of
    a downscaled box: DALI repeats the last pixel, torchvision narrows the filter. On a CPU, torch crops and resizes,
    twice as fast as DALI and bit-identical to torchvision.
    """

    name = "dali"

    def __init__(self, source: Source, *, decode: str = "auto", **options: Any) -> None:
        super().__init__(source, **options)
        self._on_gpu = self.device.type == "cuda"
        if decode.startswith("gpu") and not self._on_gpu:
            raise DataError(f"--data.decode {decode} was given with device {self.device}; only a GPU can do that")
        # On a CPU neither was consistently faster
        self._decode = "cpu" if decode == "auto" and not self._on_gpu else decode
        self._readers = DaemonThreads(max(1, self.workers), f"{THREADS_NAME}read")
        self._idle: list[Decoder] = []
        self._recoded: set[int] = set()  # Decoded by Pillow: rotated, of other formats, or refused by DALI

    def crops(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        encoded = self._encoded(plan.ids)
        try:
            decoder = self._decoder(plan, encoded)
            crops = self._crops(decoder.run(encoded, _boxes(plan)), plan)
        except RuntimeError as error:  # After which the pipeline is unusable
            if reasons := self._unreadable_of(plan, error):
                raise UnreadableImages(reasons) from error
            return self.crops(plan)
        with self._lock:
            self._idle.append(decoder)
        return crops

    def _batches(self, steps: Sampler, first: int, last: int) -> Generator[Batch]:
        # Decode the next batch while this one is augmented (CPU) or DALI's kernels run (GPU)
        ahead = 2 if self._on_gpu else 1
        pending: deque[Future[tuple[BatchPlan, tuple[Tensor, ...]]]] = deque()
        in_use: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()
        if self._decode == "auto":
            self._readable_crops(steps, first)  # Alone, since it measures
        with DaemonThreads(ahead, f"{THREADS_NAME}dali", self._enter_thread) as decoding:
            try:
                for step in range(first, last):
                    while len(pending) <= ahead and step + len(pending) < last:
                        pending.append(decoding.submit(self._readable_crops, steps, step + len(pending)))
                    plan, crops = pending.popleft().result()
                    batch = self._finished(plan, crops, step)
                    if self._on_gpu:
                        # On the CUDA stream that reads the crops, so as not to wait for training
                        in_use.append((torch.cuda.current_stream(self.device).record_event(), crops))
                    yield batch
                    if len(in_use) > ahead:
                        in_use.popleft()[0].synchronize()
            finally:
                # DALI reuses memory that torch has freed, even while a kernel still reads it
                for event, _ in in_use:
                    event.synchronize()

    def _encoded(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Read the files of these images; UnreadableImages for those that cannot be read."""

        def read(part: NDArray[np.int64]) -> list[bytes | DataError]:
            return [self._file(index) for index in part.tolist()]

        parts = self._readers.map(read, np.array_split(ids, max(1, self.workers)))
        files = [file for part in parts for file in part]
        if reasons := {
            i: str(file) for i, file in zip(ids.tolist(), files, strict=True) if isinstance(file, DataError)
        }:
            raise UnreadableImages(reasons)
        return [np.frombuffer(file, np.uint8) for file in files if not isinstance(file, DataError)]

    def _file(self, index: int) -> bytes | DataError:
        try:
            if index not in self._recoded:
                encoded = self.source.encoded(index)
                # DALI 2.4 sometimes crashed on files whose header it cannot parse
                if well_formed(encoded, int(self.source.widths[index]), int(self.source.heights[index])):
                    return encoded
                self._recoded.add(index)
            pixels = self.source.pixels(index)
            # PPM, since PNG takes ten times as long to write and to decode
            return b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()
        except DataError as error:
            return error

    def _decoder(self, plan: BatchPlan, encoded: Sequence[NDArray[np.uint8]]) -> Decoder:
        """Get a decoder that no other stream uses."""
        sizes = tuple(view.size for view in plan.views) if self._on_gpu else ()
        with self._lock:
            for at, idle in enumerate(self._idle):
                if idle.sizes == sizes and idle.batch_size >= len(plan.ids):
                    return self._idle.pop(at)
            if self._decode == "auto":  # Other threads wait here, since they need the choice and would disturb it
                self._decode = self._faster_way(sizes, plan, encoded)
        return self._new_decoder(sizes, len(plan.ids), self._decode)

    def _new_decoder(self, sizes: tuple[int, ...], batch_size: int, decode: str) -> Decoder:
        device = self.device.index if self._on_gpu else None
        return Decoder(sizes, batch_size, threads=max(1, self.workers), device=device, decode=decode)

    def _faster_way(self, sizes: tuple[int, ...], plan: BatchPlan, encoded: Sequence[NDArray[np.uint8]]) -> str:
        images_per_s = {}
        for decode in DECODES:
            decoder = self._new_decoder(sizes, len(plan.ids), decode)
            started, images = 0.0, 0
            while not images or time.perf_counter() - started < _MEASURED_S:
                decoder.run(encoded, _boxes(plan))
                if not started:  # The first run allocates
                    started = time.perf_counter()
                    continue
                images += len(plan.ids)
            images_per_s[decode] = images / (time.perf_counter() - started)
        measured = ", ".join(f"{decode} {rate:.0f}" for decode, rate in images_per_s.items())
        best = max(images_per_s, key=lambda decode: images_per_s[decode])
        _log.info(f"--data.decode auto takes {best}; images/s with {self.workers} threads: {measured}")
        return best

    def _crops(self, outputs: Sequence[TensorListCPU | TensorListGPU], plan: BatchPlan) -> tuple[Tensor, ...]:
        if self._on_gpu:
            return tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)
        images = [torch.from_dlpack(image).permute(2, 0, 1)[None] for image in cast(Iterable[Any], outputs[0])]
        boxes = _boxes(plan)
        if self._decode.endswith("-region"):
            region = region_of(boxes)
            boxes = [within(region, box) for box in boxes]

        # The readers are idle now
        workers = max(1, self.workers)
        cuts = [slice(len(images) * part // workers, len(images) * (part + 1) // workers) for part in range(workers)]
        parts = [images[cut] for cut in cuts]
        return tuple(
            torch.cat(list(self._readers.map(resized_boxes, parts, [box[cut] for cut in cuts], repeat(view.size))))
            for box, view in zip(boxes, plan.views, strict=True)
        )

    def _unreadable_of(self, plan: BatchPlan, error: RuntimeError) -> dict[int, str]:
        """Find out which images made a batch fail, since DALI does not say; returns a sentence by image index.

        Images that only DALI cannot read are decoded by Pillow from now on, so that all executors train on the same
        images. If there are none of those either, `error` has another cause and is raised again.
        """

        def reason(index: int) -> str | None:
            try:
                self.source.pixels(index)
            except DataError as failure:
                return str(failure)
            return None

        ids = sorted(set(plan.ids.tolist()) - self._recoded)
        reasons = {index: text for index, text in zip(ids, self._readers.map(reason, ids), strict=True) if text}
        if not reasons:
            refused = self._refused(ids)
            if not refused:
                raise error
            self._recoded |= refused
        return reasons

    def _refused(self, ids: list[int]) -> set[int]:
        """Images that DALI cannot decode, found by bisection."""
        decoder = self._new_decoder((), len(ids), "gpu" if self._decode.startswith("gpu") else "cpu")
        encoded = self._encoded(np.array(ids))
        try:
            decoder.run(encoded, ())
        except RuntimeError:
            if len(ids) == 1:
                return set(ids)
            half = len(ids) // 2
            return self._refused(ids[:half]) | self._refused(ids[half:])
        return set()


def _boxes(plan: BatchPlan) -> list[Boxes]:
    return [view.boxes for view in plan.views]
