"""Compile every kernel ahead of time, for GPUs that need not be present, and report the resources it uses.

    python -m fastssl_kernels.aot --targets sm_80,sm_90

Fails if a kernel spills registers, uses the stack, exceeds a target's memory, multiplies without tensor cores, or
computes a maximum that it does not need.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .sass import disassemble
from .triton import augment, bank_gradient, consistency, losses, nearest, read, training
from .triton.configuration import Configuration, aligned_arguments

# Shared memory available to one program.
SHARED_BYTES = {f"sm_{number}": size * 1024 for number, size in ((80, 163), (90, 227), (100, 227), (120, 99))}
TENSOR_MEMORY_COLUMNS = 512  # Of sm_100
UNSHIFTED = ("read_kernel", "labeled_read_kernel")  # These skip the maximum where exponentials cannot overflow
_COLUMNS = "{:24} {:64} {:7} {:>9} {:>6} {:>5} {:>7} {:12} {:>6} {:>6}"
_HEADINGS = ("kernel", "config", "target", "registers", "spills", "stack", "shared", "tensor cores", "maxima", "/logit")


class Usage(NamedTuple):
    """One kernel in one configuration, compiled for one target."""

    kernel: str
    config: str
    target: str
    constants: dict[str, Any]
    registers: int  # Per thread
    spills: int  # Instructions that load or store local memory
    stack: int  # Bytes per thread
    shared_bytes: int  # Per program
    tensor_memory: int  # Columns per program; sm_100 only
    tensor_cores: dict[str, int]  # Instructions by mnemonic
    maxima: int  # Floating-point maximum instructions
    instructions_per_logit: float | None  # Of the main loop, per logit of a thread; None without logits

    def faults(self) -> Iterator[str]:
        """Yield one sentence for each limit it breaks."""
        name = f"{self.kernel} ({self.config}) on {self.target}"
        if self.spills:
            yield f"{name} spills: {self.spills} instructions load or store registers; make its tiles smaller."
        if self.stack:
            yield f"{name} uses {self.stack} bytes of stack per thread; make its tiles smaller."
        if self.shared_bytes > SHARED_BYTES[self.target]:
            yield (
                f"{name} needs {self.shared_bytes} bytes of shared memory and the target has "
                f"{SHARED_BYTES[self.target]}; make its tiles smaller or its stages fewer."
            )
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            yield (
                f"{name} needs {self.tensor_memory} columns of tensor memory and the target has "
                f"{TENSOR_MEMORY_COLUMNS}; make its tiles smaller."
            )
        if self.instructions_per_logit and "ieee" not in self.config and not self.tensor_cores:
            yield f"{name} multiplies without tensor cores; give its operands a dtype they support."
        if self.kernel in UNSHIFTED and not self.constants["ONLINE"] and not self.constants["ACCURACY"] and self.maxima:
            yield f"{name} computes {self.maxima} maxima, though its exponentials need none; guard them with ONLINE."

    def row(self) -> str:
        """Format its line of the table."""
        products = " ".join(f"{count} {name}" for name, count in self.tensor_cores.items()) or "-"
        ratio = "-" if self.instructions_per_logit is None else f"{self.instructions_per_logit:.1f}"
        return _COLUMNS.format(
            self.kernel, self.config, self.target, self.registers, self.spills, self.stack, self.shared_bytes,
            products, self.maxima, ratio,
        )  # fmt: skip


def compile_for(configuration: Configuration, target: str) -> Usage:
    """Compile one configuration for `target` ("sm_90") and count what the result uses."""
    kernel, types, logits = configuration.kernel, configuration.types, configuration.logits
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=configuration.fixed,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned_arguments(configuration)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=configuration.options)
    sass = disassemble(compiled.asm["cubin"])
    # For an even split; a target that gives some logits to two threads shows more instructions for each
    per_thread = logits / (32 * compiled.metadata.num_warps)
    return Usage(
        kernel=kernel.__name__,
        config=configuration.label,
        target=target,
        constants=configuration.constants,
        registers=sass.registers,
        spills=sass.spills,
        stack=sass.stack,
        shared_bytes=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_cores=sass.tensor_cores,
        maxima=sass.maxima,
        instructions_per_logit=round(sass.loop / per_thread, 2) if logits else None,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 if any configuration breaks a limit."""
    parser = argparse.ArgumentParser(prog="python -m fastssl_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(SHARED_BYTES), help="GPU targets (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table, with more columns, to FILE")
    parser.add_argument("--kernel", metavar="NAME", help="compile only this kernel, for example read_kernel")
    given = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, which turns kernels into plain Python; unset it to compile them.")
    targets = given.targets.split(",")
    for target in targets:
        if target not in SHARED_BYTES:
            parser.error(f"--targets names {target!r}; it takes {', '.join(SHARED_BYTES)}, separated by commas.")
    names = [configuration.kernel.__name__ for configuration in configurations()]
    if given.kernel not in (None, *names):
        parser.error(f"--kernel names {given.kernel!r}; it takes {', '.join(sorted(set(names)))}.")
    tasks = [(at, target) for at, name in enumerate(names) if given.kernel in (None, name) for target in targets]
    usages = list(compile_all(tasks))
    if given.json:
        given.json.write_text(json.dumps([usage._asdict() for usage in usages], indent=1, default=str) + "\n")
    faults = [fault for usage in usages for fault in usage.faults()]
    print(*faults, sep="\n", file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


def compile_all(tasks: list[tuple[int, str]]) -> Iterator[Usage]:
    """Compile configurations, given by index and target, in one process per core; print each line once it is known."""
    print(_COLUMNS.format(*_HEADINGS))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # An empty one, so that everything is compiled now
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(len(os.sched_getaffinity(0)), len(tasks)), _prepare) as pool:
            for usage in pool.imap(_compile_task, tasks):
                print(usage.row(), flush=True)
                yield usage


_prepared: list[Configuration] = []


def _prepare() -> None:
    # Kernels cannot be pickled; each process builds the same list
    _prepared[:] = configurations()


def _compile_task(task: tuple[int, str]) -> Usage:
    at, target = task
    return compile_for(_prepared[at], target)


def configurations() -> Iterator[Configuration]:
    """Every configuration that training launches, and the heaviest of each launch module, each once."""
    modules = (training, read, losses, consistency, nearest, bank_gradient, augment)
    found = {each.key: each for module in modules for each in module.configurations()}
    yield from found.values()


if __name__ == "__main__":
    sys.exit(main())
