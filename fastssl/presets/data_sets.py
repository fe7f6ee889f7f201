"""Data sets and views that recipes share, and a configuration built from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastssl.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from fastssl.methods import MethodConfig
from fastssl_pipelines.views import ViewSpec


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What recipes need of a data set: view size in pixels, normalization, encoder and evaluation view."""

    size: int
    data: DataConfig
    encoder: ModelConfig
    eval_view: ViewSpec
    checkpoint_every: int = 200


_SMALL = ModelConfig(encoder="resnet18", stem="small")
_SMALL_POOL = ModelConfig(encoder="resnet18", stem="small-pool")

# Normalization as in MSVQ's dataset/data.py; ImageNet's is the default of DataConfig. STL-10 is evaluated at its native
# 96 pixels, as there.
IMAGENET = DataSet(
    size=224,
    data=DataConfig(),
    encoder=ModelConfig(),
    eval_view=ViewSpec(size=224, center_crop=0.875),
    checkpoint_every=1000,
)
CIFAR10 = DataSet(
    size=32,
    data=DataConfig(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    encoder=_SMALL,
    eval_view=ViewSpec(size=32, center_crop=1.0),
)
CIFAR100 = DataSet(
    size=32,
    data=DataConfig(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
    encoder=_SMALL,
    eval_view=ViewSpec(size=32, center_crop=1.0),
)
STL10 = DataSet(
    size=64,
    data=DataConfig(mean=(0.4408, 0.4279, 0.3867), std=(0.2682, 0.2610, 0.2686)),
    encoder=_SMALL_POOL,
    eval_view=ViewSpec(size=96, center_crop=1.0),
)
TINY_IMAGENET = DataSet(
    size=64,
    data=DataConfig(mean=(0.4802, 0.4481, 0.3975), std=(0.2302, 0.2265, 0.2262)),
    encoder=_SMALL_POOL,
    eval_view=ViewSpec(size=64, center_crop=1.0),
)


def strong_view(size: int) -> ViewSpec:
    """The view of MoCo v2: crop, flip, jitter, gray and blur."""
    return ViewSpec(size=size, scale=(0.2, 1.0), blur=0.5)


def weak_view(size: int, *, flip: float) -> ViewSpec:
    """The view of ReSSL's teacher: crop and flip."""
    return ViewSpec(size=size, scale=(0.2, 1.0), flip=flip, jitter_probability=0.0, grayscale=0.0)


def configuration(
    on: DataSet,
    method: MethodConfig,
    optim: OptimConfig,
    *views: ViewSpec,
    epochs: int,
    batch_size: int,
) -> Config:
    """The configuration that trains `method` on a data set."""
    return Config(
        method=method,
        data=on.data,
        model=on.encoder,
        optim=optim,
        train=TrainConfig(epochs=epochs, batch_size=batch_size, checkpoint_every=on.checkpoint_every),
        views=views,
        eval_view=on.eval_view,
    )


def smog_views(
    a: ViewSpec, b: ViewSpec, *, small: int, count: int
) -> tuple[tuple[ViewSpec, ...], tuple[ViewSpec, ...]]:
    """Views of SMoG in even and in odd steps; the large views `a` and `b` swap roles at every step.

    Two views for the trained encoder, two for the momentum encoder, then `count` small ones for the trained encoder.
    """

    def roles(query: ViewSpec, key: ViewSpec) -> tuple[ViewSpec, ...]:
        part = replace(query, size=small, scale=(0.05, 0.2))
        return query, query, key, key, *[part] * count

    return roles(a, b), roles(b, a)
