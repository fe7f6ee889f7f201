"""Registers, stack, instructions and main loop of a compiled kernel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from triton.backends.nvidia import __file__ as _nvidia

_TOOL = Path(_nvidia).parent / "bin" / "cuobjdump"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
# "/*0e10*/  @!P0 HMMA.16816.F32.BF16 R4, ... ;": address, mnemonic up to the first dot, operands
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z]\w*)(.*?);", re.MULTILINE)
_TARGET = re.compile(r"0x([0-9a-f]+)")


class Sass(NamedTuple):
    """Static counts: each instruction counts once, however often it runs."""

    registers: int
    stack: int  # Bytes per thread
    spills: int  # Instructions that load or store local memory
    tensor_cores: dict[str, int]  # By mnemonic: HMMA (sm_80 on), HGMMA (sm_90), UTCHMMA (sm_100)
    maxima: int  # Of floating-point values
    loop: int  # Instructions of the main loop, 0 if there is none


def disassemble(cubin: bytes) -> Sass:
    """Disassemble one compiled kernel with the cuobjdump that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOL), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    resources = _RESOURCES.search(text)
    code = _INSTRUCTION.findall(text)
    if resources is None or not code:
        raise RuntimeError(f"cuobjdump showed no kernel: {text[:200]}")
    counts = Counter(name for _, name, _ in code)
    return Sass(
        registers=int(resources[1]),
        stack=int(resources[2]),
        spills=counts["LDL"] + counts["STL"],
        tensor_cores={name: count for name, count in sorted(counts.items()) if name.endswith("MMA")},
        maxima=sum(count for name, count in counts.items() if name.startswith("FMNMX")),
        loop=_main_loop(code),
    )


def _main_loop(code: list[tuple[str, str, str]]) -> int:
    """Length of the backward branch with the densest tensor-core instructions; without any, of the longest branch.

    Not the longest: blocks moved out of the loop also branch back, over the loop and all code in between.
    """
    position = {int(address, 16): at for at, (address, _, _) in enumerate(code)}
    products = [0]
    for _, name, _ in code:
        products.append(products[-1] + name.endswith("MMA"))
    best = (0.0, 0)
    for last, (_, name, operands) in enumerate(code):
        target = _TARGET.search(operands) if name == "BRA" else None
        first = position.get(int(target[1], 16), last) if target else last
        if first < last:
            length = last + 1 - first
            best = max(best, ((products[last + 1] - products[first]) / length, length))
    return best[1]
