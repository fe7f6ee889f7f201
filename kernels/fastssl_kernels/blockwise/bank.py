"""The losses of a batch against groups or itself, gradients to a bank, and reads that are ops of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import LOG2_E
from ..rows import QueueRead, float_rows, two_rows
from .reads import covariance_read, dot, labeled_read, read
from .stream import Bank, Products, by_chunks, in_base_2, matches, row_chunks


def bank_cross_entropy_rows(
    prediction: Tensor, bank: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], gradient [N, C], LSE [N]; the logit of the targets' mean is the mean of their logits."""
    rows, entries = in_base_2(prediction, temperature), Bank(prediction, bank)
    seen = read(rows, entries)
    wanted = torch.stack([entries.centered(take(bank, indices)) for indices in target]).mean(0)
    return *seen.cross_entropy(dot(rows, wanted), wanted, temperature), seen.lse_above(-dot(rows, entries.center))


def nt_xent_rows(rows: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [R], each row's own part of the gradient [R, C], LSE [R], 1 / positives [R]."""
    scaled, bank = in_base_2(rows, temperature), Bank(rows, rows)
    seen, same = labeled_read(scaled, labels, bank, labels, skip_own=True)
    logit, positive = same.logit / same.number, same.entry / same.number[:, None]
    lse = seen.lse_above(-dot(scaled, bank.center))
    return *seen.cross_entropy(logit, positive, temperature), lse, 1 / same.number


def bank_gradient(
    rows: Tensor,
    bank: Tensor,
    row_labels: Tensor,
    bank_labels: Tensor,
    lse: Tensor,
    label_weight: Tensor,
    upstream: Tensor,
    temperature: float,
    skip_own: bool,
) -> Tensor:
    """[K, C]: sum over rows of upstream * (softmax - label_weight for each matching label) * row / t."""
    scaled, moved = in_base_2(rows, temperature), upstream[:, None] * float_rows(rows, rows) / temperature
    entries = Bank(rows, bank)
    lse = lse * LOG2_E - dot(scaled, entries.center)
    gradient = torch.zeros_like(bank, dtype=scaled.dtype)
    for chunk in row_chunks(rows):
        logits = Products(scaled[chunk])
        for here, block in entries.blocks(rows):
            weight = logits(block).sub_(lse[chunk]).exp2_()
            for labels in row_labels:
                same = matches(bank_labels[here], labels[chunk])
                if same is not None:
                    weight -= torch.where(same, label_weight[chunk], 0)
            if skip_own:
                weight.diagonal(here.start - chunk.start).fill_(0)
            gradient[here].addmm_(weight, moved[chunk])
    return gradient


def queue_read(query: Tensor, bank: Tensor, temperature: float) -> QueueRead:
    """LSE [N] and mean [N, C]."""
    rows, entries = in_base_2(query, temperature), Bank(query, bank)
    seen = read(rows, entries)
    return QueueRead(seen.lse_above(-dot(rows, entries.center)), seen.mean + entries.center)


def queue_read_gradient(
    query: Tensor, bank: Tensor, lse_upstream: Tensor, mean_upstream: Tensor, temperature: float
) -> Tensor:
    """[N, C]: (upstream of the LSE * mean + covariance of the entries * upstream of the mean) / t."""
    entries = Bank(query, bank)
    seen, covariance = covariance_read(in_base_2(query, temperature), mean_upstream, entries)
    return (lse_upstream[:, None] * (seen.mean + entries.center) + covariance) / temperature


def nearest(rows: Tensor, bank: Tensor, count: int) -> Tensor:
    """int64 [N, count]: the most similar entries, in descending order; of one, of equal entries the first."""
    rows, entries = float_rows(rows, rows), Bank(rows, bank)

    def nearest_to(chunk: slice) -> tuple[Tensor, Tensor]:
        few = two_rows(rows[chunk])
        best = few.new_empty(len(few), 0)
        numbers = best.to(torch.int64)
        for here, block in entries.blocks(rows):
            similarity, inside = _highest(few @ block.T, count)
            best, order = _highest(torch.cat([best, similarity], 1), count)
            numbers = torch.cat([numbers, inside + here.start], 1).gather(1, order)
        return best[: len(rows[chunk])], numbers[: len(rows[chunk])]

    return by_chunks(rows, nearest_to)[1]


def _highest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of each row, if it has as many, and their columns."""
    # Of equal values `max` takes the first and `topk` any.
    return values.max(1, keepdim=True) if count == 1 else values.topk(min(count, values.shape[1]), dim=1)


def take(bank: Tensor, numbers: Tensor) -> Tensor:
    """bank[numbers], with NaN for a number that is not in the bank; on a CPU that is an IndexError."""
    if bank.is_cpu:
        return bank.index_select(0, numbers)
    inside = (numbers >= 0) & (numbers < len(bank))
    rows = bank.index_select(0, numbers.clamp(0, len(bank) - 1))
    return torch.where(inside[:, None], rows, torch.nan)
