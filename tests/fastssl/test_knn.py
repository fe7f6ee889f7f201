from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from fastssl.evaluate.knn import extract_features, knn_accuracy
from fastssl_pipelines.batch import Batch


def by_definition(bank, bank_labels, queries, query_labels, k, temperature):
    """Wu et al.: every one of the k nearest adds exp(similarity / temperature) to its class."""
    right = 0
    for query, truth in zip(queries, query_labels, strict=True):
        similarity = [float(query @ row) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            label = int(bank_labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp(similarity[i] / temperature)
        right += max(votes, key=votes.__getitem__) == int(truth)
    return 100 * right / len(queries)


@pytest.mark.parametrize(("k", "temperature", "chunk"), [(1, 0.1, 3), (7, 0.1, 64), (500, 0.5, 1)])
def test_knn_equals_its_definition(k, temperature, chunk):
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(5, 16, generator=generator)
    labels = torch.arange(80) % 5
    rows = normalize(centres[labels] + 2.0 * torch.randn(80, 16, generator=generator), dim=1)
    bank, queries = rows[:60], rows[60:]
    got = knn_accuracy(bank, labels[:60], queries, labels[60:], k=k, temperature=temperature, chunk=chunk)
    assert got == pytest.approx(by_definition(bank, labels[:60], queries, labels[60:], k, temperature))
    assert 20 < got < 100  # neither chance nor trivial, so that a wrong vote shows


def test_rows_without_a_label_neither_vote_nor_count():
    bank = torch.eye(3)
    labels = torch.tensor([-1, 1, 2])
    queries, truth = torch.eye(3)[:2], torch.tensor([-1, 1])
    assert knn_accuracy(bank, labels, queries, truth, k=1, temperature=0.1) == 100
    with pytest.raises(ValueError, match="0 labelled bank rows"):
        knn_accuracy(bank, torch.full((3,), -1), queries, truth, k=1, temperature=0.1)


def test_features_are_unit_rows_from_eval_mode_and_the_mode_comes_back():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = encoder[1].running_mean.clone()
    batches = [
        Batch(views=(torch.randn(4, 3, 8, 8),), labels=torch.arange(4), ids=torch.arange(4), step=i) for i in range(2)
    ]
    features, labels = extract_features(encoder, batches, dtype=torch.float32)
    assert features.shape == (8, 4)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(8))
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert torch.equal(encoder[1].running_mean, before)
    assert encoder.training
