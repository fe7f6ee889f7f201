"""Small methods in the state of a run halfway through, and batches for them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from fastssl.methods import METHODS, TrainProgress
from fastssl.models.encoders import Encoder
from fastssl.models.norm import NormLayer, norm_layer
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.views import ViewSpec

BATCH, DIM, QUEUE, MOMENTUM, LR = 16, 24, 40, 0.9, 0.05
STEPS_PER_EPOCH, TOTAL_STEPS = 5, 50
SMALL = {
    "dim": DIM,
    "momentum": MOMENTUM,
    "temperature": 0.15,
    "queue_size": QUEUE,
    "bank_size": QUEUE,
    "groups": 6,
}
"""Options for every method that has them; a method adds its own in `small_options`."""
VARIANTS = {name: (name, {}) for name in METHODS} | {
    f"{name} {words}": (name, options)
    for name, cls in METHODS.items()
    for words, options in vars(cls).get("variants", {}).items()
}
SHARDABLE = [name for name, cls in METHODS.items() if getattr(cls.Config, "shardable", False)]


class SmallEncoder(Encoder):
    """Two convolutions with batch norm: all that a method needs of an encoder, in a tenth of a ResNet's time."""

    feature_dim = 20

    def __init__(self, layer: NormLayer) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, stride=2, bias=False), nn.Conv2d(12, 20, 3, bias=False)
        self.bn1, self.bn2 = layer(12), layer(20)

    def forward(self, images: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(images)).relu())).relu().mean((2, 3))


def sizes(name):
    return METHODS[name].small_views or (16,) * METHODS[name].number_of_views


def build(name: str, norm: str = "split", splits: int = 4, bank_dtype=torch.float32, **options) -> nn.Module:
    """A small method in the state of a run halfway through."""
    torch.manual_seed(7)
    encoder = SmallEncoder(norm_layer(norm, splits))
    method_class = METHODS[name]
    fields = {field.name for field in dataclasses.fields(method_class.Config)}
    small = {option: value for option, value in SMALL.items() if option in fields} | method_class.small_options
    views = tuple(ViewSpec(size=size) for size in sizes(name))
    method = method_class(encoder, method_class.Config(**{**small, **options}), views, bank_dtype)
    with torch.no_grad():
        for module_name, module in method.named_children():
            if "key_encoder" in module_name:
                for parameter in module.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            elif "queue" in module_name:
                module.labels.copy_((module.first + torch.arange(len(module.labels))) % 5 - 1)
        if hasattr(method, "group_momentum"):
            method.group_momentum.fill_(0.8)
    return method


def a_batch(name: str, step: int = 3, count: int = BATCH) -> Batch:
    generator = torch.Generator().manual_seed(step)
    views = tuple(
        torch.randn(count, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
        for size in sizes(name)
    )
    labels = torch.randint(-1, 4, (count,), generator=generator)
    return Batch(views=views, labels=labels, ids=torch.arange(count), step=step)


def sgd(method):
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=LR)


def first_gradient(method):
    """Gradient of the encoder's first layer."""
    return method.encoder().conv1.weight.grad


def a_step(method, optimizer, batch):
    """One step as TrainStep does it; returns the output and the gradient of the encoder's first layer."""
    torch.manual_seed(batch.step)
    output = method(batch)
    output.loss.backward()
    gradient = first_gradient(method).clone()
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(output, TrainProgress(batch.step, TOTAL_STEPS, STEPS_PER_EPOCH))
    return output, gradient


def follow(target, source, momentum):
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.mul_(momentum).add_(new, alpha=1 - momentum)


def one_loss(name, seed=5, **options):
    """Loss of one batch and gradient of the first layer, from fixed weights and random numbers."""
    method = build(name, **options)
    torch.manual_seed(seed)
    loss = method(a_batch(name)).loss
    loss.backward()
    return loss.detach(), first_gradient(method)
