"""The rows of all ranks of a run; without a process group there is one rank and each function is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rows(rows: Tensor) -> Tensor:
    """This rank's part of rows that all ranks hold, [world_size * B, ...] to [B, ...]."""
    return rows.chunk(world_size())[rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks in rank order, [B, ...] to [world_size * B, ...], as constants."""
    return _gathered(rows.detach()) if world_size() > 1 else rows.detach()


def gather_rows_with_gradient(rows: Tensor) -> Tensor:
    """As `gather_rows`; each rank's rows get the sum of the gradients that all ranks have for them."""
    return _Gather.apply(rows) if world_size() > 1 else rows


def _gathered(rows: Tensor) -> Tensor:
    everything = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(everything, rows.contiguous())
    return everything


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _gathered(rows)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        total = upstream.contiguous()
        dist.all_reduce(total)
        return local_rows(total)
