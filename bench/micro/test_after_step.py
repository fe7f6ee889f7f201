"""What follows a step: the momentum encoder and the queue, next to the official code and torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bench.micro.sizes import Sizes
from fastssl.models.ema import ema_update_, momentum_copy
from fastssl.models.encoders import build_encoder
from fastssl.models.queue import KeyQueue

MOMENTUM = 0.999


@torch.no_grad()
def _plain_loop(target: nn.Module, source: nn.Module) -> None:
    """The loop of MoCo's official code."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.data = old.data * MOMENTUM + new.data * (1 - MOMENTUM)


def _swa_utils(target: nn.Module, source: nn.Module) -> None:
    get_ema_multi_avg_fn(MOMENTUM)(list(target.parameters()), list(source.parameters()), None)


AVERAGES: dict[str, Callable[[nn.Module, nn.Module], None]] = {
    "fastssl": lambda target, source: ema_update_(target, source, MOMENTUM),
    "plain loop": _plain_loop,
    "torch swa_utils": _swa_utils,
}


@pytest.mark.parametrize("implementation", AVERAGES)
def test_momentum_encoder(benchmark: BenchmarkFixture, device: torch.device, sizes: Sizes, implementation: str) -> None:
    benchmark.group = f"EMA of {sizes.encoder}, width {sizes.width:g}"
    source = build_encoder(sizes.encoder, width=sizes.width).to(device)
    target = momentum_copy(source)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    start = [parameter.clone() for parameter in target.parameters()]
    update = AVERAGES[implementation]
    update(target, source)
    for old, new, before in zip(target.parameters(), source.parameters(), start, strict=True):
        torch.testing.assert_close(old, MOMENTUM * before + (1 - MOMENTUM) * new, rtol=1e-6, atol=1e-7)
    benchmark(update, target, source)


class _OfficialQueue(nn.Module):
    """MoCo's queue with UniMoCo's labels; its position is on the device, so every step waits for it."""

    keys: Tensor
    labels: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor, _: int) -> None:
        position = int(self.position)
        self.keys[:, position : position + len(keys)] = keys.T
        self.labels[position : position + len(keys)] = labels
        self.position[0] = (position + len(keys)) % len(self.labels)


@pytest.mark.parametrize("implementation", ["fastssl", "official MoCo"])
def test_enqueue(benchmark: BenchmarkFixture, device: torch.device, sizes: Sizes, implementation: str) -> None:
    size, dim = sizes.queue
    benchmark.group = f"enqueue {sizes.batch_size} keys of {dim} into {size}"
    queue = (KeyQueue if implementation == "fastssl" else _OfficialQueue)(size, dim).to(device)
    batches = size // sizes.batch_size
    keys = normalize(torch.randn(batches, sizes.batch_size, dim, device=device), dim=2)
    labels = torch.arange(sizes.batch_size, device=device)
    step = itertools.count()

    def enqueue() -> None:
        index = next(step)
        queue.enqueue(keys[index % batches], labels, index)

    for _ in range(batches + 1):  # The last one wraps around
        enqueue()
    held = queue.keys if implementation == "fastssl" else queue.keys.T
    torch.testing.assert_close(held.float(), keys.flatten(0, 1), rtol=0, atol=0)
    assert torch.equal(queue.labels, labels.repeat(batches))
    benchmark(enqueue)
