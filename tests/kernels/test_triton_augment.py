"""The Triton kernels of `augment` against its torch version, in gray levels of 255.

Measured under the interpreter with float32 out: 0.5e-4 for brightness, contrast, saturation, hue and gray, 2.0e-4
for blur and for whole chains. 16-bit results are rounded, by up to 0.50 (bfloat16) and 0.06 (float16), and where an
image is blurred its levels pass through float16: 0.61 and 0.17.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastssl.commands.verify_augment import draw_parameters
from fastssl_kernels import AugmentParameters, use_backend
from fastssl_kernels import augment as torch_augment
from tests.kernels.test_augment import ORDERS, neutral, pictures

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(32, 32), (17, 31), (224, 40), (1, 1), (2, 9), (6, 7)]
LIMITS = {torch.float32: 5e-4, torch.bfloat16: 0.7, torch.float16: 0.25}  # Levels
UNROUNDED = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # Results are levels


def triton_augment(images: Tensor, parameters: AugmentParameters, out_dtype: torch.dtype = torch.float32) -> Tensor:
    from fastssl_kernels.triton.augment import augment

    return augment(images.to(DEVICE), on_device(parameters), out_dtype)


def on_device(parameters: AugmentParameters, device: str = DEVICE) -> AugmentParameters:
    names = [name for name in AugmentParameters.__slots__ if isinstance(getattr(parameters, name), Tensor)]
    return replace(parameters, **{name: getattr(parameters, name).to(device) for name in names})


def reference(images: Tensor, parameters: AugmentParameters) -> Tensor:
    """The torch version in float32, on the CPU."""
    with use_backend("blockwise"):
        return torch_augment(images, parameters, out_dtype=torch.float32)


def levels(normalized: Tensor, parameters: AugmentParameters) -> Tensor:
    mean, std = (torch.tensor(value)[:, None, None] for value in (parameters.mean, parameters.std))
    return (normalized.cpu().float() * std + mean) * 255


def worst(images: Tensor, parameters: AugmentParameters, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference in levels, except within rounding of the solarization threshold, where it jumps."""
    result = levels(triton_augment(images, parameters, dtype), parameters)
    expected = levels(reference(images, parameters), parameters)
    plain = replace(parameters, solarize=torch.zeros_like(parameters.solarize))
    threshold = (levels(reference(images, plain), parameters) - 128).abs()
    jumps = parameters.solarize[:, None, None, None] & (threshold < LIMITS[dtype])
    assert jumps.float().mean() < 0.02
    return (result - expected).abs()[~jumps].max().item()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_triton_chains(size: tuple[int, int]) -> None:
    batch = 2 if size[0] > 100 else 8  # The interpreter takes a second per large image
    assert worst(pictures(batch, *size), draw_parameters(batch)) < LIMITS[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_chains_in_every_order(dtype: torch.dtype) -> None:
    assert worst(pictures(24, 17, 23), replace(draw_parameters(24), order=ORDERS), dtype) < LIMITS[dtype]


@pytest.mark.parametrize(
    ("name", "low", "high", "limit"),
    [
        ("brightness", 0.0, 2.0, 2e-4),
        ("contrast", 0.0, 2.0, 2e-4),
        ("saturation", 0.0, 2.0, 2e-4),
        ("hue", -0.5, 0.5, 5e-4),
        ("blur_sigma", 0.1, 2.0, 5e-4),
    ],
)
def test_triton_single_operation(name: str, low: float, high: float, limit: float) -> None:
    parameters = replace(neutral(9), **{name: torch.linspace(low, high, 9)})
    assert worst(pictures(9, 20, 44), parameters) < limit


def test_triton_contrast_uses_the_mean_of_an_image_of_several_programs() -> None:
    images, parameters = pictures(4, 61, 59), draw_parameters(4)  # 4 programs, the last one partial
    order = torch.tensor([[1, 0, 2, 3], [0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1]])
    parameters = replace(parameters, order=order, blur_sigma=torch.zeros(4))
    assert worst(images, parameters) < LIMITS[torch.float32]


@pytest.mark.parametrize("name", ["grayscale", "flip", "solarize"])
def test_triton_switches_are_exact(name: str) -> None:
    switch = torch.tensor([True, False, True, False])
    parameters = replace(neutral(4), **{name: switch}, **UNROUNDED)
    images = pictures(4, 9, 33)
    result = triton_augment(images, parameters).cpu()
    assert not torch.equal(result[switch], images[switch].permute(0, 3, 1, 2).float())
    assert torch.equal(result[~switch], images[~switch].permute(0, 3, 1, 2).float())
    torch.testing.assert_close(result, reference(images, parameters), atol=3e-5 if name == "grayscale" else 0, rtol=0)


def test_triton_neutral_parameters_change_no_bit() -> None:
    images = pictures(24, 9, 11)
    scale = replace(neutral(24), order=ORDERS, **UNROUNDED)
    assert torch.equal(triton_augment(images, scale).cpu(), images.permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_blur_does_not_change_a_uniform_color(dtype: torch.dtype) -> None:
    images = torch.tensor([255, 100, 3], dtype=torch.uint8).expand(8, 13, 40, 3)
    parameters = replace(neutral(8), blur_sigma=torch.linspace(0.1, 2, 8), **UNROUNDED)
    expected = images.permute(0, 3, 1, 2).float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.25
    torch.testing.assert_close(
        triton_augment(images, parameters, dtype).cpu().float(), expected, atol=tolerance, rtol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_without_blur_equals_sigma_of_zero(dtype: torch.dtype) -> None:
    images, parameters = pictures(6), replace(draw_parameters(6), blur_sigma=torch.zeros(6))
    expected = triton_augment(images, parameters, dtype)
    nobody = replace(parameters, blur_sigma=None)
    assert torch.equal(triton_augment(images, nobody, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 32, 32), (5, 17, 31), (2, 1, 9)], ids=str)
def test_triton_result_is_channels_last(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    result = triton_augment(pictures(*shape), draw_parameters(shape[0]), dtype)
    assert result.dtype == dtype
    assert result.shape == (shape[0], 3, *shape[1:])
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_image_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    images, parameters = pictures(8, 12, 20), draw_parameters(8)
    together = triton_augment(images, parameters, dtype)
    names = [name for name in AugmentParameters.__slots__ if name not in ("mean", "std")]
    for i in (0, 5):
        alone = replace(parameters, **{name: getattr(parameters, name)[i : i + 1] for name in names})
        assert torch.equal(triton_augment(images[i : i + 1], alone, dtype)[0], together[i])


def test_triton_accepts_any_strides_and_does_not_modify_its_input() -> None:
    images, parameters = pictures(6, 12, 20), draw_parameters(6)
    expected = triton_augment(images, parameters)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    every_second = images.repeat_interleave(2, 0)[::2]
    for strided in (planar, every_second):
        kept = strided.clone()
        assert torch.equal(triton_augment(strided, parameters), expected)
        assert torch.equal(strided, kept)
    columns = torch.stack((parameters.brightness, parameters.contrast), 1)
    apart = replace(parameters, brightness=columns[:, 0], contrast=columns[:, 1])
    assert torch.equal(triton_augment(images, apart), expected)


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 255), (1, 0, 0)])
def test_triton_hue_of_extreme_colors(color: tuple[int, int, int]) -> None:
    images = torch.tensor(color, dtype=torch.uint8).expand(11, 4, 4, 3)
    assert worst(images, replace(neutral(11), hue=torch.linspace(-0.5, 0.5, 11))) < 5e-4


@pytest.fixture(scope="module")
def views() -> tuple[Tensor, AugmentParameters]:
    return pictures(256, 224, 224).to("cuda"), on_device(draw_parameters(256), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_views_of_a_training_batch(views: tuple[Tensor, AugmentParameters], dtype: torch.dtype) -> None:
    images, parameters = (views[0].cpu(), on_device(views[1], "cpu"))
    assert worst(images, parameters, dtype) < LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_augment_runs_are_bitwise_equal(views: tuple[Tensor, AugmentParameters], dtype: torch.dtype) -> None:
    first = triton_augment(*views, dtype)
    for _ in range(3):
        assert torch.equal(triton_augment(*views, dtype), first)


@pytest.mark.gpu
@pytest.mark.parametrize("blurred", [True, False])
def test_triton_augment_does_not_wait_for_the_device(views: tuple[Tensor, AugmentParameters], blurred: bool) -> None:
    images, parameters = views
    if not blurred:
        parameters = replace(parameters, blur_sigma=None)
    triton_augment(images, parameters, torch.bfloat16)  # Compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_augment(images, parameters, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
