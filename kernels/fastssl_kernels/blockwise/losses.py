"""Every loss as a closed form of sums over the bank, and the other functions that `ops` calls."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import LOG2_E, QueueRead, Rows, float_rows, two_rows
from .stream import Bank, Products, by_chunks, in_base_2, matches, row_chunks
from .sums import Read, attention_read, covariance_read, dot, labeled_read, pair_read, read


def info_nce_rows(query: Tensor, key: Tensor, queue: Tensor, temperature: float, return_accuracy: bool) -> Rows:
    """softplus(LSE of the negatives - own logit)."""
    rows, bank = in_base_2(query, temperature), Bank(query, queue)
    key = bank.centered(key)
    own = dot(rows, key)
    negatives = (read if return_accuracy else attention_read)(rows, bank)
    pairs = negatives.lse_above(own)
    gradient = torch.sigmoid(pairs)[:, None] * (negatives.mean - key) / temperature
    return Rows(_softplus(pairs), gradient, _accuracy(own, negatives.largest, return_accuracy))


def unicon_rows(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    return_accuracy: bool,
) -> Rows:
    """softplus(LSE of the negatives + LSE of the negated positives)."""
    rows, bank = in_base_2(query, temperature), Bank(query, queue)
    key = bank.centered(key)
    own = dot(rows, key)
    negatives, positives, largest = pair_read(rows, query_labels, bank, queue_labels)
    positives = positives.plus(-own, key)
    pairs = negatives.lse_above(own) + positives.lse_above(-own)
    gradient = torch.sigmoid(pairs)[:, None] * (negatives.mean - positives.mean) / temperature
    return Rows(_softplus(pairs), gradient, _accuracy(own, largest, return_accuracy))


def sup_con_rows(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    return_accuracy: bool,
) -> Rows:
    """LSE of own key and queue - mean logit of the positives."""
    rows, bank = in_base_2(query, temperature), Bank(query, queue)
    key = bank.centered(key)
    own = dot(rows, key)
    seen, same = labeled_read(rows, query_labels, bank, queue_labels)
    logit, positive = (own + same.logit) / (1 + same.size), (key + same.entry) / (1 + same.size)[:, None]
    loss, gradient = seen.plus(own, key).cross_entropy(logit, positive, temperature)
    return Rows(loss, gradient, _accuracy(own, seen.largest, return_accuracy))


def soft_cross_entropy_rows(
    query: Tensor, teacher: Tensor, queue: Tensor, temperature: float, teacher_temperature: float
) -> Rows:
    """LSE - logit of the teachers' softmax-weighted mean entry."""
    rows, teachers = in_base_2(query, temperature), in_base_2(teacher.flatten(0, 1), teacher_temperature)
    seen = read(torch.cat([rows, teachers]), Bank(query, queue))
    of_query = Read(*(x[: len(rows)] for x in seen))
    target = seen.mean[len(rows) :].view(teacher.shape).mean(0)
    return _without_accuracy(*of_query.cross_entropy(dot(rows, target), target, temperature))


def consistency_rows(query: Tensor, key: Tensor, queue: Tensor, temperature: float, include_positive: bool) -> Rows:
    """Half the difference of the mean of (key - query).m / t under the key's and under the query's softmax."""
    query, key, bank = float_rows(query, query), float_rows(key, query), Bank(query, queue)
    rows, key_rows = in_base_2(query, temperature), in_base_2(key, temperature)
    direction = (key - query) / temperature
    of_query, covariance = covariance_read(rows, direction, bank)
    of_key = read(key_rows, bank)
    # The own logit's share of each softmax; the logit is the same in both, so its direction.m counts as 0
    query_own = key_own = torch.zeros_like(query[:, :1])
    if include_positive:
        query_own = torch.sigmoid(-of_query.lse_above(dot(rows, bank.centered(key))))[:, None]
        key_own = torch.sigmoid(-of_key.lse_above(dot(key_rows, bank.centered(query))))[:, None]
    apart = (1 - key_own) * of_key.mean - (1 - query_own) * of_query.mean + (query_own - key_own) * bank.center
    in_query = (1 - query_own) * dot(direction, of_query.mean + bank.center)[:, None]
    in_key = (1 - key_own) * dot(direction, of_key.mean + bank.center)[:, None]
    of_own = query_own * in_query * (bank.centered(key) - of_query.mean) - key_own * in_key * key
    gradient = (of_own - apart - (1 - query_own) * covariance) / (2 * temperature)
    return _without_accuracy(dot(direction, apart) / 2, gradient)


def mixco_rows(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    temperature: float,
) -> Rows:
    """LSE of keys and queue - logit of the mixed key."""
    rows, bank, weight = in_base_2(query, temperature), Bank(query, keys, queue), weight[:, None]
    mixed = weight * bank.centered(take(keys, first)) + (1 - weight) * bank.centered(take(keys, second))
    return _without_accuracy(*read(rows, bank).cross_entropy(dot(rows, mixed), mixed, temperature))


def unmix_rows(
    query: Tensor, first_key: Tensor, second_key: Tensor, queue: Tensor, weight: Tensor, temperature: float
) -> Rows:
    """Both InfoNCE losses from one read."""
    rows, bank = in_base_2(query, temperature), Bank(query, queue)
    negatives = attention_read(rows, bank)
    loss, gradient = torch.zeros_like(negatives.total), torch.zeros_like(rows)
    for key, key_weight in ((bank.centered(first_key), weight), (bank.centered(second_key), 1 - weight)):
        pairs = negatives.lse_above(dot(rows, key))
        loss += key_weight * _softplus(pairs)
        gradient += (key_weight * torch.sigmoid(pairs))[:, None] * (negatives.mean - key) / temperature
    return _without_accuracy(loss, gradient)


def mean_shift_rows(query: Tensor, key: Tensor, queue: Tensor, k: int) -> Rows:
    """2 - 2 q.c, with c the mean of the key's neighbors."""
    query = float_rows(query, query)
    # A non-finite key has no nearest entries
    mean = torch.zeros_like(query).masked_fill_(~key.isfinite().all(1, keepdim=True), torch.nan)
    for indices in nearest(key, queue, k).T:
        mean += queue[indices].to(query.dtype) / k
    return _without_accuracy(2 - 2 * dot(query, mean), -2 * mean)


def bank_cross_entropy_rows(
    prediction: Tensor, bank: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], gradient [N, C], LSE [N]; the logit of the mean target is the mean of the targets' logits."""
    rows, entries = in_base_2(prediction, temperature), Bank(prediction, bank)
    seen = read(rows, entries)
    wanted = torch.stack([entries.centered(take(bank, indices)) for indices in target]).mean(0)
    return *seen.cross_entropy(dot(rows, wanted), wanted, temperature), seen.lse_above(-dot(rows, entries.center))


def nt_xent_rows(rows: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [R], each row's own part of the gradient [R, C], LSE [R], 1 / positives [R]."""
    scaled, bank = in_base_2(rows, temperature), Bank(rows, rows)
    seen, same = labeled_read(scaled, labels, bank, labels, skip_own=True)
    logit, positive = same.logit / same.size, same.entry / same.size[:, None]
    lse = seen.lse_above(-dot(scaled, bank.center))
    return *seen.cross_entropy(logit, positive, temperature), lse, 1 / same.size


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
    """int64 [N, count]: the most similar entries, in descending order; for a count of 1, the first of equal ones."""
    rows, entries = float_rows(rows, rows), Bank(rows, bank)

    def nearest_to(chunk: slice) -> tuple[Tensor, Tensor]:
        few = two_rows(rows[chunk])
        best = few.new_empty(len(few), 0)
        indices = best.to(torch.int64)
        for here, block in entries.blocks(rows):
            similarity, inside = _highest(few @ block.T, count)
            best, order = _highest(torch.cat([best, similarity], 1), count)
            indices = torch.cat([indices, inside + here.start], 1).gather(1, order)
        return best[: len(rows[chunk])], indices[: len(rows[chunk])]

    return by_chunks(rows, nearest_to)[1]


def _highest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest values of each row, or all if it has fewer, and their columns."""
    # Of equal values `max` returns the first, `topk` any
    return values.max(1, keepdim=True) if count == 1 else values.topk(min(count, values.shape[1]), dim=1)


def take(bank: Tensor, indices: Tensor) -> Tensor:
    """bank[indices], with NaN for an index outside the bank; on a CPU that is an IndexError."""
    if bank.is_cpu:
        return bank.index_select(0, indices)
    inside = (indices >= 0) & (indices < len(bank))
    rows = bank.index_select(0, indices.clamp(0, len(bank) - 1))
    return torch.where(inside[:, None], rows, torch.nan)


def _softplus(x: Tensor) -> Tensor:
    # F.softplus is cut off at 20, an error of 1e-10 in float64.
    return torch.logaddexp(x, x.new_zeros(()))


def _accuracy(own: Tensor, largest: Tensor, wanted: bool) -> Tensor:
    return (own >= largest).float() if wanted else own.new_empty(0, dtype=torch.float32)


def _without_accuracy(loss: Tensor, gradient: Tensor) -> Rows:
    return Rows(loss, gradient, loss.new_empty(0, dtype=torch.float32))
