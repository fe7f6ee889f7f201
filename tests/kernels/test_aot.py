"""The kernels compile for real GPUs, also where there is none, and keep their tiles in registers."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastssl_kernels import aot, sass, triton

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}

slow = pytest.mark.slow


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: this one may interpret kernels, and that cannot be undone."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    inherited["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "fastssl_kernels.aot", *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """All kernels for all targets, compiled once."""
    file = tmp_path_factory.mktemp("aot") / "usage.json"
    done = run("--targets", ",".join(TARGETS), "--json", str(file))
    assert file.exists(), done.stderr
    return done, json.loads(file.read_text())


@pytest.fixture(scope="module")
def usages(report: tuple[Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return report[1]


@slow
def test_every_kernel_is_compiled_for_every_target(usages: list[dict[str, Any]]) -> None:
    kernels = set()
    for module in pkgutil.iter_modules(triton.__path__, f"{triton.__name__}."):
        kernels |= {name for name in vars(importlib.import_module(module.name)) if name.endswith("_kernel")}
    assert {(usage["kernel"], usage["target"]) for usage in usages} == {(k, t) for k in kernels for t in TARGETS}


@slow
def test_nothing_spills(usages: list[dict[str, Any]]) -> None:
    assert [name(usage) for usage in usages if usage["spills"] or usage["stack"]] == []


@slow
def test_shared_memory_fits(usages: list[dict[str, Any]]) -> None:
    assert [name(usage) for usage in usages if usage["shared_bytes"] > SHARED_KIB[usage["target"]] * 1024] == []


@slow
def test_products_run_on_tensor_cores(usages: list[dict[str, Any]]) -> None:
    products = [usage for usage in usages if usage["instructions_per_logit"] and "ieee" not in usage["config"]]
    assert len(products) >= 2 * len(TARGETS)
    assert [name(usage) for usage in products if not usage["tensor_cores"]] == []
    # Wide 16-bit tiles have instructions of their own on the newer ones.
    expected = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
    reads = [use for use in products if use["kernel"] == "read_kernel" and use["config"].startswith("bf16 C=128 full")]
    assert {(usage["target"], *usage["tensor_cores"]) for usage in reads} == set(expected.items())


@slow
def test_unshifted_reads_take_no_maximum(usages: list[dict[str, Any]]) -> None:
    free = [
        usage
        for usage in usages
        if usage["kernel"] in ("read_kernel", "labelled_read_kernel")
        and not usage["constants"]["ONLINE"]
        and not usage["constants"]["ACCURACY"]
    ]
    assert {usage["target"] for usage in free} == set(TARGETS)
    assert [name(usage) for usage in free if usage["maxima"]] == []


@slow
def test_exit_code_says_whether_limits_hold(report: tuple[Any, list[dict[str, Any]]]) -> None:
    done, usages = report
    broken = [usage for usage in usages if list(aot.Usage(**usage).faults())]
    assert done.returncode == (1 if broken else 0), done.stderr


def name(usage: dict[str, Any]) -> str:
    return f"{usage['kernel']} {usage['config']} {usage['target']}: {usage['spills']} spills, {usage['stack']} stack"


def test_refuses_to_compile_interpreted_kernels() -> None:
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "unset it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--targets", "sm_80,sm_70"), "'sm_70'; it takes sm_80, sm_90, sm_100, sm_120"),
        (("--kernel", "read"), "'read'; it takes "),
    ],
)
def test_refuses_unknown_names(arguments: tuple[str, ...], sentence: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"spills": 2}, ["spills"]),
        ({"stack": 8}, ["stack"]),
        ({"target": "sm_80"}, ["shared memory"]),
        ({"tensor_memory": 513}, ["tensor memory"]),
    ],
)
def test_each_broken_limit_is_a_sentence(change: dict[str, Any], words: list[str]) -> None:
    usage = aot.Usage(
        kernel="k", config="c", target="sm_90", constants={}, registers=255, spills=0, stack=0,
        shared_bytes=227 * 1024, tensor_memory=512, tensor_cores={}, maxima=0, instructions_per_logit=None,
    )  # fmt: skip
    faults = list(usage._replace(**change).faults())
    assert [word in fault for word, fault in zip(words, faults, strict=True)] == [True] * len(words)


def test_main_loop_is_the_one_with_the_products() -> None:
    loop = ["MOV", "HMMA", "HMMA", "BRA 0x10"]
    far = ["MOV", "MOV", "BRA 0x20"]  # a block moved out of the loop, which jumps back into it
    code = [(f"{at * 16:04x}", *line.partition(" ")[::2]) for at, line in enumerate(["MOV", *loop, *far, "EXIT"])]
    assert sass._main_loop(code) == len(loop)
    assert sass._main_loop([line for line in code if line[1] != "BRA"]) == 0


def test_spills_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "cuobjdump"
    tool.write_text(
        "#!/bin/sh\ncat <<'TEXT'\n REG:40 STACK:8 SHARED:0\n"
        "        /*0000*/                   STL.64 [R1], R12 ;    /* 0x00 */\n"
        "        /*0010*/              @!P0 LDL.LU R0, [R1] ;     /* 0x00 */\n"
        "        /*0020*/                   FMNMX3 R0, R1, R2 ;   /* 0x00 */\n"
        "        /*0030*/             @!UP1 UTCHMMA gdesc ;       /* 0x00 */\nTEXT\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(sass, "_TOOL", tool)
    assert sass.disassemble(b"") == sass.Sass(40, 8, 2, {"UTCHMMA": 1}, 1, 0)
