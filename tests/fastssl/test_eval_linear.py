"""The linear probe: compared with plain torch, on features with a known answer, and how its rate is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastssl.errors import ConfigError, TrainingError
from fastssl.evaluate.accuracy import count_hits
from fastssl.evaluate.features import Features
from fastssl.evaluate.linear import RATES, Recipe, held_out, train_classifiers, train_probe


def blobs(count, *, classes=7, width=12, spread=1.0, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return Features(scale * (centers[labels] + spread * torch.randn(count, width, generator=generator)), labels)


def in_plain_torch(features, rate, classes, recipe):
    """One classifier with autograd and torch's SGD, on the same batches."""
    layer = nn.Linear(features.rows.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(recipe.seed)
    steps, step = math.ceil(len(features.labels) / recipe.batch_size) * recipe.epochs, 0
    for epoch in range(recipe.epochs):
        for batch in torch.randperm(len(features.labels), generator=generator).split(recipe.batch_size):
            if recipe.schedule == "cosine":
                factor = (1 + math.cos(math.pi * step / steps)) / 2
            else:
                factor = 0.1 ** ((epoch >= 0.6 * recipe.epochs) + (epoch >= 0.8 * recipe.epochs))
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
            cross_entropy(layer(features.rows[batch]), features.labels[batch]).backward()
            optimizer.step()
            step += 1
    return layer.weight.detach(), layer.bias.detach()


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_parallel_rates_equal_separate_runs_in_plain_torch(schedule):
    features, rates = blobs(90), (0.01, 0.1, 0.7)
    recipe = Recipe(epochs=10, batch_size=32, schedule=schedule, seed=5)
    classifiers = train_classifiers(features, rates, 7, recipe)
    for weight, bias, rate in zip(*classifiers, rates, strict=True):
        expected_weight, expected_bias = in_plain_torch(features, rate, 7, recipe)
        torch.testing.assert_close(weight, expected_weight, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias, expected_bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_separable_features_are_classified_at_any_scale(scale):
    probe = train_probe(blobs(350, spread=0.2, scale=scale), RATES, Recipe(epochs=20, batch_size=64))
    assert probe.test(blobs(700, spread=0.2, scale=scale, seed=1)) == (100, 100)
    assert probe.lr in RATES
    assert list(probe.held_out_top1) == sorted(RATES)
    assert probe.scale == pytest.approx(scale * float(blobs(350, spread=0.2).rows.norm(dim=1).mean()))


def test_random_labels_give_chance_accuracy():
    """Of 7000 test images a seventh is hit, within five standard deviations of sqrt(1/7 * 6/7 / 7000) = 0.42 %."""
    generator = torch.Generator().manual_seed(0)
    train, test = (
        Features(torch.randn(n, 12, generator=generator), torch.randint(7, (n,), generator=generator))
        for n in (700, 7000)
    )
    accuracy = train_probe(train, (0.1, 1.0), Recipe(epochs=5)).test(test)
    assert abs(accuracy.top1 - 100 / 7) < 5 * 0.42
    assert abs(accuracy.top5 - 500 / 7) < 5 * 0.54


def test_the_rate_is_chosen_on_held_out_images_and_then_trains_on_all():
    features, recipe, rates = blobs(210, spread=2.0), Recipe(epochs=8, batch_size=32, seed=3), (0.001, 0.03, 1.0, 30.0)
    probe = train_probe(features, rates, recipe)
    scaled = Features(features.rows / probe.scale, features.labels)
    held = held_out(features.labels)
    kept = Features(scaled.rows[~held], scaled.labels[~held])
    expected = {}
    for rate in rates:
        weight, bias = in_plain_torch(kept, rate, 7, recipe)
        guess = (scaled.rows[held] @ weight.T + bias).argmax(1)
        expected[rate] = 100 * float((guess == scaled.labels[held]).double().mean())
    assert probe.held_out_top1 == pytest.approx(expected)
    assert len(set(expected.values())) > 1
    assert probe.lr == max(expected, key=expected.__getitem__)
    weight, bias = in_plain_torch(scaled, probe.lr, 7, recipe)
    torch.testing.assert_close(probe.classifiers.weight[0], weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probe.classifiers.bias[0], bias, rtol=1e-5, atol=1e-5)
    test = blobs(500, spread=2.0, seed=1)
    guess = (test.rows / probe.scale @ weight.T + bias).argmax(1)
    assert probe.test(test).top1 == pytest.approx(100 * float((guess == test.labels).double().mean()))


def test_a_single_rate_needs_no_choice():
    probe = train_probe(blobs(20), (0.5,), Recipe(epochs=2))
    assert probe.lr == 0.5
    assert probe.held_out_top1 == {}


def test_of_equally_good_rates_the_lowest_is_taken():
    probe = train_probe(blobs(140, spread=0.01), (3.0, 1.0, 1.0, 10.0), Recipe(epochs=20))
    assert probe.held_out_top1 == {1.0: 100, 3.0: 100, 10.0: 100}
    assert probe.lr == 1.0


def test_every_tenth_image_of_each_class_is_held_out():
    labels = torch.arange(300) % 3
    held = held_out(labels)
    assert torch.bincount(labels[held]).tolist() == [10, 10, 10]
    assert held.nonzero().flatten()[:3].tolist() == [27, 28, 29]
    assert held_out(torch.tensor([0, 0, 1])).tolist() == [False, False, True]
    with pytest.raises(ConfigError, match="at least 2"):
        held_out(torch.tensor([0]))


def test_results_depend_only_on_the_seed():
    features = blobs(100)
    first, again, other = (
        train_classifiers(features, (0.1, 1.0), 7, Recipe(epochs=3, batch_size=16, seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_a_diverging_rate_is_not_chosen_and_is_an_error_alone():
    features = blobs(100, spread=3.0)
    probe = train_probe(features, (0.1, 1e38), Recipe(epochs=5, batch_size=10))
    assert probe.lr == 0.1
    assert probe.held_out_top1[1e38] == 0
    with pytest.raises(TrainingError, match="--lr"):
        train_probe(features, (1e38,), Recipe(epochs=5, batch_size=10))


def test_hits_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.4, 0.3, 0.2, 0.0], [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    assert count_hits(scores, torch.tensor([1, 0])).tolist() == [2, 2]
    assert count_hits(scores, torch.tensor([5, 4])).tolist() == [0, 2]
    assert count_hits(scores, torch.tensor([0, 5])).tolist() == [0, 0]
    assert count_hits(scores, torch.tensor([9, 9])).tolist() == [0, 0]
    assert count_hits(scores[:, :3], torch.tensor([2, 2])).tolist() == [0, 2]
    assert count_hits(torch.full((2, 7), math.nan), torch.tensor([0, 1])).tolist() == [0, 0]
    both = count_hits(torch.stack([scores, -scores]), torch.tensor([1, 0]))
    assert both.tolist() == [[2, 0], [2, 0]]
