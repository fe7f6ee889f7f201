"""The one way from host memory to a device: one copy for many arrays, for which nobody waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNED_BYTES = 16  # as Triton's kernels and wide loads of torch have it


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
