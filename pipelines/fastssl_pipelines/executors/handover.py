"""How batches come from the CUDA stream that makes them to the one that trains on them; on a CPU there is neither.

The contract: all that the threads of an executor queue goes to one CUDA stream of the executor's own, so that no copy
and no kernel of the input waits for the training that is queued elsewhere. An event behind the last of it goes with
the batch (`Batch.ready`); in the consumer's thread its CUDA stream waits for that event, and the memory of the batch
for that stream (`Batch.take`).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator, Iterable

import torch

from fastssl_pipelines.batch import Batch

TURN_S = 5e-4  # torch gives the interpreter up in each call, and a thread that trains waits a turn to have it back
HOST_AHEAD = 4  # steps; enough for a device never to wait for the host, and few enough batches that fill its memory


class InputStream:
    """The CUDA stream of an executor on `device`; for a CPU it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def enter(self) -> None:
        """Make it the current CUDA stream of this thread, which takes short turns in the interpreter.

        Other threads take them, too, and for good: later streams want that again, and it costs nobody anything else.
        """
        if self._stream is not None:
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(self._stream)
            sys.setswitchinterval(min(sys.getswitchinterval(), TURN_S))

    def finish(self, batch: Batch) -> Batch:
        """The batch with the event behind all that was queued for it."""
        if self._stream is not None:
            batch.ready = self._stream.record_event()
        return batch


def handed_over(batches: Iterable[Batch]) -> Generator[Batch]:
    """The batches, each for the current CUDA stream of this thread to read.

    This thread comes at most HOST_AHEAD batches ahead of what its CUDA stream has done with them.
    """
    in_use: deque[torch.cuda.Event] = deque()
    for batch in batches:
        batch.take()
        yield batch
        if batch.ready is not None:
            in_use.append(torch.cuda.Event(blocking=True))  # a core that spins is one that does not decode
            in_use[-1].record(torch.cuda.current_stream(batch.ids.device))
            if len(in_use) > HOST_AHEAD:
                in_use.popleft().synchronize()
