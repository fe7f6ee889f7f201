"""Fake GPU: its tensors are on the CPU, and operations queued on its CUDA streams are only recorded."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda", 0)


@dataclass(eq=False)
class Stream:
    """Logs its operations: ("copy", whether the host waits for it), ("record", event), ("wait", event)."""

    name: str
    log: list[tuple[Any, ...]] = field(default_factory=list)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.log.append(("wait", event))


class Event:
    """Remembers the stream it was recorded on, and whether the host waited for it."""

    def __init__(self, **options: Any) -> None:
        self.stream: Stream | None = None
        self.waited_for = False

    def record(self, stream: Stream) -> None:
        self.stream = stream
        stream.log.append(("record", self))

    def synchronize(self) -> None:
        self.waited_for = True


class FakeCuda:
    """`streams`: created streams. `kept`: for each `record_stream` the memory, the stream and the thread.

    `pinned`: addresses of memory that was asked for as pinned. `consumer`: the stream of every thread that sets none.
    `turns_s`: how long a thread may keep the interpreter, each time that this was set.
    """

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.kept: list[tuple[int, Stream, str]] = []
        self.turns_s: list[float] = []
        self.pinned: set[int] = set()
        self.consumer = Stream("consumer")
        self._current = threading.local()

    def new_stream(self, device: object = None) -> Stream:
        self.streams.append(Stream(f"stream {len(self.streams)}"))
        return self.streams[-1]

    def current_stream(self, device: object = None) -> Stream:
        return getattr(self._current, "stream", self.consumer)

    def set_stream(self, stream: Stream) -> None:
        self._current.stream = stream


def install(patch: pytest.MonkeyPatch) -> FakeCuda:
    """Replace torch.cuda by the fake; a tensor "on" it is a copy on the CPU."""
    fake = FakeCuda()
    real_to, real_empty = torch.Tensor.to, torch.empty

    def to(self: torch.Tensor, *where: Any, **options: Any) -> torch.Tensor:
        if not where or not isinstance(where[0], torch.device) or where[0].type != "cuda":
            return real_to(self, *where, **options)
        waits = not options.get("non_blocking", False) or self.data_ptr() not in fake.pinned
        fake.current_stream().log.append(("copy", waits))
        return self.clone()

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        tensor = real_empty(*size, **options)
        if pin_memory:
            fake.pinned.add(tensor.data_ptr())
        return tensor

    def record_stream(self: torch.Tensor, stream: Stream) -> None:
        fake.kept.append((self.untyped_storage().data_ptr(), stream, threading.current_thread().name))

    patch.setattr(torch.Tensor, "to", to)
    patch.setattr(torch.Tensor, "record_stream", record_stream)
    patch.setattr(torch, "empty", empty)
    patch.setattr(sys, "setswitchinterval", fake.turns_s.append)
    for name, value in {
        "Stream": fake.new_stream,
        "Event": Event,
        "current_stream": fake.current_stream,
        "set_stream": fake.set_stream,
        "set_device": lambda device: None,
        "mem_get_info": lambda device: (2**40, 2**40),
    }.items():
        patch.setattr(torch.cuda, name, value)
    return fake
