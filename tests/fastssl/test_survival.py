"""How a run handles non-finite losses, a full disk, an unwritable folder and a jumping clock."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from itertools import count

import pytest

from fastssl.cli import main
from fastssl.config import from_json
from fastssl.data import open_splits
from fastssl.observe.metrics_log import MetricsLog
from fastssl.run_folder import claimed
from fastssl.train import checkpoint
from fastssl.train.build import train_sampler
from fastssl.train.step import TrainStep
from tests.fastssl.test_runs import TINY, assert_same, final_state, records

STEPS = ["--train.steps", "20", "--train.log-every", "3"]


def run(folder, *more):
    return main(["pretrain", *TINY, *STEPS, "--run.dir", str(folder), *more])


@pytest.fixture
def breaking(monkeypatch):
    """Call with the steps whose loss shall be NaN."""

    def of(*steps):
        forward = TrainStep._forward_part

        def broken(self, batch):
            output = forward(self, batch)
            if batch.step in steps:
                output.loss = output.loss * math.nan
            return output

        monkeypatch.setattr(TrainStep, "_forward_part", broken)

    return of


def test_a_non_finite_step_is_skipped(tmp_path, breaking):
    """The run ends with the same weights whichever checkpoint it resumes from."""
    breaking(7, 13)
    assert run(tmp_path / "a", "--train.non-finite", "skip") == 0
    assert run(tmp_path / "b", "--train.non-finite", "skip", "--train.checkpoint-every", "20") == 0
    first, second = (final_state(tmp_path / name) for name in "ab")
    assert first["skipped"] == [7, 13]
    assert all(value.isfinite().all() for value in first["method"].values())
    assert_same(first, second)
    events = [record for record in records(tmp_path / "a") if record["event"] == "non_finite"]
    assert [(event["broken_step"], event["step"], event["action"]) for event in events] == [
        (8, 5, "skipped"),
        (14, 10, "skipped"),
    ]
    config = from_json((tmp_path / "a" / "config.json").read_text())
    steps = train_sampler(config, open_splits(config).train)
    assert events[0]["ids"] == steps[7].ids.tolist()
    trained = [record["step"] for record in records(tmp_path / "a") if record["event"] == "train"]
    assert trained == [3, 6, 9, 12, 15, 18, 20]


def test_a_run_with_too_many_non_finite_steps_stops(tmp_path, breaking, capsys):
    breaking(*range(5, 20))
    assert run(tmp_path / "run", "--train.non-finite", "skip") == 1
    assert "after 10 skipped steps" in capsys.readouterr().err


def test_a_non_finite_step_stops_the_run_by_default(tmp_path, breaking, capsys):
    breaking(7)
    assert run(tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "step 8" in error
    assert "--train.non-finite skip" in error
    (event,) = [record for record in records(tmp_path / "run") if record["event"] == "non_finite"]
    assert (event["broken_step"], event["action"], len(event["ids"])) == (8, "stopped", 16)
    assert final_state(tmp_path / "run")["step"] == 5


def test_a_non_finite_gradient_is_found_at_its_step(tmp_path, monkeypatch):
    forward_and_backward = TrainStep._forward_and_backward

    def broken(self, batch):
        output = forward_and_backward(self, batch)
        if batch.step == 7:
            self._parameters[0].grad[0] = math.inf
        return output

    monkeypatch.setattr(TrainStep, "_forward_and_backward", broken)
    assert run(tmp_path / "run") == 1
    (event,) = [record for record in records(tmp_path / "run") if record["event"] == "non_finite"]
    assert event["broken_step"] == 8
    assert math.isfinite(float(event["loss"]))


def test_a_full_disk_is_reported_and_training_continues(tmp_path, monkeypatch):
    save = checkpoint.save

    def full(folder, state, *, step, **options):
        if step in (5, 10):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return save(folder, state, step=step, **options)

    monkeypatch.setattr(checkpoint, "save", full)
    assert run(tmp_path / "run") == 0
    notes = [record["text"] for record in records(tmp_path / "run") if record["event"] == "note"]
    assert len(notes) == 2
    assert "after step 5" in notes[0]
    assert "No space left" in notes[0]
    assert final_state(tmp_path / "run")["step"] == 20


@pytest.mark.parametrize("step", [0, 20])
def test_a_failed_first_or_last_checkpoint_ends_the_run(tmp_path, monkeypatch, capsys, step):
    """The first, so that nobody trains for days on an unwritable disk, and the last."""
    save = checkpoint.save

    def full(folder, state, **options):
        if options["step"] == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return save(folder, state, **options)

    monkeypatch.setattr(checkpoint, "save", full)
    assert run(tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "No space left" in error
    assert "fastssl resume" in error


def test_a_run_folder_that_cannot_be_created_is_named(capsys):
    assert run("/proc/fastssl-run") == 2
    assert "/proc/fastssl-run" in capsys.readouterr().err


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    assert run(tmp_path / "a") == 0
    jumps = count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 1e6 * next(jumps))
    assert run(tmp_path / "b") == 0
    assert_same(final_state(tmp_path / "a"), final_state(tmp_path / "b"))
    train = [record for record in records(tmp_path / "b") if record["event"] == "train"]
    assert all(0 < record["images_per_s"] < 1e6 for record in train)
    shares = [value for record in train for name, value in record.items() if name.startswith("share_")]
    assert all(0 <= share <= 1 for share in shares)


def test_checkpoints_are_kept_permanently_on_request(tmp_path):
    assert run(tmp_path / "run", "--train.keep-every", "10", "--train.keep-checkpoints", "1") == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_000000000.pt", "step_000000010.pt", "step_000000020.pt"]


def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(tmp_path):
    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "run") == 0
    newest = tmp_path / "run" / "checkpoints" / "step_000000020.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert "damaged" in (tmp_path / "run" / "console.log").read_text()
    assert_same(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


def test_a_run_logs_its_choices(tmp_path):
    assert run(tmp_path / "run", "--train.precision", "fp32") == 0
    assert "cpu, float32, not compiled, resident pipeline" in (tmp_path / "run" / "console.log").read_text()
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["ranks"] == 1


def test_two_processes_cannot_train_the_same_run(tmp_path, capsys):
    assert run(tmp_path / "run") == 0
    with claimed(tmp_path / "run"):
        assert main(["resume", str(tmp_path / "run")]) == 2
    assert "is being trained by another process" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "run")]) == 0


def test_a_report_is_written_however_the_run_ends(tmp_path, breaking):
    assert run(tmp_path / "good") == 0
    breaking(7)
    assert run(tmp_path / "bad") == 1
    for name in ("good", "bad"):
        assert "</html>" in (tmp_path / name / "report.html").read_text()


def test_logs_that_hit_a_full_disk_do_not_end_a_run(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastssl.observe.run_logger.write_report", full)
    monkeypatch.setattr(MetricsLog, "_append", full)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "console.log").symlink_to("/dev/full")
    assert run(tmp_path / "run") == 0
    assert final_state(tmp_path / "run")["step"] == 20
