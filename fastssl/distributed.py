"""The ranks of a run and the exchange of rows; without a process group there is one rank, and every function works."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.errors import ConfigError, TrainingError

_Value = TypeVar("_Value")
_LONG = timedelta(days=1)  # For work of one rank that others wait for, like indexing millions of files
_RANKS = 2**20  # More than anyone starts
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started_ranks() -> int:
    """Number of processes of this run, as set by torchrun or another launcher."""
    return _variable("WORLD_SIZE", least=1, most=_RANKS, default=1)


def local_rank() -> int:
    """Index of this process on its machine."""
    return _variable("LOCAL_RANK", least=0, most=_RANKS - 1, default=0)


def local_ranks() -> int:
    """Number of processes of this run on this machine."""
    return _variable("LOCAL_WORLD_SIZE", least=1, most=_RANKS, default=1)


def _variable(name: str, *, least: int, most: int, default: int) -> int:
    """An integer from the environment; ConfigError unless it is an integer from `least` to `most`."""
    text = os.environ.get(name, str(default))
    if re.fullmatch("[0-9]{1,9}", text) is None or not least <= int(text) <= most:
        raise ConfigError(
            f"{name} is {text[:60]!r} in the environment; it must be an integer from {least} to {most}: set it as "
            "torchrun does, or unset it to train with one process"
        )
    return int(text)


def _check_variables() -> None:
    """Raise ConfigError for environment variables with which this process would wait forever for others."""
    ranks = started_ranks()
    if "WORLD_SIZE" in os.environ:
        for name in ("RANK", "LOCAL_RANK"):
            _variable(name, least=0, most=ranks - 1, default=0)
    if ranks == 1:
        return
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE is {ranks} and {', '.join(missing)} is not set; start the run with torchrun, or set what "
            "torchrun sets for every process"
        )
    _variable("MASTER_PORT", least=1, most=2**16 - 1, default=1)
    if not os.environ["MASTER_ADDR"].strip():
        raise ConfigError("MASTER_ADDR is empty in the environment; set it to the address of the first process")


@contextmanager
def joined_ranks(device: torch.device, *, timeout_s: float) -> Iterator[None]:
    """Join the processes that were started together into one process group inside the `with` block.

    NCCL exchanges GPU tensors and gloo the rest. A rank that ends, or does not answer for `timeout_s` seconds, ends the
    others: with TrainingError if torch raises an error, else by an abort of NCCL's watchdog.
    """
    _check_variables()
    if started_ranks() == 1:
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=device if on_gpu else None,
        )
        yield
    except (RuntimeError, dist.DistError) as error:
        if not _is_about_another_rank(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"another process of the run ended or did not answer within --train.timeout-s {timeout_s:g} s, so "
            f"rank {os.environ['RANK']} ends too ({reason}); check that process's output, then `fastssl resume` the run"
        ) from None
    # Skipped after an error, since it would wait for a rank that is gone
    dist.destroy_process_group()


def _is_about_another_rank(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this rank."""
    return dist.get_rank() if world_size() > 1 else 0


def cpu_group(**options: Any) -> dist.ProcessGroup:
    """A group of all ranks that exchanges tensors on the CPU, without waiting for a GPU."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", **options))


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Run the `with` block on the first rank of each machine before the other ranks."""
    if world_size() == 1:
        yield
        return
    patient = cpu_group(timeout=_LONG)
    if local_rank():
        dist.barrier(patient)
    yield
    if not local_rank():
        dist.barrier(patient)


def from_first_rank(make: Callable[[], _Value]) -> _Value:
    """Call `make` on the first rank and return its result, plain types and CPU tensors, on all ranks."""
    if world_size() == 1:
        return make()
    box = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def local_rows(rows: Tensor) -> Tensor:
    """This rank's slice of rows that all ranks hold, [world_size * B, ...] to [B, ...]."""
    return rows.chunk(world_size())[rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows of all ranks in rank order, [B, ...] to [world_size * B, ...], without gradient."""
    return _gathered(rows.detach()) if world_size() > 1 else rows.detach()


def gather_uneven_rows(rows: Tensor) -> Tensor:
    """As `gather_rows`, but ranks may have different numbers of rows, including 0."""
    if world_size() == 1:
        return rows.detach()
    counts = _gathered(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    everything = _gathered(padded)
    filled = 0
    for part, count in zip(everything.chunk(len(counts)), counts, strict=True):
        # In place, since features of millions of images do not fit twice
        everything[filled : filled + count] = part[:count].clone()
        filled += count
    return everything[:filled]


def gather_rows_with_gradient(rows: Tensor) -> Tensor:
    """As `gather_rows`, with a gradient: each rank's rows get the sum of all ranks' gradients for them."""
    return _Gather.apply(rows) if world_size() > 1 else rows


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of the ranks' tensors, on every rank."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


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
