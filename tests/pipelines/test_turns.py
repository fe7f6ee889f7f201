"""Workers next to a step on all cores: they start when the consumer waits for a batch, and never wait long."""

from __future__ import annotations

import multiprocessing
import threading

import numpy as np
import pytest
import torch

from fastssl_pipelines import ArraySource, TrainSampler, build_executor
from fastssl_pipelines.executors import turns
from fastssl_pipelines.executors.turns import Turns
from tests.pipelines.photos import NORMALIZATION, plan_of

LONG_S = 60.0


@pytest.fixture(autouse=True)
def long_waits(monkeypatch):
    monkeypatch.setattr(turns, "_AT_MOST_S", LONG_S)


def of(monkeypatch, workers, threads=4):
    monkeypatch.setattr(turns, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    return Turns(multiprocessing.get_context("spawn"), workers)


def waiting(turns):
    """Start a thread that waits like a worker; returns it with a check whether it still waits."""
    worker = threading.Thread(target=turns.wait, daemon=True)
    worker.start()
    worker.join(0.2)
    return worker, worker.is_alive()


def test_workers_start_at_will_before_the_consumer_waits(monkeypatch):
    turns = of(monkeypatch, 1)
    assert [waiting(turns)[1] for _ in range(3)] == [False] * 3


def test_each_worker_starts_once_per_wait(monkeypatch):
    turns = of(monkeypatch, 2)
    turns.give()
    turns.give()
    assert [waiting(turns)[1] for _ in range(2)] == [False] * 2
    worker, waits = waiting(turns)
    assert waits
    turns.give()
    worker.join(LONG_S / 2)
    assert not worker.is_alive()


def test_waiting_workers_continue_at_the_end_of_a_stream(monkeypatch):
    turns = of(monkeypatch, 1)
    turns.give()
    turns.wait()
    worker, waits = waiting(turns)
    assert waits
    turns.end()
    worker.join(LONG_S / 2)
    assert not worker.is_alive()
    assert not waiting(turns)[1]


def test_a_step_that_leaves_a_core_free_holds_up_no_worker(monkeypatch):
    turns = of(monkeypatch, 1, threads=3)
    turns.give()
    assert [waiting(turns)[1] for _ in range(3)] == [False] * 3


def test_a_worker_is_held_for_half_a_second_and_no_longer(monkeypatch):
    turns = of(monkeypatch, 1)
    turns.give()
    turns.wait()
    monkeypatch.setattr("fastssl_pipelines.executors.turns._AT_MOST_S", 0.01)
    assert not waiting(turns)[1]


def test_a_stream_gives_turns_while_it_waits_and_ends_them_with_its_consumer(monkeypatch):
    calls = []
    for name in ("give", "end"):
        real = getattr(Turns, name)
        monkeypatch.setattr(Turns, name, lambda self, name=name, real=real: (calls.append(name), real(self)))
    source = ArraySource("black", np.zeros((8, 32, 32, 3), np.uint8), np.zeros(8, int), ("a",))
    executor = build_executor("torchvision", source, workers=1, **NORMALIZATION)
    stream = executor.stream(TrainSampler(plan_of(source), batch_size=4), 0, 10**9)
    for _ in range(20):
        next(stream)
    assert "give" in calls
    stream.close()
    assert calls[-1] == "end"
