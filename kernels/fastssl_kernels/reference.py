"""Every loss as its paper defines it: the numerical contract of the fast implementations.

Logits are N x K tensors, gradients come from autograd, and float64 is computed in float64, everything else in
float32. Arguments, shapes and sources are documented at the function of the same name in `fastssl_kernels`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import contract
from .rows import (
    QueueRead,
    accumulation_dtype,
    float_rows,
    reduce_rows,
    row_weights,
    stack_targets,
    stack_teachers,
    two_rows,
    wrong_labels,
)


def queue_read(query: Tensor, bank: Tensor, *, temperature: float) -> QueueRead:
    """Logsumexp of the logits and softmax-weighted mean of the bank."""
    contract.check_rows(query=query, bank=bank)
    contract.check_temperature(temperature)
    logits = _similarity(query, bank) / float(temperature)
    return QueueRead(logits.logsumexp(1), _product(logits.softmax(1), float_rows(bank, query)))


def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    reduction: str = "mean",
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of the own key (class 0) against the queue."""
    contract.check_pairs(query, queue, key=key)
    contract.check_temperature(temperature)
    contract.check_switch(return_accuracy=return_accuracy)
    logits = _own_and_queue(query, key, queue) / float(temperature)
    return reduce_rows(_info_nce_rows(logits), reduction, _accuracy(logits, return_accuracy))


def unicon(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    reduction: str = "mean",
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log(1 + sum over negatives of exp(l) * sum over positives of exp(-l))."""
    contract.check_pairs(query, queue, key=key)
    contract.check_labels(query, queue, query_labels, queue_labels)
    contract.check_temperature(temperature)
    contract.check_switch(return_accuracy=return_accuracy)
    contract.check_label_values(query_labels=query_labels, queue_labels=queue_labels)
    logits = _own_and_queue(query, key, queue) / float(temperature)
    logits = logits.masked_fill(wrong_labels(query_labels, queue_labels)[:, None], torch.nan)
    positive = _own_and_same(query_labels, queue_labels)
    negatives = logits.masked_fill(positive, -torch.inf).logsumexp(1)
    positives = (-logits).masked_fill(~positive, -torch.inf).logsumexp(1)
    return reduce_rows(_softplus(negatives + positives), reduction, _accuracy(logits, return_accuracy))


def sup_con(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    reduction: str = "mean",
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean over the positives of their cross-entropy against own key and queue."""
    contract.check_pairs(query, queue, key=key)
    contract.check_labels(query, queue, query_labels, queue_labels)
    contract.check_temperature(temperature)
    contract.check_switch(return_accuracy=return_accuracy)
    contract.check_label_values(query_labels=query_labels, queue_labels=queue_labels)
    logits = _own_and_queue(query, key, queue) / float(temperature)
    logits = logits.masked_fill(wrong_labels(query_labels, queue_labels)[:, None], torch.nan)
    loss = _mean_over_positives(logits, _own_and_same(query_labels, queue_labels))
    return reduce_rows(loss, reduction, _accuracy(logits, return_accuracy))


def soft_cross_entropy(
    query: Tensor,
    teacher: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    teacher_temperature: float,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the student's softmax over the queue against the teachers' mean softmax."""
    contract.check_teacher(query, teacher, queue)
    contract.check_temperature(temperature)
    contract.check_temperature(teacher_temperature, "teacher_temperature")
    teachers = stack_teachers(teacher)
    target = torch.stack(
        [(_similarity(rows, queue) / float(teacher_temperature)).softmax(1) for rows in teachers]
    ).mean(0)
    return reduce_rows(-(target * (_similarity(query, queue) / float(temperature)).log_softmax(1)).sum(1), reduction)


def consistency(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    include_positive: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Symmetric KL divergence between the query's and the key's softmax over the queue: the mean of both directions."""
    contract.check_pairs(query, queue, key=key)
    contract.check_temperature(temperature)
    contract.check_switch(include_positive=include_positive)
    of_query, of_key = _similarity(query, queue) / float(temperature), _similarity(key, queue) / float(temperature)
    if include_positive:
        own = _dot(query, key)[:, None] / float(temperature)
        of_query, of_key = torch.cat([own, of_query], 1), torch.cat([own, of_key], 1)
    of_query, of_key = of_query.log_softmax(1), of_key.log_softmax(1)
    return reduce_rows(((of_key.exp() - of_query.exp()) * (of_key - of_query)).sum(1) / 2, reduction)


def mixco(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    *,
    first: Tensor,
    second: Tensor,
    weight: float | Tensor,
    temperature: float,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy over batch keys and queue with target `weight` at keys[first], the rest at keys[second]."""
    contract.check_rows(query=query, keys=keys, queue=queue)
    contract.check_index(query, first=first, second=second)
    contract.check_temperature(temperature)
    contract.check_weight(query, weight)
    contract.check_index_values("keys", keys, first=first, second=second)
    weight = row_weights(query, weight)
    logits = torch.cat([_similarity(query, keys), _similarity(query, queue)], 1) / float(temperature)
    of_first, of_second = logits.gather(1, first[:, None])[:, 0], logits.gather(1, second[:, None])[:, 0]
    return reduce_rows(logits.logsumexp(1) - weight * of_first - (1 - weight) * of_second, reduction)


def unmix(
    query: Tensor,
    first_key: Tensor,
    second_key: Tensor,
    queue: Tensor,
    *,
    weight: float | Tensor,
    temperature: float,
    reduction: str = "mean",
) -> Tensor:
    """weight * InfoNCE with the first key + (1 - weight) * InfoNCE with the second."""
    contract.check_pairs(query, queue, first_key=first_key, second_key=second_key)
    contract.check_temperature(temperature)
    contract.check_weight(query, weight)
    weight = row_weights(query, weight)
    first = _info_nce_rows(_own_and_queue(query, first_key, queue) / float(temperature))
    second = _info_nce_rows(_own_and_queue(query, second_key, queue) / float(temperature))
    return reduce_rows(weight * first + (1 - weight) * second, reduction)


def bank_cross_entropy(
    prediction: Tensor, bank: Tensor, target: Tensor, *, temperature: float, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the softmax over a bank, mean over the targets of a row; gradient to the bank too."""
    contract.check_targets(prediction, bank, target)
    contract.check_temperature(temperature)
    contract.check_index_values("bank", bank, target=target)
    # Not `F.cross_entropy`, which ignores a target of -100
    log_softmax = (_similarity(prediction, bank) / float(temperature)).log_softmax(1)
    return reduce_rows(-log_softmax.gather(1, stack_targets(target).T).mean(1), reduction)


def nearest_entry(query: Tensor, bank: Tensor) -> Tensor:
    """The entry nearest to each row."""
    contract.check_rows(("bank",), query=query, bank=bank)
    return _similarity(two_rows(query), bank).argmax(1)[: len(query)]


def update_groups(
    features: Tensor, groups: Tensor, *, momentum: float | Tensor, assignment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Assign each row to its nearest group, move the groups toward the mean of their rows."""
    contract.check_rows(features=features, groups=groups)
    contract.check_momentum(features, momentum)
    assignment = nearest_entry(features, groups) if assignment is None else assignment
    contract.check_index(features, assignment=assignment)
    contract.check_index_values("groups", groups, assignment=assignment)
    members = F.one_hot(assignment, len(groups)).T.to(accumulation_dtype(features.dtype))
    count = members.sum(1, keepdim=True)
    old = float_rows(groups, features)
    mean = _product(members, float_rows(features, features)) / count.clamp(min=1)
    momentum = momentum if isinstance(momentum, Tensor) else float(momentum)
    moved = torch.where(count > 0, momentum * old + (1 - momentum) * mean, old)
    return F.normalize(moved, dim=1), assignment


def mean_shift(query: Tensor, key: Tensor, queue: Tensor, *, k: int, reduction: str = "mean") -> Tensor:
    """Mean squared distance of the query to the k queue entries nearest to the key."""
    contract.check_pairs(query, queue, key=key)
    contract.check_neighbors(queue, k)
    nearest = _similarity(key, queue).topk(k, dim=1).indices
    rows = 2 - 2 * _similarity(query, queue).gather(1, nearest).mean(1)
    return reduce_rows(rows.masked_fill(~key.isfinite().all(1), torch.nan), reduction)


def nt_xent(
    first: Tensor, second: Tensor, *, temperature: float, labels: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the other view, or of all rows of the label, against all other rows."""
    contract.check_views(first, second, labels)
    contract.check_temperature(temperature)
    rows = torch.cat([first, second])
    labels = torch.arange(len(first), device=first.device) if labels is None else labels
    contract.check_label_values(labels=labels)
    positive = _same(labels.repeat(2), labels.repeat(2))
    # An unlabeled row's positive is its other view
    positive |= torch.eye(len(first), dtype=torch.bool, device=first.device).repeat(2, 2)
    own = torch.eye(len(rows), dtype=torch.bool, device=first.device)
    logits = (_similarity(rows, rows) / float(temperature)).masked_fill(own, -torch.inf)
    logits = logits.masked_fill((labels < -1).any(), torch.nan)
    return reduce_rows(_mean_over_positives(logits, positive & ~own), reduction)


def _similarity(rows: Tensor, bank: Tensor) -> Tensor:
    """[N, K] dot products in the accumulation dtype."""
    return _product(float_rows(rows, rows), float_rows(bank, rows).T)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product with autocast disabled."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _dot(rows: Tensor, others: Tensor) -> Tensor:
    return (float_rows(rows, rows) * float_rows(others, rows)).sum(1)


def _own_and_queue(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """[N, 1 + K]: the own key first, then the queue."""
    return torch.cat([_dot(query, key)[:, None], _similarity(query, queue)], dim=1)


def _info_nce_rows(logits: Tensor) -> Tensor:
    own = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, own, reduction="none")


def _same(row_labels: Tensor, entry_labels: Tensor) -> Tensor:
    return (row_labels[:, None] == entry_labels) & (row_labels[:, None] != -1)


def _own_and_same(query_labels: Tensor, queue_labels: Tensor) -> Tensor:
    """[N, 1 + K]: whether an entry is positive; the own key always is."""
    same = _same(query_labels, queue_labels)
    return torch.cat([torch.ones_like(same[:, :1]), same], dim=1)


def _mean_over_positives(logits: Tensor, positive: Tensor) -> Tensor:
    """Minus the mean over positives of the log softmax."""
    log_softmax = logits.log_softmax(1).masked_fill(~positive, 0)
    return -log_softmax.sum(1) / positive.sum(1)


def _softplus(x: Tensor) -> Tensor:
    # F.softplus is cut off at 20, an error of 1e-10 in float64
    return torch.logaddexp(x, x.new_zeros(()))


def _accuracy(logits: Tensor, wanted: bool) -> Tensor | None:
    """1 where no queue entry has a larger logit than the own key."""
    return (logits[:, 1:] <= logits[:, :1]).all(1).float() if wanted else None
