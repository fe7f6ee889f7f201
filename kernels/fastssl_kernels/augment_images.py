"""The public augmentation of a batch of views; each backend has its own `augment`."""

from __future__ import annotations

import torch
from torch import Tensor

from .augment_parameters import AugmentParameters, check
from .backend import choose, requested
from .blockwise import augment as blockwise


def augment(images: Tensor, parameters: AugmentParameters, *, out_dtype: torch.dtype) -> Tensor:
    """Augment and normalize a batch of uint8 images, each with its own parameters.

    `images`: uint8 [B, H, W, 3] of any strides. Returns [B, 3, H, W] in `out_dtype` (float32, bfloat16 or float16),
    channels_last, on the images' device.

    In this order: brightness, contrast, saturation and hue as `order` says; grayscale; Gaussian blur of 13 taps
    (fewer where the short side is under 7 pixels); solarize at level 128; horizontal flip; normalize. Each is the
    function of torchvision.transforms.v2.functional on float images, with no rounding in between. `use_backend`
    chooses between the Triton kernels and plain torch. Raises TypeError for a wrong dtype, ValueError for a wrong
    shape or device, and RuntimeError if the backend "triton" was named and cannot run.
    """
    check(images, parameters, out_dtype)
    backend = requested()
    if backend == "auto" and torch.compiler.is_compiling():
        backend = "blockwise"  # The compiler fuses plain operations itself
    if choose(backend, images.device) == "triton":
        from .triton import augment as triton  # Triton exists on Linux only

        return triton.augment(images, parameters, out_dtype)
    return blockwise.augment(images, parameters, out_dtype)
