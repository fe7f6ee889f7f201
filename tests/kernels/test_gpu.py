"""GPU only: the kernels run, never wait for the device, and can be captured in a CUDA graph."""

import pytest
import torch
from torch import Tensor

from fastssl_kernels import parity
from fastssl_kernels.parity import Inputs

pytestmark = pytest.mark.gpu

each_loss = pytest.mark.parametrize("loss", parity.LOSSES)


def leaves_of(loss: str, given: Inputs) -> list[Tensor]:
    return [getattr(given, name).requires_grad_() for name in parity.LOSSES[loss].gradients]


def values_and_gradients(loss: str, given: Inputs) -> list[Tensor]:
    outputs = parity.LOSSES[loss].call(given, 0.2)
    total = torch.stack([x.sum() for x in outputs]).sum()
    return [*(x.detach() for x in outputs), *torch.autograd.grad(total, leaves_of(loss, given))]


def inputs(loss: str, seed: int = 0) -> Inputs:
    return parity.prepare(loss, parity.make_inputs(65, 4096, 128, seed), torch.bfloat16, "cuda")


@each_loss
def test_does_not_wait_for_the_device(loss: str) -> None:
    given = inputs(loss)
    leaves_of(loss, given)
    values_and_gradients(loss, given)  # Compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values_and_gradients(loss, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_loss
def test_a_cuda_graph_replays_it_on_the_current_queue(loss: str) -> None:
    given, other = inputs(loss), inputs(loss, seed=1)
    leaves_of(loss, given)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            values_and_gradients(loss, given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = values_and_gradients(loss, given)
    with torch.no_grad():
        for name in ("query", "key", "queue"):
            getattr(given, name).copy_(getattr(other, name))
    graph.replay()
    expected = values_and_gradients(loss, given)
    for result, value in zip(captured, expected, strict=True):
        assert torch.equal(result, value)


@each_loss
def test_runs_are_bitwise_equal(loss: str) -> None:
    given = inputs(loss)
    leaves_of(loss, given)
    first, second = values_and_gradients(loss, given), values_and_gradients(loss, given)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(256, 65536, 128), (100, 5000, 96), (33, 1000, 500)], ids=str)
@each_loss
def test_matches_the_definition(loss: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    given = parity.prepare(loss, parity.make_inputs(*shape), dtype, "cuda")
    errors = parity.errors(parity.evaluate(loss, given, 0.2, "triton"), parity.evaluate_truth(loss, given, 0.2))
    tolerated = parity.tolerances(loss, dtype)
    assert errors.loss < tolerated.loss
    assert errors.gradient < tolerated.gradient
