"""An evaluation uses every labeled image of a source, in order, and no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.evaluate.features import evaluation_plan, extract_features
from fastssl.evaluate.online import OnlineKNN
from fastssl.presets import load
from fastssl_pipelines.executors.base import build_executor
from fastssl_pipelines.sources.base import ArraySource
from fastssl_pipelines.views import ViewSpec

VIEW = ViewSpec(size=8, center_crop=1.0)
CLASSES = ("a", "b", "c")


def random_source(labels):
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    return ArraySource("random", images, np.array(labels), CLASSES)


def executor_of(source):
    return build_executor("resident", source, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class CountingEncoder(nn.Module):
    """Returns the pixels and counts the images."""

    seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images


def test_the_unlabeled_tail_is_not_encoded():
    source = random_source([0, 1, 2] * 100 + [-1] * 500)
    encoder = CountingEncoder()
    features = extract_features(encoder, executor_of(source), VIEW, dtype=torch.float32)
    assert encoder.seen == 300
    assert features.labels.tolist() == [0, 1, 2] * 100
    pixels = torch.from_numpy(np.stack([source.pixels(i) for i in range(300)])).permute(0, 3, 1, 2)
    torch.testing.assert_close(features.rows, ((pixels / 255 - 0.5) / 0.25).flatten(1))
    assert evaluation_plan(source, VIEW).num_samples == 300


def test_the_knn_of_a_run_does_not_encode_the_unlabeled_tail():
    train, test = random_source([0, 1, 2] * 10 + [-1] * 50), random_source([0, 1, 2])
    encoder = CountingEncoder()
    knn = OnlineKNN(load("quickstart"), executor_of(train), executor_of(test), dtype=torch.float32)
    assert 0 <= knn.top1(encoder) <= 100
    assert encoder.seen == 33


def test_an_unlabeled_image_between_labeled_ones_is_left_out():
    features = extract_features(
        CountingEncoder(), executor_of(random_source([0, -1, 2, -1])), VIEW, dtype=torch.float32
    )
    assert features.labels.tolist() == [0, 2]
    assert features.rows.shape == (2, 3 * 8 * 8)


def test_a_source_without_labels_is_refused():
    with pytest.raises(ValueError, match="no labeled image"):
        extract_features(CountingEncoder(), executor_of(random_source([-1, -1])), VIEW, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_float32_from_eval_mode_and_the_mode_is_restored(dtype):
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = encoder[1].running_mean.clone()
    features = extract_features(encoder, executor_of(random_source([0, 1] * 4)), VIEW, dtype=dtype)
    assert features.rows.shape == (8, 4)
    assert features.rows.dtype == torch.float32
    assert not features.rows.requires_grad
    assert torch.equal(encoder[1].running_mean, before)
    assert encoder.training
