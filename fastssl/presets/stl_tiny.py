"""Recipes for STL-10 and Tiny ImageNet with a ResNet-18."""

from __future__ import annotations

from dataclasses import replace

from fastssl.config import Config, ModelConfig, OptimConfig
from fastssl.methods.mixco import MixCoConfig
from fastssl.methods.moco import MoCoV2Config
from fastssl.methods.unmix import UnMixConfig
from fastssl.presets.data_sets import IMAGENET, STL10, TINY_IMAGENET, configuration, strong_view
from fastssl.presets.registry import preset
from fastssl.presets.resnet18_recipes import BEST_EPOCH, MOCO_OF_MSVQ, RE_RUN, moco_of_msvq, msvq, ressl

UNLABELED = "the source also trains on the 100,000 unlabeled images: give them with --data.unlabeled"


@preset(
    "mocov2-stl10",
    data="STL-10",
    source="pc-cp/MSVQ, its baseline",
    published="linear 85.88 at 200 epochs (its README)",
    differs=f"{UNLABELED}; {MOCO_OF_MSVQ}",
)
def mocov2_stl10() -> Config:
    return moco_of_msvq(STL10, MoCoV2Config)


@preset(
    "unmix-stl10",
    data="STL-10",
    source="ours: mocov2-stl10 with Un-Mix's loss",
    published="not read: the paper has STL-10",
    differs=f"the authors' settings were not read; untuned; {UNLABELED}",
)
def unmix_stl10() -> Config:
    return moco_of_msvq(STL10, UnMixConfig)


@preset(
    "ressl-stl10",
    data="STL-10",
    source="ours: ressl-tinyimagenet on STL-10",
    published="not read: the paper has STL-10",
    differs=f"queue, momentum and teacher temperature are UNVERIFIED for STL-10; {UNLABELED}",
)
def ressl_stl10() -> Config:
    return ressl(STL10)


@preset(
    "msvq-stl10",
    data="STL-10",
    source="pc-cp/MSVQ",
    published="linear 90.36 at 200 epochs (its README)",
    differs=f"{UNLABELED}; {BEST_EPOCH}; queue 16384 as in its README, not the 4096 of its script",
)
def msvq_stl10() -> Config:
    return msvq(STL10, second_momentum=0.99, teacher_temperature=0.04)


@preset(
    "mocov2-tinyimagenet",
    data="Tiny ImageNet",
    source="pc-cp/MSVQ, its baseline",
    published="linear 43.36 at 200 epochs (its README)",
    differs=MOCO_OF_MSVQ,
)
def mocov2_tinyimagenet() -> Config:
    return moco_of_msvq(TINY_IMAGENET, MoCoV2Config)


@preset(
    "mixco-tinyimagenet",
    data="Tiny ImageNet",
    source="Lee-Gihun/MixCo-Mixup-Contrast, exp_mix_res18_tinyimg.sh",
    published="not read: the repository has no results",
    differs="one device with 2-way split batch norm and in-batch shuffle reproduces 2 devices; neighbors are mixed, "
    "not the halves of a device's batch, and all keys of the batch are in the bank, not a device's 64",
)
def mixco_tinyimagenet() -> Config:
    """Tiny ImageNet enlarged to 224 pixels for torchvision's ResNet-18, with ImageNet's normalization."""
    on = replace(IMAGENET, encoder=ModelConfig(encoder="resnet18", splits=2))
    view = strong_view(224)
    optim = OptimConfig(lr=0.015, schedule="cosine-epoch")
    return configuration(on, MixCoConfig(), optim, view, view, epochs=100, batch_size=128)


@preset(
    "unmix-tinyimagenet",
    data="Tiny ImageNet",
    source="ours: mocov2-tinyimagenet with Un-Mix's loss",
    published="not read: the paper has Tiny ImageNet",
    differs="the authors' settings were not read; untuned",
)
def unmix_tinyimagenet() -> Config:
    return moco_of_msvq(TINY_IMAGENET, UnMixConfig)


@preset(
    "ressl-tinyimagenet",
    data="Tiny ImageNet",
    source=RE_RUN,
    published="linear 46.38, kNN 37.14 at 200 epochs (its README); the paper's result was not read",
    differs="nothing known",
)
def ressl_tinyimagenet() -> Config:
    return ressl(TINY_IMAGENET)


@preset(
    "msvq-tinyimagenet",
    data="Tiny ImageNet",
    source="pc-cp/MSVQ",
    published="linear 48.09 at 200 epochs (its README)",
    differs=f"{BEST_EPOCH}; queue 16384 as in its README, not the 4096 of its script",
)
def msvq_tinyimagenet() -> Config:
    return msvq(TINY_IMAGENET, second_momentum=0.99, teacher_temperature=0.04)
