"""Color, blur, flip and normalization of a batch of crops, compared with torchvision's v2 functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from fastssl_pipelines import SamplePlan, ViewPlan, ViewSpec
from fastssl_pipelines.executors.pixels import Augmentation

IMPLEMENTATIONS = ("fastssl", "torchvision, image by image", "torchvision, all as one image")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = {
    0: (tv.adjust_brightness, "brightness", 1.0),
    1: (tv.adjust_contrast, "contrast", 1.0),
    2: (tv.adjust_saturation, "saturation", 1.0),
    3: (tv.adjust_hue, "hue", 0.0),
}
TOLERATED = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # Views in 16 bits are rounded at the end


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERATED, ids=["float32", "bfloat16"])
def test_augment(
    benchmark: BenchmarkFixture,
    device: torch.device,
    view_size: tuple[int, int],
    dtype: torch.dtype,
    implementation: str,
) -> None:
    """Parameters are drawn beforehand; "all as one image" applies those of one blurred image to the batch."""
    count, size = view_size
    benchmark.group = f"augment {count} images {size} px {str(dtype).removeprefix('torch.')}"
    sides = np.full(count, size)
    view = ViewSpec(size=size, blur=0.5)  # MoCo v2's
    plan = SamplePlan(widths=sides, heights=sides, labels=0 * sides, views=(view,), seed=0).batch(0, 0, count)
    numbers = plan.views[0]
    crops = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crops = crops.to(device)
    blurred = int((numbers.blur_sigma > 0).argmax())

    def ours() -> Tensor:
        return Augmentation(mean=MEAN, std=STD, device=device, dtype=dtype)(plan, (crops,))[0]

    def one_by_one() -> Tensor:
        images = crops.permute(0, 3, 1, 2)
        return torch.stack([_by_torchvision(image, numbers, row, dtype) for row, image in enumerate(images)])

    def all_as_one() -> Tensor:
        return _by_torchvision(crops.permute(0, 3, 1, 2), numbers, blurred, dtype)

    steps = dict(zip(IMPLEMENTATIONS, (ours, one_by_one, all_as_one), strict=True))
    found = benchmark(steps[implementation])
    expected = one_by_one() if implementation == "fastssl" else ours()
    rows = [blurred] if implementation == IMPLEMENTATIONS[-1] else list(range(count))
    assert found.dtype == dtype
    assert (found[rows].float() - expected[rows].float()).abs().max() <= TOLERATED[dtype]


def _by_torchvision(images: Tensor, numbers: ViewPlan, row: int, dtype: torch.dtype) -> Tensor:
    """Images [3, H, W], or [B, 3, H, W] all with the parameters of one row."""
    images = tv.to_dtype(images, torch.float32, scale=True)
    for operation in numbers.order[row]:
        adjust, name, neutral = JITTER[int(operation)]
        if (number := float(getattr(numbers, name)[row])) != neutral:
            images = adjust(images, number)
    if numbers.grayscale[row]:
        images = tv.rgb_to_grayscale(images, num_output_channels=3)
    if numbers.blur_sigma[row] > 0:
        images = tv.gaussian_blur(images, [13, 13], [float(numbers.blur_sigma[row])])
    if numbers.flip[row]:
        images = tv.horizontal_flip(images)
    return tv.normalize(images, list(MEAN), list(STD)).to(dtype)
