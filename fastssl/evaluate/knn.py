"""Weighted k-nearest-neighbor classification of frozen features (Wu et al., arXiv 1805.01978)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.evaluate.accuracy import Accuracy, count_hits, percent
from fastssl.evaluate.features import extract_features
from fastssl_pipelines.executors.base import Executor
from fastssl_pipelines.views import ViewSpec

_QUERIES = 1024  # Per chunk
_SIMILARITIES = 2**28  # Per chunk: 1 GiB, as 1024 queries against all of ImageNet would take 5 GiB


def knn_of_encoder(
    encoder: nn.Module,
    train: Executor,
    test: Executor,
    view: ViewSpec,
    *,
    k: int,
    temperature: float,
    dtype: torch.dtype,
) -> Accuracy:
    """kNN accuracy on the test images by cosine similarity to all labeled training images."""
    bank, queries = (extract_features(encoder, executor, view, dtype=dtype) for executor in (train, test))
    for rows in (bank.rows, queries.rows):
        normalize(rows, dim=1, out=rows)
    return knn_accuracy(bank.rows, bank.labels, queries.rows, queries.labels, k=k, temperature=temperature)


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int,
    temperature: float,
) -> Accuracy:
    """Accuracy of a vote of the k nearest bank rows, each weighted by exp(similarity / temperature).

    `bank` [n, F] and `queries` [m, F] have rows of norm 1. Rows with label -1 neither vote nor count. The top five are
    the classes with the most votes; a class without votes is never among them.
    """
    (bank, bank_labels), (queries, query_labels) = _labeled(bank, bank_labels), _labeled(queries, query_labels)
    if not len(bank) or not len(queries):
        raise ValueError(f"kNN got {len(bank)} labeled bank rows and {len(queries)} labeled queries; both need some")
    classes = int(bank_labels.max()) + 1
    hits = torch.zeros(2, dtype=torch.int64, device=bank.device)
    chunk = min(_QUERIES, max(1, _SIMILARITIES // len(bank)))
    for rows, truth in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        similarity, index = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        # The largest weight is 1, so no temperature overflows
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), classes, device=rows.device).scatter_add_(1, bank_labels[index], weight)
        hits += count_hits(votes.log(), truth)  # log(0) = -inf: no vote, no hit
    return percent(hits, len(queries))


def _labeled(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with a label; no copy if all have one."""
    known = labels >= 0
    return (rows, labels) if known.all() else (rows[known], labels[known])
