"""Conventional pipelines for a preset's views: Pillow with torchvision, or DALI's own random operators."""

from __future__ import annotations

import io
import multiprocessing
import random
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from fastssl.config import Config
from fastssl.executor import worker_count
from fastssl_pipelines.sources.base import Source
from fastssl_pipelines.views import ViewSpec

Views = tuple[Tensor, ...]

_ENDLESS = 2**40  # Images in an epoch, so that workers are never restarted


def pil_batches(config: Config, source: Source, device: torch.device) -> Generator[Views]:
    """Float32 views [B, 3, size, size] on `device`, without end, by Pillow and torchvision.transforms.

    `--data.workers` processes of a DataLoader decode and augment, as in the official MoCo code, in random order.
    """
    data = config.data
    dataset = _Augmented(source, [pil_transform(view, data.mean, data.std) for view in config.views])
    # A fork would copy locks held by threads of other candidates
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader = DataLoader(
        dataset,
        batch_size=config.train.batch_size,
        sampler=RandomSampler(dataset, num_samples=_ENDLESS),
        num_workers=worker_count(data, device),
        pin_memory=device.type == "cuda",
        multiprocessing_context=context,
    )
    for views in loader:
        yield tuple(view.to(device, non_blocking=True) for view in views)


def pil_transform(
    view: ViewSpec, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> transforms.Compose:
    """Transform of a PIL image into one view, float32 [3, size, size], in the order of the official MoCo v2 code."""
    chosen: list[Any] = [transforms.RandomResizedCrop(view.size, view.scale, view.ratio)]
    if view.jitter_probability:
        chosen.append(transforms.RandomApply([transforms.ColorJitter(*view.jitter)], view.jitter_probability))
    if view.grayscale:
        chosen.append(transforms.RandomGrayscale(view.grayscale))
    if view.blur:
        chosen.append(transforms.RandomApply([_GaussianBlur(view.blur_sigma)], view.blur))
    if view.solarize:
        chosen.append(transforms.RandomSolarize(128, view.solarize))
    if view.flip:
        chosen.append(transforms.RandomHorizontalFlip(view.flip))
    return transforms.Compose([*chosen, transforms.ToTensor(), transforms.Normalize(mean, std)])


class _GaussianBlur:
    def __init__(self, sigma: tuple[float, float]) -> None:
        self._sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self._sigma)))


class _Augmented(Dataset):
    def __init__(self, source: Source, views: Sequence[transforms.Compose]) -> None:
        self._source, self._views = source, views

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Views:
        image = Image.open(io.BytesIO(self._source.encoded(index))).convert("RGB")
        return tuple(view(image) for view in self._views)


def dali_batches(config: Config, files: Sequence[Path], device: torch.device) -> Generator[Views]:
    """Views [B, 3, size, size] on `device`, without end, by DALI; float16 for a GPU and float32 for a CPU.

    Uses `--data.workers` threads and decodes each image once, on the GPU if there is one. Colors differ from
    torchvision's: fixed order of operations, contrast about 128, hue in YIQ, no solarization.
    """
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.plugin.pytorch import DALIGenericIterator
    from nvidia.dali.types import DALIImageType

    on_gpu = device.type == "cuda"
    device_id = torch.cuda.current_device() if on_gpu else None
    pipeline = Pipeline(
        batch_size=config.train.batch_size, num_threads=worker_count(config.data, device), device_id=device_id, seed=0
    )
    with pipeline:
        encoded, _ = fn.readers.file(files=[str(path) for path in files], random_shuffle=True)
        images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=DALIImageType.RGB)
        pipeline.set_outputs(*[_dali_view(images, view, config, on_gpu) for view in config.views])
    names = [f"view_{index}" for index, _ in enumerate(config.views)]
    for (batch,) in DALIGenericIterator(pipeline, names):
        yield tuple(batch[name] for name in names)


def _dali_view(images: Any, view: ViewSpec, config: Config, on_gpu: bool) -> Any:
    from nvidia.dali import fn
    from nvidia.dali.types import DALIDataType

    crops = fn.random_resized_crop(
        images, size=[view.size, view.size], random_area=view.scale, random_aspect_ratio=view.ratio
    )
    jittered, gray = _coin(view.jitter_probability), _coin(view.grayscale)

    def factor(strength: float) -> Any:
        return 1.0 + jittered * fn.random.uniform(range=[-strength, strength])

    brightness, contrast, saturation, hue = view.jitter
    colors = fn.color_twist(
        crops,
        brightness=factor(brightness),
        contrast=factor(contrast),
        saturation=factor(saturation) * (1 - gray),
        hue=jittered * fn.random.uniform(range=[-360 * hue, 360 * hue]),
    )
    if view.blur:
        sigma = fn.random.uniform(range=list(view.blur_sigma))
        # A window of one pixel changes nothing; 0 means as wide as sigma needs
        colors = fn.gaussian_blur(colors, sigma=sigma, window_size=1 - _coin(view.blur))
    return fn.crop_mirror_normalize(
        colors,
        mirror=_coin(view.flip),
        mean=[255 * value for value in config.data.mean],
        std=[255 * value for value in config.data.std],
        dtype=DALIDataType.FLOAT16 if on_gpu else DALIDataType.FLOAT,
        output_layout="CHW",
    )


def _coin(probability: float) -> Any:
    from nvidia.dali import fn

    return fn.random.coin_flip(probability=probability)
