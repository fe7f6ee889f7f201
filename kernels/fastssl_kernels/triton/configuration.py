"""What the kernels are compiled for: the heaviest, which each launch module lists, and what `training` launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .launch import TF32_MAX_FEATURES, Plan, Tiles, make_plan

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
_OPERANDS = ("queue", "bank", "stream", "result")
_LONGS = ("index", "limit", "kept", "order")
_SWITCHES = ("grayscale", "solarize", "flip")
_COUNTS = (
    *("rows", "entries", "features", "boundary", "share", "splits", "targets"),
    *("pixels", "height", "width", "radius", "across", "parts"),
)
_FACTORS = ("scale", "inverse_temperature")


class Configuration(NamedTuple):
    """One kernel as a launch compiles it."""

    kernel: Any  # the @triton.jit function
    constants: dict[str, Any]  # its tl.constexpr arguments
    dtype: torch.dtype  # of the queue or bank; of augment's result
    options: dict[str, int]  # num_warps, num_stages
    logits: int  # per tile, 0 for a kernel without
    label: str  # such as "bf16 C=128 full online accuracy"
    special: tuple[
        tuple[str, str], ...
    ] = ()  # arguments with types that `argument_type` does not tell; 1 is a constant

    @property
    def key(self) -> tuple[Any, ...]:
        """Hashable, and equal where the compiler gets the same."""
        sets = (frozenset(values.items()) for values in (self.constants, self.options))
        return self.kernel.__name__, self.dtype, *sets, self.special

    @property
    def fixed(self) -> dict[str, Any]:
        """All that Triton takes as constants: its own and integers that are 1."""
        return self.constants | {name: 1 for name, kind in self.special if kind == "1"}

    @property
    def types(self) -> dict[str, str]:
        """Triton's types of the other arguments."""
        names = [name for name in self.kernel.arg_names if name not in self.fixed]
        return {name: argument_type(name, self.dtype) for name in names} | {
            name: kind for name, kind in self.special if name in names
        }


class Inputs(NamedTuple):
    """Inputs and settings that make a launch compile a kernel anew."""

    dtype: torch.dtype  # of the queue or bank
    features: int
    temperature: float  # 0.01 needs a running maximum, 0.07 does not
    tf32: bool  # the user allowed it
    accuracy: bool

    def plan(self, table: dict[int, Tiles]) -> Plan:
        """What a launch would plan for MoCo's shapes."""
        plan = make_plan(256, 65536, self.features, self.dtype, table, temperature=self.temperature, processors=132)
        return plan._replace(constants=plan.constants | ({"PRECISION": "tf32"} if self.tf32 else {}))


def every_input() -> Iterator[Inputs]:
    """What kernels that read a bank are compiled for: the heaviest at each width of a tile table, more at 128.

    What is left out runs the same tiles with fewer instructions: without a maximum, or on fewer columns.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for features in (128, 256, 512):
        for dtype, tf32 in ((bf16, False), (fp32, False), (fp32, True)):
            if not tf32 or features <= TF32_MAX_FEATURES:
                yield Inputs(dtype, features, 0.01, tf32, accuracy=True)
    for dtype in (bf16, fp32):
        yield Inputs(dtype, 128, 0.07, False, accuracy=False)
        yield Inputs(dtype, 112, 0.01, False, accuracy=True)  # masks
    yield Inputs(bf16, 128, 0.07, False, accuracy=True)
    yield Inputs(fp16, 128, 0.07, False, accuracy=True)  # has a maximum at any temperature


def configure(kernel: Any, dtype: torch.dtype, constants: dict[str, Any], tiles: Tiles | None = None) -> Configuration:
    """A configuration with its label; `tiles` for kernels that form logits."""
    options, logits = (tiles.options, tiles.rows * tiles.entries) if tiles else ({}, 0)
    return Configuration(kernel, constants, dtype, options, logits, _describe(kernel, dtype, constants))


def launched(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Configuration:
    """The configuration for which a launch compiles its kernel."""
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    options = {name: value for name, value in options.items() if name not in constants}
    dtype = next((value.dtype for name, value in given.items() if name in _OPERANDS), torch.float32)
    kinds = {name: _type_of(value) for name, value in given.items()}
    special = tuple((name, kind) for name, kind in kinds.items() if kind != argument_type(name, dtype))
    logits = constants["ROWS"] * constants["ENTRIES"] if "ENTRIES" in constants else 0
    return Configuration(
        kernel, constants, dtype, options, logits, _describe(kernel, dtype, constants, special), special
    )


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "1" if value == 1 else "i32"


def _describe(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], special: tuple[tuple[str, str], ...] = ()
) -> str:
    """dtype, width, and whatever the other constants turn on or count."""
    words = [constants["DTYPE"].name if "DTYPE" in constants else _TYPES[dtype], f"C={constants['FEATURES']}"]
    for name in kernel.arg_names:
        # of a bank of 16 bits the weights are always rounded
        if constants.get(name) is True and (name != "ROUNDED" or dtype == torch.float32):
            words.append(name.lower())
    if "TARGET" in constants:
        words.append(constants["TARGET"])
    if "PRECISION" in constants and dtype == torch.float32:  # else it means nothing
        words.append(constants["PRECISION"])
    words += [f"{constants[name]} {name.lower()}" for name in ("SPLITS", "COUNT", "TARGETS") if name in constants]
    words += [f"{name}={kind.strip('*')}" for name, kind in special]
    return " ".join(words)


def argument_type(name: str, dtype: torch.dtype) -> str:
    """Triton's type of a kernel argument, by the one naming convention that all kernels keep.

    `queue`, `bank`, `stream` and `result` point to `dtype`, `levels` to float16 or, with it, float32; `images` to
    uint8, switches to bool; `index`, `limit`, `kept`, `order` and names that end in `labels` to int64; counts and
    strides are int32 and factors float32 values; all else points to float32.
    """
    if name in _OPERANDS:
        return f"*{_TYPES[dtype]}"
    if name == "levels":
        return "*fp32" if dtype == torch.float32 else "*fp16"
    if name == "images":
        return "*u8"
    if name in _SWITCHES:
        return "*u1"
    if name in _LONGS or name.endswith("labels"):
        return "*i64"
    if name in _COUNTS or name.endswith(("_rows", "_stride")):
        return "i32"
    return "fp32" if name in _FACTORS or name.endswith(("_scale", "_shift")) else "*fp32"


def aligned_arguments(configuration: Configuration) -> list[str]:
    """The arguments that are divisible by 16: pointers, widths and strides, and the entries of whole tiles.

    Triton specialises on it; without, loads are scalar. The launches widen and copy rows that are not.
    """
    whole = configuration.constants.get("FULL", True)

    def aligned(name: str, kind: str) -> bool:
        size = name in ("features", "share") or name.endswith("_stride") or (whole and name == "entries")
        return size or kind.startswith("*")

    return [name for name, kind in configuration.types.items() if aligned(name, kind)]
