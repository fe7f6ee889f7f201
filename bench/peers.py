"""The columns of the benchmark: fastssl and its alternatives, each as a step of loss and gradient.

A function here builds a column's step from a case: called without arguments, the step returns the mean loss
and its gradient with respect to the query, and holds its own copies of what it changes.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from fastssl_kernels import LOSSES
from fastssl_kernels.backend import requested, resolve
from fastssl_kernels.parity import Inputs

from .measure import Step

BOTH = ("info_nce", "unicon")  # The losses that have peers


class Unavailable(Exception):
    """Raised if a column cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: float32 query and key [N, C], and a queue [K, C]."""

    loss: str
    inputs: Inputs
    temperature: float
    autocast: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.inputs.queue.device


@dataclass(frozen=True)
class Column:
    """How to build a column, and its properties."""

    build: Callable[[Case], Step]
    note: str
    losses: tuple[str, ...] | None = ("info_nce",)
    """None: every registered loss."""
    normalizes: bool = False
    """Whether it normalizes the query itself: its gradient then lacks the component along the query."""
    capturable: bool = True
    """Whether it can be captured in a CUDA graph."""


def _step(case: Case, loss: Callable[[Tensor], Tensor]) -> Step:
    query = case.inputs.query.detach().clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = loss(query)
        (gradient,) = torch.autograd.grad(value, query)
        return value.detach(), gradient

    return step


def _eager_info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float, *_: Tensor) -> Tensor:
    own = (query * key).sum(1, keepdim=True)
    logits = torch.cat([own, query @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))


def _eager_unicon(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, query_labels: Tensor, queue_labels: Tensor
) -> Tensor:
    own = (query * key).sum(1, keepdim=True)
    logits = torch.cat([own, query @ queue.T], 1) / temperature
    same = (query_labels[:, None] == queue_labels) & (query_labels[:, None] != -1)
    positive = torch.cat([torch.ones_like(same[:, :1]), same], 1)
    return torch.log(1 + (logits.exp() * ~positive).sum(1) * ((-logits).exp() * positive).sum(1)).mean()


_EAGER: dict[str, Callable[..., Tensor]] = {"info_nce": _eager_info_nce, "unicon": _eager_unicon}


@functools.cache
def _compiled(loss: str) -> Callable[..., Tensor]:
    return torch.compile(_EAGER[loss], fullgraph=True, dynamic=False)


def _eager(case: Case, *, compiled: bool = False, autocast: bool = False) -> Step:
    function = _compiled(case.loss) if compiled else _EAGER[case.loss]
    given = case.inputs
    queue = given.queue.to(_autocast_dtype(case) if autocast else torch.float32)

    def loss(query: Tensor) -> Tensor:
        with torch.autocast(case.device.type, case.autocast, enabled=autocast):
            return function(query, given.key, queue, case.temperature, given.query_labels, given.queue_labels)

    return _step(case, loss)


def _autocast_dtype(case: Case) -> torch.dtype:
    if case.autocast == torch.float32:
        raise Unavailable("autocast to float32 has no effect; give --dtype bfloat16 or float16")
    return case.autocast


class _FromRead(torch.autograd.Function):
    """InfoNCE rows and their gradient, in float32, from the logsumexp and mean returned by attention."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mean: Tensor, lse: Tensor, temperature: float) -> Tensor:
        own = (query * key).sum(1) / temperature
        total = torch.logaddexp(lse, own)
        of_queue, of_key = (lse - total).exp()[:, None], torch.expm1(own - total)[:, None]
        ctx.save_for_backward((of_queue * mean + of_key * key) / temperature)
        return total - own

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upstream[0][:, None] * gradient, None, None, None, None


def _attention(case: Case, *, attend: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]) -> Step:
    given = case.inputs
    queue = given.queue[None, None]

    def loss(query: Tensor) -> Tensor:
        with torch.no_grad():
            mean, lse = attend(query.detach().to(queue.dtype)[None, None], queue, 1 / case.temperature)
        mean, lse = mean.reshape(query.shape).float(), lse.reshape(len(query)).float()
        return _FromRead.apply(query, given.key, mean, lse, case.temperature).mean()

    return _step(case, loss)


def _flash(query: Tensor, queue: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, queue, queue, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention(query, queue, queue, scale=scale)[:2]


def _cudnn(query: Tensor, queue: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if query.device.type != "cuda":
        raise Unavailable("cuDNN attention needs a CUDA device")
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    return attend(query, queue, queue, None, compute_log_sumexp=True, scale=scale)[:2]


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _flex(query: Tensor, queue: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    mean, read = _compiled_flex()(query, queue, queue, scale=scale, return_aux=AuxRequest(lse=True))
    return mean, read.lse


def _lightly(case: Case, *, autocast: bool = False) -> Step:
    given = case.inputs
    dtype = _autocast_dtype(case) if autocast else torch.float32
    criterion = _peer("lightly.loss").NTXentLoss(case.temperature, memory_bank_size=tuple(given.queue.shape))
    # Its bank is always float32, initialized with noise and changed by each step
    criterion.to(case.device).memory_bank.bank = given.queue.float().clone()

    def loss(query: Tensor) -> Tensor:
        with torch.autocast(case.device.type, dtype, enabled=autocast):
            return criterion(query, given.key)

    return _step(case, loss)


def _metric_learning(case: Case, *, loss: str) -> Step:
    given, losses = case.inputs, _peer("pytorch_metric_learning.losses")
    (rows, features), entries = given.query.shape, len(given.queue)
    if loss == "NTXentLoss" and case.device.type == "cpu":
        # Measured: 18 bytes per element of its matrix of positive and negative pairs
        _require_memory(18 * rows**2 * (rows + entries))
    memory = losses.CrossBatchMemory(
        getattr(losses, loss)(temperature=case.temperature), features, memory_size=rows + entries
    ).to(case.device)
    # It enqueues the keys before it computes the loss, so they take the first places of its memory
    memory.embedding_memory[rows:] = given.queue.float()
    memory.label_memory[:] = torch.arange(rows + entries)
    memory.has_been_filled = True
    labels = torch.arange(rows, device=case.device).repeat(2)
    is_key = torch.arange(2 * rows, device=case.device) >= rows

    def taken(query: Tensor) -> Tensor:
        memory.queue_idx = 0
        return memory(torch.cat([query, given.key]), labels, enqueue_mask=is_key)

    return _step(case, taken)


def _peer(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f'{error}; the extra "peers" installs it') from None


def _require_memory(needed: int) -> None:
    """Raise Unavailable if a CPU lacks the memory, because the system would kill the process."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise Unavailable(
            f"needs about {needed / 2**30:.0f} GiB for N x N(N+K) matrices, and {free / 2**30:.0f} GiB are free"
        )


def _fastssl(case: Case, *, return_accuracy: bool = False) -> Step:
    entry = LOSSES[case.loss]
    arguments = entry.arguments(case.inputs, case.temperature)
    if "reduction" in arguments:
        arguments["reduction"] = "mean"
    if return_accuracy:
        arguments["return_accuracy"] = True
    name = next(name for name, value in arguments.items() if value is case.inputs.query)

    def loss(query: Tensor) -> Tensor:
        result = entry.function(**{**arguments, name: query})
        value = result[0] if return_accuracy else result
        return value if value.ndim == 0 else value.mean()

    return _step(case, loss)


def backend(case: Case) -> str:
    """The implementation that runs fastssl's columns."""
    return resolve("auto", case.inputs.queue) if requested() == "auto" else requested()


def _matmuls(case: Case) -> Step:
    queue = case.inputs.queue
    query = case.inputs.query.to(queue.dtype)

    def step() -> None:
        (query @ queue.T) @ queue

    return step


_READ = "read in the queue's dtype, closed form in float32"
_LIGHTLY = "as shipped: normalizes again, clones its bank, enqueues; gradient compared without the part along the query"
_METRIC = "as shipped in CrossBatchMemory: another quantity, the batch's other keys are negatives too; normalizes again"

COLUMNS: dict[str, Column] = {
    "fastssl": Column(_fastssl, "", None),
    "fastssl-accuracy": Column(partial(_fastssl, return_accuracy=True), "with contrast accuracy", BOTH),
    "matmuls": Column(_matmuls, "the two matrix products alone: no loss, no gradient", BOTH),
    "eager": Column(_eager, "float32", BOTH),
    "eager-autocast": Column(partial(_eager, autocast=True), "queue kept in the autocast dtype", BOTH),
    "compile": Column(partial(_eager, compiled=True), "torch.compile of eager", BOTH),
    "compile-autocast": Column(partial(_eager, compiled=True, autocast=True), "torch.compile of eager-autocast", BOTH),
    "sdpa-flash": Column(partial(_attention, attend=_flash), _READ),
    "sdpa-cudnn": Column(partial(_attention, attend=_cudnn), _READ),
    "flex": Column(partial(_attention, attend=_flex), _READ),
    "lightly": Column(_lightly, _LIGHTLY, normalizes=True, capturable=False),
    "lightly-autocast": Column(partial(_lightly, autocast=True), _LIGHTLY, normalizes=True, capturable=False),
    "pml-ntxent": Column(partial(_metric_learning, loss="NTXentLoss"), _METRIC, normalizes=True, capturable=False),
    "pml-supcon": Column(partial(_metric_learning, loss="SupConLoss"), _METRIC, normalizes=True, capturable=False),
}
