"""`fastssl verify`: errors of every loss against its float64 definition, on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.arguments import Positional, parse
from fastssl.commands import verify_augment
from fastssl.errors import ConfigError, unknown_name
from fastssl.observe.screen import open_screen
from fastssl.observe.table import Colored, Table
from fastssl_kernels import available_backends, parity
from fastssl_kernels.parity import Errors, Inputs

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
TEMPERATURES = (0.07, 0.2, 1.0)
AUGMENT = "augment"

Shape = tuple[int, int, int]  # Rows, entries of the queue, features

SMALL_SHAPES: tuple[Shape, ...] = ((7, 5, 5), (33, 127, 48), (65, 300, 128))
# Rounding a row to 16 bits moves a logit by up to 0.004 / temperature; many features average that out
SMALL_SHAPES_OF_16_BITS: tuple[Shape, ...] = ((33, 127, 128), (65, 300, 128))
CPU_SHAPE: Shape = (256, 4096, 128)
GPU_SHAPE: Shape = (256, 65536, 128)


@dataclass(frozen=True)
class Options:
    """Compare losses, gradients and views with their float64 definition; exit code 1 if any error is too large."""

    loss: Annotated[str, Positional] = "all"
    """a loss (with its variants), augment, or all"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch finds a device"""
    dtype: Literal["all", "float64", "float32", "bfloat16", "float16"] = "all"
    """of the queue; rows are float32, or float64 with a float64 queue"""


class Verdict(NamedTuple):
    """One line of the table: the worst errors over shapes, temperatures and layouts."""

    loss: str
    dtype: torch.dtype
    backend: str
    errors: Errors
    plain: Errors
    tolerated: Errors
    layout: str
    """The layout with the worst errors."""

    @property
    def passed(self) -> bool:
        """Whether all errors are within limits; False for NaN."""
        return all(error <= limit for error, limit in zip(self.errors, self.tolerated, strict=True))


def main(arguments: list[str]) -> int:
    """Run `fastssl verify [LOSS] [--device D] [--dtype D]`."""
    return run(parse(Options, arguments, prog="fastssl verify"))


def run(options: Options) -> int:
    """Print the table; return 0 if all passed, else 1."""
    device = _device(options.device)
    losses = _losses(options.loss)
    dtypes = list(DTYPES.values()) if options.dtype == "all" else [DTYPES[options.dtype]]
    screen = open_screen(least_width=115)
    verdicts = []
    with screen.status() as show:
        for loss in losses:
            show(f"{loss} on {device}")
            check = _verify_augment if loss == AUGMENT else verify
            verdicts += [verdict for dtype in dtypes for verdict in check(loss, dtype, device)]
    screen.table(_table(verdicts))
    screen.line(_caption(device), wrap=True)
    for loss in (name for name in losses if name != AUGMENT):
        for name in _backends(device):
            if reason := parity.why_not(loss, name):
                screen.line(f"{loss}: {name} skipped, because {reason}")
    failed = sum(not verdict.passed for verdict in verdicts)
    screen.line(f"{failed} of {len(verdicts)} failed" if failed else f"all {len(verdicts)} passed")
    return 1 if failed else 0


def verify(loss: str, dtype: torch.dtype, device: str) -> Iterator[Verdict]:
    """Yield a verdict for each backend that runs `loss` in `dtype` on `device`."""
    backends = [name for name in _backends(device) if not parity.why_not(loss, name)]
    if dtype == torch.float64:  # Triton kernels do not support it
        backends = [name for name in backends if name != "triton"]
    errors: dict[str, list[Errors]] = {name: [] for name in ("plain", *backends)}
    strided: dict[str, dict[str, Errors]] = {name: {} for name in backends}
    shapes = _shapes(dtype, device)
    for shape in shapes:
        given = parity.prepare(loss, parity.make_inputs(*shape), dtype, device)
        # On a CPU Triton is interpreted, which would take hours for the large shape
        runs = [name for name in backends if name != "triton" or shape != CPU_SHAPE]
        for temperature in TEMPERATURES:
            truth = parity.evaluate_truth(loss, given, temperature)
            errors["plain"].append(_plain(loss, given, dtype, temperature, truth))
            for name in runs:
                errors[name].append(parity.errors(parity.evaluate(loss, given, temperature, name), truth))
                if shape == shapes[1] and temperature == TEMPERATURES[1]:  # One case is enough: layouts change no value
                    for layout, change in LAYOUTS.items():
                        result = parity.evaluate(loss, _in_layout(given, change), temperature, name)
                        strided[name][layout] = parity.errors(result, truth)
    tolerated = parity.tolerances(loss, dtype)
    for name in sorted(backends):
        layouts = {"contiguous": _worst(errors[name]), **strided[name]}
        worst = max(layouts, key=lambda layout: _of_limit(layouts[layout], tolerated))
        overall = _worst(list(layouts.values()))
        yield Verdict(loss, dtype, name, overall, _worst(errors["plain"]), tolerated, worst)


def _verify_augment(_: str, dtype: torch.dtype, device: str) -> Iterator[Verdict]:
    """Like `verify`, in gray levels and without a gradient."""
    if dtype == torch.float64:  # `augment` does not return it
        return
    for name in _backends(device):
        error, plain = verify_augment.errors(dtype, device, name)
        tolerated = Errors(verify_augment.LIMITS[dtype], 0.0)
        yield Verdict(AUGMENT, dtype, name, Errors(error, 0.0), Errors(plain, 0.0), tolerated, "contiguous")


def _backends(device: str) -> list[str]:
    """The fast backends that run on `device`."""
    return [name for name, why_not in available_backends(device).items() if name != "reference" and not why_not]


def _column_major(x: Tensor) -> Tensor:
    return x.T.contiguous().T if x.ndim == 2 else x


def _sliced(x: Tensor) -> Tensor:
    """Columns of a wider tensor whose other columns must not be read."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), torch.nan if x.is_floating_point() else -99)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"column-major": _column_major, "sliced": _sliced}


def _in_layout(given: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return Inputs(**{field.name: change(getattr(given, field.name)) for field in fields(Inputs)})


def _of_limit(errors: Errors, tolerated: Errors) -> float:
    """The largest fraction of a limit; infinite for NaN."""
    return max(np.nan_to_num(error / limit, nan=np.inf) for error, limit in zip(errors, tolerated, strict=True))


def _plain(loss: str, given: Inputs, dtype: torch.dtype, temperature: float, truth: parity.Result) -> Errors:
    """Errors of plain torch code, as the caption defines it."""
    if dtype == torch.float64:
        return Errors(0.0, 0.0)
    rounded = dtype in (torch.bfloat16, torch.float16)
    with parity.RoundedProducts(dtype) if rounded else nullcontext():
        return parity.errors(parity.evaluate(loss, given, temperature, "reference"), truth)


def _worst(errors: list[Errors]) -> Errors:
    """The largest error of each kind; NaN if any is NaN."""
    return Errors(*np.max(errors, axis=0).tolist())


def _shapes(dtype: torch.dtype, device: str) -> tuple[Shape, ...]:
    small = SMALL_SHAPES if dtype in (torch.float64, torch.float32) else SMALL_SHAPES_OF_16_BITS
    return (*small, GPU_SHAPE if device == "cuda" else CPU_SHAPE)


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch finds no CUDA device; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _losses(given: str) -> list[str]:
    if given == "all":
        return [*parity.LOSSES, AUGMENT]
    names = [name for name in (*parity.LOSSES, AUGMENT) if given in (name, name.partition("+")[0])]
    if not names:
        raise unknown_name("loss", given, [*parity.LOSSES, AUGMENT, "all"])
    return names


def _table(verdicts: list[Verdict]) -> Table:
    errors = ("error:\nloss", "\ngradient", "plain:\nloss", "\ngradient", "limit:\nloss", "\ngradient")
    table = Table(("loss", "dtype", "backend", *errors, "layout", ""), "lllrrrrrrll", framed=False)
    for verdict in verdicts:
        numbers = [f"{x:.1e}" if x else "-" for x in (*verdict.errors, *verdict.plain)]
        limits = [f"{x:.0e}" if x else "-" for x in verdict.tolerated]
        name = str(verdict.dtype).removeprefix("torch.")
        result = Colored("pass", "green") if verdict.passed else Colored("FAIL", "red")
        table.add_row(verdict.loss, name, verdict.backend, *numbers, *limits, verdict.layout, result)
    return table


def _caption(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    try:
        triton = version("triton") + (", interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "")
    except PackageNotFoundError:
        triton = "not installed"
    temperatures = ", ".join(map(str, TEMPERATURES))
    largest = " x ".join(map(str, GPU_SHAPE if device == "cuda" else CPU_SHAPE))
    return f"""
error: relative (Frobenius) error of the loss rows, and of all gradients with weights of either sign, against the \
float64 definition on the same rounded inputs; the worst over shapes up to {largest} (rows x entries x features) \
and temperatures {temperatures}
dtype: of the queue; queries and keys are float32, or float64 with a float64 queue; rows of nt_xent have dtype
plain: plain torch, the definition in float32; in 16 bits with operands and results of matrix products rounded to \
dtype, as under autocast; in float64 it is the reference itself
layout: the worst among contiguous, {" and ".join(LAYOUTS)} arguments
augment: largest error of chains of all operations, in gray levels of 255; dtype: of the result; plain: torchvision \
in float32
{device}: {name}; torch {torch.__version__}, triton {triton}
"""
