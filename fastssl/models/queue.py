"""The queue of keys of past batches and their labels, if known; whole on every rank or in shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.distributed import gather_rows, rank

_BITS = {2: torch.int16, 4: torch.int32}


class KeyQueue(nn.Module):
    """The last `size` keys as a ring of unit rows (MoCo, He et al., 2020).

    Persistent buffers: `keys` [size, dim] in `dtype`, initially random directions (drawn in float32 from `generator`,
    or from torch's global one, and then rounded), and `labels` int64 [size], -1 (initially) for unknown.
    The write position follows from the step, so there is no pointer to store, save or read back from the device.

    With `shards`, the number of ranks, each rank holds the size / shards rows from row `first` on. A state dict of the
    whole queue, such as that of `gather_state`, can be loaded into shards.
    """

    keys: Tensor
    labels: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        generator: torch.Generator | None = None,
        shards: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a queue of {size} keys of {dim} features was asked for; both must be at least 1")
        if size % shards:
            raise ValueError(f"a queue of {size} keys in {shards} shards was asked for; the size must be a multiple")
        self.size, self.shards = size, shards
        self.first = rank() * (size // shards) if shards > 1 else 0
        # All ranks draw the whole queue, so that it does not depend on their number
        keys = normalize(torch.randn(size, dim, generator=generator), dim=1)
        self.register_buffer("keys", self._own_rows(keys).to(dtype, copy=True))
        self.register_buffer("labels", torch.full((size // shards,), -1))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None, step: int | Tensor) -> None:
        """Replace the oldest keys by unit rows [B, dim] of any float dtype; labels int64 [B], None = unknown.

        `step` counts from 0 and B is the same at every step of a run: this call writes from row (step * B) mod size on
        and wraps around the end. B need not divide the size. A shard stores only its own rows. Without shards, `step`
        may be an int64 tensor [] on the queue's device, which the host does not read.
        ValueError for B above the size, for a wrong shape and for a tensor `step` with shards.
        """
        dim, batch = self.keys.shape[1], keys.shape[0]
        if keys.ndim != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys of shape {list(keys.shape)} were given; the queue takes [B, {dim}]")
        if batch > self.size:
            raise ValueError(
                f"{batch} keys were given to a queue of {self.size}; use a longer queue or a smaller batch"
            )
        if labels is not None and labels.shape != (batch,):
            raise ValueError(f"labels of shape {list(labels.shape)} were given for {batch} keys; allowed is [{batch}]")
        if labels is None:
            labels = self.labels.new_full((batch,), -1)
        if isinstance(step, Tensor):
            self._write_on_device(step, keys, labels)
            return
        start = step * batch % self.size
        for at in (start, start - self.size):  # Rows beyond the end wrap to the beginning
            self._write(at, keys, labels)

    def _write(self, at: int, keys: Tensor, labels: Tensor) -> None:
        """Write those of the rows from row `at` of the whole queue on that this shard holds."""
        begin, end = max(at, self.first), min(at + len(keys), self.first + len(self.keys))
        if begin < end:
            own, given = slice(begin - self.first, end - self.first), slice(begin - at, end - at)
            self.keys[own] = keys[given]
            self.labels[own] = labels[given]

    def _write_on_device(self, step: Tensor, keys: Tensor, labels: Tensor) -> None:
        if self.shards > 1:
            raise ValueError("a step on the device was given to a queue in shards; it must be an int")
        rows = (step * len(keys) + torch.arange(len(keys), device=step.device)) % self.size
        self.keys.index_copy_(0, rows, keys.to(self.keys.dtype))
        self.labels.index_copy_(0, rows, labels)

    def _own_rows(self, rows: Tensor) -> Tensor:
        return rows[self.first : self.first + self.size // self.shards]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("keys", "labels"):
            rows = state_dict.get(prefix + name)
            if rows is not None and len(rows) == self.size:
                state_dict[prefix + name] = self._own_rows(rows)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def checksum(self) -> Tensor:
        """int64 [], of the bits and positions of keys and labels; that of a queue is the sum over its shards."""
        bits = self.keys.view(_BITS[self.keys.itemsize])
        rows = torch.arange(self.first, self.first + len(bits), device=bits.device) * 2 + 1
        columns = torch.arange(bits.shape[1], device=bits.device) * 2 + 1
        # Sums first: multiplying every element would allocate twice the queue's size
        of_keys = (bits.sum(1, dtype=torch.int64) * rows).sum() + (bits.sum(0, dtype=torch.int64) * columns).sum()
        return of_keys * 1_000_003 + (self.labels * rows).sum()


def gather_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module with every queue whole, on every rank; all ranks must call it.

    It equals that of a run on one rank, and `load_state_dict` accepts it on any number of ranks.
    """
    state = module.state_dict()
    for name, queue in module.named_modules():
        if isinstance(queue, KeyQueue) and queue.shards > 1:
            for entry in ("keys", "labels"):
                path = f"{name}.{entry}" if name else entry
                state[path] = gather_rows(state[path])
    return state


@torch.no_grad()
def queue_hash(module: nn.Module) -> int:
    """A 64-bit hash of all queues in `module`, equal on ranks with equal queues; all ranks must call it.

    Queues in shards are hashed as a whole, so their hash never differs between ranks. Waits for the device and copies
    one value.
    """
    total = torch.zeros((), dtype=torch.int64)
    for queue in module.modules():
        if isinstance(queue, KeyQueue):
            checksum = queue.checksum()
            if queue.shards > 1:
                dist.all_reduce(checksum)
            total = total.to(checksum.device) * 31 + checksum
    return int(total)
