"""Encoders by name: ResNets with a chosen width, stem and batch norm, any timm model, and those of plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeVar, cast

from torch import Tensor, nn
from torch.nn import functional

from fastssl.errors import ConfigError, unknown_name
from fastssl.models.norm import NormLayer
from fastssl.registration import Registry
from fastssl_pipelines.errors import install_command


class Encoder(nn.Module):
    """A module that maps images [B, 3, H, W] to features [B, feature_dim]."""

    feature_dim: int


class _Architecture(NamedTuple):
    block: Literal["BasicBlock", "Bottleneck"]
    blocks: tuple[int, int, int, int]
    base_width: int = 64


_RESNETS = {
    "resnet18": _Architecture("BasicBlock", (2, 2, 2, 2)),
    "resnet34": _Architecture("BasicBlock", (3, 4, 6, 3)),
    "resnet50": _Architecture("Bottleneck", (3, 4, 6, 3)),
    "resnet101": _Architecture("Bottleneck", (3, 4, 23, 3)),
    "resnet152": _Architecture("Bottleneck", (3, 8, 36, 3)),
    "wide_resnet50_2": _Architecture("Bottleneck", (3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": _Architecture("Bottleneck", (3, 4, 23, 3), base_width=128),
}
_STEMS = ("imagenet", "small", "small-pool")
ENCODERS: Registry[Callable[..., Encoder]] = Registry("encoder")
"""Functions of the keywords `width`, `stem` and `norm_layer` of `build_encoder`."""
_Registered = TypeVar("_Registered", bound=Callable[..., Encoder])


def register_encoder(name: str) -> Callable[[_Registered], _Registered]:
    """Decorator: make an encoder available as --model.encoder `name`; ConfigError if that name is taken.

    It decorates a function, or a subclass of `Encoder`, of the keywords `width`, `stem` and `norm_layer`, see
    `build_encoder`; one that cannot honor a keyword raises ConfigError for values other than the default.
    """

    def register(make: _Registered) -> _Registered:
        ENCODERS.register(name, make, make)
        return make

    return register


def build_encoder(
    name: str,
    *,
    width: float = 1.0,
    stem: str = "imagenet",
    norm_layer: NormLayer = nn.BatchNorm2d,
) -> Encoder:
    """Build the encoder called `name`, freshly initialized.

    `width` multiplies the channels of every stage. `stem`: "imagenet" (7x7 convolution of stride 2, max-pool), "small"
    (3x3, stride 1, no max-pool; CIFAR) or "small-pool" (3x3, stride 1, max-pool). `norm_layer` makes a norm layer from
    a channel count, see `fastssl.models.norm.norm_layer`. At width 1 with the imagenet stem the state dict is
    torchvision's without fc. "timm/<model>" is a timm model with its own stem, width and norm, other names are those
    of `register_encoder`. ConfigError for an unknown name.
    """
    if name.startswith("timm/"):
        if width != 1 or stem != "imagenet" or norm_layer is not nn.BatchNorm2d:
            raise ConfigError(
                f"encoder {name!r} was given with a width, stem or split batch norm; a timm model has its own: "
                "use --model.width 1 --model.stem imagenet --model.norm local"
            )
        return _build_timm(name.removeprefix("timm/"))
    if name not in ENCODERS:
        raise unknown_name("encoder", name, (*ENCODERS, "timm/<model>"), pluggable=True)
    encoder = ENCODERS[name](width=width, stem=stem, norm_layer=norm_layer)
    if not isinstance(getattr(encoder, "feature_dim", None), int):
        raise ConfigError(
            f"encoder {name!r} was given, which has no feature_dim; its plug-in must set it to an integer"
        )
    return encoder


class ResNet(Encoder):
    """torchvision's ResNet without fc: the same blocks, names and initialization (residuals not at zero)."""

    def __init__(self, architecture: _Architecture, *, width: float, stem: str, norm_layer: NormLayer) -> None:
        super().__init__()
        if stem not in _STEMS:
            raise unknown_name("stem", stem, _STEMS)
        if round(64 * width) < 1:
            raise ConfigError(f"width {width} was given; it must leave at least one of 64 channels")
        channels = round(64 * width)
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = norm_layer(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "small" else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(architecture, 0, channels, channels, norm_layer)
        expansion = 1 if architecture.block == "BasicBlock" else 4
        self.layer2 = _stage(architecture, 1, channels * expansion, 2 * channels, norm_layer)
        self.layer3 = _stage(architecture, 2, 2 * channels * expansion, 4 * channels, norm_layer)
        self.layer4 = _stage(architecture, 3, 4 * channels * expansion, 8 * channels, norm_layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.feature_dim = 8 * channels * expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)


for _name, _architecture in _RESNETS.items():
    ENCODERS.register(_name, partial(ResNet, _architecture), ResNet)


class _Shortcut(nn.Conv2d):
    """The 1x1 convolution around a block that changes its input's shape."""

    def forward(self, x: Tensor) -> Tensor:
        # With fewer channels than a CPU vector holds, oneDNN's backward of a strided convolution writes past its
        # workspace (uxlfoundation/oneDNN#6035): a hang, a crash or a wrong gradient. Striding here avoids it.
        if x.is_cpu and self.in_channels < 16:
            rows, columns = self.stride
            return functional.conv2d(x[:, :, ::rows, ::columns], self.weight)
        return super().forward(x)


def _stage(architecture: _Architecture, index: int, inputs: int, planes: int, norm_layer: NormLayer) -> nn.Sequential:
    # Imported late, as it loads torch's compiler: 1 to 7 seconds that most commands do not need
    from torchvision.models import resnet

    block, base_width = getattr(resnet, architecture.block), architecture.base_width
    outputs = planes * block.expansion
    stride = 1 if index == 0 else 2
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(_Shortcut(inputs, outputs, 1, stride, bias=False), norm_layer(outputs))
    first = block(inputs, planes, stride, downsample, base_width=base_width, norm_layer=norm_layer)
    others = (
        block(outputs, planes, base_width=base_width, norm_layer=norm_layer)
        for _ in range(architecture.blocks[index] - 1)
    )
    return nn.Sequential(first, *others)


def _build_timm(name: str) -> Encoder:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"encoder 'timm/{name}' was given and timm is not installed: {install_command('timm')}"
        ) from error
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    model = timm.create_model(name, num_classes=0)
    model.feature_dim = model.head_hidden_size
    # Not wrapped, so that the state dict is timm's own.
    return cast(Encoder, model)
