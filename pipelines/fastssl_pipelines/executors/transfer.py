"""Transfers of the input: host arrays to a device in one copy, and batches to the CUDA stream that trains.

All GPU work of an executor's threads is queued on one CUDA stream that the executor owns, so no copy and no kernel of
the input waits for the training queued elsewhere. Each batch carries an event recorded after its last kernel
(`Batch.ready`); the consumer's CUDA stream waits for that event, and the batch's memory is kept until that stream has
read it (`Batch.take`). On a CPU there are no streams.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastssl_pipelines.batch import Batch

ALIGNED_BYTES = 16  # As Triton's kernels and torch's wide loads expect
TURN_S = 5e-4  # Torch releases the interpreter in each call, and a training thread waits a turn to get it back
HOST_AHEAD = 4  # Steps; enough to keep the device busy, and few enough batches in its memory


def to_device(arrays: Sequence[NDArray[Any] | Tensor], device: torch.device) -> list[Tensor]:
    """Move host arrays to `device`; on a CPU the tensors share memory with the arrays.

    For a GPU, one copy from pinned memory is queued on the current stream. The arrays may be changed right away; the
    tensors are parts of one block of device memory.
    """
    hosts = [np.asarray(array) for array in arrays]
    if device.type == "cpu":
        return [torch.from_numpy(host) for host in hosts]
    sizes = [-(-host.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES for host in hosts]
    # The buffer is freed when this call returns, perhaps before the copy starts. That is safe: a non_blocking copy
    # records an event, and torch's pinned-memory allocator does not reuse the block before it.
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for host, part in zip(hosts, np.split(buffer.numpy(), np.cumsum(sizes)[:-1]), strict=True):
        part[: host.nbytes].view(host.dtype).reshape(host.shape)[...] = host
    parts = buffer.to(device, non_blocking=True).split(sizes)
    return [
        part[: host.nbytes].view(torch.from_numpy(host).dtype).view(host.shape)
        for host, part in zip(hosts, parts, strict=True)
    ]


class InputStream:
    """CUDA stream of an executor on `device`; does nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def enter(self) -> None:
        """Make it the current CUDA stream of this thread, and shorten the interpreter's switch interval.

        The interval stays short for all threads: later streams need it too, and it has no other cost.
        """
        if self._stream is not None:
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(self._stream)
            sys.setswitchinterval(min(sys.getswitchinterval(), TURN_S))

    def finish(self, batch: Batch) -> Batch:
        """Record the event after everything queued for the batch, and return the batch."""
        if self._stream is not None:
            batch.ready = self._stream.record_event()
        return batch


def handed_over(batches: Iterable[Batch]) -> Generator[Batch]:
    """Yield the batches, ready to be read on this thread's current CUDA stream.

    This thread runs at most HOST_AHEAD batches ahead of its CUDA stream.
    """
    in_use: deque[torch.cuda.Event] = deque()
    for batch in batches:
        batch.take()
        yield batch
        if batch.ready is not None:
            in_use.append(torch.cuda.Event(blocking=True))  # A spinning core cannot decode
            in_use[-1].record(torch.cuda.current_stream(batch.ids.device))
            if len(in_use) > HOST_AHEAD:
                in_use.popleft().synchronize()
