"""One training step of each method; for MoCo v2 also of the plain loop and of lightly."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.sizes import Cut, Sizes
from bench.moco_steps import IMPLEMENTATIONS, SETTINGS, Setting
from bench.peers import Unavailable
from fastssl.benchmark.step_variants import as_training, synthetic_batches
from fastssl.config import Config
from fastssl.methods import METHODS
from fastssl.methods.moco import MoCoV1Config
from fastssl.presets import load

PEERS = [name for name in IMPLEMENTATIONS if name != "fastssl"]


@pytest.mark.parametrize("implementation", [*METHODS, *PEERS])
@pytest.mark.parametrize("setting", SETTINGS, ids=[setting.name for setting in SETTINGS])
def test_step(
    benchmark: BenchmarkFixture, device: torch.device, sizes: Sizes, setting: Setting, implementation: str
) -> None:
    """Measure the CIFAR-10 presets, not compiled, on random views in memory; peers use mocov2's."""
    benchmark.group = f"training step, ResNet-18, 32 px, {setting.name}"
    config = configuration("mocov2" if implementation in PEERS else implementation, sizes.step)
    batches = [as_training(batch, setting.dtype, setting.layout) for batch in synthetic_batches(config, device)]
    turns = itertools.cycle(batches)
    try:
        step = IMPLEMENTATIONS[implementation if implementation in PEERS else "fastssl"](config, device, setting)
    except Unavailable as error:
        pytest.skip(str(error))
    benchmark.extra_info["images"] = config.train.batch_size
    first = step(batches[0]).item()
    last = benchmark(lambda: step(next(turns))).item()
    assert 0 < last < float("inf")
    assert last != first


def configuration(method: str, cut: Cut | None) -> Config:
    """The CIFAR-10 preset of a method; MoCo v1 has none and uses that of MoCo v2."""
    config = load(f"{'mocov2' if method == 'mocov1' else method}-cifar10")
    if method == "mocov1":
        config = replace(config, method=MoCoV1Config())
    if cut is None:
        return config
    rows = {"queue_size", "bank_size", "groups"} & {field.name for field in fields(config.method)}
    own = {name: min(getattr(config.method, name), cut.rows) for name in rows}
    return replace(
        config,
        model=replace(config.model, width=cut.width, stem="small-pool", norm="local"),
        method=replace(config.method, **own),
        train=replace(config.train, batch_size=cut.batch_size),
    )
