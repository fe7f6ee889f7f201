from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from fastssl.benchmark.harness import peak_bytes
from fastssl.evaluate import knn
from fastssl.evaluate.features import extract_features
from fastssl.evaluate.knn import knn_accuracy, knn_of_encoder
from fastssl_pipelines.executors.base import build_executor
from fastssl_pipelines.sources.base import ArraySource, Subset
from fastssl_pipelines.views import ViewSpec

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def by_definition(bank, bank_labels, queries, query_labels, k, temperature):
    """Wu et al.: each of the k nearest adds exp(similarity / temperature) to its class."""
    first, among_five = 0, 0
    for query, truth in zip(queries, query_labels, strict=True):
        similarity = [float(query @ row) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            label = int(bank_labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp(similarity[i] / temperature)
        ranked = sorted(votes, key=votes.__getitem__, reverse=True)
        first += int(truth) == ranked[0]
        among_five += int(truth) in ranked[:5]
    return 100 * first / len(queries), 100 * among_five / len(queries)


@pytest.mark.parametrize(("k", "temperature", "chunk"), [(1, 0.1, 3), (7, 0.1, 64), (500, 0.5, 1)])
def test_knn_equals_its_definition(k, temperature, chunk, monkeypatch):
    monkeypatch.setattr(knn, "_SIMILARITIES", 120 * chunk)
    generator = torch.Generator().manual_seed(3)
    centers = torch.randn(9, 16, generator=generator)
    labels = torch.arange(180) % 9
    rows = normalize(centers[labels] + 2.0 * torch.randn(180, 16, generator=generator), dim=1)
    bank, queries = rows[:120], rows[120:]
    got = knn_accuracy(bank, labels[:120], queries, labels[120:], k=k, temperature=temperature)
    assert got == pytest.approx(by_definition(bank, labels[:120], queries, labels[120:], k, temperature))
    assert 20 < got.top1 <= got.top5 < 100  # Neither chance nor trivial, so that a wrong vote shows


def test_top5_by_hand():
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    bank = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([6, 5, 4, 3, 2, 1, 0])
    query = torch.tensor([[1.0, 0.0]])
    accuracies = {
        truth: knn_accuracy(bank, labels, query, torch.tensor([truth]), k=7, temperature=0.1) for truth in range(7)
    }
    assert [accuracies[truth].top1 for truth in range(7)] == [0, 0, 0, 0, 0, 0, 100]
    assert [accuracies[truth].top5 for truth in range(7)] == [0, 0, 100, 100, 100, 100, 100]


def test_of_fewer_than_five_classes_the_top_five_are_those_with_votes():
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    query, truth = torch.tensor([[0.9, 0.4, 0.1]]), torch.tensor([2])
    assert knn_accuracy(bank, labels, query, truth, k=3, temperature=1.0) == (0, 100)
    assert knn_accuracy(bank, labels, query, truth, k=2, temperature=1.0) == (0, 0)


def test_rows_without_a_label_neither_vote_nor_count():
    bank = torch.eye(3)
    labels = torch.tensor([-1, 1, 2])
    queries, truth = torch.eye(3)[:2], torch.tensor([-1, 1])
    assert knn_accuracy(bank, labels, queries, truth, k=1, temperature=0.1) == (100, 100)
    with pytest.raises(ValueError, match="0 labeled bank rows"):
        knn_accuracy(bank, torch.full((3,), -1), queries, truth, k=1, temperature=0.1)


def test_the_norm_of_features_does_not_matter():
    """Cosine similarity: features of very different norms vote by their directions."""

    class Stretched(nn.Module):
        def forward(self, images):
            return images.flatten(1) * (30 * images[:, :1, 0, 0].abs())

    pixels = np.random.default_rng(0).integers(0, 256, (240, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(240) % 3
    pixels[np.arange(240), labels] = pixels[np.arange(240), labels] // 4 * 3  # One darker row of pixels per class
    bank, queries = (
        build_executor("resident", ArraySource("rows", pixels[part], labels[part], ("0", "1", "2")), mean=MEAN, std=STD)
        for part in (slice(0, 180), slice(180, 240))
    )
    view = ViewSpec(size=4, center_crop=1.0)
    got = knn_of_encoder(Stretched(), bank, queries, view, k=60, temperature=0.1, dtype=torch.float32)

    def vote(bank_directions, query_directions):
        (rows, labels), (query, truth) = (
            extract_features(Stretched(), each, view, dtype=torch.float32) for each in (bank, queries)
        )
        rows = normalize(rows, dim=1) if bank_directions else rows
        query = normalize(query, dim=1) if query_directions else query
        return knn_accuracy(rows, labels, query, truth, k=60, temperature=0.1)

    assert got == vote(True, True)
    assert got != vote(False, True)
    assert got != vote(True, False)
    assert 34 < got.top1 < 100


def test_features_are_in_memory_once(monkeypatch):
    """ImageNet's features take 10 GB; three copies and the similarities of many queries once filled a GPU."""
    monkeypatch.setattr(knn, "_SIMILARITIES", 2**16)
    count, features = 8192, 1024

    class Wide(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :1] * torch.linspace(-1, 1, features)

    pixels = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    source = ArraySource("rows", pixels, np.arange(count) % 3, ("0", "1", "2"))
    bank, queries = (build_executor("resident", each, mean=MEAN, std=STD) for each in (source, Subset(source, [0, 1])))
    view = ViewSpec(size=2, center_crop=1.0)

    def run():
        knn_of_encoder(Wide(), bank, queries, view, k=5, temperature=0.1, dtype=torch.float32)

    assert peak_bytes(run, torch.device("cpu")) < 1.5 * count * features * 4
