"""Loss and gradient of every loss on every backend; two of them also eager, compiled and with flash attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.loss_timing import exact
from bench.peers import COLUMNS, Case, Unavailable
from fastssl_kernels import available_backends, parity, use_backend

Shape = tuple[int, int, int]

TEMPERATURE = 0.2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOSSES = [name for name, loss in parity.LOSSES.items() if loss.timed]
PEERS = {
    "float32": ("eager", "compile", "sdpa-flash"),
    "bfloat16": ("eager-autocast", "compile-autocast", "sdpa-flash"),
}


@pytest.mark.parametrize("backend", ["triton", "blockwise", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss(
    benchmark: BenchmarkFixture, device: torch.device, loss: str, shape: Shape, dtype: str, backend: str
) -> None:
    if reason := available_backends(device)[backend] or parity.why_not(loss, backend):
        pytest.skip(reason)
    benchmark.group = _group(loss, shape, dtype)
    found = benchmark(_step(loss, _prepared(loss, shape, dtype, device), backend))
    for part, expected, tolerated in zip(
        found, _truth(loss, shape, dtype, device), parity.tolerances(loss, DTYPES[dtype]), strict=True
    ):
        assert _error(part, expected) <= tolerated


@pytest.mark.parametrize(
    ("loss", "dtype", "peer"),
    [
        (loss, dtype, peer)
        for loss in ("info_nce", "unicon")
        for dtype, peers in PEERS.items()
        for peer in peers
        if loss in (COLUMNS[peer].losses or ())
    ],
)
def test_peer(
    benchmark: BenchmarkFixture, device: torch.device, loss: str, shape: Shape, dtype: str, peer: str
) -> None:
    benchmark.group = _group(loss, shape, dtype)
    case = Case(loss, _prepared(loss, shape, dtype, device), TEMPERATURE, DTYPES[dtype])
    torch._dynamo.reset()  # It silently falls back to eager after a few shapes
    try:
        step = COLUMNS[peer].build(case)
        step()
    except (Unavailable, RuntimeError, NotImplementedError) as error:  # No compiler, no kernel, or not enough memory
        pytest.skip(f"{peer}: {next(iter(str(error).splitlines()), type(error).__name__)}")
    found = benchmark(step)
    for part, expected in zip(found, exact(case), strict=True):
        assert _error(part, expected) <= (1e-5 if dtype == "float32" else 2e-2)


def _group(loss: str, shape: Shape, dtype: str) -> str:
    return f"{loss} {'x'.join(map(str, shape))} {dtype}"


def _step(loss: str, given: parity.Inputs, backend: str) -> Callable[[], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Values of the loss and gradients of their sum."""
    entry = parity.LOSSES[loss]
    run = entry.define if backend == "reference" else entry.call
    leaves = {name: getattr(given, name).detach().requires_grad_() for name in entry.gradients}
    inputs = replace(given, **leaves)

    def step() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        with use_backend(backend):
            values = run(inputs, TEMPERATURE)
        gradients = torch.autograd.grad(values, list(leaves.values()), [torch.ones_like(x) for x in values])
        return tuple(x.detach() for x in values), gradients

    return step


@functools.lru_cache(maxsize=1)
def _inputs(shape: Shape) -> parity.Inputs:
    return parity.make_inputs(*shape)


def _prepared(loss: str, shape: Shape, dtype: str, device: torch.device) -> parity.Inputs:
    return parity.prepare(loss, _inputs(shape), DTYPES[dtype], device)


@functools.lru_cache(maxsize=1)
def _truth(loss: str, shape: Shape, dtype: str, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    given = _prepared(loss, shape, dtype, device).to(torch.float64, torch.float64, device)
    return _step(loss, given, "reference")()


def _error(found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> float:
    """Relative error in the Frobenius norm."""
    one, other = (
        torch.cat([x.double().flatten() for x in (parts if isinstance(parts, tuple) else (parts,))])
        for parts in (found, expected)
    )
    return ((one - other).norm() / other.norm()).item()
