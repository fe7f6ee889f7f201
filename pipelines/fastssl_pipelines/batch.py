"""A batch as the method receives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """Views of one batch of images, on the training device.

    `views`: one tensor per view, [B, 3, H, W], channels_last, normalized, in the training dtype.
    `labels`: [B] int64, -1 where the label is unknown. `ids`: [B] int64, position in the source.
    `step`: the training step that the batch belongs to.
    `ready`: event recorded after the last kernel, for a batch made on a separate CUDA stream; else None.

    `Executor.stream` calls `take` before it yields a batch.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    ids: Tensor
    step: int
    ready: torch.cuda.Event | None = None

    def take(self) -> None:
        """Make the current CUDA stream wait for the batch, and keep its memory until that stream is done with it.

        The host does not wait. Call it again on any other CUDA stream that reads the batch.
        """
        if self.ready is None:
            return
        current = torch.cuda.current_stream(self.ids.device)
        current.wait_event(self.ready)
        for tensor in (*self.views, self.labels, self.ids):
            # The allocator knows only the stream that made it, and would reuse the memory while this one reads
            tensor.record_stream(current)
