"""Forward and backward as one CUDA graph, which the host launches at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.methods import MethodOutput
from fastssl_pipelines.batch import Batch

_WARM_UPS = 3  # passes in which libraries choose algorithms and torch.compile compiles


class Graphed:
    """Calls `run` (forward and backward of `method`) through a CUDA graph, captured at the first call.

    Batches are copied into the tensors that the graph reads; output and gradients are its own and are overwritten by
    the next call, so gradients are never to be set to None. Every batch must have the first one's shapes and
    dtypes. Random numbers follow torch's generator as they do without a graph.
    """

    def __init__(self, run: Callable[[Batch], MethodOutput], method: nn.Module) -> None:
        self._run, self._method = run, method
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> MethodOutput:
        if self._graph is None:
            self._capture(batch)
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
        return MethodOutput(output.loss, dict(output.metrics), output.kept)

    def _capture(self, batch: Batch) -> None:
        views = tuple(view.clone() for view in batch.views)
        self._input = Batch(views=views, labels=batch.labels.clone(), ids=batch.ids.clone(), step=batch.step)
        norms = [module for module in self._method.modules() if isinstance(module, _BatchNorm)]
        statistics = [buffer for norm in norms for buffer in norm.buffers()]
        before, generator = [buffer.clone() for buffer in statistics], torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._method.zero_grad(set_to_none=True)
                self._run(self._input)
        torch.cuda.current_stream().wait_stream(stream)
        # the graph then makes gradients of its own
        self._method.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self._run(self._input)
        self._graph = graph
        # warm-ups count for nothing
        for buffer, value in zip(statistics, before, strict=True):
            buffer.copy_(value)
        torch.cuda.set_rng_state(generator)


def _tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    return (*batch.views, batch.labels, batch.ids)
