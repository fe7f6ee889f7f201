"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., arXiv 1805.01978)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.evaluate.accuracy import Accuracy, count_hits, percent
from fastssl.evaluate.features import extract_features
from fastssl_pipelines.executor import Executor
from fastssl_pipelines.views import ViewSpec


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
    """Accuracy of the test images by their nearest training images, cosine similarity, all labels in the bank."""
    bank, queries = (extract_features(encoder, executor, view, dtype=dtype) for executor in (train, test))
    return knn_accuracy(
        normalize(bank.rows, dim=1),
        bank.labels,
        normalize(queries.rows, dim=1),
        queries.labels,
        k=k,
        temperature=temperature,
    )


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
) -> Accuracy:
    """Accuracy of a vote of the k nearest bank rows, each weighted by exp(similarity / temperature).

    `bank` [n, F] and `queries` [m, F] are unit rows. Rows with label -1 neither vote nor count.
    The top five are the classes with most votes; a class without any is not among them, and of fewer than five
    classes all that have votes are.
    """
    bank, bank_labels = bank[bank_labels >= 0], bank_labels[bank_labels >= 0]
    queries, query_labels = queries[query_labels >= 0], query_labels[query_labels >= 0]
    if not len(bank) or not len(queries):
        raise ValueError(f"kNN got {len(bank)} labelled bank rows and {len(queries)} labelled queries; both need some")
    classes = int(bank_labels.max()) + 1
    hits = torch.zeros(2, dtype=torch.int64, device=bank.device)
    for rows, truth in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        similarity, index = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        # the largest weight is 1, so that no temperature overflows
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), classes, device=rows.device).scatter_add_(1, bank_labels[index], weight)
        hits += count_hits(votes.log(), truth)  # log(0) = -inf: no vote, no hit
    return percent(hits, len(queries))
