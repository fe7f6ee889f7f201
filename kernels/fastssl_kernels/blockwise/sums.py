"""Sums over a bank in one pass: the losses are closed forms of them.

`rows`: [N, C], scaled `in_base_2`. Labels: int64; -1 in `labels` is none. Logits and entries are those of the
bank, that is with the entries less its center.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import wrong_labels
from .stream import Bank, Products, by_chunks, matches

_ATTENTION_ROWS = 64  # that a thread of torch's attention takes at a time


class Sums:
    """Per row, over the blocks added so far: the largest logit, and sums relative to its exponential."""

    def __init__(self, rows: Tensor) -> None:
        self._weighted = empty_sums(rows)
        # Finite, so that the difference of two empty rows' largest is 0 and not NaN.
        self.largest = torch.full_like(self._weighted[0], -1e30)
        """[N], in base 2."""
        self.total = torch.zeros_like(self.largest)
        """[N]: sum of 2**(logit - largest)."""

    def add(self, logits: Tensor, block: Tensor) -> None:
        """Overwrites `logits` by their terms of `total`."""
        largest = torch.maximum(self.largest, logits.amax(0))
        self._rescale(torch.exp2(self.largest - largest))
        self.largest = largest
        logits.sub_(largest).exp2_()
        self.total += logits.sum(0)
        self._weighted.addmm_(block.T, logits)

    def mean(self) -> Tensor:
        """[N, C]: the entries' mean, weighted by the softmax of the logits; 0 for a row without entries."""
        return self._mean_of(self._weighted)

    def _rescale(self, factor: Tensor) -> None:
        self.total *= factor
        self._weighted *= factor

    def _mean_of(self, weighted: Tensor) -> Tensor:
        return (weighted / torch.where(self.total > 0, self.total, 1)).T.contiguous()


class MomentSums(Sums):
    """`Sums` that weight entries also by a factor of their own."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows)
        self._moment = empty_sums(rows)

    def add_with(self, factor: Tensor, logits: Tensor, block: Tensor) -> None:
        """`add`; overwrites `factor` too."""
        self.add(logits, block)
        self._moment.addmm_(block.T, factor.mul_(logits))

    def moment(self) -> Tensor:
        """[N, C]: the mean of factor times entry."""
        return self._mean_of(self._moment)

    def _rescale(self, factor: Tensor) -> None:
        super()._rescale(factor)
        self._moment *= factor


class Read(NamedTuple):
    """What N rows see in some entries."""

    largest: Tensor
    """[N]: the largest logit, in base 2; lower than any where there are no entries. The LSE where attention read."""
    total: Tensor
    """[N]: sum of 2**(logit - largest)."""
    mean: Tensor
    """[N, C]: the entries' mean, weighted by the softmax of the logits; 0 without entries."""

    def lse_above(self, logit: Tensor) -> Tensor:
        """[N]: natural logsumexp - `logit`, which is in base 2: rounded as the difference, and not as the terms, is."""
        return (self.largest - logit) * math.log(2) + self.total.log()

    def plus(self, logit: Tensor, entry: Tensor) -> Read:
        """With one more entry a row; its logit [N] is in base 2."""
        largest = torch.maximum(self.largest, logit)
        term = torch.exp2(logit - largest)
        total = self.total * torch.exp2(self.largest - largest) + term
        return Read(largest, total, torch.lerp(self.mean, entry, (term / total)[:, None]))

    def cross_entropy(self, logit: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Loss [N] against a distribution with this mean `logit` [N], in base 2, and mean entry; its gradient."""
        return self.lse_above(logit), (self.mean - target) / temperature


class Matches(NamedTuple):
    """The entries with a row's label."""

    number: Tensor
    """[N]"""
    logit: Tensor
    """[N]: sum of the logits, in base 2."""
    entry: Tensor
    """[N, C]: sum of the entries."""


def read(rows: Tensor, bank: Bank) -> Read:
    """All entries."""

    def read_chunk(chunk: slice) -> Read:
        logits, sums = Products(rows[chunk]), Sums(rows[chunk])
        for _, block in bank.blocks(rows):
            sums.add(logits(block), block)
        return _read(sums)

    return Read(*by_chunks(rows, read_chunk))


def attention_read(rows: Tensor, bank: Bank) -> Read:
    """As `read`, and on a CPU faster, but without the largest logit, which then is the LSE.

    A read is attention with the bank as keys and as values, and the threads of torch's do not wait for each other.
    """
    entries = bank.whole(rows)
    if entries is None:
        return read(rows, bank)
    # Attention divides its work by blocks of rows and by heads: with few rows, parts of the bank keep threads busy.
    wanted = max(1, torch.get_num_threads() * _ATTENTION_ROWS // len(rows))
    heads = math.gcd(len(entries), 1 << (wanted.bit_length() - 1))
    entries = entries.view(1, heads, -1, entries.shape[1])
    query = rows.expand(1, heads, *rows.shape)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    means, lses = (x[0] for x in attend(query, entries, entries, scale=math.log(2)))
    lse = lses.logsumexp(0)
    mean = (torch.exp(lses - lse)[:, :, None] * means).sum(0)
    return Read(lse / math.log(2) - dot(rows, bank.center), torch.ones_like(lse), mean - bank.center)


def covariance_read(rows: Tensor, direction: Tensor, bank: Bank) -> tuple[Read, Tensor]:
    """All entries, and the product [N, C] of their covariance with `direction` [N, C]."""

    def read_chunk(chunk: slice) -> tuple[Tensor, ...]:
        logits, factor, sums = Products(rows[chunk]), Products(direction[chunk]), MomentSums(rows[chunk])
        for _, block in bank.blocks(rows):
            sums.add_with(factor(block), logits(block), block)
        return *_read(sums), sums.moment()

    *parts, moment = by_chunks(rows, read_chunk)
    seen = Read(*parts)
    return seen, moment - dot(direction, seen.mean)[:, None] * seen.mean


def labeled_read(
    rows: Tensor, labels: Tensor, bank: Bank, bank_labels: Tensor, skip_own: bool = False
) -> tuple[Read, Matches]:
    """All entries, and those with the row's label.

    With `skip_own` row and entry of one number are the same and do not see each other.
    """
    if not skip_own:  # of a batch that is its own bank, the labels are of known classes
        rows, labels = _without_unknown(rows, labels, bank_labels)

    def read_chunk(chunk: slice) -> tuple[Tensor, ...]:
        logits, sums, entry = Products(rows[chunk]), Sums(rows[chunk]), empty_sums(rows[chunk])
        number, logit = torch.zeros_like(sums.total), torch.zeros_like(sums.total)
        for here, block in bank.blocks(rows):
            of_block, same = logits(block), matches(bank_labels[here], labels[chunk])
            own = here.start - chunk.start
            if same is not None:
                weight = same.to(block.dtype)
                if skip_own:
                    weight.diagonal(own).fill_(0)
                number += weight.sum(0)
                logit += (weight * of_block).sum(0)
                entry.addmm_(block.T, weight)
            if skip_own:
                of_block.diagonal(own).fill_(-torch.inf)
            sums.add(of_block, block)
        return *_read(sums), number, logit, entry.T.contiguous()

    parts = by_chunks(rows, read_chunk)
    return Read(*parts[:3]), Matches(*parts[3:])


def pair_read(rows: Tensor, labels: Tensor, bank: Bank, bank_labels: Tensor) -> tuple[Read, Read, Tensor]:
    """Entries without the row's label; those with it, their logits negated; the largest logit [N] of all."""
    rows, labels = _without_unknown(rows, labels, bank_labels)

    def read_chunk(chunk: slice) -> tuple[Tensor, ...]:
        logits, negatives, positives = Products(rows[chunk]), Sums(rows[chunk]), Sums(rows[chunk])
        largest = negatives.largest
        for here, block in bank.blocks(rows):
            of_block, same = logits(block), matches(bank_labels[here], labels[chunk])
            largest = torch.maximum(largest, of_block.amax(0))
            if same is not None:
                positives.add((-of_block).masked_fill_(~same, -torch.inf), block)
                of_block.masked_fill_(same, -torch.inf)
            negatives.add(of_block, block)
        return *_read(negatives), *_read(positives), largest

    *parts, largest = by_chunks(rows, read_chunk)
    return Read(*parts[:3]), Read(*parts[3:]), largest


def dot(rows: Tensor, entries: Tensor) -> Tensor:
    """[N], of one entry a row."""
    return (rows * entries).sum(1)


def _read(sums: Sums) -> Read:
    return Read(sums.largest, sums.total, sums.mean())


def _without_unknown(rows: Tensor, labels: Tensor, bank_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Unknown labels replaced by one that no entry has, and rows by NaN where a label is no label."""
    known = labels.masked_fill(labels == -1, torch.iinfo(labels.dtype).min)
    return rows.masked_fill(wrong_labels(labels, bank_labels)[:, None], torch.nan), known


def empty_sums(rows: Tensor) -> Tensor:
    """Zeros, [features, rows]."""
    return torch.zeros_like(rows.T, memory_format=torch.contiguous_format)
