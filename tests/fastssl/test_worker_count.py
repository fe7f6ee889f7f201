"""Default number of workers."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from fastssl.config import DataConfig, from_json, to_json
from fastssl.data import open_splits
from fastssl.errors import ConfigError
from fastssl.executor import input_executor, worker_count
from fastssl.presets import load
from fastssl.train.identity import HARMLESS
from tests.pipelines import fake_cuda

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("cores", "ranks", "for_gpu", "for_cpu"),
    [
        (1, 1, 1, 2),
        (2, 1, 1, 2),
        (8, 1, 7, 2),
        (16, 1, 12, 4),
        (16, 4, 3, 2),
        (96, 8, 11, 3),
        (256, 1, 12, 12),
        (4, 8, 1, 2),  # More processes than cores
    ],
)
def test_workers_follow_the_cores_of_a_process(monkeypatch, cores, ranks, for_gpu, for_cpu):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert (worker_count(DataConfig(), GPU), worker_count(DataConfig(), CPU)) == (for_gpu, for_cpu)
    assert [worker_count(DataConfig(workers=given), device) for given in (0, 5) for device in (CPU, GPU)] == [
        0,
        0,
        5,
        5,
    ]


def test_without_cpu_affinity_all_cores_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    assert worker_count(DataConfig(), GPU) == 8


def test_an_invalid_number_of_processes_is_one_sentence(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "all")
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE is 'all' in the environment; it must be an integer"):
        worker_count(DataConfig(), CPU)


@pytest.mark.parametrize("workers", [None, 0, 7])
def test_configurations_with_and_without_a_number_round_trip(workers):
    config = load("mocov2-cifar10")
    assert config.data.workers is None
    config = replace(config, data=replace(config.data, workers=workers))
    assert from_json(to_json(config)).data.workers == workers
    assert "data.workers" in HARMLESS


@pytest.mark.parametrize(("workers", "count"), [(None, 1), (3, 0)])
def test_the_default_number_of_workers_on_a_gpu_is_logged(monkeypatch, notes, workers, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    config = load("mocov2-cifar10")
    data = replace(config.data, root=None, pictures=20, workers=workers)
    source = open_splits(replace(config, data=data)).train
    input_executor(data, source, device=CPU, dtype=torch.float32)
    assert notes.take() == []
    fake_cuda.install(monkeypatch)
    executor = input_executor(data, source, device=GPU, dtype=torch.float32)
    messages = [note for note in notes.take() if "--data.workers" in note]
    assert messages == [f"5 of 6 cores decode {source.name}; --data.workers chooses"] * count
    assert executor.workers == (workers or 5)
