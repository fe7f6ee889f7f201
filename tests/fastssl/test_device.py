"""The device of a rank, as torch.distributed requires it, on a simulated machine with two GPUs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fastssl.config import TrainConfig
from fastssl.device import choose_device
from fastssl.distributed import joined_ranks


@pytest.fixture
def _two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("_two_gpus")
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_gets_the_gpu_of_its_local_rank(rank, monkeypatch):
    """`torch.cuda.set_device` refuses a device without an index, which once stopped every run on several GPUs."""
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert choose_device(TrainConfig()) == torch.device("cuda", rank)


@pytest.mark.usefixtures("_two_gpus")
def test_the_ranks_are_joined_on_their_own_gpus(monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", "29500")
    current, groups = [], []
    # torch's own conversion of a device to an index, before it touches CUDA
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: current.append(torch.cuda._utils._get_device_index(device))
    )
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: groups.append(options["device_id"]))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with joined_ranks(choose_device(TrainConfig()), timeout_s=1):
        pass
    assert current == [0]
    assert groups == [torch.device("cuda", 0)]
