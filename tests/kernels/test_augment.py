"""`augment` against torchvision.transforms.v2, which defines all of its operations.

Measured on CPU in float32, on values in [0, 1], over 384 images each: 0.8e-6 for brightness, contrast,
saturation, 1.2e-6 for hue, 1.3e-6 for blur, 1.6e-6 for whole chains. uint8 torchvision truncates or rounds
after each operation.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from fastssl.commands.verify_augment import draw_parameters
from fastssl_kernels import AugmentParameters, augment, use_backend

MODULE = import_module("fastssl_kernels.blockwise.augment")
ORDERS = torch.tensor(list(permutations(range(4))))


def pictures(batch: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """uint8 [B, H, W, 3]: a different color gradient for each image, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linspace(0, 1, height)[None, :, None, None]
    columns = torch.linspace(0, 1, width)[None, None, :, None]
    corner, down, right = torch.rand(3, batch, 1, 1, 3, generator=generator) * 1.4 - 0.2
    noise = torch.randn(batch, height, width, 3, generator=generator) * 0.1
    image = corner + (down - corner) * rows + (right - corner) * columns + noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def neutral(batch: int) -> AugmentParameters:
    """Parameters that change nothing, with a normalization to [0, 1]."""
    return AugmentParameters(
        flip=torch.zeros(batch, dtype=torch.bool),
        brightness=torch.ones(batch),
        contrast=torch.ones(batch),
        saturation=torch.ones(batch),
        hue=torch.zeros(batch),
        order=torch.arange(4).repeat(batch, 1),
        grayscale=torch.zeros(batch, dtype=torch.bool),
        blur_sigma=torch.zeros(batch),
        solarize=torch.zeros(batch, dtype=torch.bool),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def unit(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


def jitter_reference(image: Tensor, parameters: AugmentParameters, i: int) -> Tensor:
    functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    numbers = (parameters.brightness, parameters.contrast, parameters.saturation, parameters.hue)
    for operation in parameters.order[i].tolist():
        image = functions[operation](image, numbers[operation][i].item())
    return image


def reference(image: Tensor, parameters: AugmentParameters, i: int) -> Tensor:
    """torchvision's operations in order on image i, [3, H, W], float in [0, 1] or uint8."""
    image = jitter_reference(image, parameters, i)
    if parameters.grayscale[i]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if parameters.blur_sigma[i] > 0:
        image = tv.gaussian_blur(image, [13, 13], [parameters.blur_sigma[i].item()])
    if parameters.solarize[i]:
        # Just under level 128, because level / 255 may round to either side of 128 / 255
        image = tv.solarize(image, 127.999 / 255 if image.is_floating_point() else 128)
    return tv.horizontal_flip(image) if parameters.flip[i] else image


def error(images: Tensor, parameters: AugmentParameters) -> float:
    """Largest difference from the reference on float images in [0, 1]."""
    expected = torch.stack([reference(image, parameters, i) for i, image in enumerate(unit(images))])
    return (augment(images, parameters, out_dtype=torch.float32) - expected).abs().max().item()


def error_in_levels(images: Tensor, parameters: AugmentParameters) -> Tensor:
    """Differences from torchvision on uint8 images, in gray levels."""
    rounded = [reference(image.permute(2, 0, 1), parameters, i) for i, image in enumerate(images)]
    return (augment(images, parameters, out_dtype=torch.float32) * 255 - torch.stack(rounded)).abs()


@pytest.mark.parametrize(
    ("name", "low", "high", "levels"),
    [
        # The last column: gray levels from uint8 torchvision, measured 1.00, 1.49, 1.95, 0.95, 0.50.
        ("brightness", 0.0, 2.0, 1.01),
        ("contrast", 0.0, 2.0, 1.51),
        ("saturation", 0.0, 2.0, 2.01),
        ("hue", -0.5, 0.5, 1.01),
        ("blur_sigma", 0.1, 2.0, 0.51),
    ],
)
def test_one_operation_equals_torchvision(name: str, low: float, high: float, levels: float) -> None:
    images = pictures(9)
    parameters = replace(neutral(9), **{name: torch.linspace(low, high, 9)})
    assert error(images, parameters) <= 3e-6
    assert error_in_levels(images, parameters).max() <= levels


@pytest.mark.parametrize("name", ["grayscale", "solarize", "flip"])
def test_one_switch_equals_torchvision(name: str) -> None:
    images = pictures(4)
    parameters = replace(neutral(4), **{name: torch.tensor([True, False, True, False])})
    assert error(images, parameters) <= 1e-6
    assert error_in_levels(images, parameters).max() <= (1.01 if name == "grayscale" else 1e-4)


def test_solarize_inverts_from_level_128_on() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    parameters = replace(neutral(1), solarize=torch.tensor([True]))
    levels = (augment(images, parameters, out_dtype=torch.float32)[0, 0] * 255).round().flatten().int()
    expected = [level if level < 128 else 255 - level for level in range(256)]
    assert levels.tolist() == expected


def test_contrast_is_about_the_mean_gray_of_the_image() -> None:
    images = (pictures(1) * 0.25).to(torch.uint8)
    parameters = replace(neutral(1), contrast=torch.zeros(1))
    out = augment(images, parameters, out_dtype=torch.float32)
    mean = tv.rgb_to_grayscale(unit(images)).mean().item()
    torch.testing.assert_close(out, torch.full_like(out, mean), atol=1e-6, rtol=0)


def test_every_jitter_order() -> None:
    images = pictures(1).expand(24, -1, -1, -1)
    parameters = replace(
        neutral(24),
        brightness=torch.full((24,), 1.5),
        contrast=torch.full((24,), 1.7),
        saturation=torch.full((24,), 1.9),
        hue=torch.full((24,), 0.2),
        order=ORDERS,
    )
    assert error(images, parameters) <= 3e-6
    out = augment(images, parameters, out_dtype=torch.float32)
    gap = (out[:, None] - out[None]).abs().amax((2, 3, 4)) + torch.eye(24)
    assert gap.min() > 0.01, "two orders gave the same image, so the order was not tested"


@pytest.mark.parametrize("size", [(32, 32), (17, 31), (7, 50), (64, 64)])
def test_whole_chain_equals_torchvision(size: tuple[int, int]) -> None:
    batch = 32
    images, parameters = pictures(batch, *size), draw_parameters(batch)
    before = replace(parameters, solarize=torch.zeros(batch, dtype=torch.bool))
    unsolarized = torch.stack([reference(image, before, i) for i, image in enumerate(unit(images))])
    expected = torch.stack([reference(image, parameters, i) for i, image in enumerate(unit(images))])
    expected = tv.normalize(expected, list(parameters.mean), list(parameters.std))
    difference = (augment(images, parameters, out_dtype=torch.float32) - expected).abs()
    # Solarization jumps at its threshold, where rounding decides the side of a value
    on_the_jump = parameters.solarize[:, None, None, None] & ((unsolarized * 255 - 128).abs() < 2e-3)
    assert on_the_jump.float().mean() < 5e-3
    assert difference[~on_the_jump].max() <= 1e-5


def test_uint8_torchvision_differs_only_by_rounding() -> None:
    batch = 32
    parameters = replace(draw_parameters(batch), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    # Solarization would turn a rounding error into a jump; it has a separate test
    parameters = replace(parameters, solarize=torch.zeros_like(parameters.solarize))
    difference = error_in_levels(pictures(batch), parameters)
    # Four truncations, each amplified by up to 1.6 by later operations: measured mean 1.5, maximum 6.9.
    assert difference.mean() < 2
    assert difference.max() < 8


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (2, 40), (6, 7)])
def test_blur_of_a_tiny_image_uses_the_taps_that_fit(size: tuple[int, int]) -> None:
    images = pictures(2, *size)
    parameters = replace(neutral(2), blur_sigma=torch.tensor([2.0, 0.5]))
    out = augment(images, parameters, out_dtype=torch.float32)
    taps = 2 * min(6, min(size) - 1) + 1
    for i, sigma in enumerate((2.0, 0.5)):
        expected = tv.gaussian_blur(unit(images)[i], [taps, taps], [sigma, sigma])
        torch.testing.assert_close(out[i], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("level", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 255), (1, 0, 0)])
def test_hue_of_extreme_colors(level: tuple[int, int, int]) -> None:
    images = torch.tensor(level, dtype=torch.uint8).expand(11, 4, 4, 3)
    parameters = replace(neutral(11), hue=torch.linspace(-0.5, 0.5, 11))
    assert augment(images, parameters, out_dtype=torch.float32).isfinite().all()
    assert error(images, parameters) <= 3e-6


def test_neutral_parameters_change_no_bit() -> None:
    images = pictures(24)
    scale = replace(neutral(24), order=ORDERS, std=(1 / 255, 1 / 255, 1 / 255))
    out = augment(images, scale, out_dtype=torch.float32)
    assert torch.equal(out, images.permute(0, 3, 1, 2).float())


def test_normalization() -> None:
    images = pictures(3)
    parameters = replace(neutral(3), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    expected = tv.normalize(unit(images), list(parameters.mean), list(parameters.std))
    out = augment(images, parameters, out_dtype=torch.float32)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 32, 32), (5, 17, 31), (2, 1, 9)])
def test_result_is_channels_last_in_the_requested_dtype(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    images, parameters = pictures(*shape), draw_parameters(shape[0])
    out = augment(images, parameters, out_dtype=dtype)
    assert out.dtype == dtype
    assert out.shape == (shape[0], 3, *shape[1:])
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, augment(images, parameters, out_dtype=torch.float32).to(dtype))


def test_an_image_does_not_depend_on_its_batch() -> None:
    images, parameters = pictures(8), draw_parameters(8)
    out = augment(images, parameters, out_dtype=torch.float32)
    assert torch.equal(out, augment(images, parameters, out_dtype=torch.float32))
    for i in (0, 5):
        fields = {
            name: getattr(parameters, name)[i : i + 1]
            for name in AugmentParameters.__slots__
            if name not in ("mean", "std")
        }
        alone = augment(images[i : i + 1], replace(parameters, **fields), out_dtype=torch.float32)
        # Vectorized and scalar loops may round differently
        torch.testing.assert_close(alone[0], out[i], atol=5e-6, rtol=0)


def test_strided_input_works_and_is_not_modified() -> None:
    images, parameters = pictures(6), draw_parameters(6)
    expected = augment(images, parameters, out_dtype=torch.float32)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    every_second = images.repeat_interleave(2, 0)[::2]
    for strided in (planar, every_second):
        kept = strided.clone()
        assert torch.equal(augment(strided, parameters, out_dtype=torch.float32), expected)
        assert torch.equal(strided, kept)


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, AugmentParameters], Tensor]:
    """`augment` as it runs where the host may not read values: every operation on all images at once."""

    def run(images: Tensor, parameters: AugmentParameters) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(MODULE, "_host_may_read", lambda _: False)
            return augment(images, parameters, out_dtype=torch.float32)

    return run


@pytest.mark.parametrize("shape", [(64, 32, 32), (40, 17, 31), (9, 96, 50), (5, 224, 224), (30, 2, 3)])
@pytest.mark.parametrize("chunk", [1, 5000, 2**16])
def test_chunks_change_nothing(batched, monkeypatch, shape: tuple[int, int, int], chunk: int) -> None:
    batch = shape[0]
    parameters = replace(draw_parameters(batch, seed=batch), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    plain = torch.arange(batch) % 5 == 0  # Images without jitter
    fields = {name: torch.where(plain, 1.0, getattr(parameters, name)) for name in ("contrast", "saturation")}
    fields |= {"brightness": torch.where(plain, 1.0, 0.7), "hue": torch.where(plain, 0.0, parameters.hue)}
    # Solarization would turn a rounding error into a jump; the next test covers it
    parameters = replace(parameters, **fields, solarize=torch.zeros(batch, dtype=torch.bool))
    images = pictures(batch, *shape[1:]).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    monkeypatch.setattr(MODULE, "_CHUNK_PIXELS", chunk)
    out = augment(images, parameters, out_dtype=torch.float32)
    torch.testing.assert_close(out, batched(images, parameters), atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("brightness", 1.5),
        ("contrast", 0.5),
        ("saturation", 1.5),
        ("hue", 0.3),
        ("blur_sigma", 1.2),
        ("grayscale", True),
        ("solarize", True),
        ("flip", True),
    ],
)
def test_an_operation_on_some_images_does_not_change_the_others(batched, name: str, value: float) -> None:
    images, parameters = pictures(7), replace(neutral(7), order=ORDERS[:7])
    chosen = torch.tensor([False, True, True, False, True, False, True])
    before = getattr(parameters, name)
    some = replace(parameters, **{name: torch.where(chosen, torch.full_like(before, value), before)})
    out, untouched = (augment(images, each, out_dtype=torch.float32) for each in (some, parameters))
    assert torch.equal(out[~chosen], untouched[~chosen])
    assert ((out - untouched).abs().amax((1, 2, 3)) > 0.01).equal(chosen)
    torch.testing.assert_close(out, batched(images, some), atol=1e-6, rtol=0)


def test_blur_sigma_none_is_sigma_zero(batched) -> None:
    images, parameters = pictures(8), replace(draw_parameters(8), blur_sigma=torch.zeros(8))
    nobody = replace(parameters, blur_sigma=None)
    expected = augment(images, parameters, out_dtype=torch.float32)
    assert torch.equal(augment(images, nobody, out_dtype=torch.float32), expected)
    assert torch.equal(batched(images, nobody), batched(images, parameters))


def test_concurrent_threads_give_the_same_result() -> None:
    def run(seed: int) -> Tensor:
        return augment(pictures(40, seed=seed), draw_parameters(40, seed), out_dtype=torch.bfloat16)

    expected = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for seed, out in enumerate(pool.map(run, list(range(4)) * 4)):
            assert torch.equal(out, expected[seed % 4])


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    images, parameters = pictures(4), draw_parameters(4)
    expected = augment(images, parameters, out_dtype=torch.float32)
    for name in ("blockwise", "reference"):
        with use_backend(name):
            assert torch.equal(augment(images, parameters, out_dtype=torch.float32), expected)
    with use_backend("triton"), pytest.raises(RuntimeError, match='"triton" was chosen, but'):
        augment(images, parameters, out_dtype=torch.float32)


def test_autocast_does_not_lower_the_precision() -> None:
    images, parameters = pictures(6), draw_parameters(6)
    expected = augment(images, parameters, out_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(images, parameters, out_dtype=torch.float32), expected)


def test_compiles_without_graph_breaks() -> None:
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")
    images, parameters = pictures(4), draw_parameters(4)
    out = compiled(images, parameters, out_dtype=torch.float32)
    expected = augment(images, parameters, out_dtype=torch.float32)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_errors_name_what_was_given_and_what_is_allowed() -> None:
    images, parameters = pictures(4), neutral(4)

    def call(images: Tensor = images, out_dtype: torch.dtype = torch.float32, **fields: Tensor) -> Tensor:
        return augment(images, replace(parameters, **fields), out_dtype=out_dtype)

    with pytest.raises(TypeError, match=r"float32 were given; augment takes torch\.uint8"):
        call(images.float())
    with pytest.raises(ValueError, match=r"\[4, 3, 32, 32\] were given; augment takes \[B, H, W, 3\]"):
        call(images.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="not empty"):
        call(images[:0])
    with pytest.raises(TypeError, match=r"out_dtype torch\.float64 was given; allowed are torch\.float32"):
        call(out_dtype=torch.float64)
    with pytest.raises(ValueError, match=r"parameters\.hue of shape \[3\] was given; it must be \[4\]"):
        call(hue=torch.zeros(3))
    with pytest.raises(ValueError, match=r"parameters\.order of shape \[4, 3\]"):
        call(order=torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"parameters\.flip of dtype torch\.uint8 was given; it must be torch\.bool"):
        call(flip=torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"parameters\.contrast on meta was given; the images are on cpu"):
        call(contrast=torch.ones(4, device="meta"))
    with pytest.raises(ValueError, match="three positive numbers"):
        replace(parameters, std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="three numbers"):
        replace(parameters, mean=(1.0, 1.0))  # type: ignore[arg-type]
