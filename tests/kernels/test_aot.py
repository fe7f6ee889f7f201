"""The kernels compile for real GPUs, even without one, and keep their tiles in registers."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs

from fastssl_kernels import aot, sass, triton
from fastssl_kernels.triton.configuration import argument_type

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}

slow = pytest.mark.slow


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a new process: this one may interpret kernels, which cannot be undone."""
    command = [sys.executable, "-m", "fastssl_kernels.aot", *arguments]
    return subprocess.run(command, env=environment() | changes, capture_output=True, text=True)


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


SAMPLE = """
import json, sys
from fastssl_kernels import aot

if __name__ == "__main__":
    configurations = list(aot.configurations())
    names = [configuration.kernel.__name__ for configuration in configurations]
    places = {name: names.index(name) for name in names}
    tasks = [(place, "sm_90") for place in places.values()]
    tasks += [(places["read_kernel"], target) for target in TARGETS if target != "sm_90"]
    free = next(
        place for place, each in enumerate(configurations)
        if names[place] == "read_kernel" and not each.constants["ONLINE"] and not each.constants["ACCURACY"]
    )
    tasks += [(free, target) for target in TARGETS]
    print(json.dumps([usage._asdict() for usage in aot.compile_all(tasks)], default=str), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def usages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every kernel once for sm_90, the reads for all targets; `.ci/tools` compiles everything for all targets."""
    script = tmp_path_factory.mktemp("aot") / "sample.py"
    script.write_text(SAMPLE.replace("TARGETS", repr(TARGETS)))
    done = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def every_kernel() -> dict[str, Any]:
    """All kernels of all modules, by name."""
    modules = pkgutil.iter_modules(triton.__path__, f"{triton.__name__}.")
    found = [vars(importlib.import_module(module.name)) for module in modules]
    return {name: kernel for names in found for name, kernel in names.items() if name.endswith("_kernel")}


@slow
def test_every_kernel_is_compiled(usages: list[dict[str, Any]]) -> None:
    assert {usage["kernel"] for usage in usages if usage["target"] == "sm_90"} == every_kernel().keys()


def test_every_kernel_declares_the_kinds_of_its_arguments() -> None:
    for kernel in every_kernel().values():
        for name in kernel.arg_names:
            if not name.isupper():
                assert argument_type(kernel, name, torch.float32)


@pytest.mark.parametrize("annotation", [None, "kind.Unknown", "tl.tensor"])
def test_an_undeclared_argument_is_refused(annotation: str | None) -> None:
    def broken_kernel(lse: Any) -> None: ...

    broken_kernel.__annotations__ = {"lse": annotation} if annotation else {}
    kernel = SimpleNamespace(fn=broken_kernel, __name__="broken_kernel")
    with pytest.raises(TypeError, match=r"^broken_kernel declares .* for its argument lse; annotate it with a class"):
        argument_type(kernel, "lse", torch.float32)


def test_the_limits_of_shared_memory_are_those_of_the_gpus() -> None:
    assert {target: 1024 * size for target, size in SHARED_KIB.items()} == aot.SHARED_BYTES


@slow
def test_no_limit_is_broken(usages: list[dict[str, Any]]) -> None:
    assert [fault for usage in usages for fault in aot.Usage(**usage).faults()] == []


@slow
def test_wide_products_use_the_tensor_cores_of_newer_gpus(usages: list[dict[str, Any]]) -> None:
    expected = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
    reads = [use for use in usages if use["kernel"] == "read_kernel" and use["config"].startswith("bf16 C=128 full")]
    assert {(usage["target"], *usage["tensor_cores"]) for usage in reads} == set(expected.items())


@slow
def test_unshifted_reads_take_no_maximum(usages: list[dict[str, Any]]) -> None:
    free = [
        usage
        for usage in usages
        if usage["kernel"] == "read_kernel" and not usage["constants"]["ONLINE"] and not usage["constants"]["ACCURACY"]
    ]
    assert {usage["target"] for usage in free} == set(TARGETS)
    assert [usage["config"] for usage in free if usage["maxima"]] == []


@slow
def test_exit_code_of_kernels_within_the_limits() -> None:
    assert run("--kernel", "gray_sum_kernel", "--targets", "sm_90").returncode == 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that compiles kernels, in which none of them is touched."""
    monkeypatch.setattr(knobs.runtime, "interpret", False)


@pytest.mark.usefixtures("compiled")
def test_exit_code_of_a_broken_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = aot.Usage("k", "c", "sm_90", {}, 1, 0, 0, 0, 0, {}, 0, None)
    monkeypatch.setitem(aot.SHARED_BYTES, "sm_90", -1)
    monkeypatch.setattr(aot, "compile_all", lambda tasks: [broken])
    assert aot.main(["--targets", "sm_90"]) == 1
    assert "shared memory" in capsys.readouterr().err


def test_refuses_to_compile_interpreted_kernels() -> None:
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "unset it" in done.stderr


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--targets", "sm_80,sm_70"), "'sm_70'; it takes sm_80, sm_90, sm_100, sm_120"),
        (("--kernel", "read"), "'read'; it takes "),
    ],
)
def test_refuses_unknown_names(arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        aot.main(list(arguments))
    assert refused.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"spills": 2}, ["spills"]),
        ({"stack": 8}, ["stack"]),
        ({"target": "sm_80"}, ["shared memory"]),
        ({"tensor_memory": 513}, ["tensor memory"]),
        ({"tensor_cores": {}}, ["tensor cores"]),
        ({"tensor_cores": {}, "config": "ieee"}, []),
        ({"kernel": "read_kernel", "maxima": 1}, ["maxima"]),
        ({"kernel": "read_kernel", "maxima": 1, "constants": {"ONLINE": True, "ACCURACY": False}}, []),
    ],
)
def test_each_broken_limit_is_a_sentence(change: dict[str, Any], words: list[str]) -> None:
    usage = aot.Usage(
        kernel="k", config="c", target="sm_90", constants={"ONLINE": False, "ACCURACY": False}, registers=255, spills=0,
        stack=0, shared_bytes=227 * 1024, tensor_memory=512, tensor_cores={"HGMMA": 8}, maxima=0,
        instructions_per_logit=9.0,
    )  # fmt: skip
    faults = list(usage._replace(**change).faults())
    assert [word in fault for word, fault in zip(words, faults, strict=True)] == [True] * len(words)


def test_main_loop_contains_the_products() -> None:
    loop = ["MOV", "HMMA", "HMMA", "BRA 0x10"]
    far = ["MOV", "MOV", "BRA 0x20"]  # A block moved out of the loop that jumps back into it
    code = [(f"{at * 16:04x}", *line.partition(" ")[::2]) for at, line in enumerate(["MOV", *loop, *far, "EXIT"])]
    assert sass._main_loop(code) == len(loop)
    assert sass._main_loop([line for line in code if line[1] != "BRA"]) == 0


def test_spills_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
