"""What a compiled kernel is made of: registers, stack, instructions, its main loop."""

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
    """Counts of instructions are static: each counts once, however often it runs."""

    registers: int
    stack: int  # bytes per thread
    spills: int  # instructions that load or store local memory
    tensor_cores: dict[str, int]  # by mnemonic: HMMA (sm_80 on), HGMMA (sm_90), UTCHMMA (sm_100)
    maxima: int  # of floating point numbers
    loop: int  # instructions of the main loop, 0 if none


def disassemble(cubin: bytes) -> Sass:
    """Take one compiled kernel apart with the cuobjdump that comes with Triton."""
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
    """Length of the branch back over the densest tensor-core instructions, or of the longest where there are none.

    The densest, because blocks moved out of the loop also branch back, over the loop and all code in between.
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
