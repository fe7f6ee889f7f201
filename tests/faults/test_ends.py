"""How runs end: by one or two signals, between log lines, before training, and out of memory."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from fastssl.cli import main
from tests.fastssl.commands import commands_into
from tests.fastssl.test_runs import assert_same, final_state
from tests.faults.runs import PICTURES, TINY, sentence, train

STEPS = 60
# Checkpoints and log lines at different steps
UNEVEN = ["--train.steps", str(STEPS), "--train.log-every", "5", "--train.checkpoint-every", "7"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with commands_into(tmp_path_factory.mktemp("output") / "output.txt") as commands:
        yield commands


@pytest.fixture(scope="module")
def alone(commands, tmp_path_factory):
    """The same run without interruptions."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert commands.run(["pretrain", *TINY, *PICTURES, *UNEVEN, "--run.dir", str(folder)]) == [0]
    return folder


def log_of(folder):
    """The records of the log, without times and restarts."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("event", "step", "loss", "lr", "gradient_norm", "contrast_accuracy", "knn_top1", "reason")
    kept = [record for record in records if record["event"] in ("train", "eval", "end")]
    return [{name: record[name] for name in names if name in record} for record in kept]


def checkpointed(folder):
    """The last step with a checkpoint, or -1."""
    return max((int(path.stem.removeprefix("step_")) for path in (folder / "checkpoints").glob("*.pt")), default=-1)


def stop_after(commands, folder, arguments, step, signum, wait_s):
    """Start a command and send it a signal `wait_s` seconds after the checkpoint of `step` appears."""
    (process,) = commands.start(arguments)
    while not commands.ended(within_s=0.001) and checkpointed(folder) < step:
        pass
    commands.ended(within_s=wait_s)
    os.kill(process, signum)
    return commands.exit_codes()[0]


def stopped_and_resumed(commands, folder, seed, signum):
    """Stop a run three times, then let it end; returns the steps after which it was stopped."""
    generator = random.Random(seed)
    stops, step = [], 0
    for _ in range(3):
        resumes = (folder / "config.json").exists()
        new = ["pretrain", *TINY, *PICTURES, *UNEVEN, "--run.dir", str(folder)]
        arguments = ["resume", str(folder)] if resumes else new
        stop_after(commands, folder, arguments, step, signum, generator.uniform(0, 0.2))
        stops.append(checkpointed(folder))
        step = stops[-1] + generator.randrange(1, 8)
    assert commands.run(["resume", str(folder)]) == [0]
    return stops


@pytest.mark.slow
def test_the_log_of_a_stopped_run_equals_that_of_an_uninterrupted_one(commands, alone, tmp_path):
    stops = stopped_and_resumed(commands, tmp_path / "run", 0, signal.SIGTERM)
    assert any(step % 5 for step in stops)  # Between two log lines
    assert_same(final_state(tmp_path / "run"), final_state(alone))
    assert log_of(tmp_path / "run") == log_of(alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "signum"),
    [(1, signal.SIGTERM), (2, signal.SIGKILL), (3, signal.SIGKILL)],
    ids=lambda x: getattr(x, "name", x),
)
def test_the_log_is_the_same_wherever_a_run_is_stopped(commands, alone, tmp_path, seed, signum):
    stopped_and_resumed(commands, tmp_path / "run", seed, signum)
    assert_same(final_state(tmp_path / "run"), final_state(alone))
    assert log_of(tmp_path / "run") == log_of(alone)


def process_of(folder, *more):
    """Start a long run through the installed program; returns the process after its second log line."""
    arguments = [*TINY, *PICTURES, "--train.steps", "100000", "--train.checkpoint-every", "1000", "--run.dir", folder]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastssl", "pretrain", *map(str, arguments), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = folder / "metrics.jsonl"
    while not (log.exists() and '"step": 2,' in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("between_s", [0.0, 0.2, 0.9])
def test_a_second_signal_within_a_second_is_ignored(tmp_path, between_s):
    process = process_of(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + between_s
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    assert process.stderr.read() == ""
    end = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["reason"]) == ("end", "stopped")
    assert checkpointed(tmp_path / "run") == end["step"]


@pytest.mark.slow
def test_repeated_signals_give_the_same_exit_code_as_one(tmp_path):
    """As from a terminal, a launcher and an impatient user."""
    process = process_of(tmp_path / "run")
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < 0.9:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert process.wait(60) == 75


@pytest.mark.slow
def test_the_exit_code_of_torchrun_is_its_own(tmp_path):
    """torchrun exits with 1 whatever its ranks return, as the README says; the run is saved and can be resumed."""
    arguments = [*TINY, *PICTURES, "--train.steps", "100000", "--run.dir", str(tmp_path / "run")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "fastssl", "pretrain", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"step": 4,' in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=90)
    end = json.loads(log.read_text().splitlines()[-1])
    assert (end["event"], end["reason"]) == ("end", "stopped"), error
    assert checkpointed(tmp_path / "run") == end["step"]
    assert process.returncode == 1


def test_an_interrupt_before_training_prints_one_line_and_exits_with_130(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastssl.train.trainer.open_splits", interrupted)
    assert train(tmp_path / "run") == 130
    assert sentence(capsys) == "fastssl: interrupted"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB\nGPU 0 has a total capacity of"),
    ],
    ids=["python", "torch on a CPU", "torch on a GPU"],
)
def test_running_out_of_memory_is_one_sentence(tmp_path, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("fastssl.train.step.TrainStep.__call__", fail)
    assert train(tmp_path / "run") == 1
    line = sentence(capsys)
    assert "memory ran out" in line
    assert "--train.batch-size" in line


def test_any_other_error_of_torch_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("expected scalar type Float but found Half")

    monkeypatch.setattr("fastssl.train.step.TrainStep.__call__", fail)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        train(tmp_path / "run")


@pytest.mark.slow
def test_a_limited_address_space_is_one_sentence(tmp_path):
    """Here the real allocator fails, without a mock."""
    code = (
        "import resource, sys; from fastssl.cli import main; import fastssl.train.trainer, fastssl.commands.doctor\n"
        # A module that runs out of memory while loading may fail in other ways.
        "import torchvision.models, torch.optim, torch._dynamo\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = [*TINY, *PICTURES, "--method.queue-size", "4000000", "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, "pretrain", *arguments, "--train.steps", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "memory ran out" in done.stderr.splitlines()[-1]
    assert main(["methods"]) == 0


WINDOWS = """
import signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGUSR1
import torch, fastssl_kernels
rows = torch.nn.functional.normalize(torch.randn(9, 8), dim=1)
assert fastssl_kernels.info_nce(rows[:4], rows[:4], rows, temperature=0.2).isfinite()
from fastssl.cli import main
sys.exit(main(["pretrain"]))
"""


@pytest.mark.slow
def test_without_posix_losses_work_and_commands_are_refused_in_one_sentence():
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "Linux" in line
    assert "fastssl_kernels" in line
