"""The queue losses: closed forms of what the rows see in the queue (design/methods.md, section 1.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import Rows, float_rows
from .bank import nearest, take
from .reads import Read, attention_read, covariance_read, dot, labeled_read, pair_read, read
from .stream import Bank, in_base_2


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
    logit, positive = (own + same.logit) / (1 + same.number), (key + same.entry) / (1 + same.number)[:, None]
    loss, gradient = seen.plus(own, key).cross_entropy(logit, positive, temperature)
    return Rows(loss, gradient, _accuracy(own, seen.largest, return_accuracy))


def soft_cross_entropy_rows(
    query: Tensor, teacher: Tensor, queue: Tensor, temperature: float, teacher_temperature: float
) -> Rows:
    """LSE - logit of the mean entry under the teachers' softmax."""
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
    # The own logit's share of either softmax. It is the same in both, so that its direction.m counts as 0.
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
    """Both InfoNCE, of one read."""
    rows, bank = in_base_2(query, temperature), Bank(query, queue)
    negatives = attention_read(rows, bank)
    loss, gradient = torch.zeros_like(negatives.total), torch.zeros_like(rows)
    for key, share in ((bank.centered(first_key), weight), (bank.centered(second_key), 1 - weight)):
        pairs = negatives.lse_above(dot(rows, key))
        loss += share * _softplus(pairs)
        gradient += (share * torch.sigmoid(pairs))[:, None] * (negatives.mean - key) / temperature
    return _without_accuracy(loss, gradient)


def mean_shift_rows(query: Tensor, key: Tensor, queue: Tensor, k: int) -> Rows:
    """2 - 2 q.c, c the mean of the key's neighbors."""
    query = float_rows(query, query)
    # A key that is not finite has no nearest entries.
    mean = torch.zeros_like(query).masked_fill_(~key.isfinite().all(1, keepdim=True), torch.nan)
    for numbers in nearest(key, queue, k).T:
        mean += queue[numbers].to(query.dtype) / k
    return _without_accuracy(2 - 2 * dot(query, mean), -2 * mean)


def _softplus(x: Tensor) -> Tensor:
    # F.softplus is cut off at 20, an error of 1e-10 in float64.
    return torch.logaddexp(x, x.new_zeros(()))


def _accuracy(own: Tensor, largest: Tensor, wanted: bool) -> Tensor:
    return (own >= largest).float() if wanted else own.new_empty(0, dtype=torch.float32)


def _without_accuracy(loss: Tensor, gradient: Tensor) -> Rows:
    return Rows(loss, gradient, loss.new_empty(0, dtype=torch.float32))
