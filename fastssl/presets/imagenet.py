"""Recipes for ImageNet with a ResNet-50, as published."""

from __future__ import annotations

from dataclasses import replace

from fastssl.config import Config, OptimConfig
from fastssl.methods import MethodConfig
from fastssl.methods.co2 import CO2Config
from fastssl.methods.mixco import MixCoConfig
from fastssl.methods.moco import MoCoV1Config, MoCoV2Config
from fastssl.methods.msvq import MSVQConfig
from fastssl.methods.ressl import ReSSLConfig
from fastssl.methods.smog import SMoGConfig
from fastssl.methods.sup_con import SupConConfig
from fastssl.methods.unimoco import UniMoCoConfig
from fastssl.methods.unmix import UnMixConfig
from fastssl.presets.data_sets import IMAGENET, configuration, smog_views, strong_view, weak_view
from fastssl.presets.registry import preset
from fastssl_pipelines.views import ViewSpec

ONE_DEVICE = "one device with 8-way split batch norm and in-batch shuffle reproduces 8 devices"
SMOG_BATCH = 512 / 4096  # What fits one device, as a share of the authors' batch


def moco_v1(method: MethodConfig) -> Config:
    """The official MoCo v1 command: jitter on every image, gray, no blur, steps at 120 and 160."""
    view = ViewSpec(size=224, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_probability=1.0)
    optim = OptimConfig(schedule="step", milestones=(120, 160))
    return configuration(IMAGENET, method, optim, view, view, epochs=200, batch_size=256)


def moco_v2(method: MethodConfig, *, epochs: int = 200) -> Config:
    """The official MoCo v2 command: --mlp --moco-t 0.2 --aug-plus --cos."""
    view = strong_view(224)
    optim = OptimConfig(schedule="cosine-epoch")
    return configuration(IMAGENET, method, optim, view, view, epochs=epochs, batch_size=256)


def ressl_like(method: MethodConfig, *, teacher_views: int) -> Config:
    """The official ReSSL command: weak views for the teacher, five epochs of warm-up, batch norm without decay."""
    optim = OptimConfig(lr=0.05, decay_norm_and_bias=False, schedule="cosine", warmup_epochs=5)
    views = (strong_view(224), *[weak_view(224, flip=0.5)] * teacher_views)
    return configuration(IMAGENET, method, optim, *views, epochs=200, batch_size=256)


@preset(
    "mocov1-imagenet",
    data="ImageNet",
    source="facebookresearch/moco",
    published="linear top-1 60.6 at 200 epochs (its README)",
    differs=f"{ONE_DEVICE}; gray comes after jitter, not before",
)
def mocov1_imagenet() -> Config:
    return moco_v1(MoCoV1Config())


@preset(
    "mocov2-imagenet",
    data="ImageNet",
    source="facebookresearch/moco",
    published="linear top-1 67.7 at 200 epochs (its README)",
    differs=ONE_DEVICE,
)
def mocov2_imagenet() -> Config:
    return moco_v2(MoCoV2Config())


@preset(
    "unimoco-imagenet",
    data="ImageNet",
    source="dddzg/unimoco",
    published="linear top-1 72.0 at 800 epochs with 10 % of the labels, 76.4 with all (its README)",
    differs=f"{ONE_DEVICE}; a class-balanced tenth of the labels, unless the authors' list of names is given "
    "with --data.label-list",
)
def unimoco_imagenet() -> Config:
    """The official UniMoCo command: MoCo v2 for 800 epochs with the UniCon loss."""
    base = moco_v2(UniMoCoConfig(), epochs=800)
    return replace(base, data=replace(base.data, label_fraction=0.1))


@preset(
    "supcon-imagenet",
    data="ImageNet",
    source="ours: unimoco-imagenet with SupCon's loss over the queue and all labels",
    published="none for this recipe",
    differs="the settings of SupCon's own run with a queue were not read; for a comparison with unimoco-imagenet give "
    "both the same --data.label-fraction",
)
def supcon_imagenet() -> Config:
    return moco_v2(SupConConfig(), epochs=800)


@preset(
    "mixco-imagenet",
    data="ImageNet",
    source="Lee-Gihun/MixCo-Mixup-Contrast, exp_mix_res50_imagenet.sh",
    published="not read: the repository has no results",
    differs=f"{ONE_DEVICE}; neighbors are mixed, not the halves of a device's batch, and all keys of the batch are in "
    "the bank, not a device's 32",
)
def mixco_imagenet() -> Config:
    return moco_v2(MixCoConfig(mix_temperature=1.0))


@preset(
    "unmix-imagenet",
    data="ImageNet",
    source="szq0214/Un-Mix, UnMix_MoCo/for_ImageNet/run.sh",
    published="linear top-1 68.6 at 200 epochs, 71.8 at 800 (its repository)",
    differs=f"{ONE_DEVICE}; neighbors are mixed, not reversed batches; global mixtures in half of the steps as in "
    "run.sh, UNVERIFIED for the published result (the code's default is none)",
)
def unmix_imagenet() -> Config:
    return moco_v2(UnMixConfig(global_probability=0.5))


@preset(
    "co2-imagenet",
    data="ImageNet",
    source="mocov2-imagenet and the paper; no code was published",
    published="linear top-1 68.0 at 200 epochs (table in UMBCvision/MSF)",
    differs=f"{ONE_DEVICE}; weight 0.3 and temperature 0.05 of the consistency term are UNVERIFIED",
)
def co2_imagenet() -> Config:
    return moco_v2(CO2Config(consistency_weight=0.3, consistency_temperature=0.05))


@preset(
    "co2-mocov1-imagenet",
    data="ImageNet",
    source="mocov1-imagenet and the paper; no code was published",
    published="linear top-1 2.9 above MoCo (abstract), so 63.5 from 60.6",
    differs=f"{ONE_DEVICE}; weight 10 and temperature 0.04 of the consistency term are UNVERIFIED",
)
def co2_mocov1_imagenet() -> Config:
    return moco_v1(CO2Config(temperature=0.07, head="linear", consistency_weight=10.0, consistency_temperature=0.04))


@preset(
    "ressl-imagenet",
    data="ImageNet",
    source="mingkai-zheng/ReSSL, ressl.py",
    published="linear top-1 69.9 at 200 epochs with one crop (its repository)",
    differs=ONE_DEVICE,
)
def ressl_imagenet() -> Config:
    return ressl_like(ReSSLConfig(), teacher_views=1)


@preset(
    "msvq-imagenet",
    data="ImageNet",
    source="ours: optimizer and views of ressl-imagenet, queue and head of mocov2-imagenet",
    published="none on ImageNet",
    differs="momenta 0.999 and 0.996 are a guess from the step count; untried",
)
def msvq_imagenet() -> Config:
    method = MSVQConfig(queue_size=65536, momentum=0.999, second_momentum=0.996)
    return ressl_like(method, teacher_views=3)


@preset(
    "smog-imagenet",
    data="ImageNet",
    source="SMoG_code.zip of BoPang1996/BoPang1996.github.io",
    published="linear top-1 76.6 at 400 epochs (README of the archive)",
    differs="batch 512 on one device, not 4096 on 64: learning rates scaled linearly, momenta as they are; batch norm "
    "over that batch and over one resolution at a time; the gradient passes through the groups, as the authors' README "
    "says, while their code stops it (--method.no-groups-gradient); a checkpoint holds 1.3 GB of projections",
)
def smog_imagenet() -> Config:
    """Two crops of 224 pixels and four of 96, of view sets that swap their roles; LARS with warm-up and cosine."""
    a = ViewSpec(size=224, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0)
    b = replace(a, blur=0.1, solarize=0.2)
    views, odd_views = smog_views(a, b, small=96, count=4)
    optim = OptimConfig(
        optimizer="lars",
        lr=4.8 * SMOG_BATCH,
        weight_decay=1e-6,
        final_lr=0.0048 * SMOG_BATCH,
        warmup_epochs=10,
        warmup_lr=0.01 * SMOG_BATCH,
    )
    base = configuration(IMAGENET, SMoGConfig(), optim, *views, epochs=400, batch_size=512)
    return replace(
        base,
        data=replace(base.data, std=(0.228, 0.224, 0.225)),
        model=replace(base.model, norm="local"),
        odd_views=odd_views,
    )
