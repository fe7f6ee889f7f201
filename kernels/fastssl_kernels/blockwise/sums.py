"""Sums over a bank in one pass: the losses are closed forms of them.

`rows`: [N, C], scaled `in_base_2`. Labels: int64; -1 in `labels` is unknown. Logits and entries are those of the
bank, with its center subtracted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import wrong_labels
from .stream import Bank, Products, by_chunks, matches

_ATTENTION_ROWS = 64  # Per thread of torch's attention at a time


class Sums:
    """Per row, over the blocks added so far: the largest logit, and sums relative to its exponential."""

    def __init__(self, rows: Tensor) -> None:
        self._weighted = empty_sums(rows)
        # Finite, so that the difference between two empty rows is 0 and not NaN
        self.largest = torch.full_like(self._weighted[0], -1e30)
        """[N], in base 2."""
        self.total = torch.zeros_like(self.largest)
        """[N]: sum of 2**(logit - largest)."""

    def add(self, logits: Tensor, block: Tensor) -> None:
        """Add a block; overwrites `logits` with their terms of `total`."""
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
    """`Sums`, plus a sum in which each entry has another factor."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows)
        self._moment = empty_sums(rows)

    def add_with(self, factor: Tensor, logits: Tensor, block: Tensor) -> None:
        """Like `add`; also overwrites `factor`."""
        self.add(logits, block)
        self._moment.addmm_(block.T, factor.mul_(logits))

    def moment(self) -> Tensor:
        """[N, C]: the mean of factor times entry."""
        return self._mean_of(self._moment)

    def _rescale(self, factor: Tensor) -> None:
        super()._rescale(factor)
        self._moment *= factor


class Read(NamedTuple):
    """Softmax statistics of N rows over some entries."""

    largest: Tensor
    """[N]: the largest logit, in base 2; below any logit if there are no entries. From `attention_read`, the LSE."""
    total: Tensor
    """[N]: sum of 2**(logit - largest)."""
    mean: Tensor
    """[N, C]: the entries' mean, weighted by the softmax of the logits; 0 without entries."""

    def lse_above(self, logit: Tensor) -> Tensor:
        """[N]: natural logsumexp - `logit` (base 2); subtracts before rounding, so a small difference stays precise."""
        return (self.largest - logit) * math.log(2) + self.total.log()

    def plus(self, logit: Tensor, entry: Tensor) -> Read:
        """The same with one more entry per row, whose logit [N] is in base 2."""
        largest = torch.maximum(self.largest, logit)
        term = torch.exp2(logit - largest)
        total = self.total * torch.exp2(self.largest - largest) + term
        return Read(largest, total, torch.lerp(self.mean, entry, (term / total)[:, None]))

    def cross_entropy(self, logit: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Loss [N] against a distribution with mean `logit` [N] (base 2) and mean entry `target`, and its gradient."""
        return self.lse_above(logit), (self.mean - target) / temperature


class Matches(NamedTuple):
    """Sums over the entries with a row's label."""

    size: Tensor
    """[N]: how many entries."""
    logit: Tensor
    """[N]: sum of the logits, in base 2."""
    entry: Tensor
    """[N, C]: sum of the entries."""


def read(rows: Tensor, bank: Bank) -> Read:
    """Read all entries."""

    def read_chunk(chunk: slice) -> Read:
        logits, sums = Products(rows[chunk]), Sums(rows[chunk])
        for _, block in bank.blocks(rows):
            sums.add(logits(block), block)
        return _read(sums)

    return Read(*by_chunks(rows, read_chunk))


def attention_read(rows: Tensor, bank: Bank) -> Read:
    """Like `read` and faster on a CPU, but without the largest logit: `largest` is then the LSE.

    A read is attention with the bank as keys and values, and the threads of torch's attention do not wait for each
    other.
    """
    entries = bank.whole(rows)
    if entries is None:
        return read(rows, bank)
    # Attention parallelizes over blocks of rows and heads: with few rows, splitting the bank keeps threads busy
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
    """Read all entries, and the product [N, C] of their covariance with `direction` [N, C]."""

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
    """Read all entries, and those with the row's label.

    With `skip_own`, row i and entry i are the same, and are not compared.
    """
    if not skip_own:  # A batch that is its own bank has no unknown labels
        rows, labels = _without_unknown(rows, labels, bank_labels)

    def read_chunk(chunk: slice) -> tuple[Tensor, ...]:
        logits, sums, entry = Products(rows[chunk]), Sums(rows[chunk]), empty_sums(rows[chunk])
        count, logit = torch.zeros_like(sums.total), torch.zeros_like(sums.total)
        for here, block in bank.blocks(rows):
            of_block, same = logits(block), matches(bank_labels[here], labels[chunk])
            own = here.start - chunk.start
            if same is not None:
                weight = same.to(block.dtype)
                if skip_own:
                    weight.diagonal(own).fill_(0)
                count += weight.sum(0)
                logit += (weight * of_block).sum(0)
                entry.addmm_(block.T, weight)
            if skip_own:
                of_block.diagonal(own).fill_(-torch.inf)
            sums.add(of_block, block)
        return *_read(sums), count, logit, entry.T.contiguous()

    parts = by_chunks(rows, read_chunk)
    return Read(*parts[:3]), Matches(*parts[3:])


def pair_read(rows: Tensor, labels: Tensor, bank: Bank, bank_labels: Tensor) -> tuple[Read, Read, Tensor]:
    """Read entries without the row's label; those with it, logits negated; and the largest logit [N] of all."""
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
    """[N]: dot products of rows with one entry each."""
    return (rows * entries).sum(1)


def _read(sums: Sums) -> Read:
    return Read(sums.largest, sums.total, sums.mean())


def _without_unknown(rows: Tensor, labels: Tensor, bank_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Replace unknown labels by one that no entry has, and rows with an invalid label by NaN."""
    known = labels.masked_fill(labels == -1, torch.iinfo(labels.dtype).min)
    return rows.masked_fill(wrong_labels(labels, bank_labels)[:, None], torch.nan), known


def empty_sums(rows: Tensor) -> Tensor:
    """Zeros, [features, rows]."""
    return torch.zeros_like(rows.T, memory_format=torch.contiguous_format)
