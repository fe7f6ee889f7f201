"""How the input moves: host arrays to a device in one copy, batches from the CUDA stream that makes them to training.

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

ALIGNED_BYTES = 16  # As Triton's kernels and wide loads of torch have it
TURN_S = 5e-4  # torch gives the interpreter up in each call, and a thread that trains waits a turn to have it back
HOST_AHEAD = 4  # Steps; enough for a device never to wait for the host, and few enough batches that fill its memory


def to_device(arrays: Sequence[NDArray[Any] | Tensor], device: torch.device) -> list[Tensor]:
    """Host arrays as tensors on `device`; on a CPU they share memory with the arrays.

    Else all go through one buffer of pinned memory in one copy, which is queued on the current stream; the arrays may
    be changed at once, and the tensors are parts of one block of device memory.
    """
    hosts = [np.asarray(array) for array in arrays]
    if device.type == "cpu":
        return [torch.from_numpy(host) for host in hosts]
    sizes = [-(-host.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES for host in hosts]
    # The buffer ends with this call and its copy may not have begun. torch's allocator of pinned memory lets nobody
    # have it before: a non_blocking copy records an event on its stream, and the block waits for that.
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for host, part in zip(hosts, np.split(buffer.numpy(), np.cumsum(sizes)[:-1]), strict=True):
        part[: host.nbytes].view(host.dtype).reshape(host.shape)[...] = host
    parts = buffer.to(device, non_blocking=True).split(sizes)
    return [
        part[: host.nbytes].view(torch.from_numpy(host).dtype).view(host.shape)
        for host, part in zip(hosts, parts, strict=True)
    ]


class InputStream:
    """The CUDA stream of an executor on `device`; for a CPU it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def enter(self) -> None:
        """Make it the current CUDA stream of this thread, which takes short turns in the interpreter.

        Other threads take them, too, and for good: later streams want that again, and it costs nobody anything else.
        """
        if self._stream is not None:
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(self._stream)
            sys.setswitchinterval(min(sys.getswitchinterval(), TURN_S))

    def finish(self, batch: Batch) -> Batch:
        """The batch with the event behind all that was queued for it."""
        if self._stream is not None:
            batch.ready = self._stream.record_event()
        return batch


def handed_over(batches: Iterable[Batch]) -> Generator[Batch]:
    """The batches, each for the current CUDA stream of this thread to read.

    This thread comes at most HOST_AHEAD batches ahead of what its CUDA stream has done with them.
    """
    in_use: deque[torch.cuda.Event] = deque()
    for batch in batches:
        batch.take()
        yield batch
        if batch.ready is not None:
            in_use.append(torch.cuda.Event(blocking=True))  # A core that spins is one that does not decode
            in_use[-1].record(torch.cuda.current_stream(batch.ids.device))
            if len(in_use) > HOST_AHEAD:
                in_use.popleft().synchronize()
