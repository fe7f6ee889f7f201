"""Recipes for CIFAR-10 and CIFAR-100 with a ResNet-18."""

from __future__ import annotations

from dataclasses import replace

from fastssl.config import Config, OptimConfig
from fastssl.methods.co2 import CO2Config
from fastssl.methods.mixco import MixCoConfig
from fastssl.methods.moco import MoCoV2Config
from fastssl.methods.smog import SMoGConfig
from fastssl.methods.sup_con import SupConConfig
from fastssl.methods.unimoco import UniMoCoConfig
from fastssl.methods.unmix import UnMixConfig
from fastssl.presets.data_sets import CIFAR10, CIFAR100, configuration, smog_views
from fastssl.presets.registry import preset
from fastssl.presets.resnet18_recipes import BEST_EPOCH, MOCO_OF_MSVQ, RE_RUN, moco_of_msvq, msvq, notebook, ressl
from fastssl_pipelines.views import ViewSpec

NOTEBOOK = "the CIFAR-10 notebook of facebookresearch/moco"
OWN_FEATURES = "kNN reads the encoder's features, not the head's 128 outputs"
UNMIX_CIFAR100 = replace(CIFAR100, data=CIFAR10.data)  # The authors' script normalizes with the statistics of CIFAR-10


@preset(
    "mocov2-cifar10",
    data="CIFAR-10",
    source=NOTEBOOK,
    published="kNN 82.6 at 200 epochs, 86.3 at 400, 88.7 at 800 (notebook)",
    differs=OWN_FEATURES,
)
def mocov2_cifar10() -> Config:
    return notebook(CIFAR10, MoCoV2Config)


@preset(
    "mocov2-symmetric-cifar10",
    data="CIFAR-10",
    source=NOTEBOOK,
    published="kNN 85.3 at 200 epochs, 88.5 at 400, 89.7 at 800 (notebook)",
    differs=OWN_FEATURES,
)
def mocov2_symmetric_cifar10() -> Config:
    return notebook(CIFAR10, MoCoV2Config, symmetric=True)


@preset(
    "unimoco-cifar10",
    data="CIFAR-10",
    source="ours: mocov2-cifar10 with UniMoCo's loss and a tenth of the labels",
    published="none on CIFAR",
    differs="untuned",
)
def unimoco_cifar10() -> Config:
    base = notebook(CIFAR10, UniMoCoConfig)
    return replace(base, data=replace(base.data, label_fraction=0.1))


@preset(
    "supcon-cifar10",
    data="CIFAR-10",
    source="ours: mocov2-cifar10 with SupCon's loss over the queue and all labels",
    published="none for this recipe",
    differs="SupCon's own recipe is a ResNet-50 with batch 1024 and no queue; untuned; for a comparison with "
    "unimoco-cifar10 give both the same --data.label-fraction",
)
def supcon_cifar10() -> Config:
    return notebook(CIFAR10, SupConConfig)


@preset(
    "mixco-cifar10",
    data="CIFAR-10",
    source="ours: mocov2-cifar10 with MixCo's loss",
    published="none: the authors' code has CIFAR only for linear evaluation",
    differs="untuned",
)
def mixco_cifar10() -> Config:
    return notebook(CIFAR10, MixCoConfig)


@preset(
    "unmix-cifar10",
    data="CIFAR-10",
    source="szq0214/Un-Mix, unmix_c10.py",
    published="kNN 92.25 at 1000 epochs, MoCo alone 90.49 (its README)",
    differs=f"{OWN_FEATURES}; neighbors are mixed, not reversed batches",
)
def unmix_cifar10() -> Config:
    return notebook(CIFAR10, UnMixConfig, epochs=1000, symmetric=True)


@preset(
    "co2-cifar10",
    data="CIFAR-10",
    source="philippmwirth/co2, a third party's re-run with lightly",
    published="kNN 84.5 at 200 epochs, MoCo alone 84.2 (its README)",
    differs="its contrastive loss is the mean of both directions and its batch norm, views and normalization are "
    "lightly's, all of mocov2-cifar10 here; temperature 1 is that of its table, its code leaves lightly's 0.05",
)
def co2_cifar10() -> Config:
    return notebook(
        CIFAR10,
        CO2Config,
        head="mlp",
        consistency_weight=1.0,
        consistency_temperature=1.0,
        include_positive=True,
    )


@preset(
    "ressl-cifar10",
    data="CIFAR-10",
    source=RE_RUN,
    published="linear 89.97, kNN 88.89 at 200 epochs (its README); the paper's result was not read",
    differs="nothing known",
)
def ressl_cifar10() -> Config:
    return ressl(CIFAR10)


@preset(
    "msvq-cifar10",
    data="CIFAR-10",
    source="pc-cp/MSVQ",
    published="linear 91.46 at 200 epochs (its README)",
    differs=BEST_EPOCH,
)
def msvq_cifar10() -> Config:
    return msvq(CIFAR10, second_momentum=0.95, teacher_temperature=0.04)


@preset(
    "smog-cifar10",
    data="CIFAR-10",
    source="ours: optimizer of mocov2-cifar10, 300 groups that are reset after about 300 steps as in lightly",
    published="none by the authors",
    differs="two large and two small crops of 32 and 16 pixels without blur; untuned",
)
def smog_cifar10() -> Config:
    a = ViewSpec(size=32, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1))
    views, odd_views = smog_views(a, replace(a, solarize=0.2), small=16, count=2)
    method = SMoGConfig(groups=300, reset_epochs=3, bank_size=50000, momentum=0.99)
    optim = OptimConfig(lr=0.06, weight_decay=5e-4, schedule="cosine", warmup_epochs=10)
    base = configuration(CIFAR10, method, optim, *views, epochs=200, batch_size=512)
    return replace(base, model=replace(base.model, norm="local"), odd_views=odd_views)


@preset(
    "mocov2-cifar100",
    data="CIFAR-100",
    source="pc-cp/MSVQ, its baseline",
    published="linear 59.51 at 200 epochs (its README)",
    differs=MOCO_OF_MSVQ,
)
def mocov2_cifar100() -> Config:
    return moco_of_msvq(CIFAR100, MoCoV2Config)


@preset(
    "mocov2-symmetric-cifar100",
    data="CIFAR-100",
    source="szq0214/Un-Mix, unmix_c100.py without the mixtures",
    published="kNN 65.49 at 1000 epochs (its README)",
    differs=OWN_FEATURES,
)
def mocov2_symmetric_cifar100() -> Config:
    return notebook(UNMIX_CIFAR100, MoCoV2Config, epochs=1000, symmetric=True)


@preset(
    "unmix-cifar100",
    data="CIFAR-100",
    source="szq0214/Un-Mix, unmix_c100.py",
    published="kNN 68.83 at 1000 epochs, MoCo alone 65.49 (its README)",
    differs=f"{OWN_FEATURES}; neighbors are mixed, not reversed batches",
)
def unmix_cifar100() -> Config:
    return notebook(UNMIX_CIFAR100, UnMixConfig, epochs=1000, symmetric=True)


@preset(
    "ressl-cifar100",
    data="CIFAR-100",
    source=RE_RUN,
    published="linear 63.82, kNN 57.48 at 200 epochs (its README); 63.8 in the paper (mingkai-zheng/ReSSL, issue 12)",
    differs="nothing known",
)
def ressl_cifar100() -> Config:
    return ressl(CIFAR100)


@preset(
    "msvq-cifar100",
    data="CIFAR-100",
    source="pc-cp/MSVQ",
    published="linear 66.28 at 200 epochs (its README)",
    differs=BEST_EPOCH,
)
def msvq_cifar100() -> Config:
    return msvq(CIFAR100, second_momentum=0.93, teacher_temperature=0.03)
