"""A fake GPU: tensors without data that claim to be on it, and the ops that run on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.preflight import backward

DEVICE = torch.device("cuda", 0)


class Properties:
    """The properties that torch reports for an H100."""

    name, major, minor, multi_processor_count, warp_size = "NVIDIA H100 80GB HBM3", 9, 0, 132, 32
    max_threads_per_multi_processor, max_threads_per_block, regs_per_multiprocessor = 2048, 1024, 65536
    shared_memory_per_block, shared_memory_per_block_optin, shared_memory_per_multiprocessor = 49152, 232448, 233472
    total_memory, L2_cache_size, clock_rate, memory_clock_rate, memory_bus_width = 2**36, 50 * 2**20, 1980, 2619, 5120
    gcnArchName = ""  # Read only for AMD GPUs


class Waits(AssertionError):
    """The host waits for the device here."""


def synchronize(*_: Any) -> None:
    """Stands in for `synchronize` of torch.cuda and of events."""
    raise Waits("the host waits for the device")


class Event:
    """A CUDA event of the fake device."""

    def __init__(self, **_: bool) -> None: ...

    def record(self, *_: Any) -> None: ...

    def elapsed_time(self, _: Event) -> float:
        return 0.0

    synchronize = synchronize


class Stream:
    """A stream or a graph of the fake device."""

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def replay(self) -> None: ...


_PATCHES: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "_exchange_device": lambda _: 0,
    "_maybe_exchange_device": lambda _: 0,
    "synchronize": synchronize,
    "get_device_capability": lambda _=None: (9, 0),
    "get_device_properties": lambda _=None: Properties,
    "is_bf16_supported": lambda **_: True,
    "is_current_stream_capturing": lambda: False,
    "manual_seed_all": lambda _: None,
    "get_rng_state": lambda _=None: torch.empty(0, dtype=torch.uint8),
    "set_rng_state": lambda *_: None,
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": Stream,
    "current_stream": Stream,
    "stream": nullcontext,
    "graph": lambda _, **__: nullcontext(),
}


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside the `with` block, all tensors are fake, a GPU seems to exist, and backward works on it."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # Then torch's own device guards do nothing
        patch.setattr(FakeTensorMode, "avoid_device_init", True, raising=False)
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for name, value in _PATCHES.items():
            patch.setattr(torch.cuda, name, value)
            if hasattr(CudaInterface, name) and not isinstance(value, type):  # It kept torch's
                patch.setattr(CudaInterface, name, staticmethod(value))
        patch.setattr(torch.accelerator, "is_available", lambda: False)  # Else torch.compile asks for its stream
        patch.setattr(torch._C, "_select_conv_backend", lambda *_, **__: None)
        patch.setattr(torch._C, "_conv_determine_backend_memory_format", _format_of_cudnn)
        patch.setattr(FakeTensor, "__deepcopy__", _copy, raising=False)
        patch.setattr(nn.Module, "_apply", _apply)
        stack.enter_context(backward.install())
        yield mode


def _format_of_cudnn(images: Tensor, weight: Tensor, _: Any) -> torch.memory_format:
    """The memory format that cuDNN returns; without a driver, torch expects that of a kernel without channels_last."""
    last = torch.channels_last
    return last if last in map(suggest_memory_format, (images, weight)) else torch.contiguous_format


def _copy(tensor: Tensor, _: Any) -> Tensor:
    """A deep copy; torch's own would copy the fake mode too."""
    return _like(tensor, tensor.detach().clone())


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Replaces what Module.to calls, which swaps tensors; fake tensors do not allow that."""
    for child in module.children():
        _apply(child, function)
    for store in (module._parameters, module._buffers):
        for name, value in store.items():
            if value is not None:
                store[name] = _like(value, function(value.detach()))
    return module


def _like(before: Tensor, after: Tensor) -> Tensor:
    return nn.Parameter(after, before.requires_grad) if isinstance(before, nn.Parameter) else after


_COPIES = ("_to_copy", "copy", "copy_", "_foreach_copy_")
_IN_PLACE = ("_fused_sgd", "_fused_adam", "_amp_")
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view")


class Ops(TorchDispatchMode):
    """Counts the ops that launch something on the device; `Waits` where one copies to or from it.

    Fake tensors themselves refuse ops that look at values. An op of several tensors counts once, and so does a fused
    loss, whatever it launches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        # These change their arguments, and torch has no fake for them
        result = None if name.startswith(_IN_PLACE) else func(*args, **(kwargs or {}))
        inputs, outputs = _devices((args, kwargs)), _devices(result)
        if DEVICE in inputs | outputs and func.namespace != "prim":
            if name in _COPIES and len(inputs | outputs) > 1:
                raise Waits(f"{func} copies between {' and '.join(map(str, inputs | outputs))}")
            if not (func.is_view or name in _FREE):
                self.counts[name] += 1
        return result


def _devices(values: Any) -> set[torch.device]:
    return {value.device for value in tree_leaves(values) if isinstance(value, Tensor)}
