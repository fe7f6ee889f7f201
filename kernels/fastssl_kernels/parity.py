"""Errors of a backend against the float64 definition: inputs, evaluation and tolerances.

Used by the tests, `fastssl verify` and the accuracy columns of the benchmarks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .backend import use_backend
from .loss_registry import Inputs
from .registered_losses import LOSSES


def make_inputs(rows: int, entries: int, features: int, seed: int = 0) -> Inputs:
    """float64 inputs whose queue entries are about as near to a query as its key, so that no loss is tiny.

    Queries are near each other too. There are three classes; a third of the labels are unknown.
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


class Result(NamedTuple):
    """Values and gradients of one evaluation, each flattened into one vector."""

    values: Tensor
    gradients: Tensor


class Errors(NamedTuple):
    """Relative Frobenius errors against float64."""

    loss: float
    gradient: float


def tolerances(loss: str, dtype: torch.dtype) -> Errors:
    """Errors allowed for a queue of `dtype`, inputs from `make_inputs` and a temperature of 0.07 or more.

    They follow from rounding the queue's products and, in 16 bits, the gradient returned to a bank.
    """
    entry = LOSSES[loss]
    if dtype in entry.tolerances:
        return Errors(*entry.tolerances[dtype])
    if dtype == torch.float64:
        return Errors(1e-10, 1e-10)
    if dtype == torch.float32:
        return Errors(1e-6, 5e-5 if entry.difference else 1e-5)
    returned = torch.finfo(dtype).eps / 4 if len(entry.gradients) > 1 else 0.0
    return Errors(1e-3, 2e-2 if entry.difference else 2e-3 + returned)


def prepare(loss: str, inputs: Inputs, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """`inputs` as in a training step: the bank in `dtype`, other rows in float32 (float64 with a float64 bank)."""
    rows = dtype if LOSSES[loss].in_batch or dtype == torch.float64 else torch.float32
    return inputs.to(rows, dtype, device)


def why_not(loss: str, backend: str) -> str | None:
    """Why a loss does not support a backend, or None; see `available_backends` for this machine."""
    has = LOSSES[loss].backends
    return None if backend in ("reference", *has) else f"it is registered for {' and '.join(has)} only"


def evaluate_truth(loss: str, given: Inputs, temperature: float) -> Result:
    """Evaluate the definition in float64 on `given`, rounded as it is."""
    return evaluate(loss, given.to(torch.float64, torch.float64, given.query.device), temperature, "reference")


def evaluate(loss: str, given: Inputs, temperature: float, backend: str) -> Result:
    """Evaluate the rows of a loss, and the gradients of their sum with random weights of either sign."""
    entry = LOSSES[loss]
    if reason := why_not(loss, backend):
        raise ValueError(f"{loss} was evaluated on {backend}, but {reason}; choose another backend")
    leaves = {name: getattr(given, name).detach().requires_grad_() for name in entry.gradients}
    with use_backend(backend):
        run = entry.define if backend == "reference" else entry.call
        outputs = run(Inputs(**{**vars(given), **leaves}), temperature)
    generator = torch.Generator().manual_seed(17)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    total = torch.stack([(x * w).sum() for x, w in zip(outputs, weights, strict=True)]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return Result(_flat(outputs), _flat(gradients))


def errors(result: Result, truth: Result) -> Errors:
    """Errors of `result` against `truth`."""
    return Errors(*(_error(given, expected) for given, expected in zip(result, truth, strict=True)))


class RoundedProducts(TorchDispatchMode):
    """Mode in which matrix products round operands and result to `dtype`, as under autocast."""

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
    """Relative error; the absolute norm if zeros are expected."""
    norm = expected.norm().item()
    return (given - expected).norm().item() / (norm if norm > 0 else 1.0)
