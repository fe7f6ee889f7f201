"""The number of threads follows the machine: on one of paper, whose steps take what its other work leaves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastssl.train.threads import ThreadChoice

CORES = 4


class Machine:
    """Steps of 1 s of work, on cores that `busy` others use as well; a thread that has to wait holds up all others."""

    def __init__(self, monkeypatch) -> None:
        self.threads, self.busy, self.steps, self.spent_s = CORES, 0, 0, 0.0
        self.said: list[str] = []
        monkeypatch.setattr(torch, "get_num_threads", lambda: CORES)
        monkeypatch.setattr(torch, "set_num_threads", self.set)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)

    def set(self, count: int) -> None:
        self.threads = count

    def train(self, choice: ThreadChoice, steps: int) -> None:
        for _ in range(steps):
            share = min(1, CORES / (self.threads + self.busy))
            seconds = 1 / self.threads / share * (1 if share == 1 else 3)
            self.spent_s += seconds
            choice.add(seconds)


@pytest.fixture
def paper(monkeypatch):
    return Machine(monkeypatch)


def test_an_idle_machine_computes_with_all_threads_and_loses_little(paper):
    paper.train(ThreadChoice(paper.said.append, fixed=False), 1000)
    assert paper.threads == CORES
    assert paper.spent_s < 1.02 * 1000 / CORES
    assert not paper.said


def test_other_work_is_made_room_for_and_its_end_is_noticed(paper):
    choice = ThreadChoice(paper.said.append, fixed=False)
    paper.train(choice, 300)
    paper.busy = 2
    paper.train(choice, 300)
    assert paper.threads == 2
    assert len(paper.said) == 1
    assert "by 2 of 4 threads" in paper.said[0]
    assert "OMP_NUM_THREADS" in paper.said[0]
    paper.busy = 0
    paper.train(choice, 300)
    assert paper.threads == CORES
    assert "by 4 of 4 threads" in paper.said[1]


def test_a_machine_that_is_busy_from_the_start(paper):
    paper.busy = 3
    paper.train(ThreadChoice(paper.said.append, fixed=False), 100)
    assert paper.threads == 1


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_user_has_set_stays(name, paper, monkeypatch):
    monkeypatch.setenv(name, "4")
    paper.busy = 3
    paper.train(ThreadChoice(paper.said.append, fixed=False), 100)
    assert paper.threads == CORES


def test_a_run_that_must_repeat_keeps_its_threads(paper):
    paper.busy = 3
    paper.train(ThreadChoice(paper.said.append, fixed=True), 100)
    assert paper.threads == CORES


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_the_program_says_how_threads_wait_before_torch_is_there(given, monkeypatch):
    code = (
        "import os, sys; from fastssl.start import wait_briefly; wait_briefly(); assert 'torch' not in sys.modules; "
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = given.get("GOMP_SPINCOUNT", "None") if given else "30000"
    assert run.stdout.strip() == expected
