"""One training step: forward, backward, optimizer, momentum update and queue."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.distributed import world_size
from fastssl.methods import Method, MethodOutput, TrainProgress
from fastssl.observe.stopwatch import Stopwatch
from fastssl.train.cuda_graph import Graphed
from fastssl_kernels import watch_losses
from fastssl_pipelines.batch import Batch


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators for a step, equally on all ranks."""
    # SplitMix64's odd constant spreads neighboring (seed, step) pairs over all seeds
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)


class TrainStep:
    """Callable that trains a method on one batch; weights, optimizer and queue change in place.

    All torch randomness of a step depends only on (seed, step), so a resumed run draws the same numbers. With several
    ranks each processes its part of the batch, and gradients are averaged. The batch is processed in `accumulate`
    sequential parts, each against the queue from before the step. Gradients are clipped to `clip_norm`. `cuda_graph`:
    the step, from the first forward to the queue, is captured at the first call and replayed later, except for what a
    method does on the host after a step (SMoG). The output's metrics include "gradient_norm" before clipping, on the
    device like the others.

    `stopwatch` measures "forward", "loss", "backward" and "optimizer" (including momentum encoder and queue); with a
    CUDA graph, "graph" replaces the parts that it contains.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        compile: bool,
        accumulate: int = 1,
        clip_norm: float | None = None,
        cuda_graph: bool = False,
    ):
        self.method, self.optimizer, self.seed = method, optimizer, seed
        self.accumulate, self.clip_norm = accumulate, clip_norm
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.stopwatch = Stopwatch(device)
        self._forward = cast(nn.Module, torch.compile(method, dynamic=False)) if compile else method
        if world_size() > 1:
            self._forward = _data_parallel(self._forward)
        self._parameters = [p for p in method.parameters() if p.requires_grad]
        self._graphed = Graphed(self._captured, self._state) if cuda_graph else None
        # Host values that the graph reads
        self._step, self._rate = (torch.zeros((), dtype=kind, device=device) for kind in (torch.int64, torch.float32))

    def __call__(self, batch: Batch, progress: TrainProgress, lr: float) -> MethodOutput:
        seed_step(self.seed, int(progress.step))
        self._set_rate(lr)
        if self._graphed:
            return self._replayed(self._graphed, batch, progress, lr)
        self.stopwatch.start()
        output = self._forward_and_backward(batch)
        self._update(output)
        self.method.after_step(output, progress)
        self.stopwatch.mark("optimizer")
        return output

    def _replayed(self, graphed: Graphed, batch: Batch, progress: TrainProgress, lr: float) -> MethodOutput:
        self._step.fill_(progress.step)
        self._rate.fill_(lr)
        if not graphed.captured:
            scale = self.scaler.state_dict()
            graphed.capture(batch)
            self.scaler.load_state_dict(scale)
            self.stopwatch.read()  # Discard the warm-ups
        self.stopwatch.start()
        output = graphed(batch)
        self.stopwatch.mark("graph")
        if not self.method.capturable:
            self.method.after_step(output, progress)
            self.stopwatch.mark("optimizer")
        return output

    def _captured(self, batch: Batch) -> MethodOutput:
        """The part of a step that needs only a batch, the step index and the learning rate from the host."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._set_rate(self._rate)
        output = self._forward_and_backward(batch)
        self._update(output)
        if self.method.capturable:
            self.method.after_step(output, TrainProgress(self._step, 0, 0))
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return output

    def _state(self) -> Iterator[Tensor]:
        """All tensors that a step changes."""
        yield from self.method.parameters()
        yield from self.method.buffers()
        for values in self.optimizer.state.values():
            yield from values.values()

    def _set_rate(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _update(self, output: MethodOutput) -> None:
        output.metrics["gradient_norm"] = self._finish_gradient()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _forward_and_backward(self, batch: Batch) -> MethodOutput:
        self.optimizer.zero_grad(set_to_none=True)  # A graph then allocates its own gradients
        outputs = []
        for count, part in enumerate(parts(batch, self.accumulate), 1):
            with self._without_exchange(count < self.accumulate):
                output = self._forward_part(part)
                self.scaler.scale(output.loss / self.accumulate).backward()
            self.stopwatch.mark("backward")
            outputs.append(output)
        return joined(outputs)

    def _forward_part(self, batch: Batch) -> MethodOutput:
        mark = self.stopwatch.mark
        with self.autocast, watch_losses(partial(mark, "forward"), partial(mark, "loss")):
            output = self._forward(batch)
        mark("forward")
        return output

    def _without_exchange(self, wanted: bool) -> AbstractContextManager[None]:
        """Keep gradients on their rank inside the `with` block if `wanted`: for all parts but the last."""
        if wanted and isinstance(self._forward, DistributedDataParallel):
            return self._forward.no_sync()
        return nullcontext()

    def _finish_gradient(self) -> Tensor:
        """Unscale and clip the gradient; returns its norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.clip_norm, norm, foreach=True)
        return norm


def _data_parallel(module: nn.Module) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # torch 2.15 deprecates the option, but nothing else yet keeps DDP from broadcasting rank 0's buffers at the
        # start: queue shards and batch norm statistics differ between ranks
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def parts(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch in `count` equal parts, in order."""
    if count == 1:
        yield batch
        return
    views = zip(*(view.chunk(count) for view in batch.views), strict=True)
    rows = zip(views, batch.labels.chunk(count), batch.ids.chunk(count), strict=True)
    for part, labels, ids in rows:
        yield Batch(views=part, labels=labels, ids=ids, step=batch.step)


def joined(outputs: list[MethodOutput]) -> MethodOutput:
    """The output of a step from those of its parts: mean losses and metrics, and all their updates."""
    if len(outputs) == 1:
        return outputs[0]
    losses = torch.stack([output.loss.detach() for output in outputs])
    names = outputs[0].metrics
    metrics = {name: torch.stack([output.metrics[name] for output in outputs]).mean() for name in names}
    updates = tuple(torch.cat(rows) for rows in zip(*(output.updates for output in outputs), strict=True))
    return MethodOutput(losses.mean(), metrics, updates)
