"""Complete runs on several processes: they train as one, stop together, and none hangs."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest
import torch

from tests.fastssl.commands import commands_into
from tests.fastssl.test_runs import assert_same, final_state, records

pytestmark = pytest.mark.slow
STEPS = 16
# The rate is small, as training amplifies rounding differences
RUN = (
    f"--train.steps {STEPS} --train.batch-size 16 --train.checkpoint-every 5 --train.log-every 1 --train.device cpu "
    "--train.precision fp32 --train.timeout-s 8 --data.pictures 240 --data.workers 0 --model.width 0.0625 "
    "--model.norm split --model.splits 4 --method.queue-size 40 --method.head mlp --optim.lr 0.0005 "
    "--eval.every-epochs 20"
).split()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks") / "output.txt"


@pytest.fixture(scope="module")
def commands(output):
    with commands_into(output) as commands:
        yield commands


@pytest.fixture(scope="module")
def runs(commands, tmp_path_factory):
    """Folders of uninterrupted runs by number of ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2, 4):
        assert commands.run(["pretrain", *RUN, "--run.dir", str(folder / f"{ranks}")], ranks) == [0] * ranks
    return {ranks: folder / f"{ranks}" for ranks in (1, 2, 4)}


@pytest.fixture(scope="module")
def stopped(commands, tmp_path_factory):
    """The folder of a run that was stopped after a few steps by a signal to one of its two ranks."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    _, second = commands.start(["pretrain", *RUN, "--run.dir", str(folder)], 2)
    wait_for_step(commands, folder, 7)
    os.kill(second, signal.SIGUSR1)
    assert commands.exit_codes() == [75, 75]
    return folder


def wait_for_step(commands, folder, step):
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").exists() and any(r["step"] >= step for r in trained(folder))):
        assert time.monotonic() < deadline
        assert not commands.ended(within_s=0.002)


def trained(folder):
    return [record for record in records(folder) if record["event"] == "train"]


def assert_close_runs(folder, other):
    """Assert equality up to rounding."""
    for record, expected in zip(trained(folder), trained(other), strict=True):
        assert record["step"] == expected["step"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert record["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)
    state, expected = (final_state(run)["method"] for run in (folder, other))
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    knn, expected_knn = ([r["knn_top1"] for r in records(run) if r["event"] == "eval"] for run in (folder, other))
    assert knn[0] == expected_knn[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one_process(runs, ranks):
    assert_close_runs(runs[ranks], runs[1])


def test_all_ranks_stop_when_one_is_asked_to(stopped):
    (end,) = [record for record in records(stopped) if record["event"] == "end"]
    assert end["reason"] == "stopped"
    assert 7 <= end["step"] < STEPS
    assert final_state(stopped)["step"] == end["step"]


def test_a_run_resumed_on_as_many_ranks_is_the_same_bit_for_bit(commands, runs, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    assert commands.run(["resume", str(tmp_path / "run")], 2) == [0, 0]
    assert_same(final_state(tmp_path / "run"), final_state(runs[2]))


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_resumes_with_another_number_of_ranks(commands, runs, stopped, tmp_path, ranks):
    shutil.copytree(stopped, tmp_path / "run")
    assert commands.run(["resume", str(tmp_path / "run")], ranks) == [0] * ranks
    assert_close_runs(tmp_path / "run", runs[1])


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stuck"])
def test_the_others_end_when_a_rank_does_not_answer(commands, output, runs, tmp_path, signum):
    folder = tmp_path / "run"
    _, victim = commands.start(["pretrain", *RUN, "--run.dir", str(folder), "--train.steps", "100000"], 2)
    wait_for_step(commands, folder, 6)
    before = output.stat().st_size
    os.kill(victim, signum)
    deadline = time.monotonic() + 60
    while "rank 0 ends too" not in output.read_bytes()[before:].decode():
        assert time.monotonic() < deadline, output.read_bytes()[before:].decode()
        time.sleep(0.1)
    os.kill(victim, signal.SIGKILL)
    assert commands.exit_codes() == [1, -signal.SIGKILL]
    assert final_state(folder)["step"] >= 5  # It can resume from there


def test_bad_numbers_of_processes_are_refused_in_a_sentence(commands, output, tmp_path):
    before = output.stat().st_size
    assert commands.run(["pretrain", *RUN, "--run.dir", str(tmp_path / "run"), "--model.splits", "2"], 4) == [2] * 4
    text = output.read_bytes()[before:].decode()
    assert "fastssl (rank 3): --model.splits 2 was given with 4 processes" in text
    assert not (tmp_path / "run").exists()
