"""Commands on a machine without tyro and rich: they read their options and print their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

HIDDEN = """
import contextlib, io, json, sys
sys.modules["tyro"] = sys.modules["rich"] = None
from fastssl.cli import main
ended = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    ended.append((code, out.getvalue(), err.getvalue()))
assert not [name for name in sys.modules if name.startswith(("tyro.", "rich."))]
print(json.dumps(ended))
"""
TINY = "--train.batch-size 32 --data.pictures 300 --model.width 0.25 --train.device cpu"


class Ended(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str


def fastssl(*commands: str, profiled: bool = False) -> list[Ended]:
    """Run commands one after the other in one process; where one is profiled, torch's profiler writes to stderr."""
    script = [sys.executable, "-c", HIDDEN, json.dumps([command.split() for command in commands])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # Compiling would take a minute
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert profiled or done.stderr == ""
    return [Ended(*ended) for ended in json.loads(done.stdout)]


BAD = {
    "pretrain --train.stepz 3": "did you mean '--train.steps'?",
    "pretrain --train.steps 0": "--train.steps 0 was given; it must be at least 1",
    "bench step --steps x": '--steps "x" was given; it must be an integer',
}


@pytest.mark.slow
def test_verify_prints_its_table_and_bad_options_are_one_sentence():
    verified, *refused = fastssl("verify info_nce --dtype float32 --device cpu", *BAD)
    assert (verified.code, verified.err) == (0, "")
    lines = verified.out.splitlines()
    assert lines[0].split() == ["loss", "dtype", "backend", "error:", "plain:", "limit:", "layout"]
    assert any(line.split()[:3] == ["info_nce", "float32", "blockwise"] and line.endswith("pass") for line in lines)
    assert "passed" in lines[-1]
    for ended, words in zip(refused, BAD.values(), strict=True):
        assert ended.code == 2
        assert words in ended.err
        assert len(ended.err.splitlines()) == 1


@pytest.mark.slow
def test_a_run_trains_resumes_and_is_evaluated(tmp_path):
    folder = tmp_path / "run"
    others = [f"{command} {folder}" for command in ("resume", "eval knn", "report")]
    trained, *later = fastssl(f"pretrain --train.steps 3 {TINY} --run.dir {folder}", *others)
    assert trained.code == 0, trained.err
    assert "step 3/3  loss " in trained.out
    assert "encoder after training " in trained.out
    assert [(ended.code, ended.err) for ended in later] == [(0, "")] * 3
    assert "step 3/3  loss " in (folder / "console.log").read_text()


@pytest.mark.slow
def test_doctor_and_the_benchmarks_print(tmp_path):
    numbers = tmp_path / "input.json"
    doctor, bench_input, bench_step = fastssl(
        "doctor",
        "bench input quickstart --images 16 --batch-size 8 --seconds 0.2 --repeats 1 --pipelines resident --device cpu "
        f"--json {numbers}",
        "bench step quickstart --batch-size 16 --steps 2 --repeats 2 --device cpu",
        profiled=True,
    )
    assert [doctor.code, bench_input.code, bench_step.code] == [0, 0, 0], (doctor.err, bench_input.err, bench_step.err)
    assert "loss backends on cpu" in doctor.out
    assert numbers.exists()
    assert any(line.startswith("fastssl resident  ") for line in bench_input.out.splitlines())
    assert any(line.startswith("supervised encoder  ") for line in bench_step.out.splitlines())
