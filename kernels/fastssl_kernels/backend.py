"""Which implementation runs a loss: the user's choice, checked against the machine; never a silent fallback."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "blockwise", "reference")
TRITON_MAX_FEATURES = 512  # One row of the accumulator has to stay in registers

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_chosen: str | None = None  # Not a ContextVar: torch 2.11 cannot trace one


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the losses, and `augment`, called inside the `with` block on backend `name`.

    "auto" (the default): triton for CUDA tensors if it can run, else blockwise. "triton": CUDA tensors, and CPU
    tensors under TRITON_INTERPRET=1. "blockwise": any device, plain torch. "reference": the definition, with N x K
    logits in memory; for `augment`, which has no logits, the same as "blockwise". Outside any block the environment
    variable FASTSSL_BACKEND decides. A named backend that cannot run raises; nothing falls back silently. Compiled
    code recompiles when the choice made here changes, and reads the environment variable once, during tracing;
    there `augment` is plain torch unless "triton" was named.
    """
    global _chosen
    previous, _chosen = _chosen, _known(name, "use_backend")
    try:
        yield
    finally:
        _chosen = previous


def available_backends(device: torch.device | str) -> dict[str, str | None]:
    """Each backend's name, with None if it runs on `device`, else the reason why not."""
    return {"triton": _why_not_triton(torch.device(device)), "blockwise": None, "reference": None}


def requested() -> str:
    """The name given to `use_backend`, else FASTSSL_BACKEND, else "auto"."""
    return _chosen or _known(os.environ.get("FASTSSL_BACKEND", "auto"), "FASTSSL_BACKEND")


def dispatches_to_reference(
    reference: Callable[_Arguments, _Result],
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Decorate a public function so that `reference` runs instead where the backend is "reference"."""

    def decorate(fast: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @functools.wraps(fast)
        def public(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
            return (reference if requested() == "reference" else fast)(*args, **options)

        return public

    return decorate


def resolve(name: str, *banks: Tensor) -> str:
    """The implementation, "triton" or "blockwise", that `name` means for these banks.

    Raises RuntimeError if triton was named and cannot run.
    """
    return choose(name, banks[0].device, next(filter(None, map(_why_not_these, banks)), None))


def choose(name: str, device: torch.device, reason: str | None = None) -> str:
    """The implementation that `name` means on `device`: `resolve` without banks.

    `reason`: why Triton cannot run, other than the device. Raises RuntimeError as `resolve` does.
    """
    if name == "blockwise":
        return name
    reason = _why_not_triton(device) or reason
    if name == "triton" and reason:
        raise RuntimeError(f'backend "triton" was chosen, but {reason}; choose "auto" or "blockwise" with use_backend')
    return "triton" if device.type == "cuda" and not reason else name.replace("auto", "blockwise")


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f'{source} was given "{name}"; the backends are {", ".join(BACKENDS)}')
    return name


def _why_not_triton(device: torch.device) -> str | None:
    if not _triton_is_installed():
        return "the package triton is not installed (it comes with torch on Linux)"
    if device.type == "cuda":
        return _why_not_cuda(device)
    if device.type != "cpu":
        return f"Triton kernels run on CUDA devices and the tensors are on {device.type}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels run on CPU tensors only under TRITON_INTERPRET=1"
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return "the interpreter of Triton before 3.7 needs numpy before 2.4"  # triton-lang/triton#9171
    return None


def _why_not_these(queue: Tensor) -> str | None:
    if queue.dtype == torch.float64:
        return "Triton kernels do not take float64"
    if queue.shape[1] > TRITON_MAX_FEATURES:
        return f"Triton kernels take at most {TRITON_MAX_FEATURES} features and the rows have {queue.shape[1]}"
    return None


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _release(package: str) -> tuple[int, int]:
    major, minor, *_ = version(package).split(".")
    return int(major), int(minor)


@functools.cache
def _why_not_cuda(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"Triton kernels need compute capability 8.0 and this device has {capability[0]}.{capability[1]}"
    return None
