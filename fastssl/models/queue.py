"""The queue of keys of past batches, and their labels where they are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class KeyQueue(nn.Module):
    """The last `size` keys as a ring of unit rows (MoCo, He et al., 2020).

    Persistent buffers: `keys` float32 [size, dim], random directions at first (drawn from `generator`, else
    from torch's global one), and `labels` int64 [size], -1 for unknown, as all are at first. The position
    to write at follows from the step, so there is no pointer to keep, save or read back from the device.
    """

    keys: Tensor
    labels: Tensor

    def __init__(self, size: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a queue of {size} keys of {dim} features was asked for; both must be at least 1")
        self.register_buffer("keys", normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("labels", torch.full((size,), -1))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None, step: int) -> None:
        """Replace the oldest keys by unit rows [B, dim] of any float dtype; labels int64 [B], None = unknown.

        `step` counts from 0 and B is the same at every step of a run: this call writes from row
        (step * B) mod size on, around the end. B need not divide the size.
        Raises ValueError for a B beyond the size and for a wrong shape.
        """
        size, dim = self.keys.shape
        batch = keys.shape[0]
        if keys.ndim != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys of shape {list(keys.shape)} were given; the queue takes [B, {dim}]")
        if batch > size:
            raise ValueError(f"{batch} keys were given to a queue of {size}; use a longer queue or a smaller batch")
        if labels is not None and labels.shape != (batch,):
            raise ValueError(f"labels of shape {list(labels.shape)} were given for {batch} keys; allowed is [{batch}]")
        start = step * batch % size
        first = min(batch, size - start)
        self.keys[start : start + first] = keys[:first]
        self.keys[: batch - first] = keys[first:]
        self.labels[start : start + first] = -1 if labels is None else labels[:first]
        self.labels[: batch - first] = -1 if labels is None else labels[first:]
