"""metrics.jsonl on full disks, after kills, and with damaged lines."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from fastssl.errors import ConfigError
from fastssl.observe.metrics_log import MetricsLog


@pytest.fixture
def log(tmp_path):
    return MetricsLog(tmp_path / "metrics.jsonl")


def lines(log):
    return [json.loads(line)["step"] for line in log.path.read_text().splitlines()]


def steps(log):
    return [record["step"] for record in log.read()]


def no_space(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_records_are_on_the_disk_when_write_returns(log):
    assert log.read() == []
    log.write("train", step=1, loss=0.5, text="é\u2028\n")
    log.write("eval", step=2)
    expected = [{"event": "train", "step": 1, "loss": 0.5, "text": "é\u2028\n"}, {"event": "eval", "step": 2}]
    assert [json.loads(line) for line in log.path.read_text().split("\n")[:-1]] == expected
    assert log.read() == expected


def test_records_wait_for_the_disk_and_are_written_before_the_next(log, monkeypatch):
    log.write("train", step=1)
    with monkeypatch.context() as patch:
        patch.setattr("fastssl.observe.metrics_log.open_to_append", no_space)
        for step in (2, 3):
            log.write("train", step=step)
    assert lines(log) == [1]
    assert steps(log) == [1, 2, 3]
    log.write("train", step=4)
    assert lines(log) == [1, 2, 3, 4]


def test_a_problem_is_reported_once_per_outage(log, monkeypatch):
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("fastssl.observe.metrics_log.open_to_append", no_space)
            assert "metrics.jsonl cannot be written (No space left" in log.write("train", step=1)
            assert log.write("train", step=2) is None
        assert log.write("train", step=3) is None


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from fastssl.observe.metrics_log import MetricsLog

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for room in map(int, sys.argv[2:]):
    log = MetricsLog(Path(sys.argv[1]) / str(room))
    for step in range(1, 4):
        log.write("train", step=step)
    size = log.path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, resource.RLIM_INFINITY))
    problems = [log.write("train", step=step) for step in range(4, 7)]
    read = [record["step"] for record in log.read()]
    print(log.path.stat().st_size - size, *filter(None, problems), read, sep="|")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.write("train", step=7)
"""
ROOMS = (0, 1, 20, 35, 80)


def test_short_writes_corrupt_nothing(tmp_path):
    """A record takes 30 bytes, so the disk fills up at once, or within the first, second or third record."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), *map(str, ROOMS)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for room, line in zip(ROOMS, result.stdout.splitlines(), strict=True):
        written, problem, read = line.split("|")
        assert int(written) == room
        assert "File too large" in problem
        assert read == "[1, 2, 3, 4, 5, 6]"
        assert lines(MetricsLog(tmp_path / str(room))) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "damaged",
    [b"", b'{"event": "tra', b"\0\0\0\0", b"\xff\xfe{", b"7", b"[1]", b'{"event": "train"}', b'{"step": 2}'],
)
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_damaged_line_hides_only_itself(log, damaged, end):
    log.write("train", step=1)
    with log.path.open("ab") as file:
        file.write(damaged + b"\n")
    log.write("train", step=3)
    with log.path.open("ab") as file:
        file.write(damaged + end)
    assert steps(log) == [1, 3]
    log.rewind(3)
    log.write("train", step=4)
    assert lines(log) == [1, 3, 4]


def test_rewind_keeps_the_records_up_to_a_step(log):
    for step in range(1, 5):
        log.write("train", step=step)
    log.write("end", step=2)
    log.rewind(2)
    assert lines(log) == [1, 2]
    log.rewind(0)
    assert lines(log) == []


def test_rewind_includes_records_waiting_in_memory(log, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fastssl.observe.metrics_log.open_to_append", no_space)
        for step in (1, 2):
            log.write("train", step=step)
    log.rewind(1)
    log.write("train", step=2)
    assert lines(log) == [1, 2]


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_failed_rewind_is_a_config_error_and_keeps_the_file(log, monkeypatch, where):
    log.write("train", step=1)
    log.write("train", step=2)
    with monkeypatch.context() as patch:
        patch.setattr(where, no_space)
        with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written \(No space left.*fastssl resume "):
            log.rewind(1)
    assert lines(log) == [1, 2]
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]
