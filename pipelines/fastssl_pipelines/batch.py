"""The batch that a method sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """Views of one batch of images, on the training device.

    `views`: one tensor a view, [B, 3, H, W], channels_last, normalized, in the training dtype.
    `labels`: [B] int64, -1 where the label is unknown. `ids`: [B] int64, position in the source.
    `step`: the training step that this batch belongs to.
    `ready`: where a CUDA stream of its own makes the batch, the event behind the last work on it; else None.

    A stream of batches has called `take` for whoever it gives them to.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    ids: Tensor
    step: int
    ready: torch.cuda.Event | None = None

    def take(self) -> None:
        """Have the current CUDA stream wait for the batch, and the batch's memory for what that stream does with it.

        The host waits for nothing. Whoever reads the batch on one more CUDA stream calls it there as well.
        """
        if self.ready is None:
            return
        current = torch.cuda.current_stream(self.ids.device)
        current.wait_event(self.ready)
        for tensor in (*self.views, self.labels, self.ids):
            # The allocator knows of the stream that made it alone, and would give it away while this one reads
            tensor.record_stream(current)
