"""The micro-benchmarks run, are timed in groups of peers, and fail if a value is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from bench import conftest
from bench.micro.sizes import GPU
from bench.micro.test_step import configuration
from fastssl.methods import METHODS
from fastssl.presets import load

REPOSITORY = Path(__file__).parents[2]
SABOTAGE = """
from dataclasses import replace

import fastssl.models.ema, fastssl.models.queue, fastssl_kernels.losses
from fastssl_kernels import parity
from fastssl_pipelines import SamplePlan
from fastssl_pipelines.executors import pixels

batch, info_nce = SamplePlan.batch, parity.LOSSES["info_nce"]
augment = pixels.Augmentation.__call__

def wrong_boxes(self, *args, **options):
    plan = batch(self, *args, **options)
    for view in plan.views:
        view.boxes[:, 0] += 300
    return plan

fastssl.models.ema.ema_update_ = lambda *_: None
fastssl.models.queue.KeyQueue.enqueue = lambda *_: None
pixels.Augmentation.__call__ = lambda *args: tuple(1.01 * view for view in augment(*args))
SamplePlan.batch = wrong_boxes

def scaled(function):
    def wrong(**given):
        rows = function(**given)
        return rows if rows.dtype == parity.torch.float64 else 1.01 * rows

    return wrong

parity.LOSSES["info_nce"] = replace(
    info_nce, function=scaled(info_nce.function), reference=scaled(info_nce.reference)
)
"""


def run(*arguments: str, junit: Path, plugins: Path | None = None) -> Counter[tuple[str, str]]:
    """Count the benchmarks by file and outcome; callers leave out torch.compile, which takes too long."""
    # The benchmarks must not inherit this session's settings and workers
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(plugins or ""), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert junit.exists(), ended.stdout + ended.stderr
    cases = ElementTree.parse(junit).iter("testcase")
    outcomes = [(case.get("classname", "").split(".")[-1], _outcome(case)) for case in cases]
    return Counter(outcomes)


def _outcome(case: ElementTree.Element) -> str:
    return next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")


@pytest.mark.slow
def test_each_runs_and_has_right_values(tmp_path: Path) -> None:
    ended = run("bench", "--benchmark-disable", "-k", "not compile", junit=tmp_path / "ended.xml")
    files = {path.stem for path in (REPOSITORY / "bench/micro").glob("test_*.py")}
    assert {file for file, outcome in ended if outcome == "passed"} == files
    assert {outcome for _, outcome in ended} <= {"passed", "skipped"}
    # Without lightly, or with Triton before 3.7 and a new numpy
    assert {file for file, outcome in ended if outcome == "skipped"} <= {"test_step", "test_losses"}
    assert ended["test_losses", "passed"] >= 40


@pytest.mark.slow
def test_a_wrong_value_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    chosen = "momentum_encoder or enqueue or augment or test_plan or (info_nce and float32 and not compile)"
    arguments = ["bench", "--benchmark-disable", "-k", chosen, "-p", "sabotage"]
    ended = run(*arguments, junit=tmp_path / "ended.xml", plugins=tmp_path)
    assert ended["test_after_step", "failure"] == 2  # Ours, for both
    assert ended["test_after_step", "passed"] == 3  # Their peers
    assert ended["test_augment", "failure"] == 6  # Peers are compared with ours
    assert ended["test_plan", "failure"] == 1
    assert ended["test_losses", "failure"] == ended["test_losses", "passed"] + 1


@pytest.mark.slow
def test_peers_are_timed_side_by_side(tmp_path: Path) -> None:
    """With `-n auto` in its options pytest-benchmark would not time."""
    path = tmp_path / "timed.json"
    arguments = ["bench/micro/test_after_step.py", "--benchmark-only", "--benchmark-max-time=0.001"]
    ended = run(*arguments, f"--benchmark-json={path}", junit=tmp_path / "ended.xml")
    assert ended == {("test_after_step", "passed"): 5}
    saved = json.loads(path.read_text())
    groups = Counter(benchmark["group"].split()[0] for benchmark in saved["benchmarks"])
    assert groups == {"EMA": 3, "enqueue": 2}
    assert all(benchmark["stats"]["median"] > 0 for benchmark in saved["benchmarks"])
    assert {"device", "versions"} <= set(saved["machine_info"])


def test_the_clock_of_a_gpu_waits_for_it(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.05))
    monkeypatch.setattr(conftest, "DEVICE", torch.device("cuda"))
    started = time.perf_counter()
    conftest.pytest_collection_modifyitems([request.node])
    marker = request.node.get_closest_marker("benchmark")
    assert marker.kwargs["timer"]() - started >= 0.05


def test_on_a_gpu_steps_have_the_sizes_of_their_presets() -> None:
    for method in METHODS:
        preset = load("mocov2-cifar10" if method == "mocov1" else f"{method}-cifar10")
        config = configuration(method, GPU.step)
        assert config.method.name == method
        assert (config.train, config.model) == (preset.train, preset.model)
