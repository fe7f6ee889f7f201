"""Configurations of kernels: the heaviest, listed by each launch module, and those that `training` launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import kind
from .launch import TF32_MAX_FEATURES, Plan, Tiles, make_plan

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}


class Configuration(NamedTuple):
    """One kernel as a launch compiles it."""

    kernel: Any  # The @triton.jit function
    constants: dict[str, Any]  # Its tl.constexpr arguments
    dtype: torch.dtype  # Of the queue or bank; of augment's result
    options: dict[str, int]  # num_warps, num_stages
    logits: int  # Per tile; 0 for a kernel without logits
    label: str  # For example "bf16 C=128 full online accuracy"
    special: tuple[tuple[str, str], ...] = ()  # Arguments of another type than declared; 1 is a constant

    @property
    def key(self) -> tuple[Any, ...]:
        """Hashable, and equal for equal input to the compiler."""
        sets = (frozenset(values.items()) for values in (self.constants, self.options))
        return self.kernel.__name__, self.dtype, *sets, self.special

    @property
    def fixed(self) -> dict[str, Any]:
        """All constants of the compilation: tl.constexpr arguments, and integers equal to 1."""
        return self.constants | {name: 1 for name, type in self.special if type == "1"}

    @property
    def types(self) -> dict[str, str]:
        """Triton's types of the other arguments."""
        names = [name for name in self.kernel.arg_names if name not in self.fixed]
        declared = {name: argument_type(self.kernel, name, self.dtype) for name in names}
        return declared | {name: type for name, type in self.special if name in names}


class Inputs(NamedTuple):
    """Inputs and settings on which the compiled kernel depends."""

    dtype: torch.dtype  # Of the queue or bank
    features: int
    temperature: float  # 0.01 needs a running maximum, 0.07 does not
    tf32: bool  # Allowed by the user
    accuracy: bool

    def plan(self, table: dict[int, Tiles]) -> Plan:
        """The plan of a launch at MoCo's shapes."""
        plan = make_plan(256, 65536, self.features, self.dtype, table, temperature=self.temperature, processors=132)
        return plan._replace(constants=plan.constants | ({"PRECISION": "tf32"} if self.tf32 else {}))


def every_input() -> Iterator[Inputs]:
    """Inputs to compile bank-reading kernels for: the heaviest at each width of a tile table, more at 128.

    The others run the same tiles with fewer instructions: without a maximum, or on fewer columns.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for features in (128, 256, 512):
        for dtype, tf32 in ((bf16, False), (fp32, False), (fp32, True)):
            if not tf32 or features <= TF32_MAX_FEATURES:
                yield Inputs(dtype, features, 0.01, tf32, accuracy=True)
    for dtype in (bf16, fp32):
        yield Inputs(dtype, 128, 0.07, False, accuracy=False)
        yield Inputs(dtype, 112, 0.01, False, accuracy=True)  # With masks
    yield Inputs(bf16, 128, 0.07, False, accuracy=True)
    yield Inputs(fp16, 128, 0.07, False, accuracy=True)  # With a maximum at any temperature


def configure(kernel: Any, dtype: torch.dtype, constants: dict[str, Any], tiles: Tiles | None = None) -> Configuration:
    """Make a configuration with its label; `tiles` for kernels that compute logits."""
    options, logits = (tiles.options, tiles.rows * tiles.entries) if tiles else ({}, 0)
    return Configuration(kernel, constants, dtype, options, logits, _describe(kernel, dtype, constants))


def launched(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Configuration:
    """The configuration that a launch compiles."""
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    options = {name: value for name, value in options.items() if name not in constants}
    dtype = next((x.dtype for name, x in given.items() if _kind_of(kernel, name) is kind.Elements), torch.float32)
    types = {name: _type_of(value) for name, value in given.items()}
    special = tuple((name, type) for name, type in types.items() if type != argument_type(kernel, name, dtype))
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
    """Label: dtype, width, and what the other constants turn on or count."""
    words = [constants["DTYPE"].name if "DTYPE" in constants else _TYPES[dtype], f"C={constants['FEATURES']}"]
    for name in kernel.arg_names:
        # Weights are always rounded for a bank of 16 bits
        if constants.get(name) is True and (name != "ROUNDED" or dtype == torch.float32):
            words.append(name.lower())
    if "TARGET" in constants:
        words.append(constants["TARGET"])
    if "PRECISION" in constants and dtype == torch.float32:  # Otherwise it has no effect
        words.append(constants["PRECISION"])
    words += [f"{constants[name]} {name.lower()}" for name in ("SPLITS", "COUNT", "TARGETS") if name in constants]
    words += [f"{name}={type.strip('*')}" for name, type in special]
    return " ".join(words)


def argument_type(kernel: Any, name: str, dtype: torch.dtype) -> str:
    """Triton's type of a kernel argument, from its declared `kind` and the configuration's dtype.

    Raises TypeError for an argument without a kind.
    """
    level = "fp32" if dtype == torch.float32 else "fp16"
    return _kind_of(kernel, name).triton.format(dtype=_TYPES[dtype], level=level)


def _kind_of(kernel: Any, name: str) -> Any:
    annotation = kernel.fn.__annotations__.get(name, "nothing")
    module, _, attribute = annotation.partition(".")
    if module != "kind" or not hasattr(kind, attribute):
        raise TypeError(
            f"{kernel.__name__} declares {annotation} for its argument {name}; annotate it with a class of "
            f"triton/kind.py, as in {name}: kind.Floats"
        )
    return getattr(kind, attribute)


def aligned_arguments(configuration: Configuration) -> list[str]:
    """Arguments that are divisible by 16: pointers, widths and strides, and the entries of whole tiles.

    Triton specializes on it; otherwise loads are scalar. The launches pad and copy rows that are not aligned.
    """
    aligned = {kind.Multiple, *([kind.Entries] if configuration.constants.get("FULL", True) else [])}
    return [
        name
        for name, type in configuration.types.items()
        if type.startswith("*") or _kind_of(configuration.kernel, name) in aligned
    ]
