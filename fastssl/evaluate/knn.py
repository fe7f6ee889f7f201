"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., arXiv 1805.01978)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl_pipelines.batch import Batch


@torch.no_grad()
def extract_features(encoder: nn.Module, batches: Iterable[Batch], *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit features [n, F] fp32 and labels [n] of the first view of every batch, with batch norm in eval mode."""
    was_training = encoder.training
    encoder.eval()
    features, labels = [], []
    for batch in batches:
        with torch.autocast(batch.labels.device.type, dtype, enabled=dtype != torch.float32):
            rows = encoder(batch.views[0])
        features.append(normalize(rows.float().flatten(1), dim=1))
        labels.append(batch.labels)
    encoder.train(was_training)
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int,
    temperature: float,
    chunk: int = 1024,
) -> float:
    """Top-1 accuracy in percent of a vote of the k nearest bank rows, each weighted by exp(similarity / temperature).

    `bank` [n, F] and `queries` [m, F] are unit rows. Rows with label -1 neither vote nor count.
    """
    bank, bank_labels = bank[bank_labels >= 0], bank_labels[bank_labels >= 0]
    queries, query_labels = queries[query_labels >= 0], query_labels[query_labels >= 0]
    if not len(bank) or not len(queries):
        raise ValueError(f"kNN got {len(bank)} labelled bank rows and {len(queries)} labelled queries; both need some")
    classes = int(bank_labels.max()) + 1
    right = 0
    for rows, truth in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        similarity, index = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        # the largest weight is 1, so that no temperature overflows
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), classes, device=rows.device).scatter_add_(1, bank_labels[index], weight)
        right += int((votes.argmax(1) == truth).sum())
    return 100 * right / len(queries)
