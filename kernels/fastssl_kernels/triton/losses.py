"""The functions of `blockwise.losses` on Triton kernels: reads of the bank, then one kernel for the closed form."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..rows import LOG2_E, Rows
from .bank_gradient import bank_gradient
from .combine import combine_pairs_kernel, combine_target_kernel
from .configuration import Configuration, configure
from .consistency import consistency_rows, queue_read_gradient
from .launch import launch, pad_columns, pad_features, splits_at_once
from .nearest import nearest
from .read import Partials, read_banks, read_labeled

__all__ = [
    "bank_cross_entropy_rows",
    "bank_gradient",
    "consistency_rows",
    "info_nce_rows",
    "mean_shift_rows",
    "mixco_rows",
    "nearest",
    "nt_xent_rows",
    "queue_read",
    "queue_read_gradient",
    "soft_cross_entropy_rows",
    "sup_con_rows",
    "unicon_rows",
    "unmix_rows",
]


@pad_columns
def info_nce_rows(query: Tensor, key: Tensor, queue: Tensor, temperature: float, return_accuracy: bool) -> Rows:
    """InfoNCE; arguments as in `fastssl_kernels.info_nce`."""
    negatives = read_banks(query, queue, temperature=temperature, accuracy=return_accuracy)
    return _combine_pairs(query, key, negatives, temperature, accuracy=return_accuracy)


@pad_columns
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
    negatives, positives = read_labeled(
        query, queue, query_labels, queue_labels, temperature, pairs=True, accuracy=return_accuracy
    )
    return _combine_pairs(query, key, negatives, temperature, positives=positives, accuracy=return_accuracy)


@pad_columns
def unmix_rows(
    query: Tensor, first_key: Tensor, second_key: Tensor, queue: Tensor, weight: Tensor, temperature: float
) -> Rows:
    """Un-Mix; arguments as in `fastssl_kernels.unmix`."""
    negatives = read_banks(query, queue, temperature=temperature)
    return _combine_pairs(query, first_key, negatives, temperature, mixed=(second_key, weight))


@pad_columns
def sup_con_rows(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    return_accuracy: bool,
) -> Rows:
    """SupCon; arguments as in `fastssl_kernels.sup_con`."""
    entries, positives = read_labeled(
        query, queue, query_labels, queue_labels, temperature, pairs=False, accuracy=return_accuracy
    )
    loss, gradient, _, _, accuracy = _combine_target(
        query, entries, temperature, "positives", key=key, positives=positives, accuracy=return_accuracy
    )
    return Rows(loss, gradient, accuracy)


@pad_columns
def soft_cross_entropy_rows(
    query: Tensor, teacher: Tensor, queue: Tensor, temperature: float, teacher_temperature: float
) -> Rows:
    """Soft cross-entropy; `teacher` [T, N, C], other arguments as in `fastssl_kernels.soft_cross_entropy`."""
    entries = read_banks(
        query,
        queue,
        temperature=temperature,
        teacher=teacher.flatten(0, 1),
        teacher_temperature=teacher_temperature,
    )
    loss, gradient, _, _, accuracy = _combine_target(query, entries, temperature, "teachers", targets=len(teacher))
    return Rows(loss, gradient, accuracy)


@pad_columns
def mixco_rows(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    temperature: float,
) -> Rows:
    """MixCo; arguments as in `fastssl_kernels.mixco`."""
    entries = read_banks(query, keys, queue, temperature=temperature)
    targets = (keys, torch.stack([first, second]), torch.stack([weight, 1 - weight]))
    loss, gradient, _, _, accuracy = _combine_target(
        query, entries, temperature, "entries", targets=2, entries_of=targets
    )
    return Rows(loss, gradient, accuracy)


@pad_columns
def bank_cross_entropy_rows(
    prediction: Tensor, bank: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient to the prediction, LSE; `target` [T, N]."""
    entries = read_banks(prediction, bank, temperature=temperature)
    label_weight = torch.full(target.shape, 1 / len(target), dtype=torch.float32, device=target.device)
    loss, gradient, lse, _, _ = _combine_target(
        prediction, entries, temperature, "entries", targets=len(target), entries_of=(bank, target, label_weight)
    )
    return loss, gradient, lse


@pad_columns
def nt_xent_rows(rows: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, each row's own part of the gradient, LSE, 1 / positives; `labels` has no -1."""
    entries, positives = read_labeled(rows, rows, labels, labels, temperature, pairs=False, skip_own=True)
    loss, gradient, lse, label_weight, _ = _combine_target(rows, entries, temperature, "positives", positives=positives)
    return loss, gradient, lse, label_weight


def mean_shift_rows(query: Tensor, key: Tensor, queue: Tensor, k: int) -> Rows:
    """Mean shift; arguments as in `fastssl_kernels.mean_shift`."""
    query = query.float()
    mean = queue[nearest(key, queue, k)].float().mean(1)
    # A non-finite key has no nearest entries
    mean.masked_fill_(~key.isfinite().all(1, keepdim=True), torch.nan)
    return Rows(2 - 2 * (query * mean).sum(1), -2 * mean, query.new_empty(0))


@pad_columns
def queue_read(query: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """LSE and mean; arguments as in `fastssl_kernels.queue_read`."""
    entries = read_banks(query, bank, temperature=temperature)
    # Without a target the closed form is the LSE and its gradient, mean / temperature
    _, gradient, lse, _, _ = _combine_target(query, entries, temperature, "none")
    return lse, gradient * temperature


def _combine_pairs(
    query: Tensor,
    key: Tensor,
    negatives: Partials,
    temperature: float,
    *,
    positives: Partials | None = None,
    mixed: tuple[Tensor, Tensor] | None = None,
    accuracy: bool = False,
) -> Rows:
    query, key = query.contiguous(), key.contiguous()
    second_key, weight = mixed or (key, negatives.lse)
    rows, features = query.shape
    out = Rows(*_empty_rows(query), negatives.lse.new_empty(rows if accuracy else 0))
    launch(
        combine_pairs_kernel, (rows,),
        query, key, second_key.contiguous(), weight.contiguous(),
        negatives.lse, negatives.mean, *(positives or negatives)[:2], negatives.largest, *out,
        LOG2_E / temperature, 1 / temperature, rows, features, len(negatives.lse),
        LABELED=positives is not None, MIXED=mixed is not None, ACCURACY=accuracy,
        **_combine_constants(negatives, features),
    )  # fmt: skip
    return out


def _combine_target(
    query: Tensor,
    entries: Partials,
    temperature: float,
    target: str,
    *,
    targets: int = 1,
    key: Tensor | None = None,
    positives: Partials | None = None,
    entries_of: tuple[Tensor, Tensor, Tensor] | None = None,
    accuracy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradient, natural LSE, 1 / positives and accuracy; the last two empty unless requested."""
    query = query.contiguous()
    rows, features = query.shape
    bank, index, weight = entries_of or (query, entries.lse, entries.lse)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    loss, gradient = _empty_rows(query)
    lse, label_weight, hits = empty(rows), empty(rows if positives else 0), empty(rows if accuracy else 0)
    launch(
        combine_target_kernel, (rows,),
        query, query if key is None else key.contiguous(),
        bank.contiguous(), index.contiguous(), weight.contiguous(),
        entries.lse, entries.mean, *(positives or entries)[:2], entries.largest,
        loss, gradient, lse, label_weight, hits,
        LOG2_E / temperature, 1 / temperature, rows, len(bank), features, len(entries.lse), targets,
        TARGET=target, OWN=key is not None, ACCURACY=accuracy,
        **_combine_constants(entries, features),
    )  # fmt: skip
    return loss, gradient, lse, label_weight, hits


def _combine_constants(partials: Partials, features: int) -> dict[str, Any]:
    return {"SPLITS": splits_at_once(len(partials.lse), features), "FEATURES": pad_features(features)}


def _empty_rows(query: Tensor) -> tuple[Tensor, Tensor]:
    empty = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    return empty(len(query)), empty(query.shape)


def configurations() -> Iterator[Configuration]:
    """Configurations to compile: the most splits and features at once, with every option on."""
    common = {"SPLITS": splits_at_once(64, 512), "FEATURES": 512, "ACCURACY": True}
    yield configure(combine_pairs_kernel, torch.float32, common | {"LABELED": True, "MIXED": True})
    for target in ("teachers", "entries", "positives"):
        yield configure(combine_target_kernel, torch.float32, common | {"TARGET": target, "OWN": True})
