"""Every launch function of the Triton kernels, called as on a GPU, compiles for all supported GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import triton

from fastssl_kernels import aot
from tests.preflight import warmup
from tests.preflight.driver import installed

TARGETS = ("sm_90", "sm_80", "sm_100")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.preflight.warmup", *arguments]
    return subprocess.run(command, env={**others, **environment}, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("warmup") / "results.json"
    done = run("--targets", ",".join(TARGETS), "--json", str(file))
    assert file.exists(), done.stderr
    return json.loads(file.read_text())


@pytest.mark.slow
def test_every_launch_function_compiles(results: list[dict[str, Any]]) -> None:
    assert [result for result in results if result["error"]] == []
    assert len(results) == len(warmup.training_tasks(list(TARGETS)))
    assert all(result["kernels"] for result in results)


@pytest.mark.slow
def test_no_kernel_is_left_out(results: list[dict[str, Any]]) -> None:
    known = {configuration.kernel.__name__ for configuration in aot.configurations()}
    for targets in (TARGETS[:1], TARGETS[1:]):
        launched = {name for result in results if result["target"] in targets for name in result["kernels"]}
        assert launched == known


@pytest.mark.slow
def test_a_kernel_too_large_for_a_target_fails() -> None:
    code = (
        "from fastssl_kernels import aot; aot.SHARED_BYTES['sm_90'] = 1024\n"
        "from tests.preflight import warmup\n"
        "print(warmup.launch(warmup.Case('queue_read', 'bf16', warmup.TRAINING), 'sm_90').error)"
    )
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=others, capture_output=True, text=True, timeout=600)
    assert done.stdout.startswith("OutOfResources: out of resource: shared memory"), done.stderr


@pytest.mark.parametrize(
    ("interpret", "arguments", "sentence"),
    [
        (True, [], "unset it"),
        (False, ["--targets", "sm_70"], "'sm_70'; it takes sm_80, sm_90, sm_100, sm_120"),
    ],
)
def test_the_command_refuses_impossible_settings(
    interpret: bool,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
    monkeypatch.setattr(sys, "argv", ["warmup", *arguments])
    with pytest.raises(SystemExit) as refused:
        warmup.main()
    assert refused.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_driver_is_restored() -> None:
    from triton.runtime import driver

    before = driver._active
    with installed("sm_100") as mine:
        assert driver.active is mine
        assert mine.get_current_target().arch == 100
    assert driver._active is before
