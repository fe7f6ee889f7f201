"""How far a backend is from the definition in float64: the cases, the errors, what is tolerated.

Tests, `fastssl verify` and the benchmarks' accuracy columns all measure with this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import groups, losses
from .backend import use_backend


@dataclass
class Inputs:
    """Arguments from which every loss can be called; unit rows, made by `make_inputs`."""

    query: Tensor
    """[N, C]"""
    key: Tensor
    """[N, C]: the first teacher, the second view."""
    second_key: Tensor
    """[N, C]: the second teacher."""
    queue: Tensor
    """[K, C]: the bank, the groups."""
    query_labels: Tensor
    """int64 [N]"""
    queue_labels: Tensor
    """int64 [K]"""
    target: Tensor
    """int64 [2, N], rows of the queue."""
    partner: Tensor
    """int64 [N], rows of the key."""
    weight: Tensor
    """[N], in [0, 1]"""

    def to(self, rows: torch.dtype, queue: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        """A copy with the queue in one dtype and all other rows in another."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        floating = {name: x.to(rows) for name, x in moved.items() if x.is_floating_point()}
        return Inputs(**{**moved, **floating, "queue": moved["queue"].to(queue)})


def make_inputs(rows: int, entries: int, features: int, seed: int = 0) -> Inputs:
    """float64 inputs in which queue entries are about as near to a query as its key, so that no loss is tiny.

    Queries are near each other too. There are three classes, and a third of all labels is unknown.
    """
    generator = torch.Generator().manual_seed(seed)

    def near(x: Tensor, distance: float) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return F.normalize(x + distance * F.normalize(noise, dim=1), dim=1)

    def hide(labels: Tensor) -> Tensor:
        return labels.masked_fill(torch.rand(len(labels), generator=generator) < 1 / 3, -1)

    center = near(torch.zeros(1, features, dtype=torch.float64), 1.0)
    query = near(center.expand(rows, features), 1.5)
    source = torch.arange(entries) % rows
    labels = torch.arange(rows) % 3
    key, queue = near(query, 1.5), near(query[source], 1.3)
    query_labels, queue_labels = hide(labels), hide((labels[source] + source // 3) % 3)
    return Inputs(
        query=query,
        key=key,
        second_key=near(query, 1.5),
        queue=queue,
        query_labels=query_labels,
        queue_labels=queue_labels,
        target=torch.randint(entries, (2, rows), generator=generator),
        partner=torch.randint(rows, (rows,), generator=generator),
        weight=torch.rand(rows, generator=generator, dtype=torch.float64),
    )


class Loss(NamedTuple):
    """One public function, called on `Inputs`."""

    call: Callable[[Inputs, float], tuple[Tensor, ...]]
    """With a temperature; returns rows of what is differentiable."""
    gradients: tuple[str, ...] = ("query",)
    """The inputs that get a gradient."""
    difference: bool = False
    """Whether it is a difference of two softmaxes' means, which rounding hurts more."""
    in_batch: bool = False
    """Whether the rows are the bank."""


def _labels(given: Inputs) -> dict[str, Tensor]:
    return {"query_labels": given.query_labels, "queue_labels": given.queue_labels}


def _pair(function: Callable[..., Any], labeled: bool = False, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    def call(given: Inputs, temperature: float) -> tuple[Tensor, ...]:
        labels = _labels(given) if labeled else {}
        return (
            function(
                given.query,
                given.key,
                given.queue,
                temperature=temperature,
                reduction="none",
                **labels,
                **options,
            ),
        )

    return call


def _soft_cross_entropy(given: Inputs, temperature: float) -> tuple[Tensor, ...]:
    teachers = torch.stack([given.key, given.second_key])
    return (
        losses.soft_cross_entropy(
            given.query,
            teachers,
            given.queue,
            temperature=temperature,
            teacher_temperature=0.6 * temperature,
            reduction="none",
        ),
    )


def _mixco(given: Inputs, temperature: float) -> tuple[Tensor, ...]:
    own = torch.arange(len(given.query), device=given.query.device)
    return (
        losses.mixco(
            given.query,
            given.key,
            given.queue,
            first=own,
            second=given.partner,
            weight=given.weight,
            temperature=temperature,
            reduction="none",
        ),
    )


def _unmix(given: Inputs, temperature: float) -> tuple[Tensor, ...]:
    return (
        losses.unmix(
            given.query,
            given.key,
            given.second_key,
            given.queue,
            weight=given.weight,
            temperature=temperature,
            reduction="none",
        ),
    )


def _bank_cross_entropy(given: Inputs, temperature: float) -> tuple[Tensor, ...]:
    rows = losses.bank_cross_entropy(given.query, given.queue, given.target, temperature=temperature, reduction="none")
    return (rows,)


def _update_groups(given: Inputs, _: float) -> tuple[Tensor, ...]:
    return groups.update_groups(_settled(given.query, given.queue, 1), given.queue, momentum=0.9)[:1]


def _mean_shift(given: Inputs, _: float) -> tuple[Tensor, ...]:
    k = min(5, len(given.queue))
    key = _settled(given.key, given.queue, k)
    return (losses.mean_shift(given.query, key, given.queue, k=k, reduction="none"),)


def _settled(rows: Tensor, bank: Tensor, count: int) -> Tensor:
    """`rows`; where rounding to 16 bits may change which entries are the `count` nearest, the clearest row instead.

    Such a row's loss jumps within rounding: its error would tell of the inputs and not of the implementation.
    """
    if count == len(bank):
        return rows
    similarities = (rows.detach().double() @ bank.double().T).topk(count + 1, dim=1).values
    gap = similarities[:, -2] - similarities[:, -1]
    own = torch.arange(len(rows), device=rows.device)
    # Rounding one side of two products of unit rows to bfloat16 changes their difference by 0.002 / sqrt(C).
    return rows[torch.where(gap > 2**-6 / rows.shape[1] ** 0.5, own, gap.argmax())]


def _nt_xent(given: Inputs, temperature: float, labels: Tensor | None = None) -> tuple[Tensor, ...]:
    return (losses.nt_xent(given.query, given.key, temperature=temperature, labels=labels, reduction="none"),)


def _nt_xent_with_labels(given: Inputs, temperature: float) -> tuple[Tensor, ...]:
    return _nt_xent(given, temperature, given.query_labels)


def _queue_read(given: Inputs, temperature: float) -> tuple[Tensor, ...]:
    return losses.queue_read(given.query, given.queue, temperature=temperature)


LOSSES: dict[str, Loss] = {
    "queue_read": Loss(_queue_read),
    "info_nce": Loss(_pair(losses.info_nce)),
    "unicon": Loss(_pair(losses.unicon, labeled=True)),
    "sup_con": Loss(_pair(losses.sup_con, labeled=True)),
    "soft_cross_entropy": Loss(_soft_cross_entropy, difference=True),
    "consistency": Loss(_pair(losses.consistency), difference=True),
    "consistency+positive": Loss(_pair(losses.consistency, include_positive=True), difference=True),
    "mixco": Loss(_mixco),
    "unmix": Loss(_unmix),
    "bank_cross_entropy": Loss(_bank_cross_entropy, gradients=("query", "queue")),
    "update_groups": Loss(_update_groups),
    "mean_shift": Loss(_mean_shift),
    "nt_xent": Loss(_nt_xent, gradients=("query", "key"), in_batch=True),
    "nt_xent+labels": Loss(_nt_xent_with_labels, gradients=("query", "key"), in_batch=True),
}
"""Every public loss by name; a part after "+" names a variant."""


class Result(NamedTuple):
    """Values and gradients of one evaluation, each flattened into one vector."""

    values: Tensor
    gradients: Tensor


class Errors(NamedTuple):
    """Relative Frobenius errors against float64."""

    loss: float
    gradient: float


def tolerances(loss: str, dtype: torch.dtype) -> Errors:
    """The errors that are tolerated with a queue of `dtype`, inputs of `make_inputs` and a temperature of 0.07 or more.

    They follow from rounding the queue's products (design/methods.md, 13.4), and a gradient returned in 16 bits.
    """
    entry = LOSSES[loss]
    if dtype == torch.float64:
        return Errors(1e-10, 1e-10)
    if dtype == torch.float32:
        return Errors(1e-6, 5e-5 if entry.difference else 1e-5)
    returned = torch.finfo(dtype).eps / 4 if len(entry.gradients) > 1 else 0.0
    return Errors(1e-3, 2e-2 if entry.difference else 2e-3 + returned)


def prepare(loss: str, inputs: Inputs, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """`inputs` as a training step has them: the bank in `dtype`, other rows in float32 or, with float64, in it."""
    rows = dtype if LOSSES[loss].in_batch or dtype == torch.float64 else torch.float32
    return inputs.to(rows, dtype, device)


def evaluate_truth(loss: str, given: Inputs, temperature: float) -> Result:
    """The definition in float64 of what `given`, rounded as it is, holds."""
    return evaluate(loss, given.to(torch.float64, torch.float64, given.query.device), temperature, "reference")


def evaluate(loss: str, given: Inputs, temperature: float, backend: str) -> Result:
    """Rows of the loss, and gradients of their sum with random weights of either sign."""
    entry = LOSSES[loss]
    leaves = {name: getattr(given, name).detach().requires_grad_() for name in entry.gradients}
    with use_backend(backend):
        outputs = entry.call(Inputs(**{**vars(given), **leaves}), temperature)
    generator = torch.Generator().manual_seed(17)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    total = torch.stack([(x * w).sum() for x, w in zip(outputs, weights, strict=True)]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return Result(_flat(outputs), _flat(gradients))


def errors(result: Result, truth: Result) -> Errors:
    """How far `result` is from `truth`."""
    return Errors(*(_error(given, expected) for given, expected in zip(result, truth, strict=True)))


class RoundedProducts(TorchDispatchMode):
    """Within, matrix products round operands and result to `dtype`: plain torch code as autocast runs it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.float32:
            return func(*(x.to(self.dtype) for x in args)).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.detach().double().flatten().cpu() for x in tensors])


def _error(given: Tensor, expected: Tensor) -> float:
    """Relative; where zeros are expected, the norm itself."""
    norm = expected.norm().item()
    return (given - expected).norm().item() / (norm if norm > 0 else 1.0)
