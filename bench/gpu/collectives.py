"""Part: run the collectives of several ranks with one rank, to check that NCCL accepts each dtype."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from fastssl import distributed
from fastssl.config import TrainConfig
from fastssl.device import choose_device

from .part_context import Failed, PartContext

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def collectives(context: PartContext) -> None:
    """Use the process group of a run with several ranks: NCCL on a GPU, gloo on a CPU."""
    backend = "gloo" if context.rehearsal else "cpu:gloo,cuda:nccl"
    device = choose_device(TrainConfig(device=context.device.type))  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{context.folder}/store", rank=0, world_size=1, timeout=timedelta(seconds=30)
    )
    try:
        for dtype in DTYPES:
            context.once(f"all_gather {dtype}", partial(_gathered, _rows(dtype, device)))
        context.once("all_reduce", lambda: _reduced(_rows(torch.float32, device)))
        for dtype in (torch.float32, torch.bfloat16):
            name = f"all_to_all_single {dtype}"
            context.once(name, partial(_exchanged, _rows(dtype, device)))
        context.once("of fastssl", lambda: _of_fastssl(_rows(torch.float32, device)))
    finally:
        dist.destroy_process_group()


def _rows(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return (torch.arange(64 * 128, device=device).reshape(64, 128) % 7).to(dtype)


def _gathered(rows: torch.Tensor) -> str:
    everything = torch.empty_like(rows)
    dist.all_gather_into_tensor(everything, rows)
    return _equal(everything, rows)


def _reduced(rows: torch.Tensor) -> str:
    total = rows.clone()
    dist.all_reduce(total)
    return _equal(total, rows)


def _exchanged(rows: torch.Tensor) -> str:
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows)
    return _equal(received, rows)


def _of_fastssl(rows: torch.Tensor) -> str:
    """Call the functions that methods use; each is the identity for one rank."""
    for collective in (distributed.gather_rows, distributed.gather_uneven_rows, distributed.mean_over_ranks):
        _equal(collective(rows), rows)
    return _equal(distributed.gather_rows_with_gradient(rows), rows)


def _equal(given: torch.Tensor, expected: torch.Tensor) -> str:
    if not torch.equal(given, expected):
        raise Failed("the received tensor differs from the one sent")
    return "equal"
