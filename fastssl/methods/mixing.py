"""Shared by MixCo and Un-Mix: partners in a batch, and random numbers that do not depend on the number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.distributed import local_rows, world_size


def swap_neighbors(rows: Tensor) -> Tensor:
    """Rows 1, 0, 3, 2, ...: the partner of each row.

    The official codes pair with the other half or the reversed batch. A batch is in random order anyway, and neighbors
    stay together on any number of ranks.
    """
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def uniform_rows(count: int, like: Tensor) -> Tensor:
    """This rank's `count` of the uniform random numbers of all ranks, whose generators must be in the same state."""
    return local_rows(torch.rand(count * world_size(), device=like.device))
