"""`python -m bench load`: what it runs, and that its busy processes end."""

from __future__ import annotations

import json
import os
import subprocess
from types import SimpleNamespace

import pytest

from bench import load
from fastssl.errors import TrainingError


def cpu_s(process: int) -> float:
    with open(f"/proc/{process}/stat") as file:
        return int(file.read().rsplit(")", 1)[1].split()[11]) / os.sysconf("SC_CLK_TCK")


def test_the_loops_are_busy_and_end_with_the_block(monkeypatch):
    started = []

    def popen(*given):
        started.append(subprocess.Popen(*given))
        return started[-1]

    monkeypatch.setattr(load, "subprocess", SimpleNamespace(Popen=popen))
    with load.busy(2):
        assert len(started) == 2
        assert all(loop.poll() is None and cpu_s(loop.pid) > 0 for loop in started)
    assert all(loop.poll() is not None for loop in started)


def test_the_rate_is_the_median_after_the_first_lines_and_the_share_is_of_idle(monkeypatch, capsys, tmp_path):
    """On a fake machine with rate 900 / (1 + busy / 2)."""
    busy = []

    def run(command, **_):
        assert command[1:4] == ["-m", "fastssl", "pretrain"]
        rate = 900 / (1 + len(busy) / 2)
        folder = command[command.index("--run.dir") + 1]
        os.makedirs(folder)
        rates = [1, 2, rate, rate * 2, rate / 2]  # The first two lines are warm-up
        lines = [{"event": "start"}, *({"event": "train", "images_per_s": each} for each in rates)]
        with open(f"{folder}/metrics.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return subprocess.CompletedProcess(command, 0, "", "")

    class Loop:
        def __init__(self, *_):
            busy.append(self)

        def kill(self):
            busy.remove(self)

        def wait(self): ...

    monkeypatch.setattr(load, "subprocess", SimpleNamespace(run=run, Popen=Loop))
    path = tmp_path / "load.json"
    assert load.main(["--loops", "0", "2", "--repeats", "1", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:3] == ["0", "900", "100%"]
    assert lines[-1].split()[:3] == ["2", "450", "50%"]
    assert json.loads(path.read_text())["images_per_s"] == {"0": [900], "2": [450]}


def test_a_failing_run_is_reported(monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "fastssl: no such thing\n")
    monkeypatch.setattr(load, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(TrainingError, match="ended with 2: fastssl: no such thing"):
        load.images_per_s(10)
