"""A configuration for each method, and a batch for it on the fake GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastssl.config import Config
from fastssl.methods import METHODS
from fastssl.presets import PRESETS, load
from fastssl_pipelines.batch import Batch
from tests.preflight.fake_cuda import DEVICE

IMAGENET = ("mocov2-imagenet", "smog-imagenet", "msvq-imagenet")
SMALL = (*METHODS, "mocov2-symmetric")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def recipe(name: str, precision: str) -> Config:
    """A preset by name, or a method's CIFAR-10 preset (MoCo v1 uses that of v2), with torch's own kernels."""
    preset = name if name in PRESETS else f"{name}-cifar10"
    config = load(preset if preset in PRESETS else "mocov2-cifar10")
    if preset not in PRESETS:
        config = replace(config, method=METHODS[name].Config(queue_size=config.method.queue_size))
    return replace(config, train=replace(config.train, precision=precision, compile="off"))


def batch_on_gpu(config: Config, step: int) -> Batch:
    """A batch as the input delivers it: channels_last, in the dtype of the products."""
    count, dtype = config.train.batch_size, DTYPES[config.train.precision]
    views = tuple(
        torch.empty(count, 3, view.size, view.size, dtype=dtype, device=DEVICE, memory_format=torch.channels_last)
        for view in config.views
    )
    numbers = torch.empty(count, dtype=torch.int64, device=DEVICE)
    return Batch(views=views, labels=numbers, ids=numbers, step=step)
