"""The losses streamed over blocks of the queue in plain torch: any device, any dtype, no N x K tensor.

Like every fast implementation, a function here returns loss [N], its gradient with respect to the query [N,
C], and contrast accuracy [N] (empty unless asked for). Logits are in base 2: `exp2` is cheaper than `exp`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import accumulation_dtype, fits_unshifted

_CPU_ROWS = 256
# 4 MiB of float32: a block stays in the cache between its passes, and blocks are few: at each operation the
# threads wait for each other, which on a busy machine is what costs.
_CPU_LOGITS = 2**20
_DEVICE_LOGITS = 2**25  # elsewhere a block must outweigh its launches
_MAX_BLOCK = 2**14  # bounds the float32 copy of a block of a 16-bit queue


class Rows(NamedTuple):
    """What a fast implementation returns."""

    loss: Tensor
    gradient: Tensor
    accuracy: Tensor


def info_nce_rows(query: Tensor, key: Tensor, queue: Tensor, temperature: float, return_accuracy: bool) -> Rows:
    """InfoNCE; arguments as in `fastssl_kernels.info_nce`."""
    chunks = zip(query.split(_chunk(query)), key.split(_chunk(query)), strict=True)
    return _join([_pairs(q, k, queue, None, temperature, return_accuracy) for q, k in chunks])


def unicon_rows(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    return_accuracy: bool,
) -> Rows:
    """UniCon; arguments as in `fastssl_kernels.unicon`."""
    size = _chunk(query)
    chunks = zip(query.split(size), key.split(size), query_labels.split(size), strict=True)
    return _join([_pairs(q, k, queue, (labels, queue_labels), temperature, return_accuracy) for q, k, labels in chunks])


def _pairs(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    temperature: float,
    return_accuracy: bool,
) -> Rows:
    """softplus(LSE of negatives + LSE of negated positives); in InfoNCE the own key is the only positive."""
    dtype = accumulation_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    scaled = query * (math.log2(math.e) / temperature)
    own = (scaled * key).sum(1)
    shifted = not fits_unshifted(temperature, len(queue), dtype)
    negatives, positives = _Read(query, shifted), _Read(query, shifted)
    largest = torch.full_like(own, -torch.inf)
    size = _block(query)
    buffer = query.new_empty(len(query) * size)
    for start in range(0, len(queue), size):
        block = queue[start : start + size].to(dtype)
        logits = buffer[: len(query) * len(block)].view(len(query), len(block))
        torch.mm(scaled, block.T, out=logits)
        if return_accuracy:
            largest = torch.maximum(largest, logits.amax(1))
        if labels is not None:
            same = _same(labels[0], labels[1][start : start + size])
            # Looking spares work, but on other devices than the CPU it would wait for the device.
            if not same.is_cpu or same.any():
                positives.add((-logits).masked_fill_(~same, -torch.inf), block)
                logits.masked_fill_(same, -torch.inf)
        negatives.add(logits, block)
    positive_lse, positive_mean = _merge(positives, -own, key)
    pairs = (negatives.lse() + positive_lse) * math.log(2)
    gradient = (torch.sigmoid(pairs) / temperature)[:, None] * (negatives.mean() - positive_mean)
    accuracy = (own >= largest).float() if return_accuracy else own.new_empty(0, dtype=torch.float32)
    return Rows(torch.logaddexp(pairs, pairs.new_zeros(())), gradient, accuracy)


class _Read:
    """Per row the running sum of 2**logit, and of 2**logit times the entry, over the blocks added so far."""

    def __init__(self, query: Tensor, shifted: bool) -> None:
        self.shifted = shifted
        # Finite, so that the difference of two empty rows' shifts is 0 and not NaN.
        self.shift = query.new_full((len(query),), -1e30 if shifted else 0.0)
        self.total = query.new_zeros(len(query))
        self.weighted = torch.zeros_like(query)

    def add(self, logits: Tensor, block: Tensor) -> None:
        """Overwrites `logits`."""
        if self.shifted:
            shift = torch.maximum(self.shift, logits.amax(1))
            keep = torch.exp2(self.shift - shift)
            self.total *= keep
            self.weighted *= keep[:, None]
            self.shift = shift
            logits -= shift[:, None]
        logits.exp2_()
        self.total += logits.sum(1)
        self.weighted.addmm_(logits, block)

    def lse(self) -> Tensor:
        """Base 2; -inf for a row without entries."""
        return self.shift + torch.log2(self.total)

    def mean(self) -> Tensor:
        """The entries' mean, weighted by the softmax of the logits; 0 for a row without entries."""
        return self.weighted / torch.where(self.total > 0, self.total, 1)[:, None]


def _merge(read: _Read, logit: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    """LSE and mean of `read` with one more entry per row."""
    lse = torch.logaddexp2(read.lse(), logit)
    mean = torch.exp2(read.lse() - lse)[:, None] * read.mean() + torch.exp2(logit - lse)[:, None] * entry
    return lse, mean


def _same(rows: Tensor, entries: Tensor) -> Tensor:
    return (rows[:, None] == entries) & (rows[:, None] != -1)


def _join(chunks: list[Rows]) -> Rows:
    return chunks[0] if len(chunks) == 1 else Rows(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _chunk(query: Tensor) -> int:
    """Query rows at a time: all of them, except where a block of logits must fit a cache."""
    return _CPU_ROWS if query.is_cpu else len(query)


def _block(query: Tensor) -> int:
    """Queue entries at a time."""
    logits = _CPU_LOGITS if query.is_cpu else _DEVICE_LOGITS
    return max(1, min(logits // len(query), _MAX_BLOCK))
