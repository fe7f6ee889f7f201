"""The preset that needs no data."""

from __future__ import annotations

from fastssl.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from fastssl.methods.unimoco import UniMoCoConfig
from fastssl.presets.registry import preset
from fastssl_pipelines.views import ViewSpec


@preset(
    "quickstart",
    data="embedded pictures",
    source="ours",
    published="none",
    differs="UniMoCo with a tenth of the labels, made to train in minutes on a CPU",
)
def quickstart() -> Config:
    """Minutes on two CPU cores, no download: UniMoCo with a tenth of the labels.

    Batch norm in the head and a warm-up get a run of a thousand steps out of its initial collapse.
    """
    view = ViewSpec(size=32, scale=(0.5, 1.0))
    return Config(
        method=UniMoCoConfig(temperature=0.1, queue_size=512, momentum=0.98, head="mlp-bn"),
        data=DataConfig(pictures=6000, label_fraction=0.1, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        model=ModelConfig(encoder="resnet18", width=0.25, stem="small-pool", norm="local"),
        optim=OptimConfig(lr=0.12, weight_decay=5e-4, schedule="cosine", warmup_epochs=3),
        train=TrainConfig(epochs=24, batch_size=128),
        eval=EvalConfig(every_epochs=6),
        views=(view, view),
        eval_view=ViewSpec(size=32, center_crop=1.0),
    )
