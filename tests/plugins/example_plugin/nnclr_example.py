"""An example plug-in: a method like NNCLR, an encoder and a preset. Copy this folder to start your own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from fastssl.distributed import gather_rows, gather_rows_with_gradient, rank
from fastssl.errors import ConfigError
from fastssl.methods import Method, MethodConfig, MethodOutput, TrainProgress, register_method
from fastssl.methods.shared_options import QueueConfig
from fastssl.models.encoders import Encoder, register_encoder
from fastssl.models.heads import MLPBatchNormHead, ProjectionHead
from fastssl.models.norm import NormLayer
from fastssl.presets import preset
from fastssl.validation import Rows, Temperature, Width
from fastssl_kernels import bank_cross_entropy, nearest_entry
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.views import ViewSpec


@dataclass(frozen=True, kw_only=True)
class NNCLRConfig(QueueConfig):
    """Options of NNCLR."""

    name: ClassVar[str] = "nnclr-example"
    paper: ClassVar[str] = "arXiv 2104.14548"
    whole_batch: ClassVar[bool] = True

    temperature: Temperature = 0.1
    queue_size: Rows = 98304
    hidden_dim: Width = 2048
    """Hidden width of projector and predictor."""


@register_method
class NNCLR(Method):
    """InfoNCE of the nearest queue entry of one view against the predictions of the other view, in both directions.

    The negatives are the predictions of the other images in the batch, on all ranks. There is no momentum encoder; the
    queue holds projections of the first view.
    """

    Config: ClassVar[type[MethodConfig]] = NNCLRConfig
    number_of_views = 2
    small_options: ClassVar = {"hidden_dim": 32}

    def __init__(
        self,
        encoder: Encoder,
        config: NNCLRConfig,
        views: tuple[ViewSpec, ...],
        bank_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(encoder, config, views, bank_dtype)
        self.config = config
        self.query_encoder = nn.Sequential(encoder, ProjectionHead(encoder.feature_dim, config.hidden_dim, config.dim))
        self.predictor = MLPBatchNormHead(config.dim, config.hidden_dim, config.dim)
        self.queue = config.new_queue(bank_dtype)

    def forward(self, batch: Batch) -> MethodOutput:
        first, second = (self.query_encoder(view) for view in batch.views)
        loss = (self._loss(first, self.predictor(second)) + self._loss(second, self.predictor(first))) / 2
        return MethodOutput(loss, {}, (batch.labels, normalize(first.detach().float(), dim=1)))

    def _loss(self, projection: Tensor, prediction: Tensor) -> Tensor:
        rows = normalize(projection.detach().float(), dim=1)
        nearest = self.queue.keys[nearest_entry(rows, self.queue.keys)].float()
        bank = gather_rows_with_gradient(normalize(prediction.float(), dim=1))
        target = rank() * len(rows) + torch.arange(len(rows), device=rows.device)
        return bank_cross_entropy(nearest, bank, target, temperature=self.config.temperature)

    @torch.no_grad()
    def after_step(self, output: MethodOutput, progress: TrainProgress) -> None:
        labels, keys = output.updates
        self.queue.enqueue(self.gather_keys(keys), gather_rows(labels), progress.step)

    def encoder(self) -> nn.Module:
        return self.query_encoder[0]


@register_encoder("tiny-cnn")
class TinyCNN(Encoder):
    """Three convolutions, for small images and quick tests."""

    def __init__(self, *, width: float, stem: str, norm_layer: NormLayer) -> None:
        super().__init__()
        if stem != "imagenet":
            raise ConfigError(f"--model.stem {stem} was given with tiny-cnn, which has one stem: drop the option")
        widths = [max(1, round(width * channels)) for channels in (16, 32, 64)]
        self.layers = nn.Sequential()
        for before, after in zip([3, *widths], widths, strict=False):
            self.layers.extend(
                [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), norm_layer(after), nn.ReLU()]
            )
        self.feature_dim = widths[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean((2, 3))


# A loss of a plug-in goes here, registered by `fastssl_kernels.register_loss`.


@preset(
    "nnclr-example",
    data="embedded pictures",
    source="tests/plugins/example_plugin",
    published="none",
    differs="made to show a plug-in, not to learn well",
)
def nnclr_example() -> Config:
    view = ViewSpec(size=32, scale=(0.5, 1.0))
    return Config(
        method=NNCLRConfig(queue_size=512, hidden_dim=64, dim=32),
        data=DataConfig(pictures=600, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        model=ModelConfig(encoder="tiny-cnn", norm="local"),
        optim=OptimConfig(lr=0.1),
        train=TrainConfig(epochs=2, batch_size=64),
        eval=EvalConfig(every_epochs=2),
        views=(view, view),
        eval_view=ViewSpec(size=32, center_crop=1.0),
    )
