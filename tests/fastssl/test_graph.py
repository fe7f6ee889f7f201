"""The captured step, with a fake CUDA graph on the CPU that reruns the step at each replay."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from fastssl.config import OptimConfig
from fastssl.methods import METHODS, TrainProgress
from fastssl.train.cuda_graph import Graphed
from fastssl.train.optim import build_optimizer
from fastssl.train.step import TrainStep
from tests.fastssl.small_methods import STEPS_PER_EPOCH, TOTAL_STEPS, VARIANTS, a_batch, build

DRAWS_NUMBERS = ("mixco", "unmix")  # A fake replay draws other random numbers than a GPU's graph
CPU = torch.device("cpu")


class FakeGraph:
    """Reruns the captured call at a replay, and writes the results into the output of that call."""

    def __init__(self, graphed: Graphed) -> None:
        self.graphed = graphed

    def replay(self) -> None:
        output, held = self.graphed._run(self.graphed._input), self.graphed._output
        for static, value in zip(tensors(held), tensors(output), strict=True):
            static.detach().copy_(value.detach())


def tensors(output):
    return (output.loss, *output.metrics.values(), *output.updates)


@pytest.fixture(autouse=True)
def modes(monkeypatch):
    """The error modes of all captures so far."""
    modes: list[str] = []
    capture = Graphed.capture

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    @contextlib.contextmanager
    def capturing(graph, *, capture_error_mode):
        modes.append(capture_error_mode)
        yield

    def fake_capture(self, batch):
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        capture(self, batch)

    monkeypatch.setattr(Graphed, "capture", fake_capture)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)
    return modes


def trained(variant, optimizer, cuda_graph, *, restart):
    name, own = VARIANTS[variant]
    method = build(name, **own)
    built = build_optimizer(method, OptimConfig(optimizer=optimizer, lr=0.05, trust=0.02))
    step = TrainStep(method, built, seed=0, device=CPU, dtype=torch.float32, compile=False, cuda_graph=cuda_graph)
    outputs = []
    for index in range(STEPS_PER_EPOCH + 1):
        if restart and index == 3:  # As after a non-finite step
            for part in (method, built):
                part.load_state_dict(copy.deepcopy(part.state_dict()))
        output = step(a_batch(name, index), TrainProgress(index, TOTAL_STEPS, STEPS_PER_EPOCH), 2.0 ** -(5 + index))
        outputs.append([output.loss.item(), *(value.item() for value in output.metrics.values())])
    return outputs, method.state_dict(), step


@pytest.mark.parametrize("restart", [False, True], ids=["", "after a restart"])
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("variant", [name for name, (method, _) in VARIANTS.items() if method not in DRAWS_NUMBERS])
def test_a_captured_step_equals_the_plain_one(variant, optimizer, restart, modes):
    """The learning rate and the position in the queue advance, and the warm-ups leave no trace."""
    (expected, state, _), (got, graphed, step) = (
        trained(variant, optimizer, cuda_graph, restart=restart) for cuda_graph in (False, True)
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for key, value in state.items():
        torch.testing.assert_close(graphed[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert modes == ["thread_local"]
    outside = set() if METHODS[VARIANTS[variant][0]].capturable else {"optimizer"}
    only_here = {"forward", "loss", "backward"}  # A real replay does not mark these
    assert set(step.stopwatch.read()) - only_here == {"graph"} | outside


def test_an_overflow_in_a_captured_step_halves_the_scale_once():
    results = []
    for cuda_graph in (False, True):
        method = build("mocov2")
        optimizer = build_optimizer(method, OptimConfig(lr=0.05))
        step = TrainStep(
            method, optimizer, seed=0, device=CPU, dtype=torch.float16, compile=False, cuda_graph=cuda_graph
        )
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        step(a_batch("mocov2", 0), TrainProgress(0, TOTAL_STEPS, STEPS_PER_EPOCH), 0.05)
        results.append((step.scaler.get_scale(), method.state_dict()))
    assert results[0][0] == results[1][0] == 2.0**39
    for key, value in results[0][1].items():
        assert torch.equal(results[1][1][key], value), key
