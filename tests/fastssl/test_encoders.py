"""Encoders against torchvision, timm and float64."""

from __future__ import annotations

import re
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.errors import ConfigError
from fastssl.models.encoders import ENCODERS, build_encoder
from fastssl.models.norm import SplitBatchNorm2d, norm_layer
from fastssl_pipelines.errors import install_command

RESNETS = [name for name in ENCODERS if name in torchvision.models.list_models()]


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


class TestEncoders:
    @pytest.mark.parametrize("name", RESNETS)
    def test_state_dict_is_torchvisions_without_fc(self, name: str) -> None:
        with torch.device("meta"):
            ours, theirs = build_encoder(name), torchvision.models.get_model(name)
        theirs.fc = nn.Identity()
        assert list(shapes(ours).items()) == list(shapes(theirs).items())

    @pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
    def test_features_are_torchvisions(self, name: str) -> None:
        theirs = torchvision.models.get_model(name).eval()
        theirs.fc = nn.Identity()
        ours = build_encoder(name).eval()
        ours.load_state_dict(theirs.state_dict())
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(ours(images), theirs(images))

    def test_initialization_is_torchvisions(self) -> None:
        ours, theirs = build_encoder("resnet18").state_dict(), torchvision.models.resnet18().state_dict()
        for name, tensor in ours.items():
            if tensor.ndim == 4:
                assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.05), name
            else:
                assert torch.equal(tensor, theirs[name]), name

    @pytest.mark.parametrize(
        ("name", "width", "stages"),
        [("resnet18", 0.25, (16, 32, 64, 128)), ("resnet50", 0.5, (128, 256, 512, 1024))],
    )
    def test_width_scales_every_stage(self, name: str, width: float, stages: tuple[int, ...]) -> None:
        encoder = build_encoder(name, width=width, stem="small")
        x = encoder.conv1(torch.randn(2, 3, 16, 16))
        channels = []
        for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
            x = stage(x)
            channels.append(x.shape[1])
        assert tuple(channels) == stages
        assert encoder.feature_dim == stages[-1]
        assert encoder(torch.randn(2, 3, 16, 16)).shape == (2, stages[-1])

    @pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("small", 32), ("small-pool", 16)])
    def test_stem_sets_the_resolution(self, stem: str, side: int) -> None:
        encoder = build_encoder("resnet18", width=0.25, stem=stem)
        x = encoder.maxpool(encoder.conv1(torch.randn(1, 3, 32, 32)))
        assert x.shape[2:] == (side, side)

    def test_every_norm_layer_comes_from_the_factory(self) -> None:
        encoder = build_encoder("resnet18", width=0.25, norm_layer=norm_layer("split", splits=4))
        norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 20
        assert all(isinstance(module, SplitBatchNorm2d) and module.splits == 4 for module in norms)
        assert shapes(encoder) == shapes(build_encoder("resnet18", width=0.25))

    def test_channels_last_is_kept_to_the_last_stage(self) -> None:
        encoder = build_encoder("resnet18", width=0.25, stem="small", norm_layer=norm_layer("split", splits=2))
        encoder = encoder.to(memory_format=torch.channels_last)
        layouts = []
        encoder.layer4.register_forward_hook(
            lambda module, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
        )
        encoder(torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last))
        assert layouts == [True]

    def test_errors(self) -> None:
        with pytest.raises(
            ConfigError, match=r"unknown encoder 'resnet19': known are resnet101.*did you mean 'resnet18'"
        ):
            build_encoder("resnet19")
        with pytest.raises(ConfigError, match=r"unknown stem 'smal': known are imagenet.*did you mean 'small'"):
            build_encoder("resnet18", stem="smal")
        with pytest.raises(ValueError, match=r"width 0\.001 was given"):
            build_encoder("resnet18", width=0.001)
        with pytest.raises(ValueError, match="a timm model has its own"):
            build_encoder("timm/vit_small_patch16_224", stem="small")

    def test_missing_timm_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(ConfigError, match=re.escape(install_command("timm"))):
            build_encoder("timm/vit_small_patch16_224")

    @pytest.mark.parametrize(
        ("name", "side"), [("resnet10t", 64), ("test_vit", 160), ("test_efficientnet", 64), ("test_convnext", 64)]
    )
    def test_timm_model(self, name: str, side: int) -> None:
        encoder = build_encoder(f"timm/{name}")
        assert encoder(torch.randn(2, 3, side, side)).shape == (2, encoder.feature_dim)
        assert shapes(encoder) == shapes(timm.create_model(name, num_classes=0))
        with pytest.raises(ConfigError, match=r"unknown timm model 'resnet10x'.*did you mean"):
            build_encoder("timm/resnet10x")


class _Convolutions(TorchDispatchMode):
    """Records (input channels, kernel width, stride) of every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.convolution.default:
            self.seen.append((args[0].shape[1], args[1].shape[3], args[3][0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [1 / 32, 1 / 16, 3 / 32, 1 / 8, 1 / 4])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_narrow_encoders_avoid_the_convolution_that_onednn_gets_wrong(name: str, width: float) -> None:
    """Backward of a strided 1x1 convolution of a few channels writes past its workspace, uxlfoundation/oneDNN#6035."""
    encoder = build_encoder(name, width=width, stem="small").to(memory_format=torch.channels_last)
    with _Convolutions() as convolutions, torch.no_grad():
        encoder(torch.rand(2, 3, 16, 16))
    strided = [channels for channels, kernel, stride in convolutions.seen if (kernel, stride) == (1, 2)]
    assert all(channels >= 16 for channels in strided)
    assert len([1 for _, kernel, _ in convolutions.seen if kernel == 1]) >= 3


def test_gradients_of_a_narrow_encoder_are_those_of_float64() -> None:
    # At one seed in 40 float32 rounds the input of a ReLU to the other side of zero
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", width=1 / 16, stem="small").to(memory_format=torch.channels_last).eval()
    images = torch.rand(16, 3, 32, 32).to(memory_format=torch.channels_last)
    encoder(images).square().sum().backward()
    exact = build_encoder("resnet18", width=1 / 16, stem="small").double().eval()
    exact.load_state_dict(encoder.state_dict())
    # Without oneDNN's kernels, which have no float64
    exact(images.double()).square().sum().backward()
    for (name, parameter), other in zip(encoder.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        error = (parameter.grad - other.grad).norm() / other.grad.norm()
        assert error < 1e-5, name
