"""Commands on a machine without tyro and rich: they read their options and print their results."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HIDDEN = """
import sys
sys.modules["tyro"] = sys.modules["rich"] = None
from fastssl.cli import main
code = main(sys.argv[1:])
assert not [name for name in sys.modules if name.startswith(("tyro.", "rich."))]
sys.exit(code)
"""
TINY = "--train.batch-size 32 --data.pictures 300 --model.width 0.25 --train.device cpu"


def fastssl(arguments: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDDEN, *arguments.split(), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # Compiling would take a minute
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_verify_prints_its_table():
    run = fastssl("verify info_nce --dtype float32 --device cpu")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["loss", "dtype", "backend", "error:", "plain:", "limit:", "layout"]
    assert any(line.split()[:3] == ["info_nce", "float32", "blockwise"] and line.endswith("pass") for line in lines)
    assert "passed" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pretrain --train.stepz 3", "did you mean '--train.steps'?"),
        ("pretrain --train.steps 0", "--train.steps 0 was given; it must be at least 1"),
        ("bench step --steps x", '--steps "x" was given; it must be an integer'),
    ],
)
def test_bad_options_are_one_sentence(arguments, words):
    run = fastssl(arguments)
    assert run.returncode == 2
    assert words in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_run_trains_resumes_and_is_evaluated(tmp_path):
    folder = str(tmp_path / "run")
    run = fastssl(f"pretrain --train.steps 3 {TINY}", "--run.dir", folder)
    assert run.returncode == 0, run.stderr
    assert "step 3/3  loss " in run.stdout
    assert "encoder after training " in run.stdout
    for command in ("resume", "eval knn", "report"):
        run = fastssl(command, folder)
        assert (run.returncode, run.stderr) == (0, "")
    assert "step 3/3  loss " in (tmp_path / "run" / "console.log").read_text()


@pytest.mark.slow
def test_doctor_and_a_benchmark_print(tmp_path):
    run = fastssl("doctor")
    assert run.returncode == 0, run.stderr
    assert "loss backends on cpu" in run.stdout
    file = tmp_path / "input.json"
    run = fastssl(
        "bench input quickstart --images 16 --batch-size 8 --seconds 0.2 --repeats 1 --pipelines resident --device cpu",
        *("--json", str(file)),
    )
    assert run.returncode == 0, run.stderr
    assert file.exists()
    assert any(line.startswith("fastssl resident  ") for line in run.stdout.splitlines())


@pytest.mark.slow
def test_the_benchmark_of_the_step_prints():
    run = fastssl("bench step quickstart --batch-size 16 --steps 2 --repeats 2 --device cpu")
    assert run.returncode == 0, run.stderr
    assert any(line.startswith("supervised encoder  ") for line in run.stdout.splitlines())
