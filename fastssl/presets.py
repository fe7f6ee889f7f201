"""The recipes, by name: Python functions that return a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fastssl.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from fastssl.errors import unknown_name
from fastssl.methods.moco import MoCoV1Config, MoCoV2Config
from fastssl.methods.unimoco import UniMoCoConfig
from fastssl_pipelines.views import ViewSpec

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True)
class Preset:
    """A recipe: `published` is its authors' result, `differs` what we do otherwise."""

    build: Callable[[], Config]
    data: str
    published: str
    differs: str


PRESETS: dict[str, Preset] = {}


def preset(name: str, *, data: str, published: str, differs: str):
    """Register a function under `name`."""

    def register(build: Callable[[], Config]) -> Callable[[], Config]:
        PRESETS[name] = Preset(lambda: replace(build(), preset=name), data, published, differs)
        return build

    return register


def load(name: str) -> Config:
    """The configuration of a preset; raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name].build()


@preset("quickstart", data="embedded pictures", published="none", differs="ours, made for minutes on a CPU")
def quickstart() -> Config:
    """Minutes on two CPU cores, no download: UniMoCo with a tenth of the labels.

    Batch norm in the head and a warm-up bring a run of a thousand steps out of the collapse it starts in.
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
        eval_view=ViewSpec(size=32, centre=1.0),
    )


@preset(
    "mocov2-cifar10",
    data="CIFAR-10",
    published="kNN 82.6 at 200 epochs",
    differs="kNN reads the encoder's features, not the head's 128 numbers",
)
def mocov2_cifar10() -> Config:
    """The authors' CIFAR-10 notebook: linear head, no blur, split batch norm, momentum 0.99."""
    view = ViewSpec(size=32, scale=(0.08, 1.0))
    return Config(
        method=MoCoV2Config(temperature=0.1, queue_size=4096, momentum=0.99, head="linear"),
        data=DataConfig(mean=CIFAR10_MEAN, std=CIFAR10_STD),
        model=ModelConfig(encoder="resnet18", stem="small"),
        optim=OptimConfig(lr=0.06, weight_decay=5e-4, schedule="cosine-epoch"),
        train=TrainConfig(epochs=200, batch_size=512),
        views=(view, view),
        eval_view=ViewSpec(size=32, centre=1.0),
    )


@preset(
    "unimoco-cifar10",
    data="CIFAR-10",
    published="none on CIFAR",
    differs="the recipe of mocov2-cifar10 with UniMoCo's loss and a tenth of the labels",
)
def unimoco_cifar10() -> Config:
    base = mocov2_cifar10()
    method = UniMoCoConfig(temperature=0.1, queue_size=4096, momentum=0.99, head="linear")
    return replace(base, method=method, data=replace(base.data, label_fraction=0.1))


@preset(
    "mocov1-imagenet",
    data="ImageNet",
    published="linear top-1 60.6 at 200 epochs",
    differs="one device with 8-way split batch norm and in-batch shuffle stands for 8 devices; grey comes after "
    "jitter, not before",
)
def mocov1_imagenet() -> Config:
    """The official MoCo v1 command: jitter on every image, grey, no blur, steps at 120 and 160."""
    view = ViewSpec(size=224, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_probability=1.0)
    return Config(
        method=MoCoV1Config(),
        optim=OptimConfig(schedule="step", milestones=(120, 160)),
        train=TrainConfig(epochs=200, batch_size=256, checkpoint_every=1000),
        views=(view, view),
        eval_view=ViewSpec(size=224, centre=0.875),
    )


@preset(
    "mocov2-imagenet",
    data="ImageNet",
    published="linear top-1 67.7 at 200 epochs",
    differs="one device with 8-way split batch norm and in-batch shuffle stands for 8 devices",
)
def mocov2_imagenet() -> Config:
    """The official MoCo v2 command: --mlp --moco-t 0.2 --aug-plus --cos."""
    view = ViewSpec(size=224, scale=(0.2, 1.0), blur=0.5)
    return replace(
        mocov1_imagenet(),
        method=MoCoV2Config(),
        optim=OptimConfig(schedule="cosine-epoch"),
        views=(view, view),
    )


@preset(
    "unimoco-imagenet",
    data="ImageNet",
    published="linear top-1 72.0 at 800 epochs with 10 % of the labels, 76.4 with all",
    differs="as mocov2-imagenet; a class-balanced tenth of the labels, not the authors' list of names",
)
def unimoco_imagenet() -> Config:
    """The official UniMoCo command: MoCo v2 for 800 epochs with the UniCon loss."""
    base = mocov2_imagenet()
    return replace(
        base,
        method=UniMoCoConfig(),
        data=replace(base.data, label_fraction=0.1),
        train=replace(base.train, epochs=800),
    )
