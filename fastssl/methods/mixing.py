"""What MixCo and Un-Mix share: partners in a batch, and random numbers that do not depend on the number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.distributed import local_rows, world_size


def swap_neighbors(rows: Tensor) -> Tensor:
    """Rows 1, 0, 3, 2, ...: the partner of each row.

    Neighbors, where the official codes take the other half or the reversed batch: the order of a batch is random
    anyway, and neighbors stay together on any number of ranks.
    """
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def uniform_rows(count: int, like: Tensor) -> Tensor:
    """This rank's `count` of the uniform numbers of all ranks; their generators must be in the same state."""
    return local_rows(torch.rand(count * world_size(), device=like.device))
