"""Kernels launched in training: every loss at the shapes of the presets, called on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import losses
from .configuration import Configuration, launched
from .launch import noted_launches

QUEUES = ((128, 512), (256, 4096), (512, 4096), (256, 16384), (128, 65536), (256, 65536))  # Rows, keys of 128 features
GROUPS = ((2048, 300), (3072, 3000))  # Crops, groups
SHARDS = ((256, 65536), (2048, 131072))  # Rows of one or eight devices, keys of one
_TEMPERATURE = 0.1  # Any from 0.02 on compiles the same


def configurations() -> Iterator[Configuration]:
    """Configurations for banks in every dtype; float32 without and with TF32, which is a global setting of torch."""
    before = torch.get_float32_matmul_precision()
    try:
        for dtype, precision in (
            (torch.bfloat16, "highest"),
            (torch.float16, "highest"),
            (torch.float32, "highest"),
            (torch.float32, "high"),
        ):
            torch.set_float32_matmul_precision(precision)
            yield from _launched(dtype)
    finally:
        torch.set_float32_matmul_precision(before)


def _launched(dtype: torch.dtype) -> list[Configuration]:
    found: list[Configuration] = []
    with noted_launches(lambda *given: found.append(launched(*given))):
        for rows, entries in QUEUES:
            _read_queue(_floats(rows, 128), _floats(entries, 128, dtype=dtype))
        for rows, entries in SHARDS:
            _read_shard(_floats(rows, 128), _floats(entries, 128, dtype=dtype))
        query, wide = _floats(256, 512), _floats(131072, 512, dtype=dtype)  # ReSSL on ImageNet
        _relate(query, wide, teachers=1)
        losses.queue_read(query, wide, _TEMPERATURE)
        for crops, groups in GROUPS:
            _move_groups(_floats(crops, 128), _floats(groups, 128), dtype)
    return found


def _read_queue(query: Tensor, queue: Tensor) -> None:
    rows, entries = len(query), len(queue)
    own, labels, weight = _integers(rows), _integers(entries), _floats(rows)
    losses.info_nce_rows(query, query, queue, _TEMPERATURE, True)
    losses.unicon_rows(query, query, queue, own, labels, _TEMPERATURE, True)
    losses.sup_con_rows(query, query, queue, own, labels, _TEMPERATURE, True)
    losses.unmix_rows(query, query, query, queue, weight, _TEMPERATURE)
    for with_own_key in (False, True):
        losses.consistency_rows(query, query, queue, _TEMPERATURE, with_own_key)
    for teachers in (1, 2):
        _relate(query, queue, teachers)
    mixed, keys, pair = query[::2], query.to(queue.dtype), own[::2]
    losses.mixco_rows(mixed, keys, queue, pair, pair, weight[::2], _TEMPERATURE)


def _relate(query: Tensor, queue: Tensor, teachers: int) -> None:
    losses.soft_cross_entropy_rows(query, query.expand(teachers, -1, -1), queue, _TEMPERATURE, _TEMPERATURE)


def _read_shard(everyone: Tensor, shard: Tensor) -> None:
    losses.queue_read(everyone, shard, _TEMPERATURE)
    losses.nearest(everyone, shard, 1)
    mixed, keys = everyone[:128], everyone.to(shard.dtype)
    lse, mean = losses.queue_read(mixed, keys, _TEMPERATURE)
    losses.queue_read_gradient(mixed, keys, lse, mean, _TEMPERATURE)


def _move_groups(crops: Tensor, groups: Tensor, dtype: torch.dtype) -> None:
    """SMoG: its loss reads the groups in `dtype`, or in float32 if they have a gradient."""
    target = _integers(2, len(crops))
    for rows in (crops, crops.to(dtype)):  # Of a step; of a bank, at the end of an epoch
        losses.nearest(rows, groups.to(dtype), 1)
    losses.bank_cross_entropy_rows(crops, groups.to(dtype), target, _TEMPERATURE)
    _, _, lse = losses.bank_cross_entropy_rows(crops, groups, target, _TEMPERATURE)
    losses.bank_gradient(crops, groups, target, _integers(len(groups)), lse, lse, lse, _TEMPERATURE, False)


def _floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _integers(*shape: int) -> Any:
    return torch.empty(shape, dtype=torch.int64, device="meta")
