"""Run the read kernels: one partial result per split of a bank, for a combine kernel to merge."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import LOG2_E
from .configuration import Configuration, configure, every_input
from .labeled_read import labeled_read_kernel
from .launch import TILES, launch, make_plan, processors
from .read import read_kernel


class Partials(NamedTuple):
    """What the splits saw."""

    lse: Tensor
    """[splits, rows], base 2."""
    mean: Tensor
    """[splits, rows, features]"""
    largest: Tensor
    """[splits, rows], base 2; undefined where nobody asked."""


def read_banks(
    query: Tensor,
    *banks: Tensor,
    temperature: float,
    teacher: Tensor | None = None,
    teacher_temperature: float = 1.0,
    accuracy: bool = False,
) -> Partials:
    """Read several banks as if they were one; the teacher's rows [R, C], if any, follow the query's."""
    query = query.contiguous()
    teacher = query if teacher is None else teacher.contiguous()
    stacked = len(query) if teacher is query else len(query) + len(teacher)
    lowest = temperature if teacher is query else min(temperature, teacher_temperature)
    banks = tuple(with_unit_stride(bank) for bank in banks)
    plans = [
        make_plan(
            stacked,
            len(bank),
            bank.shape[1],
            bank.dtype,
            TILES[False, bank.dtype.itemsize],
            temperature=lowest,
            processors=processors(bank.device),
        )
        for bank in banks
    ]
    out = empty_partials(query, sum(plan.splits for plan in plans), stacked, accuracy)
    first = 0
    for bank, plan in zip(banks, plans, strict=True):
        launch(
            read_kernel, plan.grid(stacked),
            query, teacher, bank, *(part[first:] for part in out),
            LOG2_E / temperature, LOG2_E / teacher_temperature,
            len(query), stacked, *bank.shape, bank.stride(0), plan.share,
            ACCURACY=accuracy, **plan.constants, **plan.tiles.options,
        )  # fmt: skip
        first += plan.splits
    return out


def read_labeled(
    query: Tensor,
    queue: Tensor,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    *,
    pairs: bool,
    skip_own: bool = False,
    accuracy: bool = False,
) -> tuple[Partials, Partials]:
    """Negatives (`pairs`) or all entries, and positives; see `labeled_read`."""
    query, queue = query.contiguous(), with_unit_stride(queue)
    rows, (entries, features) = len(query), queue.shape
    plan = make_plan(
        rows,
        entries,
        features,
        queue.dtype,
        TILES[True, queue.dtype.itemsize],
        temperature=temperature,
        processors=processors(query.device),
    )
    first = empty_partials(query, plan.splits, rows, accuracy)
    positives = empty_partials(query, plan.splits, rows, accuracy=False)
    launch(
        labeled_read_kernel, plan.grid(rows),
        query, queue, query_labels.contiguous(), queue_labels.contiguous(),
        first.lse, first.mean, positives.lse, positives.mean, first.largest,
        LOG2_E / temperature, rows, entries, features, queue.stride(0), plan.share,
        PAIRS=pairs, SKIP_OWN=skip_own, ACCURACY=accuracy, **plan.constants, **plan.tiles.options,
    )  # fmt: skip
    return first, positives


def with_unit_stride(bank: Tensor) -> Tensor:
    """The bank as the kernels load it, 16 bytes at a time; a view of a wider matrix may stay one."""
    row_bytes = bank.stride(0) * bank.element_size()
    loadable = bank.stride(1) == 1 and row_bytes % 16 == 0 and bank.data_ptr() % 16 == 0
    return bank if loadable else bank.clone(memory_format=torch.contiguous_format)


def empty_partials(query: Tensor, splits: int, rows: int, accuracy: bool) -> Partials:
    """Unwritten results of `splits` x `rows`."""
    empty = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    lse = empty(splits, rows)
    return Partials(lse, empty(splits, rows, query.shape[1]), empty(splits, rows) if accuracy else lse)


def configurations() -> Iterator[Configuration]:
    """What the kernels here are compiled for."""
    for inputs in every_input():
        accuracy = {"ACCURACY": inputs.accuracy}
        plan = inputs.plan(TILES[False, inputs.dtype.itemsize])
        yield configure(read_kernel, inputs.dtype, plan.constants | accuracy, plan.tiles)
        plan = inputs.plan(TILES[True, inputs.dtype.itemsize])
        unicon = {"PAIRS": True, "SKIP_OWN": False}
        yield configure(labeled_read_kernel, inputs.dtype, plan.constants | unicon | accuracy, plan.tiles)
        if inputs.features == 128 and inputs.accuracy:
            nt_xent = {"PAIRS": False, "SKIP_OWN": True, "ACCURACY": False}
            yield configure(labeled_read_kernel, inputs.dtype, plan.constants | nt_xent, plan.tiles)
