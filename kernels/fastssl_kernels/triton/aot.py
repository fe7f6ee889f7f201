"""Compile the kernels for a GPU that need not be there, and say what each needs of it.

    python -m fastssl_kernels.triton.aot 90 bfloat16 128      one JSON line per kernel

Run it without TRITON_INTERPRET: under it the kernels are plain Python.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.compiler import ASTSource

from . import launch
from .combine import combine_kernel
from .labelled_read import labelled_read_kernel
from .read import read_kernel

_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ROWS, _ENTRIES, _PROCESSORS = 256, 65536, 132  # MoCo's shapes on a full GPU


class Usage(NamedTuple):
    """What a compiled kernel needs: registers and spilled bytes per thread, shared bytes per program."""

    kernel: str
    registers: int
    stack: int
    shared: int


def compile_all(capability: int, dtype: torch.dtype, features: int, temperature: float = 0.07) -> list[Usage]:
    """Compile every kernel for CUDA `capability` (80, 90, ...): float32 query, queue of `dtype`."""
    usages = []
    for labelled, kernel in ((False, read_kernel), (True, labelled_read_kernel)):
        plan = launch.make_plan(
            _ROWS,
            _ENTRIES,
            features,
            dtype,
            labelled=labelled,
            temperature=temperature,
            accuracy=True,
            processors=_PROCESSORS,
        )
        options = {"num_warps": plan.tiles.warps, "num_stages": plan.tiles.stages}
        usages.append(_compile(kernel, plan.constants, dtype, capability, options))
        constants = {
            "ROWS": launch.COMBINE_ROWS,
            "FEATURES": plan.constants["FEATURES"],
            "LABELLED": labelled,
            "ACCURACY": True,
        }
        usages.append(_compile(combine_kernel, constants, dtype, capability, {}))
    return usages


def _compile(kernel: Any, constants: dict[str, Any], dtype: torch.dtype, capability: int, options: dict) -> Usage:
    types = {name: _argument_type(name, dtype) for name in kernel.arg_names if name not in constants}
    # As a launch does for aligned pointers and sizes divisible by 16; without it loads are scalar.
    aligned = [
        (kernel.arg_names.index(name),)
        for name, kind in types.items()
        if kind.startswith("*") or name in ("rows", "entries", "features", "queue_stride", "share")
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=constants,
        attrs={position: [["tt.divisibility", 16]] for position in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _registers_and_stack(compiled.asm["cubin"])
    return Usage(kernel.__name__, registers, stack, compiled.metadata.shared)


def _argument_type(name: str, dtype: torch.dtype) -> str:
    if name == "queue":
        return f"*{_TRITON_NAMES[dtype]}"
    if name.endswith("_labels"):
        return "*i64"
    if name in ("scale", "inverse_temperature"):
        return "fp32"
    return "i32" if name in ("rows", "entries", "features", "queue_stride", "share", "splits") else "*fp32"


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    tool = Path(nvidia).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about registers: {text}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    for usage in compile_all(int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])):
        print(json.dumps(usage._asdict()))
