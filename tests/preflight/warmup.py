"""Every Triton kernel compiled as a launch compiles it, by the launch functions themselves, for GPUs not at hand.

    python -m tests.preflight.warmup --targets sm_80,sm_90,sm_100 --all

Arguments are tensors without data; what Triton asks of a driver it gets from a fake one. Fails where a kernel does not
compile or asks for more memory than a target has.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastssl_kernels import AugmentParameters
from fastssl_kernels.aot import SHARED_BYTES
from fastssl_kernels.triton import augment, losses
from tests.preflight.driver import installed
from tests.preflight.fake_cuda import DEVICE, fake_cuda

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_BASE = 2**20  # Address of every storage


class Size(NamedTuple):
    """Rows, entries of the bank, features."""

    rows: int
    entries: int
    features: int


TRAINING, ONE = Size(256, 65536, 128), Size(1, 1, 1)
_MORE = (Size(256, 131072, 512), Size(256, 65536, 256), Size(1, 65536, 128), Size(250, 3000, 100))


class Case(NamedTuple):
    """One call of a launch function."""

    function: str
    dtype: str
    size: Size
    temperature: float = 0.2
    """0.01 needs a running maximum."""

    def __str__(self) -> str:
        return f"{self.function} {self.dtype} {'x'.join(map(str, self.size))} t={self.temperature}"


class Inputs:
    """Arguments on the fake device; rows are float32 as from the heads, and the bank has the case's dtype."""

    def __init__(self, case: Case) -> None:
        rows, entries, features = case.size
        self.temperature, self.dtype = case.temperature, DTYPES[case.dtype]
        self.query, self.key = self.floats(rows, features), self.floats(rows, features)
        self.teachers = self.floats(2, rows, features)
        self.queue, self.keys = (self.floats(count, features, dtype=self.dtype) for count in (entries, rows))
        self.weight, self.upstream = self.floats(rows), self.floats(rows)
        self.labels, self.index, self.bank_labels = self.longs(rows), self.longs(rows), self.longs(entries)
        self.targets = self.longs(2, rows)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    def longs(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=DEVICE)

    def images(self) -> tuple[Tensor, AugmentParameters, torch.dtype]:
        """As many images as rows, as wide as the number of features."""
        count, side = len(self.query), self.query.shape[1]
        numbers = {name: self.floats(count) for name in ("brightness", "contrast", "saturation", "hue", "blur_sigma")}
        switches = {name: self.longs(count).bool() for name in ("flip", "grayscale", "solarize")}
        parameters = AugmentParameters(
            **numbers, **switches, order=self.longs(count, 4), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)
        )
        return torch.empty(count, side, side, 3, dtype=torch.uint8, device=DEVICE), parameters, self.dtype


FUNCTIONS: dict[str, Callable[[Inputs], Any]] = {
    "info_nce": lambda x: [
        losses.info_nce_rows(x.query, x.key, x.queue, x.temperature, accuracy) for accuracy in (True, False)
    ],
    "unicon": lambda x: losses.unicon_rows(x.query, x.key, x.queue, x.labels, x.bank_labels, x.temperature, True),
    "sup_con": lambda x: losses.sup_con_rows(x.query, x.key, x.queue, x.labels, x.bank_labels, x.temperature, True),
    "unmix": lambda x: losses.unmix_rows(x.query, x.key, x.key, x.queue, x.weight, x.temperature),
    "mixco": lambda x: losses.mixco_rows(x.query, x.keys, x.queue, x.index, x.labels, x.weight, x.temperature),
    "consistency": lambda x: [
        losses.consistency_rows(x.query, x.key, x.queue, x.temperature, positive) for positive in (True, False)
    ],
    "soft_cross_entropy": lambda x: [
        losses.soft_cross_entropy_rows(x.query, x.teachers[:count], x.queue, x.temperature, 0.6 * x.temperature)
        for count in (1, 2)
    ],
    "bank_cross_entropy": lambda x: losses.bank_cross_entropy_rows(x.query, x.queue, x.targets, x.temperature),
    "bank_gradient": lambda x: losses.bank_gradient(
        x.query, x.queue, x.targets, x.bank_labels, x.weight, x.weight, x.upstream, x.temperature, False
    ),
    "nt_xent": lambda x: [
        losses.nt_xent_rows(x.keys, x.labels, x.temperature),
        losses.bank_gradient(
            x.keys, x.keys, x.labels[None], x.labels, x.weight, x.weight, x.upstream, x.temperature, True
        ),
    ],
    "mean_shift": lambda x: losses.mean_shift_rows(x.query, x.key, x.queue, k=min(5, len(x.queue))),
    "nearest": lambda x: [losses.nearest(x.query, x.queue, min(count, len(x.queue))) for count in (1, 200)],
    "queue_read": lambda x: [
        losses.queue_read(x.query, x.queue, x.temperature),
        losses.queue_read_gradient(x.query, x.queue, x.upstream, x.key, x.temperature),
    ],
    "augment": lambda x: augment.augment(*x.images()),
}


def training_cases() -> Iterator[Case]:
    """The launches of a bf16 run: each function once, and once with sizes of 1; SMoG's groups with gradient in fp32."""
    for function in FUNCTIONS:
        for size in (TRAINING, ONE):
            yield Case(function, "bf16", size)
    for function in ("bank_cross_entropy", "bank_gradient"):
        yield Case(function, "fp32", TRAINING)


def training_tasks(targets: list[str]) -> list[tuple[Case, str]]:
    """Every case for the first target; those of TRAINING size also for one of the other targets, in turn."""
    first, *others = targets
    large = [case for case in training_cases() if case.size == TRAINING]
    return [(case, first) for case in training_cases()] + list(zip(large, cycle(others), strict=False))


def every_case() -> Iterator[Case]:
    """All functions, dtypes, sizes and temperatures, training cases first."""
    cases = [
        Case(function, dtype, size, temperature)
        for function in FUNCTIONS
        for dtype in DTYPES
        for size in (TRAINING, ONE, *_MORE)
        for temperature in (0.2, 0.01)
    ]
    yield from dict.fromkeys([*training_cases(), *cases])


class Result(NamedTuple):
    """The outcome of a case on a target."""

    case: str
    target: str
    kernels: dict[str, int]
    """Largest shared memory in bytes of each kernel."""
    error: str
    seconds: float


def launch(case: Case, target: str) -> Result:
    """Call the function of a case as on `target`; the result has any error of its kernels."""
    began, error = time.monotonic(), ""
    with installed(target) as driver, fake_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTensor, "data_ptr", lambda x: _BASE + x.storage_offset() * x.element_size())
        try:
            FUNCTIONS[case.function](Inputs(case))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"[-2000:]
    kernels: dict[str, int] = {}
    for name, shared_bytes in driver.launched:
        kernels[name] = max(shared_bytes, kernels.get(name, 0))
    return Result(str(case), target, kernels, error, round(time.monotonic() - began, 1))


def _launch(task: tuple[Case, str]) -> Result:
    return launch(*task)


def main() -> int:
    """Run the command; 1 if any kernel fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.preflight.warmup", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default="sm_90,sm_80,sm_100", help="GPU targets (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="all dtypes, sizes and temperatures for every target")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    given = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, which makes kernels plain Python; unset it to compile them")
    targets = given.targets.split(",")
    for target in targets:
        if target not in SHARED_BYTES:
            parser.error(f"--targets names {target!r}; it takes {', '.join(SHARED_BYTES)}, separated by commas")
    tasks = [(case, target) for target in targets for case in every_case()] if given.all else training_tasks(targets)
    print(f"Triton {triton.__version__}, torch {torch.__version__}, {len(tasks)} cases on {given.targets}", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # So that everything is compiled now
        with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
            for result in pool.imap(_launch, tasks):
                results.append(result)
                largest = max(result.kernels.values(), default=0) / 1024
                line = result.error or f"{len(result.kernels)} kernels, at most {largest:.0f} KiB shared"
                print(f"{result.target:7} {result.case:48} {result.seconds:5.1f} s  {line}", flush=True)
    if given.json:
        given.json.write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n")
    return 1 if any(result.error or not result.kernels for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
