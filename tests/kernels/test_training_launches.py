"""Training in 16 bits runs the 16-bit kernels, and what it launches is compiled ahead of time.

One step of every preset's method; launches are recorded and not run, as on an H100.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fastssl.methods import METHODS, TrainProgress, sharded, smog
from fastssl.methods.queue_method import MomentumMethod
from fastssl.models.encoders import Encoder
from fastssl.models.kmeans import spherical_kmeans
from fastssl.presets import PRESETS, load
from fastssl_kernels import aot, ops
from fastssl_kernels.triton import bank_gradient, consistency, losses, nearest, read
from fastssl_kernels.triton.configuration import Configuration, launched
from fastssl_kernels.triton.launch import H100_PROCESSORS, noted_launches
from fastssl_pipelines.batch import Batch
from tests.fastssl.small_methods import SHARDABLE

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FIRST_ENTRY = 0x7FFFFFFF  # As stored by `nearest_kernel`

# Kernels with products by preset: dtype of the bank, rows x entries x features of a tile, how float32 is multiplied.
IN_16_BITS = {
    "quickstart": ["labeled_read_kernel bf16 32x32x128"],
    "mocov1-imagenet": ["read_kernel bf16 128x64x128"],
    "mocov2-imagenet": ["read_kernel bf16 128x64x128"],
    "mocov2-symmetric-cifar10": ["read_kernel bf16 128x64x128"],
    "unimoco-imagenet": ["labeled_read_kernel bf16 32x32x128"],
    "supcon-imagenet": ["labeled_read_kernel bf16 32x32x128"],
    "mixco-imagenet": ["read_kernel bf16 128x64x128"],
    "unmix-imagenet": ["read_kernel bf16 128x64x128"],
    "co2-imagenet": [
        "moment_gradient_kernel bf16 128x64x128",
        "moment_read_kernel bf16 64x64x128",
        "read_kernel bf16 128x64x128",
    ],
    "ressl-imagenet": ["read_kernel bf16 32x32x512"],
    "msvq-imagenet": ["read_kernel bf16 128x64x128"],
    # The groups have a gradient, so the loss reads them in float32
    "smog-imagenet": [
        "bank_gradient_kernel fp32 32x32x128 tf32x3",
        "nearest_kernel bf16 128x32x128",
        "read_kernel fp32 32x32x128 tf32x3",
    ],
}
SMOG_WITHOUT_GRADIENT = ["nearest_kernel bf16 128x32x128", "read_kernel bf16 128x32x128"]


class Averages(Encoder):
    """The smallest encoder that a method can train."""

    feature_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, self.feature_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.mean((2, 3)))


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_implementation", lambda *_: losses)
    for module in (bank_gradient, consistency, nearest, read):
        monkeypatch.setattr(module, "processors", lambda _: H100_PROCESSORS)
    monkeypatch.setattr(smog, "spherical_kmeans", partial(spherical_kmeans, rounds=1))


def launches(preset: str, precision: str, **options: Any) -> list[Configuration]:
    """Configurations compiled by a step at the end of an epoch: forward, backward and `after_step`."""
    config, dtype = load(preset), DTYPES[precision]
    method_config = replace(config.method, **options)
    if preset.startswith("smog"):
        method_config = replace(method_config, bank_size=3500)  # Enough for its groups
    views = tuple(replace(view, size=4) for view in config.views)
    method = METHODS[method_config.name](Averages(), method_config, views, dtype)
    count = config.train.batch_size
    batch = Batch(
        views=tuple(torch.randn(count, 3, 4, 4).to(memory_format=torch.channels_last) for _ in views),
        labels=torch.arange(count) % 10,
        ids=torch.arange(count),
        step=9,
    )
    found: list[Configuration] = []

    def note(kernel: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        found.append(launched(kernel, arguments, given))
        if kernel.__name__ == "nearest_kernel":
            arguments[kernel.arg_names.index("kept")].fill_(FIRST_ENTRY)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with noted_launches(note):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                output = method(batch)
            output.loss.backward()
            method.after_step(output, TrainProgress(9, 20, 10))
    finally:
        torch.set_float32_matmul_precision(before)
    return list({each.key: each for each in found}.values())


def with_products(configurations: list[Configuration]) -> list[str]:
    """One line for each kernel and tile."""
    lines = set()
    for kernel, constants, dtype, _, logits, *_ in configurations:
        if logits:
            tile = "x".join(str(constants[side]) for side in ("ROWS", "ENTRIES", "FEATURES"))
            precision = f" {constants['PRECISION']}" if dtype == torch.float32 else ""
            lines.add(f"{kernel.__name__} {NAMES[dtype]} {tile}{precision}")
    return sorted(lines)


@pytest.mark.parametrize("preset", IN_16_BITS)
def test_a_step_in_bf16_runs_the_kernels_of_16_bits(preset: str) -> None:
    assert with_products(launches(preset, "bf16")) == IN_16_BITS[preset]


def test_every_method_is_in_the_table() -> None:
    assert {load(preset).method.name for preset in IN_16_BITS} == set(METHODS)


def test_groups_without_gradient_are_read_in_bf16() -> None:
    assert with_products(launches("smog-imagenet", "bf16", groups_gradient=False)) == SMOG_WITHOUT_GRADIENT


def test_a_float32_queue_would_be_detected() -> None:
    assert with_products(launches("mocov2-cifar10", "fp32")) == ["read_kernel fp32 32x32x128 tf32x3"]
    assert with_products(launches("mocov2-cifar10", "tf32")) == ["read_kernel fp32 32x32x128 tf32"]


@pytest.fixture(scope="module")
def compiled() -> set[Any]:
    return {configuration.key for configuration in aot.configurations()}


# Every preset as it is trained, and one of each method in the other precisions
BY_METHOD = {load(preset).method.name: preset for preset in sorted(PRESETS, reverse=True)}
TRAINED = [(preset, "bf16") for preset in PRESETS]
TRAINED += [(preset, precision) for preset in BY_METHOD.values() for precision in DTYPES if precision != "bf16"]


@pytest.mark.parametrize(("preset", "precision"), TRAINED)
def test_what_training_launches_is_compiled_ahead_of_time(preset: str, precision: str, compiled: set[Any]) -> None:
    found = launches(preset, precision)
    assert [each for each in found if each.key not in compiled] == []
    assert found


@pytest.mark.slow
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", SHARDABLE)
def test_what_training_with_shards_launches_is_compiled_ahead_of_time(
    name: str, precision: str, compiled: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MomentumMethod, "losses", sharded)
    monkeypatch.setattr(sharded, "_of_all_shards", lambda rows: rows[None])
    found = launches(f"{name}-imagenet", precision)
    assert found
    assert [each for each in found if each.key not in compiled] == []
