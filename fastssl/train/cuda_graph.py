"""A training step as one CUDA graph, launched by a single call."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastssl.methods import MethodOutput
from fastssl_pipelines.batch import Batch

_WARM_UPS = 3  # Passes in which libraries choose algorithms and torch.compile compiles


class Graphed:
    """Calls `run` through a CUDA graph; call `capture` first.

    Each batch is copied into the graph's input tensors and must have the shapes and dtypes of the captured one. The
    output belongs to the graph, and the next call overwrites it. Random numbers follow torch's generator as without a
    graph. `state`: all tensors that `run` changes in place; the capture's warm-ups leave them unchanged.
    """

    def __init__(self, run: Callable[[Batch], MethodOutput], state: Callable[[], Iterable[Tensor]]) -> None:
        self._run, self._state = run, state
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def captured(self) -> bool:
        """Whether there is a graph to replay."""
        return self._graph is not None

    def __call__(self, batch: Batch) -> MethodOutput:
        assert self._graph is not None
        for static, given in zip(_tensors(self._input), _tensors(batch), strict=True):
            if (static.shape, static.dtype) != (given.shape, given.dtype):
                raise ValueError(
                    f"a batch of {list(given.shape)} {given.dtype} was given to a CUDA graph captured for "
                    f"{list(static.shape)} {static.dtype}"
                )
            static.copy_(given, non_blocking=True)
        self._graph.replay()
        output = self._output
        return MethodOutput(output.loss, dict(output.metrics), output.updates)

    def capture(self, batch: Batch) -> None:
        """Capture the graph with a representative batch."""
        views = tuple(view.clone() for view in batch.views)
        self._input = Batch(views=views, labels=batch.labels.clone(), ids=batch.ids.clone(), step=batch.step)
        state = list(self._state())
        before, generator = [value.detach().clone() for value in state], torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run(self._input)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Input threads may allocate during the capture, which the mode "global" forbids
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._output = self._run(self._input)
        with torch.no_grad():
            for value, kept in zip(state, before, strict=True):
                value.copy_(kept)
        torch.cuda.set_rng_state(generator)
        self._graph = graph


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return (*batch.views, batch.labels, batch.ids)
