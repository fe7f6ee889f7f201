"""kNN accuracy of an encoder on the splits of a run, before, during and after training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fastssl.config import Config
from fastssl.evaluate.knn import knn_of_encoder
from fastssl_pipelines.executors.base import Executor
from fastssl_pipelines.sources.base import Source
from fastssl_pipelines.views import ViewSpec

RAW_PIXELS_SIDE = 32  # Raw pixels are compared at this size, 3072 values per image


def number_of_classes(source: Source) -> int:
    """The number of classes among the known labels."""
    return len(np.unique(source.labels[source.labels >= 0]))


class OnlineKNN:
    """Classifies the test images by their nearest training images, using every training label."""

    def __init__(self, config: Config, train: Executor, test: Executor, *, dtype: torch.dtype):
        self.config, self.train, self.test, self.dtype = config, train, test, dtype

    @property
    def possible(self) -> bool:
        """Whether there are test labels, and training labels of at least two classes."""
        return number_of_classes(self.train.source) >= 2 and number_of_classes(self.test.source) >= 1

    def top1(self, encoder: nn.Module) -> float:
        """Top-1 accuracy of the encoder's features, in percent."""
        return self._top1(encoder, self.config.eval_view, self.dtype)

    def raw_pixels_top1(self) -> float:
        """Top-1 accuracy of the normalized pixels themselves, in percent."""
        side = min(RAW_PIXELS_SIDE, self.config.eval_view.size)
        return self._top1(nn.Flatten(), replace(self.config.eval_view, size=side), torch.float32)

    def _top1(self, encoder: nn.Module, view: ViewSpec, dtype: torch.dtype) -> float:
        k, temperature = self.config.eval.k, self.config.eval.temperature
        return knn_of_encoder(encoder, self.train, self.test, view, k=k, temperature=temperature, dtype=dtype).top1
