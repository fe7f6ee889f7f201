"""The number of threads adapts to the load of the machine, which is simulated."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastssl import start
from fastssl.train.thread_choice import ThreadChoice

CORES = 4


class Machine:
    """Steps of 1 s of work on cores that `busy` other threads use too; a waiting thread delays all others."""

    def __init__(self, monkeypatch) -> None:
        self.threads, self.busy, self.steps, self.spent_s = CORES, 0, 0, 0.0
        self.messages: list[str] = []
        monkeypatch.setattr(torch, "get_num_threads", lambda: CORES)
        monkeypatch.setattr(torch, "set_num_threads", self.set)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)

    def set(self, count: int) -> None:
        self.threads = count

    def train(self, choice: ThreadChoice, steps: int) -> None:
        for _ in range(steps):
            core_share = min(1, CORES / (self.threads + self.busy))
            seconds = 1 / self.threads / core_share * (1 if core_share == 1 else 3)
            self.spent_s += seconds
            choice.add(seconds)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_an_idle_machine_uses_all_threads_and_loses_little_time(machine):
    machine.train(ThreadChoice(machine.messages.append, fixed=False), 1000)
    assert machine.threads == CORES
    assert machine.spent_s < 1.02 * 1000 / CORES
    assert not machine.messages


def test_other_load_reduces_the_threads_and_its_end_restores_them(machine):
    choice = ThreadChoice(machine.messages.append, fixed=False)
    machine.train(choice, 300)
    machine.busy = 2
    machine.train(choice, 300)
    assert machine.threads == 2
    assert len(machine.messages) == 1
    assert "on 2 of 4 threads" in machine.messages[0]
    assert "OMP_NUM_THREADS" in machine.messages[0]
    machine.busy = 0
    machine.train(choice, 300)
    assert machine.threads == CORES
    assert "on 4 of 4 threads" in machine.messages[1]


def test_a_machine_that_is_busy_from_the_start_gets_one_thread(machine):
    machine.busy = 3
    machine.train(ThreadChoice(machine.messages.append, fixed=False), 100)
    assert machine.threads == 1


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_users_setting_stays(name, machine, monkeypatch):
    monkeypatch.setenv(name, "4")
    machine.busy = 3
    machine.train(ThreadChoice(machine.messages.append, fixed=False), 100)
    assert machine.threads == CORES


def test_a_deterministic_run_keeps_its_threads(machine):
    machine.busy = 3
    machine.train(ThreadChoice(machine.messages.append, fixed=True), 100)
    assert machine.threads == CORES


@pytest.mark.parametrize(
    ("given", "free", "expected"),
    [
        ({}, 2.0, None),
        ({}, 1.0, "0"),
        ({"GOMP_SPINCOUNT": "7"}, 1.0, "7"),
        ({"OMP_WAIT_POLICY": "active"}, 1.0, None),
        ({"KMP_BLOCKTIME": "5"}, 1.0, None),
    ],
)
def test_waiting_threads_sleep_on_a_busy_machine_unless_the_user_chose(given, free, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "restored afterwards, whoever sets it")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(start, "_our_cores", lambda: 2)
    monkeypatch.setattr(start, "_free_cores", lambda: free)
    start.let_waiting_threads_sleep()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_free_cores_are_computed_from_proc_stat(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    counts = iter(["cpu 100 0 10 500 5 1 1 3 0 0", "cpu 104 1 11 512 6 1 1 4 0 0"])  # 13 of 20 idle
    monkeypatch.setattr(start, "_STAT", stat)
    monkeypatch.setattr(start.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(start.time, "sleep", lambda _: stat.write_text(next(counts) + "\ncpu0 1 2 3\n"))
    start.time.sleep(0)
    assert start._free_cores() == 8 * 13 / 20


def test_torch_is_not_loaded_before_threads_are_configured():
    code = "import sys; from fastssl import start; start.let_waiting_threads_sleep(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
