"""A run whose process is killed repeatedly ends with the weights of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress

import pytest

from fastssl.train import checkpoint
from tests.fastssl.commands import commands_into
from tests.fastssl.test_runs import assert_same

KILLS, STEPS = 16, 60  # Half of the kills aim at the write of a checkpoint, half at any time from the start on
RUN = (
    f"--train.steps {STEPS} --train.batch-size 8 --train.checkpoint-every 1 --train.log-every 1 --train.device cpu "
    "--data.pictures 80 --data.pipeline resident --data.workers 0 --model.width 0.0625 --model.splits 2 "
    "--method.queue-size 32 --eval.every-epochs 20"
).split()


@pytest.fixture
def commands(tmp_path):
    with commands_into(tmp_path / "output.txt") as commands:
        yield commands


def undisturbed(commands, folder):
    """Trains without a kill; returns the seconds until the first checkpoint."""
    started = time.monotonic()
    commands.start(["pretrain", *RUN, "--run.dir", str(folder)])
    while not checkpoint.checkpoints(folder / "checkpoints"):
        assert not commands.ended(within_s=0.005)
    first = time.monotonic()
    assert commands.exit_codes() == [0]
    return first - started


def newest(folder):
    """The step of the newest checkpoint, -1 if there is none."""
    return max((int(path.stem.removeprefix("step_")) for path in (folder / "checkpoints").glob("*.pt")), default=-1)


def is_writing(folder, since_ns):
    """Whether a checkpoint has been partly written since then, ignoring leftovers of earlier kills."""
    for path in (folder / "checkpoints").glob("*.tmp"):
        with suppress(FileNotFoundError):
            return path.stat().st_mtime_ns > since_ns
    return False


def in_a_write(folder, step, since_ns):
    """True while a checkpoint after `step` is being written, and from two later on, as polling can miss a write."""
    return lambda: newest(folder) >= step + (0 if is_writing(folder, since_ns) else 2)


def after(folder, seconds, step):
    """True after that many seconds, or once `step` has a checkpoint."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() > deadline or newest(folder) >= step


def wait(commands, until):
    """Wait until `until()` is true or the command has ended."""
    while not (commands.ended(within_s=0.0003) or until()):
        pass


def kill_again_and_again(commands, folder, start_s):
    """End a run KILLS times; returns the counts by signal, and of those in the middle of a write."""
    generator = random.Random(0)
    counts = Counter()
    for number in range(KILLS):
        signal_number = (signal.SIGKILL, signal.SIGTERM)[number % 2]
        before, since_ns = newest(folder), time.time_ns()
        resumes = (folder / "config.json").exists()
        arguments = ["resume", str(folder)] if resumes else ["pretrain", *RUN, "--run.dir", str(folder)]
        (process,) = commands.start(arguments)
        if number % 4 < 2:
            wait(commands, in_a_write(folder, before + generator.randrange(3), since_ns))
            commands.ended(within_s=generator.uniform(0, 0.004))
        else:
            wait(commands, after(folder, generator.uniform(0, 1.3 * start_s), before + 3))
        hit = is_writing(folder, since_ns)
        os.kill(process, signal_number)
        (code,) = commands.exit_codes()
        if signal_number == signal.SIGKILL:
            assert code == -signal.SIGKILL
            hit = is_writing(folder, since_ns)
        else:
            assert code in (75, -signal.SIGTERM)  # The latter before training begins
            counts["exit code 75"] += code == 75
        counts[signal_number.name] += 1
        counts[f"{signal_number.name} in a write"] += hit
    return counts


def history(folder):
    """The records of the log for every step, without times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("event", "step", "loss", "lr", "gradient_norm", "knn_top1", "reason")
    told = [record for record in records if record["event"] in ("train", "eval", "end")]
    return [{name: record[name] for name in names if name in record} for record in told]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_weights(commands, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    start_s = undisturbed(commands, alone)
    counts = kill_again_and_again(commands, killed, start_s)
    print(f"{dict(counts)}; {newest(killed)} of {STEPS} steps done by then")
    assert counts["SIGKILL"] == counts["SIGTERM"] == KILLS // 2
    assert min(counts["SIGKILL in a write"], counts["SIGTERM in a write"], counts["exit code 75"]) >= 2
    assert 0 < newest(killed) < STEPS
    assert commands.run(["resume", str(killed)]) == [0]

    names = [[path.name for path in sorted((run / "checkpoints").iterdir())] for run in (alone, killed)]
    assert names[0] == names[1]  # No partial or damaged files among them
    for name in names[0]:
        assert_same(*(checkpoint.load(run / "checkpoints" / name) for run in (alone, killed)))
    assert history(killed) == history(alone)
